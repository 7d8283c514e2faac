"""Checks of gradients that do not pass (G15, and G2 in every evaluation of a model that is not ours)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from robustmoe.attacks.base import evaluating
from robustmoe.evaluation.checks.gradients import differences
from robustmoe.evaluation.checks.inside import Inside, built_in, called, uncompiled
from robustmoe.evaluation.checks.registry import Answer, check, not_run
from robustmoe.evaluation.checks.subject import Subject, gradient, percent
from robustmoe.noise import Noise
from robustmoe.routing import detach
from robustmoe.wrapping import Cut, watch
from robustmoe.wrapping.watching import CASTS, ROUNDS, Watcher, entering

FEW = 4
"""Images that are looked at."""

SLIGHT, MUCH = 0.01, 0.05
"""Check G15: the share of the gradient that is cut off; above the first it warns, above the second it fails."""

DIRECTIONS = 8


@check("G15", "gradient off", "model", "cheap")
def gradient_off(case: Subject) -> Answer:
    """Places that the image's gradient does not pass, though what is computed there reaches the logits: calls under
    `torch.no_grad` or `torch.inference_mode`, detached tensors, numbers rounded or cast to integers. The routes are
    held: what a router decides has no gradient anyway, and R1 says what it has.

    Not every such place hides something (the largest logit that a stable softmax subtracts is detached in vain). So
    the gradient is taken again with these places open. It counts if the share that was missing is above 1 % (warns) or
    5 % (fails), and if with it the gradient tells better how the model changes within the ball.
    """
    model, x = case.model, case.whole.x[:FEW]
    if built_in(model):
        return Answer("pass", 0, "every part is one of this package or of torch.nn, whose gradients pass")
    trace = {name: routing[:FEW] for name, routing in detach(case.output.trace).items()}
    inside = Inside.of(model, trace or None)
    with evaluating(model), uncompiled():
        cuts = watch(inside, x).cuts
        if not cuts:
            return Answer("pass", 0, "no part of the way from the image to the logits is without a gradient")
        share = _effect(case, inside, x, cuts)
    return _answer(cuts, share)


@check("G2", "finite differences", "cheap")
def foreign_differences(case: Subject) -> Answer:
    """As the deep check, on 4 images and in 4 directions, of a model that is not one of this package's. Where it fails,
    the places are named at which numbers leave torch.
    """
    if built_in(case.model):
        return not_run("every part is one of this package or of torch.nn; robustmoe check asks it of them too")
    few = case.whole[:FEW]
    answer = differences(dataclasses.replace(case, batch=few, _outcomes={}), directions=4)
    if answer.status != "fail":
        return answer
    with evaluating(case.model), uncompiled():
        places = leaving(Inside.of(case.model), few.x)
    where = f" (numbers leave torch by {' and '.join(places[:2])})" if places else ""
    return answer._replace(sentence=answer.sentence + where)


def _answer(cuts: Sequence[Cut], share: float | None) -> Answer:
    places = list(dict.fromkeys(f"{_HOW[cut.how]} in {called(cut.path, cut.module)}" for cut in cuts))
    where = " and ".join([*places[:2], *([f"{len(places) - 2} more places"] if len(places) > 2 else [])])
    if share is None:
        return Answer(
            "warn", None, f"on the way to the logits a part is {where}; what that hides could not be measured"
        )
    if share <= SLIGHT:
        return Answer(
            "pass", share, f"on the way to the logits a part is {where}, without effect on the whole gradient"
        )
    text = f"the image's gradient is off by {percent(share)}: a part is {where}"
    return Answer("fail" if share > MUCH else "warn", share, f"{text}; attacks climb without it")


_HOW = {
    "no_grad": "computed without gradients (no_grad)",
    "inference_mode": "computed without gradients (inference_mode)",
    "detach": "detached",
    "round": "rounded",
    "cast": "cast to integers",
}


def _effect(case: Subject, inside: Inside, x: Tensor, cuts: Sequence[Cut]) -> float | None:
    """The share of the gradient that is missing; 0 where the gradient as it is tells as well how the model changes;
    None where it cannot be taken otherwise. First what is off or detached is opened, then what is rounded too, then
    what is cast.
    """
    noise = Noise.of(case.whole.index[: len(x)], 15)
    weight = noise.fold(1).normal(case.output.logits.shape[1]).to(x)

    def value(at: Tensor) -> Tensor:
        return (inside(at) * weight.to(at)).sum(1)

    step = case.main.threat.eps / {"linf": 1.0, "l2": x[0].numel() ** 0.5, "l1": x[0].numel()}[case.main.threat.norm]
    moves = [step * (1 - 2 * (noise.fold(2, i).uniform(*x.shape[1:]) < 0.5).to(x)) for i in range(DIRECTIONS)]
    with torch.no_grad():
        clean = value(x)
        changes = torch.stack([value(x + move) - clean for move in moves])
    slope = gradient(value, x)
    share: float | None = None
    how = {cut.how for cut in cuts}
    for opens in (frozenset(), ROUNDS, ROUNDS | CASTS) if how & {"round", "cast"} else (frozenset(),):
        opened = _opened(value, x, opens)
        if opened is None:
            continue
        share = share or 0.0
        if _error(opened, moves, changes) < _error(slope, moves, changes):
            missing = float((opened - slope).norm() / torch.stack([opened.norm(), slope.norm()]).max())
            share, slope = max(missing, share), opened
    return share


def _error(slope: Tensor, moves: Sequence[Tensor], changes: Tensor) -> float:
    """How far the changes that a slope tells are from those that were measured: the sum of squares."""
    told = torch.stack([(slope * move).flatten(1).sum(1) for move in moves])
    return float((told - changes).square().sum())


def _opened(value: Callable[[Tensor], Tensor], x: Tensor, rounds: frozenset[str]) -> Tensor | None:
    """The gradient with the places open; None where a model cannot run so (it writes into what it had detached)."""

    def open_value(at: Tensor) -> Tensor:
        with Opened(rounds):
            return value(at)

    with contextlib.suppress(Exception):  # whatever a user's model raises, it means the same
        slope = gradient(open_value, x)
        return slope if bool(torch.isfinite(slope).all()) else None
    return None


class Leaving(Watcher):
    """Notes where numbers that depend on the image leave torch: what is done with them has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in LEAVES and self.knows(args[0]) and args[0].is_floating_point():
            self.places[f"{name.strip('_')} in {called(*self.where)}"] = None
        return super().__torch_function__(func, types, args, kwargs)


