"""The parts of one routed layer at its own input tokens: what of its Jacobian is the experts' and what the router's
(LIP-3), how far experts disagree and where the layer jumps (LIP-5), how far its routes are from a change (LIP-6), and
what of a finite change each part makes (LIP-8). `robustmoe.lipschitz.parts` has the statements.

Layers with a linear router (`TokenLayer.linear`) are taken token by token, the others (Soft MoE, where every token
depends on every other) image by image. Letters as there: m tokens (or images), e experts, k chosen, d the width; here
the output has width d too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustmoe.attacks.threat import Norm
from robustmoe.lipschitz.norms import (
    PathNorms,
    differentiable,
    piecewise_constant,
    routing_margin,
    spectral_norm,
)
from robustmoe.lipschitz.parts import Gating, Shares, jacobian_norm, jump, paths, routing_radius, spread
from robustmoe.models.base import Output, RoutedModel
from robustmoe.models.norm import at_least_float32
from robustmoe.models.token_layers import TokenLayer
from robustmoe.models.tokens import TokenExperts
from robustmoe.models.vit_parts import gelu
from robustmoe.noise import Noise
from robustmoe.routing import Routing, Tape, detach, to_expert

WHOLE = 64
"""Width up to which a token's Jacobians are written out, and their norms are exact; above, power iteration."""

NUMBERS = 2**24
"""Numbers that the tables of one chunk of tokens may have."""


# ------------------------------------------------------------------------------------------------ routes


def decide(layer: TokenLayer, h: Float[Tensor, "n t d"]) -> Routing:
    """What the layer's router decides about tokens, without noise."""
    return layer.linear().rule(layer.router(h), Tape(), "router")


@runtime_checkable
class RoutedAnswer(Protocol):
    """(input, forced routes or None) -> (output, the routes used)."""

    def __call__(self, x: Tensor, forced: Mapping[str, Routing] | None = None) -> Output: ...


def as_answer(layer: TokenLayer) -> RoutedAnswer:
    """A layer as a function of its input and forced routes; its router is named "router"."""

    def answer(x: Tensor, forced: Mapping[str, Routing] | None = None) -> Output:
        tape = Tape(forced)
        return Output(layer(x, tape), tape.trace)

    return answer


class Crossed(NamedTuple):
    """The four answers of two inputs on two routes: ``before``, the clean input on its own; ``after``, the attacked on
    its own; ``frozen``, the attacked on the clean one's; ``swapped``, the clean on the attacked one's.
    """

    before: Tensor
    after: Tensor
    frozen: Tensor
    swapped: Tensor

    def shares(self) -> Shares:
        """What of the change is the experts' (the input changed, at mean over both routes) and what the routes' (the
        route changed, at mean over both inputs). They add up to it. Of a layer, which is linear in its weights, this is
        LIP-8 (`attribution`); of a whole model it is what the frozen and the swapped routing say together.
        """
        before, after, frozen, swapped = self
        return Shares(0.5 * (frozen - before + after - swapped), 0.5 * (swapped - before + after - frozen))


@torch.no_grad()
def crossed(answer: RoutedAnswer, x: Tensor, x_adv: Tensor) -> Crossed:
    """The passes of a layer (`as_answer`), or of a whole model (its ``run``)."""
    clean, after = answer(x), answer(x_adv)
    frozen, swapped = answer(x_adv, forced=clean.trace), answer(x, forced=after.trace)
    return Crossed(clean.logits, after.logits, frozen.logits, swapped.logits)


# ------------------------------------------------------------------------------------------------ one token layer


