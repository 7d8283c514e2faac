"""Memory: what is read of the system, and the batch size that is found by it."""

from __future__ import annotations

import gc
import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import robustmoe as rm
from robustmoe import memory, records
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel
from robustmoe.options import EvaluateOptions, read
from robustmoe.recipe import Recipe, load_recipe

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _collected_before() -> None:
    """Every batch that is tried collects garbage twice: not through all that other tests have left."""
    gc.collect()
    gc.freeze()


def test_the_peak_is_that_of_the_largest_tensor() -> None:
    """160 MB more than now, to a tenth. (In pages of its own: what was freed before may be used again.)"""
    memory.restart_peak(CPU)
    before = memory.peak(CPU)
    assert before is not None
    pages = mmap.mmap(-1, 160_000_000)
    torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    peak = memory.peak(CPU)
    assert peak is not None
    assert 0.9 * 160e6 < peak - before < 1.2 * 160e6
    there = memory.room(CPU)
    assert there is not None
    assert there > peak - 160e6 - 1e6


@pytest.mark.parametrize("size, text", [(412_000_000, "412 MB"), (3_140_000_000, "3.14 GB"), (978_000, "0.978 MB")])
def test_bytes_in_words(size: int, text: str) -> None:
    assert memory.text(size) == text


def short_of(most: int) -> tuple[Callable[[int], None], list[int]]:
    """Work that a stand-in of a GPU has memory for up to ``most`` images; the batches that were tried."""
    tried: list[int] = []

    def attempt(n: int) -> None:
        tried.append(n)
        if n > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return attempt, tried


@pytest.mark.parametrize(
    "most, images, size, batches",
    [
        (48, 1000, 32, [8, 16, 32, 64]),  # backs off
        (10**9, 1000, 256, [8, 16, 32, 64, 128, 256]),  # the most on a CPU
        (10**9, 20, 16, [8, 16]),  # no more than there are
        (3, 1000, 2, [8, 4, 2]),
        (10**9, 5, 5, [5]),
    ],
)
def test_the_largest_batch_that_fits(most: int, images: int, size: int, batches: list[int]) -> None:
    attempt, tried = short_of(most)
    assert (memory.largest(attempt, CPU, images).size, tried) == (size, batches)


def test_a_batch_takes_a_share_of_the_room_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak of 100 + 10 n bytes in a room of 1000, of which 0.8 may be taken: 64 images take 740, 128 more."""
    tried: list[int] = []
    monkeypatch.setattr(memory, "peak", lambda device: 100 + 10 * tried[-1])
    monkeypatch.setattr(memory, "room", lambda device: 1000)
    fit = memory.largest(tried.append, CPU, 1000)
    assert (fit.size, fit.peak, fit.room, tried) == (64, 740, 1000, [8, 16, 32, 64, 128])
    monkeypatch.setattr(memory, "room", lambda device: 100)
    with pytest.raises(UserError, match="no memory for a batch of one image"):
        memory.largest(tried.append, CPU, 1000)


def test_another_error_is_no_lack_of_memory() -> None:
    def attempt(n: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        memory.largest(attempt, CPU, 100)


# ------------------------------------------------------------------------------------ trainings, evaluations


def limited(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A stand-in of a device with memory for ``most`` images."""
    whole = memory.largest

    def largest(attempt: Callable[[int], None], device: torch.device, images: int) -> memory.FittingBatch:
        short, _ = short_of(most)

        def both(n: int) -> None:
            short(n)
            attempt(n)

        return whole(both, device, images)

    monkeypatch.setattr(memory, "largest", largest)


def test_a_training_finds_its_batch_size_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields: dict[str, Any] = {
        "model": "small_cnn(width=4)",
        "data": "digits(val=0.55)",
        "method": "at(pgd(linf(0.1), steps=1))",
        "epochs": 1,
        "seed": 1,
        "threads": 1,
        "device": "cpu",
    }
    limited(monkeypatch, 100)
    auto = Recipe(**fields, batch_size="auto", max_steps=3)
    rm.train(auto, tmp_path / "auto")
    err = capsys.readouterr().err
    assert "batch_size=auto: 64 (a peak of " in err
    assert "A learning rate belongs to a batch size: is that of sgd(lr=0.1" in err
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["batch_size"] == 64
    limited(monkeypatch, 20)  # another machine goes on with the number
    rm.train(Recipe(**fields, batch_size="auto", max_steps=5), tmp_path / "auto", resume=True)
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["batch_size"] == 64
    rm.train(Recipe(**fields, batch_size=64, max_steps=5), tmp_path / "number")
    same = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("auto", "number")]
    assert same[0] == same[1], "what was tried leaves no trace"


def test_an_evaluation_finds_its_batch_size_and_keeps_it(
    tiny: Callable[..., RoutedModel],
    images: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    routed, x, y = tiny("ensemble_hard"), images(40), labels(40)
    asked: dict[str, Any] = {"attacks": "pgd(linf(0.1), steps=2)", "batch_size": "auto", "device": "cpu"}
    limited(monkeypatch, 20)
    (result,) = rm.evaluate(routed, x, y, out=tmp_path / "rows", **asked)
    assert "--batch-size auto: 16 (a peak of " in capsys.readouterr().err
    assert result.header.batch_size == 16
    limited(monkeypatch, 5)
    (again,) = rm.evaluate(routed, x, y, out=tmp_path / "rows", **asked)
    assert again == result
    (file,) = records.rows_files(tmp_path)
    assert records.read(file).header.batch_size == 16
    with pytest.raises(UserError, match="--batch-size auto is found by one process"):
        rm.evaluate(routed, x, y, shard="1/2", **asked)


@pytest.mark.parametrize("wrong", ["automatic", 0, 2.5])
def test_what_is_no_batch_size(wrong: Any, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('model = "resnet18"\ndata = "digits"\nmethod = "standard"\nepochs = 3\n')
    with pytest.raises(UserError, match=r"batch_size must be|the batch size is 0|batch_size: expected int or 'auto'"):
        load_recipe(tmp_path / "r.toml", batch_size=wrong)
    with pytest.raises(UserError, match=r"batch_size must be|the batch size is 0|batch_size: expected int or 'auto'"):
        read(EvaluateOptions, {"batch_size": wrong})
