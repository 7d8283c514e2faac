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

from robustmoe.models.base import Dense, ImageShape, NetworkSpec, RoutedModel, to_channels_last
from robustmoe.models.norm import Normalise, at_least_float32
from robustmoe.models.token_layers import Members
from robustmoe.models.vit_parts import EPS, MLP, AttentionPool, Gelu, PatchEmbed, ViTBlock, dropped, sincos2d
from robustmoe.routing import Tape

Classifier = Literal["token", "gap", "map"]
Positions = Literal["learned", "sincos2d"]
HeadStart = Literal["timm", "vmoe"]


@runtime_checkable
class Positioned(Protocol):
    """A network with learned positions ``pos_embed`` (1, prefix + rows * columns, d): of ``prefix`` class tokens (0 or
    1), then of its ``grid`` (rows, columns) of patches. Those of another grid can be interpolated to it
    (`resample_positions`).
    """

    pos_embed: nn.Parameter
    grid: tuple[int, int]
    prefix: int


class ViTNetwork(nn.Module):
    """The network of `ViT`. ``grid``: (rows, columns) of patches; ``prefix``: class tokens before them, 0 or 1."""

    pos_fixed: Tensor

    def __init__(self, spec: ViT, num_classes: int, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.classifier, self.dropout = grid, spec.classifier, spec.dropout
        self.prefix, self.learned = int(spec.classifier == "token"), spec.positions == "learned"
        if self.prefix:
            self.cls_token = nn.Parameter(torch.empty(1, 1, spec.width))
        if self.learned:
            self.pos_embed = nn.Parameter(torch.empty(1, self.prefix + grid[0] * grid[1], spec.width))
        else:
            fixed = F.pad(sincos2d(grid, spec.width), (0, 0, self.prefix, 0))  # a class token has none
            self.register_buffer("pos_fixed", fixed, persistent=False)
        self.patch_embed = PatchEmbed(channels, spec.width, spec.patch)
        self.blocks = nn.Sequential(*(spec.block() for _ in range(spec.depth)))
        self.norm = nn.LayerNorm(spec.width, eps=EPS)
        if spec.classifier == "map":
            self.attn_pool = AttentionPool(spec.width, spec.heads, spec.hidden, spec.gelu, spec.qk_norm)
        self.pre_logits = nn.Linear(spec.width, spec.pre_logits) if spec.pre_logits else None
        self.head = nn.Linear(spec.pre_logits or spec.width, num_classes)
        self._initialise()
        if spec.head_start == "vmoe":
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, -math.log(num_classes))

    def _initialise(self) -> None:
        """timm's: linear layers and positions truncated normal, the class token all but 0; the patches' convolution
        keeps torch's own.
        """
        if self.prefix:
            nn.init.normal_(self.cls_token, std=1e-6)
        if self.learned:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, AttentionPool):
                nn.init.trunc_normal_(module.latent, std=module.latent.shape[2] ** -0.5)

    def forward(self, x: Float[Tensor, "n ch h w"], tape: Tape | None = None) -> Float[Tensor, "nm c"]:
        """Returns the logits of normalised images; where there are `Members`, of each of them in turn for each image.
        On the tape the routers and draws of block I begin with "blocks.I.".
        """
        tape = Tape(read=False) if tape is None else tape
        tokens = dropped(self.tokens(x), self.dropout, tape, "tokens")
        for number, block in enumerate(self.blocks):
            mlp = block.mlp
            if isinstance(mlp, Members) and len(tokens) == len(x):  # the first one: each image once for every member
                tokens = tokens.repeat_interleave(len(mlp.members), 0)
            tokens = block(tokens, tape.under(f"blocks.{number}"))
        return self.classify(tokens)

    def tokens(self, x: Float[Tensor, "n ch h w"]) -> Float[Tensor, "n t d"]:
        """Returns the class token, if there is one, and one a patch, positions added."""
        tokens = self.patch_embed(x)
        if self.prefix:
            tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(tokens.dtype), tokens], 1)
        return tokens + (self.pos_embed if self.learned else self.pos_fixed)

    def classify(self, tokens: Float[Tensor, "n t d"]) -> Float[Tensor, "n c"]:
        """Returns the logits of the last block's tokens."""
        tokens = self.norm(tokens)
        if self.classifier == "map":
            pooled = self.attn_pool(tokens)
        else:
            pooled = tokens[:, 0] if self.classifier == "token" else tokens.mean(1)
        return self.head(pooled if self.pre_logits is None else torch.tanh(self.pre_logits(pooled)))


class ViTModel(Dense):
    """A `ViTNetwork` alone, whose draws of dropout are its images' own."""

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        return self.network(to_channels_last(self.normalise(x)), tape.under("network"))


