"""G1 to G14: does the attack have a gradient, is the gradient right, and is the attack as strong as it should be?"""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any, cast

import torch
from torch import Tensor

from robustmoe import analysis
from robustmoe import spec as specs
from robustmoe.attacks import FGSM, PGD, Attack, Joint, Targeted, at_radius, changed, evaluating
from robustmoe.attacks.apgd import APGD, TargetedAPGD
from robustmoe.attacks.fab import FAB
from robustmoe.attacks.fmn import FMN
from robustmoe.attacks.objectives import Loss, loss_of
from robustmoe.attacks.square import Square
from robustmoe.attacks.threat import Threat
from robustmoe.data import Batch
from robustmoe.errors import UserError
from robustmoe.evaluation.checks.planted import plant
from robustmoe.evaluation.checks.subject import (
    STANDS_NONE,
    Found,
    Subject,
    Watched,
    check,
    doubled,
    few,
    graded,
    gradient,
    inside,
    not_run,
    percent,
    with_loss,
)
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.records import Check
from robustmoe.routing import Trace, detach

ZERO_SHARE = 0.05
"""Check G1: a larger share of images without gradient fails."""

APART, OFTEN = 0.05, 0.1
"""Check G2: a derivative is wrong above the first relative error; more wrong ones than the second are reported."""


def gradients(model: RoutedModel, attack: Attack, batch: Batch) -> Check:
    """G1: the share of images at which the attack's own loss has no gradient, at its random start (a KL is flat at the
    clean image). Such an image is not attacked, and reads as robust (Athalye et al. 2018).
    """
    with evaluating(model):
        inner = attack.objective(model, batch.x, batch.y)
        start = attack.threat.start(batch.x, Noise.of(batch.index, attack.seed))
        flat = _flat(gradient(lambda x: inner(x).loss, start))
    share = float(flat.float().mean())
    status = "pass" if share == 0 else "warn" if share <= ZERO_SHARE else "fail"
    text = f"the attack's loss has no gradient at {100 * share:.3g} % of {len(batch)} images"
    return check("G1", status, share, text)


def _flat(found: Tensor) -> Tensor:
    """(n,) bool: a gradient that is zero, or not a number."""
    total = found.flatten(1).abs().sum(1)
    return (total == 0) | ~torch.isfinite(total)


def losses_of(model: RoutedModel, x: Tensor) -> list[Loss]:
    """The losses that a model with so many classes has."""
    with torch.no_grad():
        classes = model.run(x[:1]).logits.shape[1]
    return ["ce", "margin", "dlr"] if classes >= 3 else ["ce", "margin"]


def flat_along(case: Subject) -> Check:
    """G1, deep: the share of images without gradient for cross-entropy, margin and DLR, at the random start and, where
    the image still stands, at what the main attack left.
    """
    x, y, n = case.batch.x, case.batch.y, len(case.batch)
    start = case.threat.start(x, case.noise(case.main.seed))
    left = case.under(case.main)
    shares: dict[str, float] = {}
    worst = 0
    with evaluating(case.model):
        for loss in losses_of(case.model, x):

            def value(at: Tensor, loss: Loss = loss) -> Tensor:
                return loss_of(loss, case.model.run(at).logits, y)

            at_start = _flat(gradient(value, start))
            at_end = _flat(gradient(value, left.x_adv)) & ~left.broken
            shares[f"{loss}, start"], shares[f"{loss}, end"] = (float(f.float().mean()) for f in (at_start, at_end))
            worst = max(worst, int(at_start.sum()), int(at_end.sum()))
    which = max(shares, key=lambda name: shares[name])
    text = f"at most {worst} of {n} images have no gradient ({which} of the run), over {len(shares) // 2} losses"
    return check("G1", graded(worst, n, 0.0), shares, text)


# ------------------------------------------------------------------------------------------------ the gradient itself


