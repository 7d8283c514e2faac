"""A model of your own, to be attacked: robustmoe evaluate --model examples/my_model.py:make_model --data digits"""

from torch import nn


def make_model() -> nn.Module:
    """Any callable, images (n, 1, 8, 8) in [0, 1] to logits (n, 10); load your weights here (these are random)."""
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 10)]
    return nn.Sequential(*layers)
