"""Certifiers: what says of a model and an image how far no attack can change the prediction."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe.attacks.base import entered
from robustmoe.attacks.threat import Norm, Threat
from robustmoe.certification.bounds import Ball, Bounding, telling
from robustmoe.certification.graph import check, record
from robustmoe.certification.margins import Worst, worst_margins
from robustmoe.models.base import RoutedModel
from robustmoe.models.parts import Fork, Function, Leaf, Part
from robustmoe.noise import Noise

ABSTAIN = -1
"""The prediction of a certifier that makes none."""

SLACK = {torch.float64: 1e-6, torch.float32: 1e-4}
"""How far every bound of a network is moved outwards, relative to its size plus 1, by the dtype it is computed in. In
float64 this is for the model, which answers in float32; an allowance, not a proof about rounding."""


class Certificate(NamedTuple):
    """Of one image: no image within ``radius`` of it (in the certifier's norm, pixels of [0, 1]) has another prediction
    than ``prediction``.

    ``rule``: what proves it (docs/certification.md), "" at radius 0. ``reachable``: how many experts can be used
    somewhere within the certifier's eps; ``stable``: whether the route is the same there (1 or 0; a share of the noise,
    where noise is drawn); None where the certifier does not know. ``reason``: why eps is not certified, in words; "" if
    it is. ``held``: how many of the reachable experts are proven to say ``prediction`` in the whole ball on their own;
    None where they are not asked.
    """

    prediction: int
    radius: float
    rule: str
    reachable: int | None
    stable: float | None
    reason: str
    held: int | None = None


class Certifier(ABC):
    """Subclasses are frozen dataclasses and stand in `robustmoe.certification.CERTIFIERS`.

    ``norm`` and ``eps``: the ball that is asked about; radii are in that norm and may be larger or smaller than eps.
    ``subject``: of what the certificates are, the model itself or what noise makes of it.
    """

    @property
    @abstractmethod
    def norm(self) -> Norm: ...

    @property
    @abstractmethod
    def eps(self) -> float: ...

    @property
    def subject(self) -> Literal["model", "smoothed model"]:
        return "model"

    def __call__(
        self, model: Callable[[Tensor], Tensor], x: Tensor | np.ndarray, noise: Noise | None = None
    ) -> list[Certificate]:
        """One an image. ``model``: a `RoutedModel` or any callable from images to logits (n, c); ``x``: images (n, ch,
        h, w) in [0, 1]; UserError where `robustmoe.certify` raises one. Both are as before afterwards. ``noise``: one
        random stream an image (default: by position in the batch).
        """
        with entered(model, x, noise=noise) as given, torch.no_grad():
            return self.certify(given.model, given.x, given.noise)

    @abstractmethod
    def certify(self, model: RoutedModel, x: Float[Tensor, "n ch h w"], noise: Noise) -> list[Certificate]:
        """The certificates; the model is in eval mode, and gradients are off."""


@dataclass(frozen=True)
class Searched(Certifier):
    """Of a linf or l2 ball, by bounds made as ``how``; the radius is searched by ``search`` halvings up to ``up``
    times eps.
    """

    threat: Threat
    how: Bounding = "crown_ibp"
    search: int = 6
    up: float = 2.0

    def __post_init__(self) -> None:
        if self.threat.norm == "l1":
            raise ValueError("bounds are for linf and l2 balls; got l1")
        if not self.threat.eps > 0:
            raise ValueError(f"a certificate needs an eps above 0; got {self.threat.eps}")
        if self.search < 0 or self.up < 1:
            raise ValueError(f"expected search of 0 or more and up of 1 or more; got {self.search} and {self.up}")

    @property
    def norm(self) -> Norm:
        return self.threat.norm

    @property
    def eps(self) -> float:
        return self.threat.eps


@dataclass(frozen=True)
class Bounds(Searched):
    """Bounds of every network over the whole ball, and every expert that the router can choose in it: CERT-1 to CERT-4
    for mixtures, CERT-7 and CERT-8 for duals.

    ``how``: "ibp" (intervals: cheap, for models trained for it), "crown_ibp" (at least as tight), "crown" (tightest,
    dear). The radius is searched by ``search`` halvings, up to ``up`` times eps; each radius that is claimed was
    verified itself (0 halvings: eps or nothing). ``region_steps``: steps by which an expert that is not proven on the
    whole ball is bounded on its own region (top-1 routers; not with "ibp"). ``dtype``: of the bounds.
    """

    region_steps: int = 20
    dtype: Literal["float64", "float32"] = "float64"

    def certify(self, model: RoutedModel, x: Float[Tensor, "n ch h w"], noise: Noise) -> list[Certificate]:
        y = model(x).argmax(1)
        dtype = {"float64": torch.float64, "float32": torch.float32}[self.dtype]
        part, x = copy.deepcopy(model).to(dtype).parts(), x.to(dtype)
        for each in leaves(part):
            check(record(each, x), each, (x + self.eps * (2 * noise.uniform(*x.shape[1:]).to(x) - 1)).clamp(0.0, 1.0))
        asked = torch.full((len(x),), self.eps, dtype=torch.float64)  # in float32 0.03 is less than 0.03
        with telling(f"radius 1 of {self.search + 1}, "):
            at_eps = worst = self._worst(part, x, asked, y)  # what is told of routes and reasons is of this radius
        proven = worst.proven(y).cpu()
        radius = torch.where(proven, asked, 0.0)
        above = torch.where(proven, self.up * asked, asked)
        rule = [name if good else "" for name, good in zip(worst.rule, proven.tolist())]
        for halving in range(self.search):
            middle = 0.5 * (radius + above)
            with telling(f"radius {halving + 2} of {self.search + 1}, "):
                worst = self._worst(part, x, middle, y)
            good = worst.proven(y).cpu()
            radius, above = torch.where(good, middle, radius), torch.where(good, above, middle)
            rule = [new if proves else old for new, old, proves in zip(worst.rule, rule, good.tolist())]
        return [
            Certificate(
                int(y[i]),
                float(radius[i]),
                rule[i],
                int(at_eps.reached[i].sum()),
                float(at_eps.stable[i]),
                "" if proven[i] else reason(at_eps, i, int(y[i])),
                int((at_eps.reached[i] & at_eps.held[i]).sum()),
            )
            for i in range(len(x))
        ]

    def _worst(self, part: Part, x: Tensor, eps: Tensor, y: Tensor) -> Worst:
        rounded = eps.to(x.dtype)
        above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
        rounded = torch.where(rounded < eps, above, rounded).to(x.device)
        return worst_margins(
            part, Ball(x, self.norm, rounded), y, self.how, SLACK[x.dtype], region_steps=self.region_steps
        )


def leaves(part: Part) -> list[Function]:
    """Every network and router of a model."""
    if isinstance(part, Leaf):
        return [part.network]
    if isinstance(part, Fork):
        return [part.router, *(each for branch in part.branches for each in leaves(branch))]
    return [*leaves(part.standard), *leaves(part.robust)]


def reason(worst: Worst, i: int, y: int) -> str:
    """Why image i is not proven to stay class y."""
    if len(worst.experts) == 1:
        return f"the network is not proven to say {y}"
    reached, held = worst.reached[i].tolist(), worst.held[i].tolist()
    open_ = [name for name, inside, good in zip(worst.experts, reached, held) if inside and not good]
    route = "the route is stable" if worst.stable[i] else f"{sum(reached)} of {len(reached)} experts can be used"
    return f"{route}; not proven to say {y}: {', '.join(open_)}" if open_ else route
