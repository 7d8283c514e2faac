"""BatchNorm's statistics taken anew: those of the weights as they are kept, on clean or on attacked images.

Running statistics lag behind the weights, and averaged weights have none of their own. Which images they are taken on
moves a robust model: the field takes either (Xie and Yuille, ICLR 2020, on why the two differ).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable

import torch
from torch import nn

from robustmoe.attacks import Attack
from robustmoe.models.base import RoutedModel
from robustmoe.training.phases import MiniBatch

BATCHES = 64
"""How many batches the statistics are means over, at most an epoch's."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
RANDOM = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def recalibrate(
    model: RoutedModel, batches: Iterable[MiniBatch], attack: Attack | None = None, autocast: torch.dtype | None = None
) -> None:
    """Sets the running mean and variance of every BatchNorm of the ``model`` to the means of those of the ``batches``,
    passed in train mode without the routers' noise and without dropout; with ``attack`` on the images as it leaves
    them, made on the model as it was. Weights and modes stay; without a BatchNorm nothing changes.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, NORMS) and layer.track_running_stats]
    if not layers:
        return
    before = copy.deepcopy(model) if attack is not None else model
    modes = [(module, module.training) for module in model.modules()]
    rates = [layer.momentum for layer in layers]
    try:
        model.train()
        for module in model.modules():
            if isinstance(module, RANDOM):
                module.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over the batches, not a moving one
        for batch in itertools.islice(batches, BATCHES):
            with torch.autocast(batch.x.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                x = batch.x if attack is None else attack(before, *batch)
                with torch.no_grad():
                    model.run(x)
    finally:
        for layer, rate in zip(layers, rates):
            layer.momentum = rate
        for module, training in modes:
            module.training = training
