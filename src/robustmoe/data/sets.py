"""The data sets: plain functions that return `Data`, and `DATASETS`, the table of their names.

Everywhere, ``val`` is the share of the official training split held out, by class and fixed for ever
(`split.hold_out`); the test split is never touched. Small sets are held in memory as uint8; sets of image files are
streamed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from robustmoe.arrays import as_labels
from robustmoe.data.archives import Arrays, hub_folder, parquet_files, read_cifar, read_idx, read_parquet
from robustmoe.data.base import Data, InMemory, mean_std
from robustmoe.data.folders import folder, imagenet, tiny_imagenet
from robustmoe.data.generated import generated
from robustmoe.data.reading import existing
from robustmoe.data.split import TEST, hold_out
from robustmoe.errors import UserError

FASHION_MNIST_ROOT = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts the four files."""

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_CIFAR100 = tuple(_CIFAR100_NAMES.split())


def _in_memory(name: str, train: InMemory, test: InMemory, classes: tuple[str, ...], val: float) -> Data:
    keep, held = hold_out(train.labels, val)
    kept = train.subset(keep)
    return Data(name, kept, train.subset(held), test, classes, *mean_std(kept))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels (n, 64) and labels (n,), read from the file in scikit-learn, whose import takes 2 s."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None, "a required dependency"
    folder = (package.submodule_search_locations or [""])[0]
    file = Path(folder, "datasets", "data", "digits.csv.gz")
    if not file.is_file():  # another release keeps it elsewhere
        from sklearn.datasets import load_digits

        return load_digits(return_X_y=True)
    rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return rows[:, :-1], rows[:, -1]


def digits(val: float = 0.1) -> Data:
    """Handwritten digits inside scikit-learn (`load_digits`): 1,797 images, 1 x 8 x 8, levels 0 to 16, 10 classes.

    The levels are scaled to [0, 1]. There is no official test split: a fixed 20 % of each class is ours. ``index`` is
    the place in scikit-learn's order, in all splits.
    """
    pixels, target = _digits()
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8)
    every = InMemory(images, torch.from_numpy(target).to(torch.int64), white=16)
    keep, test = hold_out(every.labels, 0.2, TEST)
    return _in_memory("digits", every.subset(keep), every.subset(test), tuple("0123456789"), val)


def fashion_mnist(root: str | Path = FASHION_MNIST_ROOT, val: float = 0.1) -> Data:
    """Fashion-MNIST (Xiao et al., 2017): 60,000 + 10,000 images, 1 x 28 x 28, 10 classes.

    Read from its four IDX files, gzipped or not. ``root``: their folder; the default is where Debian's package puts
    them. Magic numbers, sizes and lengths are checked, no checksums.
    """
    place = existing(root, "run: apt-get install dataset-fashion-mnist, or give the folder with root=")
    splits = []
    for part in ("train", "t10k"):
        images = read_idx(place, f"{part}-images-idx3-ubyte", (28, 28))
        labels = read_idx(place, f"{part}-labels-idx1-ubyte", ())
        source = f"{place}/{part}-labels-idx1-ubyte"
        splits.append(InMemory(images[:, None], as_labels(labels, len(images), len(_FASHION), source)))
    return _in_memory("fashion_mnist", splits[0], splits[1], _FASHION, val)


def cifar10(root: str | Path | None = None, val: float = 0.1) -> Data:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 images, 3 x 32 x 32, 10 classes.

    ``root`` is cifar-10-python.tar.gz, the folder it unpacks to, or a folder that holds either (MD5 sums are
    checked); or a folder of parquet files in Hugging Face's layout (structure checked only; needs the extra
    ``parquet``). None downloads uoft-cs/cifar10 from the hub (needs the extra ``hub``).
    """
    splits = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    loaded = _cifar(
        root, "uoft-cs/cifar10", "cifar-10-python.tar.gz", "cifar-10-batches-py", splits, ("labels", "label"), _CIFAR10
    )
    return _in_memory("cifar10", InMemory(*loaded["train"]), InMemory(*loaded["test"]), _CIFAR10, val)


def cifar100(root: str | Path | None = None, val: float = 0.1) -> Data:
    """CIFAR-100 (Krizhevsky, 2009), fine labels: 50,000 + 10,000 images, 3 x 32 x 32, 100 classes.

    ``root`` is as for `cifar10`, with cifar-100-python.tar.gz; None downloads uoft-cs/cifar100.
    """
    splits = {"train": ["train"], "test": ["test"]}
    keys = ("fine_labels", "fine_label")
    loaded = _cifar(root, "uoft-cs/cifar100", "cifar-100-python.tar.gz", "cifar-100-python", splits, keys, _CIFAR100)
    return _in_memory("cifar100", InMemory(*loaded["train"]), InMemory(*loaded["test"]), _CIFAR100, val)


def _cifar(
    root: str | Path | None,
    repo: str,
    archive: str,
    unpacked: str,
    splits: dict[str, list[str]],
    label_keys: tuple[str, str],
    classes: tuple[str, ...],
) -> dict[str, Arrays]:
    """Find out which of the published forms ``root`` is, and read it."""
    place = hub_folder(repo) if root is None else existing(root)
    for candidate in (place, place / unpacked, place / archive):
        if candidate.is_file() or (candidate / splits["test"][0]).is_file():
            return read_cifar(candidate, unpacked, splits, label_keys[0], len(classes))
    if parquet_files(place):
        return read_parquet(place, label_keys[1], classes, (3, 32, 32))
    raise UserError(
        f"{place} holds none of {archive}, {unpacked}/ and train-*.parquet; give the place of one of them with root="
    )


DATASETS: dict[str, Callable[..., Data]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "folder": folder,
    "generated": generated,
    "imagenet": imagenet,
    "tiny_imagenet": tiny_imagenet,
}
"""Name -> function returning `Data`."""
