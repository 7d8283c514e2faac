"""Checks of the attack's strength (G4 to G13): does it climb to the end, and find what other attacks find?"""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import torch
from torch import Tensor

from robustmoe import analysis
from robustmoe.attacks import FGSM, PGD, Targeted, at_radius, changed, evaluating
from robustmoe.attacks.fmn import FMN
from robustmoe.attacks.square import Square
from robustmoe.attacks.threat import Threat
from robustmoe.evaluation.checks.gradients import losses_of
from robustmoe.evaluation.checks.planted import plant
from robustmoe.evaluation.checks.registry import Answer, check, not_run
from robustmoe.evaluation.checks.subject import (
    STANDS_NONE,
    Outcome,
    Subject,
    Watched,
    few,
    graded,
    in_ball_and_box,
    percent,
    with_loss,
)
from robustmoe.noise import Noise


def _watched(case: Subject) -> tuple[Outcome, Tensor]:
    """The main attack once more (a climb in its place where it is costly), every pass watched: what it left, and the
    margins (passes, n) it saw on the way.
    """
    attack = case.main if case.main.queries(case.clean) <= 2000 else case.climber
    watched = Watched(case.model, case.batch.x, case.batch.y, case.threat)
    outcome = case.outcome(attack, watched)
    margins = torch.stack(watched.margins) if watched.margins else torch.empty(0, len(case.batch))
    return outcome, margins


@check("G4", "silent success", "attack")
def silent_success(case: Subject) -> Answer:
    """images of which some iterate inside the ball was misclassified, and the returned one is not (Pintor et al.
    2022, indicator 3).
    """
    outcome, margins = _watched(case)
    reached = (margins > 0).any(0)  # nan is no success
    lost = int((reached & ~outcome.broken).sum())
    text = f"{lost} of {int(reached.sum())} images that the attack broke on its way are returned unbroken"
    return Answer("fail" if lost else "pass", lost, text)


