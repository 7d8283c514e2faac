"""What quick_verdict leaves beside autoattack_routing, in passes; and what its parts were learned from.

python -m benchmarks.quick_verdict [--cifar10 FOLDER] [--source NAME=PATH ...] [--nets NET ...] [--runs FOLDER]
python -m benchmarks.quick_verdict --learn [--cifar10 FOLDER] [--nets NET ...]

Nets of the zoo, a dual model of two of them, and nets around layers that others published (benchmarks/public_models.py,
trained adversarially on digits as benchmarks/reaudit.py trains them; their weights stay in --runs). Both suites attack
the same images, those of the test set from the 120th on that the net gets right, each part those that the parts before
it left, by a frozen copy; the exact model judges, and every pass is counted as an evaluation counts it: an image
forward is 1, with a gradient 3. --learn runs every candidate on all of the first *validation* images that a net gets
right, those that other candidates broke too, and puts them in order: the one that breaks most of what is left for a
pass comes next, until nothing is left that any of them breaks. Writes docs/results/quick_verdict.json as it goes; nets
that are not asked for keep their numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from benchmarks.results import RESULTS, described, write
from torch import Tensor

import robustmoe as rm
from robustmoe import spec as specs
from robustmoe.attacks import (
    APGD,
    FAB,
    PGD,
    Attack,
    AutoAttackRouting,
    ExpertTransition,
    Joint,
    Objective,
    OtherRoutes,
    RouteFlip,
    Score,
    Soft,
    Square,
    TargetedAPGD,
    Threat,
    Viewed,
    build_attack,
    image_routers,
    linf,
    missed,
    part_noise,
)
from robustmoe.attacks.boundary import dual_size
from robustmoe.attacks.losses import loss_of
from robustmoe.attacks.objectives import Inner, some, towards
from robustmoe.attacks.pgd import ascend
from robustmoe.attacks.together import room_for
from robustmoe.evaluation.meters import Meter
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.models import Output, RoutedModel
from robustmoe.models.dual import DualModel
from robustmoe.noise import Noise

FILE = RESULTS / "quick_verdict.json"
EPS = {"digits": 0.1, "fashion_mnist": 0.1, "cifar10": 8 / 255, "cifar10_certified": 2 / 255}
SUITES = ("quick_verdict", "autoattack_routing")
LEARN = {
    "digits_dense": 20,
    "digits_pathway": 40,
    "digits_upcycled": 20,
    "cifar10_dense": 40,
    "cifar10_pathway": 30,
    "cifar10_upcycled": 20,
    "digits_vit_moe": 8,
}
"""Nets that the parts are learned from, and how many validation images of each."""

JUDGE = {
    "digits_dense": 50,
    "digits_pathway": 50,
    "digits_upcycled": 40,
    "digits_certified": 50,
    "cifar10_dense": 50,
    "cifar10_pathway": 50,
    "cifar10_certified": 30,
    "advmoe": 40,
    "fashion_mnist_dense": 25,
    "rt_er": 40,
    "cifar10_upcycled": 25,
    "fashion_mnist_pathway": 25,
    "digits_dual": 20,
    "digits_vit_moe": 12,
    "soft_moe": 12,
}
"""Nets that the suite is judged on, and how many test images of each."""

FIRST, BATCH = {"fashion_mnist_dense": 600}, 128
"""The test images before the 120th, of one net before the 600th, were looked at while the suite was made: a first
version, without soft targets and the regions by the margin, left two of 50 too many on digits_pathway, a second one,
without Square, two of 25 on fashion_mnist_dense. Nothing is judged on them.
"""


# ------------------------------------------------------------------------------------------------ nets and images


def net_of(name: str, args: argparse.Namespace) -> RoutedModel:
    """A zoo's net, a dual model of two, or a wrapped one around others' layers."""
    if name == "digits_dual":
        halves = [rm.load_model(f"zoo:digits_{half}") for half in ("pathway", "upcycled")]
        return DualModel(halves[0], halves[1], alpha=0.6).eval()
    if name.split("_")[0] in ("digits", "fashion", "cifar10"):
        return rm.load_model(f"zoo:{name}").eval()
    from benchmarks.public_models import PUBLIC
    from benchmarks.reaudit import DIGITS, first, train

    sources = dict(each.split("=", 1) for each in args.source)
    torch.manual_seed(1)
    net = PUBLIC[name].make(Path(sources[name]) if name in sources else None, DIGITS.images)
    data, file = specs.build("digits", "data"), args.runs / f"{name}.pt"
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
    else:
        train(net, *first(data.train, None), DIGITS, adversarial=True, seed=1)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), file)
    wrapped: RoutedModel = rm.wrap(net.eval(), example=first(data.test, 8)[0])
    return wrapped


def family(name: str) -> str:
    """The data set of a net."""
    return next((each for each in ("fashion_mnist", "cifar10") if name.startswith(each)), "digits")


def threat_of(name: str) -> Threat:
    return linf(EPS.get(name, EPS[family(name)]))


@dataclass
class Case:
    """A net, images that it gets right, and what climbs it; ``meter`` counts."""

    model: RoutedModel
    x: Tensor
    y: Tensor
    index: Tensor
    output: Output
    climbed: RoutedModel
    meter: Meter

    @classmethod
    def of(cls, name: str, split: str, count: int, args: argparse.Namespace) -> Case:
        model = net_of(name, args)
        spec = f"cifar10('{args.cifar10}')" if family(name) == "cifar10" else family(name)
        images = getattr(specs.build(spec, "data"), split)
        first = FIRST.get(name, 120) if split == "test" else 0
        batch = images.batch(list(range(first, min(len(images), first + 6 * count))))
        with torch.no_grad():
            right = torch.nonzero(model(batch.x).argmax(1) == batch.y)[:count, 0]
            x = batch.x[right]
            output, meter = model.run(x), Meter()
        climbed = frozen_copy(model, x, "strict", on_pass=meter.on_pass)
        return cls(model, x, batch.y[right], torch.as_tensor(batch.index)[right], output, climbed, meter)

    def attacked(self, name: str, part: Attack, rows: Tensor) -> tuple[Tensor, int]:
        """Which of the images ``rows`` the exact model misses then, and the passes."""
        before, x = self.meter.queries, self.x[rows]
        with room_for(BATCH):
            x_adv = part(self.climbed, x, self.y[rows], part_noise(Noise.of(self.index[rows], 0), name))
        if float(part.threat.size(x_adv - x).max()) > part.threat.eps * (1 + 1e-5) + 1e-7:
            raise AssertionError(f"{name} left the ball")
        with torch.no_grad():
            return self.model(x_adv).argmax(1) != self.y[rows], self.meter.queries - before


# ------------------------------------------------------------------------------------------------ the two suites


def under(case: Case, suite: str, threat: Threat) -> dict[str, Any]:
    """Which images stand under a suite, part by part, and the passes."""
    stands, parts, begin = torch.ones(len(case.x), dtype=torch.bool), {}, time.process_time()
    for name, part in build_attack(f"{suite}({threat.norm}({threat.eps}))").parts(case.output):
        left = torch.nonzero(stands)[:, 0]
        if len(left) == 0:
            break
        broken, passes = case.attacked(name, part, left)
        stands[left] = ~broken
        parts[name] = {"broke": int(broken.sum()), "passes": passes}
    told = {"index": case.index.tolist(), "stands": stands.tolist()}
    return {**told, "parts": parts, "seconds": round(time.process_time() - begin, 1)}


def judged(
    name: str, count: int, args: argparse.Namespace, kept: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of a net, and every verdict and part behind it. ``kept``: what is known of a suite on these images."""
    case = Case.of(name, "test", count, args)
    each: dict[str, Any] = {suite: under(case, suite, threat_of(name)) for suite in SUITES if suite not in kept} | kept
    quick, whole = (each[suite]["stands"] for suite in SUITES)
    passes = [sum(part["passes"] for part in each[suite]["parts"].values()) for suite in SUITES]
    row = {
        "n": len(quick),
        "whole": {"stand": sum(whole), "passes": passes[1] / len(quick), "seconds": each[SUITES[1]]["seconds"]},
        "quick": {"stand": sum(quick), "passes": passes[0] / len(quick), "seconds": each[SUITES[0]]["seconds"]},
        "differ": sum(a != b for a, b in zip(quick, whole, strict=True)),
        "share": 100 * passes[0] / passes[1],
        "times": passes[1] / passes[0],
    }
    return row, each


