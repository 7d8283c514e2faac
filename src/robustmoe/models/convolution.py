"""Convolutions of a backbone that may be routed: a dense one, and one with an own filter bank for every expert.

A routed batch is sorted by expert once, at the entrance of the network (`Segments`), so that in every layer each
expert's images are one contiguous slice: nothing is gathered, masked or thrown away on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Segments:
    """A batch sorted by expert: ``sizes`` images for each expert in turn, and each image's weight (n,), which is 1 in
    value.
    """

    sizes: list[int]
    weight: Float[Tensor, " n"]


class Conv(nn.Conv2d):
    """An ordinary convolution without bias, the same for every image."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        return super().forward(x)


class RoutedConv(nn.Module):
    """One convolution an expert, equal in shape; expert k's images (n_k, d, h, w) go through expert k's filters
    alone.

    Multiplies by the route's weight, 1 in value, so that the straight-through gradient to the router is sum over
    layers of <dL/dh, h> (AdvMoE's released code; its filter banks are initialised each on its own here, not by the
    joint fan-out).
    """

    def __init__(self, experts: int, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Conv(inputs, outputs, kernel, stride) for _ in range(experts))

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        if segments is None:
            raise ValueError("a routed convolution needs the batch's segments")
        parts = zip(self.experts, x.split(segments.sizes))
        out = torch.cat([expert(part) for expert, part in parts if len(part)]) if len(x) else self.experts[0](x)
        if segments.weight.requires_grad:
            out = out * segments.weight[:, None, None, None].to(out.dtype)
        return out


ConvFactory = Callable[[int, int, int, int], nn.Module]
"""(inputs, outputs, kernel, stride) -> a module called as conv(x, segments)."""
