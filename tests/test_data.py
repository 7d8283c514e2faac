"""Data: every format is written here as its publisher writes it, read back, and compared with what was written."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import sys
import tarfile
import types
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustmoe import data
from robustmoe.data import archives, base
from robustmoe.errors import UserError
from robustmoe.noise import Noise

# ----------------------------------------------------------------------------------------- writers of the real formats


def pictures(n: int, h: int, w: int, ch: int, seed: int) -> np.ndarray:
    """(n, ch, h, w) uint8 with both extremes in it."""
    x = np.random.default_rng(seed).integers(0, 256, (n, ch, h, w), dtype=np.uint8)
    x[:, :, 0, 0], x[:, :, 0, 1] = 0, 255
    return x


def encoded(x: np.ndarray, kind: str = "PNG") -> bytes:
    """One (ch, h, w) image as a file."""
    image = Image.fromarray(x[0] if x.shape[0] == 1 else x.transpose(1, 2, 0))
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def write_image(path: Path, x: np.ndarray, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(x, kind))


def idx(x: np.ndarray) -> bytes:
    return bytes([0, 0, 8, x.ndim]) + struct.pack(f">{x.ndim}I", *x.shape) + x.tobytes()


def python2_pickle(entry: dict[str, np.ndarray | list[int]]) -> bytes:
    """What Python 2 and numpy 1 wrote (protocol 2, byte strings, numpy.core): as in the published CIFAR files."""

    def integer(i: int) -> bytes:
        return b"J" + struct.pack("<i", i)

    def string(s: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(s)) + s

    def array(x: np.ndarray) -> bytes:
        new = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t" + string(b"b") + b"tR"
        kind = b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR"
        kind += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
        shape = b"(" + b"".join(map(integer, x.shape)) + b"t"
        return new + b"(" + integer(1) + shape + kind + b"\x89" + string(x.tobytes()) + b"tb"

    out = b"\x80\x02}("
    for key, value in entry.items():
        out += string(key.encode())
        out += array(value) if isinstance(value, np.ndarray) else b"](" + b"".join(map(integer, value)) + b"e"
    return out + b"u."


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def publish(monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
    """Let ``content`` be the published file ``name``."""
    monkeypatch.setitem(archives.MD5, name, hashlib.md5(content).hexdigest())


# ----------------------------------------------------------------------------------- one small data set of each format


@dataclass
class Truth:
    """A data set on disk: how to read it, and what is in it in the official order."""

    load: Callable[..., data.Data]
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    white: int = 255


def make_digits(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = bunch.images[:, None].astype(np.uint8)
    return Truth(data.digits, x, bunch.target, x, bunch.target, white=16)


def make_fashion(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    x, y = pictures(40, 28, 28, 1, 0), np.arange(40, dtype=np.uint8) % 10
    v, u = pictures(20, 28, 28, 1, 1), np.arange(20, dtype=np.uint8)[::-1] % 10
    (tmp / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x[:, 0])))
    (tmp / "train-labels-idx1-ubyte").write_bytes(idx(y))  # gzipped or not, file by file
    (tmp / "t10k-images-idx3-ubyte").write_bytes(idx(v[:, 0]))
    (tmp / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(u)))
    return Truth(lambda **k: data.fashion_mnist(tmp, **k), x, y, v, u)


def cifar10_files(x: np.ndarray, y: np.ndarray, v: np.ndarray, u: np.ndarray) -> dict[str, bytes]:
    parts = {f"data_batch_{i + 1}": (x[i::5][: len(x) // 5], y[i::5]) for i in range(5)}
    parts["test_batch"] = (v, u)
    return {
        f"cifar-10-batches-py/{name}": python2_pickle({"data": a.reshape(len(a), -1), "labels": b.tolist()})
        for name, (a, b) in parts.items()
    }


def cifar10_truth(load: Callable[..., data.Data]) -> tuple[Truth, dict[str, bytes]]:
    x, y = pictures(50, 32, 32, 3, 2), np.arange(50) // 5
    v, u = pictures(20, 32, 32, 3, 3), np.arange(20) % 10
    order = np.concatenate([np.arange(50)[i::5] for i in range(5)])  # batch files follow one another
    return Truth(load, x[order], y[order], v, u), cifar10_files(x, y, v, u)


def make_cifar10_tar(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    truth, files = cifar10_truth(lambda **k: data.cifar10(str(tmp), **k))
    write_tar(tmp / "cifar-10-python.tar.gz", files)
    publish(monkeypatch, "cifar-10-python.tar.gz", (tmp / "cifar-10-python.tar.gz").read_bytes())
    return truth


def make_cifar10_folder(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    truth, files = cifar10_truth(lambda **k: data.cifar10(tmp / "cifar-10-batches-py", **k))
    (tmp / "cifar-10-batches-py").mkdir()
    for name, content in files.items():
        (tmp / name).write_bytes(content)
        publish(monkeypatch, name, content)
    return truth


def make_cifar100_tar(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    """Written by Python 3 this time: the unpickler must take both."""
    x, y = pictures(60, 32, 32, 3, 4), np.arange(60) % 20 + 80
    v, u = pictures(20, 32, 32, 3, 5), np.arange(20) * 5
    files = {}
    for name, a, b in (("train", x, y), ("test", v, u)):
        entry = {"data": a.reshape(len(a), -1), "fine_labels": b.tolist(), "coarse_labels": [0] * len(b)}
        files[f"cifar-100-python/{name}"] = pickle.dumps(entry, protocol=2)
    archive = tmp / "cifar-100-python.tar.gz"
    write_tar(archive, files)
    publish(monkeypatch, archive.name, archive.read_bytes())
    return Truth(lambda **k: data.cifar100(archive, **k), x, y, v, u)


def write_parquet(path: Path, x: np.ndarray, y: np.ndarray, image: str = "img", label: str = "label") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = pa.array(
        [{"bytes": encoded(i), "path": f"{k}.png"} for k, i in enumerate(x)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: cells, label: pa.array(y.tolist(), pa.int64())}), path)


def make_cifar10_parquet(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    x, y = pictures(50, 32, 32, 3, 6), np.arange(50) % 10
    v, u = pictures(20, 32, 32, 3, 7), np.arange(20) % 10
    write_parquet(tmp / "plain_text/train-00000-of-00002.parquet", x[:30], y[:30])
    write_parquet(tmp / "plain_text/train-00001-of-00002.parquet", x[30:], y[30:])
    write_parquet(tmp / "plain_text/test-00000-of-00001.parquet", v, u)
    return Truth(lambda **k: data.cifar10(tmp, **k), x, y, v, u)


def make_cifar100_parquet(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    x, y = pictures(40, 32, 32, 3, 8), np.arange(40) // 2 + 80
    write_parquet(tmp / "train-00000-of-00001.parquet", x, y, "image", "fine_label")
    write_parquet(tmp / "test-00000-of-00001.parquet", x, y, "image", "fine_label")
    return Truth(lambda **k: data.cifar100(tmp, **k), x, y, x, y)


def write_tiny(tmp: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two classes whose wnids.txt is not sorted, as published. Truth is what pillow decodes from each JPEG."""
    wnids = ["n02", "n01"]
    (tmp / "wnids.txt").write_text("n02\nn01\n")
    (tmp / "words.txt").write_text("n00\tother\nn01\tgoldfish, Carassius auratus\nn02\ttench\n")
    x = pictures(20, 64, 64, 3, 9)
    for k, picture in enumerate(x):
        write_image(tmp / f"train/{wnids[k % 2]}/images/{wnids[k % 2]}_{k:02}.JPEG", picture, "JPEG")
    for k, picture in enumerate(x[:6]):
        write_image(tmp / f"val/images/val_{k}.JPEG", picture, "JPEG")
    notes = [f"val_{k}.JPEG\t{wnids[k % 2]}\t0\t0\t62\t62\n" for k in (3, 1, 0, 2, 4, 5)]
    (tmp / "val/val_annotations.txt").write_text("".join(notes))
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(encoded(i, "JPEG")))).transpose(2, 0, 1) for i in x])
    official = [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18]  # n01 has the odd ones
    test = [3, 1, 0, 2, 4, 5]
    label = 1 - np.arange(20) % 2
    return decoded[official], label[official], decoded[test], label[test]


