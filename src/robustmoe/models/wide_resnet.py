"""Wide ResNets (Zagoruyko and Komodakis 2016): pre-activation blocks, dense or as the backbone of a pathway model."""

from __future__ import annotations

from dataclasses import dataclass

from robustmoe.models.backbone import Backbone, Stage, scaled
from robustmoe.models.base import ImageShape
from robustmoe.models.convolution import DENSE, Layers
from robustmoe.models.preactivation import Activation, Form, Padding, Preactivation, PreactivationNetwork
from robustmoe.models.resnet import Stem, halved, stem_size


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
        form = Form("released" if spec.released else "active", spec.activation, spec.padding)
        super().__init__(spec.stem, channels, inputs, form, added=inputs == scaled(ratio, 16 * spec.width))
        for place in range(3):
            self.inputs.append((inputs, height, width))
            planes = scaled(ratio, 16 * spec.width * 2**place)
            stage = Stage()
            for position in range((spec.depth - 4) // 6):
                stride = 2 if place > 0 and position == 0 else 1
                stage.append(Preactivation(inputs, planes, stride, layers, form))
                inputs = planes
            height, width = (halved(height), halved(width)) if place > 0 else (height, width)
            self.stages.append(stage)
        self.end(inputs, num_classes, layers)


@dataclass(frozen=True)
class WideResNet(Backbone):
    """Wide ResNet (Zagoruyko and Komodakis 2016): three stages of pre-activation blocks, no dropout.

    ``depth``: 6n + 4, n blocks a stage. ``width``: how many times 16, 32, 64 the channels of the stages are (the stem
    has 16). ``stem``: "cifar" (3x3) or "imagenet" (7x7 of stride 2, BatchNorm, ReLU, max-pooling of stride 2).

    In a block that changes the shape, the 1x1 shortcut and the first convolution read ReLU(BatchNorm(x)), as Zagoruyko
    and Komodakis have it, and TRADES' and AdvMoE's dense networks. ``released``: they read x itself, as in the MoE of
    AdvMoE's released code, and the BatchNorm, which has no effect there, is left out. ``activation``, "relu" or "silu",
    and ``padding``, "even" or "same" (see `PreActResNet`): DeepMind's networks (Gowal et al. 2020, Rebuffi et al. 2021)
    are ``activation=silu, padding=same``.
    """

    depth: int = 28
    width: int = 10
    stem: Stem = "cifar"
    released: bool = False
    activation: Activation = "relu"
    padding: Padding = "even"

    def __post_init__(self) -> None:
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"depth must be 6n + 4 with n at least 1, such as 10, 16, 28; got {self.depth}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1; got {self.width}")

    def make(
        self, num_classes: int, image_shape: ImageShape, layers: Layers = DENSE, ratio: float = 1.0
    ) -> WideResNetNetwork:
        return WideResNetNetwork(self, num_classes, image_shape, layers, ratio)


def wrn_28_10(stem: Stem = "cifar", released: bool = False) -> WideResNet:
    """WRN-28-10."""
    return WideResNet(28, 10, stem, released)
