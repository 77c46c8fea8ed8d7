"""A feature extractor for the digits: a small classifier of theirs, as a TorchScript file.

Inception is made for photographs; on 8x8 digits its features say little. Run from the project's
folder; seconds on one core:

    python benchmarks/digits_extractor.py digits.pt
    python evaluate.py lightning_logs/digits --extractor digits.pt --num-images 10000
"""

import sys
import warnings

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Classifier(nn.Module):
    """uint8 [B, 3, 8, 8] -> features [B, 64] and logits [B, 10]."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(1024, 64), nn.Tanh(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(pictures[:, :1].float() / 127.5 - 1)
        return features, self.head(features)


if __name__ == "__main__":
    torch.manual_seed(0)
    digits = load_digits()
    pictures = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    pictures, labels = pictures.expand(-1, 3, -1, -1), torch.from_numpy(digits.target)
    order = torch.randperm(len(labels))
    train, test = order[:1500], order[1500:]
    net = Classifier()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(30):
        for rows in train[torch.randperm(len(train))].split(50):
            loss = cross_entropy(net(pictures[rows])[1], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    accuracy = (net(pictures[test])[1].argmax(dim=1) == labels[test]).float().mean()
    print(f"{accuracy:.1%} of {len(test)} held-out digits are told right")
    warnings.simplefilter("ignore")  # that TorchScript is old
    torch.jit.script(net.eval()).save(sys.argv[1])
