"""Decoded images: made once, made again where what is kept is not what was made, and never in the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from robustmoe.data import archives, kept
from test_data import pictures, write_parquet

CLASSES = ("a", "b", "c")
SHAPE = (3, 8, 8)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "LEAST", 1)
    for split, seed in (("train", 1), ("test", 2)):
        path = tmp_path / "data" / f"{split}-0.parquet"
        path.parent.mkdir(exist_ok=True)
        write_parquet(path, pictures(6, 8, 8, 3, seed), np.arange(6) % 3)
    return tmp_path


def load(place: Path) -> list[torch.Tensor]:
    loaded = archives.read_parquet(place / "data", "label", CLASSES, SHAPE)
    return [each for split in ("train", "test") for each in loaded[split]]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Notes each file that is decoded."""
    real, files = archives._parquet, []

    def decode(path: Path, *rest: object) -> object:
        files.append(path)
        return real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(archives, "_parquet", decode)
    return files


def test_a_file_is_decoded_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = counted(monkeypatch)
    first = load(place)
    assert len(files) == 2
    assert same(load(place), first)
    assert len(files) == 2
    assert {path.suffix for path in kept.folder().iterdir()} == {".npz"}
    first[0][0] = 0  # what was given is the caller's
    assert not same(load(place), first)


def test_other_content_or_other_labels_are_decoded_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(place)
    files = counted(monkeypatch)
    write_parquet(place / "data" / "test-0.parquet", pictures(6, 8, 8, 3, 9), np.arange(6) % 3)
    assert not torch.equal(load(place)[2], load(place)[0])
    assert [path.name for path in files] == ["test-0.parquet"]
    archives.read_parquet(place / "data", "label", (*CLASSES, "d"), SHAPE)
    assert len(files) == 3, "other classes may mean other numbers"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def arrays(**values: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **values)


FULL = np.zeros((6, *SHAPE), np.uint8)
DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "one bit": flip,
    "empty": lambda path: path.write_bytes(b"") and None,
    "other shape": arrays(images=np.zeros((6, 3, 8, 9), np.uint8), labels=np.zeros(6, np.int64)),
    "no labels": arrays(images=FULL),
    "few labels": arrays(images=FULL, labels=np.zeros(5, np.int64)),
    "label 3 of 3": arrays(images=FULL, labels=np.full(6, 3)),
    "a label below 0": arrays(images=FULL, labels=np.full(6, -1)),
    "objects": arrays(images=FULL, labels=np.array([{}] * 6)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_made_anew(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(place)
    files = counted(monkeypatch)
    for path in kept.folder().glob("*.npz"):
        DAMAGES[name](path)
    assert same(load(place), first)
    assert len(files) == 2
    assert same(load(place), first)
    assert len(files) == 2, "and kept again"


def test_a_place_that_cannot_be_written_hinders_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "cache").write_text("a file")
    assert load(place)[0].shape == (6, *SHAPE)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all("train-0.parquet are not kept (" in line or "test-0.parquet are not kept (" in line for line in said)


def test_two_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both decode and both write; each has its images, one whole file a split is left, and nothing half-written."""
    real, together, loaded = archives._parquet, threading.Barrier(2), []

    def decode(*args: object) -> object:
        together.wait(20)
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(archives, "_parquet", decode)
        threads = [threading.Thread(target=lambda: loaded.append(load(place))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(loaded) == 2
    assert same(loaded[0], loaded[1])
    assert len(list(kept.folder().iterdir())) == 2
    files = counted(monkeypatch)
    assert same(load(place), loaded[0])
    assert files == []


def test_small_files_and_those_that_change_are_not_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LEAST", 2**20)
    load(place)
    assert not kept.folder().exists()
    monkeypatch.setattr(kept, "LEAST", 1)
    digests = iter("abcdefgh")
    monkeypatch.setattr(kept, "_digest", lambda path: next(digests))
    load(place)
    assert not kept.folder().exists()
