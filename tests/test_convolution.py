"""A convolution's values and gradients on this CPU against float64, for widths around a CPU vector's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from robustmoe.models.convolution import Conv


@pytest.mark.parametrize("kernel, stride", [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 7, 8, 12, 15, 16, 24])
def test_values_and_gradients_are_right_on_this_cpu(inputs: int, kernel: int, stride: int) -> None:
    """oneDNN's own 1x1 convolutions with a stride are not: with few input channels the gradient of the weights is
    wrong with two threads, and the process is aborted with one (oneDNN issue 6035).
    """
    layer = Conv(inputs, 8, kernel, stride).to(memory_format=torch.channels_last)
    x = torch.rand(8, inputs, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    out = layer(x)
    upstream = torch.randn_like(out)
    mine = torch.autograd.grad(out, (x, layer.weight), upstream)
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, layer.weight))
    exact_out = F.conv2d(exact_x, exact_weight, stride=stride, padding=kernel // 2)
    exact = torch.autograd.grad(exact_out, (exact_x, exact_weight), upstream.double())
    for found, expected in zip((out, *mine), (exact_out, *exact), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
