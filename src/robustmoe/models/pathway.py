"""AdvMoE's model (Zhang et al., ICCV 2023): a backbone whose convolutions keep one filter bank an expert; one image
router picks the pathway.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.models.base import ImageShape, ModelSpec, NetworkSpec, RoutedModel, compact
from robustmoe.models.convolution import RoutedConv, Segments
from robustmoe.models.norm import Normalise, Standardise, wide
from robustmoe.models.resnet import ResNet, resnet20
from robustmoe.routing import Tape, straight_through


class PathwayModel(RoutedModel):
    """One decision an image, used by every routed convolution: exactly E pathways. BatchNorms, stem, shortcuts and
    head are shared.

    In train mode a shared BatchNorm sees the whole re-assembled batch (the exact statistics of the paper's method);
    in eval mode an image's logits do not depend on the rest of the batch.
    """

    def __init__(self, router: nn.Module, network: nn.Module, experts: int, normalise: Normalise) -> None:
        super().__init__()
        self.normalise = normalise
        self.router = router
        self.network = network
        self.num_experts = experts

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        x = compact(self.normalise(x))
        routing = tape("router", straight_through(wide(self.router(x))[:, None]))
        expert, weight = routing.index[:, 0, 0], routing.weight[:, 0, 0]
        if routing.k != 1:
            raise ValueError(f"a pathway model takes one expert an image; the routing has k = {routing.k}")
        if tape.forced and not bool((weight == 1).all()):
            raise ValueError("a pathway model's forced weights must be 1")
        order = torch.argsort(expert, stable=True)
        sizes = torch.bincount(expert, minlength=self.num_experts).tolist()
        logits = self.network(compact(x[order]), Segments(sizes, weight[order]))
        return logits[torch.argsort(order)]


@dataclass(frozen=True)
class Pathway(ModelSpec):
    """A MoE-CNN: each convolution of ``backbone`` has ``experts`` filter banks of ``ratio`` times its width.

    One forward pass costs about ratio^2 of the dense backbone, plus the router, whatever the number of experts.
    ``router``: any network; the default is the paper's ResNet-20. ``standardise``: its logits have mean 0 and
    variance 1 over the training batches, so that no expert is dead at the start. The decision is top-1 with a
    straight-through gradient.
    """

    backbone: ResNet
    experts: int = 2
    ratio: float = 0.5
    router: NetworkSpec = resnet20()  # noqa: RUF009 (a frozen value)
    standardise: bool = False

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError(f"experts must be at least 1; got {self.experts}")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1]; got {self.ratio}")

    def build(self, num_classes: int, image_shape: ImageShape, normalise: Normalise) -> RoutedModel:
        network = self.backbone.routed_network(num_classes, image_shape, partial(RoutedConv, self.experts), self.ratio)
        router = self.router.network(self.experts, image_shape)
        if self.standardise:
            router = Standardise(router, self.experts)
        return PathwayModel(router, network, self.experts, normalise)
