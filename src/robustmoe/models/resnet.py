"""ResNets with the CIFAR stem (He et al. 2016): any width, depths 8 to 50, dense or as the backbone of a pathway
model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.models.backbone import Backbone, Stage, StagedNetwork, initialise, scaled
from robustmoe.models.base import ImageShape
from robustmoe.models.convolution import DENSE, Conv, Layers, Norm, Segments

BLOCKS = {
    8: (1, 1, 1),
    14: (2, 2, 2),
    20: (3, 3, 3),
    32: (5, 5, 5),
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
}
"""Blocks a stage. Three stages: the CIFAR family 6n+2 (widths w, 2w, 4w); four: the ImageNet family (w, 2w, 4w, 8w)."""

Shortcut = Literal["projection", "pad"]


class Projection(nn.Module):
    """1x1 convolution and BatchNorm where a block changes its shape; never routed."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = Conv(inputs, outputs, 1, stride)
        self.norm = Norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Pad(nn.Module):
    """Option A of He et al. 2016: subsample, and zeros for the new channels, half on either side; no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def shortcut_of(kind: Shortcut, inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return Projection(inputs, outputs, stride) if kind == "projection" else Pad(inputs, outputs, stride)


class Basic(nn.Module):
    """Two 3x3 convolutions; (n, inputs, h, w) -> (n, width, h/stride, w/stride)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, layers: Layers, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1, self.norm1 = layers.conv(inputs, width, 3, stride), layers.norm(width)
        self.conv2, self.norm2 = layers.conv(width, width, 3, 1), layers.norm(width)
        self.shortcut = shortcut_of(shortcut, inputs, width, stride)

    def forward(self, x: Tensor, segments: Segments | None) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x, segments), segments))
        out = self.norm2(self.conv2(out, segments), segments)
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; (n, inputs, h, w) -> (n, 4 width, h/stride, w/stride)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, layers: Layers, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1, self.norm1 = layers.conv(inputs, width, 1, 1), layers.norm(width)
        self.conv2, self.norm2 = layers.conv(width, width, 3, stride), layers.norm(width)
        self.conv3, self.norm3 = layers.conv(width, 4 * width, 1, 1), layers.norm(4 * width)
        self.shortcut = shortcut_of(shortcut, inputs, 4 * width, stride)

    def forward(self, x: Tensor, segments: Segments | None) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x, segments), segments))
        out = F.relu(self.norm2(self.conv2(out, segments), segments))
        out = self.norm3(self.conv3(out, segments), segments)
        return F.relu(out + self.shortcut(x))


class ResNetNetwork(StagedNetwork):
    """The network of `ResNet`. Routed: the main-branch convolutions; the stem keeps its width and the projections
    theirs (AdvMoE's CIFAR form).
    """

    def __init__(
        self, spec: ResNet, num_classes: int, image_shape: ImageShape, layers: Layers, ratio: float = 1.0
    ) -> None:
        super().__init__()
        block = Bottleneck if spec.depth == 50 else Basic
        channels, height, width = image_shape
        inputs = spec.width if layers.routed else scaled(ratio, spec.width)
        self.stem, self.norm = Conv(channels, inputs, 3, 1), Norm(inputs)
        self.stages, self.inputs = nn.ModuleList(), []
        for place, blocks in enumerate(BLOCKS[spec.depth]):
            self.inputs.append((inputs, height, width))
            planes = scaled(ratio, spec.width * 2**place)
            stage = Stage()
            for position in range(blocks):
                stride = 2 if place > 0 and position == 0 else 1
                stage.append(block(inputs, planes, stride, layers, spec.shortcut))
                inputs = planes * block.expansion
                height, width = -(-height // stride), -(-width // stride)
            self.stages.append(stage)
        self.head = nn.Linear(inputs, num_classes)
        initialise(self)

    def entry(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.stem(x)))

    def leave(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class ResNet(Backbone):
    """ResNet for small images: 3x3 stem, no max-pooling. Depths 8, 14, 20, 32 have three stages, 10, 18, 34, 50 four.

    ``width``: channels of the stem and first stage. ``shortcut``: "projection" (1x1 convolution) or "pad" (no
    parameters).
    """

    depth: int = 18
    width: int = 64
    shortcut: Shortcut = "projection"

    def __post_init__(self) -> None:
        if self.depth not in BLOCKS:
            raise ValueError(f"depth must be one of {sorted(BLOCKS)}; got {self.depth}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1; got {self.width}")

    def make(
        self, num_classes: int, image_shape: ImageShape, layers: Layers = DENSE, ratio: float = 1.0
    ) -> ResNetNetwork:
        return ResNetNetwork(self, num_classes, image_shape, layers, ratio)


def resnet8(width: int = 32) -> ResNet:
    """ResNet-8: three stages of one block."""
    return ResNet(8, width)


def resnet10(width: int = 64) -> ResNet:
    """ResNet-10: four stages of one block."""
    return ResNet(10, width)


def resnet18(width: int = 64) -> ResNet:
    """ResNet-18 with the CIFAR stem."""
    return ResNet(18, width)


def resnet20(width: int = 16, shortcut: Shortcut = "pad") -> ResNet:
    """CIFAR ResNet-20 with parameter-free shortcuts: the router of AdvMoE."""
    return ResNet(20, width, shortcut)


def resnet34(width: int = 64) -> ResNet:
    """ResNet-34 with the CIFAR stem."""
    return ResNet(34, width)


def resnet50(width: int = 64) -> ResNet:
    """ResNet-50 (bottleneck blocks) with the CIFAR stem."""
    return ResNet(50, width)