class Chosen:
    """The Jacobians J_i(x) of the experts chosen for each token, as they act on vectors; no weights yet."""

    def __init__(self, experts: TokenExperts, x: Float[Tensor, "m d"], index: Int[Tensor, "m k"]) -> None:
        self.w1, self.w2 = at_least_float32(experts.w1.detach()), at_least_float32(experts.w2.detach())
        self.rows = [torch.nonzero(index == expert, as_tuple=True) for expert in range(experts.num)]
        self.slope = x.new_zeros(*index.shape, self.w1.shape[2])
        for expert, place in enumerate(self.rows):
            with torch.enable_grad():
                hidden = (
                    (x[place[0]] @ self.w1[expert] + at_least_float32(experts.b1[expert])).detach().requires_grad_(True)
                )
                self.slope[place] = torch.autograd.grad(gelu(hidden, experts.kind).sum(), hidden)[0]

    def push(self, v: Float[Tensor, "m k d"]) -> Float[Tensor, "m k d"]:
        """J v, pair by pair."""
        out = torch.zeros_like(v)
        for expert, place in enumerate(self.rows):
            out[place] = ((v[place] @ self.w1[expert]) * self.slope[place]) @ self.w2[expert]
        return out

    def pull(self, u: Float[Tensor, "m k d"]) -> Float[Tensor, "m k d"]:
        """J^T u, pair by pair."""
        out = torch.zeros_like(u)
        for expert, place in enumerate(self.rows):
            out[place] = ((u[place] @ self.w2[expert].T) * self.slope[place]) @ self.w1[expert].T
        return out

    def matrices(self) -> Float[Tensor, "m k d d"]:
        """Each J, output by input."""
        m, k, _ = self.slope.shape
        out = self.slope.new_zeros(m, k, self.w2.shape[2], self.w1.shape[1])
        for expert, place in enumerate(self.rows):
            out[place] = (self.w2[expert].T * self.slope[place][:, None]) @ self.w1[expert].T
        return out


class LayerTerms(NamedTuple):
    """LIP-3 at each token, (m,): spectral norms of the layer's own Jacobian (without the residual), of its ``expert``
    term A, of its ``router`` term R, and of R's two parts. ``experts`` (m, k): ||J_i|| of each chosen expert, without
    its weight.
    """

    total: Tensor
    expert: Tensor
    router: Tensor
    mixing: Tensor
    mass: Tensor
    experts: Tensor


