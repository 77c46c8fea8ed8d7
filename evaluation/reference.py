"""Images that are there already: read in batches; and the statistics of a reference, kept."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dataset import Batch
from evaluation.distributed import Ranks
from evaluation.extractor import Extractor
from evaluation.metrics import KEPT, Statistics, Tally, load_statistics, save_statistics


class RealImages(Protocol):
    """`dataset.Images`, or `dataset.FolderImages`, which are read as they are asked for."""

    @property
    def shape(self) -> tuple[int, int, int]: ...  # C, H, W

    def __len__(self) -> int: ...

    def __getitem__(self, rows: list[int]) -> Batch: ...

    def fingerprint(self) -> str: ...


def read(
    images: RealImages,
    batches: Iterable[list[int]],
    *,
    rows: Sequence[int] | None = None,
    advance: Callable[[float], object] = lambda count: None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (batch, uint8 images) of each batch that is not empty, as `generation.generate` does.

    Args:
        rows: which image a number in a batch means; None is the number itself.
        advance: hears after each batch how many images it had.
    """
    for batch in filter(None, batches):
        yield batch, images[[rows[i] for i in batch] if rows else batch].images
        advance(len(batch))


def reference_statistics(
    images: RealImages,
    extractor: Extractor,
    ranks: Ranks,
    cache: Path,
    *,
    batch_size: int,
    advance: Callable[[float], object] = lambda count: None,
) -> Statistics | None:
    """Return the statistics of real images, kept in `cache`; None on ranks other than 0."""
    count, shape = len(images), images.shape
    key = ["1", images.fingerprint(), count, list(shape), extractor.name, extractor.digest]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = cache / f"reference-{name}.npz"
    found = None
    if ranks.is_first and path.exists():
        with suppress(ValueError):  # damaged: once more
            found = load_statistics(path)
    if ranks.first(found is not None):
        return found
    tally = Tally.of(extractor, count, shape, keep=KEPT)
    ranks.measure(read(images, ranks.share(count, batch_size), advance=advance), tally, extractor)
    if not ranks.is_first:
        return None
    save_statistics(path, tally.statistics())
    return tally.statistics()
