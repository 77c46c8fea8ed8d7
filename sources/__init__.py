"""Images as they are found: files, archives, arrays, the Hub, and datasets with a name."""

from sources.files import Progress, Source, in_threads, open_files, why_unusable
from sources.labels import count_classes, name_classes
from sources.named import find_images

__all__ = [
    "Progress",
    "Source",
    "count_classes",
    "find_images",
    "in_threads",
    "name_classes",
    "open_files",
    "why_unusable",
]
