"""What the convolutional networks of other code call their parts: schemes of names that several code bases share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from robustmoe.models.backbone import StagedNetwork
from robustmoe.weights.pairs import Counterpart, same, split

Names = Callable[[str], str]
"""The path of a module there, by its path in a network of ours."""

NORMS = {"norm1": "bn1", "norm2": "bn2", "norm3": "bn3"}


@dataclass(frozen=True)
class Scheme:
    """``block``: what a block is called, by the number of its stage (from ``first`` on) and its place in it; ``parts``:
    what a block's parts are called, and ``ends``: the parts outside of blocks. What is in neither keeps its name.
    """

    block: str
    parts: Mapping[str, str]
    ends: Mapping[str, str]
    first: int = 1

    def __call__(self, module: str) -> str:
        """The path of the module there, by its path in a `StagedNetwork`."""
        if not module.startswith("stages."):
            return self.ends.get(module, module)
        _, stage, place, *inside = module.split(".")
        part = ".".join(inside)
        return ".".join(filter(None, (self.block.format(int(stage) + self.first, place), self.parts.get(part, part))))


KUANGLIU = Scheme(
    "layer{}.{}",
    {**NORMS, "shortcut.conv": "shortcut.0", "shortcut.norm": "shortcut.1"},
    {"stem": "conv1", "norm": "bn1", "head": "linear"},
)
"""The ResNets of github.com/kuangliu/pytorch-cifar, from which most code for CIFAR has its own."""

TORCHVISION = Scheme(
    "layer{}.{}",
    {**NORMS, "shortcut.conv": "downsample.0", "shortcut.norm": "downsample.1"},
    {"stem": "conv1", "norm": "bn1", "head": "fc"},
)

WIDE = Scheme(
    "block{}.layer.{}",
    {**NORMS, "shortcut": "convShortcut"},
    {"stem": "conv1", "norm": "bn0", "last": "bn1", "head": "fc"},
)
"""The wide ResNets of github.com/xternalz/WideResNet-pytorch, which TRADES and AdvMoE took."""


def paired(network: nn.Module, ours: str, theirs: str, names: Names) -> list[Counterpart]:
    """A pair for every tensor of ``network``, whose names begin with ``ours`` in the model and with ``theirs`` there;
    the filter banks of a routed convolution are one tensor there, expert after expert.
    """
    state = list(network.state_dict())
    pairs: list[Counterpart] = []
    for name in state:
        bank = re.fullmatch(r"(.+)\.experts\.(\d+)\.weight", name)
        if bank is None:
            module, _, leaf = name.rpartition(".")
            pairs.append(same(f"{theirs}{names(module)}.{leaf}", f"{ours}{name}"))
        elif bank[2] == "0":
            banks = [
                f"{ours}{each}" for each in state if re.fullmatch(rf"{re.escape(bank[1])}\.experts\.\d+\.weight", each)
            ]
            pairs.append(split(f"{theirs}{names(bank[1])}.weight", banks))
    return pairs


PIXELS = (
    ("mean", "std"),
    ("normalize.mean", "normalize.std"),
    ("normalizer.new_mean", "normalizer.new_std"),
    ("0.mean", "0.std"),
    ("mu", "sigma"),
)
"""What files call the mean and deviation that the images are normalised by."""


def normalised(model: nn.Module) -> list[Counterpart]:
    """Mean and deviation of the images, where a file has them under one of the names of `PIXELS`, in any shape."""
    places = [(theirs, f"normalise.{kind}") for names in PIXELS for theirs, kind in zip(names, ("mean", "std"))]
    own = model.state_dict()
    return [
        Counterpart((theirs,), (ours,), partial(_of_shape, own[ours].shape), optional=True, beside=True)
        for theirs, ours in places
        if ours in own
    ]


def _of_shape(shape: tuple[int, ...], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensors[0].reshape(shape)]


def own_norms(network: StagedNetwork) -> bool:
    """Whether it has a BatchNorm an expert, which no released code has."""
    return any(re.search(r"\.experts\.\d+\.running_mean$", name) for name in network.state_dict())
