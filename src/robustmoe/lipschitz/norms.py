"""How much a whole model can move: its local Jacobian, its margin's radius, its stretch inside a ball, and what of the
Jacobian goes through the routing weights. On any `RoutedModel`, image by image, in pixels of [0, 1].

Everything is of the model in eval mode and of the function that it computes: a straight-through gradient, which that
function does not have, is left out (see `exact_pass`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustmoe.attacks import PGD, Objective, Score, Threat, size
from robustmoe.attacks.base import evaluating
from robustmoe.attacks.objectives import Inner, some
from robustmoe.attacks.routes.reach import DUAL
from robustmoe.attacks.surrogate import exact_of
from robustmoe.attacks.threat import Norm
from robustmoe.lipschitz.parts import jacobian_norm, vjp
from robustmoe.models.base import Output, RoutedModel
from robustmoe.models.norm import at_least_float32, full_precision
from robustmoe.noise import Noise
from robustmoe.routing import Routing

ALL = "all routers"
"""The name of the split of all routers at once, beside those of each (`routing_split`)."""

LEAST = 0.01
"""Perturbations below this share of eps are not counted in a stretch: rounding would be what is measured."""


@contextlib.contextmanager
def differentiable(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Within it: eval mode, gradients of gradients (torch's fused attention has none on CPU), no autocast."""
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), full_precision(x):
        yield


def piecewise_constant(routing: Routing) -> bool:
    """Whether the weights only depend on who is chosen ("hard", "straight_through", one renormalised expert): all are
    1/k, or 0. Their derivative is 0 then, whatever a surrogate gradient says.
    """
    weight = routing.weight
    return bool(((weight == 1.0 / routing.k) | (weight == 0)).all())


def exact_pass(model: RoutedModel, x: Float[Tensor, "n ch h w"], held: Collection[str] = ()) -> Output:
    """One pass whose autograd derivative is that of the function itself: weights that are piecewise constant carry
    none. The routers of ``held`` keep their decision and weights (Soft MoE: also what slots are mixed of), as if these
    did not depend on x.
    """
    output = model.run(x)
    fixed = {name: r.detach() for name, r in output.trace.items() if name in held or piecewise_constant(r)}
    return model.run(x, forced=fixed) if fixed else output


def jacobian(output: Float[Tensor, "n c"], x: Float[Tensor, "n ..."]) -> Float[Tensor, "n c d"]:
    """Each item's own Jacobian, a backward pass a column of ``output``; no item's output may depend on another item."""
    columns = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
    return torch.stack([vjp(output, x, column.expand_as(output)).flatten(1) for column in columns], 1)


def spectral_norm(
    output: Float[Tensor, "n c"], x: Float[Tensor, "n ..."], steps: int | None = None, noise: Noise | None = None
) -> Float[Tensor, " n"]:
    """||J||_2 of each item: exact, of the whole Jacobian (``steps`` None), or by that many steps of power iteration,
    which come up to it from below.
    """
    if steps is None:
        return torch.linalg.matrix_norm(at_least_float32(jacobian(output, x)), ord=2)
    return jacobian_norm(output, x, steps, noise)


def local_norm(
    model: RoutedModel,
    x: Float[Tensor, "n ch h w"],
    y: Int[Tensor, " n"] | None = None,
    of: Literal["logits", "margin"] = "logits",
    steps: int | None = None,
    noise: Noise | None = None,
) -> Float[Tensor, " n"]:
    """The spectral norm of the Jacobian at each image (l2 of the logits by l2 of the pixels), or that of the margin
    z_y - max z_j, one gradient (``y``: by default the model's own class).

    ``steps``: None: the whole Jacobian, c backward passes, exact; a number: power iteration, a lower bound that rises
    to it, about five passes a step. ``noise``: where it starts. Raises ValueError for another ``of``.
    """
    if of not in ("logits", "margin"):
        raise ValueError(f"of must be 'logits' or 'margin'; got {of!r}")
    with differentiable(model, x):
        at = x.detach().requires_grad_(True)
        logits = exact_pass(model, at).logits
        if of == "logits":
            return spectral_norm(logits, at, steps, noise)
        label = logits.argmax(1) if y is None else y
        return size("l2", vjp(_margin(logits, label), at, torch.ones_like(logits[:, 0])))


