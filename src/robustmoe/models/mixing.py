"""From a `Routing` and experts to outputs: the reference mix (every expert sees every item) and the sparse dispatch
(only the chosen run).

Both compute sum_j weight[:, j] * expert[index[:, j]](x). They are equal in value and in every gradient as long as an
expert treats items apart (BatchNorm in eval mode, or none); a BatchNorm in train mode normalises an expert by the
items that expert got, which differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from robustmoe import asking
from robustmoe.models.norm import enters_empty

Expert = Callable[[Tensor], Tensor]

_UNDIVIDED: ContextVar[bool] = ContextVar("undivided", default=False)


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Inside, every expert runs on every item, and what a route leaves out is dropped: as many times the experts' work
    as there are experts, for which nobody asks the device how many items each has. For passes in eval mode.
    """
    token = _UNDIVIDED.set(True)
    try:
        yield
    finally:
        _UNDIVIDED.reset(token)


def is_undivided() -> bool:
    """Returns whether every expert is to run on every item: inside `undivided`, and in an exported graph, whose shapes
    are fixed.
    """
    return _UNDIVIDED.get() or torch.compiler.is_exporting()


def mix_reference(
    experts: Sequence[Expert],
    x: Float[Tensor, "m ..."],
    index: Int[Tensor, "m k"],
    weight: Float[Tensor, "m k"],
) -> Float[Tensor, "m ..."]:
    """Returns the sum by its definition: all experts on all m items, then the chosen ones' weighted sum. E times the
    cost; the yardstick of `mix_sparse`.
    """
    chosen = _every(experts, x)[torch.arange(x.shape[0], device=x.device)[:, None], index]
    spread = (slice(None), slice(None), *([None] * (chosen.ndim - 2)))
    return (chosen * weight[spread].to(chosen.dtype)).sum(1)


def _every(experts: Sequence[Expert], x: Float[Tensor, "m ..."]) -> Float[Tensor, "m e ..."]:
    return torch.stack([expert(x) for expert in experts], dim=1)


def mix_sparse(
    experts: Sequence[Expert],
    x: Float[Tensor, "m ..."],
    index: Int[Tensor, "m k"],
    weight: Float[Tensor, "m k"],
    sizes: Callable[[], list[int]] | None = None,
) -> Float[Tensor, "m ..."]:
    """Returns the same sum, each expert run once, on just the items routed to it; summed over k in rank order.
    ``sizes``: see `run_sparse`.
    """
    chosen = run_sparse(experts, x, index, sizes)
    spread = (slice(None), slice(None), *([None] * (chosen.ndim - 2)))
    ranks = zip(chosen.unbind(1), weight[spread].to(chosen.dtype).unbind(1))
    return reduce(torch.add, (output * each for output, each in ranks))  # keeps channels-last memory; sum(1) does not


def run_sparse(
    experts: Sequence[Expert],
    x: Float[Tensor, "m ..."],
    index: Int[Tensor, "m k"],
    sizes: Callable[[], list[int]] | None = None,
) -> Float[Tensor, "m k ..."]:
    """expert[index[:, j]](x) for each item and rank, each expert run once, on just the items routed to it.

    The m*k pairs are sorted by expert (stably, so the result is deterministic), each expert gets one contiguous
    slice, and the outputs are sorted back. An expert without items is not run, except while training on several
    processes, where a BatchNorm inside it counts over all of them. Where it `is_undivided`, every expert runs on every
    item. ``sizes``: what says how many pairs each expert has (see `Routing.sizes`), where that may
    be known; by default they are counted.
    """
    if is_undivided():
        return _every(experts, x)[torch.arange(x.shape[0], device=x.device)[:, None], index]
    k = index.shape[1]
    pairs = index.reshape(-1)
    order = torch.argsort(pairs, stable=True)
    counted = asking.told(asking.tally(pairs, len(experts))) if sizes is None else sizes()
    parts = x[order // k].split(counted)
    outputs = [
        expert(part)
        for expert, part in zip(experts, parts)
        if len(part) or (isinstance(expert, nn.Module) and enters_empty(expert))
    ]
    if not outputs:  # no items at all: one expert still says what shape and dtype an answer has
        outputs = [experts[0](x)]
    back = torch.cat(outputs)[torch.argsort(order)]
    return back.reshape(len(x), k, *back.shape[1:])