@dataclass(frozen=True)
class ViT(NetworkSpec):
    """Vision transformer: LayerNorm before attention and MLP; the defaults are timm's ``vit_small_patch16_224``, also
    in what its weights are called.

    ``patch``: pixels a side of a patch; both sides of the image have to be a multiple of it. ``width``: of a token;
    ``depth``: blocks; ``heads``: of the attention, a divisor of ``width``; the MLP's hidden layer has ``mlp_ratio``
    times the width. ``gelu``: "exact", or "tanh", as in all that was trained with flax (V-MoE, the first ViTs).

    ``classifier``: what the head sees of the normalised tokens: "token", a class token's; "gap", the mean; "map", an
    `AttentionPool`'s. ``pre_logits``: so many tanh units before the head (V-MoE's and ViT's ``representation_size``).
    ``positions``: "learned", or "sincos2d", see `sincos2d`. ``qk_norm``: LayerNorm on queries and keys. ``dropout``: in
    training, after positions, attention and both layers of an MLP (as in V-MoE's code); of a ViT that stands alone.
    ``head_start``: the fresh head, "timm", small weights and no bias; "vmoe", weights 0 and biases -log(classes), so
    that a sigmoid for each class begins at its share.
    """

    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    gelu: Gelu = "exact"
    classifier: Classifier = "token"
    pre_logits: int | None = None
    positions: Positions = "learned"
    qk_norm: bool = False
    dropout: float = 0.0
    head_start: HeadStart = "timm"

    def __post_init__(self) -> None:
        for name in ("patch", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, {self.heads}; got {self.width}")
        if self.hidden < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} of width {self.width} leaves no hidden unit")
        if self.pre_logits is not None and self.pre_logits < 1:
            raise ValueError(f"pre_logits must be at least 1, or none; got {self.pre_logits}")
        if self.positions == "sincos2d":
            sincos2d((1, 1), self.width)
        check_dropout("dropout", self.dropout)

    @property
    def hidden(self) -> int:
        """The width of the MLP's hidden layer."""
        return int(self.mlp_ratio * self.width)

    def block(self) -> ViTBlock:
        """Returns one of its blocks."""
        mlp = MLP(self.width, self.hidden, self.gelu, self.dropout)
        return ViTBlock(self.width, self.heads, mlp, self.qk_norm, self.dropout)

    def network(self, num_classes: int, image_shape: ImageShape) -> ViTNetwork:
        if self.dropout:
            raise ValueError(
                f"dropout={self.dropout} of a vit inside another model: only a vit alone, or a vit_moe, knows its "
                "images' draws; expected dropout=0"
            )
        return self.alone(num_classes, image_shape)

    def alone(self, num_classes: int, image_shape: ImageShape) -> ViTNetwork:
        """Returns the network, for a model that hands it a tape."""
        channels, height, width = image_shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"images of {height} x {width} pixels cannot be cut into patches of {self.patch}; choose a patch that "
                "divides both sides, such as vit_small(patch=4), or enlarge the images: resized(vit_small, size=224)"
            )
        return ViTNetwork(self, num_classes, channels, (height // self.patch, width // self.patch))

    def build(self, num_classes: int, image_shape: ImageShape, normalise: Normalise) -> RoutedModel:
        return ViTModel(self.alone(num_classes, image_shape), normalise)


def check_dropout(name: str, rate: float) -> None:
    """Raises ValueError for a rate that is none."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be at least 0 and below 1; got {rate}")


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


Resizing = Literal["bicubic", "zoom"]


def resample_positions(
    positions: Float[Tensor, "1 t d"], grid: tuple[int, int], prefix: int = 1, how: Resizing = "bicubic"
) -> Float[Tensor, "1 s d"]:
    """Returns a position embedding of a square grid for another ``grid`` (rows, columns). Those of ``prefix`` class
    tokens stay, and an equal grid is returned as it is.

    ``how``: "bicubic" with antialiasing, as timm does it, pixel centres kept; "zoom", linear, corners kept, as ViT's
    and V-MoE's code does it (scipy.ndimage.zoom of order 1).

    Raises ValueError where the tokens are not so many class tokens and a square grid.
    """
    tokens, side = positions.shape[1], math.isqrt(max(positions.shape[1] - prefix, 0))
    if side < 1 or side * side != tokens - prefix:
        expected = "a class token and a square grid" if prefix else "a square grid"
        raise ValueError(f"expected {expected} of positions; got {tokens} positions")
    if (side, side) == grid:
        return positions
    square = at_least_float32(positions[:, prefix:]).transpose(1, 2).unflatten(2, (side, side))
    if how == "zoom":
        other = F.interpolate(square, size=grid, mode="bilinear", align_corners=True)
    else:
        other = F.interpolate(square, size=grid, mode="bicubic", antialias=True)
    return torch.cat([positions[:, :prefix], other.flatten(2).transpose(1, 2).to(positions)], 1)