def _margin(logits: Float[Tensor, "n c"], y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    own = logits.gather(1, y[:, None])[:, 0]
    return own - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def margin_radius(
    model: RoutedModel, x: Float[Tensor, "n ch h w"], y: Int[Tensor, " n"], norm: Norm
) -> Float[Tensor, " n"]:
    """How far each image is from another class, to first order: min over all rivals j of (z_y - z_j) /
    ||grad(z_y - z_j)||, the dual norm, in ``norm`` and pixels; 0 where the model is wrong.

    Exact for a model linear in the pixels, as far as the box [0, 1] does not help; no certificate for any other.
    """
    with differentiable(model, x):
        at = x.detach().requires_grad_(True)
        logits = exact_pass(model, at).logits
        own = logits.gather(1, y[:, None])[:, 0]
        least = torch.full_like(own, torch.inf)
        for rival in range(logits.shape[1]):
            gap = own - logits[:, rival]
            slope = size(DUAL[norm], vjp(gap, at, torch.ones_like(gap)))
            radius = torch.where(slope > 0, gap / slope.clamp(min=torch.finfo(gap.dtype).tiny), torch.inf)
            radius = torch.where(gap > 0, radius, 0.0)
            least = torch.where(y == rival, least, torch.minimum(least, radius))
        return least.detach()


@dataclass(frozen=True)
class Slope(Objective):
    """||f(x_adv) - f(x)||_2 / ||x_adv - x||, f the logits and the perturbation in the ``norm`` of the threat. Nothing
    counts as broken, so an attack keeps the greatest.
    """

    name: ClassVar[str] = "joint"
    aims_at_router: ClassVar[bool] = True
    threat: Threat

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        with torch.no_grad():
            clean = exact_of(model).run(x).logits

        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            moved = size(self.threat.norm, x_adv - some(x, rows))
            change = torch.linalg.vector_norm(model.run(x_adv).logits - some(clean, rows), dim=1)
            counts = moved > LEAST * self.threat.eps
            ratio = torch.where(counts, change / moved.clamp(min=LEAST * self.threat.eps), 0.0)
            return Score(ratio, torch.zeros_like(counts))

        return inner


def empirical_lipschitz(
    model: RoutedModel, x: Float[Tensor, "n ch h w"], threat: Threat, steps: int = 20, noise: Noise | None = None
) -> Float[Tensor, " n"]:
    """The greatest ||f(x + d) - f(x)||_2 / ||d|| that `PGD` of that many ``steps`` finds in the ball and the box, d in
    the norm of the threat: a lower bound on the local constant L(f; B(x, eps)), jumps of hard routing included.

    Raises ValueError for a threat of eps 0.
    """
    if not threat.eps > 0:
        raise ValueError(f"the ball has to have a radius above 0; got {threat.eps}")
    attack, label = PGD(threat, steps=steps, objective=Slope(threat)), torch.zeros_like(x[:, 0, 0, 0]).long()
    x_adv = attack(model, x, label, noise)
    with evaluating(model), torch.no_grad():
        return attack.objective(model, x, label)(x_adv).loss


# ------------------------------------------------------------------------------------------------ routing


class PathNorms(NamedTuple):
    """Norms (n,) of a Jacobian and of two parts that add up to it: ``experts``, the routing weights held, and
    ``router``, through the routing weights alone. So total <= experts + router, and each <= the sum of the others.
    """

    total: Tensor
    experts: Tensor
    router: Tensor


def routing_split(
    model: RoutedModel, x: Float[Tensor, "n ch h w"], steps: int | None = None, noise: Noise | None = None
) -> dict[str, PathNorms]:
    """What of the model's Jacobian goes through the routing weights: of each router alone (the others live), and under
    `ALL` of all of them. {} without routers.

    The held model computes the same with weights that do not depend on x; the difference of the two, 0 in value, has
    the router's part as its Jacobian, to all orders of what comes before and after. ``steps``: see `local_norm`.
    """
    with differentiable(model, x):
        at = x.detach().requires_grad_(True)
        whole = exact_pass(model, at)
        names = list(whole.trace)
        if not names:
            return {}
        groups = {name: (name,) for name in names} | {ALL: tuple(names)}
        rows = None if steps is not None else jacobian(whole.logits, at)
        total = spectral_norm(whole.logits, at, steps, noise) if rows is None else _norms(rows)
        norms = {}
        for group, held in groups.items():
            logits = exact_pass(model, at, held).logits
            if rows is None:
                own = [spectral_norm(path, at, steps, noise) for path in (logits, whole.logits - logits)]
            else:
                kept = jacobian(logits, at)
                own = [_norms(kept), _norms(rows - kept)]
            norms[group] = PathNorms(total, *own)
        return norms


def _norms(matrices: Float[Tensor, "n c d"]) -> Float[Tensor, " n"]:
    return torch.linalg.matrix_norm(matrices, ord=2)


def pixel_radius(
    model: RoutedModel, x: Float[Tensor, "n ch h w"], norm: Norm, most: int = 32
) -> dict[str, Float[Tensor, "n t"]]:
    """LIP-6 to first order in the pixels: for each router that leaves experts out, and each item, (k-th - (k+1)-th
    logit) / ||gradient of it in x||, the dual norm; the distance in ``norm`` and pixels to that boundary.

    A backward pass an item: of an image with more than ``most`` items, those with the smallest margins; nan for the
    others. Routers whose choice is not the k best logits of each item (expert choice, Soft MoE, k = e) are left out.
    """
    with differentiable(model, x):
        at = x.detach().requires_grad_(True)
        norms = {}
        for name, routing in exact_pass(model, at).trace.items():
            margin = routing_margin(routing)
            if margin is None:
                continue
            order = torch.argsort(margin.detach(), dim=1, stable=True)[:, :most]
            radii = torch.full_like(margin, torch.nan).detach()
            for place in order.unbind(1):
                gap = margin.gather(1, place[:, None])[:, 0]
                slope = size(DUAL[norm], vjp(gap, at, torch.ones_like(gap)))
                radius = torch.where(slope > 0, gap / slope.clamp(min=torch.finfo(gap.dtype).tiny), torch.inf)
                radii.scatter_(1, place[:, None], radius.detach()[:, None])
            norms[name] = radii
        return norms


def routing_margin(routing: Routing) -> Float[Tensor, "n t"] | None:
    """The k-th best logit minus the next, item by item; None where all experts are taken, or the chosen are not the k
    best of each item.
    """
    if routing.k == routing.num_experts or routing.slots is not None:
        return None
    chosen = torch.zeros_like(routing.logits, dtype=torch.bool).scatter(-1, routing.index, True)
    weakest = routing.logits.masked_fill(~chosen, torch.inf).amin(-1)
    margin = weakest - routing.logits.masked_fill(chosen, -torch.inf).amax(-1)
    return margin if bool((margin >= 0).all()) else None
