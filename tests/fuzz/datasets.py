"""Data sets in the formats that they are published in, written whole, then spoilt."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from case import Case, Evil
from mutations import Draw, change_bytes, change_kind

FOLDER_ACTIONS = [
    "none", "kind", "bytes", "bytes", "bytes", "bytes", "image", "image", "name", "option", "place", "root",
]  # fmt: skip
NAMES = [
    b"caf\xe9.png", b"\x1b[31m.png", b"a\nb.png", b".png", b"png", b"3.PNG ", b"x" * 250 + b".png",
    "\u202e.png".encode(), b"-.png",
]  # fmt: skip
OPTIONS = [
    {"size": 0}, {"size": -1}, {"size": 10**6}, {"size": 10**30}, {"channels": 2}, {"val": 0.0}, {"val": 2.0},
    {"val": float("nan")}, {"size": 4096},
]  # fmt: skip
PLACES = [
    "empty class", "circle", "deep", "loose", "numbers", "splits", "hidden", "one class", "file",
]  # fmt: skip
ODD_IMAGES = [
    "mode", "mode", "size", "bomb", "frames", "thin", "eps", "svg", "text bomb", "ending", "zip", "wrong length",
]  # fmt: skip
MODES = [
    ("1", "PNG"), ("L", "TIFF"), ("P", "GIF"), ("CMYK", "TIFF"), ("I;16", "PNG"), ("F", "TIFF"), ("RGBA", "PNG"),
    ("LA", "PNG"), ("LAB", "TIFF"), ("YCbCr", "TIFF"), ("I", "TIFF"),
]  # fmt: skip
LINES = [
    "n01\n", "../../n01\n", "n03\n", "\t\n", "val_0.JPEG\tn01\n", "../x\tn01\n", "\x1b[31m\n", "n" * 5000 + "\n",
    "/etc\n", ".\n", "n01\t\x1b]0;x\x07\n",
]  # fmt: skip


def data(folder: Path, draw: Draw, canary: str) -> Case:
    """A data set of one of the formats, written as published, then spoilt, read whole."""
    maker = draw(st.sampled_from([_class_folders, _class_folders, _class_folders, _idx, _cifar, _parquet, _tiny]))
    spec, words = maker(folder / "d", draw, canary)

    def work() -> None:
        from robustmoe.data import DATASETS, archives

        for file in (folder / "d").rglob("*"):  # past the checksum: what stands behind it is what is asked
            name = f"cifar-10-batches-py/{file.name}" if file.suffix != ".gz" else file.name
            if name in archives.MD5 and file.is_file() and file.stat().st_size < 10**8:
                archives.MD5[name] = hashlib.md5(file.read_bytes()).hexdigest()
        name, options = spec
        whole = DATASETS[name](root=folder / "d", **options)
        whole.verify()
        for part in (whole.train, whole.val, whole.test):
            batch = part.batch(list(range(min(len(part), 8))))
            assert 0 <= float(batch.x.min()) <= float(batch.x.max()) <= 1
            assert 0 <= int(batch.y.min()) <= int(batch.y.max()) < whole.num_classes
            assert part.fingerprint
        print([len(part) for part in (whole.train, whole.val, whole.test)], whole.classes[:3], whole.image_shape)

    return Case(f"{spec[0]}{spec[1]}: {words}", work, valid=words == "none")


Spec = tuple[str, dict[str, Any]]


def _picture(kind: str, mode: str, size: tuple[int, int]) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


KINDS = [
    ("PNG", "png"), ("JPEG", "jpg"), ("BMP", "bmp"), ("WEBP", "webp"), ("TIFF", "tif"), ("GIF", "gif"), ("PPM", "ppm"),
]  # fmt: skip


def _class_folders(root: Path, draw: Draw, canary: str) -> tuple[Spec, str]:
    split = draw(st.booleans())
    for part in ("train", "test") if split else (".",):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                (root / part / name / f"{i}.png").write_bytes(_picture("PNG", "RGB", (8, 8)))
    options: dict[str, Any] = draw(st.sampled_from([{}, {"size": 8}, {"size": 4, "channels": 1}, {"in_memory": True}]))
    where = root / ("test" if split else ".") / "dog"
    action = draw(st.sampled_from(FOLDER_ACTIONS))
    words = action
    if action == "kind":
        words = change_kind(where / "3.png", draw)
    elif action == "bytes":
        kind, ending = draw(st.sampled_from(KINDS))
        changed, words = change_bytes(_picture(kind, "RGB", (8, 8)), draw)
        (where / f"3.{ending}").write_bytes(changed)
        words = f"{kind}: {words}"
    elif action == "image":
        words = _odd_image(where, draw)
    elif action == "name":
        new = draw(st.sampled_from(NAMES))
        os.rename(where / "3.png", os.fsencode(where) + b"/" + new)
        words = f"name {new[:30]!r}"
    elif action == "option":
        new = draw(st.sampled_from(OPTIONS))
        options = {**options, **new}
    elif action == "place":
        words = draw(st.sampled_from(PLACES))
        _odd_place(root, where, words)
    elif action == "root":
        words = _change_root(root, draw)
    return ("folder", options), words


def _change_root(root: Path, draw: Draw) -> str:
    what = draw(st.sampled_from(["file", "nothing", "circle", "pipe"]))
    root.rename(root.with_name("moved"))
    if what == "file":
        root.write_bytes(b"x")
    elif what == "pipe":
        os.mkfifo(root)
    else:
        root.symlink_to("nowhere" if what == "nothing" else root.name)
    return f"the root is {what}"


def _odd_place(root: Path, where: Path, words: str) -> None:
    if words == "empty class":
        (where.parent / "zebra").mkdir()
    elif words == "circle":
        (where / "again").symlink_to(where)
    elif words == "deep":
        deep = where / "/".join(["deeper"] * 60)
        deep.mkdir(parents=True)
        (where / "0.png").rename(deep / "0.png")
    elif words == "loose":
        (where / "0.png").rename(root / "0.png")
    elif words == "numbers":
        for number, name in enumerate(("cat", "dog")):
            for part in {where.parent, root / "train" if (root / "train").exists() else where.parent}:
                (part / name).rename(part / str(number * 10))
    elif words == "splits":
        where.rename(where.with_name("val"))
    elif words == "hidden":
        where.rename(where.with_name(".dog"))
    elif words == "one class":
        where.rename(where.parent / "cat" / "dog")
    else:
        (where.parent / "zebra").write_bytes(b"x")


def _odd_image(where: Path, draw: Draw) -> str:
    from PIL import Image

    words = draw(st.sampled_from(ODD_IMAGES))
    file = where / "3.png"
    if words == "mode":
        mode, kind = draw(st.sampled_from(MODES))
        Image.new(mode, (8, 8)).save(file, kind)
        return f"mode {mode} in {kind}"
    if words == "size":
        file.write_bytes(_picture("PNG", "RGB", (9, 8)))
    elif words == "thin":
        file.write_bytes(_picture("PNG", "RGB", (1, 60_000)))
    elif words in ("bomb", "wrong length"):
        side = draw(st.sampled_from([9000, 12_000, 14_000, 2**16, 2**31 - 1]))
        content = bytearray(_picture("PNG", "RGB", (8, 8)))
        content[16:24] = side.to_bytes(4, "big") * 2
        if words == "bomb":
            import zlib

            content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        file.write_bytes(content)
        return f"{words} of {side}"
    elif words == "frames":
        frames = [Image.new("L", (8, 8), 20 * i) for i in range(5)]
        frames[0].save(where / "3.gif", save_all=True, append_images=frames[1:])
    elif words == "eps":
        file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(touch) run\n")
    elif words == "svg":
        file.write_bytes(b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>')
    elif words == "text bomb":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("x", "y" * 10_000_000, zip=True)
        Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    elif words == "ending":
        file.rename(where / "3.jpg")
    elif words == "zip":
        file.write_bytes(b"PK\x03\x04" + bytes(100))
    return words


def _idx(root: Path, draw: Draw, canary: str) -> tuple[Spec, str]:
    root.mkdir()
    names = {}
    for part in ("train", "t10k"):
        images, labels = np.zeros((20, 28, 28), np.uint8), np.arange(20, dtype=np.uint8) % 10
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            names[name] = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    name = draw(st.sampled_from(sorted(names)))
    action = draw(st.sampled_from(["none", "bytes", "bytes", "sizes", "kind", "gzip"]))
    words = action
    if action == "bytes":
        names[name], words = change_bytes(names[name], draw)
    elif action == "sizes":
        sizes = draw(st.lists(st.sampled_from([0, 1, 20, 28, 2**31, 2**32 - 1]), min_size=3, max_size=3))
        names[name] = names[name][:4] + struct.pack(">3I", *sizes) + names[name][16:]
        words = f"sizes {sizes}"
    for key, content in names.items():
        (root / key).write_bytes(content)
    if action == "kind":
        words = change_kind(root / name, draw)
    elif action == "gzip":
        packed, words = change_bytes(gzip.compress(names[name]), draw)
        if draw(st.booleans()):
            packed, words = gzip.compress(names[name] + bytes(50_000_000)), "50 MB more in it"
        (root / f"{name}.gz").write_bytes(packed)
        words = f"gzip: {words}"
    return ("fashion_mnist", {}), f"{name}: {words}" if action != "none" else "none"


def _cifar(root: Path, draw: Draw, canary: str) -> tuple[Spec, str]:
    images, labels = np.zeros((20, 3072), np.uint8), [i % 10 for i in range(20)]
    batches = {
        name: pickle.dumps({"data": images, "labels": labels})
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    }
    odd: dict[str, Any] = {
        "labels of text": {"data": images, "labels": ["a"] * 20}, "labels none": {"data": images, "labels": None},
        "labels huge": {"data": images, "labels": [10**30] * 20}, "labels float": {"data": images,
        "labels": [0.5] * 20},
        "labels deep": {"data": images, "labels": [[0]] * 20}, "labels few": {"data": images, "labels": [0]},
        "labels dict": {"data": images, "labels": {0: 1}}, "labels -1": {"data": images, "labels": [-1] * 20},
        "images float": {"data": images * 0.5, "labels": labels}, "images objects": {"data": np.array([None] * 20),
        "labels": labels},
        "images wide": {"data": images[:, :-1], "labels": labels}, "a list": [1, 2], "none": None, "evil": Evil(canary),
        "evil inside": {"data": Evil(canary), "labels": labels}, "evil labels": {"data": images,
        "labels": Evil(canary)},
        "labels an array": {"data": images, "labels": np.array(labels, dtype=">i2")},
        "labels text array": {"data": images, "labels": np.array(["a"] * 20)},
    }  # fmt: skip
    action = draw(st.sampled_from(["none", "bytes", "bytes", "odd", "odd", "odd", "tar", "kind", "opcode"]))
    words = action
    name = draw(st.sampled_from(sorted(batches)))
    if action == "bytes":
        batches[name], words = change_bytes(batches[name][-400:] if draw(st.booleans()) else batches[name], draw)
    elif action == "odd":
        words = draw(st.sampled_from(sorted(odd)))
        batches[name] = pickle.dumps(odd[words])
        words = f"pickle: {words}"
    elif action == "opcode":
        words = draw(st.sampled_from(["eval", "import", "huge", "getattr", "memo", "many marks", "codec"]))
        payload = f"touch {canary}".encode()
        batches[name] = {
            "eval": b"cbuiltins\neval\n(V__import__('os').system('" + payload + b"')\ntR.",
            "import": b"cos\nsystem\n(S'" + payload + b"'\ntR.",
            "huge": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"x.",
            "getattr": b"cnumpy\nndarray.__class__\n.",
            "memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
            "many marks": b"(" * 100_000 + b".",
            "codec": b"c_codecs\nencode\n(V" + payload + b"\nVunicode_escape\ntR.",
        }[words]
        words = f"opcode: {words}"
    if action != "tar":
        (root / "cifar-10-batches-py").mkdir(parents=True)
        for key, content in batches.items():
            (root / "cifar-10-batches-py" / key).write_bytes(content)
        if action == "kind":
            words = change_kind(root / "cifar-10-batches-py" / name, draw)
    else:
        root.mkdir()
        words = _tar(root / "cifar-10-python.tar.gz", batches, draw)
    return ("cifar10", {}), words


def _tar(path: Path, batches: dict[str, bytes], draw: Draw) -> str:
    words = draw(st.sampled_from(["none", "bytes", "bytes", "links", "away", "folder", "missing"]))
    with tarfile.open(path, "w:gz") as tar:
        for key, content in batches.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{key}")
            info.size = len(content)
            if words == "links" and key == "test_batch":
                info.type, info.linkname, info.size = tarfile.SYMTYPE, "../../../../etc/passwd", 0
            if words == "folder" and key == "test_batch":
                info.type, info.size = tarfile.DIRTYPE, 0
            if words == "away":
                info.name = f"../../{key}"
            if not (words == "missing" and key == "test_batch"):
                tar.addfile(info, io.BytesIO(content) if info.size else None)
    if words == "bytes":
        changed, words = change_bytes(path.read_bytes(), draw)
        path.write_bytes(changed)
    return "none" if words == "none" else f"tar: {words}"


def _parquet(root: Path, draw: Draw, canary: str) -> tuple[Spec, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = _picture("PNG", "RGB", (32, 32))
    labels: dict[str, list[Any]] = {
        "whole": [i % 10 for i in range(20)], "names": ["cat", "dog"] * 10, "digits": ["1", "2"] * 10,
        "other names": ["zebra", "ape"] * 10,
        "missing": [None, *range(1, 10)] * 2, "all missing": [None] * 20, "floats": [0.5] * 20, "bools": [True,
        False] * 10,
        "lists": [[1]] * 20, "huge": [2**62] * 20, "negative": [-1] * 20, "bytes": [b"1"] * 20,
        "odd text": ["\x1b[31m"] * 20,
    }  # fmt: skip
    images: dict[str, list[Any]] = {
        "whole": [{"bytes": picture}] * 20, "missing": [None, *[{"bytes": picture}] * 19],
        "no bytes": [{"bytes": None}] * 20, "text": ["x"] * 20,
        "junk": [{"bytes": b"junk"}] * 20, "raw": [picture] * 20, "other size": [{"bytes": _picture("PNG", "RGB", (31,
        32))}] * 20,
    }  # fmt: skip
    first = draw(st.sampled_from(sorted(labels)))
    second = draw(st.sampled_from(["whole", "whole", *sorted(images)]))
    root.mkdir()
    for part in ("train", "test"):
        columns = (
            {"img": images[second], "label": labels[first]}
            if part == "test"
            else {"img": images["whole"], "label": labels["whole"]}
        )
        pq.write_table(pa.table(columns), root / f"{part}-0.parquet")
    words = f"labels {first}, images {second}"
    action = draw(st.sampled_from(["", "", "bytes", "kind"]))
    if action == "bytes":
        changed, words = change_bytes((root / "test-0.parquet").read_bytes(), draw)
        (root / "test-0.parquet").write_bytes(changed)
    elif action == "kind":
        words = change_kind(root / "test-0.parquet", draw)
    return ("cifar10", {}), words


def _tiny(root: Path, draw: Draw, canary: str) -> tuple[Spec, str]:
    picture = _picture("JPEG", "RGB", (64, 64))
    wnids = ["n01", "n02"]
    for wnid in wnids:
        (root / "train" / wnid / "images").mkdir(parents=True)
        for i in range(4):
            (root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG").write_bytes(picture)
    (root / "val" / "images").mkdir(parents=True)
    for i in range(4):
        (root / "val" / "images" / f"val_{i}.JPEG").write_bytes(picture)
    texts = {
        "wnids.txt": "n01\nn02\n",
        "words.txt": "n01\tgoldfish\nn02\ttench\n",
        "val/val_annotations.txt": "".join(f"val_{i}.JPEG\t{wnids[i % 2]}\t0\t0\t62\t62\n" for i in range(4)),
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    name = draw(st.sampled_from(sorted(texts)))
    action = draw(st.sampled_from(["none", "bytes", "bytes", "kind", "line", "line"]))
    words = action
    if action == "bytes":
        changed, words = change_bytes((root / name).read_bytes(), draw)
        (root / name).write_bytes(changed)
    elif action == "kind":
        words = change_kind(root / name, draw)
    elif action == "line":
        line = draw(st.sampled_from(LINES))
        with (root / name).open("a") as file:
            file.write(line)
        words = f"line {line[:30]!r} added"
    return ("tiny_imagenet", {"in_memory": draw(st.booleans())}), words if action == "none" else f"{name}: {words}"
