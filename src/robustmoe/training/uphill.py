"""Adversarial weight perturbation (Wu, Xia, Wang, NeurIPS 2020): weights moved uphill before each step's gradient.

A step makes its attacked images, takes the gradient of its loss on them, moves every weight matrix W by gamma ||W||
along its own part of that gradient, and takes the gradient there, on the same images; then the weights are back where
they were and move along that second gradient. Like the authors' code with one inner step: only tensors of two or more
dimensions move, each by its own norm, and BatchNorm's statistics see the second pass alone. Different: weight decay is
that of the weights themselves, not of the moved ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


def steps_uphill(
    weights: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor], gamma: float
) -> list[tuple[nn.Parameter, Tensor]]:
    """Returns each weight that moves and its step: gamma ||W||_F g / ||g||_F (no step where g is 0)."""
    steps = []
    for name, weight in weights.items():
        if weight.ndim > 1:
            gradient = gradients[name]
            size = torch.linalg.vector_norm(gradient)
            scale = (
                gamma * torch.linalg.vector_norm(weight.detach()) / torch.where(size > 0, size, torch.ones_like(size))
            )
            steps.append((weight, scale * gradient))
    return steps


@contextlib.contextmanager
def moved(steps: list[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """The weights are moved by their steps inside, and afterwards what they were, bit for bit."""
    before = [weight.detach().clone() for weight, _ in steps]
    try:
        with torch.no_grad():
            for weight, step in steps:
                weight.add_(step)
        yield
    finally:
        with torch.no_grad():
            for (weight, _), value in zip(steps, before):
                weight.copy_(value)


@contextlib.contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """The model's buffers are afterwards what they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
