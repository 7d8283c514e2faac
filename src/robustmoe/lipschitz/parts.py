"""What of an MoE's sensitivity is the experts' and what is the router's: the parts of one layer, as pure functions.

Letters, as in `robustmoe.routing`, and m items, o outputs. Everywhere ``logits`` (m, e) are the router's scores,
``outputs`` (m, e, o) what every expert says of every item, ``weight`` (m, e) what each is multiplied by (0: not
chosen), so that the layer is f = sum_e weight outputs. The statements LIP-3, LIP-5, LIP-6, LIP-8 are those of
docs/theory.md; they are this project's own derivations of what Puigcerver et al. (NeurIPS 2022) claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustmoe import routing
from robustmoe.attacks.routes.reach import DUAL
from robustmoe.attacks.threat import Norm
from robustmoe.models.norm import at_least_float32
from robustmoe.noise import Noise
from robustmoe.routing import Routing

Gating = Literal["soft", "renormalised", "vmoe", "hard"]

GELU_SLOPE = 0.5 * (1.0 + math.erf(1.0)) + math.exp(-1.0) / math.sqrt(math.pi)
"""The greatest slope of the exact GELU x Phi(x), 1.128904. Its slope is Phi(x) + x phi(x), whose derivative
(2 - x^2) phi(x) is 0 at x = sqrt(2): Phi(sqrt 2) + sqrt(2) phi(sqrt 2). (The tanh form reaches 1.12899.)"""

_ORDER: dict[str, float] = {"l1": 1.0, "l2": 2.0, "linf": math.inf}


# ------------------------------------------------------------------------------------------------ weights


def spread(decision: Routing) -> Float[Tensor, "n t e"]:
    """A decision's weights, an entry an expert, 0 where it is not chosen."""
    return decision.weight.new_zeros(decision.logits.shape).scatter_add(-1, decision.index, decision.weight)


def gates(logits: Float[Tensor, "m e"], gating: Gating, k: int = 1, temperature: float = 1.0) -> Float[Tensor, "m e"]:
    """The weights that a selection rule of `robustmoe.routing` gives the experts at logits / temperature.

    "soft" (G1) takes all experts, whatever ``k``; "renormalised" (G2), "vmoe" (G3) and "hard" (G4) the k best.
    Raises ValueError for a k, gating or temperature that does not exist.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")
    if gating == "soft":
        return spread(routing.soft(logits[:, None], temperature))[:, 0]
    return spread(routing.top_k(logits[:, None] / temperature, k, gating))[:, 0]


# ------------------------------------------------------------------------------------------------ LIP-3: Jacobians


class Paths(NamedTuple):
    """Three copies of a layer's output (m, o), equal in value. Their Jacobians add up to the layer's: ``expert`` moves
    through what the experts say (A), ``mixing`` through how the chosen are mixed, ``mass`` through how much weight the
    chosen have in all. The last is nothing but for "vmoe"; mixing + mass is the router term R.
    """

    expert: Tensor
    mixing: Tensor
    mass: Tensor


def paths(weight: Float[Tensor, "m e"], outputs: Float[Tensor, "m e o"]) -> Paths:
    """The split of LIP-3 without a matrix: take products of a path with `vjp`, `jvp` or `jacobian_norm`.

    ``weight`` and ``outputs`` have to be on the graph of the input.
    """
    weight = weight.to(torch.promote_types(weight.dtype, outputs.dtype))
    total = weight.sum(1, keepdim=True)
    share = weight / total.clamp(min=torch.finfo(weight.dtype).tiny)  # an item that no expert had room for: 0
    fixed = outputs.detach()
    expert = _mix(weight.detach(), outputs)
    mixing = total.detach() * _mix(share, fixed)
    return Paths(expert, mixing, total * _mix(share.detach(), fixed))


def _mix(weight: Tensor, outputs: Tensor) -> Tensor:
    return (weight[..., None] * outputs).sum(1)


class Split(NamedTuple):
    """The Jacobians (m, o, d) of the paths: ``expert`` is A; ``mixing`` + ``mass`` is R; all three are the layer's."""

    expert: Tensor
    mixing: Tensor
    mass: Tensor

    @property
    def router(self) -> Tensor:
        return self.mixing + self.mass

    @property
    def total(self) -> Tensor:
        return self.expert + self.mixing + self.mass


