"""Sparse vision transformers: some blocks' MLPs become experts, and a router sends every token, the class token too, to
some of them (V-MoE, Riquelme et al., NeurIPS 2021; expert choice, Zhou et al. 2022; Soft MoE, Puigcerver et al. 2024).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from robustmoe.models.base import ImageShape, ModelSpec, RoutedModel, to_channels_last
from robustmoe.models.block import check_experts
from robustmoe.models.ensemble import Gate, select
from robustmoe.models.norm import Normalise, at_least_float32, full_precision
from robustmoe.models.tokens import (
    Dispatch,
    TokenExperts,
    capacity,
    experts_choose,
    within_capacity,
)
from robustmoe.models.vit import SIZES, Block, Size, ViT, ViTNetwork
from robustmoe.routing import Gating, Routing, Tape, noisy_top_k, soft

Choice = Literal["token", "expert", "slots"]
Order = Literal["vanilla", "priority"]


class TokenRouter(nn.Linear):
    """Router logits of tokens, without a bias, in float32 also under autocast."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__(width, experts, bias=False)
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t e"]:
        with full_precision(x):
            return F.linear(at_least_float32(x), at_least_float32(self.weight))


class SlotRouter(nn.Module):
    """Soft MoE's logits of tokens and slots: ``scale`` times the cosine of token and slot parameters."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.randn(width, slots) * width**-0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t s"]:
        with full_precision(x):
            return at_least_float32(self.scale) * torch.matmul(
                _unit(at_least_float32(x), -1), _unit(at_least_float32(self.mu), 0)
            )


def _unit(x: Tensor, dim: int) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + 1e-6)


@dataclass(frozen=True)
class Rule:
    """How a layer's router logits become a decision; the fields are `ViTMoE`'s."""

    k: int
    gating: Gate
    noise: bool
    choice: Choice
    room: float | None
    order: Order
    group: int
    multiple: int

    def __call__(self, logits: Float[Tensor, "n t e"], tape: Tape, name: str) -> Routing:
        """The router's own decision."""
        draws = tape.draws(name)
        if self.choice == "expert":
            return self._of_experts(logits)
        if self.noise and draws is not None and self.gating in ("vmoe", "renormalised", "hard"):
            gating: Gating = self.gating
            items, experts = logits.shape[1:]
            free = noisy_top_k(logits, draws.normal(items, experts).to(logits) / experts, self.k, gating)
        else:
            free = select(logits, self.gating, self.k)
        return free if self.room is None else self._with_room(free)

    def _with_room(self, free: Routing) -> Routing:
        logits = free.logits if free.noisy is None else free.noisy
        best = torch.softmax(logits.detach(), -1).amax(-1) if self.order == "priority" else None
        kept = []
        for rows in torch.arange(len(logits), device=logits.device).split(self.group):
            index = free.index[rows].flatten(0, 1)
            room = capacity(len(index), free.num_experts, free.k, self.room or 0.0, self.multiple)
            first = None if best is None else best[rows].flatten()
            kept.append(within_capacity(index, first, free.num_experts, room).view(len(rows), *free.index.shape[1:]))
        return replace(free, weight=free.weight * torch.cat(kept))

    def _of_experts(self, logits: Float[Tensor, "n t e"]) -> Routing:
        p = torch.softmax(logits, -1)
        kept = []
        for one in p.detach().split(self.group):
            room = capacity(one.shape[0] * one.shape[1], one.shape[2], 1, self.room or 1.0, self.multiple)
            kept.append(experts_choose(one.flatten(0, 1), room).view_as(one))
        weight = p * torch.cat(kept)
        if self.gating == "renormalised":
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        ranked = torch.argsort(logits, dim=-1, descending=True, stable=True)
        return Routing(logits, ranked, weight.gather(-1, ranked))