# ------------------------------------------------------------------------------------------------ learning


@dataclass(frozen=True)
class ProbabilityMargin(Objective):
    """Best wrong probability minus the label's (Xie et al. 2024, arXiv 2411.15210): a candidate."""

    name: ClassVar[str] = "joint"
    aims_at_router: ClassVar[bool] = True

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            logits, label = model.run(x_adv).logits, some(y, rows)
            return Score(loss_of("margin", logits.softmax(1), label), missed(model, x_adv, logits, label))

        return inner


@dataclass(frozen=True)
class ByLinearity(TargetedAPGD):
    """Targets by the distance of their linearised boundary, logit gap over the dual norm of its gradient: a candidate.
    It costs a gradient for each of the 9 likeliest classes.
    """

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        with torch.no_grad():
            logits = model.run(x).logits.scatter(1, y[:, None], -torch.inf)
        likely = logits.sort(dim=1, descending=True).indices[:, : min(9, logits.shape[1] - 1)]
        distances = []
        for target in likely.T:
            score, gradient = ascend(towards(model, y, target, "margin"), x)
            distances.append(-score.loss / dual_size(self.threat.norm, gradient).clamp(min=1e-12))
        nearest = torch.stack(distances, 1).argsort(1)[:, : self.targets]
        return self.single.climb_towards(likely.gather(1, nearest), model, x, y, noise, self.loss)


