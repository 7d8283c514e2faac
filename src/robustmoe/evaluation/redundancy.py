"""How much a model needs its own choice of experts: clean images on other routes than the routers' own.

Each rule is a pure function (router's name, its own decision) -> the decision to use instead, for `RuleTape`. Chosen
experts are weighted by the layer's own gating rule, which is known from its decisions; every one of them has room.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustmoe.attacks.routes.regions import weighted_as
from robustmoe.attacks.views import Rule, RuleTape
from robustmoe.data import Batch
from robustmoe.evaluation.attacked import predictions
from robustmoe.evaluation.session import (
    Session,
)
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.progress import progress
from robustmoe.records import Override
from robustmoe.records.sweep import KEPT, OTHER_K, RANDOM, WITHOUT
from robustmoe.routing import Gating, Routing, Trace, top_k

Gate = Literal["vmoe", "renormalised", "hard", "soft", "slots", "expert choice", "unknown"]
"""How a layer chooses and weights its experts: k of them by softmax over all, by softmax over the chosen, or by 1/k
("hard"); all of them ("soft", "slots"); the experts choose their items; or by a rule that is none of these."""

Gates = Mapping[str, Gate]
TOP_K: dict[Gate | None, Gating] = {"vmoe": "vmoe", "renormalised": "renormalised", "hard": "hard"}
"""Those that leave experts out, and what `top_k` calls them."""


def gate_of(decision: Routing) -> Gate:
    """The gate of a router that decided so for a batch in eval mode. Top-1 with the constant weight 1 is "hard" (it may
    also be the softmax over the chosen one: at another k that would be seen).
    """
    if decision.slots is not None:
        return "slots"
    given = decision.weight != 0
    if decision.k == decision.num_experts:
        return "soft" if bool(given.all()) else "expert choice"
    items = given.any(-1)
    equal = torch.isclose(decision.weight[given], decision.weight.new_tensor(1.0 / decision.k), rtol=1e-4)
    full, among, _ = weighted_as(decision)
    if not bool(items.any()):
        return "unknown"
    if bool(equal.all()):
        return "hard"
    if bool(full[items].all()):
        return "vmoe"
    return "renormalised" if bool(among[items].all()) else "unknown"


# ------------------------------------------------------------------------------------------------ the rules


def random_experts(gates: Gates, noise: Noise, weights: Literal["own", "kept"] = "own") -> Rule:
    """Every item of the routers in ``gates`` that choose k of their experts to k others, drawn uniformly and without
    replacement; ``noise``: one stream an image. ``weights``: "own", the drawn experts' by the layer's rule (with V-MoE
    gates they are small, as the router had not chosen them), or "kept", those of the route that they stand in for.
    """

    def rule(name: str, fresh: Routing) -> Routing:
        gating = TOP_K.get(gates.get(name))
        if gating is None:
            return fresh
        items, experts = fresh.logits.shape[1:]
        drawn = noise.fold(zlib.crc32(name.encode())).uniform(items, experts)
        index = torch.argsort(drawn, dim=-1, stable=True)[..., : fresh.k]
        weight = fresh.weight if weights == "kept" else _weights(gating, fresh.logits, index)
        return Routing(fresh.logits, index, weight)

    return rule


def without(gates: Gates, expert: int) -> Rule:
    """The routers in ``gates`` without one of their experts, as if the layer had been built so: of k chosen ones the
    next best takes over; of all (soft gates, Soft MoE) the rest share its weight. Where experts choose their items, the
    items that it chose lose it; the others' choice and weights stay as they are.
    """

    def rule(name: str, fresh: Routing) -> Routing:
        gate = gates.get(name)
        if gate is None or gate == "unknown" or fresh.num_experts == 1:
            return fresh
        if not 0 <= expert < fresh.num_experts:
            raise ValueError(f"expert {expert} does not exist at {name!r}: it has experts 0 to {fresh.num_experts - 1}")
        gone = torch.arange(fresh.num_experts, device=fresh.logits.device) == expert
        logits = fresh.logits.masked_fill(gone, -torch.inf)
        if gate in TOP_K:
            return replace(top_k(logits, fresh.k, TOP_K[gate]), logits=fresh.logits)
        rest = torch.where(fresh.index == expert, 0.0, fresh.weight)
        if gate == "expert choice":
            return replace(fresh, weight=rest)
        left = rest.sum(-1, keepdim=True)
        alone = torch.softmax(logits, -1).gather(-1, fresh.index)  # where the expert had everything
        return replace(fresh, weight=torch.where(left > 1e-6, rest / left.clamp(min=1e-6), alone))

    return rule


def with_k(gates: Gates, k: int) -> Rule:
    """The routers in ``gates`` that choose some of their experts choose ``k`` instead, or all where there are fewer."""

    def rule(name: str, fresh: Routing) -> Routing:
        gating = TOP_K.get(gates.get(name))
        return fresh if gating is None else top_k(fresh.logits, min(k, fresh.num_experts), gating)

    return rule


def _weights(gating: Gating, logits: Float[Tensor, "n t e"], index: Int[Tensor, "n t k"]) -> Float[Tensor, "n t k"]:
    """Returns the weights of the experts ``index``, by the rule of that name."""
    if gating == "vmoe":
        return torch.softmax(logits, -1).gather(-1, index)
    chosen = logits.gather(-1, index)
    return torch.softmax(chosen, -1) if gating == "renormalised" else torch.full_like(chosen, 1.0 / index.shape[-1])


def overridden(model: RoutedModel, x: Float[Tensor, "n ch h w"], rule: Rule) -> Output:
    """The model's answer with ``rule`` between each router and its layer."""
    tape = RuleTape(rule)
    return Output(model.ask(x, tape), tape.trace)


