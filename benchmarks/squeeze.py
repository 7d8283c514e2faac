"""Dense nets with squeeze-and-excitation (Hu et al. 2018), a baseline of benchmarks/conditional.py: scales that depend
on the image, without a mixture of experts.

The last BatchNorm of each residual block is followed by a scale in (0, 1) for every channel: averages of the map, a
linear layer to a quarter of the channels, ReLU, a linear layer back, the logistic function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from robustmoe.models.backbone import Backbone
from robustmoe.models.base import ImageShape, NetworkSpec
from robustmoe.models.patch_resnet import PatchResNet
from robustmoe.models.resnet import resnet8

REDUCTION = 4


class Excited(nn.Module):
    """A norm (n, d, h, w) -> (n, d, h, w), and the scales of what it gives."""

    def __init__(self, norm: nn.Module, channels: int) -> None:
        super().__init__()
        self.norm = norm
        inner = channels // REDUCTION
        self.scale = nn.Sequential(nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, channels), nn.Sigmoid())

    def forward(self, x: Tensor, segments: Any = None) -> Tensor:
        out = self.norm(x)
        scaled: Tensor = out * self.scale(out.mean((2, 3)))[:, :, None, None]
        return scaled


@dataclass(frozen=True)
class Squeezed(NetworkSpec):
    """A backbone of basic blocks with squeeze-and-excitation."""

    backbone: Backbone

    def network(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        network: Any = self.backbone.make(num_classes, image_shape)
        for stage in network.stages:
            for block in stage:
                block.norm2 = Excited(block.norm2, block.conv2.weight.shape[0])
        return network  # type: ignore[no-any-return]


def patch_resnet(**_: Any) -> Squeezed:
    return Squeezed(PatchResNet(width=16))


def resnet8_16(**_: Any) -> Squeezed:
    return Squeezed(resnet8(width=16))
