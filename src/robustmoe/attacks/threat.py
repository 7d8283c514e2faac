"""Threat models: a norm, a radius in pixels of [0, 1], and the geometry an attack needs (size, projection, steepest
step, random start).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe.attacks.l1 import onto_l1
from robustmoe.errors import UserError
from robustmoe.noise import Noise

Norm = Literal["linf", "l2", "l1"]
Images = Float[Tensor, "n ch h w"]

LARGEST = 1e9
"""No image of less than 10^9 pixels is farther from another; the squares of longer steps would overflow in float32."""

L1_SPARSITY = 0.05
"""Share of coordinates an l1 step moves (Tramèr and Boneh 2019, SLIDE, move between 1 and 20 %)."""


@dataclass(frozen=True)
class Threat:
    """All images within ``eps`` of x in ``norm``, inside the pixel box [0, 1]. Everything here is computed in the
    images' own dtype, float32 or wider.
    """

    norm: Norm
    eps: float

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= LARGEST:
            raise UserError(
                f"eps must be 0 or more, in pixels of [0, 1] (write 8/255), and at most {LARGEST:g}; got {self.eps}"
            )
        if self.norm == "linf" and self.eps > 1:
            raise UserError(f"an linf eps above 1 leaves the pixel range [0, 1] (write 8/255, not 8); got {self.eps}")

    def size(self, delta: Images) -> Float[Tensor, " n"]:
        """The norm of each image's perturbation."""
        return size(self.norm, delta)

    def project(self, x_adv: Images, x: Images) -> Images:
        """Into the ball around x and into the box.

        For linf and l1 this is the nearest point of both; for l2 a point of both (the ball first, then the box, which
        moves a perturbed pixel towards x).
        """
        delta = x_adv - x
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        elif self.norm == "l2":
            delta = delta * (self.eps / size("l2", delta).clamp(min=1e-12)).clamp(max=1.0)[:, None, None, None]
        else:
            return onto_l1(x, delta, x_adv, self.eps)
        return (x + delta).clamp(0.0, 1.0)

    def direction(self, gradient: Images, x_adv: Images) -> Images:
        """The ascent direction of unit norm: sign (linf), normalised gradient (l2), the sign of the largest
        coordinates that the box lets move (l1).

        A coordinate, or an image, with zero gradient does not move.
        """
        if self.norm == "linf":
            return gradient.sign()
        if self.norm == "l2":
            tiny = torch.finfo(gradient.dtype).tiny
            scaled = gradient / size("linf", gradient).clamp(min=tiny)[:, None, None, None]  # squares cannot underflow
            return scaled / size("l2", scaled).clamp(min=tiny)[:, None, None, None]
        free = ((gradient > 0) & (x_adv < 1)) | ((gradient < 0) & (x_adv > 0))
        strength = (gradient.abs() * free).flatten(1)
        count = max(1, int(L1_SPARSITY * strength.shape[1]))
        values, places = strength.topk(count, dim=1)
        sign = torch.zeros_like(strength).scatter_(1, places, (values > 0).to(strength.dtype))
        sign = (sign / sign.sum(1, keepdim=True).clamp(min=1.0)).view_as(gradient)
        return sign * gradient.sign()

    def start(self, x: Images, noise: Noise) -> Images:
        """A random point of the ball around x, uniform in the ball before it is clipped to the box."""
        shape = tuple(x.shape[1:])
        if self.norm == "linf":
            delta = self.eps * (2 * noise.uniform(*shape).to(x.dtype) - 1)
        elif self.norm == "l2":
            normal = noise.normal(*shape).to(x.dtype)
            radius = self.eps * noise.fold(3).uniform().to(x.dtype) ** (1 / x[0].numel())
            delta = normal * (radius / size("l2", normal).clamp(min=1e-12))[:, None, None, None]
        else:
            spread = -torch.log1p(-noise.uniform(*shape, 2).to(x.dtype))  # one exponential a coordinate, and the slack
            magnitude, slack = spread[..., 0], spread[..., 1].flatten(1)[:, :1]
            total = magnitude.flatten(1).sum(1, keepdim=True) + slack
            sign = 1 - 2 * (noise.fold(3).uniform(*shape) < 0.5).to(x.dtype)
            delta = self.eps * sign * magnitude / total[:, :, None, None]
        return self.project(x + delta, x)


def size(norm: Norm, delta: Images) -> Float[Tensor, " n"]:
    """The norm of each image's perturbation."""
    flat = delta.flatten(1)
    if norm == "linf":
        return flat.abs().amax(1)
    return torch.linalg.vector_norm(flat, 2 if norm == "l2" else 1, dim=1)


def linf(eps: float) -> Threat:
    """Every pixel moves by at most eps."""
    return Threat("linf", eps)


def l2(eps: float) -> Threat:
    """The Euclidean norm of the perturbation is at most eps."""
    return Threat("l2", eps)


def l1(eps: float) -> Threat:
    """The sum of absolute changes is at most eps."""
    return Threat("l1", eps)
