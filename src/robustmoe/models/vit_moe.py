"""Sparse vision transformers: some blocks' MLPs become experts, and a router sends every token, the class token too, to
some of them (V-MoE, Riquelme et al., NeurIPS 2021; expert choice, Zhou et al. 2022; Soft MoE, Puigcerver et al. 2024).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.errors import UserError
from robustmoe.models.base import ImageShape, ModelSpec, NetworkModel, RoutedModel, to_channels_last
from robustmoe.models.block import check_experts
from robustmoe.models.norm import Normalise, at_least_float32
from robustmoe.models.parts import Leaf, Part
from robustmoe.models.token_layers import (
    Choice,
    Members,
    Order,
    Rule,
    SlotMoE,
    SlotRouter,
    TokenLayer,
    TokenMoE,
    TokenRouter,
)
from robustmoe.models.tokens import Dispatch, TokenExperts
from robustmoe.models.transport import Plan
from robustmoe.models.vit import SIZES, Classifier, HeadStart, Positions, Size, ViT, ViTNetwork, check_dropout
from robustmoe.models.vit_parts import Gelu
from robustmoe.routing import Gate, Tape


class ViTMoEModel(NetworkModel):
    """A `ViTNetwork` some of whose blocks have a `TokenLayer` for an MLP; one router each, in the trace as
    ``network.blocks.I.mlp.router``. With ``members`` above 1 each such block has `Members`, a router each, as
    ``network.blocks.I.mlp.members.J.router``, and the answer is the log of the members' mean probability.
    """

    network: ViTNetwork

    def __init__(self, network: ViTNetwork, normalise: nn.Module, members: int = 1) -> None:
        super().__init__(network, normalise)
        self.members = members

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        logits = self.network(to_channels_last(self.normalise(x)), tape.under("network"))
        if self.members == 1:
            return logits
        each = torch.log_softmax(at_least_float32(logits).unflatten(0, (len(x), self.members)), 2)
        return torch.logsumexp(each, 1) - math.log(self.members)

    def parts(self) -> Part:
        """One network, whose routers are bounded inside it, token by token."""
        if self.members > 1:
            raise UserError(
                f"no certificate knows a vit_moe of {self.members} members; expected members=1; smoothing(...) "
                "certifies any model"
            )
        return Leaf(lambda x: self.network(to_channels_last(self.normalise(x)), Tape(read=False, openly=True)))


@dataclass(frozen=True)
class ViTMoE(ModelSpec):
    """A vision transformer of which some blocks have ``experts`` MLPs and a router on their tokens (V-MoE, Riquelme et
    al. 2021).

    ``size``: of the dense model (see `SIZES`); ``width``, ``depth``, ``heads`` and ``mlp_ratio`` replace its numbers,
    and ``gelu`` (of the experts too), ``classifier``, ``pre_logits``, ``positions``, ``qk_norm``, ``dropout`` and
    ``head_start`` are `ViT`'s. ``expert_dropout``: that of the experts, where it is another (V-MoE from scratch: 0.2,
    and 0 elsewhere).
    ``placement``: "every_2", blocks 1, 3, 5 and so on (counted from 0); "last_N", the last N of these; or numbers of
    blocks, such as (2, 5). ``choice``: "token", each token takes its ``k`` best experts; "expert", each expert takes
    its best tokens (tokens * capacity / experts of them, capacity being 1 by default); "slots", Soft MoE, with
    ``slots`` an expert.

    ``gating``, of token choice: what the chosen are weighted by (see `robustmoe.routing`): "vmoe", softmax over all
    experts, not renormalised; "renormalised"; "soft", all experts; "hard"; "straight_through". Expert choice takes
    "vmoe" or "renormalised". ``noise``: in training, normal noise of deviation 1 / experts on the logits (token choice
    by "vmoe", "renormalised" and "hard"; the others have none).

    ``plan``: whom tokens go to by a balanced plan of the group's tokens and experts, weighted by the softmax all the
    same (see `robustmoe.models.transport`): "sinkhorn", "sparse"; without noise where it is sparse or experts choose.

    ``members``: above 1 a partly shared ensemble (E3, Allingham et al. 2022): from the first routed block on each image
    goes through every member, which has its own router and experts / members of the experts; k is a member's. The
    answer is the log of the mean of the members' probabilities. (Their code trains on each member's own loss; here it
    is the loss of the answer.)

    ``capacity``: none, no token is dropped; else an expert has room for ceil(tokens * k * capacity / experts) of a
    group's tokens, rounded up to a multiple of ``multiple``; the rest skip the layer. ``eval_capacity``: that of every
    pass in eval mode, attacks' too, where it is another (V-MoE: 1.05, then 4; from experts / k on no token is dropped).
    ``order``: who comes first, see `within_capacity`. ``group``: images that share the room, 1 by default; above it an
    image's answer depends on its batch mates (V-MoE: 4 to 8), which evaluation's checks report. ``equal_experts``: all
    start equal, as in V-MoE (with renormalised gates the router then gets no gradient at first). ``dispatch``: see
    `TokenExperts`; it changes the speed only.
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
    eval_capacity: float | None = None
    gelu: Gelu = "exact"
    classifier: Classifier = "token"
    pre_logits: int | None = None
    positions: Positions = "learned"
    qk_norm: bool = False
    dropout: float = 0.0
    expert_dropout: float | None = None
    head_start: HeadStart = "timm"
    members: int = 1
    plan: Plan = "none"

    def __post_init__(self) -> None:
        for name in ("group", "multiple", "slots", "members"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.experts % self.members:
            raise ValueError(f"experts must be a multiple of members, {self.members}; got {self.experts}")
        check_experts(self.experts // self.members, self.k)
        for name in ("capacity", "eval_capacity"):
            room = getattr(self, name)
            if room is not None and not room > 0:
                raise ValueError(f"{name} must be above 0, or none; got {room}")
            if room is not None and self.choice == "slots":
                raise ValueError(f"choice=slots drops no token; expected no {name}")
        given = f"choice={self.choice}" if self.choice == "expert" else f"plan={self.plan}"
        if given != "plan=none" and self.gating not in ("vmoe", "renormalised"):
            raise ValueError(f"{given} takes gating=vmoe or gating=renormalised; got {self.gating!r}")
        if self.plan != "none" and (self.choice == "slots" or self.order != "vanilla"):
            raise ValueError(f"plan={self.plan} takes choice=token or choice=expert, and order=vanilla")
        check_dropout("expert_dropout", self.expert_dropout or 0.0)
        self.places()

    @property
    def backbone(self) -> ViT:
        """The dense model of the same blocks: its twin at equal depth and width."""
        own = {name: getattr(self, name) for name in ("width", "depth", "heads", "mlp_ratio")}
        given = {name: value for name, value in own.items() if value is not None}
        shared = ("patch", "gelu", "classifier", "pre_logits", "positions", "qk_norm", "dropout", "head_start")
        return replace(SIZES[self.size], **given, **{name: getattr(self, name) for name in shared})

    def places(self) -> tuple[int, ...]:
        """Returns the numbers of the routed blocks."""
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
        network = backbone.alone(num_classes, image_shape)
        for number in self.places():
            layers = [self._layer(backbone.width, backbone.hidden) for _ in range(self.members)]
            for layer in layers:
                layer.dropout = self.dropout if self.expert_dropout is None else self.expert_dropout
            network.blocks[number].mlp = Members(layers) if self.members > 1 else layers[0]
        return ViTMoEModel(network, normalise, self.members)

    def _layer(self, width: int, hidden: int) -> TokenLayer:
        num = self.experts // self.members
        experts = TokenExperts(num, width, hidden, self.equal_experts, self.gelu)
        if self.choice == "slots":
            return SlotMoE(SlotRouter(width, num * self.slots), experts)
        k = num if self.gating == "soft" else self.k
        rule = Rule(
            k, self.gating, self.noise, self.choice, self.capacity, self.order, self.group, self.multiple, self.plan
        )
        tested = replace(rule, room=self.eval_capacity or self.capacity)
        return TokenMoE(TokenRouter(width, num), experts, rule, self.dispatch, tested)
