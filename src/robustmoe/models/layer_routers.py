"""Routers of layers inside a CNN ("Robust Experts", arXiv 2509.05086), and how its code shares out a training batch."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from robustmoe.errors import UserError
from robustmoe.models.norm import BatchNorm2d, Standardise, at_least_float32
from robustmoe.models.tokens import capacity

LayerRouter = Literal["conv_gap", "gap_fc", "conv3_gap", "double_conv", "fixed_gap", "channel_gap"]
"""Averages of a feature map, and a linear map of them.

"gap_fc": global average pooling, linear with a bias. "conv_gap": a 1x1 convolution without bias, then the average; both
are linear, so the average comes first here, at 1 / (h w) of the cost: "gap_fc" without the bias. "conv3_gap": a 3x3
convolution without bias and without padding, then the average, as the released configuration has the paper's Conv-GAP;
here the nine averages that its taps see come first. "double_conv": 1x1 convolution to 8 channels, BatchNorm, 1x1
convolution, average (the released configuration's). Two learn nothing: "fixed_gap", the averages' products with random
directions, and "channel_gap", the averages of the first channels, one an expert.
"""

KERNELS = {"conv_gap": 1, "gap_fc": 1, "conv3_gap": 3}

MIDDLE = 8
"""Channels between the two convolutions of "double_conv"."""

ROUNDS = 24
"""How often the released code shares out what is left before everybody gets in."""


class GapRouter(nn.Module):
    """Router logits of feature maps (n, d, h, w) -> (n, e): a convolution of ``kernel`` x ``kernel``, without padding,
    averaged over its output. ``head``: its filters (e, d * kernel * kernel), on the averages that each tap sees.
    """

    def __init__(self, channels: int, experts: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.kernel = kernel
        self.head = nn.Linear(channels * kernel**2, experts, bias=bias)

    def forward(self, x: Float[Tensor, "n d h w"]) -> Float[Tensor, "n e"]:
        x = at_least_float32(x)
        height, width = x.shape[2:]
        if min(height, width) < self.kernel:
            raise UserError(
                f"router conv3_gap got a feature map of {height} x {width}; expected at least 3 x 3. Take conv_gap, an "
                "earlier stage, or larger images"
            )
        if self.kernel == 1:
            seen = x.mean((2, 3))
        else:
            seen = F.avg_pool2d(x, (height - self.kernel + 1, width - self.kernel + 1), stride=1).flatten(1)
        logits: Tensor = self.head(seen)
        return logits


class DoubleConvRouter(nn.Module):
    """Router logits of feature maps (n, d, h, w) -> (n, e): 1x1 convolution, BatchNorm, 1x1 convolution, average."""

    def __init__(self, channels: int, experts: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, MIDDLE, 1, bias=False)
        self.norm = BatchNorm2d(MIDDLE)
        self.head = nn.Linear(MIDDLE, experts, bias=False)

    def forward(self, x: Float[Tensor, "n d h w"]) -> Float[Tensor, "n e"]:
        logits: Tensor = self.head(at_least_float32(self.norm(self.first(x))).mean((2, 3)))
        return logits


class FixedRouter(nn.Module):
    """Router logits of feature maps (n, d, h, w) -> (n, e): products of the channels' averages with directions that are
    drawn once and do not learn.
    """

    directions: Tensor

    def __init__(self, directions: Float[Tensor, "e d"]) -> None:
        super().__init__()
        self.register_buffer("directions", directions)

    def forward(self, x: Float[Tensor, "n d h w"]) -> Float[Tensor, "n e"]:
        means = at_least_float32(x).mean((2, 3))
        return F.linear(means, self.directions.to(means.dtype))


class ChannelRouter(nn.Module):
    """Router logits of feature maps (n, d, h, w) -> (n, e): the averages of the first e channels."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Float[Tensor, "n d h w"]) -> Float[Tensor, "n e"]:
        return at_least_float32(x[:, : self.experts]).mean((2, 3))


def layer_router(channels: int, experts: int, kind: str, standardise: bool = False) -> nn.Module:
    """Returns a fresh router for feature maps of so many channels."""
    router: nn.Module
    if kind in KERNELS:
        router = GapRouter(channels, experts, KERNELS[kind], bias=kind == "gap_fc")
    elif kind == "double_conv":
        router = DoubleConvRouter(channels, experts)
    elif kind == "fixed_gap":
        router = FixedRouter(torch.randn(experts, channels))
    elif kind == "channel_gap":
        if experts > channels:
            raise ValueError(f"router channel_gap has a channel for each expert; got {experts} and {channels} channels")
        router = ChannelRouter(experts)
    else:
        known = "', '".join((*KERNELS, "double_conv", "fixed_gap", "channel_gap"))
        raise ValueError(f"router must be '{known}'; got {kind!r}")
    return Standardise(router, experts) if standardise else router


# ------------------------------------------------------------------------------------------------ sharing out a batch


def shared_out(scores: Float[Tensor, "n e"], k: int, factor: float | None) -> Int[Tensor, "n k"]:
    """Returns k experts of each image, in ascending order, by the released code's rule for training batches.

    In rounds: each image asks for its best experts that have room, and each expert takes those of them that like it
    best, by the softmax of their scores without the experts they have. An expert has room for ceil(k n factor / e)
    images (at least 1; all with no ``factor``). After `ROUNDS`, or where a round moves nobody, every image gets its
    best.
    """
    n, experts = scores.shape
    room = torch.full((experts,), n, device=scores.device)
    if factor is not None:
        room = room.clamp(max=max(1, capacity(n, experts, k, factor)))
    taken = torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(ROUNDS):
        given = _asked(scores, taken, k, room > 0)
        likes = torch.where(given, _likes(scores, taken), -1.0)
        given &= _places(likes, 0) < room
        taken, room = taken | given, room - given.sum(0)
        if not given.any():
            break
    taken = taken | _asked(scores, taken, k, torch.ones_like(room, dtype=torch.bool))
    return taken.nonzero()[:, 1].view(n, k)


def _asked(
    scores: Float[Tensor, "n e"], taken: Bool[Tensor, "n e"], k: int, has_room: Bool[Tensor, " e"]
) -> Bool[Tensor, "n e"]:
    """The best experts of each image that it has not, as many as it is short of."""
    free = has_room & ~taken
    likes = torch.where(free, _likes(scores, taken), -1.0)
    return free & (_places(likes, 1) < (k - taken.sum(1, keepdim=True)))


def _likes(scores: Float[Tensor, "n e"], taken: Bool[Tensor, "n e"]) -> Float[Tensor, "n e"]:
    return torch.softmax(scores.masked_fill(taken, -1e5), 1)


def _places(values: Tensor, dim: int) -> Int[Tensor, "n e"]:
    """Each one's place along the dimension, the largest first, of equal ones the first."""
    return values.argsort(dim=dim, descending=True, stable=True).argsort(dim=dim)
