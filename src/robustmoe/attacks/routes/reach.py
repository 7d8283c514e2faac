"""How far the routers' decisions are from the image: route radii, and the experts within reach of a threat.

Exact for a router that is linear in the pixels, as far as the box [0, 1] does not help; for any other, the first-order
estimate at the image. An estimate says whom to train, and is never a certificate.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustmoe.attacks.base import entered
from robustmoe.attacks.threat import Norm, Threat, size
from robustmoe.routing import Routing, Trace

DUAL: dict[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}
"""The norm of a gradient by which a linear function grows in the ball of a norm."""


def reachable(
    model: Callable[[Tensor], Tensor], x: Tensor | np.ndarray, threat: Threat
) -> dict[str, Bool[Tensor, "n e"]]:
    """For each router and image, the experts that the router could choose somewhere in the ball: expert i unless some k
    is ahead of it everywhere, g_k - g_i > eps ||grad (g_k - g_i)||, for top-1 (for top-k, unless k of them are).

    Pair by pair: a superset of what a linear router can reach, and seldom more. Of the model in eval mode (in train
    mode a BatchNorm would mix the images' gradients). Raises ValueError for a router that decides more than once an
    image.
    """
    with entered(model, x) as given:
        at = given.x.requires_grad_(True)
        trace = _image_routers(given.model.route(at))
        return {name: _reach(routing, at, threat) for name, routing in trace.items()}


def _reach(routing: Routing, at: Tensor, threat: Threat) -> Bool[Tensor, "n e"]:
    logits, experts = routing.logits[:, 0], routing.num_experts
    ahead = torch.zeros(len(at), experts, dtype=torch.long, device=at.device)
    for i in range(experts):
        for k in range(i + 1, experts):
            gap = logits[:, i] - logits[:, k]
            least = threat.eps * _slope(gap, at, threat.norm)
            ahead[:, k] += (gap > least).long()
            ahead[:, i] += (-gap > least).long()
    return ahead < routing.k


def route_radius(
    model: Callable[[Tensor], Tensor], x: Tensor | np.ndarray, norm: Norm
) -> dict[str, Float[Tensor, " n"]]:
    """For each router that leaves an expert out, how far the image is from the boundary to the next expert, in
    ``norm`` and pixels: (weakest chosen logit - best other logit) / ||gradient of it||. Differentiable in the weights.

    Of a linear router the exact radius of that boundary, the box apart. Of the model in eval mode; raises ValueError as
    `reachable` does.
    """
    # the fused kernel has no second derivative on CPU
    with entered(model, x) as given, sdpa_kernel(SDPBackend.MATH):
        at = given.x.requires_grad_(True)
        trace = _image_routers(given.model.route(at))
        narrow = {name: routing for name, routing in trace.items() if routing.k < routing.num_experts}
        radii = {}
        for name, routing in narrow.items():
            chosen = routing.chosen()
            rival = routing.logits.masked_fill(chosen, -torch.inf).amax(-1)[:, 0]
            gap = routing.logits.masked_fill(~chosen, torch.inf).amin(-1)[:, 0] - rival
            slope = _slope(gap, at, norm, differentiable=True)
            radii[name] = gap / slope.clamp(min=torch.finfo(gap.dtype).eps)
        return radii


def _slope(gap: Float[Tensor, " n"], at: Tensor, norm: Norm, differentiable: bool = False) -> Float[Tensor, " n"]:
    """The dual norm of the gradient of each image's ``gap`` at its pixels."""
    gradient = torch.autograd.grad(gap.sum(), at, retain_graph=True, create_graph=differentiable)[0]
    return size(DUAL[norm], gradient)


def _image_routers(trace: Trace) -> Trace:
    for name, routing in trace.items():
        if routing.index.shape[1] != 1:
            raise ValueError(
                f"router {name!r} decides {routing.index.shape[1]} times an image; how far its decisions are from the "
                "image is known for routers of whole images"
            )
    return trace
