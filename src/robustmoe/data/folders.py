"""Data sets that are folders of image files: ImageNet, Tiny ImageNet and a user's own, streamed from disk.

Each split is held in one fixed random order, so that `ImageSet.head` is a fair sample of the classes; ``index`` is
the place in the sorted list of files (class, then path). Read are png, jpg, bmp, webp, tif, gif and ppm files with 8
bits a channel, of several frames the first; hidden files are skipped. A class folder is read with the folders inside
it. Whatever is left out is said on stderr, with its number and why. Class folders that have numbers for names are in
the order of the numbers ("2" before "10"), others in that of their letters.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from robustmoe.data.base import Data, mean_std
from robustmoe.data.reading import existing, read_file, shown, unreadable
from robustmoe.data.split import ORDER, TEST, hold_out
from robustmoe.data.stream import Streamed, image_size
from robustmoe.errors import UserError
from robustmoe.noise import permutation
from robustmoe.progress import note

_KINDS = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
_KINDS |= {".ppm", ".pgm", ".pbm", ".pnm"}
_READ = "png, jpg, bmp, webp, tif, gif, ppm"
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_GREY = (0.449,), (0.226,)  # the averages of the three
_LARGEST_SIZE = 4096

Listing = list[tuple[str, int]]  # (path relative to the root, label), in the official order


@dataclass
class _Said:
    """What a reader of folders has to say beside its images: how many files are left out, by reason, each with an
    example; how many are taken from folders inside a class folder.
    """

    left_out: Counter[str] = field(default_factory=Counter)
    deeper: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)

    def leave_out(self, why: str, path: str) -> None:
        self.left_out[why] += 1
        self.example.setdefault(why, shown(path))

    def speak(self, root: Path) -> None:
        """One line for what is left out, one for what lies deeper; none where there is nothing to say."""
        if self.left_out:
            whys = [f"{count} {why} (such as {self.example[why]})" for why, count in self.left_out.most_common(5)]
            rest = self.left_out.total() - sum(count for _, count in self.left_out.most_common(5))
            whys += [f"{rest} others"] if rest else []
            note(f"left out of {shown(str(root))}: {', '.join(whys)}; read are {_READ} files")
        if self.deeper:
            count, (example, _) = self.deeper.total(), self.deeper.most_common(1)[0]
            note(f"{count} images of {shown(str(root))} lie deeper than their class folders (such as in {example})")


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, hidden entries aside."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {shown(str(folder))}; give the place of the data set with root=")
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as e:
        raise unreadable(folder, e) from e


def _kind(entry: os.DirEntry[str]) -> str:
    """What an entry is, or what its link leads to: "folder", "file", or what to call the rest."""
    with contextlib.suppress(OSError):  # a link to itself
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    return "a link to nothing" if entry.is_symlink() else "not a regular file"


def _folders(folder: Path, said: _Said | None = None) -> list[str]:
    """Returns the names of the sub-folders in order; ``said``: is told of the files beside them."""
    entries = _scan(folder)
    names = [entry.name for entry in entries if _kind(entry) == "folder"]
    for entry in entries:
        if said is not None and _kind(entry) != "folder":
            said.leave_out("beside the class folders", entry.name)
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _images(folder: Path, said: _Said) -> list[str]:
    """Returns the paths, relative to ``folder``, of the image files in it and in the folders inside it, sorted.

    A folder is read once, though links lead to it again. `UserError` on an image file that is no regular one.
    """
    paths: list[str] = []
    todo, seen = [""], set()
    while todo:
        inner = todo.pop()
        entries = _scan(folder / inner)
        status = os.stat(folder / inner)
        if (status.st_dev, status.st_ino) in seen:
            said.leave_out("in links to folders that are read already", inner)
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            path, what, ending = inner + entry.name, _kind(entry), os.path.splitext(entry.name)[1].lower()
            if what == "folder":
                todo.append(f"{path}/")
            elif ending not in _KINDS:
                why = f"{shown(ending)} files" if ending else "files without an ending"
                said.leave_out(why, f"{folder.name}/{path}")
            elif what == "file":
                paths.append(path)
            else:
                raise UserError(f"{shown(entry.path)} is {what}; remove it from the data set")
    for path in paths:
        if "/" in path:
            said.deeper[shown(f"{folder.name}/{path.rpartition('/')[0]}")] += 1
    return sorted(paths)


def _list_classes(root: Path, part: str, classes: list[str], said: _Said, inner: str = "") -> Listing:
    """Returns every image in and below root/part/<class>/inner."""
    listing: Listing = []
    for label, name in enumerate(classes):
        where = Path(part, name, inner)
        files = _images(root / where, said)
        if not files:
            raise UserError(
                f"{shown(str(root / where))} holds no image ({_READ}); add images, or remove the class folder"
            )
        listing += [(f"{where.as_posix()}/{file}", label) for file in files]
    return listing


def _streamed(root: Path, listing: Listing, shape: tuple[int, int, int], zoom: float | None) -> Streamed:
    """Returns the listing as a set in its fixed random order."""
    labels = torch.tensor([label for _, label in listing])
    return Streamed(root, [file for file, _ in listing], labels, shape, zoom).subset(permutation(len(listing), ORDER))


def _data(name: str, train: Streamed, test: Streamed, classes: list[str], val: float, in_memory: bool = False) -> Data:
    keep, held = hold_out(train.labels, val)
    parts, names = (train.subset(keep), train.subset(held), test), tuple(map(shown, classes))
    if in_memory:
        loaded = [part.in_memory() for part in parts]
        return Data(name, loaded[0], loaded[1], loaded[2], names, *mean_std(loaded[0]))
    return Data(name, *parts, names, *(_IMAGENET if train.image_shape[0] == 3 else _GREY))


def _same_classes(root: Path, train: str, test: str, said: _Said) -> list[str]:
    classes, others = _folders(root / train, said), _folders(root / test, said)
    if classes != others:
        odd = sorted(set(classes) ^ set(others))
        raise UserError(
            f"{shown(str(root / train))} and {shown(str(root / test))} differ in {len(odd)} class folders "
            f"(such as {shown(odd[0])!r}), expected the same in both"
        )
    return _several(root / train, classes)


def _several(folder: Path, classes: list[str]) -> list[str]:
    if len(classes) < 2:
        raise UserError(
            f"{shown(str(folder))} holds {len(classes)} class folders, expected at least 2: one folder of images for "
            "each class"
        )
    if {name.casefold() for name in classes} <= _SPLITS:
        raise UserError(
            f"{shown(str(folder))} holds {', '.join(classes)}, which are names of splits and not of classes; expected "
            "train/ and test/ (in small letters) with the class folders inside them, or class folders alone"
        )
    if classes != sorted(classes):
        note(
            f"the class folders of {shown(str(folder))} have numbers for names: labels follow the numbers "
            f"({', '.join(classes[:3])}, ...), where others sort the names as text"
        )
    return classes


def _check_size(size: int | None) -> None:
    if size is not None and not 1 <= size <= _LARGEST_SIZE:
        raise UserError(f"size is {size}, expected 1 to {_LARGEST_SIZE} pixels")


def folder(
    root: str | Path, size: int | None = None, channels: int = 3, val: float = 0.1, in_memory: bool = False
) -> Data:
    """A user's own images: root/train/<class>/* and root/test/<class>/*, or root/<class>/* alone.

    ``root``: the folder of them. Without a folder named train, a fixed 20 % of each class is the test split. Labels
    number the class folders in order. Images in folders inside a class folder are of that class, which is said, and so
    is what is left out. With a ``size``, each image is resized on its shorter side and cut to its centre, size x size;
    without, all must have the size of the first. ``channels`` is 3 (RGB) or 1 (grey). ``in_memory`` decodes everything
    once to uint8 (and takes mean and std from it). `UserError` on missing or empty folders, on class folders that
    differ between train and test, and, when it is read or verified, on an image that is damaged or of another size.
    """
    base = existing(root)
    _check_size(size)
    if channels not in (1, 3):
        raise UserError(f"channels is {channels}, expected 3 (RGB) or 1 (grey)")
    said = _Said()
    split = (base / "train").is_dir()
    if split and not (base / "test").is_dir():
        raise UserError(f"{shown(str(base))} holds train/ and no test/, expected both, or the class folders alone")
    if split:
        for entry in _scan(base):
            if entry.name not in ("train", "test"):
                said.leave_out("beside train/ and test/", entry.name)
        classes = _same_classes(base, "train", "test", said)
    else:
        classes = _several(base, _folders(base, said))
    listing = _list_classes(base, "train" if split else "", classes, said)
    h, w = (size, size) if size is not None else image_size(base / listing[0][0])
    zoom = None if size is None else 1.0
    train = _streamed(base, listing, (channels, h, w), zoom)
    if split:
        test = _streamed(base, _list_classes(base, "test", classes, said), (channels, h, w), zoom)
    else:
        keep, held = hold_out(train.labels, 0.2, TEST)
        train, test = train.subset(keep), train.subset(held)
    said.speak(base)
    return _data("folder", train, test, classes, val, in_memory)


def imagenet(root: str | Path, size: int = 224, val: float = 0.1) -> Data:
    """ImageNet (ILSVRC 2012) as class folders: root/train/<wnid>/* and root/val/<wnid>/*, streamed, 3 x size x size.

    The official validation split (50,000) is our ``test``, since its true test labels are not public; our ``val``
    comes out of train. ``root``: the folder that holds train and val. ``size``: each image is resized on its shorter
    side to size * 256 / 224 and cut to its centre, as is the
    custom. Labels number the sorted wnids (the common order of 1,000 outputs); the classes are named by wnid.
    """
    base = existing(root)
    _check_size(size)
    said = _Said()
    classes = _same_classes(base, "train", "val", said)
    shape, zoom = (3, size, size), 256 / 224
    train = _streamed(base, _list_classes(base, "train", classes, said), shape, zoom)
    test = _streamed(base, _list_classes(base, "val", classes, said), shape, zoom)
    said.speak(base)
    return _data("imagenet", train, test, classes, val)


def _lines(path: Path) -> list[list[str]]:
    """Returns the tab-separated fields of each line that is not empty."""
    try:
        return [line.split("\t") for line in read_file(path).decode().splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise UserError(f"cannot read {path} ({e}); it belongs to Tiny ImageNet, so unpack it anew") from e


def _unique(names: list[str], file: Path) -> list[str]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"{file} names {shown(twice[0])!r} more than once ({len(twice)} names in all); unpack Tiny ImageNet anew"
        )
    return names


def _tiny_test(base: Path, wnids: list[str], said: _Said) -> Listing:
    """Returns the official validation images, in the order of their annotation file."""
    notes = base / "val" / "val_annotations.txt"
    label = {wnid: i for i, wnid in enumerate(wnids)}
    have = set(_images(base / "val" / "images", said))
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
    named = set(_unique([file.removeprefix("val/images/") for file, _ in listing], notes))
    for file in sorted(have - named):
        said.leave_out("not named in val_annotations.txt", f"val/images/{file}")
    return listing


def _wnids(base: Path, said: _Said) -> list[str]:
    file = base / "wnids.txt"
    wnids = sorted(_unique([fields[0].strip() for fields in _lines(file)], file))
    have = _folders(base / "train")
    gone = sorted(set(wnids) - set(have))
    if gone:
        raise UserError(
            f"{base / 'train'} has no folder {shown(gone[0])!r}, which {file} names ({len(gone)} of {len(wnids)})"
        )
    for name in sorted(set(have) - set(wnids)):
        said.leave_out("class folders not named in wnids.txt", f"train/{name}")
    return _several(file, wnids)


def _words(file: Path, wnids: list[str]) -> list[str]:
    """Returns the name of each class. One that ``file`` does not name goes by its wnid, which is said."""
    lines = _lines(file)
    words = {fields[0]: fields[1].strip() for fields in lines if len(fields) > 1}
    nameless = [wnid for wnid in wnids if not words.get(wnid)]
    torn = sum(len(fields) < 2 for fields in lines)
    if nameless or torn:
        note(
            f"warning: {shown(str(file))} is damaged: it names {len(wnids) - len(nameless)} of {len(wnids)} classes, "
            f"and {torn} of its {len(lines)} lines have no tab; a class without a name goes by its wnid"
        )
    return [words.get(wnid) or wnid for wnid in wnids]


def tiny_imagenet(root: str | Path, val: float = 0.1, in_memory: bool = False) -> Data:
    """Tiny ImageNet (Stanford CS231n, 2015) as unpacked: 100,000 + 10,000 images, 3 x 64 x 64, 200 classes.

    The official validation split (10,000) is our ``test``, since its true test labels are not public; our ``val`` comes
    out of train. ``root``: the unpacked folder. Read are wnids.txt, words.txt, train/<wnid>/images/* and
    val/val_annotations.txt with val/images/*. Labels number the sorted wnids; the classes are named by words.txt.
    ``in_memory`` decodes everything once to uint8 (1.4 GB for the whole set).
    """
    base = existing(root)
    said = _Said()
    wnids = _wnids(base, said)
    words = _words(base / "words.txt", wnids)
    shape = (3, 64, 64)
    train = _streamed(base, _list_classes(base, "train", wnids, said, "images"), shape, None)
    test = _streamed(base, _tiny_test(base, wnids, said), shape, None)
    said.speak(base)
    return _data("tiny_imagenet", train, test, words, val, in_memory)