@check("G5", "incomplete optimisation", "attack")
def incomplete(case: Subject) -> Answer:
    """the share of standing images whose best margin still rises, by more than 1 % of its whole rise, in the last
    tenth of the passes (Pintor et al. 2022, indicator 4).
    """
    outcome, margins = _watched(case)
    stands = ~outcome.broken
    if not bool(stands.any()) or len(margins) < 3:
        return not_run(STANDS_NONE if len(margins) >= 3 else f"the attack looks {len(margins)} time(s) only")
    best = margins.nan_to_num(nan=-math.inf).cummax(0).values[:, stands]
    asked = torch.isfinite(best[0])
    late = best[-1] - best[-1 - max(1, len(best) // 10)]
    rising = asked & (late > 0.01 * (best[-1] - best[0]))
    share = float(rising.float().mean())
    text = f"the margin of {percent(share)} of {int(stands.sum())} standing images still rises in the last tenth"
    return Answer("pass" if share <= 0.05 else "warn", share, text)


@check("G6", "transfer failure", "attack")
def transfer(case: Subject) -> Answer:
    """successes that the attacks claim by the model they climb and the exact model does not confirm (Pintor et al.
    2022, indicator 5): the main attack's own score, and a fresh copy of the model.
    """
    attack, x, y = case.main, case.batch.x, case.batch.y
    outcome = case.outcome(attack)
    with torch.no_grad(), evaluating(case.model):
        claimed = attack.objective(case.model, x, y)(outcome.x_adv).fooled
        climbed = getattr(attack, "view", None)
    n = len(x)
    lost = int((claimed & ~outcome.broken).sum())
    text = f"{lost} of {int(claimed.sum())} successes of {attack.objective.name} are not confirmed by the exact model"
    text += "" if climbed is None else f" (it climbs the view {climbed})"
    return Answer(graded(lost, n, 1.0), lost / n, text)


@check("G7", "unbounded attack", "attack")
def unbounded(case: Subject) -> Answer:
    """with no bound to speak of (every image can become any other) the attack breaks everything, and at half of
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
            stands = stands[~inner.outcome(attack).broken]
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
    return Answer(status, {"full": full, "half": half}, text)


@check("G8", "accuracy against radius", "attack")
def radii(case: Subject, radii: int = 8) -> Answer:
    """accuracy does not rise with the radius, and the minimal-norm attack (FMN, Pintor et al. 2021) breaks nothing
    within the evaluation's radius that the evaluation missed (more than 0.5 point). Where it breaks more within some
    radius than the climb at that radius, the check warns: other attacks of the evaluation may stand in for the climb.
    """
    n, top = len(case.batch), 1.0 if case.threat.norm == "linf" else math.inf
    values = sorted({min(top, 2 * case.threat.eps * (i + 1) / radii) for i in range(radii)})
    broken = {eps: case.outcome(at_radius(case.quick, eps)).broken for eps in values}
    counts = [int((~broken[eps]).sum()) for eps in values]
    rise = max((later - earlier for earlier, later in itertools.pairwise(counts)), default=0)
    text = f"accuracy rises by {max(rise, 0)} of {n} images between two of {len(values)} radii"
    minimal = FMN(Threat(case.threat.norm, values[-1]), steps=100, seed=case.seed)
    left = case.outcome(minimal)
    size = minimal.threat.size(left.x_adv - case.batch.x)
    hits = [int((left.broken & (size <= analysis.ball_limit(eps))).sum()) for eps in values]
    below = max(hit - (n - count) for hit, count in zip(hits, counts))
    gained = case.gained(left.broken & (size <= analysis.ball_limit(case.threat.eps)))
    weaker = "pass" if below <= 0 else "warn"
    grades = (weaker, *(graded(images, n, 0.5) for images in (rise, gained)))
    text += f"; FMN breaks at most {max(below, 0)} more within a radius, and at the evaluation's own {gained} it missed"
    value = {"radii": values, "accuracy": [c / n for c in counts], "fmn": below, "missed": gained}
    return Answer(max(grades, key=("pass", "warn", "fail").index), value, text)


@check("G9", "more steps and restarts", "attack")
def converged(case: Subject) -> Answer:
    """one step is weaker than many, and twice the steps or twice the restarts break at most 0.5 point of the images
    that no attack of the evaluation broke.
    """
    n, climb = len(case.batch), cast(PGD, case.quick)
    single = FGSM(case.threat, objective=climb.objective, seed=climb.seed)
    ahead = int(case.outcome(single).broken.sum()) - int(case.outcome(climb).broken.sum())
    longer = case.outcome(changed(climb, steps=2 * climb.steps)).broken
    often = case.outcome(changed(climb, restarts=2 * climb.restarts)).broken
    gain = [case.gained(broken) for broken in (longer, often)]
    status = max((graded(more, n, 0.5) for more in (ahead, *gain)), key=("pass", "warn", "fail").index)
    text = (
        f"twice the steps break {gain[0]} more of {n} images, twice the restarts {gain[1]}; one step breaks "
        f"{abs(ahead)} {'more' if ahead > 0 else 'fewer'} than {climb.steps}"
    )
    return Answer(status, {"steps": gain[0], "restarts": gain[1], "one step": ahead}, text)


@check("G10", "black box", "attack")
def black_box(case: Subject, points: int = 200, queries: int = 500) -> Answer:
    """on the images that stand, neither the best of ``points`` random points of the ball nor Square
    (Andriushchenko et al. 2020) finds an adversarial in more than 0.2 point of the images (AutoAttack's alpha).
    """
    n, rows = len(case.batch), torch.nonzero(~case.broken)[:, 0]
    if len(rows) == 0:
        return not_run(STANDS_NONE)
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
    by_square = inner.outcome(square).broken
    both = int((drawn | by_square).sum())
    text = (
        f"on {len(rows)} standing images, {points} random points break {int(drawn.sum())} and Square with {queries} "
        f"queries {int(by_square.sum())}"
    )
    return Answer(graded(both, n, 0.2), {"random": int(drawn.sum()), "square": int(by_square.sum())}, text)


@check("G11", "losses", "attack")
def losses_agree(case: Subject) -> Answer:
    """the climb on cross-entropy, margin, DLR and the first rival: accuracies within 2 points of each other."""
    n, climb = len(case.batch), case.quick
    broken: dict[str, Tensor] = {}
    for loss in losses_of(case.model, case.batch.x):
        broken[loss] = case.outcome(with_loss(climb, loss)).broken
    classes = case.clean.logits.shape[1]
    if classes >= 3:
        rival: Any = Targeted(2, "dlr" if classes >= 4 else "margin")
        broken["targeted"] = case.outcome(changed(climb, objective=rival)).broken
    stand = {loss: int((~fooled).sum()) for loss, fooled in broken.items()}
    spread = max(stand.values()) - min(stand.values())
    extra = case.gained(torch.stack(list(broken.values())).any(0))
    weak, strong = max(stand, key=lambda loss: stand[loss]), min(stand, key=lambda loss: stand[loss])
    text = (
        f"{strong} leaves {stand[strong]} of {n} images standing and {weak} {stand[weak]}; together they break {extra} "
        "that the evaluation missed"
    )
    worse = 100 * spread / n > 2 and spread > 1
    return Answer("warn" if worse or graded(extra, n, 2.0) == "fail" else "pass", stand, text)


@check("G12", "seeds", "attack")
def seeds(case: Subject, seeds: int = 3) -> Answer:
    """the same climb from three seeds; a spread above 1 point (and above one image) warns."""
    n, climb = len(case.batch), case.quick
    stand = [int((~case.outcome(changed(climb, seed=climb.seed + i)).broken).sum()) for i in range(seeds)]
    spread = max(stand) - min(stand)
    low, high = analysis.wilson(stand[0], n)
    text = (
        f"{seeds} seeds leave {min(stand)} to {max(stand)} of {n} images standing; the 95 % interval with so many is "
        f"{100 * low:.0f} to {100 * high:.0f} %"
    )
    return Answer("warn" if spread > 1 and 100 * spread / n > 1 else "pass", stand, text)


@check("G13", "planted adversarial", "attack")
def planted(case: Subject, images: int = 32) -> Answer:
    """an adversarial is planted into the ball of each image (`planted.plant`); the evaluation's attacks, one
    after the other, must find one in at least 95 % (Zimmermann et al. 2022).
    """
    costly = case.main.queries(case.clean) > 2000
    part = few(case, 8 if costly else images).batch
    sown = plant(case.model, part.x, part.y, case.threat, Noise.of(part.index, case.seed))
    if sown is None:
        text = (
            f"no adversarial could be planted: random points of the ball do not move the logits of {len(part)} images"
        )
        return not_run(text)
    model, rows, _ = sown
    x, y, index = part.x[rows], part.y[rows], part.index[rows]
    hit = torch.zeros(len(rows), dtype=torch.bool, device=x.device)
    for attack in case.attacks:
        left = torch.nonzero(~hit)[:, 0]
        if len(left) == 0:
            break
        x_adv = x.clone()
        x_adv[left] = attack(model, x[left], y[left], Noise.of(index[left], attack.seed))
        hit |= model.missed(x_adv) & in_ball_and_box(attack.threat, x_adv, x)
    total, hits = len(rows), int(hit.sum())
    text = f"the attacks find {hits} of {total} planted adversarials"
    return Answer(graded(total - hits, total, 5.0), hits / total, text)
