"""PreAct ResNets (He et al. 2016, Identity Mappings, arXiv 1603.05027) and the forms in which released robust networks
have them; dense, or as the backbone of a pathway model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robustmoe.models.backbone import Backbone, Stage, scaled
from robustmoe.models.base import ImageShape
from robustmoe.models.convolution import DENSE, Layers
from robustmoe.models.preactivation import (
    Activation,
    Form,
    Padding,
    Preactivation,
    PreactivationBottleneck,
    PreactivationNetwork,
)
from robustmoe.models.resnet import BLOCKS, Stem, halved, stem_size

DEPTHS = (10, 18, 34, 50)


class PreActResNetNetwork(PreactivationNetwork):
    """The network of `PreActResNet`. Routed: every convolution but the stem, the shortcuts' too. The stem is shared,
    and scaled, so a pathway is exactly the slim network.
    """

    def __init__(
        self, spec: PreActResNet, num_classes: int, image_shape: ImageShape, layers: Layers, ratio: float
    ) -> None:
        channels, *size = image_shape
        height, width = (stem_size(spec.stem, side) for side in size)
        inputs = scaled(ratio, spec.width)
        form = Form(spec.shortcut, spec.activation, spec.padding)
        super().__init__(spec.stem, channels, inputs, form, added=spec.depth != 50)
        block = PreactivationBottleneck if spec.depth == 50 else Preactivation
        for place, blocks in enumerate(BLOCKS[spec.depth]):
            self.inputs.append((inputs, height, width))
            planes, stage = scaled(ratio, spec.width * 2**place), Stage()
            for position in range(blocks):
                stride = 2 if place > 0 and position == 0 else 1
                stage.append(block(inputs, planes, stride, layers, form))
                inputs = planes * block.expansion
                height, width = (halved(height), halved(width)) if stride == 2 else (height, width)
            self.stages.append(stage)
        self.end(inputs, num_classes, layers, spec.last_norm)


@dataclass(frozen=True)
class PreActResNet(Backbone):
    """PreAct ResNet: ResNet's stages, each block BatchNorm, ReLU, convolution in turn.

    ``depth``: 10, 18, 34, 50. ``width``: channels of the stem and first stage. ``shortcut``: what a block that changes
    the shape adds, a 1x1 convolution of ReLU(BatchNorm(x)) ("active": He et al.), of x itself ("raw"), or a 3x3 one of
    x ("conv3"). ``last_norm``: BatchNorm and ReLU before the average (He et al.). ``activation``: "relu" or "silu".
    ``padding``: of 3x3 convolutions of stride 2, "even" or "same" (TensorFlow's: for even sides a zero at the end
    alone). kuangliu's code is ``last_norm=False``; RobustBench's PreActBlock is ``shortcut=raw``, its PreActBlockV2
    "active", each with or without ``last_norm``; DeepMind's is ``shortcut=conv3, padding=same``, mostly with silu.
    ``stem``: "cifar" or "imagenet", as in `ResNet`.
    """

    depth: int = 18
    width: int = 64
    shortcut: Literal["active", "raw", "conv3"] = "active"
    last_norm: bool = True
    activation: Activation = "relu"
    padding: Padding = "even"
    stem: Stem = "cifar"

    def __post_init__(self) -> None:
        if self.depth not in DEPTHS:
            raise ValueError(f"depth must be one of {list(DEPTHS)}; got {self.depth}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1; got {self.width}")

    def make(
        self, num_classes: int, image_shape: ImageShape, layers: Layers = DENSE, ratio: float = 1.0
    ) -> PreActResNetNetwork:
        return PreActResNetNetwork(self, num_classes, image_shape, layers, ratio)


def preact_resnet18(width: int = 64, last_norm: bool = True) -> PreActResNet:
    """PreAct ResNet-18."""
    return PreActResNet(18, width, last_norm=last_norm)


def preact_resnet34(width: int = 64, last_norm: bool = True) -> PreActResNet:
    """PreAct ResNet-34."""
    return PreActResNet(34, width, last_norm=last_norm)


def preact_resnet50(width: int = 64, last_norm: bool = True) -> PreActResNet:
    """PreAct ResNet-50 (bottleneck blocks)."""
    return PreActResNet(50, width, last_norm=last_norm)
