"""`AffineMixture`: the description of models with affine experts and experts of kernels, and which layers share a
router.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from robustmoe.models.affine import (
    AffineModel,
    AffineNorm,
    KernelExperts,
    LayerExperts,
    LowRankExperts,
    MergedConv,
    PooledRouter,
)
from robustmoe.models.affine_vit import ATTENTION, HIDDEN, MIXER, AffineViTModel
from robustmoe.models.backbone import Backbone, StagedNetwork
from robustmoe.models.base import ImageShape, ModelSpec, RoutedModel
from robustmoe.models.block import check_experts, replace
from robustmoe.models.convolution import Conv, Norm
from robustmoe.models.norm import Normalise
from robustmoe.models.vit import ViT
from robustmoe.routing import Gate

Routers = Literal["block", "norm", "image"]


@dataclass(frozen=True)
class AffineMixture(ModelSpec):
    """Conditional normalisation: in the blocks of ``backbone`` each BatchNorm's scale and shift are its own plus a
    mixture of ``experts``, each of two numbers a channel; of a vision transformer each LayerNorm's of a block, and the
    numbers of its MLP's hidden layer.

    A router sees what enters its block, averaged to ``pool`` x ``pool`` fields. ``routers``: one a "block"; one for
    each "norm" of it, on the same features; or one for the whole "image", before the first block. ``grid``: a decision
    for each of grid x grid regions of the image, which sees the region's own averages besides. ``gate``: "soft",
    all experts by the softmax; else the ``k`` best: "straight_through" (1/k each, with the softmax's gradient),
    "renormalised", "vmoe" or "hard" (the router gets no gradient). ``temperature``: the router's logits are over it.
    ``stages``: 1 is the first; () are all. Layers of stem and shortcuts, and a last BatchNorm, stay as they are.

    ``kernels``: so many experts of what is added to each convolution's kernels, with routers of their own, one decision
    an image; of that ``rank``, or whole (0). With ``experts`` = 0 they are alone. A transformer takes no ``grid``,
    ``kernels`` or ``stages``, and no router for the whole image.

    Experts are 0 at first, so a dense run of the backbone upcycles exactly (a recipe's ``init``).
    """

    backbone: Backbone | ViT
    experts: int = 64
    k: int = 1
    gate: Gate = "soft"
    pool: int = 2
    routers: Routers = "block"
    temperature: float = 1.0
    stages: tuple[int, ...] = ()
    grid: int = 1
    kernels: int = 0
    rank: int = 0

    def __post_init__(self) -> None:
        for name, least in (("experts", 0), ("kernels", 0), ("rank", 0), ("pool", 1), ("grid", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if not self.experts and not self.kernels:
            raise ValueError("there is no expert; expected experts or kernels above 0")
        for experts in filter(None, (self.experts, self.kernels)):
            check_experts(experts, self.k)
        if self.rank and not self.kernels:
            raise ValueError(f"rank={self.rank} is of kernel experts; expected kernels above 0 with it")
        if self.grid > 1 and not self.experts:
            raise ValueError(f"grid={self.grid} is of affine experts; expected experts above 0 with it")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, and finite; got {self.temperature}")

    def build(self, num_classes: int, image_shape: ImageShape, normalise: Normalise) -> RoutedModel:
        if isinstance(self.backbone, ViT):
            return self._transformer(self.backbone, num_classes, image_shape, normalise)
        network = self.backbone.make(num_classes, image_shape)
        wrong = [number for number in self.stages if not 1 <= number <= len(network.stages)]
        if wrong:
            raise ValueError(f"stages must be between 1 and {len(network.stages)} here; got {wrong[0]}")
        affine: list[LayerExperts] = []
        before: list[list[list[int]]] = [[[] for _ in _blocks(stage)] for stage in network.stages]
        kinds = [(Norm, self._affine)] * (self.experts > 0) + [(Conv, self._merged)] * (self.kernels > 0)
        places = itertools.count()
        for kind, make in kinds:
            for group in self._groups(network, kind):
                before[group.stage][group.block].append(len(affine))
                affine.append(make(network, group, {next(places): layer for layer in group.layers}))
        if not affine:
            raise ValueError("these stages have no such layer (BatchNorm, for kernels convolution); expected others")
        return AffineModel(network, affine, before, normalise)

    def _transformer(
        self, backbone: ViT, num_classes: int, image_shape: ImageShape, normalise: Normalise
    ) -> AffineViTModel:
        named = {"grid": self.grid > 1, "kernels": self.kernels > 0, "stages": self.stages != ()}
        wrong = [name for name, given in {**named, "routers=image": self.routers == "image"}.items() if given]
        if wrong:
            raise ValueError(f"affine experts of a transformer take no {wrong[0]}")
        width, hidden = 2 * backbone.width, 2 * backbone.hidden
        places = {ATTENTION: width, MIXER: width, HIDDEN: hidden}
        groups = [places] if self.routers == "block" else [{place: size} for place, size in places.items()]
        affine = {block: [self._experts(backbone.width, group) for group in groups] for block in range(backbone.depth)}
        return AffineViTModel(backbone.alone(num_classes, image_shape), affine, normalise)

    def _experts(self, channels: int, places: dict[int, int]) -> LayerExperts:
        router = PooledRouter(channels, self.experts, self.pool, self.temperature, self.grid)
        return LayerExperts(router, self.experts, places, self.k, self.gate)

    def _groups(self, network: StagedNetwork, kind: type[nn.Module]) -> list[_Group]:
        """Returns the layers of a kind in groups, each of a router."""
        groups: list[_Group] = []
        for number, stage in enumerate(network.stages):
            for place, block in enumerate(_blocks(stage) if number + 1 in self.stages or not self.stages else ()):
                layers = _layers(block, kind)
                if self.routers == "norm":
                    groups += [_Group(number, place, _inputs(block), [layer]) for layer in layers]
                elif layers and (self.routers == "block" or not groups):
                    groups.append(_Group(number, place, _inputs(block), layers))
                elif layers:
                    groups[-1].layers.extend(layers)
        return groups

    def _affine(self, network: nn.Module, group: _Group, norms: dict[int, nn.Module]) -> LayerExperts:
        """Puts an `AffineNorm` in the place of each, and returns their experts."""
        widths: dict[int, int] = {}
        for place, norm in norms.items():
            assert isinstance(norm, Norm)
            replace(network, norm, AffineNorm(norm.num_features, place))
            widths[place] = 2 * norm.num_features
        return self._experts(group.channels, widths)

    def _merged(self, network: nn.Module, group: _Group, convs: dict[int, nn.Module]) -> LayerExperts:
        """Puts a `MergedConv` in the place of each, and returns their experts."""
        shapes: dict[int, tuple[int, int]] = {}
        for place, conv in convs.items():
            assert isinstance(conv, Conv)
            replace(network, conv, MergedConv(conv, place))
            shapes[place] = (conv.out_channels, conv.weight[0].numel())
        router = PooledRouter(group.channels, self.kernels, self.pool, self.temperature)
        if self.rank:
            return LowRankExperts(router, self.kernels, shapes, self.k, self.gate, self.rank)
        whole = {place: math.prod(shape) for place, shape in shapes.items()}
        return KernelExperts(router, self.kernels, whole, self.k, self.gate)


class _Group(NamedTuple):
    """Layers that share a router, the stage and the block before which it decides, and the channels that it sees."""

    stage: int
    block: int
    channels: int
    layers: list[nn.Module]


def _blocks(stage: nn.Module) -> nn.ModuleList:
    assert isinstance(stage, nn.ModuleList)
    return stage


def _layers(block: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """Returns the layers of a kind in a block, its shortcut's left out."""
    return [
        layer for path, layer in block.named_modules() if isinstance(layer, kind) and "shortcut" not in path.split(".")
    ]


def _inputs(block: nn.Module) -> int:
    """Returns the channels of what enters a block."""
    first = next(module for module in block.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d))
    return first.in_channels if isinstance(first, nn.Conv2d) else first.num_features