class TokenMoE(nn.Module):
    """In the place of a block's MLP: every token goes to the experts that are chosen for it."""

    def __init__(self, router: TokenRouter, experts: TokenExperts, rule: Rule, dispatch: Dispatch) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.rule = rule
        self.dispatch: Dispatch = dispatch

    def forward(self, x: Float[Tensor, "n t d"], tape: Tape) -> Float[Tensor, "n t d"]:
        routing = tape("router", self.rule(self.router(x), tape, "router"))
        index, weight = routing.index.flatten(0, 1), routing.weight.flatten(0, 1)
        return self.experts(x.flatten(0, 1), index, weight, self._kept(weight), self.dispatch).view_as(x)

    def _kept(self, weight: Float[Tensor, "m k"]) -> Bool[Tensor, "m k"] | None:
        """Which pairs run; None: all. On the meta device, where costs are counted without values, no token is dropped,
        and every expert that chooses takes the first ones.
        """
        rule = self.rule
        if rule.choice == "token":
            return None if rule.room is None or weight.is_meta else weight != 0
        if not weight.is_meta:
            return weight != 0
        items, experts = weight.shape
        room = capacity(items, experts, 1, rule.room or 1.0, rule.multiple)
        return (torch.arange(items, device="cpu") < room)[:, None].expand(items, experts)


