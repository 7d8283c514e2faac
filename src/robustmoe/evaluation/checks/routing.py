"""R1 to R17: is the router attacked, is it alive, and does an image's route belong to the image alone?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.attacks import Attack, RouterOnly, Targeted, evaluating
from robustmoe.attacks.objectives import Objective, loss_of
from robustmoe.attacks.routes import ExpertTransition, RouteFlip
from robustmoe.attacks.views import ExpertView, Soft, StraightThrough, View, Viewed, attack_view
from robustmoe.data import Batch
from robustmoe.evaluation.checks.planted import Fork
from robustmoe.evaluation.checks.strength import gradients
from robustmoe.evaluation.checks.subject import (
    NO_ROUTER,
    Subject,
    check,
    few,
    graded,
    gradient,
    inside,
    not_run,
    percent,
    with_loss,
)
from robustmoe.models.base import RoutedModel
from robustmoe.noise import Noise
from robustmoe.records import Check
from robustmoe.routing import Routing, Tape, Trace, detach, to_expert

ROUNDING, FAINT = 1e-6, 1e-2
"""Check R1: a share of the gradient below the first is the noise of two float32 passes; one below the second hardly
aims at the router (a saturated gate)."""

SATURATED = 0.999
"""Check R4: a gate that gives one expert more than this passes next to no gradient to the others."""

FEWEST = 5
"""Check R9: with fewer decisions an expert than this, an expert without any proves nothing."""

MOST_EXPERTS = 8
"""Checks that try every expert try so many."""


# ------------------------------------------------------------------------------------------------ is it attacked?


def router_in_sight(model: RoutedModel, attack: Attack, batch: Batch) -> Check:
    """R1: the share of the loss's image gradient that goes through the routers (whole gradient against the one with
    the route held), through the view that the attack climbs. For an attack that aims at the routers' own logits: the
    share of images at which these have a gradient. Of several parts, the one that sees the router best.
    """
    with torch.no_grad():
        output = model.run(batch.x)
    if not output.trace:
        return not_run("R1", NO_ROUTER)
    found = [_in_sight(model, part, batch, detach(output.trace)) for _, part in attack.parts(output)]
    return min(found, key=lambda one: ("pass", "warn", "fail", "not run").index(one.status))


def _in_sight(model: RoutedModel, attack: Attack, batch: Batch, trace: Trace) -> Check:
    objective = attack.objective
    if not objective.aims_at_router:
        return not_run("R1", "this attack holds the route by design; it says nothing of the router")
    climbed: RoutedModel = attack_view(model, attack.view) if isinstance(attack, Viewed) else model
    if isinstance(attack, Viewed) and isinstance(attack.view, ExpertView):
        return not_run("R1", "this attack holds one expert by design; it says nothing of the router")
    with evaluating(model):
        if objective.needs_router:
            both = objective.aims_at_experts  # the routers' own logits are a part of what is climbed
            share = 1.0 - (_router_flat(model, attack, batch) if both else float(gradients(model, attack, batch).value))
            text = f"the routers' own logits move with {100 * share:.3g} % of the images"
            return check("R1", "pass" if share > 0.5 else "warn" if share > 0 else "fail", share, text)
        whole, held = (gradient(_loss(climbed, batch.y, forced), batch.x) for forced in (None, trace))
    share = float((whole - held).norm() / whole.norm().clamp(min=1e-30))
    if not share > ROUNDING:
        blind = "no gradient reaches the image through the router, so this attack cannot aim at the route"
        return check("R1", "fail", share, f"routing unattacked: {blind}")
    text = f"{100 * share:.2g} % of the gradient's norm goes through the router"
    return check("R1", "pass" if share >= FAINT else "warn", share, text)


def _router_flat(model: RoutedModel, attack: Attack, batch: Batch) -> float:
    """The share of images at which the routers' departure has no gradient."""
    inner = RouterOnly()(model, batch.x, batch.y)
    start = attack.threat.start(batch.x, Noise.of(batch.index, attack.seed))
    flat = gradient(lambda x: inner(x).loss, start).flatten(1).abs().sum(1) == 0
    return float(flat.float().mean())


def _loss(model: RoutedModel, y: Tensor, forced: Trace | None) -> Callable[[Tensor], Tensor]:
    return lambda x: F.cross_entropy(model.run(x, forced=forced).logits, y, reduction="none")


def _choosing(trace: Trace) -> Trace:
    """The routers that choose: fewer experts than there are."""
    return {name: routing for name, routing in trace.items() if routing.k < routing.num_experts}


