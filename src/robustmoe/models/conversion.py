"""`moefy`: a user's own CNN with some of its layers turned into experts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe import generators
from robustmoe.errors import UserError, nearest
from robustmoe.models.base import Dense, ImageShape, RoutedModel
from robustmoe.models.block import LayeredModel, RoutedLayer, check_experts, replace
from robustmoe.models.layer_routers import LayerRouter, layer_router
from robustmoe.models.norm import BatchNorm2d, difference, largest
from robustmoe.models.plain import Plain
from robustmoe.noise import Noise
from robustmoe.routing import Gate, Tape

TOLERANCE = 1e-4
"""How far the converted model may be off on the probe, relative to the largest logit."""


class MoefiedModel(LayeredModel):
    """A user's network with `RoutedLayer`s in it, called as the user wrote it."""

    def answer(self, x: Float[Tensor, "n ch h w"]) -> Float[Tensor, "n c"]:
        return self.network(self.normalise(x))  # in the memory format that the user gives


def moefy(
    network: nn.Module,
    layers: str | Sequence[str],
    image_shape: ImageShape,
    *,
    experts: int = 4,
    k: int = 1,
    router: LayerRouter = "conv_gap",
    gate: Gate | None = None,
    standardise: bool = False,
    jitter: float = 0.0,
    normalise: nn.Module | None = None,
    seed: int = 0,
) -> RoutedModel:
    """``network``, a CNN from images to logits (n, c), with ``layers`` replaced by ``experts`` copies of themselves and
    a router on what enters them; in eval mode. The network given is not changed.

    At conversion it answers as the network does, wherever its routers send an image. For example::

        import torch
        import robustmoe as rm
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
                self.conv, self.head = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Linear(8, 10)

            def forward(self, x):
                return self.head(self.conv(self.norm(self.stem(x)).relu()).relu().mean((2, 3)))

        net, x = Net().eval(), torch.rand(16, 3, 8, 8)
        model = rm.moefy(net, "conv", image_shape=(3, 8, 8), experts=4, jitter=0.1)
        print(model.run(x).trace["network.conv.router"].index.flatten().bincount(minlength=4))
        (record,) = rm.evaluate(model, x, model(x).argmax(1), attacks="pgd(linf(0.03), steps=5)")
        numbers = record.summary()
        print(f"clean {numbers.clean.count} of {numbers.n}, robust {numbers.robust.count}, moved {numbers.rerouted}")

    ``layers``: names as `nn.Module.named_modules` gives them; ``*``, ``?`` and ``[...]`` stand for parts of a name
    between two dots: "layer4.*.conv2". ``image_shape`` (ch, h, w): two random images of it go through the network, to
    see what each layer gets. ``k``, ``router``, ``gate`` (not "vmoe"), ``standardise``: as in `BlockMoE`. ``jitter``:
    normal noise on the weights of every expert but the first, of that many standard deviations of the weight, so that
    experts differ. ``normalise``: a module applied first, such as `Normalise`; by default the network gets pixels in
    [0, 1]. ``seed``: of the routers and the jitter; torch's global generator is left alone.

    BatchNorms become the project's (`BatchNorm2d`: an expert may get one image, or none). Raises UserError where a name
    matches nothing, a layer stands inside another, is not called or called twice in a pass, gets or gives something
    else than one feature map (n, d, h, w) an image, or treats an image by the others of its batch; where the network is
    routed already; and where the result would not answer as the network does.
    """
    check_experts(experts, k)
    if not jitter >= 0:
        raise UserError(f"jitter must be 0 or more; got {jitter}")
    if gate == "vmoe":
        raise UserError(
            "gate=vmoe multiplies an expert by its probability, so the model would not answer as the network does; "
            "expected straight_through, renormalised, hard or soft"
        )
    _check_dense(network)
    made, normalise = copy.deepcopy(network).eval(), copy.deepcopy(normalise or nn.Identity()).eval()
    names = _matching(made, [layers] if isinstance(layers, str) else layers)
    x = _probe(made, image_shape)
    with torch.no_grad():
        expected, channels = _watched(made, normalise, names, x)
    for module in made.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm2d
    with generators.seeded(seed):
        for name in names:
            layer = made.get_submodule(name)
            made_router = layer_router(channels[name], experts, router, standardise).to(x)
            copies = [copy.deepcopy(layer) for _ in range(experts)]
            replace(made, layer, RoutedLayer(f"network.{name}", made_router, copies, k, gate))
        model = MoefiedModel(made, normalise).eval()
        _check_equal(model, x, expected, names)
        for name in names:
            _shake(made.get_submodule(name), jitter)
    return model


