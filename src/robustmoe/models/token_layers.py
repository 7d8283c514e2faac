"""Routed layers on the tokens of an image: `TokenMoE` (V-MoE and expert choice) and `SlotMoE` (Soft MoE), and what any
such layer says of itself (`TokenLayer`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from robustmoe.errors import UserError
from robustmoe.models.norm import at_least_float32, full_precision, unit_length
from robustmoe.models.tokens import Dispatch, Masks, TokenExperts, capacity, experts_choose, within_capacity
from robustmoe.models.transport import Plan, sinkhorn, sparse
from robustmoe.noise import Noise
from robustmoe.routing import Gate, Gating, Routing, Tape, choose, chosen_weights, noisy_top_k, soft

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
                unit_length(at_least_float32(x), 1e-6), unit_length(at_least_float32(self.mu), 1e-6, 0)
            )


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
    plan: Plan = "none"

    def __call__(self, logits: Float[Tensor, "n t e"], tape: Tape, name: str) -> Routing:
        """Returns the router's own decision."""
        draws = tape.draws(name)
        if self.choice == "expert":
            return self._of_experts(logits)
        if self.plan != "none":
            return self._planned(logits, None if draws is None or not self.noise else draws)
        if self.noise and draws is not None and self.gating in ("vmoe", "renormalised", "hard"):
            gating: Gating = self.gating
            items, experts = logits.shape[1:]
            free = noisy_top_k(logits, draws.normal(items, experts).to(logits) / experts, self.k, gating)
        else:
            free = choose(logits, self.gating, self.k)
        return free if self.room is None else self._with_room(free)

    def shares(self, logits: Float[Tensor, "n t e"]) -> Float[Tensor, "n t e"]:
        """Returns the weights of token choice in eval mode without a bound on room, expert by expert."""
        if self.gating == "soft":
            return torch.softmax(logits, -1)
        return chosen_weights(logits, self.k, "hard" if self.gating == "straight_through" else self.gating)

    def check_open(self, tokens: int, experts: int) -> None:
        """Raises UserError unless each token of an image has what it chose itself, whatever the others chose."""
        way = "choice=expert" if self.choice == "expert" else f"plan={self.plan}" if self.plan != "none" else ""
        if way:
            raise UserError(
                f"no certificate knows a vit_moe with {way}, where a token's experts depend on all tokens; expected "
                "choice=token or slots without a plan; smoothing(...) certifies any model"
            )
        items = tokens * self.group
        if self.room is not None and capacity(items, experts, self.k, self.room, self.multiple) < items:
            raise UserError(
                f"no certificate knows a vit_moe whose experts can be full, at capacity {self.room}; expected an "
                "eval_capacity of experts / k or above, or none; smoothing(...) certifies any model"
            )

    def _planned(self, logits: Float[Tensor, "n t e"], draws: Noise | None) -> Routing:
        """Each token's k best experts of the plan, weighted by the router's softmax; only Sinkhorn's has noise."""
        noisy = None
        if draws is not None and self.plan == "sinkhorn":
            noisy = logits + draws.normal(*logits.shape[1:]).to(logits) / logits.shape[2]
        plans = [self._plan(group, self.k) for group in self._groups(logits if noisy is None else noisy)]
        plan = torch.cat([logits[:0, 0], *plans])  # there may be no image
        index = torch.argsort(plan.view_as(logits), dim=-1, descending=True, stable=True)[..., : self.k]
        p = torch.softmax(logits, -1) if self.gating == "vmoe" else logits
        weight = p.gather(-1, index) if self.gating == "vmoe" else torch.softmax(p.gather(-1, index), -1)
        free = Routing(logits, index, weight, noisy)
        return free if self.room is None else self._with_room(free)

    def _groups(self, x: Float[Tensor, "n t e"]) -> list[Float[Tensor, "g s e"]]:
        """The tokens group by group: whole groups at once, then what is left."""
        whole = len(x) - len(x) % self.group
        parts = [part for part in (x[:whole], x[whole:]) if len(part)]
        return [part.reshape(-1, min(self.group, len(part)) * x.shape[1], x.shape[2]) for part in parts]

    @torch.no_grad()
    def _plan(self, logits: Float[Tensor, "g s e"], k: int) -> Float[Tensor, "m e"]:
        """The plan of groups, or the softmax where there is none, for each token."""
        p = torch.softmax(logits, -1)
        if self.plan == "sinkhorn":
            p = sinkhorn(logits)
        elif self.plan == "sparse":
            p = sparse(p, k, "experts" if self.choice == "expert" else "tokens")
        return p.flatten(0, 1)

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
        kept = [p[:0, 0].bool()]  # there may be no image
        for group in self._groups(logits):
            room = capacity(group.shape[1], group.shape[2], 1, self.room or 1.0, self.multiple)
            scores = self._plan(group, room).view_as(group)
            kept += [experts_choose(each, room) for each in scores]
        weight = p * torch.cat(kept).view_as(p)
        if self.gating == "renormalised":
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        ranked = torch.argsort(logits, dim=-1, descending=True, stable=True)
        return Routing(logits, ranked, weight.gather(-1, ranked))