def finite_differences(case: Subject, directions: int = 8) -> Check:
    """G2: the directional derivative of the margin by central differences against autograd, at a random point of the
    ball, in float64 (step 1e-6) where the model can be copied, else in float32 (step 1e-3).

    Straight-through estimates and masked gradients show here. Where the two agree as soon as the route is held, the
    router's gradient alone is an estimate: that is a property of the gate, declared, and warns; else the check fails.
    An error counts as relative to the derivative or to the gradient's norm, whichever is larger, so that a direction
    across the gradient is no accident.
    """
    x, y = case.batch.x, case.batch.y
    start = case.threat.start(x, case.noise(case.seed))
    wide = doubled(case.model, x)
    model, at = (case.model, start) if wide is None else (wide, start.double())
    with torch.no_grad():
        trace = detach(model.run(at).trace)
    share = _disagreement(case, model, at, y, None, directions)
    how = f"{directions} directions, {'float32' if wide is None else 'float64'}"
    text = f"autograd is more than 5 % off the finite difference at {percent(share)} of {len(x)} images x {how}"
    if share <= OFTEN:
        return check("G2", "pass", share, text)
    if trace:
        held = _disagreement(case, model, at, y, trace, directions)
        if held <= OFTEN:
            text += f"; {percent(held)} with the route held: the router's gradient is an estimate (straight-through)"
            return check("G2", "warn", share, text)
    return check("G2", "fail", share, f"{text}: the gradient is not that of the model")


def _disagreement(
    case: Subject, model: RoutedModel, x: Tensor, y: Tensor, forced: Trace | None, directions: int
) -> float:
    """The share of (image, direction) at which the two derivatives differ."""
    single = x.dtype == torch.float32
    step = 1e-3 if single else 1e-6

    def margin(at: Tensor) -> Tensor:
        return loss_of("margin", model.run(at, forced=forced).logits, y)

    with evaluating(model):
        slope = gradient(margin, x)
        wrong = []
        for direction in range(directions):
            sign = 1 - 2 * (case.noise(case.seed).fold(2, direction).uniform(*x.shape[1:]) < 0.5).to(x)
            with torch.no_grad():
                ahead, behind = margin(x + step * sign), margin(x - step * sign)
            measured = (ahead - behind) / (2 * step)
            told = (slope * sign).flatten(1).sum(1)
            norm = slope.flatten(1).norm(dim=1)
            rounding = torch.finfo(x.dtype).eps * 10 * (ahead.abs() + behind.abs()) / step
            size = torch.stack([measured.abs(), told.abs(), norm]).amax(0)
            wrong.append(~((measured - told).abs() <= APART * size + rounding))  # NaN is wrong
    return float(torch.stack(wrong).float().mean())


def instability(case: Subject, draws: int = 5) -> Check:
    """G3: how much of the loss changes under random noise of a tenth of the radius, at what the attack left: mean
    |change| over mean loss (Pintor et al. 2022, indicator 2). A gradient of a loss that jumps says nothing of the way.
    """
    x, y = case.batch.x, case.batch.y
    at = case.under(case.main).x_adv
    small = Threat(case.threat.norm, case.threat.eps / 10)
    with torch.no_grad():
        loss = loss_of("ce", case.model.run(at).logits, y)
        changes = []
        for draw in range(draws):
            near = case.threat.project(small.start(at, case.noise(case.seed).fold(3, draw)), x)
            changes.append((loss_of("ce", case.model.run(near).logits, y) - loss).abs())
    total = float(loss.mean())
    if total == 0:
        return check("G3", "warn", None, f"the cross-entropy is exactly 0 on all {len(x)} images: nothing to climb")
    change = float(torch.stack(changes).mean()) / total
    text = f"noise of a tenth of the radius changes the loss by {percent(change)} of its mean"
    return check("G3", "pass" if change <= 0.1 else "warn", change, text)


# ------------------------------------------------------------------------------------------------ the climb


def _watched(case: Subject) -> tuple[Found, Tensor]:
    """The main attack once more (a climb in its place where it is costly), every pass watched: what it left, and the
    margins (passes, n) it saw on the way.
    """
    attack = case.main if case.main.queries(case.clean) <= 2000 else case.climber
    watched = Watched(case.model, case.batch.x, case.batch.y, case.threat)
    found = case.under(attack, watched)
    margins = torch.stack(watched.margins) if watched.margins else torch.empty(0, len(case.batch))
    return found, margins


def silent_success(case: Subject) -> Check:
    """G4: images of which some iterate inside the ball was misclassified, and the returned one is not (Pintor et al.
    2022, indicator 3).
    """
    found, margins = _watched(case)
    reached = (margins > 0).any(0)  # nan is no success
    lost = int((reached & ~found.broken).sum())
    text = f"{lost} of {int(reached.sum())} images that the attack broke on its way are returned unbroken"
    return check("G4", "fail" if lost else "pass", lost, text)


