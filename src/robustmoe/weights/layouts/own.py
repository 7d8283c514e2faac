"""The names that the model itself has: of runs of this package, of timm's vision transformers, of any module's own
`state_dict`.
"""

from __future__ import annotations

from torch import nn

from robustmoe.models.base import NetworkModel
from robustmoe.weights.pairs import Counterpart, Layout, same


def pairs(model: nn.Module) -> list[Counterpart]:
    """The names of the model; a network's own, without ``network.``, where it is nothing else."""
    names = list(model.state_dict())
    if isinstance(model, NetworkModel) and all(name.startswith(("network.", "normalise.")) for name in names):
        weights = [name for name in names if name.startswith("network.")]
        return [same(name.removeprefix("network."), name) for name in weights]
    return [same(name, name, optional=name.startswith("normalise.")) for name in names]


OWN = Layout(
    "the model's own names: a file of this package, timm's ViTs, any module's state_dict",
    "this package; timm 1.0",
    pairs,
)
