"""The experts of a token router: MLPs of equal shape in shared tensors, and four ways to send tokens through them.

All give sum_j weight[:, j] * expert[index[:, j]](x), equal up to rounding, and are made of torch's own operations, so
gradients of gradients exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from robustmoe import asking, compat
from robustmoe.models.mixing import is_undivided
from robustmoe.models.vit_parts import Gelu, gelu

Dispatch = Literal["auto", "loop", "sorted", "grouped", "dense"]

CACHED = 2**25
"""Bytes of hidden activations up to which torch's grouped product is the fastest on a CPU: it holds those of all
experts at once, sorted pairs one expert's at a time (measured, docs/studies/token_dispatch.md).
"""


class Experts(nn.Module):
    """Experts of equal shape in shared tensors, the first dimension of each being the expert's number.

    ``dense``: the tensors, and what these are called in the one dense layer in whose place the experts are. Each may
    start as a copy of that layer, whose matrices are the transposed of an expert's: sparse upcycling, Komatsuzaki et
    al. 2023 (a recipe's ``init`` does it).
    """

    dense: ClassVar[Mapping[str, str]]


class Masks(NamedTuple):
    """What training's dropout multiplies by, item by item: an expert's hidden units (... h), and what it gives
    (... d).
    """

    hidden: Tensor
    out: Tensor


class TokenExperts(Experts):
    """``num`` two-layer MLPs: x -> GELU(x w1 + b1) w2 + b2, the GELU of the given ``kind``.

    Expert i is ``w1[i]`` (d, h), ``b1[i]`` (h), ``w2[i]`` (h, d), ``b2[i]`` (d): a ViT's MLP with its matrices
    transposed (see `Experts`). ``equal``: all start the same (V-MoE's); else each is drawn.
    """

    dense: ClassVar[Mapping[str, str]] = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}

    def __init__(self, num: int, width: int, hidden: int, equal: bool = False, kind: Gelu = "exact") -> None:
        super().__init__()
        self.kind: Gelu = kind
        self.w1 = nn.Parameter(torch.empty(num, width, hidden))
        self.b1 = nn.Parameter(torch.zeros(num, hidden))
        self.w2 = nn.Parameter(torch.empty(num, hidden, width))
        self.b2 = nn.Parameter(torch.zeros(num, width))
        with torch.no_grad():
            for weight in (self.w1, self.w2):
                for expert in weight:
                    nn.init.trunc_normal_(expert, std=0.02)
                if equal:
                    weight.copy_(weight[0].clone())

    @property
    def num(self) -> int:
        return self.w1.shape[0]

    def forward(
        self,
        x: Float[Tensor, "m d"],
        index: Int[Tensor, "m k"],
        weight: Float[Tensor, "m k"],
        kept: Bool[Tensor, "m k"] | None = None,
        dispatch: Dispatch = "auto",
        masks: Masks | None = None,
    ) -> Float[Tensor, "m d"]:
        """Returns the weighted sum over the chosen experts of each item; pairs that are not ``kept`` add nothing and,
        but for "dense", cost nothing.

        "loop": one expert after the other picks its items, the plainest. "sorted": pairs sorted by expert, one matrix
        product an expert. "grouped": the same with torch's grouped product, where `groupable`; else "sorted". "dense":
        every expert on every item ("sorted" where there are ``masks``). "auto": what is fastest as measured
        (benchmarks/token_dispatch.py). ``masks``: dropout's, of each pair (m k ...).
        """
        if dispatch == "auto" or is_undivided():
            dispatch = "dense" if is_undivided() else self._fastest(x, index, kept)
        if dispatch == "dense" and masks is None:
            spread = weight.new_zeros(x.shape[0], self.num)
            spread = spread.scatter_add(1, index, weight if kept is None else weight * kept)
            return torch.einsum("me,emd->md", spread.to(x.dtype), self.every(x))
        if dispatch == "loop":
            return self._looped(x, index, weight, kept, masks)
        grouped = dispatch == "grouped" and groupable(x, self.w1, self.w2)
        return self._sorted(x, index, weight, kept, grouped, masks)

    def every(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "e m d"]:
        """Runs every expert on every item."""
        return self.apart(x.expand(self.num, *x.shape))

    def apart(self, x: Float[Tensor, "e m d"], masks: Masks | None = None) -> Float[Tensor, "e m d"]:
        """Runs each expert on its own items."""
        before = torch.matmul(x, self.w1)
        hidden = gelu(before + self.b1[:, None].to(before.dtype), self.kind)
        after = torch.matmul(hidden if masks is None else hidden * masks.hidden.to(hidden.dtype), self.w2)
        after = after + self.b2[:, None].to(after.dtype)
        return after if masks is None else after * masks.out.to(after.dtype)

    def single(self, expert: int, x: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Runs one expert on all items."""
        return self._mlp(x, (self.w1[expert], self.b1[expert], self.w2[expert], self.b2[expert]))

    def linearly(self, expert: int, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        """Runs one expert on tokens image by image, by the operations of a ViT's MLP, which bounds know."""
        hidden = gelu(F.linear(x, self.w1[expert].t(), self.b1[expert]), self.kind)
        return F.linear(hidden, self.w2[expert].t(), self.b2[expert])

    def _mlp(self, x: Tensor, own: tuple[Tensor, Tensor, Tensor, Tensor], masks: Masks | None = None) -> Tensor:
        w1, b1, w2, b2 = own
        hidden = gelu(torch.addmm(b1, x, w1), self.kind)
        if masks is None:
            return torch.addmm(b2, hidden, w2)
        out = torch.addmm(b2, hidden * masks.hidden.to(hidden.dtype), w2)
        return out * masks.out.to(out.dtype)

    def _each(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Returns every expert's own tensors. Taken apart at once: the backward of one `select` an expert would fill a
        gradient of all experts' size for each.
        """
        return zip(self.w1.unbind(), self.b1.unbind(), self.w2.unbind(), self.b2.unbind(), strict=True)

    def _looped(self, x: Tensor, index: Tensor, weight: Tensor, kept: Tensor | None, masks: Masks | None) -> Tensor:
        out = x.new_zeros(x.shape)
        for expert, own in enumerate(self._each()):
            mine = index == expert if kept is None else (index == expert) & kept
            rows, ranks = (places.to(x.device) for places in torch.nonzero(mine, as_tuple=True))
            if len(rows):
                some = None if masks is None else Masks(*(mask[rows, ranks] for mask in masks))
                answer = self._mlp(x[rows], own, some)
                out = out.to(answer.dtype).index_add(0, rows, answer * weight[rows, ranks, None].to(answer.dtype))
        return out

    def _sorted(
        self,
        x: Tensor,
        index: Tensor,
        weight: Tensor,
        kept: Tensor | None,
        grouped: bool,
        masks: Masks | None = None,
    ) -> Tensor:
        k = index.shape[1]
        pairs = (index if kept is None else index.masked_fill(~kept, self.num)).reshape(-1)
        order = torch.argsort(pairs, stable=True)
        sizes = asking.tally(pairs, self.num + 1)[: self.num]
        if kept is not None:
            order = order[: int(sizes.sum())]
        given = x.index_select(0, order // k)  # its backward is faster than that of x[...]
        some = None if masks is None else Masks(*(mask.flatten(0, 1).index_select(0, order) for mask in masks))
        answers = self._grouped(given, sizes, some) if grouped else self._split(given, asking.told(sizes), some)
        if kept is None:
            back = answers.index_select(0, torch.argsort(order))
        else:
            back = answers.new_zeros(len(pairs), answers.shape[1]).index_copy(0, order.to(answers.device), answers)
        return (back.unflatten(0, (len(x), k)) * weight[..., None].to(back.dtype)).sum(1)

    def _split(self, given: Tensor, sizes: list[int], masks: Masks | None) -> Tensor:
        some: Iterable[Masks | None] = [None] * len(sizes)
        if masks is not None:
            some = map(Masks, masks.hidden.split(sizes), masks.out.split(sizes))
        each = zip(given.split(sizes), self._each(), some, strict=True)
        parts = [self._mlp(part, own, mask) for part, own, mask in each if len(part)]
        return torch.cat(parts) if parts else self.single(0, given)

    def _grouped(self, given: Tensor, sizes: Tensor, masks: Masks | None) -> Tensor:
        dtype = _compute_dtype(given)
        ends = sizes.cumsum(0).to(torch.int32)

        def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            rows = bias.to(dtype).repeat_interleave(sizes, 0, output_size=len(x))
            return F.grouped_mm(x, weight.to(dtype), offs=ends) + rows

        hidden = gelu(layer(given.to(dtype), self.w1, self.b1), self.kind)
        if masks is None:
            return layer(hidden, self.w2, self.b2)
        return layer(hidden * masks.hidden.to(dtype), self.w2, self.b2) * masks.out.to(dtype)

    def _fastest(self, x: Tensor, index: Tensor, kept: Tensor | None) -> Dispatch:
        if kept is None and index.shape[1] == self.num:
            return "dense"
        hidden = index.numel() * self.w1.shape[2] * x.element_size()
        streams = x.device.type == "cpu" and hidden > CACHED
        return "grouped" if groupable(x, self.w1, self.w2) and not streams else "sorted"


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Returns what a matrix product of x computes in: under autocast its dtype."""
    kind = x.device.type
    casts = not x.is_meta and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def groupable(x: Tensor, *weights: Tensor) -> bool:
    """Returns whether torch's grouped matrix product takes these operands: the dtype is float32 or half precision (on
    CUDA: bfloat16 alone, from compute capability 8.0), every row is a multiple of 16 bytes, there are items, and no
    function transform or forward-mode derivative runs.
    """
    dtype = _compute_dtype(x)
    allowed = (torch.float32, torch.bfloat16, torch.float16) if x.device.type == "cpu" else (torch.bfloat16,)
    size = dtype.itemsize
    return (
        (x.device.type == "cpu" or (x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= (8, 0)))
        and dtype in allowed
        and len(x) > 0
        and all(length * size % 16 == 0 for weight in weights for length in weight.shape[1:])
        and not compat.in_function_transform()
        and not any(torch.autograd.forward_ad.unpack_dual(given).tangent is not None for given in (x, *weights))
    )


# ------------------------------------------------------------------------------------------------ room


def capacity(items: int, experts: int, k: int, factor: float, multiple: int = 1) -> int:
    """Returns how many items an expert has room for: ceil(items * k * factor / experts), up to a multiple of
    ``multiple`` (V-MoE's code: 4). ``factor`` is taken as it is written: 1.1 of 100 items is 110, not the next number
    above.
    """
    room = math.ceil(items * k * Fraction(str(factor)) / experts)
    return math.ceil(room / multiple) * multiple


def within_capacity(
    index: Int[Tensor, "s k"], priority: Float[Tensor, " s"] | None, experts: int, room: int
) -> Bool[Tensor, "s k"]:
    """Returns which choices of the items of a group find room: all first choices before any second one, items in their
    order (V-MoE's "vanilla"), or by decreasing ``priority`` (batch-priority, Riquelme et al. 2021, section 4). A choice
    without room still counts.
    """
    items, k = index.shape
    if priority is None:
        order = torch.arange(items, device=index.device)
    else:
        order = torch.argsort(priority, descending=True, stable=True)
    queue = F.one_hot(index[order].T.reshape(-1), experts)
    place = (queue.cumsum(0) * queue).sum(1) - 1
    kept = torch.empty_like(index, dtype=torch.bool)
    kept[order] = (place < room).reshape(k, items).T
    return kept


def experts_choose(p: Float[Tensor, "s e"], room: int) -> Bool[Tensor, "s e"]:
    """Expert choice (Zhou et al. 2022): each expert takes the ``room`` items of the group with its largest p; ties go
    to the earlier item.
    """
    best = torch.argsort(p, dim=0, descending=True, stable=True)[:room]
    return torch.zeros_like(p, dtype=torch.bool).scatter_(0, best, True)
