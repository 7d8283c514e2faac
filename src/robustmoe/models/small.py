"""Small networks: routers, and experts for small images; and any network on a smaller copy of the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.models.base import ImageShape, NetworkSpec


class LinearNetwork(nn.Module):
    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


@dataclass(frozen=True)
class Linear(NetworkSpec):
    """One linear layer on the normalised pixels: the router of the dual model (Zhang et al. 2025, released code)."""

    def network(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        channels, height, width = image_shape
        return LinearNetwork(channels * height * width, num_classes)


class SmallCNNNetwork(nn.Module):
    def __init__(self, channels: int, width: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


@dataclass(frozen=True)
class SmallCNN(NetworkSpec):
    """Two strided 3x3 convolutions, average pooling, one linear layer; no BatchNorm. A cheap router."""

    width: int = 16

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1; got {self.width}")

    def network(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        return SmallCNNNetwork(image_shape[0], self.width, num_classes)


class DownsampledNetwork(nn.Module):
    """The network of `Downsampled`."""

    def __init__(self, inner: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.inner = inner
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.adaptive_avg_pool2d(x, self.size))


@dataclass(frozen=True)
class Downsampled(NetworkSpec):
    """``inner`` on the image averaged down to at most ``size`` x ``size`` pixels: a router for large images.

    A side that is not longer than ``size`` stays as it is. Every new pixel is the mean of the old ones that it touches,
    so gradients reach all of them. AdvMoE's code routes at full resolution: at 224 pixels its ResNet-20 alone (1.99
    GMAC) costs more than the dense ResNet-18 (1.81); at 64 pixels it is 0.16. Not the paper's.
    """

    inner: NetworkSpec
    size: int = 64

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1; got {self.size}")

    def network(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        channels, height, width = image_shape
        size = min(height, self.size), min(width, self.size)
        return DownsampledNetwork(self.inner.network(num_classes, (channels, *size)), size)