def incomplete(case: Subject) -> Check:
    """G5: the share of standing images whose best margin still rises, by more than 1 % of its whole rise, in the last
    tenth of the passes (Pintor et al. 2022, indicator 4).
    """
    found, margins = _watched(case)
    stands = ~found.broken
    if not bool(stands.any()) or len(margins) < 3:
        return not_run("G5", STANDS_NONE if len(margins) >= 3 else f"the attack looks {len(margins)} time(s) only")
    best = margins.nan_to_num(nan=-math.inf).cummax(0).values[:, stands]
    asked = torch.isfinite(best[0])
    late = best[-1] - best[-1 - max(1, len(best) // 10)]
    rising = asked & (late > 0.01 * (best[-1] - best[0]))
    share = float(rising.float().mean())
    text = f"the margin of {percent(share)} of {int(stands.sum())} standing images still rises in the last tenth"
    return check("G5", "pass" if share <= 0.05 else "warn", share, text)


def transfer(case: Subject) -> Check:
    """G6: successes that the attacks claim by the model they climb and the exact model does not confirm (Pintor et al.
    2022, indicator 5): the main attack's own score, and a fresh copy of the model.
    """
    attack, x, y = case.main, case.batch.x, case.batch.y
    found = case.under(attack)
    with torch.no_grad(), evaluating(case.model):
        claimed = attack.objective(case.model, x, y)(found.x_adv).fooled
        climbed = getattr(attack, "view", None)
    n = len(x)
    lost = int((claimed & ~found.broken).sum())
    text = f"{lost} of {int(claimed.sum())} successes of {attack.objective.name} are not confirmed by the exact model"
    text += "" if climbed is None else f" (it climbs the view {climbed})"
    return check("G6", graded(lost, n, 1.0), lost / n, text)


def unbounded(case: Subject) -> Check:
    """G7: with no bound to speak of (every image can become any other) the attack breaks everything, and at half of
    it, where every image can be grey, no more than chance is left (Athalye et al. 2018; Carlini et al. 2019). The
    climb of 50 steps, once with large and, where that failed, once with small ones.
    """
    size, classes = case.batch.x[0].numel(), case.clean.logits.shape[1]
    whole = {"linf": 1.0, "l2": size**0.5, "l1": float(size)}[case.threat.norm]
    n = len(case.batch)
    left = []
    for eps in (whole / 2, whole):
        stands = case.batch
        for part in (4, 40):
            attack = PGD(
                Threat(case.threat.norm, eps), steps=50, step_size=eps / part, objective=case.quick.objective,
                keep="first", seed=case.seed,
            )  # fmt: skip
            inner = Subject(case.model, (attack,), stands, stands)
            stands = stands[torch.nonzero(~inner.under(attack).broken)[:, 0]]
            if len(stands) == 0:
                break
        left.append(len(stands))
    half, full = left
    low, _ = analysis.wilson(half, n)
    status = "fail" if full or low > 1 / classes else "pass"
    text = (
        f"{full} of {n} images survive {case.threat.norm} {whole:.4g} (expected 0), {half} survive {whole / 2:.4g} "
        f"(chance is {percent(1 / classes)})"
    )
    return check("G7", status, {"full": full, "half": half}, text)


def radii(case: Subject, radii: int = 8) -> Check:
    """G8: accuracy does not rise with the radius, and the minimal-norm attack (FMN, Pintor et al. 2021) breaks nothing
    within the evaluation's radius that the evaluation missed (more than 0.5 point). Where it breaks more within some
    radius than the climb at that radius, the check warns: other attacks of the evaluation may stand in for the climb.
    """
    n, top = len(case.batch), 1.0 if case.threat.norm == "linf" else math.inf
    values = sorted({min(top, 2 * case.threat.eps * (i + 1) / radii) for i in range(radii)})
    broken = {eps: case.under(at_radius(case.quick, eps)).broken for eps in values}
    counts = [int((~broken[eps]).sum()) for eps in values]
    rise = max((later - earlier for earlier, later in itertools.pairwise(counts)), default=0)
    text = f"accuracy rises by {max(rise, 0)} of {n} images between two of {len(values)} radii"
    minimal = FMN(Threat(case.threat.norm, values[-1]), steps=100, seed=case.seed)
    left = case.under(minimal)
    size = minimal.threat.size(left.x_adv - case.batch.x)
    found = [int((left.broken & (size <= eps * (1 + 1e-5) + 1e-7)).sum()) for eps in values]
    below = max(hits - (n - count) for hits, count in zip(found, counts))
    gained = case.gained(left.broken & (size <= case.threat.eps * (1 + 1e-5) + 1e-7))
    weaker = "pass" if below <= 0 else "warn"
    grades = (weaker, *(graded(images, n, 0.5) for images in (rise, gained)))
    text += f"; FMN breaks at most {max(below, 0)} more within a radius, and at the evaluation's own {gained} it missed"
    value = {"radii": values, "accuracy": [c / n for c in counts], "fmn": below, "missed": gained}
    return check("G8", max(grades, key=("pass", "warn", "fail").index), value, text)


def converged(case: Subject) -> Check:
    """G9: one step is weaker than many, and twice the steps or twice the restarts break at most 0.5 point of the images
    that no attack of the evaluation broke.
    """
    n, climb = len(case.batch), cast(PGD, case.quick)
    one = FGSM(case.threat, objective=climb.objective, seed=climb.seed)
    ahead = int(case.under(one).broken.sum()) - int(case.under(climb).broken.sum())
    longer = case.under(changed(climb, steps=2 * climb.steps)).broken
    often = case.under(changed(climb, restarts=2 * climb.restarts)).broken
    gain = [case.gained(broken) for broken in (longer, often)]
    status = max((graded(found, n, 0.5) for found in (ahead, *gain)), key=("pass", "warn", "fail").index)
    text = (
        f"twice the steps break {gain[0]} more of {n} images, twice the restarts {gain[1]}; one step breaks "
        f"{abs(ahead)} {'more' if ahead > 0 else 'fewer'} than {climb.steps}"
    )
    return check("G9", status, {"steps": gain[0], "restarts": gain[1], "one step": ahead}, text)


def black_box(case: Subject, points: int = 200, queries: int = 500) -> Check:
    """G10: on the images that stand, neither the best of ``points`` random points of the ball nor Square
    (Andriushchenko et al. 2020) finds an adversarial in more than 0.2 point of the images (AutoAttack's alpha).
    """
    n, rows = len(case.batch), torch.nonzero(~case.broken)[:, 0]
    if len(rows) == 0:
        return not_run("G10", STANDS_NONE)
    stands = case.batch[rows]
    drawn = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    with torch.no_grad():
        for draw in range(points):
            noise = Noise.of(stands.index, case.seed).fold(10, draw)
            x = case.threat.start(stands.x, noise)
            if draw % 2:  # the ball's corners, where most adversarials are
                push = case.threat.direction(noise.normal(*x.shape[1:]).to(x), x)
                x = case.threat.project(stands.x + case.threat.eps * push, stands.x)
            drawn |= case.model.run(x).logits.argmax(1) != stands.y
    square = Square(case.threat, steps=queries, rescale=True, seed=case.seed)
    inner = Subject(case.model, (square,), stands, stands)
    found = inner.under(square).broken
    both = int((drawn | found).sum())
    text = (
        f"on {len(rows)} standing images, {points} random points break {int(drawn.sum())} and Square with {queries} "
        f"queries {int(found.sum())}"
    )
    return check("G10", graded(both, n, 0.2), {"random": int(drawn.sum()), "square": int(found.sum())}, text)


def losses_agree(case: Subject) -> Check:
    """G11: the climb on cross-entropy, margin, DLR and the first rival: accuracies within 2 points of each other."""
    n, climb = len(case.batch), case.quick
    found: dict[str, Tensor] = {}
    for loss in losses_of(case.model, case.batch.x):
        found[loss] = case.under(with_loss(climb, loss)).broken
    classes = case.clean.logits.shape[1]
    if classes >= 3:
        rival: Any = Targeted(2, "dlr" if classes >= 4 else "margin")
        found["targeted"] = case.under(changed(climb, objective=rival)).broken
    stand = {loss: int((~broken).sum()) for loss, broken in found.items()}
    spread = max(stand.values()) - min(stand.values())
    extra = case.gained(torch.stack(list(found.values())).any(0))
    weak, strong = max(stand, key=lambda loss: stand[loss]), min(stand, key=lambda loss: stand[loss])
    text = (
        f"{strong} leaves {stand[strong]} of {n} images standing and {weak} {stand[weak]}; together they break {extra} "
        "that the evaluation missed"
    )
    worse = 100 * spread / n > 2 and spread > 1
    return check("G11", "warn" if worse or graded(extra, n, 2.0) == "fail" else "pass", stand, text)


def seeds(case: Subject, seeds: int = 3) -> Check:
    """G12: the same climb from three seeds; a spread above 1 point (and above one image) warns."""
    n, climb = len(case.batch), case.quick
    stand = [int((~case.under(changed(climb, seed=climb.seed + i)).broken).sum()) for i in range(seeds)]
    spread = max(stand) - min(stand)
    low, high = analysis.wilson(stand[0], n)
    text = (
        f"{seeds} seeds leave {min(stand)} to {max(stand)} of {n} images standing; the 95 % interval with so many is "
        f"{100 * low:.0f} to {100 * high:.0f} %"
    )
    return check("G12", "warn" if spread > 1 and 100 * spread / n > 1 else "pass", stand, text)


def planted(case: Subject, images: int = 32) -> Check:
    """G13: an adversarial is planted into the ball of each image (`planted.plant`); the evaluation's attacks, one
    after the other, must find one in at least 95 % (Zimmermann et al. 2022).
    """
    costly = case.main.queries(case.clean) > 2000
    part = few(case, 8 if costly else images).batch
    sown = plant(case.model, part.x, part.y, case.threat, Noise.of(part.index, case.seed))
    if sown is None:
        text = (
            f"no adversarial could be planted: random points of the ball do not move the logits of {len(part)} images"
        )
        return not_run("G13", text)
    model, rows, _ = sown
    x, y, index = part.x[rows], part.y[rows], part.index[rows]
    found = torch.zeros(len(rows), dtype=torch.bool, device=x.device)
    for attack in case.attacks:
        left = torch.nonzero(~found)[:, 0]
        if len(left) == 0:
            break
        x_adv = x.clone()
        x_adv[left] = attack(model, x[left], y[left], Noise.of(index[left], attack.seed))
        found |= model.missed(x_adv) & inside(attack.threat, x_adv, x)
    total, hits = len(rows), int(found.sum())
    text = f"the attacks find {hits} of {total} planted adversarials"
    return check("G13", graded(total - hits, total, 5.0), hits / total, text)


# ------------------------------------------------------------------------------------------------ what was run


def attack_identity(attack: Attack, output: Output) -> Check:
    """G14: the attack's text and that of its parts, hashed; the label "AutoAttack standard" only where every part is
    the definition's.
    """
    text = " + ".join([_written(attack), *(f"{name}: {_written(part)}" for name, part in attack.parts(output) if name)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    named = label(attack, output)
    said = f"this is {named}" if named else "no published name is claimed for it"
    return check("G14", "pass", {"text": text, "hash": digest, "label": named}, f"{text} ({digest}): {said}")


def _written(attack: Attack) -> str:
    try:
        return specs.text(attack)
    except UserError:
        return repr(attack) if hasattr(attack, "__dataclass_fields__") else type(attack).__name__


def label(attack: Attack, output: Output) -> str | None:
    """The published name that the parts of ``attack`` are entitled to, for a model that gave ``output``: "AutoAttack
    standard", or None. Croce and Hein (2020) and the released ``version="standard"`` of each norm, every number of it.
    Batch size, stream of random numbers and what is returned do not change what is broken, so they are free.
    """
    classes, norm = output.logits.shape[1], attack.threat.norm
    if classes < 4:  # the released targeted DLR does not exist
        return None
    large = norm == "l1"
    towards = min(5 if large else 9, classes - 1)
    climb = {"steps": 100, "rho": 0.75, "eot": 1}
    definition: list[tuple[type[Attack], dict[str, Any]]] = [
        (APGD, {**climb, "restarts": 5 if large else 1, "objective": Joint("ce")}),
        (TargetedAPGD, {**climb, "restarts": 1, "targets": towards, "loss": "dlr"}),
        (
            FAB,
            {"steps": 100, "restarts": 1, "targets": min(9, classes - 1), "alpha_max": 0.1, "eta": 1.05, "beta": 0.9},
        ),
        (Square, {"steps": 5000, "restarts": 1, "p_init": 0.8, "rescale": False, "loss": "margin"}),
    ]
    parts = [part for _, part in attack.parts(output)]
    if len(parts) != len(definition):
        return None
    for part, (kind, fields) in zip(parts, definition):
        told = {name: getattr(part, name, None) for name in fields}
        if "targets" in told:
            told["targets"] = min(cast(int, told["targets"] or 0), classes - 1)
        wide = getattr(part, "largereps", None)
        if type(part) is not kind or part.threat != attack.threat or told != fields or wide not in (None, large):
            return None
    return "AutoAttack standard"
