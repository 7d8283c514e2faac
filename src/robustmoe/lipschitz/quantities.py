"""The quantities of the laboratory, by the names that files and tables use: name -> its value at each image (n,).

Of token layers a name ending in "max" or "min" is that over the image's tokens, any other is the mean over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustmoe.attacks.threat import Threat
from robustmoe.lipschitz import layers, norms
from robustmoe.lipschitz.layers import Crossed, as_answer, crossed
from robustmoe.lipschitz.norms import ALL, PathNorms
from robustmoe.lipschitz.parts import Shares, jacobian_norm
from robustmoe.models.base import Output, RoutedModel
from robustmoe.models.token_layers import TokenLayer
from robustmoe.noise import Noise
from robustmoe.routing import Routing

Columns = dict[str, Tensor]

PIXEL_STEPS = 10
"""Of power iteration on a layer's logits by the pixels."""


class Quantities(NamedTuple):
    """``columns``; ``kinds``: of those that are not exact; ``absent``: what there is not, and
    why; ``note``: how the rest was computed.
    """

    columns: Columns
    kinds: dict[str, str]
    absent: dict[str, str]
    note: str = ""


def _shares(of: Crossed) -> Columns:
    """LIP-8: norms (n,) of the experts' and the router's part of a change, over all numbers of an image."""
    experts, router = (torch.linalg.vector_norm(part.flatten(1), dim=1) for part in of.shares())
    change = torch.linalg.vector_norm((of.after - of.before).flatten(1), dim=1)
    return {
        "attack change": change, "attack experts": experts, "attack router": router,
        "attack router share": _share(router, experts),
    }  # fmt: skip


def _share(part: Tensor, rest: Tensor) -> Tensor:
    """part / (part + rest); 0 where both are."""
    return part / (part + rest).clamp(min=torch.finfo(part.dtype).tiny)


# ------------------------------------------------------------------------------------------------ the whole model


def of_model(
    model: RoutedModel,
    x: Float[Tensor, "n ch h w"],
    y: Int[Tensor, " n"],
    x_adv: Float[Tensor, "n ch h w"],
    threat: Threat,
    splits: dict[str, PathNorms],
    steps: int | None,
    noise: Noise,
) -> Quantities:
    """Jacobian, margin, stretch, and the fall of the margin from x to x_adv, split by experts and routes.

    The margin is z_y - z_j, with j the strongest other class at x_adv; both its parts are in logits and add up to the
    fall. ``splits``: `routing_split`'s, {} of a dense model.
    """
    total = splits[ALL].total if splits else norms.local_norm(model, x, steps=steps, noise=noise)
    values = {
        "jacobian": total,
        "margin slope": norms.local_norm(model, x, y, of="margin"),
        "margin radius": norms.margin_radius(model, x, y, threat.norm),
        "stretch": norms.empirical_lipschitz(model, x, threat, noise=noise),
    }
    kinds = {"margin radius": "first order", "stretch": "lower bound"}
    if splits:
        values |= {"experts' part": splits[ALL].experts, "router's part": splits[ALL].router}
        values["router's share"] = _share(splits[ALL].router, splits[ALL].experts)
    if steps is not None:
        kinds |= dict.fromkeys(("jacobian", "experts' part", "router's part"), "lower bound")
        kinds["router's share"] = "estimate"
    return Quantities(values | _falls(crossed(model.run, x, x_adv), y), kinds, {})


def _falls(of: Crossed, y: Tensor) -> Columns:
    rival = of.after.scatter(1, y[:, None], -torch.inf).argmax(1)

    def margin(values: Tensor) -> Tensor:
        return (values.gather(1, y[:, None]) - values.gather(1, rival[:, None]))[:, 0]

    shares: Shares = of.shares()
    values = {
        "fall": margin(of.before - of.after), "fall by experts": -margin(shares.expert),
        "fall by routes": -margin(shares.router),
    }  # fmt: skip
    named = {"clean": of.before, "attacked": of.after, "routing fixed": of.frozen, "routing transplanted": of.swapped}
    right = {f"right, {name}": (logits.argmax(1) == y).to(logits.dtype) for name, logits in named.items()}
    return values | right


# ------------------------------------------------------------------------------------------------ one router


def of_layer(layer: TokenLayer, h: Float[Tensor, "n t d"], h_adv: Float[Tensor, "n t d"], steps: int) -> Quantities:
    """Everything of a routed layer at its input: token by token, or of all tokens together where it must be."""
    return of_whole(layer, h, h_adv, steps) if layer.whole else of_tokens(layer, h, h_adv, steps)


