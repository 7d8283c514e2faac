"""Affine experts: conditional normalisation as a mixture of experts. An expert is a scale and a shift for every channel
of some BatchNorms; a router on what enters a residual block mixes or picks them, image by image or region by region.

The family of Xu et al. 2020 (arXiv 2006.00387) and FiLM (Perez et al. 2018), written as a routed model, so that its
gates can be held, pushed and replaced like any other route.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.errors import UserError
from robustmoe.models.backbone import Backbone, StagedNetwork
from robustmoe.models.base import ImageShape, ModelSpec, RoutedModel, to_channels_last
from robustmoe.models.block import check_experts, replace
from robustmoe.models.by_image import averaged, field_means, normed, quick, regions, side
from robustmoe.models.convolution import Handed, Norm
from robustmoe.models.norm import BatchNorm2d, Normalise, full_precision
from robustmoe.models.parts import Fork, Function, Leaf, Part
from robustmoe.routing import Gate, Routing, Tape, choose, chosen_shares, straight_through


class PooledRouter(nn.Module):
    """Router logits of feature maps (n, d, h, w) -> (n, e): averages over ``pool`` x ``pool`` fields, BatchNorm, a
    linear layer, over the ``temperature``; in float32 also under autocast.

    With a ``grid`` above 1 they are of each of grid x grid regions, image by image, row by row (n grid^2, e): beside
    the fields of the image a region's own averages count, by a BatchNorm and a linear layer of their own.
    """

    def __init__(self, channels: int, experts: int, pool: int, temperature: float, grid: int = 1) -> None:
        super().__init__()
        self.pool = pool
        self.temperature = temperature
        self.grid = grid
        self.norm = BatchNorm2d(channels * pool * pool)
        self.head = nn.Linear(channels * pool * pool, experts)
        if grid > 1:
            self.region_norm = BatchNorm2d(channels)
            self.region_head = nn.Linear(channels, experts, bias=False)

    def forward(self, x: Float[Tensor, "n d h w"], fused: bool = False) -> Float[Tensor, "m e"]:
        """``fused``: see `Numbers`."""
        with full_precision(x):
            means = field_means if fused else averaged
            fields = means(x, self.pool)
            logits: Tensor = self.head(self.norm(fields[:, :, None, None]).flatten(1))
            if self.grid > 1:
                own = fields if self.grid == self.pool else means(x, self.grid)
                by_region = self.region_norm(own.unflatten(1, (-1, self.grid, self.grid)))
                logits = (logits[:, None] + self.region_head(by_region.flatten(2).transpose(1, 2))).flatten(0, 1)
            return logits if self.temperature == 1 else logits / self.temperature


@dataclass(frozen=True)
class Numbers(Handed):
    """What is added to the scale and the shift of BatchNorms, image by image or region by region: both (m, d), by the
    norm's place.

    ``fused``: scale, shift and statistics may be put together first, so that a norm takes one pass over its feature
    map; without it each number stands where bounds of it are closest.
    """

    added: Mapping[int, tuple[Float[Tensor, "m d"], Float[Tensor, "m d"]]]
    fused: bool


class AffineNorm(BatchNorm2d):
    """A BatchNorm whose scale and shift are its own and what ``numbers`` adds for each image, or region of it, at its
    ``place``.
    """

    def __init__(self, channels: int, place: int) -> None:
        super().__init__(channels)
        self.place = place

    def forward(self, x: Float[Tensor, "n d h w"], numbers: Handed | None = None) -> Float[Tensor, "n d h w"]:
        """Without ``numbers`` it is the BatchNorm alone."""
        if not isinstance(numbers, Numbers) or x.shape[0] == 0:
            return super().forward(x)
        scale, shift = numbers.added[self.place]
        scale, shift = scale + self.weight, shift + self.bias
        parts = side(x, scale)
        if min(x.shape[2:]) < parts:
            raise UserError(f"a map of {tuple(x.shape[2:])} has no {parts} x {parts} regions; expected a smaller grid")
        divided = x.shape[2] % parts == x.shape[3] % parts == 0
        if numbers.fused and divided and x.dtype.itemsize <= scale.dtype.itemsize and quick(x, scale, shift):
            statistics = self.statistics(x)
            if statistics is not None:
                return normed(x, scale, shift, *statistics, self.eps, self.training)
        if numbers.fused and not self.training and x.dtype == scale.dtype:
            assert self.running_mean is not None
            assert self.running_var is not None
            scale = scale * torch.rsqrt(self.running_var + self.eps)
            shift = torch.addcmul(shift, scale, self.running_mean, value=-1)
        else:
            x = self.unit(x)
        if x.dtype != scale.dtype:
            scale, shift = scale.to(x.dtype), shift.to(x.dtype)
        return torch.addcmul(regions(shift, x), x, regions(scale, x))


class AffineExperts(nn.Module):
    """A router on a feature map, and ``experts`` (e, numbers), one row an expert: for each of the norms at ``places``
    the scales, then the shifts, of its ``widths`` channels. All rows are 0 at first.

    The mixture is times ``gain``, the root of how many experts are in it, so that an expert learns as fast as were it
    alone.
    """

    def __init__(self, router: PooledRouter, experts: int, places: dict[int, int], k: int, gate: Gate) -> None:
        super().__init__()
        self.router = router
        self.places = places
        self.k = k
        self.gate: Gate = gate
        self.gain = math.sqrt(experts if gate == "soft" else k)
        self.experts = nn.Parameter(torch.zeros(experts, 2 * sum(places.values())))

    def decide(self, logits: Float[Tensor, "m e"]) -> Routing:
        """Returns the router's decision, an item a region; straight-through gates have the softmax's gradient."""
        items = logits.view(-1, self.router.grid**2, len(self.experts))
        if self.gate == "straight_through":
            return straight_through(items, self.k, surrogate="softmax")
        return choose(items, self.gate, self.k)

    def mixed(self, routing: Routing) -> Float[Tensor, "m numbers"]:
        """Returns the weighted sum of the experts chosen."""
        index, weight = routing.index.flatten(0, 1).to(self.experts.device), routing.weight.flatten(0, 1)
        if routing.k == len(self.experts):
            return self.shared(torch.zeros_like(weight).scatter_add(1, index, weight))
        with full_precision(weight):
            return torch.bmm(self.gain * weight[:, None].to(self.experts.dtype), self.experts[index])[:, 0]

    def shared(self, weight: Float[Tensor, "m e"]) -> Float[Tensor, "m numbers"]:
        """Returns the sum of all experts, expert by expert times its weight."""
        with full_precision(weight):
            return torch.mm(self.gain * weight.to(self.experts.dtype), self.experts)

    def at(self, numbers: Float[Tensor, "m numbers"]) -> dict[int, tuple[Tensor, Tensor]]:
        """Returns what is added to scale and shift of the norm at every place."""
        parts, start = {}, 0
        for place, width in self.places.items():
            middle, end = start + width, start + 2 * width
            parts[place] = numbers[:, start:middle], numbers[:, middle:end]
            start = end
        return parts


Mix = Callable[[int, AffineExperts, Tensor], Tensor]
"""(number of a router, its experts, its logits) -> the experts' mixture (m, numbers)."""