class LinearRouting(NamedTuple):
    """A router whose logits of a token are ``rows`` (e, d) times that token; ``rule`` makes them a decision."""

    rows: Float[Tensor, "e d"]
    rule: Rule


class TokenLayer(nn.Module):
    """A routed layer on tokens: ``layer(x, tape)`` takes and gives (n, t, d), and its decision is "router" on the tape.

    A layer says here what those who measure it need to know, so that they ask for no class. ``whole``: why it can be
    measured only as one function of all tokens of an image; empty where `linear` gives its router, and each token's
    answer depends on that token and its decision alone.
    """

    router: nn.Module
    experts: TokenExperts
    whole: str = ""
    dropout: float = 0.0
    """Of the experts, in training: after both of their layers, as in V-MoE's code; each pair of an item and an expert
    has its own draws.
    """

    @abstractmethod
    def forward(self, x: Float[Tensor, "n t d"], tape: Tape) -> Float[Tensor, "n t d"]:
        """Returns the sum over the chosen experts of weight times answer, for each token."""

    def openly(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        """Returns the same in eval mode by operations that bounds know (`robustmoe.certification`), every expert on
        every token. Raises UserError where no bounds are known of the layer.
        """
        raise UserError(f"no bounds are known of {type(self).__name__}; smoothing(...) certifies any model")

    def linear(self) -> LinearRouting:
        """Returns the layer's router. Raises ValueError where it is not linear in each token, or the layer mixes
        tokens.
        """
        raise ValueError(f"the layer can be measured as a whole alone: {self.whole}")

    def masks(self, tape: Tape, pairs: tuple[int, int]) -> Masks | None:
        """Returns the dropout of a pass, (n, *pairs, width of the layer); None: it has none. The draws of an image are
        its own.
        """
        draws = None if self.dropout == 0 else tape.draws("experts.dropout")
        if draws is None:
            return None
        rate, widths = self.dropout, (self.experts.w1.shape[2], self.experts.w2.shape[2])
        some = (draws.fold(layer).uniform(*pairs, width) >= rate for layer, width in enumerate(widths))
        return Masks(*(kept.float() / (1 - rate) for kept in some))


class TokenMoE(TokenLayer):
    """A layer that stands in the place of a block's MLP and sends every token to the experts chosen for it. ``tested``:
    the rule of passes in eval mode, where it is another.
    """

    router: TokenRouter

    def __init__(
        self, router: TokenRouter, experts: TokenExperts, rule: Rule, dispatch: Dispatch, tested: Rule | None = None
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.rules = (rule if tested is None else tested, rule)
        self.dispatch: Dispatch = dispatch

    @property
    def rule(self) -> Rule:
        """The rule of the mode that the layer is in."""
        return self.rules[self.training]

    def linear(self) -> LinearRouting:
        return LinearRouting(self.router.weight, self.rule)

    def forward(self, x: Float[Tensor, "n t d"], tape: Tape) -> Float[Tensor, "n t d"]:
        if tape.openly:
            return self.openly(x)
        routing = tape("router", self.rule(self.router(x), tape, "router"))
        index, weight = routing.index.flatten(0, 1), routing.weight.flatten(0, 1)
        masks = self.masks(tape, (x.shape[1], index.shape[1]))
        masks = None if masks is None else Masks(*(mask.flatten(0, 1) for mask in masks))
        return self.experts(x.flatten(0, 1), index, weight, self._kept(weight), self.dispatch, masks).view_as(x)

    def openly(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        self.rule.check_open(x.shape[1], self.experts.num)
        weight = self.rule.shares(self.router(x))
        answers = torch.cat([self.experts.linearly(expert, x).unsqueeze(2) for expert in range(self.experts.num)], 2)
        return torch.matmul(weight.unsqueeze(2), answers).squeeze(2)

    def _kept(self, weight: Float[Tensor, "m k"]) -> Bool[Tensor, "m k"] | None:
        """Returns which pairs run; None: all. On the meta device, where costs are counted without values, no token is
        dropped, and every expert that chooses takes the first ones.
        """
        rule = self.rule
        if rule.choice == "token":
            return None if rule.room is None or weight.is_meta else weight != 0
        if not weight.is_meta:
            return weight != 0
        items, experts = weight.shape
        room = capacity(items, experts, 1, rule.room or 1.0, rule.multiple)
        return (torch.arange(items, device="cpu") < room)[:, None].expand(items, experts)


class SlotMoE(TokenLayer):
    """Soft MoE stands in the place of a block's MLP: each slot is a mean of the image's tokens, each expert works on
    its slots, each token gets a mean of the answers.

    In the trace, item t's weight of expert e is the sum over e's slots of what it takes of their answers.
    """

    router: SlotRouter
    whole = "every expert's slots are mixed of all tokens"

    def __init__(self, router: SlotRouter, experts: TokenExperts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def openly(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        slots = self.router(x)
        given = torch.matmul(torch.softmax(slots.transpose(1, 2), -1), x)
        own = given.chunk(self.experts.num, 1)
        answers = torch.cat([self.experts.linearly(expert, part) for expert, part in enumerate(own)], 1)
        return torch.matmul(torch.softmax(slots, -1), answers)

    def forward(self, x: Float[Tensor, "n t d"], tape: Tape) -> Float[Tensor, "n t d"]:
        if tape.openly:
            return self.openly(x)
        slots = self.router(x)
        experts = (self.experts.num, slots.shape[-1] // self.experts.num)
        fresh = soft(torch.logsumexp(slots.unflatten(-1, experts), -1))
        routing = tape("router", replace(fresh, slots=slots))
        used = slots if routing.slots is None else routing.slots
        weight = torch.zeros_like(routing.logits).scatter_add(-1, routing.index, routing.weight)
        combine = (weight[..., None] * torch.softmax(used.unflatten(-1, experts), -1)).flatten(2)
        given = torch.einsum("nts,ntd->snd", torch.softmax(used, 1).to(x.dtype), x)
        masks = self.masks(tape, experts)
        if masks is not None:
            masks = Masks(*(mask.permute(1, 2, 0, 3).flatten(1, 2) for mask in masks))
        answers = self.experts.apart(given.unflatten(0, experts).flatten(1, 2), masks)
        answers = answers.unflatten(1, (experts[1], x.shape[0])).flatten(0, 1)
        return torch.einsum("nts,snd->ntd", combine.to(answers.dtype), answers)


class Members(nn.Module):
    """The layers of the members of a partly shared ensemble (E3, Allingham et al. 2022), in the place of a block's MLP:
    each image comes once for every member, one after the other, and goes to that member's layer.

    On the tape they are "members.0.router", "members.1.router" and so on: each a decision among the member's own
    experts.
    """

    def __init__(self, layers: Iterable[TokenLayer]) -> None:
        super().__init__()
        self.members = nn.ModuleList(layers)

    def forward(self, x: Float[Tensor, "nm t d"], tape: Tape) -> Float[Tensor, "nm t d"]:
        count = len(self.members)
        own = x.unflatten(0, (x.shape[0] // count, count)).unbind(1)
        answers = [
            layer(given, tape.under(f"members.{number}"))
            for number, (layer, given) in enumerate(zip(self.members, own, strict=True))
        ]
        return torch.stack(answers, 1).flatten(0, 1)
