"""What the weights of a model cannot tell, so that a wrong argument of its spec would go unseen."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from robustmoe.models.block import RoutedLayer
from robustmoe.models.dual import DualModel
from robustmoe.models.ensemble import EnsembleModel
from robustmoe.models.token_layers import TokenMoE
from robustmoe.models.tokens import TokenExperts
from robustmoe.models.vit_parts import MLP, Attention, Gelu


def untold(model: nn.Module) -> str:
    """The model's arguments that no tensor's name or shape shows, such as "heads=4, k=2"; "" without any."""
    return ", ".join(dict.fromkeys(argument for module in model.modules() for argument in _arguments(module)))


def _arguments(module: nn.Module) -> Iterator[str]:
    if isinstance(module, Attention):
        yield f"heads={module.heads}"
    elif isinstance(module, TokenMoE):
        tested = module.rules[0]
        yield from (f"k={tested.k}", f"gating={tested.gating}", f"choice={tested.choice}", f"capacity={tested.room}")
    elif isinstance(module, EnsembleModel | RoutedLayer):
        yield from (f"k={module.k}", f"gate={module.gate}")
    elif isinstance(module, DualModel) and module.mixer is None:
        yield f"alpha={module.alpha:g}"


def other_gelu(model: nn.Module, theirs: Gelu) -> list[str]:
    """A sentence where the model computes another GELU than a code that has ``theirs``."""
    kinds = {module.kind for module in model.modules() if isinstance(module, MLP | TokenExperts)}
    return [f"that code computes gelu={theirs}, this model gelu={kind}" for kind in sorted(kinds - {theirs})]
