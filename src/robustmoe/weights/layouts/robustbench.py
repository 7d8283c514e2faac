"""The architectures of RobustBench's checkpoints: TRADES' wide ResNets, kuangliu's ResNets and PreAct ResNets,
DeepMind's wide ResNets and PreAct ResNets.
"""

from __future__ import annotations

from torch import nn

from robustmoe.models.base import Dense
from robustmoe.models.preact_resnet import PreActResNetNetwork
from robustmoe.models.preactivation import PreactivationNetwork
from robustmoe.models.resnet import ResNetNetwork
from robustmoe.models.wide_resnet import WideResNetNetwork
from robustmoe.weights.layouts.names import KUANGLIU, NORMS, WIDE, Scheme, paired
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


def pairs(model: nn.Module) -> list[Counterpart]:
    """Those of a dense network of the CIFAR form. What its names do not tell stays the model's: the activation of
    DeepMind's, and what a PreAct ResNet's shortcuts read.
    """
    network = model.network if isinstance(model, Dense) else None
    if not isinstance(network, ResNetNetwork | PreactivationNetwork) or network.begins != "cifar":
        return []
    if isinstance(network, ResNetNetwork):
        return paired(network, "network.", "", KUANGLIU) if len(network.stages) == 4 else []
    scheme = scheme_of(network)
    return [] if scheme is None else paired(network, "network.", "", scheme)


def scheme_of(network: PreactivationNetwork) -> Scheme | None:
    """How the names go; None for a network that is in none of the checkpoints."""
    reads, same = network.form.reads, network.form.padding == "same"
    if isinstance(network, WideResNetNetwork) and reads == "active":
        return DEEPMIND_WIDE if same else WIDE
    if isinstance(network, PreActResNetNetwork):
        if reads == "conv3":
            return DEEPMIND_PREACT if same and network.last is not None else None
        return None if same else PREACT
    return None


ROBUSTBENCH = Layout(
    "RobustBench's CIFAR networks: TRADES' WRNs, ResNets, PreAct ResNets, DeepMind's and Rebuffi's nets",
    "github.com/RobustBench/robustbench at 78fcc9e",
    pairs,
    inputs="raw",
    ignored=(r"^sub_block1\.", r"^(mean|std)$"),
)