def route_flip(case: Subject) -> Check:
    """R2: how often each router can be moved, how often being behind the boundary breaks the image, and how many of
    the broken the evaluation missed (more than 0.5 point is too many).
    """
    trace = case.clean.trace
    if not _choosing(trace):
        return not_run("R2", "every router uses all its experts, so no route can flip" if trace else NO_ROUTER)
    attack = RouteFlip(case.threat, steps=20, seed=case.seed)
    flips = attack.flips(case.model, case.batch.x, case.batch.y)
    moved = torch.stack([flip.flipped for flip in flips.values()]).any(0)
    by_route = torch.stack([flip.broken for flip in flips.values()]).any(0)
    extra = case.gained(case.under(attack).broken | by_route)
    n = len(case.batch)
    rates = {name: [float(f.flipped.float().mean()), float(f.broken.float().mean())] for name, f in flips.items()}
    text = (
        f"routes can be flipped for {percent(float(moved.float().mean()))} of {n} images, which breaks "
        f"{percent(float(by_route.float().mean()))}; {extra} of them no attack of the evaluation breaks"
    )
    return check("R2", graded(extra, n, 0.5), {"routers": rates, "missed": extra}, text)


def enumerated(case: Subject) -> Check:
    """R3: every expert's cell is entered and climbed in; an image counts if the exact model goes there and errs. At
    most 0.5 point may be broken that no attack of the evaluation breaks.
    """
    trace = case.clean.trace
    if not _choosing(trace):
        return not_run("R3", "every router uses all its experts, so there are no cells" if trace else NO_ROUTER)
    attack = ExpertTransition(case.threat, steps=20, experts=MOST_EXPERTS, seed=case.seed)
    found = case.under(attack).broken
    extra, n = case.gained(found), len(case.batch)
    text = (
        f"forcing each expert's cell in turn breaks {int(found.sum())} of {n} images, {extra} that the attacks missed"
    )
    return check("R3", graded(extra, n, 0.5), extra, text)


def saturation(case: Subject) -> Check:
    """R4: attacks on softened gates (T = 1, 4, 16) break at most 0.5 point that the evaluation missed; and the gates
    are not saturated (the best expert's softmax above 0.999 for most decisions: a warning).
    """
    trace = case.clean.trace
    if not trace:
        return not_run("R4", NO_ROUTER)
    sure = torch.cat(
        [(r.logits.softmax(-1).amax(-1) > SATURATED).flatten() for r in trace.values() if r.num_experts > 1]
    )
    share = float(sure.float().mean()) if len(sure) else 0.0
    n, found = len(case.batch), {}
    for temperature in (1.0, 4.0, 16.0):
        seen = _through(case, Soft(temperature))
        if isinstance(seen, str):
            return check("R4", "warn" if share > 0.5 else "pass", {"saturated": share}, f"{_gates(share)}; {seen}")
        found[f"{temperature:g}"] = seen
    extra = case.gained(torch.stack(list(found.values())).any(0))
    status = graded(extra, n, 0.5)
    status = "warn" if status == "pass" and share > 0.5 else status
    counts = {temperature: int(broken.sum()) for temperature, broken in found.items()}
    said = ", ".join(f"{count} at T = {temperature}" for temperature, count in counts.items())
    text = f"{_gates(share)}; attacks on softened gates break {said} of {n} images, {extra} that the evaluation missed"
    return check("R4", status, {"saturated": share, "broken": counts, "missed": extra}, text)


def _gates(share: float) -> str:
    return f"{percent(share)} of the gates are saturated"


def _through(case: Subject, view: View) -> Tensor | str:
    """(n,) bool: what the climb through ``view`` breaks; a sentence where the model cannot be seen so."""
    try:
        return case.under(Viewed(view, case.quick)).broken
    except (ValueError, RuntimeError) as error:  # the model's own words: it takes no soft routing, say
        return f"this model has no {type(view).__name__} view ({str(error).partition(chr(10))[0]:.120})"


