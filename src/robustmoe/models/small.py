"""Small networks: routers, and experts for small images; and any network on a smaller or larger copy of the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.models.base import ImageShape, NetworkSpec
from robustmoe.models.norm import at_least_float32


class LinearNetwork(nn.Module):
    """The network of `Linear`: a linear layer on all pixels."""

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
    """The network of `SmallCNN`."""

    def __init__(self, channels: int, width: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


@dataclass(frozen=True)
class SmallCNN(NetworkSpec):
    """Two strided 3x3 convolutions, average pooling, one linear layer; no BatchNorm. A cheap router.

    ``width``: channels of the first convolution; the second has twice as many.
    """

    width: int = 16

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1; got {self.width}")

    def network(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        return SmallCNNNetwork(image_shape[0], self.width, num_classes)


class ConvSmallNetwork(nn.Module):
    """The network of `ConvSmall`."""

    def __init__(self, image_shape: ImageShape, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        channels, height, side = image_shape
        self.conv1 = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.hidden = nn.Linear(2 * width * (height // 4) * (side // 4), hidden)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.head(F.relu(self.hidden(x.flatten(1))))


@dataclass(frozen=True)
class ConvSmall(NetworkSpec):
    """The two-layer network that certified training is measured on (Wong and Kolter 2018): 4x4 convolutions of stride 2
    with ``width`` and 2 ``width`` channels, a layer of ``hidden`` units, one linear layer; ReLU, no BatchNorm.
    """

    width: int = 16
    hidden: int = 100

    def __post_init__(self) -> None:
        if self.width < 1 or self.hidden < 1:
            raise ValueError(f"width and hidden must be at least 1; got {self.width} and {self.hidden}")

    def network(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        if min(image_shape[1:]) < 4:
            raise ValueError(f"conv_small needs images of at least 4 x 4 pixels; got {image_shape[1:]}")
        return ConvSmallNetwork(image_shape, self.width, self.hidden, num_classes)


class RescaledNetwork(nn.Module):
    """``inner`` on images that ``rescale`` brings to ``size`` (height, width)."""

    def __init__(
        self, inner: nn.Module, size: tuple[int, int], rescale: Callable[[Tensor, tuple[int, int]], Tensor]
    ) -> None:
        super().__init__()
        self.inner = inner
        self.size = size
        self.rescale = rescale

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.rescale(x, self.size))


def bilinear(x: Float[Tensor, "n ch h w"], size: tuple[int, int]) -> Float[Tensor, "n ch a b"]:
    """Returns the images at ``size`` (height, width), in float32 at least; with antialiasing where a side shrinks."""
    shrinks = size[0] < x.shape[2] or size[1] < x.shape[3]
    return F.interpolate(at_least_float32(x), size, mode="bilinear", antialias=shrinks)


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}")


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
        _check_size(self.size)

    def network(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        channels, height, width = image_shape
        size = min(height, self.size), min(width, self.size)
        return RescaledNetwork(self.inner.network(num_classes, (channels, *size)), size, F.adaptive_avg_pool2d)


@dataclass(frozen=True)
class Resized(NetworkSpec):
    """``inner`` on the image brought to ``size`` x ``size`` pixels (bilinear): for networks of a fixed size, such as
    timm's transformers.

    It happens inside the model, so that every radius is in the pixels of the original image. (Zhang et al. 2025 give
    Tiny-ImageNet to ViT-small at 224 pixels; their released code enlarges the data.)
    """

    inner: NetworkSpec
    size: int = 224

    def __post_init__(self) -> None:
        _check_size(self.size)

    def network(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        size = self.size, self.size
        return RescaledNetwork(self.inner.network(num_classes, (image_shape[0], *size)), size, bilinear)
