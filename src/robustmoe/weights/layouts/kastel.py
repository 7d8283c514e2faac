"""KASTEL-MobilityLab/robust-sparse-moes: the released code of Robust Experts (arXiv 2509.05086), torchvision's ResNets
with experts in the place of blocks or convolutions.
"""

from __future__ import annotations

import re

from torch import nn

from robustmoe.models.base import Dense
from robustmoe.models.block import LayeredModel, RoutedLayer
from robustmoe.models.layer_routers import DoubleConvRouter, FixedRouter, GapRouter
from robustmoe.models.norm import Standardise
from robustmoe.models.resnet import ResNetNetwork
from robustmoe.weights.layouts.names import TORCHVISION
from robustmoe.weights.pairs import Counterpart, Layout, reshaped, same


def pairs(model: nn.Module) -> list[Counterpart]:
    """Those of a ResNet with or without experts."""
    network = model.network if isinstance(model, Dense | LayeredModel) else None
    if not isinstance(network, ResNetNetwork) or len(network.stages) != 4:
        return []
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, RoutedLayer)}
    if any(isinstance(layer.router, Standardise) for layer in layers.values()):
        return []
    out = [pair for name, layer in layers.items() for pair in of_router(name, layer)]
    return [*out, *(same(renamed(name), f"network.{name}") for name in network.state_dict() if ".router." not in name)]


def wants(model: nn.Module) -> list[str]:
    routed = [layer for layer in model.modules() if isinstance(layer, RoutedLayer)]
    more = any(layer.k > 1 for layer in routed)
    return ["that code divides the gates of k > 1 experts by their sum plus 1e-5, ours by their sum"] if more else []


def renamed(name: str) -> str:
    """The name of a tensor that belongs to no router; an expert's is in the middle of the path of its layer."""
    layer = re.fullmatch(r"(.+)\.experts\.(\d+)\.(?:(.+)\.)?(\w+)", name)
    if layer is None:
        module, _, leaf = name.rpartition(".")
        return f"{TORCHVISION(module)}.{leaf}"
    path, number, inside, leaf = layer.groups()
    place = TORCHVISION(path)
    within = TORCHVISION(f"{path}.{inside}").removeprefix(f"{place}.") if inside else ""
    return ".".join(filter(None, (place, "experts", number, within, leaf)))


def of_router(name: str, layer: RoutedLayer) -> list[Counterpart]:
    """The router's tensors, by their place in a sequence there."""
    there, here = f"{TORCHVISION(name)}.gate.network", f"network.{name}.router"
    router = layer.router
    if isinstance(router, FixedRouter):
        return [same(f"{there}.support_vectors", f"{here}.directions")]
    if isinstance(router, GapRouter) and router.head.bias is not None:
        return [same(f"{there}.2.{leaf}", f"{here}.head.{leaf}") for leaf in ("weight", "bias")]
    if isinstance(router, GapRouter):
        experts, features = router.head.weight.shape
        filters = (experts, features // router.kernel**2, router.kernel, router.kernel)
        return [reshaped(f"{there}.0.weight", f"{here}.head.weight", filters, (experts, features))]
    if isinstance(router, DoubleConvRouter):
        experts, features = router.head.weight.shape
        last = reshaped(f"{there}.2.weight", f"{here}.head.weight", (experts, features, 1, 1), (experts, features))
        norms = [same(f"{there}.1.{leaf}", f"{here}.norm.{leaf}") for leaf in router.norm.state_dict()]
        return [same(f"{there}.0.weight", f"{here}.first.weight"), *norms, last]
    return []


KASTEL = Layout(
    "Robust Experts' released code (its Lightning .ckpt files): BlockMoE and ConvMoE of ResNets, and the dense ones",
    "github.com/KASTEL-MobilityLab/robust-sparse-moes at ed22e81",
    pairs,
    wants=wants,
)