def views(case: Subject) -> Check:
    """R5: the climb along the exact gradient, the straight-through one and the soft one: the minimum counts. At most
    0.5 point may be broken that no attack of the evaluation breaks; 2 points between the views warn.
    """
    if not case.clean.trace:
        return not_run("R5", NO_ROUTER)
    n = len(case.batch)
    found = {"exact": case.under(case.quick).broken}
    skipped = []
    for name, view in (("straight-through", StraightThrough()), ("soft", Soft(1.0))):
        seen = _through(case, view)
        if isinstance(seen, str):
            skipped.append(seen)
        else:
            found[name] = seen
    extra = case.gained(torch.stack(list(found.values())).any(0))
    stand = {name: int((~broken).sum()) for name, broken in found.items()}
    apart = max(stand.values()) - min(stand.values())
    status = graded(extra, n, 0.5)
    status = "warn" if status == "pass" and apart > 1 and 100 * apart / n > 2 else status
    said = ", ".join(f"{count} by the {name} gradient" for name, count in stand.items())
    text = "; ".join([f"standing of {n} images: {said}; {extra} broken that the evaluation missed", *skipped])
    return check("R5", status, stand, text)


# ------------------------------------------------------------------------------------------------ whose route is it?


@torch.no_grad()
def neighbours(case: Subject, images: int = 16, crowd: int = 32) -> Check:
    """R6: an image keeps its answer and its route among copies of itself (a queue for its own expert: capacity, token
    dropping) and among attacked images. The exact model is asked, as for a number in a table.
    """
    if not case.clean.trace:
        return not_run("R6", NO_ROUTER)
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
    return check("R6", "fail" if changed or rerouted else "pass", changed, text)


@torch.no_grad()
def random_module(model: RoutedModel, batch: Batch) -> Check:
    """R7: the first module whose output differs between two passes on the same images: it draws random numbers."""
    first, second = (_spoken(model, batch.x) for _ in range(2))
    for (name, before), (again, after) in zip(first, second):
        if name != again or not _close(before, after):
            return check("R7", "fail", name, f"{name} answers differently in 2 passes: it draws random numbers")
    return check("R7", "pass", len(first), f"{len(first)} modules and decisions answer the same in 2 passes")


def _spoken(model: RoutedModel, x: Tensor) -> list[tuple[str, Tensor]]:
    """What every module said in one pass, in order, then every router and the model."""
    said: list[tuple[str, Tensor]] = []

    def hear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                said.append((f"module {name!r} ({type(module).__name__})", output.detach().clone()))

        return hook

    hooks = [module.register_forward_hook(hear(name)) for name, module in model.named_modules() if name]
    try:
        output = model.run(x)
    finally:
        for hook in hooks:
            hook.remove()
    for name, routing in output.trace.items():
        said += [(f"router {name!r}", routing.logits), (f"router {name!r}", routing.index)]
        said.append((f"router {name!r}", routing.weight))
    return [*said, ("the model's own body", output.logits)]


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of a parallel sum."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool(((a - b).abs() <= 1e-4 * a.abs().max().clamp(min=1e-30)).all()) if a.numel() else True


@torch.no_grad()
def stale(case: Subject) -> Check:
    """R13: what the model says of the images does not depend on what it was asked before: two fresh copies and the
    model itself, each asked something else first; and no module holds on to a tensor that the next pass changes.
    """
    x = case.whole.x
    others = [Noise.of(case.whole.index, 13).uniform(*x.shape[1:]).to(x), x.flip(0), 1 - x]
    try:
        copies = [case.model, copy.deepcopy(case.model), copy.deepcopy(case.model)]
    except RuntimeError:  # a tensor of a past pass, with its graph, is held by a module
        text = "the model cannot be copied: 1 module or more holds a tensor of a past pass"
        return check("R13", "fail", None, text)
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
    held = _held(case.model, x, others[0])
    if differ:
        text = f"{differ} of {len(told) - 1} answers depend on what the model was asked before: a stale route"
        return check("R13", "fail", differ, text + (f" (held by {held[0]})" if held else ""))
    if held:
        text = (
            f"{held[0]} keeps a tensor of the last pass ({len(held)} in all): a decision should be returned, not kept"
        )
        return check("R13", "warn", len(held), text)
    return check("R13", "pass", 0, f"{len(told)} answers after different questions agree, and no module keeps a tensor")


def _held(model: nn.Module, x: Tensor, other: Tensor) -> list[str]:
    """The attributes, beside parameters and buffers, that hold another tensor after another pass."""
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


# ------------------------------------------------------------------------------------------------ experts alive?


