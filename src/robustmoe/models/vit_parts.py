"""The layers of vision transformers (Dosovitskiy et al., ICLR 2021), with timm's names, shapes and arithmetic; the
options are those of V-MoE's code (google-research/vmoe) and of big_vision's.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.routing import Tape

EPS = 1e-6
"""The epsilon of every LayerNorm, as in the published weights (torch's default is 1e-5)."""

Gelu = Literal["exact", "tanh"]
"""x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016; torch's default), or the approximation of
the same paper by a tanh, which flax's ``nn.gelu`` and so V-MoE's code computes.
"""


def gelu(x: Tensor, kind: Gelu) -> Tensor:
    return F.gelu(x, approximate="tanh" if kind == "tanh" else "none")


def dropped(x: Float[Tensor, "n t d"], rate: float, tape: Tape | None, name: str) -> Float[Tensor, "n t d"]:
    """Dropout (Srivastava et al. 2014) in a training pass: each number is 0 with probability ``rate``, the others are
    divided by 1 - rate. In any other pass, which is one whose tape has no noise, x is returned as it is.

    The draws of an image are its own (`Tape.draws`): they depend on no batch, order, process or resume. Where it comes
    several times, one after the other, each time has others.
    """
    draws = None if tape is None or rate == 0 else tape.draws(f"{name}.dropout")
    if draws is None or not len(x):
        return x
    kept = draws.uniform(len(x) // len(draws), *x.shape[1:]).flatten(0, 1) >= rate
    return x * (kept.to(x.dtype) / (1 - rate))


class PatchEmbed(nn.Module):
    """Images (n, ch, h, w) -> one token a patch, (n, t, d), row by row."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Float[Tensor, "n ch h w"]) -> Float[Tensor, "n t d"]:
        return self.proj(x).flatten(2).transpose(1, 2)


def sincos2d(grid: tuple[int, int], width: int) -> Float[Tensor, "1 t d"]:
    """Fixed positions of a ``grid`` (rows, columns), row by row (MoCo v3, Chen et al. 2021; as in V-MoE's code): a
    quarter of the width each for sin and cos of the column, then of the row, at wavelengths from 2 pi to 2 pi 10,000.

    Raises ValueError for a width that is no multiple of 4, or below 8.
    """
    if width % 4 or width < 8:
        raise ValueError(f"positions=sincos2d needs a width that is a multiple of 4 and at least 8; got {width}")
    quarter = torch.arange(width // 4, dtype=torch.float64)
    omega = 10_000.0 ** (-quarter / (width // 4 - 1))
    rows, columns = (torch.arange(length, dtype=torch.float64)[:, None] * omega for length in grid)
    by_column = torch.cat([columns.sin(), columns.cos()], 1).expand(grid[0], -1, -1)
    by_row = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, grid[1], -1)
    return torch.cat([by_column, by_row], 2).flatten(0, 1)[None].float()


def _head_norms(width: int, normalised: bool) -> tuple[nn.Module, nn.Module]:
    """The LayerNorms of a head's queries and keys (Dehghani et al. 2023, section 2.1), without a shift as there and in
    V-MoE's code; or nothing.
    """
    if not normalised:
        return nn.Identity(), nn.Identity()
    return nn.LayerNorm(width, eps=EPS, bias=False), nn.LayerNorm(width, eps=EPS, bias=False)


class Attention(nn.Module):
    """Self-attention of an image's tokens. ``qk_norm``: each head's queries and keys are normalised."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = _head_norms(width // heads, qk_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(0, 2, 3, 1, 4).unbind(1)
        return self.proj(_attended(self.q_norm(query), self.k_norm(key), value))


def _attended(
    query: Float[Tensor, "n heads q d"], key: Float[Tensor, "n heads t d"], value: Float[Tensor, "n heads t d"]
) -> Float[Tensor, "n q _"]:
    """The heads side by side; under autocast in the values' dtype, whatever LayerNorm made of the other two."""
    mixed = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)
    return mixed.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """The same two layers on every token; dropout after each in training."""

    def __init__(self, width: int, hidden: int, kind: Gelu = "exact", dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.kind: Gelu = kind
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "n t d"], tape: Tape | None = None) -> Float[Tensor, "n t d"]:
        hidden = dropped(gelu(self.fc1(x), self.kind), self.dropout, tape, "hidden")
        return dropped(self.fc2(hidden), self.dropout, tape, "out")


class AttentionPool(nn.Module):
    """One vector of an image's tokens, "MAP" (Zhai et al. 2022; as in V-MoE's code): a learned query attends to all of
    them, then an MLP on the normalised answer is added to it. (n, t, d) -> (n, d).
    """

    def __init__(self, width: int, heads: int, hidden: int, kind: Gelu = "exact", qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm, self.k_norm = _head_norms(width // heads, qk_norm)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, hidden, kind)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n d"]:
        query = self.q(self.latent.repeat(x.shape[0], 1, 1)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(0, 2, 3, 1, 4).unbind(1)
        pooled = self.proj(_attended(self.q_norm(query), self.k_norm(key), value))
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class ViTBlock(nn.Module):
    """Attention, then ``mlp``, each on normalised tokens and added to them. Any module (tokens (n, t, d), tape) ->
    (n, t, d) may stand in the place of ``mlp``; on the tape its names begin with "mlp.".
    """

    def __init__(self, width: int, heads: int, mlp: nn.Module, qk_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = mlp
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "n t d"], tape: Tape) -> Float[Tensor, "n t d"]:
        x = x + dropped(self.attn(self.norm1(x)), self.dropout, tape, "attn")
        return x + self.mlp(self.norm2(x), tape.under("mlp"))
