"""How often the host waits for the device in one step of attacks and trainings, counted on a device that is not there
(see `pretended`): the work of n and of 2n steps is counted, and the difference is that of n steps, so that what is done
once does not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from pretended import DEVICE, Pretending
from robustmoe.attacks import build_attack
from robustmoe.attacks.base import looked_at
from robustmoe.attacks.surrogate import Surrogate
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.models import RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.training import MiniBatch, build_method, train_step
from tiny_models import CLASSES, IMAGE_SHAPE, TINY

VIT = "vit_moe(patch=4, width=16, depth=2, heads=2, experts=3, k=2, placement=(0, 1))"
NETS = {
    "dense": TINY["dense"],
    "pathway": TINY["pathway"],
    "hard ensemble": TINY["ensemble_hard"],
    "ViT-MoE": VIT,
    "ViT-MoE, sorted": VIT.replace("k=2", "k=2, dispatch=sorted"),
}
"""The transformer has two routed layers; its experts run by torch's grouped product, which CUDA has for bf16 alone, or
sorted.
"""
IMAGES = 16


@dataclass(frozen=True)
class Work:
    """``what``: an attack or a method, ``{}`` in the place of its steps, of which n are counted beside 2n; in so many
    ``climbs`` there are so many steps each.
    """

    what: str
    n: int = 5
    climbs: int = 1


ATTACKS = {
    "PGD, keep=last": Work("pgd(linf(0.01), steps={}, keep=last)"),
    "PGD, keep=first": Work("pgd(linf(0.01), steps={}, keep=first)"),
    "APGD": Work("apgd(linf(0.01), steps={})"),
    "FAB-T": Work("fab(linf(0.01), steps={}, targets=1)"),
    "Square": Work("square(linf(0.01), steps={})", 15),
    "expert_transition": Work("expert_transition(linf(0.01), steps={}, experts=2)", climbs=2),
    "route_flip": Work("route_flip(linf(0.01), steps={}, rivals=1)"),
}
"""A step of `RouteFlip` is one of each of its climbs: to the boundary, behind it, and freely."""

TRAININGS = {
    "AT": "at(pgd(linf(0.03), steps=10, keep=last))",
    "AT, undivided": "at(undivided(pgd(linf(0.03), steps=10, keep=last)))",
    "AT, route held": "at(pgd(linf(0.03), steps=10, keep=last, objective=experts_only))",
}


class Seen(NamedTuple):
    """Of a run: what the mode saw, how many images stood at the end, the passes of the network, and those of them by
    which the exact model gave its word.
    """

    mode: Pretending
    stood: int = 0
    passes: int = 0
    verdicts: int = 0


@dataclass(frozen=True)
class Counted:
    """Of one step: host synchronisations (``kinds``: by the name of the operation), copies to the device, operations,
    passes of the network, and those by which the exact model gave its word; and how many images stood at the end.
    """

    syncs: float
    copies: float
    operations: float
    kinds: dict[str, float]
    stood: int
    passes: float
    verdicts: float


def net(name: str) -> tuple[RoutedModel, Tensor, Tensor]:
    """The net in eval mode, whose router, if it has one for the image, uses every expert; images and its answers."""
    model = build_model(NETS[name], CLASSES, IMAGE_SHAPE)
    x = torch.rand(IMAGES, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(17))
    head = getattr(getattr(model, "router", None), "head", None)
    with torch.no_grad():
        if head is not None:
            logits = model.router(model.normalise(x))  # type: ignore[operator]
            scale = 1.0 / logits.std(0)
            head.weight.mul_(scale[:, None])
            head.bias.copy_((head.bias - logits.mean(0)) * scale)
        return model, x, model(x).argmax(1)


def attack(name: str, work: Work) -> Counted:
    """One step of an attack as an evaluation makes it, climbed on a frozen copy, on images that are right."""
    few, many = (_attacked(name, work.what.format(steps)) for steps in (work.n, 2 * work.n))
    return _between(few, many, work.n * work.climbs)


def training(name: str, method: str) -> Counted:
    """One step of training."""
    few, many = (_trained(name, method, steps) for steps in (1, 2))
    return _between(few, many, 1)


def _between(few: Seen, many: Seen, steps: int) -> Counted:
    kinds = {kind: (count - few.mode.syncs[kind]) / steps for kind, count in many.mode.syncs.items()}
    return Counted(
        sum(kinds.values()),
        (many.mode.copies - few.mode.copies) / steps,
        (many.mode.operations - few.mode.operations) / steps,
        {kind: count for kind, count in kinds.items() if count},
        many.stood,
        (many.passes - few.passes) / steps,
        (many.verdicts - few.verdicts) / steps,
    )


def _attacked(name: str, spec: str) -> Seen:
    model, x, y = net(name)
    passes = mock.Mock()
    word = mock.patch.object(Surrogate, "verdict", autospec=True, side_effect=Surrogate.verdict)
    with Pretending() as mode, word as verdicts:
        model, x, y = model.to(DEVICE), x.to(DEVICE), y.to(DEVICE)
        climbed = frozen_copy(model, x, on_pass=passes)
        x_adv = build_attack(spec)(climbed, x, y, Noise(Noise.of(torch.arange(IMAGES)).state.to(DEVICE)))
    with torch.no_grad():
        return Seen(mode, int((model(x_adv).argmax(1) == y).sum()), passes.call_count, verdicts.call_count)


def _trained(name: str, method: str, steps: int) -> Seen:
    model, x, y = net(name)
    built = build_method(method)
    with Pretending() as mode, looked_at():
        model, x, y = model.to(DEVICE), x.to(DEVICE), y.to(DEVICE)
        optimisers = [torch.optim.SGD(phase.parameters(model).values(), lr=0.01) for phase in built.phases]
        routers = list(model.eval().run(x[:1]).trace)
        for step in range(steps):
            noise = Noise(Noise.of(torch.arange(IMAGES), step).state.to(DEVICE))
            result = train_step(model, built, optimisers, MiniBatch(x, y, noise), routers=routers)
            _ = [float(each) for each in (*result.loss.values(), *result.grad_norm.values(), result.correct)]
            _ = [float(each) for each in result.router_grad.values()]  # as the loop of a training reads them
    return Seen(mode)
