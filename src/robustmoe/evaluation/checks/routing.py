"""Checks of the routing under attack (R1 to R5, R8, R11, R12, R15): is the router attacked, by every way there is?"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe.attacks import Attack, RouterOnly, Targeted, evaluating
from robustmoe.attacks.losses import climb
from robustmoe.attacks.objectives import Objective
from robustmoe.attacks.routes import ExpertTransition, RouteFlip
from robustmoe.attacks.routes.regions import narrowed
from robustmoe.attacks.views import ExpertView, Soft, StraightThrough, View, Viewed, attack_view
from robustmoe.data import Batch
from robustmoe.evaluation.checks.gradients import is_flat
from robustmoe.evaluation.checks.planted import PlantedRoute
from robustmoe.evaluation.checks.registry import Answer, check, not_run
from robustmoe.evaluation.checks.subject import (
    MOST_EXPERTS,
    NO_ROUTER,
    Subject,
    graded,
    gradient,
    in_ball_and_box,
    percent,
    with_loss,
)
from robustmoe.models.base import RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Tape, Trace, detach, to_expert

ROUNDING, FAINT = 1e-6, 1e-2
"""Check R1: a share of the gradient below the first is the noise of two float32 passes; one below the second hardly
aims at the router (a saturated gate)."""

SATURATED = 0.999
"""Check R4: a gate that gives one expert more than this passes next to no gradient to the others."""


@check("R1", "router attacked", "model", "cheap")
def router_in_sight(case: Subject) -> Answer:
    """The share of the loss's image gradient that goes through the routers (whole gradient against the one with
    routing fixed), through the view that the attack climbs. For an attack that aims at the routers' own logits: the
    share of images at which these have a gradient. Of several attacks or parts, the one that sees the router best.
    """
    output = case.output
    if not output.trace:
        return not_run(NO_ROUTER)
    parts = [part for attack in case.attacks for _, part in attack.parts(output)]
    answers = [_in_sight(case.model, part, case.whole, detach(output.trace)) for part in parts]
    return min(answers, key=lambda answer: ("pass", "warn", "fail", "not run").index(answer.status))


def _in_sight(model: RoutedModel, attack: Attack, batch: Batch, trace: Trace) -> Answer:
    objective = attack.objective
    if not objective.aims_at_router:
        return not_run("this attack keeps routing fixed by design; it says nothing of the router")
    climbed: RoutedModel = attack_view(model, attack.view) if isinstance(attack, Viewed) else model
    if isinstance(attack, Viewed) and isinstance(attack.view, ExpertView):
        return not_run("this attack holds one expert by design; it says nothing of the router")
    with evaluating(model):
        if objective.needs_router:
            both = objective.aims_at_experts  # the routers' own logits are a part of what is climbed
            share = 1.0 - _flat(model, RouterOnly() if both else objective, attack, batch)
            text = f"the routers' own logits move with {100 * share:.3g} % of the images"
            return Answer("pass" if share > 0.5 else "warn" if share > 0 else "fail", share, text)
        whole, fixed = (gradient(_loss(climbed, batch.y, forced), batch.x) for forced in (None, trace))
    share = float((whole - fixed).norm() / whole.norm().clamp(min=1e-30))
    if not share > ROUNDING:
        blind = "no gradient reaches the image through the router, so this attack cannot aim at the route"
        return Answer("fail", share, f"routing unattacked: {blind}")
    text = f"{100 * share:.2g} % of the gradient's norm goes through the router"
    return Answer("pass" if share >= FAINT else "warn", share, text)


def _flat(model: RoutedModel, objective: Objective, attack: Attack, batch: Batch) -> float:
    """The share of images at which the objective has no gradient."""
    inner = objective(model, batch.x, batch.y)
    start = attack.threat.start(batch.x, Noise.of(batch.index, attack.seed))
    flat = is_flat(gradient(lambda x: inner(x).climbed, start))
    return float(flat.float().mean())


def _loss(model: RoutedModel, y: Tensor, forced: Trace | None) -> Callable[[Tensor], Tensor]:
    return lambda x: F.cross_entropy(model.run(x, forced=forced).logits, y, reduction="none")


@check("R2", "route flip", "attack")
def route_flip(case: Subject) -> Answer:
    """How often each router can be moved, how often being behind the boundary breaks the image, and how many of
    the broken the evaluation missed (more than 0.5 point is too many).
    """
    trace = case.clean.trace
    if not narrowed(trace):
        return not_run("every router uses all its experts, so no route can flip" if trace else NO_ROUTER)
    attack = RouteFlip(case.threat, steps=20, seed=case.seed)
    flips = attack.flips(case.model, case.batch.x, case.batch.y)
    moved = torch.stack([flip.flipped for flip in flips.values()]).any(0)
    by_route = torch.stack([flip.broken for flip in flips.values()]).any(0)
    extra = case.gained(case.outcome(attack).broken | by_route)
    n = len(case.batch)
    rates = {name: [float(f.flipped.float().mean()), float(f.broken.float().mean())] for name, f in flips.items()}
    text = (
        f"routes can be flipped for {percent(float(moved.float().mean()))} of {n} images, which breaks "
        f"{percent(float(by_route.float().mean()))}; {extra} of them no attack of the evaluation breaks"
    )
    return Answer(graded(extra, n, 0.5), {"routers": rates, "missed": extra}, text)


@check("R3", "enumerated routes", "attack")
def enumerated(case: Subject) -> Answer:
    """Every expert's region is entered and climbed in; an image counts if the exact model goes there and errs. At
    most 0.5 point may be broken that no attack of the evaluation breaks.
    """
    trace = case.clean.trace
    if not narrowed(trace):
        return not_run("every router uses all its experts, so there are no regions" if trace else NO_ROUTER)
    attack = ExpertTransition(case.threat, steps=20, experts=MOST_EXPERTS, seed=case.seed)
    broken = case.outcome(attack).broken
    extra, n = case.gained(broken), len(case.batch)
    text = (
        f"entering each expert's region in turn breaks {int(broken.sum())} of {n} images, {extra} that the attacks "
        "missed"
    )
    return Answer(graded(extra, n, 0.5), extra, text)


@check("R4", "gate saturation", "attack")
def saturation(case: Subject) -> Answer:
    """Attacks on softened gates (T = 1, 4, 16) break at most 0.5 point that the evaluation missed; and the gates
    are not saturated (the best expert's softmax above 0.999 for most decisions: a warning).
    """
    trace = case.clean.trace
    if not trace:
        return not_run(NO_ROUTER)
    sure = torch.cat(
        [(r.logits.softmax(-1).amax(-1) > SATURATED).flatten() for r in trace.values() if r.num_experts > 1]
    )
    share = float(sure.float().mean()) if len(sure) else 0.0
    n, by_temperature = len(case.batch), {}
    for temperature in (1.0, 4.0, 16.0):
        seen = _through(case, Soft(temperature))
        if isinstance(seen, str):
            return Answer("warn" if share > 0.5 else "pass", {"saturated": share}, f"{_gates(share)}; {seen}")
        by_temperature[f"{temperature:g}"] = seen
    extra = case.gained(torch.stack(list(by_temperature.values())).any(0))
    status = graded(extra, n, 0.5)
    status = "warn" if status == "pass" and share > 0.5 else status
    counts = {temperature: int(broken.sum()) for temperature, broken in by_temperature.items()}
    said = ", ".join(f"{count} at T = {temperature}" for temperature, count in counts.items())
    text = f"{_gates(share)}; attacks on softened gates break {said} of {n} images, {extra} that the evaluation missed"
    return Answer(status, {"saturated": share, "broken": counts, "missed": extra}, text)


def _gates(share: float) -> str:
    return f"{percent(share)} of the gates are saturated"


def _through(case: Subject, view: View) -> Tensor | str:
    """(n,) bool: what the climb through ``view`` breaks; a sentence where the model cannot be seen so."""
    try:
        return case.outcome(Viewed(view, case.quick)).broken
    except (ValueError, RuntimeError) as error:  # the model's own words: it takes no soft routing, say
        return f"this model has no {type(view).__name__} view ({str(error).partition(chr(10))[0]:.120})"


@check("R5", "gradients of the views", "attack")
def views(case: Subject) -> Answer:
    """The climb along the exact gradient, the straight-through one and the soft one: the minimum counts. At most
    0.5 point may be broken that no attack of the evaluation breaks; 2 points between the views warn.
    """
    if not case.clean.trace:
        return not_run(NO_ROUTER)
    n = len(case.batch)
    by_view = {"exact": case.outcome(case.quick).broken}
    skipped = []
    for name, view in (("straight-through", StraightThrough()), ("soft", Soft(1.0))):
        seen = _through(case, view)
        if isinstance(seen, str):
            skipped.append(seen)
        else:
            by_view[name] = seen
    extra = case.gained(torch.stack(list(by_view.values())).any(0))
    stand = {name: int((~broken).sum()) for name, broken in by_view.items()}
    apart = max(stand.values()) - min(stand.values())
    status = graded(extra, n, 0.5)
    status = "warn" if status == "pass" and apart > 1 and 100 * apart / n > 2 else status
    said = ", ".join(f"{count} by the {name} gradient" for name, count in stand.items())
    text = "; ".join([f"standing of {n} images: {said}; {extra} broken that the evaluation missed", *skipped])
    return Answer(status, stand, text)


@check("R8", "joint vulnerability", "attack")
@torch.no_grad()
def joint_vulnerability(case: Subject) -> Answer:
    """Each expert attacked alone (every image forced to it), the exact model asked (at most 0.5 point that the
    evaluation missed); and how often an adversarial of one expert is one of another (mean over the pairs).
    """
    trace = case.clean.trace
    experts = min((r.num_experts for r in trace.values()), default=0)
    if experts < 2:
        return not_run(NO_ROUTER if not trace else "there is only one expert")
    experts, n, y = min(experts, MOST_EXPERTS), len(case.batch), case.batch.y
    free = detach(trace)
    by_expert, matrix = [], []
    for expert in range(experts):
        left = case.outcome(Viewed(ExpertView(expert), case.quick))
        by_expert.append(left.broken)
        row = []
        for judge in range(experts):
            forced = to_expert(free, judge)
            right = case.model.run(case.batch.x, forced=forced).logits.argmax(1) == y
            wrong = case.model.run(left.x_adv, forced=forced).logits.argmax(1) != y
            row.append(float((right & wrong).sum() / right.sum().clamp(min=1)))
        matrix.append(row)
    extra = case.gained(torch.stack(by_expert).any(0))
    shared = sum(matrix[i][j] for i in range(experts) for j in range(experts) if i != j) / (experts * (experts - 1))
    text = (
        f"an adversarial of one of {experts} experts breaks another in {percent(shared)} of the cases; attacks on "
        f"single experts break {extra} of {n} images that the evaluation missed"
    )
    return Answer(graded(extra, n, 0.5), matrix, text)


@check("R11", "auxiliary terms", "attack")
@torch.no_grad()
def auxiliary(case: Subject) -> Answer:
    """The loss that each attack climbs is that of the logits and the label, recomputed here, and nothing else (no
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
        return not_run(f"the attacks climb no loss of the label ({', '.join(sorted(set(skipped)))})")
    text = f"{len(compared)} attack loss(es) differ from the loss recomputed from the logits by at most {worst:.2g}"
    return Answer("pass" if worst <= 1e-4 else "fail", worst, text)


def _reference(model: RoutedModel, objective: Objective, x: Tensor, at: Tensor, y: Tensor) -> Tensor | None:
    """The objective's loss at ``at``, worked out from its name alone; None where it is not one of the label."""
    loss = getattr(objective, "loss", None)
    of_routing = objective.needs_router and objective.aims_at_router
    if isinstance(objective, Targeted) or of_routing or loss in (None, "kl"):
        return None
    forced = None if objective.aims_at_router else detach(model.run(x).trace)
    return climb(loss, model.run(at, forced=forced).logits, y).loss


class ScaledRouter(RoutedModel):
    """``inner`` with its logits times ``scale``."""

    def __init__(self, inner: RoutedModel, scale: float) -> None:
        super().__init__()
        self.inner = inner
        self.scale = scale

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        return self.inner.ask(x, tape) * self.scale


@check("R12", "logit scale", "attack")
def logit_scale(case: Subject) -> Answer:
    """Cross-entropy on logits times 0.1, 10 and 100 breaks at most 0.5 point more than the evaluation did: large
    logits saturate the loss, small ones flatten it, and the prediction is the same.
    """
    n, attack = len(case.batch), with_loss(case.quick, "ce")
    by_scale = {}
    for scale in (0.1, 1.0, 10.0, 100.0):
        by_scale[f"{scale:g}"] = case.outcome(attack, ScaledRouter(case.model, scale) if scale != 1 else None).broken
    extra = case.gained(torch.stack(list(by_scale.values())).any(0))
    counts = {scale: int(broken.sum()) for scale, broken in by_scale.items()}
    said = ", ".join(f"{count} at x {scale}" for scale, count in counts.items())
    text = f"of {n} images, cross-entropy on scaled logits breaks {said}; {extra} that the evaluation missed"
    return Answer(graded(extra, n, 0.5), counts, text)


@check("R15", "planted route change", "model")
def planted_route(case: Subject, images: int = 8) -> Answer:
    """The evaluation's attacks, against a built-in model whose adversarials lie behind a change of routing alone
    (`planted.PlantedRoute`): a test of the suite, not of the model.
    """
    if not case.clean.trace:
        return not_run(NO_ROUTER)
    shape = tuple(case.batch.x.shape[1:])
    model = PlantedRoute(case.threat, (shape[0], shape[1], shape[2])).to(case.batch.x.device).eval()
    x = model.images(images, (shape[0], shape[1], shape[2]))
    y = torch.zeros(images, dtype=torch.int64, device=x.device)
    index = torch.arange(images, device=x.device)
    broken = torch.zeros(images, dtype=torch.bool, device=x.device)
    for attack in case.attacks:
        x_adv = attack(model, x, y, Noise.of(index, attack.seed))
        with torch.no_grad():
            broken |= (model(x_adv).argmax(1) != y) & in_ball_and_box(attack.threat, x_adv, x)
    hits = int(broken.sum())
    text = f"the attacks find {hits} of {images} adversarials behind a planted change of routing"
    if hits < images:
        text += "; add router_only or route_flip"
    return Answer(graded(images - hits, images, 5.0), hits / images, text)
