"""`Backbone`: a convolutional network that can be built dense, slim, or with an own set of filters for every expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from robustmoe.models.base import ImageShape, NetworkSpec
from robustmoe.models.convolution import DENSE, Handed, Layers


class Stage(nn.ModuleList):
    """Blocks one after the other, each called as block(x, segments)."""

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        for block in self:
            x = block(x, segments)
        return x


class StagedNetwork(nn.Module, ABC):
    """A backbone's network: `entry`, ``stages``, `exit`. The image router of a pathway decides before all of it, a
    router a stage before each of ``stages``.

    ``inputs``: what enters each stage, (ch, h, w). Nothing in `entry` is routed.
    """

    stages: nn.ModuleList
    inputs: list[ImageShape]

    @abstractmethod
    def entry(self, x: Tensor) -> Tensor:
        """(n, ch, h, w) normalised images -> what enters the first stage."""

    @abstractmethod
    def exit(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        """Returns what leaves the last stage -> (n, classes) logits."""

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        x = self.entry(x)
        for stage in self.stages:
            x = stage(x, segments)
        return self.exit(x, segments)


class Backbone(NetworkSpec):
    """A network whose convolutions a pathway model can route."""

    @abstractmethod
    def make(
        self, num_classes: int, image_shape: ImageShape, layers: Layers = DENSE, ratio: float = 1.0
    ) -> StagedNetwork:
        """Returns the network of ``layers``, its widths scaled by ``ratio`` (rounded down, as AdvMoE's code does).

        With routed layers, what the architecture routes and scales is AdvMoE's choice (each class says it); with dense
        ones every width is scaled, the stem's too (AdvMoE's S-Dense). Raises ValueError where no channel is left.
        """

    def network(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        return self.make(num_classes, image_shape)


@dataclass(frozen=True)
class Slim(NetworkSpec):
    """AdvMoE's S-Dense: ``backbone`` with every width times ``ratio``, about the size of one pathway."""

    backbone: Backbone
    ratio: float = 0.5

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def network(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        return self.backbone.make(num_classes, image_shape, ratio=self.ratio)


def check_ratio(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1]; got {ratio}")


def scaled(ratio: float, width: int) -> int:
    """int(ratio * width). Raises ValueError where that is no channel."""
    channels = int(ratio * width)
    if channels < 1:
        raise ValueError(f"ratio {ratio} of width {width} leaves no channel")
    return channels


def initialise(network: nn.Module) -> None:
    """He initialisation by fan-out of every convolution (the field's for ResNets). On the meta device there is nothing
    to fill.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