def candidates(threat: Threat, output: Output) -> Iterable[tuple[str, Attack]]:
    """Every part that the suite might have, by name; last the parts of autoattack_routing."""
    losses: dict[str, Objective] = {loss: Joint(loss) for loss in ("ce", "margin", "dlr")}  # type: ignore[arg-type]
    losses["probability"] = ProbabilityMargin()
    for loss, objective in losses.items():
        yield f"pgd {loss}, 20", PGD(threat, steps=20, objective=objective, keep="first")
        for steps in (10, 20, 50):
            yield f"apgd {loss}, {steps}", APGD(threat, steps=steps, objective=objective)
    for steps in (20, 50, 100):
        yield f"3 targets by logit, {steps}", TargetedAPGD(threat, targets=3, steps=steps)
        yield f"3 targets by linearity, {steps}", ByLinearity(threat, targets=3, steps=steps)
    yield "9 targets, 30", TargetedAPGD(threat, targets=9, steps=30)
    yield "fab, 3 targets, 30", FAB(threat, targets=3, steps=30)
    yield "square, 300", Square(threat, steps=300)
    whole = AutoAttackRouting(threat)
    yield from whole.parts(output)
    if not whole.routing_parts(output):
        return
    yield from ((f"{name}, 20", part) for name, part in replace(whole, steps=20).routing_parts(output))
    yield "other routes, 20", OtherRoutes(threat, steps=20)
    yield "soft 1, 3 targets, 20", Viewed(Soft(1.0), TargetedAPGD(threat, targets=3, steps=20))
    for loss in ("ce", "margin"):
        yield f"flip {loss}, 10", RouteFlip(threat, steps=10, loss=loss)  # type: ignore[arg-type]
        if image_routers(output.trace):
            yield f"transition {loss}, 10", ExpertTransition(threat, steps=10, loss=loss)  # type: ignore[arg-type]


