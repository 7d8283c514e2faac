"""ResNets (He et al. 2016) in CIFAR and ImageNet form: any width, depths 8 to 50, dense or as the backbone of a
pathway model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.models.backbone import Backbone, Stage, StagedNetwork, initialise, scaled
from robustmoe.models.base import ImageShape
from robustmoe.models.convolution import DENSE, Conv, Handed, Layers, Norm

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

Stem = Literal["cifar", "imagenet"]
"""How a network begins: a 3x3 convolution, or a 7x7 one of stride 2 and a 3x3 max-pooling of stride 2."""


def stem_conv(stem: Stem, channels: int, outputs: int) -> Conv:
    """Returns the first convolution; never routed."""
    return Conv(channels, outputs, 7, 2) if stem == "imagenet" else Conv(channels, outputs, 3, 1)


def stem_pool(stem: Stem, x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1) if stem == "imagenet" else x


def stem_size(stem: Stem, size: int) -> int:
    """Pixels along one side behind `stem_conv` and `stem_pool`."""
    return halved(halved(size)) if stem == "imagenet" else size


def halved(size: int) -> int:
    """Pixels along one side after a stride of 2, rounded up."""
    return -(-size // 2)


class Same(nn.Module):
    """The input itself."""

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        return x


class Projection(nn.Module):
    """1x1 convolution and BatchNorm where a block changes its shape."""

    def __init__(self, inputs: int, outputs: int, stride: int, layers: Layers = DENSE) -> None:
        super().__init__()
        self.conv = layers.conv(inputs, outputs, 1, stride)
        self.norm = layers.norm(outputs)

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        out: Tensor = self.norm(self.conv(x, segments), segments)
        return out


class Pad(nn.Module):
    """Option A of He et al. 2016: subsample, and zeros for the new channels, half on either side; no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def shortcut_of(spec: ResNet, inputs: int, outputs: int, stride: int, layers: Layers) -> nn.Module:
    """Returns what a block adds to its branch. Projections are routed in the ImageNet form alone (AdvMoE's code)."""
    if stride == 1 and inputs == outputs:
        return Same()
    if spec.shortcut == "pad":
        return Pad(inputs, outputs, stride)
    return Projection(inputs, outputs, stride, layers if spec.stem == "imagenet" else DENSE)


