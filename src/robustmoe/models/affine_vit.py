"""Affine experts in a vision transformer: conditional LayerNorm, and a hidden layer of the MLP with scales and shifts,
mixed by a router on the tokens that enter a block (`robustmoe.models.affine`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.models.affine import LayerExperts
from robustmoe.models.base import NetworkModel, to_channels_last
from robustmoe.models.norm import Normalise
from robustmoe.models.vit import ViTNetwork
from robustmoe.models.vit_parts import MLP, ViTBlock, dropped, gelu
from robustmoe.routing import Tape

ATTENTION, MIXER, HIDDEN = range(3)
"""Places of a block: the LayerNorm before attention, that before the MLP, the MLP's hidden layer before its GELU."""


class AffineViTBlock(ViTBlock):
    """A `ViTBlock` whose numbers at these places are its own and what ``affine`` adds for each image. Routers see the
    patches' tokens that enter the block, as a map of ``grid`` (rows, columns) tokens; on the tape they are
    "affine.I.router".
    """

    def __init__(self, block: ViTBlock, affine: list[LayerExperts], grid: tuple[int, int]) -> None:
        nn.Module.__init__(self)
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.dropout = block.dropout
        self.affine = nn.ModuleList(affine)
        self.grid = grid

    def forward(self, x: Float[Tensor, "n t d"], tape: Tape) -> Float[Tensor, "n t d"]:
        added = self._added(x, tape)
        attended = self.attn(_normed(self.norm1, x, added[ATTENTION]))
        x = x + dropped(attended, self.dropout, tape, "attn")
        return x + self._mixed(_normed(self.norm2, x, added[MIXER]), tape.under("mlp"), added[HIDDEN])

    def _added(self, x: Float[Tensor, "n t d"], tape: Tape) -> dict[int, Tensor]:
        """Returns what the experts add at each place, (n, numbers)."""
        rows, columns = self.grid
        tokens = x[:, x.shape[1] - rows * columns :].transpose(1, 2).unflatten(2, self.grid)
        added: dict[int, Tensor] = {}
        known: dict[int, Tensor] = {}
        for number, experts in enumerate(self.affine):
            assert isinstance(experts, LayerExperts)
            logits = experts.router(tokens, known)
            if tape.read or tape.forced or experts.gate != "soft":
                mixture = experts.mixed(tape(f"affine.{number}.router", experts.decide(logits)))
            else:
                mixture = experts.shared(torch.softmax(logits, -1))
            added |= experts.at(mixture)
        return added

    def _mixed(self, x: Float[Tensor, "n t d"], tape: Tape, added: Float[Tensor, "n numbers"]) -> Tensor:
        """Returns the MLP's answer, its hidden layer scaled and shifted."""
        mlp = self.mlp
        assert isinstance(mlp, MLP)
        hidden = _moved(mlp.fc1(x), 1.0, 0.0, added)
        hidden = dropped(gelu(hidden, mlp.kind), mlp.dropout, tape, "hidden")
        return dropped(mlp.fc2(hidden), mlp.dropout, tape, "out")


def _normed(norm: nn.LayerNorm, x: Float[Tensor, "n t d"], added: Float[Tensor, "n numbers"]) -> Tensor:
    return _moved(F.layer_norm(x, norm.normalized_shape, None, None, norm.eps), norm.weight, norm.bias, added)


def _moved(
    x: Float[Tensor, "n t d"], scale: Tensor | float, shift: Tensor | float, added: Float[Tensor, "n numbers"]
) -> Float[Tensor, "n t d"]:
    """Returns x times ``scale`` plus ``shift`` (d,), to which an image's own come: d numbers each, scales first."""
    own_scale, own_shift = added.unflatten(1, (2, 1, -1)).unbind(1)
    return torch.addcmul((own_shift + shift).to(x.dtype), x, (own_scale + scale).to(x.dtype))


class AffineViTModel(NetworkModel):
    """A `ViTNetwork` of `AffineViTBlock`s; their routers are in the trace as ``network.blocks.I.affine.J.router``.

    Loaded with a dense network's weights a fresh one answers as that network does.
    """

    def __init__(self, network: ViTNetwork, affine: Mapping[int, list[LayerExperts]], normalise: Normalise) -> None:
        super().__init__(network, normalise)
        for number, experts in affine.items():
            block = network.blocks[number]
            assert isinstance(block, ViTBlock)
            network.blocks[number] = AffineViTBlock(block, experts, network.grid)

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        logits: Tensor = self.network(to_channels_last(self.normalise(x)), tape.under("network"))
        return logits
