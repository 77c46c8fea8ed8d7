"""Draw docs/data.png, some images of sets that need no download: python docs/data.py.

From the project's folder; Fashion-MNIST and emoji are Debian's (dataset-fashion-mnist,
fonts-noto-color-emoji, unicode-data).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from PIL import Image

from config import load_config
from dataset import fit_image
from docs.sprites import KINDS, draw
from sources import find_images

COLUMNS, CELL, GAP = 12, 64, 4
ROOTS = {"fashion_mnist": "/usr/share/datasets/fashion-mnist"}


def some(name: str) -> list[np.ndarray]:
    """Return images of a config's set as training sees them, uint8 [C, H, W], of all classes."""
    data = load_config(f"configs/{name}.yml").dataset
    source = find_images(data.name, Path(ROOTS.get(name, data.root)))["train"]
    labels, random = source.labels().of, np.random.default_rng(0)
    classes = np.arange(COLUMNS) % (labels.max() + 1)
    rows = [int(random.choice(np.flatnonzero(labels == label))) for label in classes]
    form = dict(image_size=data.image_size, channels=data.channels)
    return [fit_image(source.open(row), **form) for row in rows]


def enlarge(image: np.ndarray) -> np.ndarray:
    """Return [CELL, CELL, 3]: each pixel is a square of pixels, on white."""
    times = CELL // image.shape[-1]
    large = np.broadcast_to(image, (3, *image.shape[1:])).repeat(times, 1).repeat(times, 2)
    cell, edge = np.full((CELL, CELL, 3), 255, np.uint8), (CELL - large.shape[-1]) // 2
    cell[edge : CELL - edge, edge : CELL - edge] = large.transpose(1, 2, 0)
    return cell


def main() -> None:
    per_row = COLUMNS // len(KINDS)
    sprites = [draw(len(KINDS) * i + kind) for kind in range(len(KINDS)) for i in range(per_row)]
    rows = [some("digits"), [s.transpose(2, 0, 1) for s in sprites]]
    rows += [some("fashion_mnist"), some("emoji")]
    sheet = [np.pad(np.stack(list(map(enlarge, row))), ((0, 0), (0, GAP), (0, GAP), (0, 0)),
                    constant_values=255) for row in rows]  # fmt: skip
    Image.fromarray(np.vstack([np.hstack(row) for row in sheet])).save(
        Path(__file__).with_name("data.png"), optimize=True
    )


if __name__ == "__main__":
    main()