def learned(name: str, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Of every candidate: which of all images it breaks, its passes, and those of an image that it does not break."""
    case, parts = Case.of(name, "val", count, args), {}
    every = torch.arange(len(case.x))
    for part_name, part in candidates(threat_of(name), case.output):
        broken, passes = case.attacked(part_name, part, every)
        stood = min(part.queries(case.output), passes / len(every) if not broken.any() else passes)
        parts[part_name] = {"broken": broken.int().tolist(), "passes": passes, "stood": stood}
    return {"n": len(every), "parts": parts}


def in_order(nets: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The candidates of these nets, each the one that breaks most of what is left for a pass, until nothing is left
    that any of them breaks; of each its breaks and passes on what is left.
    """
    left = [set(range(net["n"])) for net in nets]
    names = dict.fromkeys(name for net in nets for name in net["parts"])
    order: list[dict[str, Any]] = []
    while names:
        tried = [gain(name, nets, left) for name in names]
        best = max(tried, key=lambda each: each["broke"] / max(each["passes"], 1))
        if not best["broke"]:
            break
        order.append(best)
        for net, still in zip(nets, left, strict=True):
            broken = net["parts"].get(best["name"], {}).get("broken", [0] * net["n"])
            still -= {image for image in still if broken[image]}
    return order


COMPARED = {
    "ce": "apgd ce, 20",
    "margin": "apgd margin, 20",
    "probability": "apgd probability, 20",
    "logit": "3 targets by logit, 20",
    "linearity": "3 targets by linearity, 20",
}
"""What the page says of losses and of the order of targets: of which candidates."""


def compared(nets: list[dict[str, Any]]) -> dict[str, Any]:
    """How many images of these nets each of the `COMPARED` breaks, its passes an image; how many any part breaks."""
    images = sum(net["n"] for net in nets)
    every = [zip(*(part["broken"] for part in net["parts"].values()), strict=True) for net in nets]
    told: dict[str, Any] = {"images": images, "nets": len(nets)}
    told["broken"] = sum(any(image) for net in every for image in net)
    for key, name in COMPARED.items():
        parts = [net["parts"][name] for net in nets]
        told[key] = {"broke": sum(sum(part["broken"]) for part in parts)}
        told[key]["passes"] = sum(part["passes"] for part in parts) / max(images, 1)
    return told


def gain(name: str, nets: Iterable[dict[str, Any]], left: list[set[int]]) -> dict[str, Any]:
    """What a part would break of the images ``left``, and in how many passes: one that it breaks costs what those that
    it breaks cost in the mean.
    """
    broke, passes = 0, 0.0
    for net, still in zip(nets, left, strict=True):
        if (part := net["parts"].get(name)) is None:
            continue
        fell, hit = sum(part["broken"]), sum(part["broken"][image] for image in still)
        each = max(0.0, part["passes"] - part["stood"] * (net["n"] - fell)) / max(fell, 1)
        broke, passes = broke + hit, passes + hit * each + (len(still) - hit) * part["stood"]
    return {"name": name, "broke": broke, "passes": round(passes)}


# ------------------------------------------------------------------------------------------------ the file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", default="", help="a folder of CIFAR-10; without it those nets are left out")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=PATH", help="a checkout")
    parser.add_argument("--nets", nargs="+", help="default: all that can be made")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "quick_verdict")
    parser.add_argument("--kept", action="store_true", help="the file's verdicts of autoattack_routing hold")
    parser.add_argument("--learn", action="store_true", help="run every candidate on validation images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    about = described("python -m benchmarks.quick_verdict --cifar10 FOLDER --source NAME=PATH ...", seeds=[0])
    numbers, judging, learning = (kept.get(key, {}) for key in ("numbers", "judging", "learning"))
    for name, count in (LEARN if args.learn else JUDGE).items():
        if (args.nets and name not in args.nets) or (family(name) == "cifar10" and not args.cifar10):
            continue
        if args.learn:
            learning[name] = learned(name, count, args)
        else:
            known = {SUITES[1]: judging[name][SUITES[1]]} if args.kept and name in judging else {}
            numbers[name], judging[name] = judged(name, count, args, known)
            print(name, json.dumps(numbers[name]), flush=True)
        order, numbers["learned"] = in_order(list(learning.values())), compared(list(learning.values()))
        write(FILE, about, numbers, order=order, judging=judging, learning=learning)
    for each in order if args.learn else ():
        print(each)


if __name__ == "__main__":
    main()