def make_tiny(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    return Truth(lambda **k: data.tiny_imagenet(tmp, **k), *write_tiny(tmp))


def make_tiny_in_memory(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    return Truth(lambda **k: data.tiny_imagenet(tmp, in_memory=True, **k), *write_tiny(tmp))


def write_classes(tmp: Path, x: np.ndarray, y: np.ndarray, kind: str = "PNG") -> None:
    for k, (picture, label) in enumerate(zip(x, y)):
        write_image(tmp / f"class{label}" / f"{k:03}.{kind.lower()}", picture, kind)


def make_folder(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    x, y, v, u = pictures(30, 6, 9, 1, 10), np.arange(30) // 10, pictures(6, 6, 9, 1, 11), np.arange(6) // 2
    write_classes(tmp / "train", x, y)
    write_classes(tmp / "test", v, u, "BMP")
    (tmp / "train/class0/notes.txt").write_text("not an image")
    (tmp / "train/class0/._hidden.png").write_text("not an image either")
    return Truth(lambda **k: data.folder(str(tmp), channels=1, **k), x, y, v, u)


def make_folder_alone(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    x, y = pictures(60, 8, 8, 3, 12), np.arange(60) // 20
    write_classes(tmp, x, y)
    return Truth(lambda **k: data.folder(tmp, size=8, **k), x, y, x, y)


def make_imagenet(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    """Flat colours of all sizes, so that resizing does not change them."""
    y, u = np.arange(20) // 10, np.arange(4) // 2
    colour, other = pictures(20, 1, 2, 3, 13)[..., :1], pictures(4, 1, 2, 3, 14)[..., 1:]
    for part, colours, labels in (("train", colour, y), ("val", other, u)):
        for k, (c, label) in enumerate(zip(colours, labels)):
            write_image(tmp / f"{part}/n{label}/{k:02}.png", np.broadcast_to(c, (3, 30 + k, 50 - k)))
    return Truth(
        lambda **k: data.imagenet(tmp, size=28, **k),
        np.broadcast_to(colour, (20, 3, 28, 28)),
        y,
        np.broadcast_to(other, (4, 3, 28, 28)),
        u,
    )


MAKERS = [
    make_digits,
    make_fashion,
    make_cifar10_tar,
    make_cifar10_folder,
    make_cifar10_parquet,
    make_cifar100_tar,
    make_cifar100_parquet,
    make_tiny,
    make_tiny_in_memory,
    make_folder,
    make_folder_alone,
    make_imagenet,
]


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__.removeprefix("make_"))
def truth(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Truth:
    return request.param(tmp_path, monkeypatch)


def everything(images: data.ImageSet) -> data.Batch:
    return images.batch(list(range(len(images))))


# ------------------------------------------------------------------------------------------- the contract of every set


def test_every_image_is_the_one_written_with_its_label_and_index(truth: Truth) -> None:
    found = truth.load(val=0.2)
    for images, x, y in (
        (found.train, truth.train_x, truth.train_y),
        (found.val, truth.train_x, truth.train_y),
        (found.test, truth.test_x, truth.test_y),
    ):
        batch = everything(images)
        assert batch.x.dtype == torch.float32
        assert batch.y.dtype == batch.index.dtype == torch.int64
        assert images.image_shape == found.image_shape == x.shape[1:]
        assert torch.equal(batch.x, torch.tensor(x[batch.index.numpy()]).float() / truth.white)
        assert batch.y.tolist() == y[batch.index.numpy()].tolist()
        assert torch.equal(batch.y, images.labels)
        assert torch.equal(batch.index, images.index)
        assert 0 <= float(batch.x.min()) <= float(batch.x.max()) <= 1
        assert int(batch.y.max()) < found.num_classes == len(found.classes)


def test_validation_is_held_out_of_train_by_class_and_for_ever(truth: Truth) -> None:
    found, again = truth.load(val=0.2), truth.load(val=0.2)
    train, val, test = (set(part.index.tolist()) for part in (found.train, found.val, found.test))
    assert not train & val
    if truth.train_x is truth.test_x and found.name in ("digits", "folder"):  # all three splits from one list of files
        assert not test & (train | val)
        assert train | val | test == set(range(len(truth.train_x)))
        assert len(test) == pytest.approx(0.2 * len(truth.train_x), abs=found.num_classes / 2)
    else:
        assert train | val == set(range(len(truth.train_x)))
        assert test == set(range(len(truth.test_x)))
    for label in set(found.train.labels.tolist()):
        kept, held = int((found.train.labels == label).sum()), int((found.val.labels == label).sum())
        assert held == max(1, round(0.2 * (kept + held)))
    for part, same in ((found.train, again.train), (found.val, again.val), (found.test, again.test)):
        assert torch.equal(part.index, same.index)
        assert part.fingerprint == same.fingerprint
    assert len({found.train.fingerprint, found.val.fingerprint, found.test.fingerprint}) == 3


def test_mean_and_std_are_those_of_train_or_the_customary_ones(truth: Truth) -> None:
    found = truth.load()
    if isinstance(found.train, data.Streamed):
        assert found.mean == ((0.449,) if found.image_shape[0] == 1 else (0.485, 0.456, 0.406))
    else:
        x = everything(found.train).x.double().numpy()
        assert found.mean == pytest.approx(x.mean((0, 2, 3)), abs=1e-6)
        assert found.std == pytest.approx(x.std((0, 2, 3)), abs=1e-6)
    assert len(found.mean) == len(found.std) == found.image_shape[0]
    assert min(found.std) > 0


def test_val_outside_0_and_1_is_refused_everywhere(truth: Truth) -> None:
    for val in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match=r"the share to hold out is .*between 0 and 1"):
            truth.load(val=val)


def test_the_table_names_every_function() -> None:
    assert {name: f.__name__ for name, f in data.DATASETS.items()} == {name: name for name in data.DATASETS}
    assert len(data.DATASETS) == 8


def test_classes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_tiny(tmp_path, monkeypatch).load().classes == ("goldfish, Carassius auratus", "tench")
    assert make_cifar10_tar(tmp_path, monkeypatch).load().classes[3] == "cat"
    names = make_cifar100_tar(tmp_path, monkeypatch).load().classes
    assert (len(set(names)), names[0], names[99]) == (100, "apple", "worm")
    assert make_folder_alone(tmp_path / "mine", monkeypatch).load().classes == ("class0", "class1", "class2")


def test_digits_are_read_without_scikit_learn_and_by_it_where_it_keeps_them_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sklearn.datasets", None)  # to import it is an error
        x, y = data.sets._digits()
    with monkeypatch.context() as patch:
        elsewhere = types.SimpleNamespace(submodule_search_locations=["/nowhere"])
        patch.setattr("importlib.util.find_spec", lambda name: elsewhere)
        theirs, labels = data.sets._digits()
    for pixels, target in ((x, y), (theirs, labels)):
        assert np.array_equal(pixels, bunch.data)
        assert np.array_equal(target, bunch.target)


def test_digits_sizes_are_fixed() -> None:
    """20 % of each class for test (359), 10 % of the rest for val (143): 1,797 in all. The first ones never move."""
    found = data.digits()
    assert [len(part) for part in (found.train, found.val, found.test)] == [1295, 143, 359]
    again = data.digits(val=0.3)
    assert torch.equal(found.test.index, again.test.index)
    assert found.image_shape == (1, 8, 8)


# ---------------------------------------------------------------------------------------------------- sets and batches


@pytest.fixture
def both(tmp_path: Path) -> list[data.ImageSet]:
    """The same seven images in memory and streamed."""
    x, y = pictures(7, 5, 4, 3, 20), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    for k, picture in enumerate(x):
        write_image(tmp_path / f"{k}.png", picture)
    index = torch.tensor([10, 11, 12, 13, 14, 15, 16])
    names = [f"{k}.png" for k in range(7)]
    return [data.InMemory(torch.tensor(x), y, index), data.Streamed(tmp_path, names, y, (3, 5, 4), index=index)]


@pytest.mark.parametrize("kind", [0, 1], ids=["in_memory", "streamed"])
def test_batches_keep_order_and_the_short_last_one(both: list[data.ImageSet], kind: int) -> None:
    images = both[kind]
    assert [b.index.tolist() for b in data.batches(images, 3)] == [[10, 11, 12], [13, 14, 15], [16]]
    assert [b.index.tolist() for b in data.batches(images, 3, drop_last=True)] == [[10, 11, 12], [13, 14, 15]]
    order = torch.tensor([6, 0, 3, 3])
    found = list(data.batches(images, 2, order, torch.device("cpu")))
    assert [b.index.tolist() for b in found] == [[16, 10], [13, 13]]
    assert torch.equal(torch.cat([b.x for b in found]), both[0].batch(order).x)
    assert list(data.batches(images, 2, order[:0])) == []
    assert len(next(data.batches(images, 2))) == 2  # leaving early is no error
    with pytest.raises(UserError, match="the batch size is 0, expected at least 1"):
        data.batches(images, 0)


@pytest.mark.parametrize("kind", [0, 1], ids=["in_memory", "streamed"])
def test_head_and_subset_keep_the_index(both: list[data.ImageSet], kind: int) -> None:
    images = both[kind]
    assert images.head(None) is images
    assert images.head(99) is images
    assert everything(images.head(2)).index.tolist() == [10, 11]
    part = images.subset([5, 2]).subset(torch.tensor([1]))
    assert torch.equal(everything(part).x, both[0].batch([2]).x)
    assert (part.index.tolist(), part.labels.tolist(), type(part)) == ([12], [2], type(images))
    with pytest.raises(UserError, match="the limit on images is 0, expected at least 1"):
        images.head(0)


def test_fingerprint_changes_with_anything_it_covers(both: list[data.ImageSet], tmp_path: Path) -> None:
    memory, streamed = both
    assert isinstance(memory, data.InMemory)
    assert isinstance(streamed, data.Streamed)
    changed = memory.images.clone()
    changed[3, 0, 2, 2] ^= 1
    seen = {
        memory.fingerprint,
        data.InMemory(changed, memory.labels, memory.index).fingerprint,
        data.InMemory(memory.images, memory.labels.flip(0), memory.index).fingerprint,
        data.InMemory(memory.images, memory.labels).fingerprint,
        data.InMemory(memory.images, memory.labels, memory.index, white=16).fingerprint,
        streamed.fingerprint,
        streamed.subset([1, 0, 2, 3, 4, 5, 6]).fingerprint,
        streamed.head(3).fingerprint,
    }
    assert len(seen) == 8
    assert data.InMemory(memory.images.clone(), memory.labels, memory.index).fingerprint == memory.fingerprint
    other = data.Streamed(tmp_path, streamed.files, streamed.labels, (3, 5, 4), index=streamed.index)
    assert other.fingerprint == streamed.fingerprint
    assert torch.equal(streamed.in_memory().images, memory.images)
    os.remove(tmp_path / "4.png")
    gone = streamed.subset([4])
    with pytest.raises(UserError, match=r"cannot read .*4\.png \(No such file"):
        _ = gone.fingerprint
    with pytest.raises(UserError, match=r"cannot read .*4\.png \(No such file"):
        list(data.batches(gone, 1))


def test_a_constant_channel_has_std_1() -> None:
    images = torch.zeros(3, 2, 4, 4)
    images[:, 0], images[0, 1] = 0.25, 1.0
    mean, std = data.mean_std(data.from_arrays(images, [0, 1, 0]))
    assert mean == pytest.approx((0.25, 1 / 3))
    assert std == pytest.approx((1.0, (2 / 9) ** 0.5))


@pytest.mark.parametrize("white", [255, 16])
def test_mean_and_std_of_levels_are_exact(white: int) -> None:
    """As numpy gives them in float64 of the values, and the very sums that float64 has of them."""
    generator = torch.Generator().manual_seed(4)
    levels = torch.randint(0, white + 1, (300, 3, 9, 7), dtype=torch.uint8, generator=generator)
    levels[:, 2] = 5
    mean, std = data.mean_std(data.InMemory(levels, torch.zeros(300, dtype=torch.int64), white=white))
    values = levels.numpy().astype(np.float64) / white
    assert mean == pytest.approx(values.mean((0, 2, 3)), rel=1e-12)
    assert std == pytest.approx((*values.std((0, 2, 3))[:2], 1.0), rel=1e-9)
    for of_levels, of_values in zip(base._level_sums(levels), base._sums(levels), strict=True):
        assert torch.equal(of_levels, of_values)


def test_hold_out_of_uneven_classes() -> None:
    """One of each pair at the least, a lone image never, and never a whole class."""
    labels = torch.tensor([0] * 10 + [1] * 2 + [2])
    keep, held = data.hold_out(labels, 0.1)
    assert labels[held].tolist() == [0, 1]
    assert sorted(keep.tolist() + held.tolist()) == list(range(13))
    keep, held = data.hold_out(labels, 0.99)
    assert labels[keep].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="nothing can be held out: no class has two images"):
        data.hold_out(torch.arange(5), 0.5)


# ---------------------------------------------------------------------------------------------------------- own arrays


def test_from_arrays_keeps_values_exactly() -> None:
    x = torch.rand(5, 1, 3, 3, dtype=torch.float64)
    images = data.from_arrays(
        x.numpy(), np.array([2, 0, 1, 1, 0], dtype=np.int32), num_classes=3, index=[9, 8, 7, 6, 5]
    )
    batch = images.batch([4, 0])
    assert torch.equal(batch.x, x[[4, 0]].float())
    assert (batch.y.tolist(), batch.index.tolist()) == ([0, 2], [5, 9])
    assert data.from_arrays(x, [0] * 5).index.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(everything(images.to("cpu").subset([1])).x, x[[1]].float())


ONE = torch.full((2, 1, 2, 2), 0.5)


@pytest.mark.parametrize(
    "x, y, message",
    [
        (ONE * 510, [0, 1], r"range from 255 to 255, expected \[0, 1\].*normalisation belongs inside the model"),
        (ONE - 1.0, [0, 1], r"range from -0\.5 to -0\.5"),
        (torch.stack([ONE[0], ONE[0] / 0]), [0, 1], "image 1 holds a value that is not finite"),
        (torch.stack([ONE[0] * torch.nan, ONE[0]]), [0, 1], "image 0 holds a value that is not finite"),
        (ONE[0], [0], r"shape \(1, 2, 2\), expected four axes.*x\[None\]"),
        (ONE[:0], [], r"no images: the shape is \(0, 1, 2, 2\)"),
        ((ONE * 255).byte(), [0, 1], r"torch\.uint8, expected floating point in \[0, 1\]; pass x / 255"),
        (ONE, [0, 3], r"labels of the set range from 0 to 3, expected 0 to 2 \(3 classes\)"),
        (ONE, [-1, 0], "labels of the set range from -1 to 0"),
        (ONE, np.array([0.0, 1.0], np.float32), r"labels of the set are torch\.float32, expected integers"),
        (ONE, [0, 1, 2], r"2 images and labels of shape \(3,\), expected \(2,\)"),
        (ONE, np.array(["a", "b"]), "the labels of the set cannot be made a tensor .*; expected integers"),
        (ONE, np.array([0, 2**70]), "the labels of the set cannot be made a tensor"),
        (ONE, np.array([0, 70_000], np.uint32), "labels of the set range from 0 to 70000"),
        (np.array([["a"]]), [0], "the images cannot be made a tensor"),
        (ONE.to("meta"), [0, 1], "the images are on the meta device, without plain values; expected floating point"),
        (ONE.to_sparse(), [0, 1], "the images are torch.sparse_coo, without plain values"),
        (ONE, torch.tensor([0, 1], device="meta"), "the labels of the set are on the meta device"),
    ],
)
def test_from_arrays_says_what_is_wrong(x: torch.Tensor, y: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        data.from_arrays(x, y, num_classes=3)
    assert "\n" not in str(caught.value)


def test_arrays_that_may_not_be_written_to_are_taken() -> None:
    x, y = ONE.numpy().copy(), np.array([0, 1], ">i4")
    x.flags.writeable = False
    assert torch.equal(data.from_arrays(x, y).images, ONE)  # no warning of torch either
    assert data.from_arrays(x, y).labels.tolist() == [0, 1]


def test_from_arrays_index_must_fit() -> None:
    with pytest.raises(UserError, match=r"index is torch\.int64 of shape \(1,\), expected integers of shape \(2,\)"):
        data.from_arrays(ONE, [0, 1], index=[0])


# -------------------------------------------------------------------------------------------------------- augmentation


def slowly(x: torch.Tensor, noise: Noise, padding: int, flip: bool) -> torch.Tensor:
    """The definition, an image and a pixel at a time."""
    n, _, h, w = x.shape
    out = torch.zeros_like(x)
    for i in range(n):
        top, left = (int(u * (2 * padding + 1)) for u in noise.fold(1).uniform(2)[i].tolist())
        mirror = flip and float(noise.fold(2).uniform(1)[i, 0]) < 0.5
        for r in range(h):
            for c in range(w):
                row, col = top + r - padding, left + (w - 1 - c if mirror else c) - padding
                if 0 <= row < h and 0 <= col < w:
                    out[i, :, r, c] = x[i, :, row, col]
    return out


@pytest.mark.parametrize("padding, flip", [(0, False), (0, True), (2, False), (2, True), (9, True)])
def test_augment_equals_the_slow_definition(padding: int, flip: bool) -> None:
    x = torch.rand(40, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    noise = Noise.of(torch.arange(40), 3, 1)
    assert torch.equal(data.augment(x, noise, padding, flip), slowly(x, noise, padding, flip))


def test_augment_belongs_to_the_image() -> None:
    x = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    index = torch.arange(100, 130)
    whole = data.augment(x, Noise.of(index, 5), 2, True)
    mixed = torch.tensor([17, 3, 29])
    assert torch.equal(data.augment(x[mixed], Noise.of(index[mixed], 5), 2, True), whole[mixed])
    assert not torch.equal(data.augment(x, Noise.of(index, 6), 2, True), whole)


def test_augment_draws_every_crop_and_both_sides_evenly() -> None:
    """9 places x 2 sides of 9,000 images: 500 each, with a deviation of 21.7; five of those are allowed."""
    x = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3).expand(9000, 1, 3, 3)
    found = data.augment(x, Noise.of(torch.arange(9000), 0), 1, True)
    _, count = found.flatten(1).unique(dim=0, return_counts=True)
    assert len(count) == 18
    assert int((count - 500).abs().max()) < 5 * 21.7


def test_augment_refuses() -> None:
    noise = Noise.of(torch.arange(2))
    with pytest.raises(UserError, match="the padding is -1, expected 0 or more"):
        data.augment(ONE, noise, -1, False)
    with pytest.raises(UserError, match="2 images and 1 streams of noise"):
        data.augment(ONE, noise[:1], 1, False)


# ----------------------------------------------------------------------------------------------------- resizing, modes


def read_one(path: Path, size: int, zoom: float | None = 1.0, channels: int = 3) -> torch.Tensor:
    return data.Streamed(path.parent, [path.name], torch.tensor([0]), (channels, size, size), zoom).batch([0]).x[0]


def test_the_centre_is_cut_out(tmp_path: Path) -> None:
    """No resizing where the shorter side fits: 8 x 12 keeps columns 2..9, 13 x 8 rows 2..9 (2.5 rounds to even)."""
    wide, tall = pictures(1, 8, 12, 3, 30)[0], pictures(1, 13, 8, 3, 31)[0]
    write_image(tmp_path / "wide.png", wide)
    write_image(tmp_path / "tall.png", tall)
    assert torch.equal(read_one(tmp_path / "wide.png", 8), torch.tensor(wide[:, :, 2:10]).float() / 255)
    assert torch.equal(read_one(tmp_path / "tall.png", 8), torch.tensor(tall[:, 2:10]).float() / 255)


def test_imagenet_zoom_drops_a_sixteenth_on_each_side(tmp_path: Path) -> None:
    """256 -> 224 keeps the middle 448 of 512: a black frame 30 wide is gone at 256/224, and shows at 1."""
    x = np.full((3, 512, 600), 255, dtype=np.uint8)
    x[:, :30] = x[:, -30:] = 0
    write_image(tmp_path / "framed.png", x)
    assert float(read_one(tmp_path / "framed.png", 224, 256 / 224).min()) == 1
    assert float(read_one(tmp_path / "framed.png", 224)[:, 0].max()) == 0


def test_all_eight_bit_modes_are_read(tmp_path: Path) -> None:
    grey = Image.fromarray(pictures(1, 4, 4, 1, 32)[0, 0])
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        kind = "tif" if mode == "CMYK" else "png"
        grey.convert(mode).save(tmp_path / f"{mode}.{kind}")
        want = torch.tensor(np.asarray(grey.convert(mode).convert("RGB"))).permute(2, 0, 1) / 255
        assert torch.equal(read_one(tmp_path / f"{mode}.{kind}", 4), want)
    palette = grey.convert("P")
    palette.info["transparency"] = bytes(range(256))
    palette.save(tmp_path / "see-through.png", transparency=bytes(range(256)))
    assert torch.equal(read_one(tmp_path / "see-through.png", 4, channels=1)[0], torch.tensor(np.asarray(grey)) / 255)
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png has pixels of mode 'I;16', expected 8 bits a channel"):
        read_one(tmp_path / "deep.png", 4)


def test_webp_and_jpeg_are_listed(tmp_path: Path) -> None:
    for label in "ab":
        for name, kind in (("1.WebP", "WEBP"), ("2.JPG", "JPEG"), ("3.jpeg", "JPEG")):
            write_image(tmp_path / label / name, np.full((3, 8, 8), 128, dtype=np.uint8), kind)
    found = data.folder(tmp_path, val=0.5)
    assert len(found.train) + len(found.val) + len(found.test) == 6
    assert everything(found.test).x == pytest.approx(128 / 255, abs=0.02)


def test_folder_order_is_a_fair_sample(tmp_path: Path) -> None:
    """50 images of each of two classes: the first 30 of the test set hold both, though files are sorted by class."""
    x, y = pictures(100, 4, 4, 3, 33), np.arange(100) // 50
    write_classes(tmp_path / "train", x[:4], y[[0, 1, 50, 51]])
    write_classes(tmp_path / "test", x, y)
    labels = data.folder(tmp_path).test.head(30).labels
    assert 5 <= int(labels.sum()) <= 25


# ------------------------------------------------------------------------------------------------- errors of each kind


def test_missing_places_are_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    for load in (data.cifar10, data.cifar100, data.tiny_imagenet, data.imagenet, data.folder):
        with pytest.raises(UserError, match=r"no file or folder .*gone; give the path"):
            load(gone)
    with pytest.raises(UserError, match=r"no file or folder .*gone; run: apt-get install dataset-fashion-mnist"):
        data.fashion_mnist(gone)
    with pytest.raises(UserError, match=r"holds neither train-images-idx3-ubyte.gz nor"):
        data.fashion_mnist(tmp_path)
    with pytest.raises(UserError, match=r"holds none of cifar-10-python.tar.gz, cifar-10-batches-py/ and train-\*"):
        data.cifar10(tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*wnids.txt"):
        data.tiny_imagenet(tmp_path)
    with pytest.raises(UserError, match=r"no folder .*train"):
        data.imagenet(tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(np.zeros((40, 28, 28), np.uint8)), mtime=0)[:-9],
            "train-images.* is not a whole gzip file",
        ),
        ("train-images-idx3-ubyte.gz", b"<html>404</html>", "train-images.* is not a whole gzip file"),
        (
            "t10k-images-idx3-ubyte",
            idx(np.zeros((2, 28, 28), np.uint8))[:-1],
            r"1583 bytes, expected 1584 .*\[2, 28, 28\]",
        ),
        ("t10k-images-idx3-ubyte", idx(np.zeros(9, np.uint8)), "starts with bytes 00000801, expected 00000803"),
        ("t10k-images-idx3-ubyte", b"", "holds 0 bytes, expected at least 16: it is truncated"),
        ("t10k-images-idx3-ubyte", b"\0\0\x08\x03\0", "holds 5 bytes, expected at least 16: it is truncated"),
        (
            "train-labels-idx1-ubyte",
            idx(np.full(40, 10, np.uint8)),
            r"range from 10 to 10, expected 0 to 9 \(10 classes\)",
        ),
        ("train-labels-idx1-ubyte", idx(np.zeros(39, np.uint8)), r"40 images and labels of shape \(39,\)"),
        (
            "t10k-images-idx3-ubyte",
            idx(np.zeros((20, 0, 0), np.uint8)),
            "declares 20 x 0 x 0 bytes, expected 1 to 1,000,000 x 28 x 28",
        ),
        (
            "t10k-images-idx3-ubyte",
            bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 28, 28),
            "declares 4294967295 x 28 x 28 bytes, expected 1 to 1,000,000 x 28 x 28",
        ),
        (  # what unpacks to more than it declares is not unpacked to its end
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(np.zeros((2, 28, 28), np.uint8)) + bytes(10**6)),
            "holds more than 1584 bytes, expected 1584",
        ),
    ],
)
def test_bad_idx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str) -> None:
    load = make_fashion(tmp_path, monkeypatch).load
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load()