def layer_terms(layer: TokenLayer, h: Float[Tensor, "n t d"], steps: int | None = None) -> LayerTerms:
    """The parts of LIP-3 at the layer's input ``h``, (n * t,) each, of any gating of token or expert choice; rooms and
    the tokens that experts chose are held.

    The router's terms have rank e at most and are exact always. ``steps``: None: all Jacobians are written out, exact;
    a number: `total`, `expert` and `experts` by power iteration, lower bounds.
    """
    chunks = []
    routing, slopes = _weight_slopes(layer, h)
    flat, weight = at_least_float32(h.detach()).flatten(0, 1), spread(routing).detach().flatten(0, 1)
    index = routing.index.flatten(0, 1)
    rows = at_least_float32(layer.linear().rows.detach())
    room = layer.experts.num * (layer.experts.w1.shape[2] + flat.shape[1])
    room = max(room, index.shape[1] * flat.shape[1] ** 2 if steps is None else 0)
    for part in torch.arange(len(flat), device=h.device).split(max(1, NUMBERS // room)):
        with torch.no_grad():
            outputs = at_least_float32(layer.experts.every(flat[part])).transpose(0, 1)
            parts = _router_parts(weight[part], slopes[part], outputs)
            chosen = Chosen(layer.experts, flat[part], index[part])
            own = weight[part].gather(1, index[part])
            chunks.append(
                _whole(chosen, own, parts, rows) if steps is None else _powered(chosen, own, parts, rows, steps)
            )
    return LayerTerms(*(torch.cat(column) for column in zip(*chunks, strict=True)))


def _weight_slopes(layer: TokenLayer, h: Tensor) -> tuple[Routing, Float[Tensor, "m e e"]]:
    """The decision, and the derivative of each token's weights in its logits."""
    with torch.enable_grad():
        logits = layer.router(h.detach()).detach().requires_grad_(True)
        routing = layer.linear().rule(logits, Tape(), "router")
        weight = spread(routing)
        if piecewise_constant(routing):
            return routing.detach(), logits.new_zeros(*logits.shape, logits.shape[-1]).flatten(0, 1)
        columns = [torch.autograd.grad(column.sum(), logits, retain_graph=True)[0] for column in weight.unbind(-1)]
    return routing.detach(), torch.stack(columns, 2).flatten(0, 1)


class _Router(NamedTuple):
    """The router's terms as products (m, d, e) (m, e, e): of outputs and the weights' derivative in the logits."""

    outputs: Tensor
    mixing: Tensor
    mass: Tensor

    def thin(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mixing, mass and both together as left (m, d, e) times right (m, e, d)."""
        return [(self.outputs, slope @ rows) for slope in (self.mixing, self.mass, self.mixing + self.mass)]


def _router_parts(weight: Tensor, slopes: Tensor, outputs: Float[Tensor, "m e d"]) -> _Router:
    total = weight.sum(1, keepdim=True)
    share = weight / total.clamp(min=torch.finfo(weight.dtype).tiny)
    mass = share[:, :, None] * slopes.sum(1, keepdim=True)
    return _Router(outputs.transpose(1, 2), slopes - mass, mass)


def _thin_norm(left: Float[Tensor, "m d e"], right: Float[Tensor, "m e d"]) -> Float[Tensor, " m"]:
    """||left right||_2, exactly, by the triangular factors of both."""
    inner = torch.linalg.qr(left, mode="r")[1] @ torch.linalg.qr(right.transpose(1, 2), mode="r")[1].transpose(1, 2)
    return torch.linalg.matrix_norm(inner, ord=2)


def _whole(chosen: Chosen, weight: Tensor, parts: _Router, rows: Tensor) -> LayerTerms:
    thin = parts.thin(rows)
    matrices = chosen.matrices()
    expert = torch.einsum("mk,mkod->mod", weight, matrices)
    total = expert + thin[2][0] @ thin[2][1]
    norms = [torch.linalg.matrix_norm(matrix, ord=2) for matrix in (total, expert, matrices)]
    mixing, mass, router = (_thin_norm(*matrix) for matrix in thin)
    return LayerTerms(norms[0], norms[1], router, mixing, mass, norms[2])


def _powered(chosen: Chosen, weight: Tensor, parts: _Router, rows: Tensor, steps: int) -> LayerTerms:
    thin = parts.thin(rows)
    k = weight.shape[1]

    def push(v: Tensor) -> Tensor:
        return (weight[..., None] * chosen.push(v[:, None].expand(-1, k, -1).contiguous())).sum(1)

    def pull(u: Tensor) -> Tensor:
        return chosen.pull(weight[..., None] * u[:, None]).sum(1)

    left, right = thin[2]
    start = Noise.of(torch.arange(len(weight), device=weight.device)).normal(left.shape[1]).to(left)
    expert = power(push, pull, start, steps)
    total = power(
        lambda v: push(v) + (left @ (right @ v[..., None]))[..., 0],
        lambda u: pull(u) + (right.transpose(1, 2) @ (left.transpose(1, 2) @ u[..., None]))[..., 0],
        start,
        steps,
    )
    each = power(chosen.push, chosen.pull, start[:, None].expand(-1, k, -1).contiguous(), steps)
    mixing, mass, router = (_thin_norm(*matrix) for matrix in thin)
    return LayerTerms(total, expert, router, mixing, mass, each)


def power(
    push: Callable[[Tensor], Tensor], pull: Callable[[Tensor], Tensor], start: Float[Tensor, "*m d"], steps: int
) -> Float[Tensor, "*m"]:
    """The spectral norms of linear maps, all at once along the leading dimensions: power iteration on J^T J, from
    below. (`jacobian_norm` is the same for a map that is known by its graph only.)
    """
    v, norm = start, start.new_zeros(start.shape[:-1])
    for _ in range(steps):
        v = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
        pushed = push(v)
        norm = torch.maximum(norm, torch.linalg.vector_norm(pushed, dim=-1))
        v = pull(pushed)
    return norm


# ------------------------------------------------------------------------------------------------ experts and routes


class Disagreement(NamedTuple):
    """How far apart the chosen experts and the next one are, (m,). ``apart``: the mean over pairs of |f_i - f_j|;
    ``relative``: of that over sqrt(|f_i|^2 + |f_j|^2), 0 where they are equal, 1 orthogonal, 1.41 opposite;
    ``weighted``: sum over ordered pairs of p_i p_j |f_i - f_j|, p the softmax over all experts.
    """

    apart: Tensor
    relative: Tensor
    weighted: Tensor


def disagreement(logits: Float[Tensor, "m e"], outputs: Float[Tensor, "m e o"], k: int) -> Disagreement:
    """Over the k best experts and the (k+1)-th, if there is one."""
    ranked = torch.argsort(logits, dim=1, descending=True, stable=True)[:, : k + 1]
    some = outputs.gather(1, ranked[..., None].expand(-1, -1, outputs.shape[2]))
    i, j = torch.triu_indices(some.shape[1], some.shape[1], 1, device=logits.device)
    apart = torch.linalg.vector_norm(some[:, i] - some[:, j], dim=2)
    square = some.square().sum(2)
    length = (square[:, i] + square[:, j]).sqrt().clamp(min=torch.finfo(apart.dtype).tiny)
    p = torch.softmax(logits, 1).gather(1, ranked)
    weighted = 2 * (p[:, i] * p[:, j] * apart).sum(1)
    if not len(i):
        return Disagreement(weighted, weighted, weighted)
    return Disagreement(apart.mean(1), (apart / length).mean(1), weighted)


class RouteTerms(NamedTuple):
    """What a layer's routes hang on, (n * t,) each. ``slope``: ||dp/dh||, p the softmax of the logits, exact; it is
    never above ||S||/2, S the router's rows. ``jump``: LIP-5. ``margin``, and LIP-6's exact ``radius`` at the layer's
    input in l2 and in linf: None where the chosen are not the k best of each token's logits, or all are.
    """

    slope: Tensor
    disagreement: Disagreement
    jump: Tensor | None
    margin: Tensor | None
    radius: dict[Norm, Tensor]


@torch.no_grad()
def route_terms(layer: TokenLayer, h: Float[Tensor, "n t d"]) -> RouteTerms:
    """Of a token layer at its input. (Room is left aside: the radius is of the choice, and LIP-5 of its two
    experts.)"""
    routing = decide(layer, h)
    logits, rows = routing.logits.flatten(0, 1), at_least_float32(layer.linear().rows)
    flat = at_least_float32(h).flatten(0, 1)
    p = torch.softmax(logits, 1)
    factor = torch.linalg.qr(rows.T, mode="r")[1].T  # rows = factor times orthonormal rows
    slope = torch.linalg.matrix_norm((torch.diag_embed(p) - p[:, :, None] * p[:, None]) @ factor, ord=2)
    margin = routing_margin(routing)
    k = layer.linear().rule.k
    jumps, apart = [], []
    chunk = max(1, NUMBERS // (layer.experts.num * layer.experts.w1.shape[2]))
    for some, scores in zip(flat.split(chunk), logits.split(chunk), strict=True):
        outputs = at_least_float32(layer.experts.every(some)).transpose(0, 1)
        apart.append(disagreement(scores, outputs, k))
        if margin is not None:
            jumps.append(jump(scores, outputs, _gating(layer), k))
    radius: dict[Norm, Tensor] = {}
    if margin is not None:
        index = routing.index.flatten(0, 1)
        norms: tuple[Norm, ...] = ("l2", "linf")
        radius = {norm: routing_radius(logits, rows, index, norm) for norm in norms}
    return RouteTerms(
        slope,
        Disagreement(*(torch.cat(column) for column in zip(*apart, strict=True))),
        torch.cat(jumps) if jumps else None,
        None if margin is None else margin.flatten(),
        radius,
    )


def _gating(layer: TokenLayer) -> Gating:
    """The gating as a function: straight-through is hard."""
    gating = layer.linear().rule.gating
    return "hard" if gating == "straight_through" else gating


def whole_terms(layer: TokenLayer, h: Float[Tensor, "n t d"], steps: int = 20) -> PathNorms:
    """For a layer measured as a whole, image by image: norms of the Jacobian of all its tokens by all tokens, of the
    part with the decision held (of Soft MoE: with the slots' mixing), and of the part through it. Lower bounds, by
    power iteration.
    """
    with differentiable(layer, h):
        at = at_least_float32(h.detach()).requires_grad_(True)
        answer = as_answer(layer)
        whole = answer(at)
        held = answer(at, {"router": whole.trace["router"].detach()})[0]
        return PathNorms(*(jacobian_norm(path, at, steps) for path in (whole[0], held, whole[0] - held)))


# ------------------------------------------------------------------------------------------------ whole experts


class Networks(NamedTuple):
    """An image router whose experts are whole networks: ``weight`` (n, e) and ``outputs`` (n, e, c), on the graph of x,
    whose weighted sum is the model's answer, as ``space`` says: of "logits", or of "probabilities".
    """

    routing: Routing
    weight: Tensor
    outputs: Tensor
    space: str


def whole_experts(model: RoutedModel, x: Float[Tensor, "n ch h w"]) -> Networks | None:
    """The model as a sum of its experts, each forced in turn; None where it has not one router that decides once an
    image, or its answer is no such sum (routed layers inside a shared network).

    Whether it is, is asked of the model: the sum has to give its logits, or their softmax, to rounding.
    """
    output = model.run(x)
    if len(output.trace) != 1:
        return None
    (routing,) = output.trace.values()
    if routing.index.shape[1] != 1 or routing.slots is not None:
        return None
    weight = spread(routing)[:, 0]
    weight = weight.detach() if piecewise_constant(routing) else weight
    fixed = detach(output.trace)
    outputs = torch.stack([model.run(x, to_expert(fixed, i)).logits for i in range(routing.num_experts)], 1)
    for space, said, each in (
        ("logits", output.logits, outputs),
        ("probabilities", output.logits.softmax(1), outputs.softmax(2)),
    ):
        gap = (torch.einsum("ne,nec->nc", weight.to(each.dtype), each) - said).abs().max()
        if gap <= 1e3 * torch.finfo(said.dtype).eps * max(1.0, float(said.detach().abs().max())):
            return Networks(routing, weight.to(each.dtype), each, space)
    return None


class NetworkTerms(NamedTuple):
    """LIP-3 and LIP-5 of an image router's whole networks, (n,): as `LayerTerms`, by pixels; of what is mixed
    (``space``)."""

    total: Tensor
    expert: Tensor
    router: Tensor
    mixing: Tensor
    mass: Tensor
    disagreement: Disagreement
    jump: Tensor
    space: str


def network_terms(model: RoutedModel, x: Float[Tensor, "n ch h w"], steps: int | None = None) -> NetworkTerms | None:
    """The parts of LIP-3 in the pixels where the experts are whole networks (`whole_experts`), else None. ``steps``:
    see `spectral_norm`. The jump is that of the tie ahead, at today's weights; 0 where all experts are taken.
    """
    with differentiable(model, x):
        at = x.detach().requires_grad_(True)
        mixture = whole_experts(model, at)
        if mixture is None:
            return None
        own = paths(mixture.weight, mixture.outputs)
        each = (own.expert + own.mixing + own.mass, own.expert, own.mixing + own.mass, own.mixing, own.mass)
        norms = [spectral_norm(path, at, steps) for path in each]
    logits, outputs, k = mixture.routing.logits[:, 0].detach(), mixture.outputs.detach(), mixture.routing.k
    apart = disagreement(logits, outputs, k)
    step = torch.zeros_like(norms[0])
    if k < mixture.routing.num_experts:
        ranked = torch.argsort(logits, dim=1, descending=True, stable=True)[:, k - 1 : k + 1]
        pair = outputs.gather(1, ranked[..., None].expand(-1, -1, outputs.shape[2]))
        last = mixture.routing.weight[:, 0, k - 1].detach()
        step = last * torch.linalg.vector_norm(pair[:, 0] - pair[:, 1], dim=1)
    total, expert, router, mixing, mass = norms
    return NetworkTerms(total, expert, router, mixing, mass, apart, step, mixture.space)


def slope_bound(layer: TokenLayer) -> float:
    """||S||_2 / 2, which no ||dp/dh|| exceeds."""
    return float(torch.linalg.matrix_norm(at_least_float32(layer.linear().rows.detach()), ord=2)) / 2
