"""DenseNet-BC (Huang et al. 2017), dense or as the backbone of a pathway model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.models.backbone import Backbone, Stage, scaled
from robustmoe.models.base import ImageShape
from robustmoe.models.convolution import DENSE, Handed, Layers
from robustmoe.models.preactivation import PreactivationNetwork
from robustmoe.models.resnet import Stem, halved, stem_size

BLOCKS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}
"""Layers a block of the ImageNet family; the CIFAR family, 6n + 4, has three blocks of n layers."""

BOTTLENECK = 4
"""Channels between the two convolutions of a layer, in growths."""


class Layer(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution, BatchNorm, ReLU, 3x3 convolution; (n, inputs, h, w) -> (n, growth, h, w)."""

    def __init__(self, inputs: int, growth: int, layers: Layers) -> None:
        super().__init__()
        between = BOTTLENECK * growth
        self.norm1, self.conv1 = layers.norm(inputs), layers.conv(inputs, between, 1, 1)
        self.norm2, self.conv2 = layers.norm(between), layers.conv(between, growth, 3, 1)

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        out = self.conv1(F.relu(self.norm1(x, segments)), segments)
        new: Tensor = self.conv2(F.relu(self.norm2(out, segments)), segments)
        return new


class DenseBlock(nn.ModuleList):
    """Layers that each read all channels so far; (n, inputs, h, w) -> (n, inputs + layers * growth, h, w)."""

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        channels = [x]
        for layer in self:
            channels.append(layer(torch.cat(channels, 1), segments))
        return torch.cat(channels, 1)


class Transition(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution to half the channels (rounded down), 2x2 average pooling of stride 2 (an odd
    side is rounded up, its last row averaged alone).
    """

    def __init__(self, inputs: int, outputs: int, layers: Layers) -> None:
        super().__init__()
        self.norm, self.conv = layers.norm(inputs), layers.conv(inputs, outputs, 1, 1)

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x, segments)), segments), 2, ceil_mode=True)


class DenseNetNetwork(PreactivationNetwork):
    """The network of `DenseNet`. Routed: every convolution but the stem, the transitions' too; the stem is shared, and
    growth and stem are scaled, so a pathway is exactly the slim network. (Not AdvMoE's: its MoE version of DenseNet
    cannot be constructed.)
    """

    def __init__(self, spec: DenseNet, num_classes: int, image_shape: ImageShape, layers: Layers, ratio: float) -> None:
        image, *size = image_shape
        height, width = (stem_size(spec.stem, side) for side in size)
        growth, inputs = scaled(ratio, spec.growth), scaled(ratio, 2 * spec.growth)
        super().__init__(spec.stem, image, inputs)
        blocks = spec.blocks()
        for place, count in enumerate(blocks):
            self.inputs.append((inputs, height, width))
            block = DenseBlock(Layer(inputs + position * growth, growth, layers) for position in range(count))
            stage = Stage([block])
            inputs += count * growth
            if place < len(blocks) - 1:
                stage.append(Transition(inputs, inputs // 2, layers))
                inputs, height, width = inputs // 2, halved(height), halved(width)
            self.stages.append(stage)
        self.end(inputs, num_classes, layers)


@dataclass(frozen=True)
class DenseNet(Backbone):
    """DenseNet-BC: bottlenecks of four growths, transitions to half the channels, twice the growth in the stem.

    ``depth``: 6n + 4 (three blocks of n layers: 40, 100), or 121, 169, 201 (four blocks). ``growth``: new channels a
    layer. ``stem``: "cifar" (3x3) or "imagenet" (7x7 of stride 2, BatchNorm, ReLU, max-pooling of stride 2).
    """

    depth: int = 40
    growth: int = 12
    stem: Stem = "cifar"

    def __post_init__(self) -> None:
        if self.depth not in BLOCKS and (self.depth < 10 or self.depth % 6 != 4):
            raise ValueError(f"depth must be 6n + 4, such as 40 or 100, or one of {sorted(BLOCKS)}; got {self.depth}")
        if self.growth < 1:
            raise ValueError(f"growth must be at least 1; got {self.growth}")

    def blocks(self) -> tuple[int, ...]:
        """Layers in each dense block."""
        return BLOCKS.get(self.depth) or ((self.depth - 4) // 6,) * 3

    def make(
        self, num_classes: int, image_shape: ImageShape, layers: Layers = DENSE, ratio: float = 1.0
    ) -> DenseNetNetwork:
        return DenseNetNetwork(self, num_classes, image_shape, layers, ratio)


def densenet40(growth: int = 12, stem: Stem = "cifar") -> DenseNet:
    """DenseNet-40-BC."""
    return DenseNet(40, growth, stem)


def densenet121(growth: int = 32, stem: Stem = "imagenet") -> DenseNet:
    """DenseNet-121."""
    return DenseNet(121, growth, stem)
