"""How the tensors of a model of ours are called and laid out in other code: a `Layout` gives `Counterpart`s."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustmoe.options import Inputs

Turn = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From some tensors to others, in the order of a pair's names. Raises ValueError for what it cannot turn."""


def unchanged(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors


@dataclass(frozen=True)
class Counterpart:
    """Tensors called ``theirs`` in the file hold what those called ``ours`` in the model's `state_dict` do.

    ``read``: from theirs to ours; ``write``: the way back. ``change``: what differs, in words, for reports ("" where
    only the name does). ``optional``: the file may lack it; the model's own then stays as it is. ``beside``: it is no
    part of their network, so it is read where a file has it, and never written.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Turn = unchanged
    write: Turn = unchanged
    change: str = ""
    optional: bool = False
    beside: bool = False


@dataclass(frozen=True)
class Layout:
    """How one code base lays out its weights.

    ``pairs``: what stands where, for a model of ours; empty for a model that this code base does not have. ``source``:
    where the code is, and the commit that was compared. ``inputs``: how its nets take their images: "raw" (pixels in
    [0, 1]), "centred" (in [-1, 1]), or "data" (normalised by the data set's mean and deviation). ``ignored``: regular
    expressions of names that hold no weights of the network. ``wants``: sentences on a model that this code base has
    not quite, or whose weights would fit and answer otherwise there; no tensor shows these.
    """

    about: str
    source: str
    pairs: Callable[[nn.Module], list[Counterpart]]
    inputs: Inputs = "data"
    ignored: tuple[str, ...] = ()
    wants: Callable[[nn.Module], list[str]] = lambda _: []


def same(theirs: str, ours: str, optional: bool = False) -> Counterpart:
    """One tensor under another name."""
    return Counterpart((theirs,), (ours,), optional=optional)


def turned(theirs: str, ours: str, *order: int) -> Counterpart:
    """One tensor whose dimensions stand in another order: ours is theirs.permute(order)."""
    back = [order.index(place) for place in range(len(order))]
    return Counterpart(
        (theirs,),
        (ours,),
        lambda tensors: [tensors[0].permute(order)],
        lambda tensors: [tensors[0].permute(back)],
        "transposed",
    )


def reshaped(theirs: str, ours: str, there: Sequence[int], here: Sequence[int]) -> Counterpart:
    """One tensor of the same numbers in the same order, of the shape ``there`` in the file and ``here`` in the
    model.
    """
    return Counterpart(
        (theirs,),
        (ours,),
        lambda tensors: [_checked(tensors[0], there).reshape(tuple(here))],
        lambda tensors: [tensors[0].reshape(tuple(there))],
        "reshaped",
    )


def split(theirs: str, ours: Sequence[str]) -> Counterpart:
    """One tensor that is cut into equal pieces along its first dimension, one for each of ``ours``."""

    def cut(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(tensors[0]) % len(ours):
            raise ValueError(f"its {len(tensors[0])} rows cannot be cut into {len(ours)} equal pieces")
        return tensors[0].chunk(len(ours))

    return Counterpart((theirs,), tuple(ours), cut, lambda tensors: [torch.cat(list(tensors))], f"cut into {len(ours)}")


def stacked(theirs: Sequence[str], ours: str) -> Counterpart:
    """Several tensors that are one of the model's, along a new first dimension."""
    return Counterpart(
        tuple(theirs),
        (ours,),
        lambda tensors: [torch.stack(list(tensors))],
        lambda tensors: tensors[0].unbind(),
        f"{len(theirs)} stacked",
    )


def repeated(theirs: Sequence[str], ours: str) -> Counterpart:
    """One tensor of the model that the file holds several times, all equal."""

    def one_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        for name, value in zip(theirs, tensors):
            if value.shape != tensors[0].shape or not torch.equal(value, tensors[0]):
                raise ValueError(f"{theirs[0]!r} and {name!r} are copies of one tensor there, but differ")
        return tensors[:1]

    return Counterpart(
        tuple(theirs), (ours,), one_of, lambda tensors: [tensors[0]] * len(theirs), f"{len(theirs)} copies"
    )


def after(before: Counterpart, read: Turn, write: Turn, change: str) -> Counterpart:
    """The pair ``before``, with a further turn on our side of it."""
    return Counterpart(
        before.theirs,
        before.ours,
        lambda tensors: read(before.read(tensors)),
        lambda tensors: before.write(write(tensors)),
        f"{before.change}, {change}" if before.change else change,
        before.optional,
    )


def by_names(model: nn.Module, renamed: Callable[[str], str | None]) -> list[Counterpart]:
    """A pair for each tensor of the model that only has another name there (``renamed``; None: it is not there)."""
    names = ((renamed(name), name) for name in model.state_dict())
    return [same(theirs, ours) for theirs, ours in names if theirs is not None]


def _checked(value: Tensor, shape: Iterable[int]) -> Tensor:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"it has shape {tuple(value.shape)}, expected {tuple(shape)}")
    return value
