"""A feature extractor for small gray images: a little classifier of them, as a TorchScript file.

Inception is made for photographs; of digits its features say little. Run from the project's folder;
seconds for digits, a minute or two for Fashion-MNIST on one core:

    python benchmarks/extractor.py configs/digits.yml digits.pt
    python benchmarks/extractor.py configs/fashion_mnist.yml fashion.pt DATASET_ROOT
    python evaluate.py pretrained/digits.safetensors --extractor digits.pt --num-images 5000
"""

import gzip
import sys
import warnings
from pathlib import Path

sys.path.pop(0)  # this folder: its train, sample and profile are not those meant
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from config import load_config
from dataset import load_images


class Classifier(nn.Module):
    """uint8 [B, 3, H, W] -> features [B, 64] and logits [B, 10]."""

    def __init__(self, size: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * ((size + 3) // 4) ** 2, 64), nn.Tanh(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images[:, :1].float() / 127.5 - 1)
        return features, self.head(features)


def labelled(config_file: str, root: str | None) -> tuple[Tensor, Tensor]:
    """Return the training images, uint8 [N, 3, H, W], and what they show, [N]."""
    overrides = [f"dataset.root={root}"] if root else []
    dataset = load_config(config_file, [*overrides, "dataset.random_flip=false"]).dataset
    keys = dataset.model_dump(exclude={"random_flip"})
    train = load_images(**keys)["train"]
    if dataset.name == "digits":
        from sklearn.datasets import load_digits

        labels = load_digits().target[train.rows]
    else:
        path = Path(dataset.root) / "train-labels-idx1-ubyte.gz"
        labels = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=8)
    images = train[list(range(len(train)))].images.expand(-1, 3, -1, -1)
    return images, torch.from_numpy(labels.astype(np.int64))


if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels = labelled(sys.argv[1], sys.argv[3] if len(sys.argv) > 3 else None)
    order = torch.randperm(len(labels))
    test, train = order[: len(order) // 6], order[len(order) // 6 :]
    net = Classifier(images.shape[-1])
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(max(2, 45_000 // len(train))):
        for rows in train[torch.randperm(len(train))].split(50):
            loss = cross_entropy(net(images[rows])[1], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        told = torch.cat([net(images[rows])[1].argmax(dim=1) for rows in test.split(500)])
    print(f"{(told == labels[test]).float().mean():.1%} of {len(test):,} test images told right")
    warnings.simplefilter("ignore")  # that TorchScript is old
    torch.jit.script(net.eval()).save(sys.argv[2])
