"""Vision transformers (Dosovitskiy et al., ICLR 2021). Parameters have timm's names and shapes and the computation is
timm's, so the weights of its ``vit_small_patch16_224`` and the like fit as they are (a recipe's ``init``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.models.base import ImageShape, NetworkSpec
from robustmoe.models.norm import at_least_float32

EPS = 1e-6
"""The epsilon of every LayerNorm, as in the published weights (torch's default is 1e-5)."""


class PatchEmbed(nn.Module):
    """Images (n, ch, h, w) -> one token a patch, (n, t, d), row by row."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Float[Tensor, "n ch h w"]) -> Float[Tensor, "n t d"]:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention of an image's tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The same two layers on every token; the GELU is the exact one."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    """Attention, then ``mlp``, each on normalised tokens and added to them. Any module (n, t, d) -> (n, t, d) may stand
    in the place of ``mlp``.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp: nn.Module = MLP(width, hidden)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@runtime_checkable
class Positioned(Protocol):
    """A network with learned positions ``pos_embed`` (1, 1 + rows * columns, d): of a class token, then of its ``grid``
    (rows, columns) of patches. Those of another grid can be interpolated to it (`resample_positions`).
    """

    pos_embed: nn.Parameter
    grid: tuple[int, int]


class ViTNetwork(nn.Module):
    """The network of `ViT`. ``grid``: (rows, columns) of patches; token 0 is the class token."""

    def __init__(self, spec: ViT, num_classes: int, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, spec.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], spec.width))
        self.patch_embed = PatchEmbed(channels, spec.width, spec.patch)
        self.blocks = nn.Sequential(*(ViTBlock(spec.width, spec.heads, spec.hidden) for _ in range(spec.depth)))
        self.norm = nn.LayerNorm(spec.width, eps=EPS)
        self.head = nn.Linear(spec.width, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """timm's: linear layers and positions truncated normal, the class token all but 0; the patches' convolution
        keeps torch's own.
        """
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "n ch h w"]) -> Float[Tensor, "n c"]:
        return self.classify(self.blocks(self.tokens(x)))

    def tokens(self, x: Float[Tensor, "n ch h w"]) -> Float[Tensor, "n t d"]:
        """Returns the class token and one a patch, positions added."""
        patches = self.patch_embed(x)
        return torch.cat([self.cls_token.expand(len(x), -1, -1).to(patches), patches], 1) + self.pos_embed

    def classify(self, tokens: Float[Tensor, "n t d"]) -> Float[Tensor, "n c"]:
        """Returns the logits of the last block's tokens."""
        return self.head(self.norm(tokens)[:, 0])


@dataclass(frozen=True)
class ViT(NetworkSpec):
    """Vision transformer: class token, learned positions, LayerNorm before attention and MLP, no dropout.

    ``patch``: pixels a side of a patch; both sides of the image have to be a multiple of it. ``width``: of a token;
    ``depth``: blocks; ``heads``: of the attention, a divisor of ``width``; the MLP's hidden layer has ``mlp_ratio``
    times the width. The defaults are timm's ``vit_small_patch16_224``, also in what its weights are called.
    """

    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        for name in ("patch", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, {self.heads}; got {self.width}")
        if self.hidden < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} of width {self.width} leaves no hidden unit")

    @property
    def hidden(self) -> int:
        """The width of the MLP's hidden layer."""
        return int(self.mlp_ratio * self.width)

    def network(self, num_classes: int, image_shape: ImageShape) -> ViTNetwork:
        channels, height, width = image_shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"images of {height} x {width} pixels cannot be cut into patches of {self.patch}; choose a patch that "
                "divides both sides, such as vit_small(patch=4), or enlarge the images: resized(vit_small, size=224)"
            )
        return ViTNetwork(self, num_classes, channels, (height // self.patch, width // self.patch))


def vit_tiny(patch: int = 16) -> ViT:
    """ViT-Ti: 12 blocks of width 192, 3 heads."""
    return ViT(patch, width=192, heads=3)


def vit_small(patch: int = 16) -> ViT:
    """ViT-S: 12 blocks of width 384, 6 heads; for images of 32 pixels, patch=4."""
    return ViT(patch)


def vit_base(patch: int = 16) -> ViT:
    """ViT-B: 12 blocks of width 768, 12 heads."""
    return ViT(patch, width=768, heads=12)


Size = Literal["tiny", "small", "base", "vmoe_small", "vmoe_base"]

SIZES: dict[Size, ViT] = {
    "tiny": vit_tiny(),
    "small": vit_small(),
    "base": vit_base(),
    "vmoe_small": ViT(width=512, depth=8, heads=8),
    "vmoe_base": ViT(width=768, depth=12, heads=12),
}
"""DeiT's Ti, S and B (Touvron et al. 2021), and V-MoE's S, which has 8 blocks of width 512, and B, which is DeiT's."""


def resample_positions(positions: Float[Tensor, "1 t d"], grid: tuple[int, int]) -> Float[Tensor, "1 s d"]:
    """Returns a position embedding of a square grid for another ``grid`` (rows, columns): bicubic with antialiasing, as
    timm does it; the class token's stays, and an equal grid is returned as it is.

    Raises ValueError where the tokens are not a class token and a square grid.
    """
    tokens, side = positions.shape[1], math.isqrt(max(positions.shape[1] - 1, 0))
    if side < 1 or side * side != tokens - 1:
        raise ValueError(f"expected a class token and a square grid of positions; got {tokens} positions")
    if (side, side) == grid:
        return positions
    square = at_least_float32(positions[:, 1:]).transpose(1, 2).unflatten(2, (side, side))
    other = F.interpolate(square, size=grid, mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], other.flatten(2).transpose(1, 2).to(positions)], 1)