def test_cifar_checksums_name_both_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    write_tar(archive, {})
    found = hashlib.md5(archive.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"has MD5 {found}, expected c58f30108f718f92721af3b95e74349a: it is damaged"):
        data.cifar10(archive)
    load = make_cifar10_folder(tmp_path, monkeypatch).load
    (tmp_path / "cifar-10-batches-py/data_batch_4").write_bytes(b"")
    with pytest.raises(UserError, match=r"data_batch_4 has MD5 d41d8cd98f00b204e9800998ecf8427e, expected"):
        load()
    (tmp_path / "cifar-10-batches-py/data_batch_4").unlink()
    with pytest.raises(UserError, match=r"cannot read .*data_batch_4 \(No such file"):
        load()


class Evil:
    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, ("echo pickles run code",)


ROWS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    "entry, message",
    [
        (
            pickle.dumps({"data": Evil(), "labels": [0]}),
            r"asks for (posix|nt)\.system, and only numpy arrays are allowed",
        ),
        (python2_pickle({"data": ROWS, "labels": [0, 1]})[:-40], "is not a CIFAR batch"),
        (pickle.dumps([1]), "expected a dict with 'data' and 'labels'"),
        (python2_pickle({"data": ROWS, "fine_labels": [0, 1]}), "expected a dict with 'data' and 'labels'"),
        (python2_pickle({"data": ROWS[:, :9], "labels": [0, 1]}), r"uint8 \(2, 9\), expected uint8 \(n, 3072\)"),
        (pickle.dumps({"data": [1], "labels": [0]}), r"are list, expected uint8"),
        (python2_pickle({"data": ROWS, "labels": [0, 10]}), r"test_batch range from 0 to 10, expected 0 to 9"),
        (python2_pickle({"data": ROWS, "labels": [0]}), r"2 images and labels of shape \(1,\)"),
        (python2_pickle({"data": ROWS[:0], "labels": []}), "test_batch holds no images"),
        (pickle.dumps({"data": ROWS, "labels": ["cat", "dog"]}), "labels of .*test_batch cannot be made a tensor"),
        (pickle.dumps({"data": ROWS, "labels": None}), "labels of .*test_batch cannot be made a tensor"),
        (pickle.dumps({"data": ROWS, "labels": [0, 10**30]}), "labels of .*test_batch cannot be made a tensor"),
        (pickle.dumps({"data": ROWS, "labels": [[0], [1]]}), r"2 images and labels of shape \(2, 1\)"),
        (pickle.dumps({"data": ROWS, "labels": [0.0, 1.0]}), "test_batch are torch.float32, expected integers"),
    ],
)
def test_bad_cifar_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: bytes, message: str) -> None:
    load = make_cifar10_folder(tmp_path, monkeypatch).load
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(entry)
    publish(monkeypatch, "cifar-10-batches-py/test_batch", entry)
    with pytest.raises(UserError, match=message):
        load()


