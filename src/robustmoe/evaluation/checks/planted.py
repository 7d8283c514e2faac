"""Models with a known adversarial inside the ball: an attack that does not find it proves nothing by finding no other.

`plant` turns one image's classifier into such a model (after Zimmermann et al., "Increasing confidence in adversarial
robustness evaluations", NeurIPS 2022, section 4); `PlantedRoute` is a routed model whose adversarials lie behind a
change of routing alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robustmoe.attacks.threat import Threat
from robustmoe.models.base import RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Tape, top_k

POINTS = 200
"""Random points of the ball's surface among which one is planted: a random point finds it about once in as many."""

GAP = 1e-5
"""How far the planted point must stand out, relative to the largest logit: well above float32's rounding."""


class Planted(RoutedModel):
    """``inner`` with another last layer for each image of a batch: the image's own class says 0, ``rival`` says
    ``weight`` . logits + ``bias``, the others -10. A row of a pass belongs to the image it lies nearest to.
    """

    def __init__(self, inner: RoutedModel, x: Tensor, y: Tensor, rival: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.images = (x, y)
        self.rival, self.weight, self.bias = rival, weight, bias

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        clean, label = self.images
        row = torch.cdist(x.detach().float().flatten(1), clean.flatten(1)).argmin(1)
        return self.say(self.inner.ask(x, tape), row, label[row])

    def say(self, logits: Tensor, row: Tensor, label: Tensor) -> Tensor:
        """The new layer of each row's image, float32."""
        said = (logits.to(self.weight) * self.weight[row]).sum(1) + self.bias[row]
        classes = torch.arange(logits.shape[1], device=logits.device)
        out = torch.where(classes == label[:, None], 0.0, torch.full_like(logits, -10.0, dtype=self.weight.dtype))
        return torch.where(classes == self.rival[row][:, None], said[:, None], out).to(torch.float32)

    @torch.no_grad()
    def missed(self, x_adv: Tensor) -> Tensor:
        """(n,) bool: which images, changed to x_adv (n, ch, h, w) in order, their own new layer misses."""
        _, label = self.images
        row = torch.arange(len(x_adv), device=x_adv.device)
        return self.say(self.inner.run(x_adv).logits, row, label).argmax(1) != label


def plant(
    model: RoutedModel, x: Tensor, y: Tensor, threat: Threat, noise: Noise
) -> tuple[Planted, Tensor, Tensor] | None:
    """The planted model for images x (n, ch, h, w), which images have an adversarial, (m,) their positions, and it
    (m, ch, h, w); None where there is none: the logits do not tell the points of the ball apart (a model that
    quantises its input, say).

    Of 200 random points on the ball's surface the one whose logits lie farthest out (Mahalanobis) is planted: the new
    last layer is Fisher's direction for it, the threshold lies midway between it and the next, the clean image's
    margin is 2. The paper learns a layer on features that tells 1 boundary point from inner points; ours takes the
    logits as features, because a routed model has a head an expert, and puts the other points on the surface too,
    which is harder.
    """
    seeds = [_sow(model, x[i], int(y[i]), threat, noise[i : i + 1]) for i in range(len(x))]
    kept = [i for i, seed in enumerate(seeds) if seed is not None]
    if not kept:
        return None
    rows = torch.tensor(kept, device=x.device)
    sown = [seed for seed in seeds if seed is not None]
    rival = torch.tensor([seed.rival for seed in sown], device=x.device)
    weight = torch.stack([seed.weight for seed in sown])
    bias = torch.tensor([seed.bias for seed in sown], dtype=weight.dtype, device=x.device)
    planted = Planted(model, x[rows], y[rows], rival, weight, bias)
    point = torch.stack([seed.point for seed in sown])
    sure = planted.missed(point) & ~planted.missed(x[rows])
    if not bool(sure.any()):
        return None
    planted = Planted(model, x[rows[sure]], y[rows[sure]], rival[sure], weight[sure], bias[sure])
    return planted, rows[sure], point[sure]


class _Seed(NamedTuple):
    point: Tensor
    rival: int
    weight: Tensor
    bias: float


@torch.no_grad()
def _sow(model: RoutedModel, x: Tensor, y: int, threat: Threat, noise: Noise) -> _Seed | None:
    """One image's adversarial and last layer (see `plant`)."""
    many = x.expand(POINTS, *x.shape)
    push = noise.fold(13).normal(POINTS, *x.shape)[0].to(x)
    points = threat.project(many + threat.eps * threat.direction(push, many), many)
    logits = torch.cat([model.run(part).logits for part in points.split(64)]).double()
    clean = model.run(x[None]).logits.double()[0]
    if not bool(torch.isfinite(logits).all()):
        return None
    spread = torch.cov(logits.T)
    ridge = 1e-6 * spread.diagonal().mean() + torch.finfo(torch.float64).tiny
    inverse = torch.linalg.pinv(spread + ridge * torch.eye(len(clean), dtype=spread.dtype, device=x.device))
    away = logits - logits.mean(0)
    best = int(((away @ inverse) * away).sum(1).argmax())
    weight = inverse @ away[best]
    weight = weight / weight.norm().clamp(min=torch.finfo(torch.float64).tiny)
    said = logits @ weight
    first, second = said.topk(2).values.tolist()
    threshold, before = (first + second) / 2, float(clean @ weight)
    if not (first - second > GAP * float(logits.abs().max()) and threshold > before):
        return None
    scale = 2 / (threshold - before)
    order = clean.argsort(descending=True).tolist()
    rival = order[0] if order[0] != y else order[1]
    return _Seed(points[int(said.argmax())], rival, scale * weight, -scale * threshold)


class PlantedRoute(RoutedModel):
    """A hard gate and two experts of 4 classes: expert 0 says class 0, expert 1 says class 1, each by a margin that no
    image of the box closes. `images` lie half a radius before the boundary between the two.
    """

    towards: Tensor

    def __init__(self, threat: Threat, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.eps = min(threat.eps, 0.3) if threat.norm == "linf" else threat.eps
        size = shape[0] * shape[1] * shape[2]
        sign = 1.0 - 2.0 * (torch.arange(size) % 2)
        scale = {"linf": 1 / size, "l2": size**-0.5, "l1": 1.0}[threat.norm]
        self.register_buffer("towards", scale * sign)  # of dual norm 1: an eps-ball moves the score by eps at most

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        score = (x.flatten(1) - 0.5) @ self.towards.to(x)
        routing = tape("router", top_k(torch.stack([-score, score], 1)[:, None], 1, "hard"))
        first = routing.index[:, 0, 0] == 0
        texture = x.flatten(1).mean(1)
        rest = [texture.mul(-1), texture.mul(0)]
        return torch.stack([torch.where(first, 2 + texture, 0.0), torch.where(first, 0.0, 2 + texture), *rest], 1)

    def images(self, n: int, shape: tuple[int, int, int]) -> Tensor:
        """n grey images with a little texture of their own, the score of each -eps / 2."""
        towards = self.towards.to(torch.float64)
        index = torch.arange(n, device=towards.device)
        texture = 0.1 * (Noise.of(index, 15).uniform(len(towards)).double() - 0.5)
        length = towards @ towards
        texture = texture - ((texture @ towards) / length)[:, None] * towards
        return (0.5 + texture - (self.eps / 2 / length) * towards).float().view(n, *shape)
