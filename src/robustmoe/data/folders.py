"""Data sets that are folders of image files: ImageNet, Tiny ImageNet and a user's own, streamed from disk.

Each split is held in one fixed random order, so that `ImageSet.head` is a fair sample of the classes; ``index`` is
the place in the sorted list of files (class, then name). Pillow's eight-bit formats are read: png, jpg, jpeg, bmp,
webp.
"""

from __future__ import annotations

from pathlib import Path

import torch

from robustmoe.data.archives import existing
from robustmoe.data.base import Data, mean_std
from robustmoe.data.split import ORDER, TEST, hold_out
from robustmoe.data.stream import Streamed, image_size
from robustmoe.errors import UserError
from robustmoe.noise import permutation

_KINDS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_GREY = (0.449,), (0.226,)  # the averages of the three

Listing = list[tuple[str, int]]  # (path relative to the root, label), in the official order


def _names(folder: Path, of_folders: bool) -> list[str]:
    """Sorted names of the sub-folders, or of the image files, of a folder; hidden ones are skipped."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the place of the data set with root=")
    inside = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if of_folders:
        return sorted(entry.name for entry in inside if entry.is_dir())
    return sorted(entry.name for entry in inside if entry.suffix.lower() in _KINDS)


def _list_classes(root: Path, part: str, classes: list[str], inner: str = "") -> Listing:
    """Returns every image of root/part/<class>/inner/*."""
    listing: Listing = []
    for label, name in enumerate(classes):
        where = Path(part, name, inner)
        files = _names(root / where, of_folders=False)
        if not files:
            raise UserError(
                f"{root / where} holds no image ({', '.join(_KINDS)}); add images, or remove the class folder"
            )
        listing += [((where / file).as_posix(), label) for file in files]
    return listing


def _streamed(root: Path, listing: Listing, shape: tuple[int, int, int], zoom: float | None) -> Streamed:
    """Returns the listing as a set in its fixed random order."""
    labels = torch.tensor([label for _, label in listing])
    return Streamed(root, [file for file, _ in listing], labels, shape, zoom).subset(permutation(len(listing), ORDER))


def _data(name: str, train: Streamed, test: Streamed, classes: list[str], val: float, in_memory: bool = False) -> Data:
    keep, held = hold_out(train.labels, val)
    parts = train.subset(keep), train.subset(held), test
    if in_memory:
        loaded = [part.in_memory() for part in parts]
        return Data(name, loaded[0], loaded[1], loaded[2], tuple(classes), *mean_std(loaded[0]))
    return Data(name, *parts, tuple(classes), *(_IMAGENET if train.image_shape[0] == 3 else _GREY))


def _same_classes(root: Path, train: str, test: str) -> list[str]:
    classes, others = _names(root / train, True), _names(root / test, True)
    if classes != others:
        odd = sorted(set(classes) ^ set(others))
        raise UserError(
            f"{root / train} and {root / test} differ in {len(odd)} class folders "
            f"(such as {odd[0]!r}), expected the same in both"
        )
    return _several(root / train, classes)


def _several(folder: Path, classes: list[str]) -> list[str]:
    if len(classes) < 2:
        raise UserError(
            f"{folder} holds {len(classes)} class folders, expected at least 2: one folder of images for each class"
        )
    return classes


def _check_size(size: int | None) -> None:
    if size is not None and size < 1:
        raise UserError(f"size is {size}, expected at least 1 pixel")


def folder(
    root: str | Path, size: int | None = None, channels: int = 3, val: float = 0.1, in_memory: bool = False
) -> Data:
    """A user's own images: root/train/<class>/* and root/test/<class>/*, or root/<class>/* alone.

    Without a folder named train, a fixed 20 % of each class is the test split. Labels number the sorted class names.
    With a ``size``, each image is resized on its shorter side and cut to its centre, size x size; without, all must
    have the size of the first. ``channels`` is 3 (RGB) or 1 (grey). ``in_memory`` decodes everything once to uint8
    (and takes mean and std from it). `UserError` on missing or empty folders, on class folders that differ between
    train and test, and, when it is read, on an image that is damaged or of another size.
    """
    base = existing(root)
    _check_size(size)
    if channels not in (1, 3):
        raise UserError(f"channels is {channels}, expected 3 (RGB) or 1 (grey)")
    split = (base / "train").is_dir()
    if split and not (base / "test").is_dir():
        raise UserError(f"{base} holds train/ and no test/, expected both, or the class folders alone")
    classes = _same_classes(base, "train", "test") if split else _several(base, _names(base, True))
    listing = _list_classes(base, "train" if split else "", classes)
    h, w = (size, size) if size is not None else image_size(base / listing[0][0])
    zoom = None if size is None else 1.0
    train = _streamed(base, listing, (channels, h, w), zoom)
    if split:
        test = _streamed(base, _list_classes(base, "test", classes), (channels, h, w), zoom)
    else:
        keep, held = hold_out(train.labels, 0.2, TEST)
        train, test = train.subset(keep), train.subset(held)
    return _data("folder", train, test, classes, val, in_memory)


def imagenet(root: str | Path, size: int = 224, val: float = 0.1) -> Data:
    """ImageNet (ILSVRC 2012) as class folders: root/train/<wnid>/* and root/val/<wnid>/*, streamed, 3 x size x size.

    The official validation split (50,000) is our ``test``, since its true test labels are not public; our ``val``
    comes out of train. Each image is resized on its shorter side to size * 256 / 224 and cut to its centre, as is the
    custom. Labels number the sorted wnids (the common order of 1,000 outputs); the classes are named by wnid.
    """
    base = existing(root)
    _check_size(size)
    classes = _same_classes(base, "train", "val")
    shape, zoom = (3, size, size), 256 / 224
    train = _streamed(base, _list_classes(base, "train", classes), shape, zoom)
    test = _streamed(base, _list_classes(base, "val", classes), shape, zoom)
    return _data("imagenet", train, test, classes, val)


def _lines(path: Path) -> list[list[str]]:
    """Returns the tab-separated fields of each line that is not empty."""
    try:
        return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"cannot read {path} ({e}); it belongs to the official layout of Tiny ImageNet, so unpack it anew"
        ) from e


def _tiny_test(base: Path, wnids: list[str]) -> Listing:
    """Returns the official validation images, in the order of their annotation file."""
    notes = base / "val" / "val_annotations.txt"
    label = {wnid: i for i, wnid in enumerate(wnids)}
    have = set(_names(base / "val" / "images", of_folders=False))
    listing: Listing = []
    for number, fields in enumerate(_lines(notes), 1):
        if len(fields) < 2 or fields[1] not in label:
            raise UserError(f"line {number} of {notes} is {fields[:2]}, expected an image name and a wnid of wnids.txt")
        if fields[0] not in have:
            raise UserError(
                f"there is no image {base / 'val' / 'images' / fields[0]}, named in line {number} of {notes}"
            )
        listing.append((f"val/images/{fields[0]}", label[fields[1]]))
    if not listing:
        raise UserError(f"{notes} names no image; unpack Tiny ImageNet anew")
    return listing


def tiny_imagenet(root: str | Path, val: float = 0.1, in_memory: bool = False) -> Data:
    """Tiny ImageNet (Stanford CS231n, 2015) as unpacked: 100,000 + 10,000 images, 3 x 64 x 64, 200 classes.

    The official validation split (10,000) is our ``test``, since its true test labels are not public; our ``val``
    comes out of train. Read are wnids.txt, words.txt, train/<wnid>/images/* and val/val_annotations.txt with
    val/images/*. Labels number the sorted wnids; the classes are named by words.txt. ``in_memory`` decodes everything
    once to uint8 (1.4 GB for the whole set).
    """
    base = existing(root)
    wnids = _several(base / "wnids.txt", sorted(fields[0].strip() for fields in _lines(base / "wnids.txt")))
    words = {fields[0]: fields[-1].strip() for fields in _lines(base / "words.txt")}
    shape = (3, 64, 64)
    train = _streamed(base, _list_classes(base, "train", wnids, "images"), shape, None)
    test = _streamed(base, _tiny_test(base, wnids), shape, None)
    return _data("tiny_imagenet", train, test, [words.get(wnid, wnid) for wnid in wnids], val, in_memory)