class Basic(nn.Module):
    """Two 3x3 convolutions; (n, inputs, h, w) -> (n, width, h/stride, w/stride)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, layers: Layers, spec: ResNet) -> None:
        super().__init__()
        self.conv1, self.norm1 = layers.conv(inputs, width, 3, stride), layers.norm(width)
        self.conv2, self.norm2 = layers.conv(width, width, 3, 1), layers.norm(width)
        self.shortcut = shortcut_of(spec, inputs, width, stride, layers)

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x, segments), segments))
        out = self.norm2(self.conv2(out, segments), segments)
        return F.relu(out + self.shortcut(x, segments))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; (n, inputs, h, w) -> (n, 4 width, h/stride, w/stride). Between them are ``spec.inner`` widths."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, layers: Layers, spec: ResNet) -> None:
        super().__init__()
        inner = spec.inner * width
        self.conv1, self.norm1 = layers.conv(inputs, inner, 1, 1), layers.norm(inner)
        self.conv2, self.norm2 = layers.conv(inner, inner, 3, stride), layers.norm(inner)
        self.conv3, self.norm3 = layers.conv(inner, 4 * width, 1, 1), layers.norm(4 * width)
        self.shortcut = shortcut_of(spec, inputs, 4 * width, stride, layers)

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x, segments), segments))
        out = F.relu(self.norm2(self.conv2(out, segments), segments))
        out = self.norm3(self.conv3(out, segments), segments)
        return F.relu(out + self.shortcut(x, segments))


class ResNetNetwork(StagedNetwork):
    """The network of `ResNet`. Routed in the CIFAR form: the main-branch convolutions; the stem keeps its width, and
    stem and projections are shared. In the ImageNet form the projections too, and the shared stem is scaled (AdvMoE's
    code does both).
    """

    def __init__(
        self, spec: ResNet, num_classes: int, image_shape: ImageShape, layers: Layers, ratio: float = 1.0
    ) -> None:
        super().__init__()
        block = Bottleneck if spec.depth == 50 else Basic
        channels, *size = image_shape
        height, width = (stem_size(spec.stem, side) for side in size)
        whole = layers.routed and spec.stem == "cifar"
        inputs = spec.width if whole else scaled(ratio, spec.width)
        self.begins = spec.stem
        self.stem, self.norm = stem_conv(spec.stem, channels, inputs), Norm(inputs)
        self.stages, self.inputs = nn.ModuleList(), []
        for place, blocks in enumerate(BLOCKS[spec.depth]):
            self.inputs.append((inputs, height, width))
            planes = scaled(ratio, spec.width * 2**place)
            stage = Stage()
            for position in range(blocks):
                stride = 2 if place > 0 and position == 0 else 1
                stage.append(block(inputs, planes, stride, layers, spec))
                inputs = planes * block.expansion
                height, width = (halved(height), halved(width)) if stride == 2 else (height, width)
            self.stages.append(stage)
        self.head = nn.Linear(inputs, num_classes)
        initialise(self)

    def entry(self, x: Tensor) -> Tensor:
        return stem_pool(self.begins, F.relu(self.norm(self.stem(x))))

    def exit(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class ResNet(Backbone):
    """ResNet of any depth and width, for small images or for large ones.

    ``depth``: 8, 14, 20 and 32 have three stages, 10, 18, 34, 50 four. ``width``: channels of the stem and first stage.
    ``shortcut``: "projection" (1x1 convolution) or "pad" (no parameters). ``stem``: "cifar" (3x3, no max-pooling;
    also for Tiny-ImageNet's 64 pixels, which AdvMoE's code enlarges to 128) or "imagenet" (7x7 of stride 2, then
    max-pooling of stride 2). ``inner``: how many times wider the inner convolutions of depth 50 are; 2 is torchvision's
    wide_resnet50_2.
    """

    depth: int = 18
    width: int = 64
    shortcut: Shortcut = "projection"
    stem: Stem = "cifar"
    inner: int = 1

    def __post_init__(self) -> None:
        if self.depth not in BLOCKS:
            raise ValueError(f"depth must be one of {sorted(BLOCKS)}; got {self.depth}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1; got {self.width}")
        if self.inner < 1 or (self.inner > 1 and self.depth != 50):
            raise ValueError(f"inner must be 1, or more at depth 50; got {self.inner} at depth {self.depth}")

    def make(
        self, num_classes: int, image_shape: ImageShape, layers: Layers = DENSE, ratio: float = 1.0
    ) -> ResNetNetwork:
        return ResNetNetwork(self, num_classes, image_shape, layers, ratio)


def resnet8(width: int = 32) -> ResNet:
    """ResNet-8: three stages of one block."""
    return ResNet(8, width)


def resnet10(width: int = 64, stem: Stem = "cifar") -> ResNet:
    """ResNet-10: four stages of one block."""
    return ResNet(10, width, stem=stem)


def resnet18(width: int = 64, stem: Stem = "cifar") -> ResNet:
    """ResNet-18."""
    return ResNet(18, width, stem=stem)


def resnet20(width: int = 16, shortcut: Shortcut = "pad") -> ResNet:
    """CIFAR ResNet-20 with parameter-free shortcuts: the router of AdvMoE."""
    return ResNet(20, width, shortcut)


def resnet34(width: int = 64, stem: Stem = "cifar") -> ResNet:
    """ResNet-34."""
    return ResNet(34, width, stem=stem)


def resnet50(width: int = 64, stem: Stem = "cifar", inner: int = 1) -> ResNet:
    """ResNet-50 (bottleneck blocks)."""
    return ResNet(50, width, stem=stem, inner=inner)