def _check_dense(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if isinstance(module, RoutedModel) and not isinstance(module, Dense | Plain):
            raise UserError(
                f"moefy takes a network without routers; {name or 'this one'} is a {type(module).__name__}. To convert "
                "several layers, name them all in one call"
            )


def _matching(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Returns the names that match a pattern part by part, in the network's order."""
    known = [name for name, _ in network.named_modules() if name]
    matched: set[str] = set()
    for pattern in patterns:
        parts = pattern.split(".")
        fit = {
            name
            for name in known
            if name.count(".") == len(parts) - 1 and all(map(fnmatchcase, name.split("."), parts))
        }
        if not fit:
            raise UserError(f"the network has no layer {pattern!r}; {nearest(pattern, known)}")
        matched |= fit
    if not matched:
        raise UserError("layers names no layer; expected names of the network's modules, such as 'layer4.*.conv2'")
    for name in matched:
        outer = [other for other in matched if name.startswith(f"{other}.")]
        if outer:
            raise UserError(f"the layer {name!r} stands inside {outer[0]!r}; name one of them")
    return [name for name in known if name in matched]


def _probe(network: nn.Module, image_shape: ImageShape) -> Tensor:
    """Returns two random images, on the device and in the dtype of the network."""
    x = Noise.of(torch.arange(2)).uniform(*image_shape)
    first = next((p for p in network.parameters() if p.is_floating_point()), None)
    return x if first is None else x.to(first)


def _watched(network: nn.Module, normalise: nn.Module, names: list[str], x: Tensor) -> tuple[Tensor, dict[str, int]]:
    """Returns the network's logits on the probe, and how many channels each layer gets."""
    seen: dict[str, list[tuple[tuple[Any, ...], Any]]] = {name: [] for name in names}
    entered: dict[str, tuple[Any, ...]] = {}

    def copied(value: Any) -> Any:  # what comes after may work in place
        return value.clone() if isinstance(value, Tensor) else value

    handles = []
    for name in names:

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            entered[name] = tuple(copied(value) for value in (*args, *kwargs.values()) if value is not None)

        def after(module: nn.Module, args: tuple[Any, ...], out: Any, name: str = name) -> None:
            seen[name].append((entered[name], copied(out)))

        layer = network.get_submodule(name)
        handles += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        logits: Tensor = network(normalise(x))
    except Exception as error:  # the user's own module may raise anything
        raise UserError(f"the network fails on images {tuple(x.shape)}: {type(error).__name__}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return logits, {name: _channels(name, network.get_submodule(name), seen[name]) for name in names}


def _channels(name: str, layer: nn.Module, calls: list[tuple[tuple[Any, ...], Any]]) -> int:
    """Returns the channels of the feature map that the layer gets. Raises UserError for a layer that cannot be routed
    an image at a time.
    """
    if len(calls) != 1:
        raise UserError(f"the layer {name!r} is called {len(calls)} times in one pass; expected once an image")
    ((given, out),) = calls
    if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].ndim != 4 or len(given[0]) != 2:
        said = ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in given)
        raise UserError(f"the layer {name!r} gets {said} for two images; expected one feature map (2, d, h, w)")
    if not isinstance(out, Tensor) or out.ndim < 1 or len(out) != 2:
        said = str(tuple(out.shape)) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(f"the layer {name!r} gives {said} for two images; expected a tensor (2, ...)")
    alone = torch.cat([layer(given[0][i : i + 1].clone()) for i in range(2)])
    if not _off(alone, out) <= TOLERANCE:
        raise UserError(
            f"the layer {name!r} answers an image by the others of its batch (or by chance), so its images cannot go "
            "to different experts; name other layers"
        )
    return int(given[0].shape[1])


def _check_equal(model: RoutedModel, x: Tensor, expected: Tensor, names: list[str]) -> None:
    with torch.no_grad():
        off = _off(model.ask(x, Tape()), expected)
    if not off <= TOLERANCE:
        raise UserError(
            f"with {', '.join(names)} as experts the network's logits change by {off:.2g} of the largest; a layer may "
            "change its input in place, or its outputs may be read elsewhere. Name other layers"
        )


def _off(answer: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the largest value expected."""
    if answer.shape != expected.shape:
        return float("inf")
    scale = largest(expected).clamp(min=torch.finfo(expected.dtype).tiny)
    return float(difference(answer, expected).amax() / scale)


@torch.no_grad()
def _shake(layer: nn.Module, jitter: float) -> None:
    """Noise of ``jitter`` standard deviations on each weight (not on biases and norms) of all experts but the first."""
    assert isinstance(layer, RoutedLayer)
    for expert in list(layer.experts)[1:] if jitter else []:
        for parameter in expert.parameters():
            if parameter.ndim > 1:
                parameter.add_(jitter * parameter.std() * torch.randn(parameter.shape).to(parameter))