def jacobian_split(
    experts: Callable[[Tensor], Tensor],
    router: Callable[[Tensor], Tensor],
    x: Float[Tensor, "m d"],
    gating: Gating,
    k: int = 1,
    temperature: float = 1.0,
    differentiable: bool = False,
) -> Split:
    """LIP-3 in closed form, from the experts' Jacobians and the gradients of the router's logits, at each item.

    ``experts``: x -> (m, e, o), all experts' outputs; ``router``: x -> (m, e); both treat items apart. e (o + 1)
    backward passes and (m, e, o, d) numbers, so for small layers; `paths` is the same for large ones.
    """
    with torch.enable_grad():
        at = x if differentiable and x.requires_grad else x.detach().requires_grad_(True)
        outputs, logits = experts(at), router(at)
        jacobians = _gradients(outputs.flatten(1), at, differentiable).unflatten(1, outputs.shape[1:])
        slopes = _gradients(logits, at, differentiable)
        if not differentiable:
            outputs, logits = outputs.detach(), logits.detach()
    weight = gates(logits, gating, k, temperature)
    expert = torch.einsum("me,meod->mod", weight, jacobians)
    return Split(expert, *router_terms(logits, outputs, slopes, gating, k, temperature))


def router_terms(
    logits: Float[Tensor, "m e"],
    outputs: Float[Tensor, "m e o"],
    slopes: Float[Tensor, "m e d"],
    gating: Gating,
    k: int = 1,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "m o d"], Float[Tensor, "m o d"]]:
    """The router term of LIP-3, (mixing, mass), where ``slopes`` are the logits' gradients (of a linear router its
    rows).

    With q the weights divided by their sum G, and f = G f_q: mixing = G / T sum_i q_i f_i (s_i - s_q)^T and, for
    "vmoe", mass = f_q grad G^T with grad G = G (1 - G) (s_q - s_rest) / T, T the temperature, s_q and s_rest the mean
    slopes of the chosen and of the others. "hard" has neither: inside its regions its weights are constant.
    """
    weight = gates(logits, gating, k, temperature)
    if gating == "hard":
        nothing = outputs.new_zeros(len(outputs), outputs.shape[2], slopes.shape[2])
        return nothing, nothing
    total = weight.sum(1)
    share = weight / total[:, None]
    mean = torch.einsum("me,med->md", share, slopes)
    mixing = torch.einsum("me,meo,med->mod", weight, outputs, slopes - mean[:, None]) / temperature
    if gating != "vmoe":
        return mixing, torch.zeros_like(mixing)
    p = torch.softmax(logits / temperature, -1)
    rest = torch.where(weight > 0, torch.zeros_like(p), p)
    gap = total[:, None] * (rest.sum(1, keepdim=True) * mean - torch.einsum("me,med->md", rest, slopes))
    return mixing, torch.einsum("mo,md->mod", _mix(share, outputs), gap / temperature)


def _gradients(values: Tensor, at: Tensor, differentiable: bool) -> Tensor:
    """The gradient (m, v, d) of each item's values (m, v)."""
    if not values.requires_grad:
        return at.new_zeros(*values.shape, at.shape[1])
    columns = [
        torch.autograd.grad(
            value.sum(), at, retain_graph=True, create_graph=differentiable, allow_unused=True, materialize_grads=True
        )[0]
        for value in values.unbind(1)
    ]
    return torch.stack(columns, 1)


def vjp(output: Tensor, x: Tensor, direction: Tensor, differentiable: bool = False) -> Tensor:
    """direction^T J of a path (or of any output) at x, shaped as x: one backward pass, the graph is kept. 0 where the
    output does not depend on x (the mixing path of "hard").
    """
    if not output.requires_grad:
        return torch.zeros_like(x)
    (product,) = torch.autograd.grad(
        output, x, direction, retain_graph=True, create_graph=differentiable, allow_unused=True, materialize_grads=True
    )
    return product


def jvp(output: Tensor, x: Tensor, direction: Tensor) -> Tensor:
    """J direction of a path (or of any output) at x, shaped as the output: two backward passes, so x needs operations
    with a second derivative (of attention: torch's SDPBackend.MATH).
    """
    dummy = torch.zeros_like(output, requires_grad=True)
    with torch.enable_grad():
        return vjp(vjp(output, x, dummy, differentiable=True), dummy, direction)


