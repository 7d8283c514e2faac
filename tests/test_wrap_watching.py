"""`watch`: what one pass of a foreign model decides, where its gradient ends, who draws random numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.wrapping import Cut, Decision, Draw, watch


class OneHot(torch.autograd.Function):
    """The best of the scores as a one-hot; its backward passes the gradient on."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Mixture(nn.Module):
    """A top-2 layer of three experts, which takes another way at inference where ``off``: without gradient."""

    def __init__(self, off: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.off = off

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.gate(x).softmax(-1).topk(2)
        if self.off and not self.training:
            return self.infer(x, weight, index)
        dense = torch.zeros(len(x), 3).scatter(-1, index, weight)
        return sum(dense[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore[return-value]

    @torch.no_grad()
    def infer(self, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = index == e
            rows = mine.any(-1)
            y[rows] += expert(x[rows]) * (weight * mine).sum(-1)[rows, None]
        return y


class Net(nn.Module):
    def __init__(self, off: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.moe = Mixture(off)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1))
        with torch.no_grad():
            self.log = h.mean() * 2  # reaches no output
        h = h * OneHot.apply(h)
        h = F.dropout(h + self.moe(h), 0.1, self.training)
        return self.head(h)


def test_decisions_are_told_with_module_shape_and_number(images: Callable[..., Tensor]) -> None:
    seen = watch(Net().eval(), images(5, 1, 2, 2))
    top = [d for d in seen.decisions if d.path == "moe"]
    assert top == [
        Decision("moe", "Mixture", "softmax", 0, (5, 3), 1, 3, True),
        Decision("moe", "Mixture", "topk", 0, (5, 3), 1, 2, True),
    ]
    inside = [d for d in seen.decisions if d.path == ""]
    assert [(d.call, d.gradient, d.choices) for d in inside] == [("argmax", False, 4), ("one_hot", False, 4)]
    assert seen.heard == seen.entered == ()


class Same(torch.autograd.Function):
    """Its first argument, as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones(())


def test_an_autograd_function_that_gives_what_it_was_given_is_no_cut(images: Callable[..., Tensor]) -> None:
    assert watch(lambda x: Same.apply(2 * x.flatten(1), x.mean()), images(2)).cuts == ()


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def test_only_what_reaches_the_output_is_a_cut(images: Callable[..., Tensor]) -> None:
    x = images(5, 1, 2, 2)
    assert watch(Net().eval(), x).cuts == (), "neither the log, nor the forward of an autograd function"
    cuts = watch(Net(off=True).eval(), x).cuts
    assert {(cut.path, cut.module, cut.how) for cut in cuts} >= {("moe", "Mixture", "no_grad")}
    assert {cut.path.split(".")[0] for cut in cuts} == {"moe"}
    assert watch(Net(off=True).train(), x).cuts == ()


@pytest.mark.parametrize(
    "function, wanted",
    [
        (lambda x: (255 * x).round().flatten(1), ("round", "round")),
        (lambda x: (255 * x).byte().float().flatten(1), ("byte", "cast")),
        (lambda x: 2 * x.detach().flatten(1), ("detach", "detach")),
        (lambda x: 2 * x.data.flatten(1), ("data", "detach")),
        (torch.inference_mode()(lambda x: 2 * x.flatten(1)), ("mul", "inference_mode")),
        (lambda x: x.flatten(1)[:, (-x).flatten(1)[0].detach().argsort()], None),
        (lambda x: x.flatten(1) + torch.zeros_like(x.detach()).flatten(1), None),
    ],
)
def test_each_way_a_gradient_ends_is_named(
    function: Callable[[Tensor], Tensor], wanted: tuple[str, str] | None, images: Callable[..., Tensor]
) -> None:
    cuts = watch(function, images(3))
    assert cuts.cuts == (() if wanted is None else (Cut("", "", wanted[0], wanted[1], cuts.cuts[0].calls),))


def test_random_numbers_are_blamed_on_who_draws_them(images: Callable[..., Tensor]) -> None:
    x = images(3, 1, 2, 2)
    assert watch(Net().eval(), x).draws == ()
    assert watch(Net().train(), x).draws == (Draw("", "Net", "dropout"),)

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.empty(x.shape).uniform_() * torch.rand(len(x), 1)

    assert watch(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), Noisy(), nn.Dropout(0.5)).eval(), x).draws == (
        Draw("2", "Noisy", "uniform_"),
        Draw("2", "Noisy", "rand"),
    )


def test_attention_in_eval_mode_draws_nothing(images: Callable[..., Tensor]) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def model(x: Tensor) -> Tensor:
        return layer(x.flatten(1).unflatten(1, (2, 8)))

    assert watch(model, images(2, 1, 4, 4)).draws != ()
    layer.eval()
    assert watch(model, images(2, 1, 4, 4)).draws == ()


def test_the_model_is_left_as_it_was_also_after_an_error(images: Callable[..., Tensor]) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("its own")

    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), Fails())
    with pytest.raises(RuntimeError, match="its own"):
        watch(net, images(2, 1, 2, 2))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with torch.no_grad():
        assert not watch(Net().eval(), images(2, 1, 2, 2)).output.is_inference()


def test_a_scripted_module_hides_its_calls_but_not_that_the_image_reaches_through(
    images: Callable[..., Tensor],
) -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(1)).topk(1).values

    assert [d.call for d in watch(Outer(), images(2)).decisions] == ["softmax", "topk"]
    hidden = Outer()
    hidden.inner = Opaque()
    assert [d.call for d in watch(hidden, images(2)).decisions] == ["topk"]


class Opaque(nn.Module):
    """What it gives comes out of a function that no mode sees."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is what such code uses
            self.scripted = torch.jit.script(_softmax)

    def forward(self, x: Tensor) -> Tensor:
        return self.scripted(x)
