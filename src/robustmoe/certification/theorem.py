"""Certificates by Lipschitz constants: Theorems 5.4 and 5.5 of Zhang et al. (ICML 2025), with constants of margins, and
the sharper CERT-5 of docs/certification.md. For soft routers alone: both assume that no router weight jumps.

Bounds (CERT-4, CERT-8) prove more at about the same cost; these are here because the paper states them.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustmoe.attacks.threat import Threat
from robustmoe.certification.bounds import Ball, Bounded, Bounding
from robustmoe.certification.certify import SLACK, Certificate, Searched, leaves
from robustmoe.certification.graph import check, record
from robustmoe.certification.slopes import pair_slopes, steepness
from robustmoe.errors import UserError
from robustmoe.models.base import RoutedModel
from robustmoe.models.parts import Fork, Leaf, Mixed, Part
from robustmoe.noise import Noise


class Local(NamedTuple):
    """Of a part over a ball around x: its ``value`` v at x (n, c), logits or ``probabilities``; ``slope`` (n, c, c):
    |change of v_a - v_b from x to x'| <= slope[a, b] |x' - x| for every x' in the ball.
    """

    value: Float[Tensor, "n c"]
    slope: Float[Tensor, "n c c"]
    probabilities: bool = False


def softmax(local: Local, scale: float = 1.0) -> Local:
    """Of the softmax of ``scale`` times the logits: |p_a - p_b| changes by half of the largest change of a z_a - z_k or
    a z_k - z_b at most. (d(p_a - p_b) is a sum of weights times d(z_a - z_k) if p_a >= p_b, of total p_a (1 - p_a +
    p_b) <= 1/2; else the same with b.)
    """
    change = scale * local.slope
    slope = 0.5 * torch.maximum(change.amax(2)[:, :, None], change.amax(1)[:, None, :])
    return Local(torch.softmax(scale * local.value, 1), slope, True)


@dataclass(frozen=True)
class _ByConstants(Searched):
    """Radius = least margin / constant, where the constant is of the ball of a candidate radius and the claim is the
    smaller of the two; the candidates are searched.
    """

    threat: Threat  # said again, so that the signature can be read in this module

    @abstractmethod
    def mixture(self, part: Fork, ball: Ball, branches: list[Local]) -> Float[Tensor, "n c c"]:
        """The ``slope`` of a soft mixture, from those of its experts."""

    @abstractmethod
    def rule(self, part: Part) -> str:
        """What proves it."""

    def certify(self, model: RoutedModel, x: Float[Tensor, "n ch h w"], noise: Noise) -> list[Certificate]:
        y = model(x).argmax(1)
        part, x = copy.deepcopy(model).double().parts(), x.double()
        for each in leaves(part.robust if isinstance(part, Mixed) else part):
            check(record(each, x), each, (x + self.eps * (2 * noise.uniform(*x.shape[1:]).to(x) - 1)).clamp(0.0, 1.0))
        asked = torch.full((len(x),), self.eps, dtype=x.dtype, device=x.device)
        first = self._formula(part, Ball(x, self.norm, asked), y)
        radius = torch.minimum(first, asked)
        above = torch.where(first > asked, self.up * asked, asked)
        for _ in range(self.search):
            middle = 0.5 * (radius + above)
            candidate = self._formula(part, Ball(x, self.norm, middle), y)
            radius = torch.maximum(radius, torch.minimum(candidate, middle))
            above = torch.where(candidate > middle, above, middle)
        experts, stable = (None, None) if isinstance(part, Mixed) else (_experts(part), 1.0)
        return [
            Certificate(
                int(label),
                size,
                self.rule(part) if size > 0 else "",
                experts,
                stable,
                "" if size >= self.eps else f"margin over constant is {given:.3g} on the ball of {self.eps:.3g}",
            )
            for label, size, given in zip(y.tolist(), radius.tolist(), first.tolist())
        ]

    def _formula(self, part: Part, ball: Ball, y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """min over j of margin_j / constant_j of the ball, 0 at least."""
        slack = SLACK[ball.x.dtype]
        share, standard = 1.0, 0.0
        if isinstance(part, Mixed):
            if part.mix == "logits":
                raise UserError(
                    "Theorem 5.5 bounds the standard half by its probabilities; this dual mixes logits, for which no "
                    "such bound exists (CERT-9). Use bounds(...)"
                )
            share = min(part.alpha)
            standard, local = 1 - share, self._half(part, ball)
        else:
            local = self._local(part, ball)
        rows = torch.arange(len(y), device=y.device)
        margin = share * (local.value[rows, y][:, None] - local.value) - standard
        margin = margin - slack * (1 + margin.abs())
        constant = share * local.slope[rows, y] * (1 + slack)
        radius = torch.where(constant > 0, margin / constant.clamp(min=torch.finfo(margin.dtype).tiny), torch.inf)
        radius = torch.where(margin > 0, radius, 0.0).scatter(1, y[:, None], torch.inf)
        return radius.amin(1)

    def _half(self, part: Mixed, ball: Ball) -> Local:
        """Of the robust half's probabilities."""
        local = self._local(part.robust, ball)
        if not local.probabilities:
            return softmax(local, part.scale)
        if part.scale != 1:
            raise UserError(
                "no constant is known of a mixture of probabilities whose logits are scaled; use bounds(...)"
            )
        return local

    def _local(self, part: Part, ball: Ball) -> Local:
        if isinstance(part, Leaf):
            return Local(part.network(ball.x), pair_slopes(Bounded(record(part.network, ball.x), ball, self.how)))
        if isinstance(part, Mixed):
            raise UserError("Theorem 5.4 is of experts that are networks; a dual stands among them. Use bounds(...)")
        if not part.soft and len(part.branches) > 1:
            raise UserError(
                f"Theorem 5.4 needs router weights with a Lipschitz constant; {part.name!r} uses the {part.k} best of "
                f"{len(part.branches)} experts, and its weights jump (CERT-6). Use bounds(...)"
            )
        branches = [self._local(branch, ball) for branch in part.branches]
        if part.mix == "probabilities":
            branches = [local if local.probabilities else softmax(local) for local in branches]
        elif any(local.probabilities for local in branches):
            raise UserError("no constant is known of the logits of a mixture of probabilities; use bounds(...)")
        weight = torch.softmax(part.router(ball.x), 1)
        value = sum(weight[:, i, None] * local.value for i, local in enumerate(branches))
        return Local(torch.as_tensor(value), self.mixture(part, ball, branches), branches[0].probabilities)


