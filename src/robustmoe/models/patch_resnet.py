"""A small residual network on patches: the backbone on which conditional normalisation is studied on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.models.backbone import Backbone, Stage, StagedNetwork, initialise, scaled
from robustmoe.models.base import ImageShape
from robustmoe.models.convolution import DENSE, Handed, Layers, Norm
from robustmoe.models.resnet import Basic, ResNet


class PatchResNetNetwork(StagedNetwork):
    """The network of `PatchResNet`. Routed: every convolution but the patches'; the stem is scaled all the same, so a
    pathway is exactly the slim network.
    """

    def __init__(
        self, spec: PatchResNet, num_classes: int, image_shape: ImageShape, layers: Layers, ratio: float
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        planes = scaled(ratio, spec.width)
        self.stem, self.norm = nn.Conv2d(channels, planes, spec.patch, spec.patch, bias=False), Norm(planes)
        stage = Stage(Basic(planes, planes, 1, layers, ResNet()) for _ in range(spec.blocks))
        self.stages, self.inputs = nn.ModuleList([stage]), [(planes, height // spec.patch, width // spec.patch)]
        self.head = nn.Linear(planes, num_classes)
        initialise(self)

    def entry(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.stem(x)))

    def exit(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class PatchResNet(Backbone):
    """One convolution of ``patch`` x ``patch`` pixels and that stride to ``width`` channels, ``blocks`` residual blocks
    of two 3x3 convolutions, average, linear layer: 0.64 million multiply-adds for images of 32 pixels.

    Pixels that fill no patch, at the right and lower edge, are left out.
    """

    width: int = 16
    patch: int = 4
    blocks: int = 2

    def __post_init__(self) -> None:
        for name in ("width", "patch", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")

    def make(
        self, num_classes: int, image_shape: ImageShape, layers: Layers = DENSE, ratio: float = 1.0
    ) -> PatchResNetNetwork:
        if min(image_shape[1:]) < self.patch:
            raise ValueError(f"a patch of {self.patch} pixels does not fit in images of {image_shape[1:]}")
        return PatchResNetNetwork(self, num_classes, image_shape, layers, ratio)
