"""OPTML-Group/Robust-MoE-CNN: AdvMoE's released code, its MoE networks and their dense twins.

Each routed layer is one convolution there, whose filters are the experts' one after the other, and holds the image
router as a part of its own, so that a checkpoint has it once for each layer and once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from robustmoe.models.backbone import StagedNetwork
from robustmoe.models.base import Dense
from robustmoe.models.convolution import RoutedConv
from robustmoe.models.pathway import PathwayModel
from robustmoe.models.preactivation import Form, Preactivation
from robustmoe.models.resnet import Pad, ResNetNetwork
from robustmoe.models.vgg import Pool, VGGNetwork
from robustmoe.models.wide_resnet import WideResNetNetwork
from robustmoe.weights.layouts.names import (
    KUANGLIU,
    NORMS,
    TORCHVISION,
    WIDE,
    Names,
    Scheme,
    normalised,
    own_norms,
    paired,
)
from robustmoe.weights.pairs import Counterpart, Layout, repeated

ROUTER = Scheme("layer{}.{}", NORMS, {"stem": "conv1", "norm": "bn1", "head": "fc"})


def pairs(model: nn.Module) -> list[Counterpart]:
    """Those of a pathway model with their router, or of a dense network."""
    router = model.router if isinstance(model, PathwayModel) else None
    network = model.network if isinstance(model, Dense | PathwayModel) else None
    if not isinstance(network, StagedNetwork) or own_norms(network) or not (router is None or is_router(router)):
        return []
    names = names_of(network, routed=router is not None)
    if names is None:
        return []
    out = [*paired(network, "network.", "", names), *dead_norms(network, names), *normalised(model)]
    if router is not None:
        layers = [name for name, module in network.named_modules() if isinstance(module, RoutedConv)]
        places = ["router", *(f"{names(name)}.router" for name in layers)]
        for pair in paired(router, "router.", "", ROUTER):
            out.append(repeated([f"{place}.{pair.theirs[0]}" for place in places], pair.ours[0]))
    return out


def wants(model: nn.Module) -> list[str]:
    network = getattr(model, "network", None)
    if not isinstance(network, WideResNetNetwork) or not isinstance(model, Dense | PathwayModel):
        return []
    raw = isinstance(model, PathwayModel) or network.begins == "imagenet"
    if network.form == Form("released" if raw else "active"):
        return []
    return [
        f"a {'routed' if raw else 'dense'} WRN of that code is wide_resnet(..., released={raw}), with no other form"
    ]


def names_of(network: StagedNetwork, routed: bool) -> Names | None:
    """How their code names the network; None for one that it does not have."""
    if isinstance(network, ResNetNetwork) and len(network.stages) == 4 and not _pads(network):
        return KUANGLIU if network.begins == "cifar" else TORCHVISION
    if isinstance(network, WideResNetNetwork):
        raw = routed or network.begins == "imagenet"
        return WIDE if network.form == Form("released" if raw else "active") else None
    return features(network) if isinstance(network, VGGNetwork) else None


def is_router(router: nn.Module) -> bool:
    """Whether it is their router, a ResNet without parameters in its shortcuts, and nothing about it."""
    return isinstance(router, ResNetNetwork) and len(router.stages) == 3 and _pads(router)


def _pads(network: nn.Module) -> bool:
    return any(isinstance(module, Pad) for module in network.modules())


def features(network: VGGNetwork) -> Names:
    """A VGG's layers by their places in one sequence: convolution, BatchNorm, ReLU, and the poolings."""
    places, place = {"stem": "features.0", "norm": "features.1"}, 3
    for number, stage in enumerate(network.stages):
        for position, block in enumerate(stage.children()):
            if isinstance(block, Pool):
                place += 1
                continue
            places[f"stages.{number}.{position}.conv"] = f"features.{place}"
            places[f"stages.{number}.{position}.norm"] = f"features.{place + 1}"
            place += 3
    return lambda module: places.get(module, module.replace("head.", "classifier."))


def dead_norms(network: StagedNetwork, names: Names) -> list[Counterpart]:
    """The BatchNorms of a released wide ResNet that have no effect: nothing of ours; fresh ones on the way back."""
    out = []
    for name, block in network.named_modules():
        if isinstance(block, Preactivation) and block.norm1 is None:
            at = names(f"{name}.norm1")
            channels = next(layer.in_channels for layer in block.modules() if isinstance(layer, nn.Conv2d))
            leaves = [f"{at}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
            fresh = [torch.ones(channels), torch.zeros(channels), torch.zeros(channels), torch.ones(channels)]
            out.append(Counterpart(tuple(leaves), (), _nothing, partial(_these, fresh), "without effect"))
    return out


def _nothing(_: Sequence[Tensor]) -> Sequence[Tensor]:
    return []


def _these(fresh: list[Tensor], _: Sequence[Tensor]) -> Sequence[Tensor]:
    return fresh


OPTML = Layout(
    "AdvMoE's released code (its .pth.tar files): MoE ResNets, VGG-16 and WRNs, and their dense twins; an MoE WRN "
    "wants released=True",
    "github.com/OPTML-Group/Robust-MoE-CNN at c50796f",
    pairs,
    inputs="raw",
    wants=wants,
)
