"""AdvMoE's model (Zhang et al., ICCV 2023): a backbone whose convolutions keep one filter bank an expert; a router
picks the pathway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.models.backbone import Backbone, StagedNetwork, check_ratio
from robustmoe.models.base import ImageShape, ModelSpec, NetworkSpec, RoutedModel, to_channels_last
from robustmoe.models.convolution import Segments, dispatch, routed_layers
from robustmoe.models.norm import Normalise, Standardise, at_least_float32
from robustmoe.models.parts import Fork, Function, Leaf, Part, through
from robustmoe.models.resnet import resnet20
from robustmoe.routing import Routing, Tape, Trace, straight_through


class PathwayModel(RoutedModel):
    """One decision an image, used by every routed convolution: exactly E pathways. Stem, head, and what else the
    backbone does not route are shared; BatchNorms too, unless the network's layers have one an expert.

    In train mode a shared BatchNorm sees the whole re-assembled batch (the exact statistics of the paper's method);
    those of the stem and of unrouted shortcuts are always shared, so the batch stays whole.
    In eval mode an image's logits do not depend on the rest of the batch, and each expert's images run through one slim
    network.
    """

    def __init__(self, router: nn.Module, network: StagedNetwork, experts: int, normalise: Normalise) -> None:
        super().__init__()
        self.normalise = normalise
        self.router = router
        self.network = network
        self.num_experts = experts

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        x = to_channels_last(self.normalise(x))
        routing = tape("router", decide(self.router, x))
        weight = weight_of(routing, bool(tape.forced))
        logits = dispatch(self.network, x, routing, weight, apart=not self.training)
        return logits * weight.detach()[:, None]  # 1, or NaN of a router that is broken

    def route(self, x: Float[Tensor, "n ch h w"]) -> Trace:
        return {"router": decide(self.router, to_channels_last(self.normalise(x)))}

    def parts(self) -> Part:
        def pathway(expert: int) -> Function:
            return lambda x: self.network(self.normalise(x), whole(x, expert, self.num_experts))

        leaves = tuple(Leaf(pathway(expert)) for expert in range(self.num_experts))
        return Fork("router", through(self.normalise, self.router), leaves)


class StagedPathwayModel(RoutedModel):
    """One decision an image and stage, by a router of each stage that sees what enters it: E^S pathways (the paper's
    figure has routers along the network; its code has one).
    """

    def __init__(self, routers: list[nn.Module], network: StagedNetwork, experts: int, normalise: Normalise) -> None:
        super().__init__()
        self.normalise = normalise
        self.routers = nn.ModuleList(routers)
        self.network = network
        self.num_experts = experts

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        x = self.network.entry(to_channels_last(self.normalise(x)))
        last = len(self.routers) - 1
        for position, (router, stage) in enumerate(zip(self.routers, self.network.stages)):

            def function(part: Tensor, segments: Segments, stage: nn.Module = stage, place: int = position) -> Tensor:
                out: Tensor = stage(part, segments)
                return self.network.exit(out, segments) if place == last else out

            routing = tape(f"routers.{position}", decide(router, x))
            weight = weight_of(routing, bool(tape.forced))
            x = dispatch(function, x, routing, weight, apart=not self.training)
            x = x * weight.detach().view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return x

    def parts(self) -> Part:
        return self._fork(lambda x: self.network.entry(self.normalise(x)), 0)

    def _fork(self, before: Function, place: int) -> Part:
        """Returns what follows ``before``, which ends where stage ``place`` begins."""
        stages = self.network.stages
        if place == len(stages):
            return Leaf(before)

        def beyond(expert: int) -> Function:
            def function(x: Tensor) -> Tensor:
                segments = whole(x, expert, self.num_experts)
                out: Tensor = stages[place](before(x), segments)
                return self.network.exit(out, segments) if place == len(stages) - 1 else out

            return function

        branches = tuple(self._fork(beyond(expert), place + 1) for expert in range(self.num_experts))
        return Fork(f"routers.{place}", lambda x: self.routers[place](before(x)), branches)


def whole(x: Tensor, expert: int, experts: int) -> Segments:
    """Sends all images to one expert."""
    return Segments(
        [x.shape[0] if each == expert else 0 for each in range(experts)], torch.ones(x.shape[0], device=x.device)
    )


def decide(router: nn.Module, x: Tensor) -> Routing:
    return straight_through(at_least_float32(router(x))[:, None]).knowing({"ones": True})


def weight_of(routing: Routing, forced: bool) -> Tensor:
    """(n,) each image's weight, 1 in value. Raises ValueError for a forced routing of another kind."""
    if routing.k != 1:
        raise ValueError(f"a pathway model takes one expert an image; the routing has k = {routing.k}")
    weight = routing.weight[:, 0, 0]
    if forced and "ones" not in routing.known:
        if bool(((weight != 1) & ~weight.isnan()).any()):  # NaN goes on into the logits
            raise ValueError("a pathway model's forced weights must be 1")
        routing.known["ones"] = True
    return weight


@dataclass(frozen=True)
class Pathway(ModelSpec):
    """A MoE-CNN: each convolution of ``backbone`` has ``experts`` filter banks of ``ratio`` times its width.

    One forward pass costs about ratio^2 of the dense backbone, plus the router, whatever the number of experts.
    ``router``: any network; the default is the paper's ResNet-20. ``routers``: "image", one decision for the whole
    network (the released code), or "stage", one for each stage by a router of its own on what enters it.
    ``norm``: BatchNorms "shared" by the experts (the paper's) or "own", one an expert. ``standardise``: router logits
    have mean 0 and variance 1 over the training batches, so that no expert is dead at the start (not the paper's). The
    decision is top-1 with a straight-through gradient.
    """

    backbone: Backbone
    experts: int = 2
    ratio: float = 0.5
    router: NetworkSpec = resnet20()  # noqa: RUF009 (a frozen value)
    routers: Literal["image", "stage"] = "image"
    norm: Literal["shared", "own"] = "shared"
    standardise: bool = False

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError(f"experts must be at least 1; got {self.experts}")
        check_ratio(self.ratio)

    def build(self, num_classes: int, image_shape: ImageShape, normalise: Normalise) -> RoutedModel:
        layers = routed_layers(self.experts, own_norm=self.norm == "own")
        network = self.backbone.make(num_classes, image_shape, layers, self.ratio)
        if self.routers == "image":
            return PathwayModel(self._router(image_shape), network, self.experts, normalise)
        routers = [self._router(shape) for shape in network.inputs]
        return StagedPathwayModel(routers, network, self.experts, normalise)

    def _router(self, image_shape: ImageShape) -> nn.Module:
        router = self.router.network(self.experts, image_shape)
        return Standardise(router, self.experts) if self.standardise else router
