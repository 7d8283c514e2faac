"""Checks of the routers themselves (R6, R7, R9, R10, R13 and those not run here): alive, and the image's own?"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustmoe.attacks.base import evaluating
from robustmoe.data import Batch
from robustmoe.evaluation.checks.inside import Inside, built_in, called, uncompiled
from robustmoe.evaluation.checks.registry import Answer, check, not_run
from robustmoe.evaluation.checks.subject import (
    MOST_EXPERTS,
    NO_ROUTER,
    Subject,
    few,
    percent,
)
from robustmoe.models.base import RoutedModel
from robustmoe.models.foreign import hearable
from robustmoe.models.norm import difference, largest
from robustmoe.noise import Noise
from robustmoe.routing import Routing, Trace, detach, to_expert
from robustmoe.wrapping import Draw, watch
from robustmoe.wrapping.watching import tensors_of

FEWEST = 5
"""Check R9: with fewer decisions an expert than this, an expert without any proves nothing."""


@check("R6", "neighbours", "model")
@torch.no_grad()
def neighbours(case: Subject, images: int = 16, crowd: int = 32) -> Answer:
    """An image keeps its answer and its routing among copies of itself (a queue for its own expert: capacity, token
    dropping) and among attacked images. The exact model is asked, as for a number in a table.
    """
    if not case.clean.trace:
        return not_run(NO_ROUTER)
    part = few(case, images).batch if len(case.batch) else case.whole
    x, n = part.x, len(part)
    single = [case.model.run(x[i : i + 1]) for i in range(n)]
    attacked = case.threat.start(x, Noise.of(part.index, case.seed))
    among = case.model.run(torch.cat([attacked, x]))
    changed = rerouted = 0
    for i, own in enumerate(single):
        crowded = case.model.run(x[i : i + 1].expand(crowd, *x.shape[1:]))
        answers = torch.cat([crowded.logits.argmax(1), among.logits[n + i : n + i + 1].argmax(1)])
        changed += bool((answers != own.logits.argmax(1)).any())
        rerouted += any(
            bool((crowded.trace[name].index != routing.index).any())
            or not torch.equal(among.trace[name].index[n + i], routing.index[0])
            for name, routing in own.trace.items()
        )
    text = f"{changed} of {n} answers and {rerouted} routes change among {crowd} copies of the image or attacked images"
    return Answer("fail" if changed or rerouted else "pass", changed, text)


@check("R7", "random module", "model")
@torch.no_grad()
def random_module(case: Subject) -> Answer:
    """Which module draws random numbers, where two passes on the same images differ anywhere inside."""
    return _random_module(case.model, case.whole.x)


@check("R7", "random module", "cheap")
@torch.no_grad()
def random_module_quickly(case: Subject) -> Answer:
    """As the deep check, on 4 images: every module's output is copied."""
    return _random_module(case.model, case.whole.x[:4])


def _random_module(model: RoutedModel, x: Tensor) -> Answer:
    """The module named is the one that draws (see `watch`); where none is seen to draw, the first that answers
    differently, though it was given the same: it draws elsewhere, or keeps something of the pass before.
    """
    first, second = (_spoken(model, x) for _ in range(2))
    differ = [before for before, after in itertools.zip_longest(first, second) if not _agree(before, after)]
    draws: tuple[Draw, ...] = ()
    if differ or not built_in(model):
        with evaluating(model), uncompiled():
            draws = watch(Inside.of(model), x).draws
    if draws:
        names = list(dict.fromkeys(called(draw.path, draw.module) for draw in draws))
        names.sort(key=lambda name: all(spoken is None or spoken.who != name for spoken in differ))
        by = " and ".join(dict.fromkeys(draw.call for draw in draws if called(draw.path, draw.module) == names[0]))
        more = f" (and {len(names) - 1} modules more)" if len(names) > 1 else ""
        said = "differ" if differ else "agree, others need not"
        text = f"{names[0]} draws random numbers by {by}{more}; 2 passes on the same {len(x)} images {said}"
        return Answer("fail" if differ else "warn", names[0], text)
    if not differ:
        return Answer("pass", len(first), f"{len(first)} modules and decisions answer the same in 2 passes")
    who = next((spoken for spoken in differ if spoken is not None), second[-1]).who
    text = f"{who} answers differently in 2 passes: it draws random numbers outside of torch, or keeps what it was told"
    return Answer("fail", who, text)


class Spoken(NamedTuple):
    """Who said something in a pass, and the tensors of it."""

    who: str
    said: list[Tensor]


