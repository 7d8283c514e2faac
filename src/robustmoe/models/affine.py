"""Experts that are numbers of a network's own layers. An affine expert is a scale and a shift for every channel of some
BatchNorms (conditional normalisation); a kernel expert is what is added to the kernels of some convolutions. A router
on what enters a residual block mixes or picks them, image by image, affine ones also region by region.

The families of Xu et al. 2020 (arXiv 2006.00387) and FiLM (Perez et al. 2018), and of CondConv (Yang et al. 2019, arXiv
1904.04971) and SMEAR (Muqeeth et al. 2023, arXiv 2306.03745), written as a routed model, so that its gates can be held,
pushed and replaced like any other route.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.errors import UserError
from robustmoe.models.backbone import StagedNetwork
from robustmoe.models.base import RoutedModel, to_channels_last
from robustmoe.models.by_image import averaged, field_means, normed, quick, regions, side
from robustmoe.models.convolution import Conv, Handed
from robustmoe.models.norm import BatchNorm2d, Normalise, at_least_float32, full_precision
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

    def forward(
        self, x: Float[Tensor, "n d h w"], known: dict[int, Tensor] | None = None, fused: bool = False
    ) -> Float[Tensor, "m e"]:
        """``known``: averages of this x that another router took, by fields a side; what is taken here joins them.
        ``fused``: see `Numbers`.
        """
        known = {} if known is None else known
        with full_precision(x):
            for side in {self.pool, self.pool if self.grid == 1 else self.grid} - set(known):
                known[side] = (field_means if fused else averaged)(x, side)
            logits: Tensor = self.head(self.norm(known[self.pool][:, :, None, None]).flatten(1))
            if self.grid > 1:
                by_region = self.region_norm(known[self.grid].unflatten(1, (-1, self.grid, self.grid)))
                logits = (logits[:, None] + self.region_head(by_region.flatten(2).transpose(1, 2))).flatten(0, 1)
            return logits if self.temperature == 1 else logits / self.temperature

    def region_by_region(self, x: Float[Tensor, "n d h w"]) -> list[Float[Tensor, "n e"]]:
        """Returns the same logits as one tensor a region, each of an image by itself, as bounds take them."""
        if self.grid == 1:
            return [self(x)]
        whole = self.head(self.norm(averaged(x, self.pool)[:, :, None, None]).flatten(1))
        own = self.region_norm(averaged(x, self.grid).unflatten(1, (-1, self.grid, self.grid)))
        places = itertools.product(range(self.grid), repeat=2)
        return [(whole + self.region_head(own[:, :, i, j])) / self.temperature for i, j in places]


@dataclass(frozen=True)
class Numbers(Handed):
    """What is added to the numbers of layers, by a layer's place: (m, numbers), image by image or region by region.

    ``fused``: scale, shift and statistics may be put together first, so that a norm takes one pass over its feature
    map; without it each number stands where bounds of it are closest, and those of regions are (n, numbers, g, g).
    """

    added: Mapping[int, Float[Tensor, "m numbers *grid"]]
    fused: bool
    apart: Mapping[int, tuple[Float[Tensor, "n e"], Float[Tensor, "e _"]]] = field(default_factory=dict)
    """Without ``fused``, of kernels: the weight of each expert, and its own."""


FEW = 2**16
"""Values of a map below which torch's own operations take less time than a pass made for large maps."""


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
        added = numbers.added[self.place]
        if added.ndim == 4:
            return self._by_map(x, added)
        scale, shift = added[:, : self.num_features] + self.weight, added[:, self.num_features :] + self.bias
        parts = side(x, scale)
        if min(x.shape[2:]) < parts:
            raise UserError(f"a map of {tuple(x.shape[2:])} has no {parts} x {parts} regions; expected a smaller grid")
        divided = x.shape[2] % parts == x.shape[3] % parts == 0
        many = self.training or x.numel() >= FEW
        if numbers.fused and many and divided and x.dtype.itemsize <= scale.dtype.itemsize and quick(x, scale, shift):
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

    def _by_map(self, x: Float[Tensor, "n d h w"], added: Float[Tensor, "n numbers g g"]) -> Float[Tensor, "n d h w"]:
        """Returns the same with scales and shifts that are maps, by operations that bounds know."""
        with torch.enable_grad():  # bounds record without gradients, and certified training moves these numbers
            weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        scale, shift = added[:, : self.num_features] + weight, added[:, self.num_features :] + bias
        return torch.addcmul(F.interpolate(shift, x.shape[2:]), self.unit(x), F.interpolate(scale, x.shape[2:]))


