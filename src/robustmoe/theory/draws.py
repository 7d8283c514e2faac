"""Random numbers for the experiments, and the small pieces that several of them use. Everything is in float64."""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe.noise import Noise


def normal(seed: int, name: str, *shape: int) -> Tensor:
    """Standard normal numbers of this shape, the same for the same seed and name."""
    noise = Noise.of(torch.arange(shape[0]), seed, zlib.crc32(name.encode()))
    return noise.normal(*shape[1:]).double()


def signs(seed: int, name: str, *shape: int) -> Tensor:
    """Labels -1 and 1, each as likely."""
    return torch.where(normal(seed, name, *shape) < 0, -1.0, 1.0).double()


def unit(x: Tensor) -> Tensor:
    """Each vector of the last dimension, of length 1."""
    return x / x.norm(dim=-1, keepdim=True)


class Mlps:
    """``experts`` random two-layer MLPs R^d -> R^o with the exact GELU, as plain tensors."""

    def __init__(self, seed: int, name: str, experts: int, width: int, hidden: int, out: int) -> None:
        self.w1 = normal(seed, f"{name} w1", experts, hidden, width) / math.sqrt(width)
        self.b1 = 0.5 * normal(seed, f"{name} b1", experts, hidden)
        self.w2 = normal(seed, f"{name} w2", experts, out, hidden) / math.sqrt(hidden)

    def __call__(self, x: Tensor) -> Tensor:
        """(m, d) -> (m, e, o)."""
        hidden = F.gelu(torch.einsum("ehd,md->meh", self.w1, x) + self.b1)
        return torch.einsum("eoh,meh->meo", self.w2, hidden)

    def alike(self) -> Mlps:
        """As many experts, all of them the first."""
        for name in ("w1", "b1", "w2"):
            value = getattr(self, name)
            setattr(self, name, value[:1].expand_as(value))
        return self
