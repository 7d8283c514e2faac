"""torchvision's ResNets (18, 34, 50) and vision transformers."""

from __future__ import annotations

from functools import partial

from torch import nn

from robustmoe.models.base import Dense
from robustmoe.models.resnet import ResNetNetwork
from robustmoe.models.vit import ViTNetwork
from robustmoe.weights.layouts.names import TORCHVISION as RESNET
from robustmoe.weights.layouts.names import normalised, paired
from robustmoe.weights.pairs import Counterpart, Layout, same
from robustmoe.weights.untold import other_gelu

VIT = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj": "conv_proj",
    "norm": "encoder.ln",
    "pre_logits": "heads.pre_logits",
    "head": "heads.head",
}
BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.weight": "self_attention.in_proj_weight",
    "attn.qkv.bias": "self_attention.in_proj_bias",
    "attn.proj": "self_attention.out_proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}


def pairs(model: nn.Module) -> list[Counterpart]:
    """Those of a dense ResNet of the ImageNet form, or of a dense ViT."""
    if not isinstance(model, Dense):
        return []
    network = model.network
    if isinstance(network, ResNetNetwork) and network.begins == "imagenet" and len(network.stages) == 4:
        return [*paired(network, "network.", "", RESNET), *normalised(model)]
    if isinstance(network, ViTNetwork) and network.prefix and network.learned and not _norms_heads(network):
        return [same(of_vit(name), f"network.{name}") for name in network.state_dict()]
    return []


def _norms_heads(network: ViTNetwork) -> bool:
    return any(".q_norm." in name for name in network.state_dict())


def of_vit(name: str) -> str:
    """The name of a tensor of theirs."""
    if not name.startswith("blocks."):
        return _renamed(name, VIT)
    _, number, part = name.split(".", 2)
    return f"encoder.layers.encoder_layer_{number}.{_renamed(part, BLOCK)}"


def _renamed(name: str, names: dict[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    return names[name] if name in names else f"{names.get(module, module)}.{leaf}"


TORCHVISION = Layout(
    "torchvision: resnet18, resnet34, resnet50, wide_resnet50_2, vit_b_16 and its like; robust ones of the same names",
    "github.com/pytorch/vision 0.28",
    pairs,
    wants=partial(other_gelu, theirs="exact"),
)