class MergedConv(Conv):
    """A convolution whose kernels are its own plus what ``numbers`` adds for each image, at its ``place``: each image
    has kernels of its own, so a batch is one grouped convolution, in float32 also under autocast.
    """

    def __init__(self, conv: Conv, place: int) -> None:
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.same)
        self.weight = conv.weight
        self.place = place

    def forward(self, x: Float[Tensor, "n d h w"], numbers: Handed | None = None) -> Tensor:
        """Without ``numbers`` it is the convolution alone."""
        if not isinstance(numbers, Numbers) or x.shape[0] == 0:
            return super().forward(x)
        if not numbers.fused:
            return super().forward(x) + self._expert_by_expert(x, *numbers.apart[self.place])
        kernels = self.weight + numbers.added[self.place].view(-1, *self.weight.shape)
        if len(kernels) == 1:
            return self.convolved(x, kernels[0])
        with full_precision(x):
            groups = at_least_float32(x).reshape(1, -1, *x.shape[2:])
            out = self.convolved(groups, kernels.flatten(0, 1), groups=len(x))
        return to_channels_last(out.view(len(x), -1, *out.shape[2:])).to(x.dtype)

    def _expert_by_expert(self, x: Tensor, weight: Float[Tensor, "n e"], rows: Float[Tensor, "e numbers"]) -> Tensor:
        """Returns the sum of the experts' convolutions, each times its weight, by operations that bounds know."""
        with torch.enable_grad():
            kernels = rows.reshape(-1, *self.weight.shape[1:])
        each = self.convolved(x, kernels).unflatten(1, (len(rows), -1))
        return (each * weight[:, :, None, None, None]).sum(1)


class LayerExperts(nn.Module):
    """A router on a feature map and the ``experts`` (e, numbers) that it mixes, one row an expert: at each of
    ``places`` so many numbers as it says. All are 0 at first.

    The mixture is times ``gain``, the root of how many experts are in it, so that an expert learns as fast as were it
    alone.
    """

    kernels = False
    """Whether these are numbers of convolutions."""

    def __init__(self, router: PooledRouter, experts: int, places: dict[int, int], k: int, gate: Gate) -> None:
        super().__init__()
        self.router = router
        self.places = places
        self.k = k
        self.gate: Gate = gate
        self.gain = math.sqrt(experts if gate == "soft" else k)
        self.experts = nn.Parameter(torch.zeros(experts, sum(places.values())))

    def rows(self) -> Float[Tensor, "e numbers"]:
        """Returns the numbers of each expert."""
        return self.experts

    def decide(self, logits: Float[Tensor, "m e"]) -> Routing:
        """Returns the router's decision, an item a region; straight-through gates have the softmax's gradient."""
        items = logits.view(-1, self.router.grid**2, logits.shape[-1])
        if self.gate == "straight_through":
            return straight_through(items, self.k, surrogate="softmax")
        return choose(items, self.gate, self.k)

    def mixed(self, routing: Routing) -> Float[Tensor, "m numbers"]:
        """Returns the weighted sum of the experts chosen."""
        index, weight = routing.index.flatten(0, 1).to(self.experts.device), routing.weight.flatten(0, 1)
        if routing.k == len(self.experts):
            return self.shared(torch.zeros_like(weight).scatter_add(1, index, weight))
        with full_precision(weight):
            rows = self.rows()
            return torch.bmm(self.gain * weight[:, None].to(rows.dtype), rows[index])[:, 0]

    def shared(self, weight: Float[Tensor, "m e"]) -> Float[Tensor, "m numbers"]:
        """Returns the sum of all experts, expert by expert times its weight."""
        with full_precision(weight):
            rows = self.rows()
            return torch.mm(self.gain * weight.to(rows.dtype), rows)

    def at(self, numbers: Float[Tensor, "m numbers *grid"]) -> dict[int, Tensor]:
        """Returns what is added at every place."""
        parts, start = {}, 0
        for place, width in self.places.items():
            parts[place] = numbers[:, start : start + width]
            start += width
        return parts


class KernelExperts(LayerExperts):
    """Experts of what is added to kernels."""

    kernels = True


class LowRankExperts(KernelExperts):
    """Experts whose kernels (f, d kh kw), ``shapes`` by place, are products of ``experts`` (e, sum of f x rank), 0 at
    first, and ``factors`` (e, sum of rank x d kh kw).
    """

    def __init__(
        self, router: PooledRouter, experts: int, shapes: dict[int, tuple[int, int]], k: int, gate: Gate, rank: int
    ) -> None:
        super().__init__(router, experts, {place: filters * rank for place, (filters, _) in shapes.items()}, k, gate)
        self.places = {place: math.prod(shape) for place, shape in shapes.items()}
        self.shapes = shapes
        self.rank = rank
        factors = [torch.randn(experts, rank * inputs) / inputs**0.5 for _, inputs in shapes.values()]
        self.factors = nn.Parameter(torch.cat(factors, 1))

    def rows(self) -> Float[Tensor, "e numbers"]:
        left = self.experts.split([self.rank * filters for filters, _ in self.shapes.values()], 1)
        right = self.factors.split([self.rank * inputs for _, inputs in self.shapes.values()], 1)
        pairs = [(a.unflatten(1, (-1, self.rank)), b.unflatten(1, (self.rank, -1))) for a, b in zip(left, right)]
        return torch.cat([torch.bmm(a, b).flatten(1) for a, b in pairs], 1)


Mix = Callable[[int, LayerExperts, Tensor], Tensor]
"""(number of a router, its experts, its logits) -> the experts' mixture (m, numbers), or their weights (m, e)."""