LEAVES = frozenset({"item", "numpy", "tolist", "__float__", "__int__", "__array__"})


def leaving(inside: Inside, x: Tensor) -> list[str]:
    """Where numbers leave torch in one pass on x."""
    watcher = Leaving()
    watcher.image(at := x.detach().clone())
    with torch.no_grad(), entering(inside, watcher), watcher:
        inside(at)
    return list(watcher.places)


class Opened(TorchFunctionMode):
    """Inside, gradients pass where the code says that they shall not: gradients stay on, `detach` gives the tensor
    itself, and the results of ``rounds`` (names of functions) have the slope of what is rounded there.
    """

    def __init__(self, rounds: frozenset[str]) -> None:
        super().__init__()
        self.rounds = rounds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if name == "_set_grad_enabled":
            return None
        if name in ("detach", "data") and args[0].requires_grad:
            return args[0]
        with _gradients_on():
            result = func(*args, **kwargs)
            if name in self.rounds and _rounds(name, args, result):
                return args[0] + (result.to(args[0]) - args[0]).detach()
            return result


def _rounds(name: str, args: Any, result: Any) -> bool:
    if not args or not isinstance(args[0], Tensor) or not isinstance(result, Tensor) or not args[0].requires_grad:
        return False
    return name not in CASTS or not result.is_floating_point()


@contextlib.contextmanager
def _gradients_on() -> Iterator[None]:
    """Out of inference mode. What is off for another reason (the forward of an autograd function) stays off."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.enable_grad():
            yield
    else:
        yield