# ------------------------------------------------------------------------------------------------ what is asked


class Setting(NamedTuple):
    """One rule for one router or all: see `Override`."""

    rule: str
    router: str
    number: int

    def made(self, gates: Gates, noise: Noise) -> Rule:
        """The rule for a batch. ``noise``: see `random_experts`."""
        own = {name: gate for name, gate in gates.items() if self.router in ("", name)}
        if self.rule == WITHOUT:
            return without(own, self.number)
        if self.rule == OTHER_K:
            return with_k(own, self.number)
        return random_experts(own, noise.fold(self.number), "kept" if self.rule == KEPT else "own")


def settings(trace: Trace, draws: int) -> list[Setting]:
    """All that can be asked of a model with that trace."""
    gates = {name: gate_of(routing) for name, routing in trace.items()}
    free = [name for name in trace if gates[name] in TOP_K]
    removable = {name: r.num_experts for name, r in trace.items() if gates[name] != "unknown" and r.num_experts > 1}
    every = [Setting(RANDOM, router, draw) for router in _places(free) for draw in range(draws)]
    if any(gates[name] in ("vmoe", "renormalised") for name in free):
        every += [Setting(KEPT, "", draw) for draw in range(draws)]
    for router in _places(list(removable)):
        experts = removable[router] if router else min(removable.values())
        every += [Setting(WITHOUT, router, expert) for expert in range(experts)]
    most = max((trace[name].num_experts for name in free), default=0)
    return every + [Setting(OTHER_K, "", k) for k in range(1, most + 1)]


def _places(names: Sequence[str]) -> list[str]:
    """All routers at once, then each (if there are several)."""
    return ["", *names] if len(names) > 1 else [""] * len(names)


def left_out(trace: Trace) -> list[str]:
    """What of it makes no sense for these routers, in sentences."""
    reasons: dict[Gate, str] = {
        "soft": "every expert is used already: no other is drawn, and k is not changed",
        "slots": "every slot is used (Soft MoE): no expert is drawn, and k is not changed",
        "expert choice": "the experts choose their items: no expert is drawn for an item, and k is not changed; the "
        "items of an expert that is removed lose it",
        "unknown": "the weights of the chosen experts follow no rule that is known here: its routes stay as they are",
    }
    gates = {name: gate_of(routing) for name, routing in trace.items()}
    names = {gate: [name for name in trace if gates[name] == gate] for gate in reasons}
    said = [f"{', '.join(names[gate])}: {why}." for gate, why in reasons.items() if names[gate]]
    single = [name for name, routing in trace.items() if routing.num_experts == 1]
    return said + ([f"{', '.join(single)}: the only expert is never removed."] if single else [])


@torch.no_grad()
def redundancy(session: Session) -> tuple[list[Override], list[str]]:
    """The classes of all images under every setting, and what was left out. The options say how often random experts
    are drawn, and from which seed; the model's gates are read off its decisions on the first images.
    """
    model, images, probe, options = session.model, session.images, session.probe, session.options
    trace = session.output.trace
    gates, said = {name: gate_of(routing) for name, routing in trace.items()}, left_out(trace)
    asked = []
    for setting in settings(trace, options.draws):
        refusal = _refused(model, probe, setting, gates) if setting.rule == OTHER_K else None
        if refusal is None:
            asked.append(setting)
        elif refusal not in said:
            said.append(refusal)
    overrides = []
    with progress(len(asked) * len(images), "redundancy", unit="passes") as bar:
        for setting in asked:
            bar.say(f"{setting.rule} {setting.number}")
            classes: list[int] = []
            for answers in _answers(session, setting, gates):
                classes += answers
                bar.advance(len(answers))
            overrides.append(Override(*setting, classes))
    return overrides, said


def _answers(session: Session, setting: Setting, gates: Gates) -> Iterator[list[int]]:
    for batch in session.batches():
        noise = Noise.of(batch.index, session.options.seed)
        yield predictions(overridden(session.model, batch.x, setting.made(gates, noise)))


def _refused(model: RoutedModel, probe: Batch, setting: Setting, gates: Gates) -> str | None:
    """Why the model does not take another k, in a sentence; None where it does."""
    try:
        overridden(model, probe.x[:1], with_k(gates, setting.number))
    except ValueError as error:  # a model whose experts cannot be mixed says so
        return f"k is not changed: {str(error).partition(';')[0]}."
    return None