def of_tokens(layer: TokenLayer, h: Float[Tensor, "n t d"], h_adv: Float[Tensor, "n t d"], steps: int) -> Quantities:
    """Everything of a token layer at its input. ``steps``: of power iteration, for widths above `layers.WHOLE`."""
    n, tokens, width = h.shape
    exact = width <= layers.WHOLE
    terms = layers.layer_terms(layer, h, None if exact else steps)
    routes = layers.route_terms(layer, h)
    per_token = {
        "layer jacobian": terms.total, "expert term": terms.expert, "router term": terms.router,
        "expert slope": terms.experts.amax(1), "routing slope": routes.slope,
    }  # fmt: skip
    per_token |= {} if routes.jump is None else {"jump": routes.jump}
    values = {name: value.view(n, tokens).mean(1) for name, value in per_token.items()}
    values |= {f"{name} max": value.view(n, tokens).amax(1) for name, value in per_token.items()}
    plain = {
        "mixing term": terms.mixing, "mass term": terms.mass, "router share": _share(terms.router, terms.expert),
        "disagreement": routes.disagreement.apart, "relative disagreement": routes.disagreement.relative,
        "weighted disagreement": routes.disagreement.weighted,
    }  # fmt: skip
    plain |= {} if routes.margin is None else {"margin": routes.margin}
    plain |= {f"radius {norm}": radius for norm, radius in routes.radius.items()}
    values |= {name: value.view(n, tokens).mean(1) for name, value in plain.items()}
    least = {name: value for name, value in plain.items() if name.startswith(("margin", "radius"))}
    values |= {f"{name} min": value.view(n, tokens).amin(1) for name, value in least.items()}
    bounded = ("layer jacobian", "expert term", "expert slope")
    kinds = {} if exact else dict.fromkeys([*bounded, *(f"{name} max" for name in bounded)], "lower bound")
    kinds |= dict.fromkeys(("jump", "jump max"), "estimate")  # exact at a tie alone
    kinds |= {} if exact else {"router share": "estimate"}  # of a lower bound
    absent = {}
    if routes.margin is None:
        by_experts = layer.linear().rule.choice == "expert"
        why = "the experts choose their tokens" if by_experts else "every expert takes every token"
        absent["jump, margin and radius"] = why
    how = f"written out ({width} wide)" if exact else f"found by {steps} steps of power iteration ({width} wide)"
    note = f"the Jacobians of each token at the layer's input are {how}"
    return Quantities(values | _shares(crossed(as_answer(layer), h, h_adv)), kinds, absent, note)


def of_whole(layer: TokenLayer, h: Float[Tensor, "n t d"], h_adv: Float[Tensor, "n t d"], steps: int) -> Quantities:
    """For a layer where an output token depends on all input tokens (Soft MoE): the image's tokens as one vector."""
    total, experts, router = layers.whole_terms(layer, h, steps)
    values = {
        "layer jacobian": total, "expert term": experts, "router term": router, "router share": _share(router, experts),
    }  # fmt: skip
    absent = dict.fromkeys(("jump, margin and radius", "disagreement and the experts' slopes"), layer.whole)
    kinds = dict.fromkeys(("layer jacobian", "expert term", "router term"), "lower bound")
    kinds["router share"] = "estimate"
    note = f"the Jacobian of all tokens by all tokens, by {steps} steps of power iteration"
    return Quantities(values | _shares(crossed(as_answer(layer), h, h_adv)), kinds, absent, note)


def of_networks(
    model: RoutedModel, x: Float[Tensor, "n ch h w"], x_adv: Float[Tensor, "n ch h w"], steps: int | None
) -> Quantities:
    """For a router of no `TokenLayer`: everything where its experts are whole networks, in the pixels; else
    nothing, and why.
    """
    terms = layers.network_terms(model, x, steps)
    if terms is None:
        why = "the model is no sum of its experts' answers: they stand inside a shared network, or there are several"
        what = "layer terms, disagreement, jump and the split of changes"
        return Quantities({}, {}, {what: f"{why} routers"})
    values = {
        "layer jacobian": terms.total, "expert term": terms.expert, "router term": terms.router,
        "mixing term": terms.mixing, "mass term": terms.mass, "router share": _share(terms.router, terms.expert),
        "disagreement": terms.disagreement.apart, "relative disagreement": terms.disagreement.relative,
        "weighted disagreement": terms.disagreement.weighted, "jump": terms.jump,
    }  # fmt: skip
    kinds = {} if steps is None else dict.fromkeys(list(values)[:5], "lower bound") | {"router share": "estimate"}
    kinds["jump"] = "estimate"

    def answer(x: Tensor, forced: Mapping[str, Routing] | None = None) -> Output:
        output = model.run(x, forced)
        return output if terms.space == "logits" else Output(output.logits.softmax(1), output.trace)

    note = f"the experts are whole networks: the layer's numbers are of its {terms.space}, by pixels"
    return Quantities(values | _shares(crossed(answer, x, x_adv)), kinds, {}, note)


def of_pixels(
    model: RoutedModel,
    x: Float[Tensor, "n ch h w"],
    radii: dict[str, Float[Tensor, "n t"]],
    noise: Noise,
) -> dict[str, Quantities]:
    """Of each router, in the pixels: how fast its p can move, and how far its boundaries are (`pixel_radius`)."""
    with norms.differentiable(model, x):
        at = x.detach().requires_grad_(True)
        trace = norms.exact_pass(model, at).trace
        logits = {name: routing.logits.flatten(1) for name, routing in trace.items()}
        slopes = {name: jacobian_norm(each, at, PIXEL_STEPS, noise) / 2 for name, each in logits.items()}
    out = {}
    for name, slope in slopes.items():
        values, absent = {"pixel routing slope": slope}, {}
        if name in radii:
            known = ~radii[name].isnan()
            values["pixel radius min"] = radii[name].nan_to_num(nan=torch.inf, posinf=torch.inf).amin(1)
            if bool(known.all()):
                values["pixel radius"] = radii[name].median(1).values
            else:
                absent["pixel radius"] = f"only the {int(known[0].sum())} items of the smallest margins were asked"
        else:
            absent["pixel radius"] = "no item's choice is the k best of its own logits, or all experts are chosen"
        kinds = {"pixel routing slope": "lower bound", "pixel radius": "first order", "pixel radius min": "first order"}
        out[name] = Quantities(values, kinds, absent)
    return out


def within(radii: Float[Tensor, "n t"], limits: Float[Tensor, " r"]) -> Float[Tensor, "n r"]:
    """The share of an image's items whose radius is known and at most each limit: the boundary mass."""
    return (radii[:, :, None] <= limits).to(radii.dtype).mean(1)