class AffineModel(RoutedModel):
    """A backbone's network some of whose BatchNorms are `AffineNorm`s; ``affine``: the routers and their experts, in
    the trace as ``affine.I.router``. ``before``: which of them decide on what enters each block, stage by stage.

    Loaded with a dense network's weights a fresh one answers as that network does.
    """

    def __init__(
        self,
        network: StagedNetwork,
        affine: list[AffineExperts],
        before: list[list[list[int]]],
        normalise: Normalise,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.network = network
        self.affine = nn.ModuleList(affine)
        self.before = before

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        if tape.read or tape.forced or any(each.gate != "soft" for each in self._sites()):
            return self._walk(x, lambda i, each, logits: each.mixed(tape(_name(i), each.decide(logits))), fused=True)
        return self._walk(x, lambda _, each, logits: each.shared(torch.softmax(logits, -1)), fused=True)

    def _sites(self) -> Iterator[AffineExperts]:
        for each in self.affine:
            assert isinstance(each, AffineExperts)
            yield each

    def _walk(self, x: Tensor, mix: Mix, fused: bool) -> Tensor:
        """Returns the logits, ``mix`` saying what becomes of each router's."""
        x = self.network.entry(to_channels_last(self.normalise(x)))
        sites = list(self._sites())
        added: dict[int, tuple[Tensor, Tensor]] = {}
        for stage, before in zip(self.network.stages, self.before, strict=True):
            assert isinstance(stage, nn.ModuleList)
            for block, numbers in zip(stage, before, strict=True):
                for number in numbers:
                    experts = sites[number]
                    added = added | experts.at(mix(number, experts, experts.router(x, fused)))
                x = block(x, Numbers(added, fused))
        return self.network.exit(x)

    def parts(self) -> Part:
        """One network whose gates are bounded inside it; with one router that picks one expert, a network an expert."""
        gate, k, experts = self._sites_rule()
        if next(self._sites()).router.grid > 1:
            raise UserError(
                "no certificate knows affine experts by region; expected grid=1; smoothing(...) certifies any model"
            )
        if gate == "soft":
            return Leaf(lambda x: self._walk(x, lambda _, each, z: each.shared(torch.softmax(z, -1)), fused=False))
        if (k > 1 and gate not in EQUAL) or gate == "vmoe":
            raise UserError(
                f"no certificate knows affine experts with gate={gate} and k={k}; expected soft, straight_through or "
                "hard, or k=1 and renormalised; smoothing(...) certifies any model"
            )
        if k == 1 and len(self.affine) == 1:
            branches = tuple(Leaf(self._alone(expert)) for expert in range(experts))
            return Fork(_name(0), self._scores, branches)
        return Leaf(lambda x: self._walk(x, lambda _, each, z: each.shared(chosen_shares(z, k)), fused=False))

    def _sites_rule(self) -> tuple[Gate, int, int]:
        first = next(self._sites())
        return first.gate, first.k, len(first.experts)

    def _scores(self, x: Tensor) -> Tensor:
        """Returns the logits of a router that sees what enters the first block."""
        scores: Tensor = next(self._sites()).router(self.network.entry(self.normalise(x)))
        return scores

    def _alone(self, expert: int) -> Function:
        """Returns the network with one expert's numbers."""

        def row(_: int, each: AffineExperts, logits: Tensor) -> Tensor:
            return each.gain * each.experts[expert : expert + 1]

        def network(x: Tensor) -> Tensor:
            with torch.enable_grad():  # bounds record without gradients, and certified training moves these numbers
                return self._walk(x, row, fused=False)

        return network


EQUAL = ("straight_through", "hard")
"""Gates that weight each expert they choose by 1/k."""


def _name(number: int) -> str:
    return f"affine.{number}.router"


Routers = Literal["block", "norm", "image"]


@dataclass(frozen=True)
class AffineMixture(ModelSpec):
    """Conditional normalisation: in the blocks of ``backbone`` each BatchNorm's scale and shift are its own plus a
    mixture of ``experts``, each of two numbers a channel.

    A router sees what enters its block, averaged to ``pool`` x ``pool`` fields. ``routers``: one a "block"; one for
    each "norm" of it, on the same features; or one for the whole "image", before the first block. ``grid``: a decision
    for each of grid x grid regions of the image, which sees the region's own averages besides. ``gate``: "soft",
    all experts by the softmax; else the ``k`` best: "straight_through" (1/k each, with the softmax's gradient),
    "renormalised", "vmoe" or "hard" (the router gets no gradient). ``temperature``: the router's logits are over it.
    ``stages``: 1 is the first; () are all. BatchNorms of stem, shortcuts and of a last layer stay as they are.

    Experts are 0 at first, so a dense run of the backbone upcycles exactly (a recipe's ``init``).
    """

    backbone: Backbone
    experts: int = 64
    k: int = 1
    gate: Gate = "soft"
    pool: int = 2
    routers: Routers = "block"
    temperature: float = 1.0
    stages: tuple[int, ...] = ()
    grid: int = 1

    def __post_init__(self) -> None:
        check_experts(self.experts, self.k)
        for name in ("pool", "grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, and finite; got {self.temperature}")

    def build(self, num_classes: int, image_shape: ImageShape, normalise: Normalise) -> RoutedModel:
        network = self.backbone.make(num_classes, image_shape)
        wrong = [number for number in self.stages if not 1 <= number <= len(network.stages)]
        if wrong:
            raise ValueError(f"stages must be between 1 and {len(network.stages)} here; got {wrong[0]}")
        groups, before = self._groups(network)
        if not groups:
            raise ValueError("these stages have no BatchNorm; expected others")
        affine = [self._experts(channels, norms) for channels, norms in groups]
        return AffineModel(network, affine, before, normalise)

    def _groups(self, network: StagedNetwork) -> tuple[list[tuple[int, dict[int, int]]], list[list[list[int]]]]:
        """Puts an `AffineNorm` in the place of every BatchNorm chosen. Returns of each router the channels that it sees
        and the widths of its norms by place, and which routers stand before each block.
        """
        groups: list[tuple[int, dict[int, int]]] = []
        before: list[list[list[int]]] = []
        for position, stage in enumerate(network.stages, 1):
            before.append([])
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                start = len(groups)
                for norm in _norms(block) if position in self.stages or not self.stages else []:
                    place = sum(len(norms) for _, norms in groups)
                    replace(network, norm, AffineNorm(norm.num_features, place))
                    if self.routers == "norm" or len(groups) == (0 if self.routers == "image" else start):
                        groups.append((_inputs(block), {}))
                    groups[-1][1][place] = norm.num_features
                before[-1].append(list(range(start, len(groups))))
        return groups, before

    def _experts(self, channels: int, norms: dict[int, int]) -> AffineExperts:
        router = PooledRouter(channels, self.experts, self.pool, self.temperature, self.grid)
        return AffineExperts(router, self.experts, norms, self.k, self.gate)


def _norms(block: nn.Module) -> list[Norm]:
    """Returns the BatchNorms of a block, its shortcut's left out."""
    return [
        norm for path, norm in block.named_modules() if isinstance(norm, Norm) and "shortcut" not in path.split(".")
    ]


def _inputs(block: nn.Module) -> int:
    """Returns the channels of what enters a block."""
    first = next(module for module in block.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d))
    return first.in_channels if isinstance(first, nn.Conv2d) else first.num_features