def jacobian_norm(
    output: Float[Tensor, "m ..."], x: Float[Tensor, "m ..."], steps: int = 20, noise: Noise | None = None
) -> Float[Tensor, " m"]:
    """The spectral norm of each item's own Jacobian, by power iteration on J^T J: never above it, and the closer the
    more steps. ``output`` is on the graph of ``x``, and no item's output may depend on another item.

    ``noise``: where each item's iteration starts (default: by its place).
    """
    noise = Noise.of(torch.arange(len(x), device=x.device)) if noise is None else noise
    size = torch.zeros(len(x), dtype=output.dtype, device=x.device)
    direction = _unit(noise.normal(*x.shape[1:]).to(x))
    dummy = torch.zeros_like(output, requires_grad=True)
    with torch.enable_grad():
        pulled = vjp(output, x, dummy, differentiable=True)  # linear in the dummy: one graph serves all steps of `jvp`
    for _ in range(steps):
        pushed = vjp(pulled, dummy, direction)
        size = torch.maximum(size, torch.linalg.vector_norm(pushed.flatten(1), dim=1))
        direction = _unit(vjp(output, x, pushed.detach()))
    return torch.maximum(size, torch.linalg.vector_norm(vjp(pulled, dummy, direction).flatten(1), dim=1)).detach()


def _unit(direction: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(direction.flatten(1), dim=1).clamp(min=torch.finfo(direction.dtype).tiny)
    return direction / norm.view(-1, *[1] * (direction.ndim - 1))


# ------------------------------------------------------------------------------------------------ bounds


class MixingBound(NamedTuple):
    """Two upper bounds (m,) on the spectral norm of the mixing term. Neither is always the smaller one."""

    pairs: Tensor
    diameters: Tensor


def popoviciu_bound(
    weight: Float[Tensor, "m e"],
    outputs: Float[Tensor, "m e o"],
    slopes: Float[Tensor, "m e d"],
    temperature: float = 1.0,
) -> MixingBound:
    """The bounds of LIP-3, with q the weights divided by their sum G, T the temperature: pairs = G / 2T sum_ij q_i q_j
    |f_i - f_j| |s_i - s_j|; diameters = G / 4T (greatest |f_i - f_j|) (greatest |s_i - s_j|), over the chosen.

    The second is Popoviciu's inequality for the variances of u.f and v.s along any two unit vectors, and Cauchy's; two
    experts at q = 1/2 meet both. Of ||J|| of the layer: add sum_i weight_i ||J_i|| (and, for "vmoe", the mass term's
    norm, which is |f_q| |grad G|).
    """
    total = weight.sum(1)
    share = weight / total[:, None]
    apart = _distances(outputs) * _distances(slopes)
    pairs = total / (2 * temperature) * torch.einsum("mi,mij,mj->m", share, apart, share)
    both = (weight[:, :, None] > 0) & (weight[:, None, :] > 0)
    widths = [torch.where(both, _distances(v), 0.0).flatten(1).amax(1) for v in (outputs, slopes)]
    return MixingBound(pairs, total / (4 * temperature) * widths[0] * widths[1])


def _distances(points: Float[Tensor, "m e d"], order: float = 2.0) -> Float[Tensor, "m e e"]:
    """Between all pairs, by differences (no cancellation)."""
    points = at_least_float32(points)
    return torch.cdist(points, points, order, compute_mode="donot_use_mm_for_euclid_dist")


def expert_bound(w1: Float[Tensor, "... h d"], w2: Float[Tensor, "... o h"]) -> Float[Tensor, ...]:
    """||W2|| 1.1289 ||W1||, which no two points' slope of x -> W2 GELU(W1 x + b1) + b2 exceeds (exact GELU). Several
    experts at once along leading dimensions; matrices may be given transposed.
    """
    norms = [torch.linalg.matrix_norm(at_least_float32(matrix), ord=2) for matrix in (w1, w2)]
    return norms[0] * norms[1] * GELU_SLOPE


def expert_jacobian_norm(
    w1: Float[Tensor, "h d"], b1: Float[Tensor, " h"], w2: Float[Tensor, "o h"], x: Float[Tensor, "m d"]
) -> Float[Tensor, " m"]:
    """||W2 diag(GELU'(W1 x + b1)) W1||, the exact local value of what `expert_bound` bounds, at each item."""
    w1, b1, w2, x = (at_least_float32(value) for value in (w1, b1, w2, x))
    hidden = x @ w1.T + b1
    density = torch.exp(-0.5 * hidden.square()) / math.sqrt(2 * math.pi)
    slope = torch.special.ndtr(hidden) + hidden * density
    return torch.linalg.matrix_norm((w2[None] * slope[:, None]) @ w1, ord=2)


# ------------------------------------------------------------------------------------------------ boundaries


def jump(
    logits: Float[Tensor, "m e"],
    outputs: Float[Tensor, "m e o"],
    gating: Gating,
    k: int = 1,
    temperature: float = 1.0,
) -> Float[Tensor, " m"]:
    """LIP-5: by how much the output jumps where the k-th and the (k+1)-th expert tie: weight |f_k - f_(k+1)|, with the
    weight of the k-th: 1/k ("hard"), its softmax value ("vmoe"), that over the chosen ("renormalised"). Exact at a tie;
    elsewhere that of the tie ahead, at today's weights. 0 where nothing is left out (k = e, "soft").
    """
    if gating == "soft" or k == logits.shape[1]:
        return outputs.new_zeros(len(outputs))
    decision = routing.top_k(logits[:, None] / temperature, k + 1, "hard")
    ranked = outputs.gather(1, decision.index[:, 0, :, None].expand(-1, -1, outputs.shape[2]))
    weight = gates(logits, gating, k, temperature).gather(1, decision.index[:, 0, k - 1 : k])[:, 0]
    return weight * torch.linalg.vector_norm(ranked[:, k - 1] - ranked[:, k], dim=1)


def routing_radius(
    logits: Float[Tensor, "m e"],
    slopes: Float[Tensor, "e d"] | Float[Tensor, "m e d"],
    index: Int[Tensor, "m k"],
    norm: Norm = "l2",
) -> Float[Tensor, " m"]:
    """LIP-6: how far each item is from a change of its chosen set ``index``, in ``norm`` of the router's input: the
    least gap of a chosen and another logit, divided by the dual norm of the difference of their slopes.

    Exact for a linear router (``slopes`` its rows; a bias is in the logits): below it nothing changes the set, above
    something does. With ``slopes`` (m, e, d), the logits' gradients, a first-order estimate. Infinite where no expert
    is left out. `robustmoe.attacks.routes.reach.route_radius` is of a whole model, in pixels, and looks at the pair of
    the weakest chosen and the best other alone.
    """
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, True)
    steep = _distances(slopes[None] if slopes.ndim == 2 else slopes, _ORDER[DUAL[norm]])
    gap = logits[:, :, None] - logits[:, None]
    far = torch.where(gap > 0, torch.full_like(gap, math.inf), torch.zeros_like(gap))
    radius = torch.where(steep > 0, gap / steep.clamp(min=torch.finfo(gap.dtype).tiny), far)
    pairs = inside[:, :, None] & ~inside[:, None]
    return radius.masked_fill(~pairs, math.inf).flatten(1).amin(1)