class AffineModel(RoutedModel):
    """A backbone's network some of whose layers are `AffineNorm`s or `MergedConv`s; ``affine``: the routers and their
    experts, in the trace as ``affine.I.router``. ``before``: which of them decide on what enters each block, stage by
    stage.

    Loaded with a dense network's weights a fresh one answers as that network does.
    """

    def __init__(
        self,
        network: StagedNetwork,
        affine: list[LayerExperts],
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
            return self._mixed(x, lambda i, each, logits: each.mixed(tape(_name(i), each.decide(logits))))
        return self._mixed(x, lambda _, each, logits: each.shared(torch.softmax(logits, -1)))

    def _sites(self) -> Iterator[LayerExperts]:
        for each in self.affine:
            assert isinstance(each, LayerExperts)
            yield each

    def _mixed(self, x: Tensor, mix: Mix) -> Tensor:
        """Returns the logits, ``mix`` making the mixture of each router's."""
        added: dict[int, Tensor] = {}

        def numbers(before: list[int], x: Tensor) -> Numbers:
            known: dict[int, Tensor] = {}
            for number in before:
                experts = self.affine[number]
                assert isinstance(experts, LayerExperts)
                added.update(experts.at(mix(number, experts, experts.router(x, known, fused=True))))
            return Numbers(added, fused=True)

        return self._walk(x, numbers)

    def _apart(self, x: Tensor, weigh: Mix) -> Tensor:
        """Returns the same by operations that bounds know, ``weigh`` giving the experts' weights."""
        added: dict[int, Tensor] = {}
        apart: dict[int, tuple[Tensor, Tensor]] = {}

        def numbers(before: list[int], x: Tensor) -> Numbers:
            for number in before:
                experts = self.affine[number]
                assert isinstance(experts, LayerExperts)
                weights = [weigh(number, experts, logits) for logits in experts.router.region_by_region(x)]
                if experts.kernels:
                    (weight,) = weights
                    with torch.enable_grad():
                        rows = experts.at(experts.rows())
                    apart.update({place: (weight * experts.gain, own) for place, own in rows.items()})
                else:
                    each = [experts.shared(weight) for weight in weights]
                    added.update(experts.at(each[0] if len(each) == 1 else _as_map(each, experts.router.grid)))
            return Numbers(added, fused=False, apart=apart)

        return self._walk(x, numbers)

    def _walk(self, x: Tensor, numbers: Callable[[list[int], Tensor], Numbers]) -> Tensor:
        """Returns the logits; ``numbers`` are asked of the routers before each block, on what enters it."""
        x = self.network.entry(to_channels_last(self.normalise(x)))
        for stage, before in zip(self.network.stages, self.before, strict=True):
            assert isinstance(stage, nn.ModuleList)
            for block, routers in zip(stage, before, strict=True):
                x = block(x, numbers(routers, x))
        return self.network.exit(x)

    def parts(self) -> Part:
        """One network whose gates are bounded inside it; with one router that picks one expert, a network an expert."""
        gate, k, experts = self._sites_rule()
        if gate == "soft":
            return Leaf(lambda x: self._apart(x, lambda _, each, z: torch.softmax(z, -1)))
        if (k > 1 and gate not in EQUAL) or gate == "vmoe":
            raise UserError(
                f"no certificate knows affine experts with gate={gate} and k={k}; expected soft, straight_through or "
                "hard, or k=1 and renormalised; smoothing(...) certifies any model"
            )
        if k == 1 and len(self.affine) == 1 and next(self._sites()).router.grid == 1:
            branches = tuple(Leaf(self._alone(expert)) for expert in range(experts))
            return Fork(_name(0), self._scores, branches)
        return Leaf(lambda x: self._apart(x, lambda _, each, z: chosen_shares(z, k)))

    def _sites_rule(self) -> tuple[Gate, int, int]:
        first = next(self._sites())
        return first.gate, first.k, len(first.experts)

    def _scores(self, x: Tensor) -> Tensor:
        """Returns the logits of a router that sees what enters the first block."""
        scores: Tensor = next(self._sites()).router(self.network.entry(self.normalise(x)))
        return scores

    def _alone(self, expert: int) -> Function:
        """Returns the network with one expert's numbers."""

        def alone(_: int, each: LayerExperts, logits: Tensor) -> Tensor:
            return torch.eye(len(each.experts)).to(each.experts)[expert : expert + 1]

        def network(x: Tensor) -> Tensor:
            with torch.enable_grad():  # bounds record without gradients, and certified training moves these numbers
                return self._apart(x, alone)

        return network


def _as_map(each: list[Tensor], grid: int) -> Float[Tensor, "n numbers g g"]:
    """Returns the numbers of each region, row by row, as a map of them."""
    return torch.cat([numbers[:, :, None] for numbers in each], 2).unflatten(2, (grid, grid))


EQUAL = ("straight_through", "hard")
"""Gates that weight each expert they choose by 1/k."""


def _name(number: int) -> str:
    return f"affine.{number}.router"
