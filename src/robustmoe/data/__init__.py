"""Images and labels: batches of x in [0, 1], data sets read from their own formats, augmentation keyed by image.

Normalisation lives in the model, never here: an attack's ball is measured in pixels. `DATASETS` is the table of names.
"""

from collections.abc import Callable

from robustmoe.data.augment import CropFlip, augment
from robustmoe.data.base import Batch, Data, ImageSet, InMemory, as_data, batches, from_arrays, mean_std
from robustmoe.data.randaugment import RandAugment
from robustmoe.data.sets import (
    DATASETS,
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    folder,
    generated,
    imagenet,
    tiny_imagenet,
)
from robustmoe.data.split import hold_out
from robustmoe.data.stream import Streamed

AUGMENTS: dict[str, Callable[..., CropFlip | RandAugment]] = {"crop_flip": CropFlip, "rand_augment": RandAugment}

__all__ = [
    "AUGMENTS",
    "DATASETS",
    "Batch",
    "CropFlip",
    "Data",
    "ImageSet",
    "InMemory",
    "RandAugment",
    "Streamed",
    "as_data",
    "augment",
    "batches",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "folder",
    "from_arrays",
    "generated",
    "hold_out",
    "imagenet",
    "mean_std",
    "tiny_imagenet",
]
