"""A feature extractor for small images: a little classifier of them, as a TorchScript file.

Inception is made for photographs; of digits its features say little. It takes any config whose
data has labels, one class an image, and overrides. Run from the project's folder; seconds for
digits, a minute or two for emoji and Fashion-MNIST on one core:

    python benchmarks/extractor.py configs/digits.yml digits.pt
    python benchmarks/extractor.py configs/emoji.yml emoji.pt
    python benchmarks/extractor.py configs/fashion_mnist.yml fashion.pt dataset.root=DIR
    python evaluate.py pretrained/digits.safetensors --extractor digits.pt --num-images 5000
"""

import sys
import warnings
from pathlib import Path

sys.path.pop(0)  # this folder: its train, sample and profile are not those meant
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from config import load_config
from dataset import Images
from training.datamodule import open_images


class Classifier(nn.Module):
    """uint8 [B, 3, H, W] -> features [B, 64] and logits [B, classes]."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        channels, height, width = shape
        self.channels = 1 if channels < 3 else 3
        self.features = nn.Sequential(
            nn.Conv2d(self.channels, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * ((height + 3) // 4) * ((width + 3) // 4), 64), nn.Tanh(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images[:, : self.channels].float() / 127.5 - 1)
        return features, self.head(features)


def labelled(config_file: str, overrides: list[str]) -> tuple[Tensor, Tensor, Images]:
    """Return images, uint8 [N, 3, H, W], their classes, [N], and the training set they are of."""
    train = open_images(load_config(config_file, [*overrides, "dataset.labels=true"]))["train"]
    images, labels = train[list(range(len(train)))]
    assert labels is not None
    if (labels.sum(1) != 1).any():
        raise SystemExit(f"{config_file}: some images have several classes, or none")
    images = images[:, :3] if images.shape[1] > 2 else images[:, :1].expand(-1, 3, -1, -1)
    return images, labels.argmax(1), train


if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels, found = labelled(sys.argv[1], sys.argv[3:])
    order = torch.randperm(len(labels))
    test, train = order[: len(order) // 6], order[len(order) // 6 :]
    net = Classifier(found.shape, len(found.classes))
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