class SlotMoE(nn.Module):
    """Soft MoE in the place of a block's MLP: each slot is a mean of the image's tokens, each expert works on its
    slots, each token gets a mean of the answers.

    In the trace, item t's weight of expert e is the sum over e's slots of what it takes of their answers.
    """

    def __init__(self, router: SlotRouter, experts: TokenExperts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def forward(self, x: Float[Tensor, "n t d"], tape: Tape) -> Float[Tensor, "n t d"]:
        slots = self.router(x)
        experts = (self.experts.num, slots.shape[-1] // self.experts.num)
        fresh = soft(torch.logsumexp(slots.unflatten(-1, experts), -1))
        routing = tape("router", replace(fresh, slots=slots))
        used = slots if routing.slots is None else routing.slots
        weight = torch.zeros_like(routing.logits).scatter_add(-1, routing.index, routing.weight)
        combine = (weight[..., None] * torch.softmax(used.unflatten(-1, experts), -1)).flatten(2)
        given = torch.einsum("nts,ntd->snd", torch.softmax(used, 1).to(x.dtype), x)
        answers = self.experts.apart(given.unflatten(0, experts).flatten(1, 2))
        answers = answers.unflatten(1, (experts[1], len(x))).flatten(0, 1)
        return torch.einsum("nts,snd->ntd", combine.to(answers.dtype), answers)


class ViTMoEModel(RoutedModel):
    """A `ViTNetwork` some of whose blocks have a `TokenMoE` or `SlotMoE` for an MLP; one router each, in the trace as
    ``network.blocks.I.mlp.router``.
    """

    def __init__(self, network: ViTNetwork, normalise: nn.Module) -> None:
        super().__init__()
        self.normalise = normalise
        self.network = network

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        network = self.network
        tokens = network.tokens(to_channels_last(self.normalise(x)))
        for number, block in enumerate(network.blocks):
            assert isinstance(block, Block)
            tokens = tokens + block.attn(block.norm1(tokens))
            given = block.norm2(tokens)
            routed = isinstance(block.mlp, TokenMoE | SlotMoE)
            inner = (tape.under(f"network.blocks.{number}.mlp"),) if routed else ()
            tokens = tokens + block.mlp(given, *inner)
        return network.classify(tokens)

    def layers(self) -> dict[str, TokenMoE | SlotMoE]:
        """The routed layers, by the names of their routers."""
        found = ((f"network.blocks.{i}.mlp.router", block.mlp) for i, block in enumerate(self.network.blocks))
        return {name: mlp for name, mlp in found if isinstance(mlp, TokenMoE | SlotMoE)}


@dataclass(frozen=True)
class ViTMoE(ModelSpec):
    """A vision transformer of which some blocks have ``experts`` MLPs and a router on their tokens.

    ``size``: of the dense model (see `SIZES`); ``width``, ``depth``, ``heads`` and ``mlp_ratio`` replace its numbers.
    ``placement``: "every_2", blocks 1, 3, 5 and so on (counted from 0); "last_N", the last N of these; or numbers of
    blocks, such as (2, 5). ``choice``: "token", each token takes its ``k`` best experts; "expert", each expert takes
    its best tokens (tokens * capacity / experts of them, capacity being 1 by default); "slots", Soft MoE, with
    ``slots`` an expert.

    ``gating``, of token choice: what the chosen are weighted by (see `robustmoe.routing`): "vmoe", softmax over all
    experts, not renormalised; "renormalised"; "soft", all experts; "hard"; "straight_through". Expert choice takes
    "vmoe" or "renormalised". ``noise``: in training, normal noise of deviation 1 / experts on the logits (token choice
    by "vmoe", "renormalised" and "hard"; the others have none).

    ``capacity``: none, no token is dropped; else an expert has room for ceil(tokens * k * capacity / experts) of a
    group's tokens, rounded up to a multiple of ``multiple``; the rest skip the layer. ``order``: who comes first, see
    `within_capacity`. ``group``: images that share the room, 1 by default; above it an image's answer depends on its
    batch mates (V-MoE: 4 to 8), which evaluation's checks report. ``equal_experts``: all start equal, as in V-MoE
    (with renormalised gates the router then gets no gradient at first). ``dispatch``: see `TokenExperts`; it changes
    the speed only.
    """

    size: Size = "small"
    patch: int = 16
    experts: int = 8
    k: int = 2
    placement: str | tuple[int, ...] = "last_2"
    gating: Gate = "vmoe"
    choice: Choice = "token"
    noise: bool = True
    capacity: float | None = None
    order: Order = "vanilla"
    group: int = 1
    multiple: int = 1
    slots: int = 1
    equal_experts: bool = False
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    dispatch: Dispatch = "auto"

    def __post_init__(self) -> None:
        check_experts(self.experts, self.k)
        for name in ("group", "multiple", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.capacity is not None and not self.capacity > 0:
            raise ValueError(f"capacity must be above 0, or none; got {self.capacity}")
        if self.choice == "expert" and self.gating not in ("vmoe", "renormalised"):
            raise ValueError(f"choice=expert takes gating=vmoe or gating=renormalised; got {self.gating!r}")
        if self.choice == "slots" and self.capacity is not None:
            raise ValueError("choice=slots drops no token; expected no capacity")
        self.places()

    @property
    def backbone(self) -> ViT:
        """The dense model of the same blocks: its twin at equal depth and width."""
        own = {name: getattr(self, name) for name in ("width", "depth", "heads", "mlp_ratio")}
        given = {name: value for name, value in own.items() if value is not None}
        return replace(SIZES[self.size], patch=self.patch, **given)

    def places(self) -> tuple[int, ...]:
        """The numbers of the routed blocks."""
        depth = self.backbone.depth
        if isinstance(self.placement, tuple):
            wrong = [number for number in self.placement if not 0 <= number < depth]
            if wrong or not self.placement:
                raise ValueError(f"placement must name blocks from 0 to {depth - 1}; got {self.placement}")
            return tuple(sorted(set(self.placement)))
        odd = tuple(range(1, depth, 2))
        last = re.fullmatch(r"last_(\d+)", self.placement)
        if last and 1 <= int(last[1]) <= len(odd):
            return odd[-int(last[1]) :]
        if self.placement == "every_2" and odd:
            return odd
        raise ValueError(
            f"placement must be every_2, last_N with N from 1 to {len(odd)} (of {depth} blocks), or numbers of blocks "
            f"such as (1, 3); got {self.placement!r}"
        )

    def build(self, num_classes: int, image_shape: ImageShape, normalise: Normalise) -> RoutedModel:
        backbone = self.backbone
        network = backbone.network(num_classes, image_shape)
        for number in self.places():
            network.blocks[number].mlp = self._layer(backbone.width, backbone.hidden)
        return ViTMoEModel(network, normalise)

    def _layer(self, width: int, hidden: int) -> nn.Module:
        experts = TokenExperts(self.experts, width, hidden, self.equal_experts)
        if self.choice == "slots":
            return SlotMoE(SlotRouter(width, self.experts * self.slots), experts)
        k = self.experts if self.gating == "soft" else self.k
        rule = Rule(k, self.gating, self.noise, self.choice, self.capacity, self.order, self.group, self.multiple)
        return TokenMoE(TokenRouter(width, self.experts), experts, rule, self.dispatch)