@torch.no_grad()
def joint_vulnerability(case: Subject) -> Check:
    """R8: each expert attacked alone (its route forced), the exact model asked (at most 0.5 point that the evaluation
    missed); and how often an adversarial of one expert is one of another (mean over the pairs).
    """
    trace = case.clean.trace
    experts = min((r.num_experts for r in trace.values()), default=0)
    if experts < 2:
        return not_run("R8", NO_ROUTER if not trace else "there is only one expert")
    experts, n, y = min(experts, MOST_EXPERTS), len(case.batch), case.batch.y
    free = detach(trace)
    found, matrix = [], []
    for expert in range(experts):
        left = case.under(Viewed(ExpertView(expert), case.quick))
        found.append(left.broken)
        row = []
        for judge in range(experts):
            held = to_expert(free, judge)
            right = case.model.run(case.batch.x, forced=held).logits.argmax(1) == y
            wrong = case.model.run(left.x_adv, forced=held).logits.argmax(1) != y
            row.append(float((right & wrong).sum() / right.sum().clamp(min=1)))
        matrix.append(row)
    extra = case.gained(torch.stack(found).any(0))
    shared = sum(matrix[i][j] for i in range(experts) for j in range(experts) if i != j) / (experts * (experts - 1))
    text = (
        f"an adversarial of one of {experts} experts breaks another in {percent(shared)} of the cases; attacks on "
        f"single experts break {extra} of {n} images that the evaluation missed"
    )
    return check("R8", graded(extra, n, 0.5), matrix, text)


@torch.no_grad()
def load(model: RoutedModel, batch: Batch) -> Check:
    """R9: who gets the images. A router whose logits do not depend on the image fails; an expert without work warns."""
    return _load_check(model, batch, model.run(batch.x).trace, "")


def _load_check(model: RoutedModel, batch: Batch, trace: Trace, more: str) -> Check:
    """A router is fixed whose logits are the same for all images, and for as many images of noise."""
    if not trace:
        return not_run("R9", NO_ROUTER)
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
    return check("R9", status, shares, text + more)


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


@torch.no_grad()
def load_attacked(case: Subject) -> Check:
    """R9, deep: also on what the main attack left, with the accuracy that each single expert has on every image."""
    batch = case.whole
    trace = case.model.run(batch.x).trace
    if not trace:
        return not_run("R9", NO_ROUTER)
    shares = {name: _shares(routing) for name, routing in trace.items()}
    more = ""
    if len(case.batch):
        after = case.model.run(case.under(case.main).x_adv).trace
        top = max(max(_shares(routing)) for routing in after.values())
        more = f", under attack {percent(top)}"
    experts = min(min(r.num_experts for r in trace.values()), MOST_EXPERTS)
    alone = [
        float((case.model.run(batch.x, forced=to_expert(detach(trace), e)).logits.argmax(1) == batch.y).float().mean())
        for e in range(experts)
    ]
    free = float((case.model(batch.x).argmax(1) == batch.y).float().mean())
    more += (
        f"; a fixed expert has {percent(min(alone))} to {percent(max(alone))} clean accuracy, the model {percent(free)}"
    )
    found = _load_check(case.model, batch, trace, more)
    return check("R9", found.status, {"load": shares, "alone": alone, "clean": free}, found.sentence)


def trained(case: Subject) -> Check:
    """R10: training moved every router (its log says so). Where the gate declares no gradient, a fixed one warns."""
    if not case.clean.trace:
        return not_run("R10", NO_ROUTER)
    lines = case.run.get("metrics") or []
    names = list(case.clean.trace)
    known = [line["routers"] for line in lines if line.get("routers")]
    if not known:
        return not_run("R10", "no training log of this model is known")
    moved = {name: sum(bool(routers.get(name, {}).get("moved")) for routers in known) for name in names}
    fixed = [name for name in names if not moved[name]]
    if not fixed:
        return check(
            "R10", "pass", moved, f"{len(names)} router(s) moved, each in at least {min(moved.values())} epochs"
        )
    declared = all(routers.get(name, {}).get("declared_fixed") for routers in known for name in fixed)
    text = f"router {fixed[0]!r} never moved in {len(known)} epochs"
    if declared:
        return check("R10", "warn", moved, f"{text}: its gate passes no gradient, by declaration")
    return check("R10", "fail", moved, f"{text}, though its gate passes a gradient: it was not trained")


# ------------------------------------------------------------------------------------------------ what is climbed?


