"""The architectures of RobustBench's checkpoints: TRADES' wide ResNets, kuangliu's ResNets and PreAct ResNets,
DeepMind's wide ResNets and PreAct ResNets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from robustmoe.models.base import Dense
from robustmoe.models.preact_resnet import PreActResNetNetwork
from robustmoe.models.preactivation import PreactivationNetwork
from robustmoe.models.resnet import ResNetNetwork
from robustmoe.models.wide_resnet import WideResNetNetwork
from robustmoe.weights.layouts.names import KUANGLIU, NORMS, WIDE, Scheme, normalised, paired
from robustmoe.weights.pairs import Counterpart, Layout

PREACT = Scheme("layer{}.{}", {**NORMS, "shortcut": "shortcut.0"}, {"stem": "conv1", "last": "bn", "head": "linear"})

DEEPMIND_WIDE = Scheme(
    "layer.{}.block.{}",
    {"norm1": "batchnorm_0", "conv1": "conv_0", "norm2": "batchnorm_1", "conv2": "conv_1"},
    {"stem": "init_conv", "last": "batchnorm", "head": "logits"},
    first=0,
)

DEEPMIND_PREACT = Scheme(
    "layer_{}.{}",
    {"norm1": "batchnorm_0", "conv1": "conv_2d_1", "norm2": "batchnorm_1", "conv2": "conv_2d_2"},
    {"stem": "conv_2d", "last": "batchnorm", "head": "logits"},
    first=0,
)


MEANS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""What DeepMind's networks do to the pixels themselves, by the number of classes; it is in no file."""


def pairs(model: nn.Module) -> list[Counterpart]:
    """Those of a dense network of the CIFAR form. What its names do not tell stays the model's: the activation of
    DeepMind's, and what a PreAct ResNet's shortcuts read.
    """
    network = model.network if isinstance(model, Dense) else None
    if not isinstance(network, ResNetNetwork | PreactivationNetwork) or network.begins != "cifar":
        return []
    scheme = scheme_of(network)
    if scheme is None:
        return []
    out = paired(network, "network.", "", scheme)
    known = MEANS.get(network.head.out_features)
    if known is not None and scheme in (DEEPMIND_WIDE, DEEPMIND_PREACT):
        out.append(Counterpart((), ("normalise.mean", "normalise.std"), partial(_these, known), _nothing))
    return [*out, *normalised(model)]


def wants(model: nn.Module) -> list[str]:
    network = model.network if isinstance(model, Dense) else None
    if not isinstance(network, PreactivationNetwork):
        return []
    form = network.form
    if form.padding == "same":
        return [] if form.activation == "silu" else ["most of DeepMind's networks there have activation=silu"]
    said = ["DeepMind's networks there have padding=same"]
    if isinstance(network, PreActResNetNetwork) and form.reads in ("raw", "active"):
        said.append(f"some of its PreAct ResNets have shortcut=raw, some active; this model has {form.reads}")
    return said if form.activation == "relu" else [*said, "those without padding=same have activation=relu"]


def _these(known: tuple[tuple[float, ...], ...], _: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.tensor(values).view(1, -1, 1, 1) for values in known]


def _nothing(_: Sequence[Tensor]) -> Sequence[Tensor]:
    return []


def scheme_of(network: ResNetNetwork | PreactivationNetwork) -> Scheme | None:
    """How the names go; None for a network that is in none of the checkpoints."""
    if isinstance(network, ResNetNetwork):
        return KUANGLIU if len(network.stages) == 4 else None
    reads, same = network.form.reads, network.form.padding == "same"
    if isinstance(network, WideResNetNetwork) and reads == "active":
        return DEEPMIND_WIDE if same else WIDE
    if isinstance(network, PreActResNetNetwork):
        if reads == "conv3":
            return DEEPMIND_PREACT if same and network.last is not None else None
        return None if same else PREACT
    return None


ROBUSTBENCH = Layout(
    "RobustBench's CIFAR networks: TRADES' WRNs, ResNets, PreAct ResNets, DeepMind's and Rebuffi's nets; these want "
    "padding=same, mostly activation=silu",
    "github.com/RobustBench/robustbench at 78fcc9e",
    pairs,
    inputs="raw",
    ignored=(r"^sub_block1\.",),
    wants=wants,
)
