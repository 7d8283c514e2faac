"""The experts of a token router: MLPs of equal shape in shared tensors, and four ways to send tokens through them.

All give sum_j weight[:, j] * expert[index[:, j]](x), equal up to rounding, and are made of torch's own operations, so
gradients of gradients exist.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Dispatch = Literal["auto", "loop", "sorted", "grouped", "dense"]


class TokenExperts(nn.Module):
    """``num`` two-layer MLPs with the exact GELU: x -> GELU(x w1 + b1) w2 + b2.

    Expert i is ``w1[i]`` (d, h), ``b1[i]`` (h), ``w2[i]`` (h, d), ``b2[i]`` (d): a ViT's MLP with its matrices
    transposed (see `load_dense`). ``equal``: all start the same (V-MoE's); else each is drawn.
    """

    def __init__(self, num: int, width: int, hidden: int, equal: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num, width, hidden))
        self.b1 = nn.Parameter(torch.zeros(num, hidden))
        self.w2 = nn.Parameter(torch.empty(num, hidden, width))
        self.b2 = nn.Parameter(torch.zeros(num, width))
        with torch.no_grad():
            for weight in (self.w1, self.w2):
                for expert in weight[:1] if equal else weight:
                    nn.init.trunc_normal_(expert, std=0.02)
                weight.copy_(weight[:1].expand_as(weight) if equal else weight.clone())

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
    ) -> Float[Tensor, "m d"]:
        """The weighted sum over the chosen experts of each item; pairs that are not ``kept`` add nothing and, but for
        "dense", cost nothing.

        "loop": one expert after the other picks its items, the plainest. "sorted": pairs sorted by expert, one matrix
        product an expert. "grouped": the same with torch's grouped product, where `groupable`; else "sorted". "dense":
        every expert on every item. "auto": what is fastest as measured (benchmarks/token_dispatch.py).
        """
        if dispatch == "auto":
            dispatch = self._fastest(x, index, kept)
        if dispatch == "dense":
            spread = weight.new_zeros(len(x), self.num)
            spread = spread.scatter_add(1, index, weight if kept is None else weight * kept)
            return torch.einsum("me,emd->md", spread.to(x.dtype), self.every(x))
        if dispatch == "loop":
            return self._looped(x, index, weight, kept)
        return self._sorted(x, index, weight, kept, dispatch == "grouped" and groupable(x, self.w1, self.w2))

    def every(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "e m d"]:
        """Every expert on every item."""
        return self.apart(x.expand(self.num, *x.shape))

    def apart(self, x: Float[Tensor, "e m d"]) -> Float[Tensor, "e m d"]:
        """Each expert on its own items."""
        hidden = F.gelu(torch.matmul(x, self.w1) + self.b1[:, None].to(x.dtype))
        return torch.matmul(hidden, self.w2) + self.b2[:, None].to(hidden.dtype)

    def one(self, expert: int, x: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """One expert on all items."""
        hidden = F.gelu(F.linear(x, self.w1[expert].T, self.b1[expert]))
        return F.linear(hidden, self.w2[expert].T, self.b2[expert])

    def _looped(self, x: Tensor, index: Tensor, weight: Tensor, kept: Tensor | None) -> Tensor:
        out = x.new_zeros(x.shape)
        for expert in range(self.num):
            mine = index == expert if kept is None else (index == expert) & kept
            rows, ranks = torch.nonzero(mine, as_tuple=True)
            if len(rows):
                answer = self.one(expert, x[rows])
                out = out.to(answer.dtype).index_add(0, rows, answer * weight[rows, ranks, None].to(answer.dtype))
        return out

    def _sorted(self, x: Tensor, index: Tensor, weight: Tensor, kept: Tensor | None, grouped: bool) -> Tensor:
        k = index.shape[1]
        pairs = (index if kept is None else index.masked_fill(~kept, self.num)).reshape(-1)
        order = torch.argsort(pairs, stable=True)
        sizes = torch.bincount(pairs, minlength=self.num + 1)[: self.num]
        if kept is not None:
            order = order[: int(sizes.sum())]
        given = x[order // k]
        answers = self._grouped(given, sizes, pairs[order]) if grouped else self._split(given, sizes.tolist())
        if kept is None:
            back = answers[torch.argsort(order)]
        else:
            back = answers.new_zeros(len(pairs), answers.shape[1]).index_copy(0, order, answers)
        return (back.unflatten(0, (len(x), k)) * weight[..., None].to(back.dtype)).sum(1)

    def _split(self, given: Tensor, sizes: list[int]) -> Tensor:
        parts = [self.one(expert, part) for expert, part in enumerate(given.split(sizes)) if len(part)]
        return torch.cat(parts) if parts else self.one(0, given)

    def _grouped(self, given: Tensor, sizes: Tensor, expert: Tensor) -> Tensor:
        dtype = _compute_dtype(given)
        ends = sizes.cumsum(0).to(torch.int32)
        hidden = F.grouped_mm(given.to(dtype), self.w1.to(dtype), offs=ends) + self.b1.to(dtype)[expert]
        return F.grouped_mm(F.gelu(hidden), self.w2.to(dtype), offs=ends) + self.b2.to(dtype)[expert]

    def _fastest(self, x: Tensor, index: Tensor, kept: Tensor | None) -> Dispatch:
        if kept is None and index.shape[1] == self.num:
            return "dense"
        return "grouped" if groupable(x, self.w1, self.w2) else "sorted"

    @torch.no_grad()
    def load_dense(self, fc1: nn.Linear, fc2: nn.Linear) -> None:
        """Every expert becomes the MLP of these two layers (sparse upcycling, Komatsuzaki et al. 2023)."""
        for own, given in ((self.w1, fc1.weight.T), (self.b1, fc1.bias), (self.w2, fc2.weight.T), (self.b2, fc2.bias)):
            own.copy_(given)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of x computes in: under autocast its dtype."""
    kind = x.device.type
    casts = not x.is_meta and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def groupable(x: Tensor, *weights: Tensor) -> bool:
    """Whether torch's grouped matrix product takes these operands: there is one, the dtype is float32 or half precision
    (on CUDA: bfloat16 alone), every row is a multiple of 16 bytes, there are items, and no function transform or
    forward-mode derivative runs.
    """
    dtype = _compute_dtype(x)
    allowed = (torch.float32, torch.bfloat16, torch.float16) if x.device.type == "cpu" else (torch.bfloat16,)
    size = dtype.itemsize
    return (
        hasattr(F, "grouped_mm")
        and x.device.type in ("cpu", "cuda")
        and dtype in allowed
        and len(x) > 0
        and all(length * size % 16 == 0 for weight in weights for length in weight.shape[1:])
        and not torch._C._functorch.maybe_current_level()
        and not any(torch.autograd.forward_ad.unpack_dual(one).tangent is not None for one in (x, *weights))
    )


# ------------------------------------------------------------------------------------------------ room


def capacity(items: int, experts: int, k: int, factor: float, multiple: int = 1) -> int:
    """How many items an expert has room for: ceil(items * k * factor / experts), up to a multiple of ``multiple``
    (V-MoE's code: 4).
    """
    room = math.ceil(items * k * factor / experts)
    return math.ceil(room / multiple) * multiple


def within_capacity(
    index: Int[Tensor, "s k"], priority: Float[Tensor, " s"] | None, experts: int, room: int
) -> Bool[Tensor, "s k"]:
    """Which choices of the items of a group find room: all first choices before any second one, items in their order
    (V-MoE's "vanilla"), or by decreasing ``priority`` (batch-priority, Riquelme et al. 2021, section 4). A choice
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
