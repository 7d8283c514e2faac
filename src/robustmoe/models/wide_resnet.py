"""Wide ResNets (Zagoruyko and Komodakis 2016): pre-activation blocks, dense or as the backbone of a pathway model."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.models.backbone import Backbone, Stage, StagedNetwork, initialise, scaled
from robustmoe.models.base import ImageShape
from robustmoe.models.convolution import DENSE, Handed, Layers, Norm
from robustmoe.models.resnet import Stem, halved, stem_conv, stem_pool, stem_size


class PreactivationNetwork(StagedNetwork):
    """A network whose blocks begin with BatchNorm and ReLU: its stem (a convolution alone in the CIFAR form;
    convolution, BatchNorm, ReLU, max-pooling in the ImageNet form) and its end (BatchNorm, ReLU, average, linear).
    """

    def __init__(self, stem: Stem, channels: int, outputs: int) -> None:
        super().__init__()
        self.begins = stem
        self.stem = stem_conv(stem, channels, outputs)
        self.norm = Norm(outputs) if stem == "imagenet" else None
        self.stages, self.inputs = nn.ModuleList(), []

    def end(self, channels: int, num_classes: int, layers: Layers) -> None:
        """Adds the last layers, then gives every convolution its initial values."""
        self.last = layers.norm(channels)
        self.head = nn.Linear(channels, num_classes)
        initialise(self)

    def entry(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x if self.norm is None else stem_pool(self.begins, F.relu(self.norm(x)))

    def exit(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        logits: Tensor = self.head(F.relu(self.last(x, segments)).mean((2, 3)))
        return logits


class Preactivation(nn.Module):
    """Twice BatchNorm, ReLU, 3x3 convolution; (n, inputs, h, w) -> (n, width, h/stride, w/stride).

    In a block that changes the shape, the 1x1 shortcut and the first convolution both read ReLU(BatchNorm(x)), as
    Zagoruyko and Komodakis have it (AdvMoE's code gives them the raw x there).
    """

    def __init__(self, inputs: int, width: int, stride: int, layers: Layers) -> None:
        super().__init__()
        self.norm1, self.conv1 = layers.norm(inputs), layers.conv(inputs, width, 3, stride)
        self.norm2, self.conv2 = layers.norm(width), layers.conv(width, width, 3, 1)
        self.shortcut = None if stride == 1 and inputs == width else layers.conv(inputs, width, 1, stride)

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        active = F.relu(self.norm1(x, segments))
        out = F.relu(self.norm2(self.conv1(active, segments), segments))
        out = self.conv2(out, segments)
        added: Tensor = out + (x if self.shortcut is None else self.shortcut(active, segments))
        return added


class WideResNetNetwork(PreactivationNetwork):
    """The network of `WideResNet`. Routed: every convolution but the stem, the shortcuts' too. The stem is shared, and
    scaled (AdvMoE's choice), so a pathway is exactly the slim network.
    """

    def __init__(
        self, spec: WideResNet, num_classes: int, image_shape: ImageShape, layers: Layers, ratio: float
    ) -> None:
        channels, *size = image_shape
        height, width = (stem_size(spec.stem, side) for side in size)
        inputs = scaled(ratio, 16)
        super().__init__(spec.stem, channels, inputs)
        for place in range(3):
            self.inputs.append((inputs, height, width))
            planes = scaled(ratio, 16 * spec.width * 2**place)
            stage = Stage()
            for position in range((spec.depth - 4) // 6):
                stride = 2 if place > 0 and position == 0 else 1
                stage.append(Preactivation(inputs, planes, stride, layers))
                inputs = planes
            height, width = (halved(height), halved(width)) if place > 0 else (height, width)
            self.stages.append(stage)
        self.end(inputs, num_classes, layers)


@dataclass(frozen=True)
class WideResNet(Backbone):
    """Wide ResNet: three stages of pre-activation blocks, no dropout.

    ``depth``: 6n + 4, n blocks a stage. ``width``: how many times 16, 32, 64 the channels of the stages are (the stem
    has 16). ``stem``: "cifar" (3x3) or "imagenet" (7x7 of stride 2, BatchNorm, ReLU, max-pooling of stride 2).
    """

    depth: int = 28
    width: int = 10
    stem: Stem = "cifar"

    def __post_init__(self) -> None:
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"depth must be 6n + 4 with n at least 1, such as 10, 16, 28; got {self.depth}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1; got {self.width}")

    def make(
        self, num_classes: int, image_shape: ImageShape, layers: Layers = DENSE, ratio: float = 1.0
    ) -> WideResNetNetwork:
        return WideResNetNetwork(self, num_classes, image_shape, layers, ratio)


def wrn_28_10(stem: Stem = "cifar") -> WideResNet:
    """WRN-28-10."""
    return WideResNet(28, 10, stem)
