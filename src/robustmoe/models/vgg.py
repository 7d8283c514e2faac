"""VGG-16 with BatchNorm (Simonyan and Zisserman 2015), dense or as the backbone of a pathway model."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.models.backbone import Backbone, Stage, StagedNetwork, initialise, scaled
from robustmoe.models.base import ImageShape
from robustmoe.models.convolution import DENSE, Conv, Handed, Layers, Norm
from robustmoe.models.resnet import halved

GROUPS = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""What each stage has: how many times ``width`` its channels are, and its convolutions."""

HIDDEN = 256
"""Units of the two hidden layers of the classifier, never scaled."""


class VGGBlock(nn.Module):
    """3x3 convolution, BatchNorm, ReLU; (n, inputs, h, w) -> (n, outputs, h, w)."""

    def __init__(self, inputs: int, outputs: int, layers: Layers) -> None:
        super().__init__()
        self.conv, self.norm = layers.conv(inputs, outputs, 3, 1), layers.norm(outputs)

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        return F.relu(self.norm(self.conv(x, segments), segments))


class Pool(nn.Module):
    """2x2 max-pooling of stride 2; an odd side is rounded up, so that no image is too small."""

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        return F.max_pool2d(x, 2, ceil_mode=True)


class VGGNetwork(StagedNetwork):
    """The network of `VGG16`. Routed: every convolution but the first, which is scaled all the same; the classifier is
    shared (AdvMoE's choice). A pathway is exactly the slim network.
    """

    def __init__(self, spec: VGG16, num_classes: int, image_shape: ImageShape, layers: Layers, ratio: float) -> None:
        super().__init__()
        channels, height, width = image_shape
        inputs = scaled(ratio, spec.width)
        self.stem, self.norm = Conv(channels, inputs, 3, 1), Norm(inputs)
        self.stages, self.inputs = nn.ModuleList(), []
        for place, (times, convolutions) in enumerate(GROUPS):
            self.inputs.append((inputs, height, width))
            stage = Stage()
            for _ in range(convolutions - 1 if place == 0 else convolutions):
                stage.append(VGGBlock(inputs, scaled(ratio, times * spec.width), layers))
                inputs = scaled(ratio, times * spec.width)
            if place < len(GROUPS) - 1:
                stage.append(Pool())
                height, width = halved(height), halved(width)
            self.stages.append(stage)
        self.head = nn.Sequential(
            nn.Linear(4 * inputs, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, num_classes),
        )
        initialise(self)

    def entry(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.stem(x)))

    def exit(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))
        return logits


@dataclass(frozen=True)
class VGG16(Backbone):
    """VGG-16 with BatchNorm for images of any size: no fifth pooling, average pooling to 2x2, and a classifier of two
    hidden layers of 256 units without dropout (AdvMoE's form).

    ``width``: channels of the first convolution; the others have 1, 2, 4 and 8 times as many.
    """

    width: int = 64

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1; got {self.width}")

    def make(self, num_classes: int, image_shape: ImageShape, layers: Layers = DENSE, ratio: float = 1.0) -> VGGNetwork:
        return VGGNetwork(self, num_classes, image_shape, layers, ratio)
