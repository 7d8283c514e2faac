"""What the host asks the device: sizes, places and yes or no. On a GPU each question waits until all work sent there is
done, so that what is asked at the same moment is asked at once. On the CPU, where asking costs nothing, each is asked
by itself, by the operation that is fastest there. The answers are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def free(values: Tensor) -> bool:
    """Returns whether these values can be asked for without waiting."""
    return values.device == torch.device("cpu")


def counts(*masks: Bool[Tensor, " n"]) -> list[int]:
    """Returns how often each mask holds, by one question."""
    if free(masks[0]):
        return [int(mask.sum()) for mask in masks]
    return told(torch.stack([mask.sum() for mask in masks]))


class Later:
    """How often a mask holds, asked with the next question inside `together`, or by itself where none comes before the
    answer is needed.
    """

    def __init__(self, mask: Bool[Tensor, " n"]) -> None:
        self.mask = mask
        self.answer: int | None = None

    def count(self) -> int:
        """Returns how often the mask holds."""
        if self.answer is None:
            [self.answer] = counts(self.mask)
        return self.answer


class Asked:
    """What was asked inside `together`: how many ``questions``, and those that wait for the next one."""

    def __init__(self) -> None:
        self.questions = 0
        self.waiting: list[Later] = []

    def later(self, mask: Bool[Tensor, " n"]) -> Later:
        """Returns a question that waits for the next one."""
        self.waiting.append(Later(mask))
        return self.waiting[-1]


_ASKED: ContextVar[Asked | None] = ContextVar("asked", default=None)


@contextlib.contextmanager
def together() -> Iterator[Asked]:
    """Inside, questions can wait for the next one."""
    token = _ASKED.set(asked := Asked())
    try:
        yield asked
    finally:
        _ASKED.reset(token)


def told(values: Int[Tensor, " n"]) -> list[int]:
    """Returns the numbers, by a question that takes along those that wait for one."""
    asked = _ASKED.get()
    if free(values) or asked is None:
        alone: list[int] = values.tolist()
        return alone
    waiting = [each for each in asked.waiting if each.answer is None]
    asked.questions, asked.waiting = asked.questions + 1, []
    numbers: list[int] = torch.cat([values, *(each.mask.sum()[None] for each in waiting)]).tolist()
    for each, answer in zip(waiting, numbers[len(values) :]):
        each.answer = answer
    return numbers[: len(values)]


def taken(mask: Bool[Tensor, " n"], count: int) -> Int[Tensor, " m"]:
    """Returns the ``count`` places where the mask holds, in their order, without a question."""
    if free(mask):
        return torch.nonzero(mask)[:, 0]
    return torch.argsort((~mask).byte(), stable=True)[:count]


def pairs(mask: Bool[Tensor, "n m"], count: int) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """Returns the rows and columns of the ``count`` places where the mask holds, row by row, without a question."""
    if free(mask):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        return rows, columns
    place = taken(mask.flatten(), count)
    return torch.div(place, mask.shape[1], rounding_mode="floor"), place % mask.shape[1]


def places(*masks: Bool[Tensor, " n"]) -> list[Int[Tensor, " m"]]:
    """Returns the places where each mask holds, in their order, by one question; by none for one mask that is known to
    hold `nowhere`.
    """
    if free(masks[0]):
        return [torch.nonzero(mask)[:, 0] for mask in masks]
    if len(masks) == 1 and is_nowhere(masks[0]):
        return [torch.zeros(0, dtype=torch.long, device=masks[0].device)]
    return [taken(mask, count) for mask, count in zip(masks, counts(*masks))]


def nowhere(like: Tensor) -> Bool[Tensor, " n"]:
    """Returns a mask that holds nowhere, which the host knows."""
    mask = torch.zeros_like(like, dtype=torch.bool)
    mask.__dict__["nowhere"] = True
    return mask


def is_nowhere(mask: Bool[Tensor, " n"]) -> bool:
    """Returns whether the host knows that the mask holds nowhere."""
    return bool(mask.__dict__.get("nowhere", False))


def tally(index: Int[Tensor, " n"], kinds: int) -> Int[Tensor, " kinds"]:
    """Returns how often each of the numbers 0 to ``kinds`` - 1 occurs, without a question."""
    if free(index):
        return torch.bincount(index, minlength=kinds)
    return torch.zeros(kinds, dtype=torch.long, device=index.device).index_add_(0, index, torch.ones_like(index))


class _Hopes:
    """What is taken to hold. ``careful``: nothing is; each question is asked at once."""

    def __init__(self, careful: bool) -> None:
        self.careful = careful
        self.flag: Tensor | None = None


_HOPES: ContextVar[_Hopes | None] = ContextVar("hopes", default=None)


def surely(flag: Bool[Tensor, ""]) -> bool:
    """Returns whether the flag, which nearly always does, holds. Inside `hoped`, where asking waits for the device, it
    is taken to hold, and asked in the end.
    """
    hopes = _HOPES.get()
    if free(flag) or hopes is None or hopes.careful:
        return bool(flag)
    hopes.flag = flag if hopes.flag is None else hopes.flag & flag
    return True


def hoped(make: Callable[[], Tensor]) -> Tensor:
    """Returns ``make()``, which changes nothing but what it gives: made once, and once more where something that was
    taken to hold (see `surely`) did not.
    """
    for careful in (False, True):
        token = _HOPES.set(hopes := _Hopes(careful))
        try:
            made = make()
        finally:
            _HOPES.reset(token)
        if hopes.flag is None or bool(hopes.flag):
            break
    return made
