"""The names that the model itself has, and those of its network alone, such as timm's vision transformers."""

from __future__ import annotations

from torch import nn

from robustmoe.weights.pairs import Counterpart, Layout, same


def pairs(model: nn.Module) -> list[Counterpart]:
    return [same(name, name, optional=name.startswith("normalise.")) for name in model.state_dict()]


def network_pairs(model: nn.Module) -> list[Counterpart]:
    """The names without ``network.``, of a model that has nothing else."""
    names = [name for name in model.state_dict() if not name.startswith("normalise.")]
    if not all(name.startswith("network.") for name in names):
        return []
    return [same(name.removeprefix("network."), name) for name in names]


OWN = Layout("the model's own names: files of this package, any module's state_dict", "this package", pairs)
NETWORK = Layout("the names of the model's network alone: timm's vision transformers", "timm 1.0", network_pairs)