class Shares(NamedTuple):
    """What of a change of the output (m, o) is the experts', and what the router's. They add up to it."""

    expert: Tensor
    router: Tensor


def attribution(
    weight: Float[Tensor, "m e"],
    outputs: Float[Tensor, "m e o"],
    weight_adv: Float[Tensor, "m e"],
    outputs_adv: Float[Tensor, "m e o"],
) -> Shares:
    """LIP-8: f(x_adv) - f(x) = sum of mean weight times change of output, plus change of weight times mean output. An
    identity for any two points, near or far, same routes or not.
    """
    expert = _mix(0.5 * (weight + weight_adv), outputs_adv - outputs)
    return Shares(expert, _mix(weight_adv - weight, 0.5 * (outputs + outputs_adv)))


# ------------------------------------------------------------------------------------------------ clusters


def block_coherence(x: Float[Tensor, "n d"], group: Int[Tensor, " n"]) -> float:
    """LIP-1': how far the groups' spans are from orthogonal: ||D^-1/2 (K - D) D^-1/2|| with K = x x^T and D its blocks
    of equal ``group`` (such as the expert an item goes to). 0: orthogonal; below 1, the bounds of LIP-1' hold on both
    sides.

    Raises ValueError where a group's rows are linearly dependent (D has no inverse then).
    """
    x = at_least_float32(x)
    order = torch.argsort(group, stable=True)
    parts = x[order].split(torch.bincount(group).tolist())
    bases = []
    for part in parts:
        if not len(part):
            continue
        values, vectors = torch.linalg.eigh(part @ part.T)
        if values[0] <= values[-1] * len(part) * torch.finfo(values.dtype).eps:
            raise ValueError(
                f"the {len(part)} rows of a group are linearly dependent in {x.shape[1]} dimensions; "
                "take fewer rows a group"
            )
        bases.append((vectors * values.rsqrt()) @ vectors.T @ part)
    white = torch.cat(bases)
    gram = white @ white.T
    start = 0
    for basis in bases:
        gram[start : start + len(basis), start : start + len(basis)] = 0.0
        start += len(basis)
    return float(torch.linalg.matrix_norm(gram, ord=2))
