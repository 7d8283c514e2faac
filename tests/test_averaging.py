"""Gradients that are averaged while the backward pass runs are those that are averaged behind it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forks import fork_pair
from robustmoe import distributed
from robustmoe.models import build_model
from robustmoe.recipe import Recipe
from robustmoe.training import train
from robustmoe.training.checkpoint import read_weights

MODELS = {
    "dense": "small_cnn(width=4)",
    "sparse": "ensemble(small_cnn(width=4), experts=4, router=small_cnn(width=4))",
    "tokens": "vit_moe(patch=4, width=16, depth=2, heads=2, experts=3, k=2, placement=(0, 1))",
}
"""None has a BatchNorm. Of the sparse one's experts each process leaves out others."""

COMMON: dict[str, Any] = {
    "data": "digits", "optimizer": "sgd(lr=0.02)", "method": "at(pgd(linf(0.1), steps=1, keep=last))", "epochs": 1,
    "batch_size": 12, "max_steps": 3, "val_limit": 4, "threads": 1, "clip": 1.0,
}  # fmt: skip


def loss_of(name: str, rank: int) -> tuple[Tensor, list[Tensor]]:
    """The loss on some images of this process, and the parameters."""
    model = build_model(MODELS[name], 4, (3, 8, 8))
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
    forced = None
    if name == "sparse":  # process 0 sends its images to experts 0 and 1, process 1 to 1 and 2; nobody to 3
        free = model.run(x).trace["router"]
        forced = {"router": dataclasses.replace(free, index=(torch.arange(8) % 2 + rank)[:, None, None])}
    logits = model.run(x, forced=forced).logits
    return torch.nn.functional.cross_entropy(logits, torch.arange(8) % 4), list(model.parameters())


def worker(folder: str) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    rank, kept = int(os.environ["RANK"]), dict[str, Any]()
    passes, enter = list[int](), distributed.Averaging.__enter__

    def entered(averaging: distributed.Averaging) -> distributed.Averaging:
        passes.append(len(averaging._parameters))
        return enter(averaging)

    distributed.Averaging.__enter__ = entered  # type: ignore[method-assign]
    with distributed.session(torch.device("cpu")):
        for name in MODELS:
            for size in (1, 600, 2**24):
                distributed.BUCKET = size
                loss, parameters = loss_of(name, rank)
                with distributed.Averaging(parameters) as averaging:
                    raw = torch.autograd.grad(loss, parameters, allow_unused=True)
                means = averaging.means()
                behind = [torch.zeros_like(p) if g is None else g.clone() for p, g in zip(parameters, raw)]
                behind = distributed.average_gradients(behind)
                equal = all(torch.equal(a, b) for a, b in zip(means, behind, strict=True))
                kept[f"{name} {size}"] = (equal, averaging.early, len(averaging._buckets), idle(raw))
            distributed.BUCKET = 600
            before = len(passes)
            train(Recipe(model=MODELS[name], **COMMON), Path(folder) / name)
            kept[f"{name} steps"] = len(passes) - before
        before = len(passes)
        train(Recipe(model="resnet8(width=4)", **COMMON), Path(folder) / "normed")
        kept["normed steps"] = len(passes) - before
    torch.save(kept, Path(folder) / f"rank{rank}.pt")


def idle(raw: Sequence[Tensor | None]) -> list[int]:
    return [place for place, gradient in enumerate(raw) if gradient is None]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the two processes' runs, and what each kept."""
    out = tmp_path_factory.mktemp("two")
    children = fork_pair("test_averaging:worker", str(out), output=out / "said")
    assert [child.wait() for child in children] == [0, 0], [child.output.read_text() for child in children]
    return out, [torch.load(out / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", MODELS)
def test_means_are_those_behind_the_pass(name: str, two: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank, kept in enumerate(two[1]):
        for size in (1, 600, 2**24):
            equal, early, buckets, _ = kept[f"{name} {size}"]
            assert equal, (rank, size)
            assert (buckets == 1) == (size == 2**24)
            if name != "sparse":
                assert early == buckets, "all were sent before the pass had ended"
    first, second = (kept[f"{name} 1"][3] for kept in two[1])
    assert (first != second) == (name == "sparse"), "each process leaves out other experts"


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_what_one_trains(name: str, two: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    train(Recipe(model=MODELS[name], **COMMON), tmp_path)
    alone, together = (read_weights(run / "model.safetensors") for run in (tmp_path, two[0] / name))
    assert alone.keys() == together.keys()
    for key, weight in alone.items():
        torch.testing.assert_close(together[key], weight, rtol=0, atol=5e-5, msg=key)


def test_a_network_whose_backward_pass_asks_the_others_is_averaged_behind_it(
    two: tuple[Path, list[dict[str, Any]]],
) -> None:
    assert [kept["normed steps"] for kept in two[1]] == [0, 0]


def test_a_parameter_that_is_used_twice_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is whole when it is sent. (Alone: what is sent comes back as it is.)"""
    sent: list[Tensor] = []
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda flat, async_op: sent.append(flat.clone()))
    tied, other = torch.randn(2, 3, requires_grad=True).unbind()
    tied, other = tied.detach().requires_grad_(), other.detach().requires_grad_()
    with distributed.Averaging([tied, other]) as averaging:
        torch.autograd.grad((tied * other).sum() + tied.exp().sum(), [tied, other])
    assert averaging.early == len(sent) == 1
    first, second = averaging.means()
    torch.testing.assert_close(first, (other + tied.exp()).detach())
    torch.testing.assert_close(second, tied.detach())
