"""What enters the routed layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.models.base import RoutedModel


def layer_inputs(
    model: RoutedModel, layers: Mapping[str, nn.Module], x: Float[Tensor, "n ch h w"]
) -> dict[str, Float[Tensor, "n t d"]]:
    """What enters each of these layers of the model (`RoutedModel.layers`), by the same names; not on a graph."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def look(module: Any, given: tuple[Any, ...]) -> None:
            inputs[name] = given[0].detach()

        return look

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model.run(x)
    finally:
        for handle in handles:
            handle.remove()
    return inputs