def _agree(before: Spoken | None, after: Spoken | None) -> bool:
    if before is None or after is None or before.who != after.who or len(before.said) != len(after.said):
        return False
    return all(_close(a, b) for a, b in zip(before.said, after.said))


def _spoken(model: RoutedModel, x: Tensor) -> list[Spoken]:
    """What every module said in one pass, in the order in which they ended, then every router and the model."""
    spoken: list[Spoken] = []

    def hear(who: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            spoken.append(Spoken(who, [tensor.detach().clone() for tensor in tensors_of(output)]))

        return hook

    parts = [(path, module) for path, module in hearable(Inside.of(model)) if path]
    hooks = [module.register_forward_hook(hear(called(path, type(module).__name__))) for path, module in parts]
    try:
        output = model.run(x)
    finally:
        for hook in hooks:
            hook.remove()
    for name, routing in output.trace.items():
        spoken.append(Spoken(f"router {name!r}", [routing.logits, routing.index, routing.weight]))
    return [*spoken, Spoken("the model's own code", [output.logits])]


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of a parallel sum."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool((difference(a, b) <= 1e-4 * largest(a).clamp(min=1e-30)).all()) if a.numel() else True


@check("R13", "stale route", "model")
@torch.no_grad()
def stale(case: Subject) -> Answer:
    """What the model says of the images does not depend on what it was asked before: two fresh copies and the
    model itself, each asked something else first; and no module holds on to a tensor that the next pass changes.
    """
    x = case.whole.x
    others = [Noise.of(case.whole.index, 13).uniform(*x.shape[1:]).to(x), x.flip(0), 1 - x]
    try:
        copies = [case.model, copy.deepcopy(case.model), copy.deepcopy(case.model)]
    except RuntimeError:  # a tensor of a past pass, with its graph, is held by a module
        text = "the model cannot be copied: 1 module or more holds a tensor of a past pass"
        return Answer("fail", None, text)
    told = []
    for model, other in zip(copies, others):
        model.run(other)
        told.append(model.run(x))
    with torch.enable_grad():
        told.append(case.model.run(x))
    differ = sum(
        not _close(told[0].logits, output.logits)
        or any(not torch.equal(told[0].trace[name].index, r.index) for name, r in output.trace.items())
        for output in told[1:]
    )
    kept = _kept(case.model, x, others[0])
    if differ:
        text = f"{differ} of {len(told) - 1} answers depend on what the model was asked before: a stale route"
        return Answer("fail", differ, text + (f" (kept by {kept[0]})" if kept else ""))
    if kept:
        text = (
            f"{kept[0]} keeps a tensor of the last pass ({len(kept)} in all): a decision should be returned, not kept"
        )
        return Answer("warn", len(kept), text)
    return Answer("pass", 0, f"{len(told)} answers after different questions agree, and no module keeps a tensor")


def _kept(model: nn.Module, x: Tensor, other: Tensor) -> list[str]:
    """The attributes, beside parameters and buffers, that keep another tensor after another pass."""
    kept = []
    for images in (x, other):
        model(images)
        kept.append({where: value.detach().clone() for where, value in _tensors(model)})
    first, second = kept
    return [
        f"module {where!r}"
        for where, value in second.items()
        if where not in first or value.shape != first[where].shape or not torch.equal(value, first[where])
    ]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            for part in parts:
                if isinstance(part, Routing):
                    part = part.logits
                if isinstance(part, Tensor) and id(part) not in registered:
                    yield f"{name}.{key}".strip("."), part


@check("R9", "expert load", "cheap")
@torch.no_grad()
def load(case: Subject) -> Answer:
    """Who gets the images. A router whose logits do not depend on the image fails; an expert without work warns."""
    return _load_check(case.model, case.whole, case.output.trace, "")


def _load_check(model: RoutedModel, batch: Batch, trace: Trace, more: str) -> Answer:
    """A router is fixed whose logits are the same for all images, and for as many images of noise."""
    if not trace:
        return not_run(NO_ROUTER)
    n = len(batch)
    shares = {name: _shares(routing) for name, routing in trace.items()}
    fixed = [name for name, r in trace.items() if r.num_experts > 1 and _constant(r.logits)]
    if fixed:  # the images may be alike: noise is not
        noise = model.run(Noise.of(batch.index, 9).uniform(*batch.x.shape[1:]).to(batch.x)).trace
        fixed = [name for name in fixed if _constant(torch.cat([trace[name].logits, noise[name].logits]))]
    dead = {name: sum(share < 1e-3 for share in shares[name]) for name in trace if _enough(trace[name])}
    worst = max(shares, key=lambda name: max(shares[name]))
    text = f"the busiest expert gets {percent(max(shares[worst]))} of the items of router {worst!r}"
    if fixed:
        text = f"the logits of router {fixed[0]!r} are the same for all {n} images; {text}"
    elif sum(dead.values()):
        name = next(name for name, count in dead.items() if count)
        text = f"{dead[name]} of {len(shares[name])} experts of router {name!r} get no item of {n} images; {text}"
    status = "fail" if fixed else "warn" if sum(dead.values()) else "pass"
    return Answer(status, shares, text + more)


def _enough(routing: Routing) -> bool:
    return routing.index.numel() >= FEWEST * routing.num_experts


def _shares(routing: Routing) -> list[float]:
    """The share of the items that each expert gets; where every expert is chosen, of the weight."""
    if routing.k == routing.num_experts:
        weight = torch.zeros_like(routing.logits).scatter(-1, routing.index, routing.weight.to(routing.logits))
        total = weight.sum((0, 1))
    else:
        total = routing.chosen().sum((0, 1)).float()
    shares: list[float] = (total / total.sum().clamp(min=1e-30)).tolist()
    return shares


def _constant(logits: Tensor) -> bool:
    return bool((logits - logits[:1]).abs().max() <= 1e-6 * logits.abs().max().clamp(min=1e-30))


@check("R9", "expert load", "model")
@torch.no_grad()
def load_attacked(case: Subject) -> Answer:
    """The load also on what the main attack left, with the accuracy that each single expert has on every image."""
    batch = case.whole
    trace = case.output.trace
    if not trace:
        return not_run(NO_ROUTER)
    shares = {name: _shares(routing) for name, routing in trace.items()}
    more = ""
    if len(case.batch):
        attacked = case.model.run(case.outcome(case.main).x_adv).trace
        top = max(max(_shares(routing)) for routing in attacked.values())
        more = f", under attack {percent(top)}"
    experts = min(min(r.num_experts for r in trace.values()), MOST_EXPERTS)
    alone = [
        float((case.model.run(batch.x, forced=to_expert(detach(trace), e)).logits.argmax(1) == batch.y).float().mean())
        for e in range(experts)
    ]
    free = float((case.output.logits.argmax(1) == batch.y).float().mean())
    more += (
        f"; a fixed expert has {percent(min(alone))} to {percent(max(alone))} clean accuracy, the model {percent(free)}"
    )
    answer = _load_check(case.model, batch, trace, more)
    return answer._replace(value={"load": shares, "alone": alone, "clean": free})


@check("R10", "router trained", "model")
def trained(case: Subject) -> Answer:
    """Training moved every router (its log says so). Where the gate declares no gradient, a fixed one warns."""
    if not case.clean.trace:
        return not_run(NO_ROUTER)
    lines = case.run.get("metrics") or []
    names = list(case.clean.trace)
    known = [line["routers"] for line in lines if line.get("routers")]
    if not known:
        return not_run("no training log of this model is known")
    moved = {name: sum(bool(routers.get(name, {}).get("moved")) for routers in known) for name in names}
    fixed = [name for name in names if not moved[name]]
    if not fixed:
        return Answer("pass", moved, f"{len(names)} router(s) moved, each in at least {min(moved.values())} epochs")
    declared = all(routers.get(name, {}).get("declared_fixed") for routers in known for name in fixed)
    text = f"router {fixed[0]!r} never moved in {len(known)} epochs"
    if declared:
        return Answer("warn", moved, f"{text}: its gate passes no gradient, by declaration")
    return Answer("fail", moved, f"{text}, though its gate passes a gradient: it was not trained")


@check("R14", "cost under attack", "model")
def cost(case: Subject) -> Answer:
    """What the model costs under attack: not run, since no model here spends more on one image than on another."""
    if not case.clean.trace:
        return not_run(NO_ROUTER)
    return not_run("the cost of these models does not depend on the image: every item goes to k experts")


@check("R16", "certificate", "model")
def certificate(case: Subject) -> Answer:
    """Whether a certificate covers every reachable expert: not run here, `robustmoe certify` answers."""
    return not_run("no certificate in this evaluation; robustmoe certify compares its own with the attacks")


@check("R17", "smoothing", "model")
def smoothing(case: Subject) -> Answer:
    """Whether the noise of a smoothed model keeps the routing: not run here, `robustmoe certify` answers."""
    return not_run("no randomised smoothing in this evaluation; robustmoe certify tells how much noise keeps the route")
