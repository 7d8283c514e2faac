"""What pre-activation networks (wide ResNets, PreAct ResNets, DenseNets) are made of: begin, end, and blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.models.backbone import StagedNetwork, initialise
from robustmoe.models.convolution import Conv, Handed, Layers, Norm
from robustmoe.models.resnet import Stem, stem_conv, stem_pool

Activation = Literal["relu", "silu"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu}

Padding = Literal["even", "same"]
"""Zeros about a 3x3 convolution of stride 2: "even", one row and column on each side; "same", TensorFlow's rule, which
for an even side is one at the end alone.
"""

Reads = Literal["active", "raw", "conv3", "released"]
"""What a block that changes the shape adds: a 1x1 convolution of ReLU(BatchNorm(x)) ("active"), one of x ("raw"), a 3x3
one of x ("conv3"); or, "released", a 1x1 of x while the block's first convolution reads x too.
"""


@dataclass(frozen=True)
class Form:
    """How the blocks of a network differ from He et al. 2016 (arXiv 1603.05027), the default."""

    reads: Reads = "active"
    activation: Activation = "relu"
    padding: Padding = "even"


class ReadTwice(Conv):
    """A convolution whose output a block adds as it is, so no frozen copy folds the BatchNorm that reads it too."""


class PreactivationNetwork(StagedNetwork):
    """A network whose blocks begin with BatchNorm and activation: its stem (a convolution alone in the CIFAR form;
    convolution, BatchNorm, activation, max-pooling in the ImageNet form) and its end (BatchNorm, activation, average,
    linear). ``added``: whether the first block adds what it gets.
    """

    def __init__(self, stem: Stem, channels: int, outputs: int, form: Form = Form(), added: bool = False) -> None:
        super().__init__()
        self.begins = stem
        self.form = form
        self.activate = ACTIVATIONS[form.activation]
        twice = added and stem == "cifar"
        self.stem = ReadTwice(channels, outputs, 3, 1) if twice else stem_conv(stem, channels, outputs)
        self.norm = Norm(outputs) if stem == "imagenet" else None
        self.stages, self.inputs = nn.ModuleList(), []

    def end(self, channels: int, num_classes: int, layers: Layers, normed: bool = True) -> None:
        """Adds the last layers, then gives every convolution its initial values. ``normed``: with BatchNorm and
        activation before the average.
        """
        self.last = layers.norm(channels) if normed else None
        self.head = nn.Linear(channels, num_classes)
        initialise(self)

    def entry(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x if self.norm is None else stem_pool(self.begins, self.activate(self.norm(x)))

    def exit(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        x = x if self.last is None else self.activate(self.last(x, segments))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Preactivation(nn.Module):
    """Twice BatchNorm, activation, 3x3 convolution; (n, inputs, h, w) -> (n, width, h/stride, w/stride)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, layers: Layers, form: Form = Form()) -> None:
        super().__init__()
        self._begin(inputs, width, stride, layers, form)
        same = form.padding == "same"
        self.conv1 = layers.conv(inputs, width, 3, stride, same)
        self.norm2, self.conv2 = layers.norm(width), layers.conv(width, width, 3, 1)

    def _begin(self, inputs: int, outputs: int, stride: int, layers: Layers, form: Form) -> None:
        """Adds the first BatchNorm, where it has an effect, and the shortcut, where the shape changes."""
        self.activate = ACTIVATIONS[form.activation]
        changes = stride > 1 or inputs != outputs
        self.reads = form.reads
        self.norm1 = None if changes and form.reads == "released" else layers.norm(inputs)
        kernel = 3 if form.reads == "conv3" else 1
        same = form.padding == "same"
        self.shortcut = layers.conv(inputs, outputs, kernel, stride, same) if changes else None

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        active = x if self.norm1 is None else self.activate(self.norm1(x, segments))
        out = self._branch(active, segments)
        if self.shortcut is not None:
            x = self.shortcut(active if self.reads == "active" else x, segments)
        return out + x

    def _branch(self, active: Tensor, segments: Handed | None) -> Tensor:
        out = self.activate(self.norm2(self.conv1(active, segments), segments))
        branch: Tensor = self.conv2(out, segments)
        return branch


class PreactivationBottleneck(Preactivation):
    """Three times BatchNorm, activation, convolution: 1x1, 3x3, 1x1; (n, inputs, h, w) -> (n, 4 width, h/stride,
    w/stride).
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, layers: Layers, form: Form = Form()) -> None:
        nn.Module.__init__(self)
        self._begin(inputs, 4 * width, stride, layers, form)
        same = form.padding == "same"
        self.conv1 = layers.conv(inputs, width, 1, 1)
        self.norm2, self.conv2 = layers.norm(width), layers.conv(width, width, 3, stride, same)
        self.norm3, self.conv3 = layers.norm(width), layers.conv(width, 4 * width, 1, 1)

    def _branch(self, active: Tensor, segments: Handed | None) -> Tensor:
        out = self.activate(self.norm2(self.conv1(active, segments), segments))
        out = self.activate(self.norm3(self.conv2(out, segments), segments))
        branch: Tensor = self.conv3(out, segments)
        return branch