@torch.no_grad()
def auxiliary(case: Subject) -> Check:
    """R11: the loss that each attack climbs is that of the logits and the label, recomputed here, and nothing else (no
    load balancing, no z-loss).
    """
    x, y = case.batch.x, case.batch.y
    at = case.threat.start(x, case.noise(case.seed))
    worst, compared, skipped = 0.0, [], []
    with evaluating(case.model), torch.no_grad():
        for part in (part for attack in case.attacks for _, part in attack.parts(case.clean)):
            wanted = _reference(case.model, part.objective, x, at, y)
            if wanted is None:
                skipped.append(part.objective.name)
                continue
            told = part.objective(case.model, x, y)(at).loss
            worst = max(worst, float(((told - wanted).abs() / (1 + wanted.abs())).max()))
            compared.append(part.objective.name)
    if not compared:
        return not_run("R11", f"the attacks climb no loss of the label ({', '.join(sorted(set(skipped)))})")
    text = f"{len(compared)} attack loss(es) differ from the loss recomputed from the logits by at most {worst:.2g}"
    return check("R11", "pass" if worst <= 1e-4 else "fail", worst, text)


def _reference(model: RoutedModel, objective: Objective, x: Tensor, at: Tensor, y: Tensor) -> Tensor | None:
    """The objective's loss at ``at``, worked out from its name alone; None where it is not one of the label."""
    loss = getattr(objective, "loss", None)
    of_routing = objective.needs_router and objective.aims_at_router
    if isinstance(objective, Targeted) or of_routing or loss in (None, "kl"):
        return None
    forced = None if objective.aims_at_router else detach(model.run(x).trace)
    return loss_of(loss, model.run(at, forced=forced).logits, y)


class Scaled(RoutedModel):
    """``inner`` with its logits times ``scale``."""

    def __init__(self, inner: RoutedModel, scale: float) -> None:
        super().__init__()
        self.inner = inner
        self.scale = scale

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        return self.inner.body(x, tape) * self.scale


def logit_scale(case: Subject) -> Check:
    """R12: cross-entropy on logits times 0.1, 10 and 100 breaks at most 0.5 point more than the evaluation did: large
    logits saturate the loss, small ones flatten it, and the prediction is the same.
    """
    n, attack = len(case.batch), with_loss(case.quick, "ce")
    found = {}
    for scale in (0.1, 1.0, 10.0, 100.0):
        found[f"{scale:g}"] = case.under(attack, Scaled(case.model, scale) if scale != 1 else None).broken
    extra = case.gained(torch.stack(list(found.values())).any(0))
    counts = {scale: int(broken.sum()) for scale, broken in found.items()}
    said = ", ".join(f"{count} at x {scale}" for scale, count in counts.items())
    text = f"of {n} images, cross-entropy on scaled logits breaks {said}; {extra} that the evaluation missed"
    return check("R12", graded(extra, n, 0.5), counts, text)


def cost(case: Subject) -> Check:
    """R14."""
    if not case.clean.trace:
        return not_run("R14", NO_ROUTER)
    return not_run("R14", "the cost of these models does not depend on the image: every item goes to k experts")


def planted_route(case: Subject, images: int = 8) -> Check:
    """R15: the evaluation's attacks, against a built-in model whose adversarials lie behind a change of route alone
    (`planted.Fork`): a test of the suite, not of the model.
    """
    if not case.clean.trace:
        return not_run("R15", NO_ROUTER)
    shape = tuple(case.batch.x.shape[1:])
    fork = Fork(case.threat, (shape[0], shape[1], shape[2])).to(case.batch.x.device).eval()
    x = fork.images(images, (shape[0], shape[1], shape[2]))
    y = torch.zeros(images, dtype=torch.int64, device=x.device)
    index = torch.arange(images, device=x.device)
    broken = torch.zeros(images, dtype=torch.bool, device=x.device)
    for attack in case.attacks:
        x_adv = attack(fork, x, y, Noise.of(index, attack.seed))
        with torch.no_grad():
            broken |= (fork(x_adv).argmax(1) != y) & inside(attack.threat, x_adv, x)
    found = int(broken.sum())
    text = f"the attacks find {found} of {images} adversarials behind a planted change of route"
    if found < images:
        text += "; add router_only or route_flip"
    return check("R15", graded(images - found, images, 5.0), found / images, text)


def certificate(case: Subject) -> Check:
    """R16."""
    return not_run("R16", "no certificate in this evaluation; robustmoe certify compares its own with the attacks")


def smoothing(case: Subject) -> Check:
    """R17."""
    return not_run(
        "R17", "no randomised smoothing in this evaluation; robustmoe certify tells how much noise keeps the route"
    )
