"""Images that cannot be used are told of before training begins, all of them counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustmoe import cli
from robustmoe.data import folder, stream
from robustmoe.errors import UserError

Spoil = Callable[[Path], object]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def resized(path: Path) -> None:
    Image.new("RGB", (20, 12)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Sixty noisy JPEGs of two classes."""
    noise = np.random.default_rng(0)
    for number in range(60):
        place = tmp_path / ("train" if number < 40 else "test") / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02}.jpg", quality=95)
    return tmp_path


def spoil(root: Path, how: Spoil, every: int) -> list[Path]:
    files = sorted((root / "train").rglob("*.jpg"))[1::every]
    for file in files:
        how(file)
    return files


@pytest.mark.parametrize(
    "how, size, why",
    [
        (truncated, 8, r"image file is truncated"),
        (lambda path: path.write_text("<html>not found</html>"), 8, "no image of a kind that is read"),
        (resized, None, "is 12 x 20 pixels, expected 16 x 16; resize it, or give a size="),
    ],
    ids=["truncated", "html", "sizes"],
)
@pytest.mark.parametrize("in_memory", [False, True])
def test_all_that_cannot_be_used_are_counted(
    how: Spoil, size: int | None, why: str, in_memory: bool, root: Path
) -> None:
    spoil(root, how, 4)

    def verified() -> None:
        folder(root, size=size, val=0.1, in_memory=in_memory).verify()

    with pytest.raises(
        UserError, match=rf"(8|9|10) of \d\d images cannot be used: .*{why}.*; the others are "
    ) as error:
        verified()
    named = [word for word in str(error.value).replace(",", " ").split() if word.endswith(".jpg")]
    assert len(set(named)) >= 8
    assert ("more" in str(error.value)) == (int(str(error.value).split()[0]) > 8)


def test_a_single_bad_image_is_told_as_it_is(root: Path) -> None:
    (bad,) = spoil(root, truncated, 100)
    with pytest.raises(UserError, match=rf"^{bad} cannot be read as an image"):
        folder(root, size=8, val=0.05).verify()


def test_headers_are_looked_at_before_anything_is_decoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(root, resized, 4)
    monkeypatch.setattr(stream, "verify", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(UserError, match="cannot be used"):
        folder(root).verify()


def test_the_headers_of_every_split_come_before_anything_is_decoded(root: Path) -> None:
    """Also those of the last one; and damage in several splits is told of together."""
    tests = sorted((root / "test").rglob("*.jpg"))
    truncated(sorted((root / "train").rglob("*.jpg"))[3])
    resized(tests[0])
    with pytest.raises(UserError, match=rf"^{tests[0]} is 12 x 20 pixels"):
        folder(root).verify()
    truncated(tests[5])
    with pytest.raises(UserError, match=r"train/.* cannot be read .*; .*test/.* cannot be read"):
        folder(root, size=8).verify()


def test_a_header_that_is_longer_than_what_is_read_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_HEAD", 20)
    folder(root).verify()


def test_a_training_does_not_begin(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(root, truncated, 4)
    data, out = f"folder(root='{root}', size=8)", root / "run"
    command = ["train", "digits_hard_moe", "--data", data, "--epochs", "1", "--out", str(out)]
    assert cli.main(command) == 2
    assert "images cannot be used" in capsys.readouterr().err
    assert not (out / "metrics.jsonl").exists()
    assert not (out / "config.json").exists()