@dataclass(frozen=True)
class Theorem54(_ByConstants):
    """Theorem 5.4 of Zhang et al. (ICML 2025): min_j margin_j / sum_i (r_i M_i + a_i(x) L_i), in the space that is
    mixed. L_i: the Lipschitz constant of expert i's margin; r_i: that of its weight (a quarter of the largest one of a
    difference of its router logit and another); M_i: the largest size of its margin (1 of probabilities); each over the
    ball that is claimed. For a dual, Theorem 5.5's form: (alpha margin_j - (1 - alpha)) / (alpha times the constant of
    the robust half).

    Assumes a soft router and, in a dual, blended probabilities; a UserError names what is not so. The paper's constants
    are of single classes in one reading; then its radius is up to twice the truth. Of margins it is right.
    """

    def mixture(self, part: Fork, ball: Ball, branches: list[Local]) -> Float[Tensor, "n c c"]:
        weight = torch.softmax(part.router(ball.x), 1)
        turn = steepness(part.router, ball, self.how) / 4
        total = torch.zeros_like(branches[0].slope)
        for i, (local, branch) in enumerate(zip(branches, part.branches, strict=True)):
            size: Tensor | float = 1.0
            if not local.probabilities:
                size = _sizes(branch, ball, self.how)
            total = total + turn[:, i, None, None] * size + weight[:, i, None, None] * local.slope
        return total

    def rule(self, part: Part) -> str:
        return "Theorem 5.5" if isinstance(part, Mixed) else "Theorem 5.4"


@dataclass(frozen=True)
class SoftLipschitz(_ByConstants):
    """CERT-5 (not the paper's): min_j margin_j / (L_j + W s_j / 4). L_j: the largest Lipschitz constant of an expert's
    margin; W: that of any difference of two router logits; s_j: the largest minus the smallest margin of an expert at
    x, so that experts that agree make the router free. For a dual as `Theorem54`, by CERT-7. Assumes what it assumes.
    """

    def mixture(self, part: Fork, ball: Ball, branches: list[Local]) -> Float[Tensor, "n c c"]:
        values = torch.stack([local.value[:, :, None] - local.value[:, None, :] for local in branches])
        turn = steepness(part.router, ball, self.how).amax(1)[:, None, None] / 4
        return torch.stack([local.slope for local in branches]).amax(0) + turn * (values.amax(0) - values.amin(0))

    def rule(self, part: Part) -> str:
        return "soft Lipschitz, robust half alone" if isinstance(part, Mixed) else "soft Lipschitz"


def _sizes(part: Part, ball: Ball, how: Bounding) -> Float[Tensor, "n c c"]:
    """The largest |z_a - z_b| over the ball, of a network's logits or of any of a mixture's experts."""
    if isinstance(part, Fork):
        return torch.stack([_sizes(branch, ball, how) for branch in part.branches]).amax(0)
    if isinstance(part, Mixed):
        raise UserError("Theorem 5.4 is of experts that are networks; a dual stands among them. Use bounds(...)")
    bounded = Bounded(record(part.network, ball.x), ball, how)
    unit = torch.eye(bounded.graph.output.shape[1], dtype=ball.x.dtype, device=ball.x.device)
    rows = (unit[:, None] - unit[None]).flatten(0, 1)[:, None].expand(-1, len(ball.x), -1)
    least = bounded.lower(rows).T.unflatten(1, (len(unit), len(unit)))
    return torch.maximum(-least, -least.transpose(1, 2))


def _experts(part: Part) -> int:
    return sum(_experts(branch) for branch in part.branches) if isinstance(part, Fork) else 1