def test_bad_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = make_cifar10_tar(tmp_path, monkeypatch).load
    archive = tmp_path / "cifar-10-python.tar.gz"
    whole = archive.read_bytes()
    for content in (whole[: len(whole) // 2], b"not an archive"):
        archive.write_bytes(content)
        publish(monkeypatch, archive.name, content)
        with pytest.raises(UserError, match="is not a whole archive of cifar-10-batches-py"):
            load()
    write_tar(archive, {"cifar-10-batches-py/data_batch_1": b""})
    publish(monkeypatch, archive.name, archive.read_bytes())
    with pytest.raises(UserError, match=r"is not a whole archive .*data_batch_2"):
        load()


def test_bad_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    load = make_cifar10_parquet(tmp_path, monkeypatch).load
    test = tmp_path / "plain_text/test-00000-of-00001.parquet"
    x, y = pictures(2, 32, 32, 3, 40), np.array([0, 1])
    test.write_bytes(test.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"test-00000-of-00001.parquet is not a whole parquet file"):
        load()
    write_parquet(test, x, np.array([0, 10]))
    with pytest.raises(UserError, match=r"test-.* range from 0 to 10, expected 0 to 9"):
        load()
    write_parquet(test, x[:, :, :, :30], y)
    with pytest.raises(UserError, match=r"image 0 of .*test-.* is 32 x 30 pixels, expected 32 x 32"):
        load()
    write_parquet(test, x, y, image="picture")
    with pytest.raises(UserError, match=r"columns \['picture', 'label'\], expected one named img or image"):
        load()
    write_parquet(test, x, y, label="target")
    with pytest.raises(UserError, match=r"expected one named label"):
        load()
    pq.write_table(pa.table({"img": [{"bytes": b"junk"}, {"bytes": None}], "label": [0, 1]}), test)
    with pytest.raises(UserError, match=r"not encoded files, expected a struct with 'bytes'"):
        load()
    pq.write_table(pa.table({"img": [{"bytes": b"junk"}], "label": [0]}), test)
    with pytest.raises(UserError, match=r"image 0 of .*test-.* cannot be read as an image"):
        load()
    write_labels(test, [0, None])
    with pytest.raises(UserError, match=r"1 of the 2 rows of .*test-.* have no label \(the first is row 1\); add"):
        load()
    write_labels(test, ["cat", "zebra"])
    with pytest.raises(UserError, match=r"row 1 of .*test-.* is 'zebra', .*none of the 10 classes \(airplane, auto"):
        load()
    write_labels(test, [0.0, 1.0])
    with pytest.raises(UserError, match=r"labels of .*test-.* are torch.float32, expected integers"):
        load()
    write_labels(test, [])
    with pytest.raises(UserError, match=r"test-.* holds 0 rows"):
        load()
    test.unlink()
    os.mkfifo(test)
    with pytest.raises(UserError, match=r"test-.* is not a regular file"):
        load()
    test.unlink()
    with pytest.raises(UserError, match=r"holds no test-\*\.parquet, expected both"):
        load()


def write_labels(path: Path, labels: list[object]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": encoded(pictures(1, 32, 32, 3, k)[0])} for k in range(len(labels))]
    kind = pa.struct([("bytes", pa.binary())])
    pq.write_table(pa.table({"img": pa.array(cells, kind), "label": labels}), path)


@pytest.mark.parametrize(
    "labels, numbers", [(["dog", "airplane"], [5, 0]), (["9", "0"], [9, 0]), (["truck", "3"], [9, 3])]
)
def test_parquet_labels_may_be_names_or_digits(tmp_path: Path, labels: list[str], numbers: list[int]) -> None:
    write_labels(tmp_path / "train-0.parquet", labels * 2)
    (tmp_path / "deep/er").mkdir(parents=True)
    write_labels(tmp_path / "deep/er/test-0.parquet", labels)
    assert data.cifar10(tmp_path, val=0.5).test.labels.tolist() == numbers


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = make_cifar10_parquet(tmp_path, monkeypatch).load
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs pyarrow, .*pip install 'robustmoe\[parquet\]'"):
        load()
    for download in (data.cifar10, data.cifar100):
        with pytest.raises(UserError, match=r"uoft-cs/cifar10+ needs .*pip install 'robustmoe\[hub\]'"):
            download()


def test_bad_tiny_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = make_tiny(tmp_path, monkeypatch).load
    notes = tmp_path / "val/val_annotations.txt"
    whole = notes.read_text()
    for text, message in (
        (whole + "val_9.JPEG\tn01\t0\n", r"no image .*val_9\.JPEG, named in line 7"),
        (whole + "val_0.JPEG\tn01\t0\n", r"val_annotations.txt names 'val_0.JPEG' more than once"),
        (whole + "val_0.JPEG\tn77\t0\n", r"line 7 of .* is \['val_0.JPEG', 'n77'\], expected an image name and a wnid"),
        ("\n", "names no image"),
    ):
        notes.write_text(text)
        with pytest.raises(UserError, match=message):
            load()
    notes.unlink()
    with pytest.raises(UserError, match=r"cannot read .*val_annotations.txt"):
        load()
    for text, message in (
        ("n02\nn01\nn02\n", r"wnids.txt names 'n02' more than once \(1 names in all\)"),
        ("n02\n../../n01\n", r"train has no folder '../../n01', which .*wnids.txt names \(1 of 2\)"),
        ("n02\n", "wnids.txt holds 1 class folders"),
    ):
        (tmp_path / "wnids.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            load()


@pytest.mark.parametrize(
    "text, names, said",
    [
        ("n01\tgoldfish\nn02\ttench\nn03\tmore\n", ("goldfish", "tench"), ""),
        ("n01\tgold", ("gold", "n02"), "names 1 of 2 classes, and 0 of its 1 lines have no tab"),
        ("n", ("n01", "n02"), "names 0 of 2 classes, and 1 of its 1 lines have no tab"),
        ("n01\tgoldfish\nn02\t \n", ("goldfish", "n02"), "names 1 of 2 classes"),
        ("n01\tgoldfish\nn02\ttench\n\0\0", ("goldfish", "tench"), "names 2 of 2 classes, and 1 of its 3 lines"),
    ],
)
def test_words_of_tiny_imagenet_that_are_damaged(
    text: str,
    names: tuple[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = make_tiny(tmp_path, monkeypatch).load
    (tmp_path / "words.txt").write_text(text)
    assert load().classes == names
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == bool(said)


def test_bad_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "own"
    load = make_folder(root, monkeypatch).load
    with pytest.raises(UserError, match="channels is 4, expected 3"):
        data.folder(root, channels=4)
    for sized in (data.folder, data.imagenet):
        with pytest.raises(UserError, match="size is 0, expected 1 to 4096 pixels"):
            sized(root, size=0)
    (root / "train/zebra").mkdir()
    with pytest.raises(UserError, match=r"differ in 1 class folders \(such as 'zebra'\), expected the same in both"):
        load()
    (root / "test/zebra").mkdir()
    with pytest.raises(UserError, match=r"train/zebra holds no image \(png.*; add images, or remove the class folder"):
        load()
    lone = tmp_path / "lone"
    write_image(lone / "train/a/1.png", pictures(1, 4, 4, 3, 0)[0])
    with pytest.raises(UserError, match="holds train/ and no test/, expected both"):
        data.folder(lone)
    write_image(lone / "test/a/1.png", pictures(1, 4, 4, 3, 0)[0])
    with pytest.raises(UserError, match="holds 1 class folders, expected at least 2"):
        data.folder(lone)


def test_bad_images_are_named_when_read(tmp_path: Path) -> None:
    x = pictures(8, 16, 16, 3, 50)
    write_classes(tmp_path / "train", x, np.arange(8) // 4)
    write_classes(tmp_path / "test", x[:4], np.arange(4) // 2)
    bad = tmp_path / "test/class1/002.png"
    bad.write_bytes(bad.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"class1/002\.png cannot be read as an image .*replace or remove"):
        everything(data.folder(tmp_path).test)
    for sized in (None, 16):
        with pytest.raises(UserError, match=r"class1/002\.png cannot be read as an image .*replace or remove"):
            data.folder(tmp_path, size=sized).verify()
    with pytest.raises(UserError, match=r"class1/002\.png cannot be read"):
        list(data.batches(data.folder(tmp_path).test, 1))
    write_image(bad, x[0, :, :10])
    for look in (everything, data.Streamed.verify):
        with pytest.raises(UserError, match=r"class1/002\.png is 10 x 16 pixels, expected 16 x 16; .*size="):
            look(data.folder(tmp_path).test)
    data.folder(tmp_path, size=10).verify()
    assert everything(data.folder(tmp_path, size=10).test).x.shape == (4, 3, 10, 10)
    (tmp_path / "train/class0/000.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"class0/000\.png cannot be read as an image"):
        data.folder(tmp_path)


# ----------------------------------------------------------------------------------------- what a folder really holds


def listed(root: Path) -> list[str]:
    whole = data.folder(root, size=4)
    return sorted(file for part in (whole.train, whole.val, whole.test) for file in part.files)


def test_what_a_folder_leaves_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classes(tmp_path, pictures(8, 4, 4, 3, 60), np.arange(8) // 4)
    plain = listed(tmp_path)
    assert capsys.readouterr().err == ""
    for name in ("a.heic", "b.heic", "c.txt", "d", ".hidden"):
        (tmp_path / "class0" / name).write_bytes(b"x")
    write_image(tmp_path / "cover.png", pictures(1, 4, 4, 3, 61)[0])
    os.symlink(tmp_path / "class0", tmp_path / "class0" / "again")  # a circle
    assert listed(tmp_path) == plain
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for words in (
        "2 .heic files (such as class0/",
        "1 .txt files (such as class0/c.txt)",
        "1 files without an ending (such as class0/d)",
        "1 beside the class folders (such as cover.png)",
        "1 in links to folders that are read already (such as again/)",
        "read are png, jpg, bmp, webp, tif, gif, ppm files",
    ):
        assert words in said


def test_folders_inside_a_class_and_every_kind_of_image_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.broadcast_to(pictures(1, 2, 2, 3, 62)[0, :, 1:, 1:], (3, 4, 4))
    for place, kind in (("b", "TIFF"), ("c/deep/er", "GIF"), ("c", "PPM"), ("c", "WEBP"), ("b", "BMP")):
        for n in range(2):
            write_image(tmp_path / place / f"{n}.{kind[:4].lower()}", x, kind)
    whole = data.folder(tmp_path)
    assert sum(map(len, (whole.train, whole.val, whole.test))) == 10
    assert float((everything(whole.train).x - torch.tensor(x.copy()) / 255).abs().max()) < 0.02
    assert "2 images of" in (said := capsys.readouterr().err)
    assert "lie deeper than their class folders (such as in c/deep/er)" in said


def test_class_folders_with_numbers_for_names_are_in_the_order_of_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("10", "2", "0"):
        for n in range(3):
            write_image(tmp_path / name / f"{n}.png", pictures(1, 4, 4, 3, n)[0])
    whole = data.folder(tmp_path)
    assert whole.classes == ("0", "2", "10")
    assert {file.split("/")[0] for file, y in zip(whole.train.files, whole.train.labels.tolist()) if y == 1} == {"2"}
    assert "labels follow the numbers (0, 2, 10, ...)" in capsys.readouterr().err
    (tmp_path / "10").rename(tmp_path / "x10")
    assert data.folder(tmp_path).classes == ("0", "2", "x10")
    assert capsys.readouterr().err == ""


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    for part in ("Train", "Test"):
        for name in "ab":
            write_image(tmp_path / part / name / "1.png", pictures(1, 4, 4, 3, 0)[0])
    with pytest.raises(UserError, match="holds Test, Train, which are names of splits and not of classes"):
        data.folder(tmp_path)


@pytest.mark.parametrize("part", ["train/a", "test/b"])
def test_what_is_no_regular_file_never_holds_a_reader_up(tmp_path: Path, part: str) -> None:
    for name in ("train/a", "train/b", "test/a", "test/b"):
        for n in range(2):
            write_image(tmp_path / name / f"{n}.png", pictures(1, 4, 4, 3, n)[0])
    odd = tmp_path / part / "5.png"
    makers: list[tuple[Callable[[], object], str]] = [
        (lambda: os.mkfifo(odd), "5.png is not a regular file; remove it"),
        (lambda: os.symlink("/dev/zero", odd), "5.png is a link to nothing|5.png is not a regular file"),
        (lambda: os.symlink(tmp_path / "gone.png", odd), "5.png is a link to nothing; remove it"),
        (lambda: os.symlink(odd, odd), "5.png is a link to nothing; remove it"),
    ]
    for make, message in makers:
        make()
        with pytest.raises(UserError, match=message):
            data.folder(tmp_path)
        odd.unlink()
    with odd.open("wb") as file:
        file.truncate(2**40)  # no bytes on the disk
    for look in (data.Data.verify, lambda whole: [whole.train.fingerprint, whole.test.fingerprint]):
        with pytest.raises(UserError, match=r"5.png holds 1,099,511,627,776 bytes, expected at most 268,435,456"):
            look(data.folder(tmp_path))
    odd.unlink()
    whole = data.folder(tmp_path)
    victim = tmp_path / part / "1.png"
    victim.unlink()
    os.mkfifo(victim)  # after the folder was listed
    for look in (
        data.Data.verify,
        lambda whole: [everything(whole.train), everything(whole.test), everything(whole.val)],
    ):
        with pytest.raises(UserError, match=r"1.png is not a regular file"):
            look(whole)


def bomb(h: int, w: int) -> bytes:
    """A PNG of 70 bytes that says it is h x w pixels."""
    head = struct.pack(">II", w, h) + bytes([8, 2, 0, 0, 0])

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("h, w", [(8193, 8193), (10**5, 10**5), (2**31 - 1, 1)])
def test_an_image_that_claims_to_be_huge_is_refused(tmp_path: Path, h: int, w: int) -> None:
    write_classes(tmp_path, pictures(8, 4, 4, 3, 60), np.arange(8) // 4)
    (tmp_path / "class1/bomb.png").write_bytes(bomb(h, w))
    with pytest.raises(UserError, match=r"class1/bomb.png (is .* pixels, expected|cannot be read as an image)"):
        data.folder(tmp_path, size=4).verify()


def test_sizes_are_bounded(tmp_path: Path) -> None:
    write_classes(tmp_path, pictures(8, 1, 5000, 3, 60), np.arange(8) // 4)
    for sized in (data.folder, data.imagenet):
        with pytest.raises(UserError, match="size is 1000000, expected 1 to 4096 pixels"):
            sized(tmp_path, size=10**6)
    for look in (everything, data.Streamed.verify):
        with pytest.raises(UserError, match="is 1 x 5000 pixels, too narrow to be cut to 128 x 128"):
            look(data.folder(tmp_path, size=128).train)


def test_no_file_is_handed_to_another_program(tmp_path: Path) -> None:
    """Pillow knows PostScript, and runs Ghostscript on it: an ending does not choose the reader."""
    write_classes(tmp_path, pictures(8, 4, 4, 3, 60), np.arange(8) // 4)
    (tmp_path / "class1/eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")
    with pytest.raises(UserError, match=r"eps.png cannot be read .*it is no image of a kind that is read"):
        data.folder(tmp_path, size=4).verify()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_names_that_are_not_utf8(tmp_path: Path, what: str) -> None:
    write_classes(tmp_path, pictures(10, 4, 4, 3, 60), np.arange(10) // 5)
    old, new = (b"class0/000.png", b"class0/caf\xe9\x1b.png") if what == "file" else (b"class0", b"caf\xe9\x1b")
    os.rename(os.fsencode(tmp_path) + b"/" + old, os.fsencode(tmp_path) + b"/" + new)
    whole = data.folder(tmp_path)
    assert len({part.fingerprint for part in (whole.train, whole.val, whole.test)}) == 3
    assert len(everything(whole.train)) + len(everything(whole.val)) + len(everything(whole.test)) == 10
    assert whole.classes == (("class0", "class1") if what == "file" else (r"caf\xe9\x1b", "class1"))


@pytest.mark.parametrize(
    "root, why", [("a\0b", "null byte"), ("~nobodyxx/x", "home"), ("x" * 300, "name too long"), ("gone", "")]
)
def test_a_root_that_cannot_be(root: str, why: str) -> None:
    for load in (data.folder, data.cifar10, data.fashion_mnist, data.tiny_imagenet, data.imagenet):
        with pytest.raises(UserError, match=f"(?i)there is no file or folder .*{why}"):
            load(root)


@pytest.mark.parametrize("select", [slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_some_images_of_a_batch(select: slice | torch.Tensor) -> None:
    batch = data.Batch(torch.rand(3, 1, 2, 2), torch.tensor([5, 6, 7]), torch.tensor([30, 10, 20]))
    some = batch[select]
    assert torch.equal(some.x, batch.x[select])
    assert some.y.tolist() == batch.y[select].tolist()
    assert some.index.tolist() == batch.index[select].tolist()
    assert len(some) == 2
