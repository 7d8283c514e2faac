"""Vision transformers written in flax: V-MoE, Soft MoE and expert choice (google-research/vmoe), and the dense ViTs of
google-research/vision_transformer, whose names differ. Both want ``gelu=tanh`` and images in [-1, 1].

A flax layer multiplies from the left, so its matrices stand the other way round than torch's; attention has a
dimension for its heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from robustmoe.models.token_layers import Members, SlotMoE, TokenLayer
from robustmoe.models.vit import ViTNetwork, resample_positions
from robustmoe.models.vit_parts import Attention, AttentionPool, ViTBlock
from robustmoe.weights.pairs import Counterpart, Layout, reshaped, same, split, turned
from robustmoe.weights.untold import other_gelu


@dataclass(frozen=True)
class _Names:
    """What differs between the two code bases: the ``encoder``, and a block's ``attention`` and ``mlp``."""

    encoder: str
    attention: str
    mlp: str


VMOE = _Names("Encoder", "SelfAttention", "Mlp")
VIT_JAX = _Names("Transformer", "MultiHeadDotProductAttention_0", "MlpBlock_0")


def _dense(theirs: str, ours: str) -> list[Counterpart]:
    return [turned(f"{theirs}/kernel", f"{ours}.weight", 1, 0), same(f"{theirs}/bias", f"{ours}.bias")]


def _norm(theirs: str, ours: str) -> list[Counterpart]:
    return [same(f"{theirs}/scale", f"{ours}.weight"), same(f"{theirs}/bias", f"{ours}.bias")]


def _mlp(theirs: str, ours: str) -> list[Counterpart]:
    return _dense(f"{theirs}/Dense_0", f"{ours}.fc1") + _dense(f"{theirs}/Dense_1", f"{ours}.fc2")


def _heads(theirs: str, layers: Sequence[str], ours: str, heads: int) -> list[Counterpart]:
    """Layers of attention that are one of ours, one below the other: kernels (d, heads, d / heads) and biases."""

    def read_kernels(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.cat([_of_heads(kernel, 1, heads).flatten(1).T for kernel in tensors])]

    def write_kernels(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [weight.T.unflatten(1, (heads, -1)) for weight in tensors[0].chunk(len(layers))]

    def read_biases(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.cat([_of_heads(bias, 0, heads).flatten() for bias in tensors])]

    def write_biases(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [bias.unflatten(0, (heads, -1)) for bias in tensors[0].chunk(len(layers))]

    kernels, biases = (tuple(f"{theirs}/{layer}/{kind}" for layer in layers) for kind in ("kernel", "bias"))
    change = "heads side by side, transposed"
    return [
        Counterpart(kernels, (f"{ours}.weight",), read_kernels, write_kernels, change),
        Counterpart(biases, (f"{ours}.bias",), read_biases, write_biases, "heads side by side"),
    ]


def _of_heads(value: Tensor, place: int, heads: int) -> Tensor:
    if value.shape[place] != heads:
        raise ValueError(f"it has {value.shape[place]} heads, and the model's attention {heads}")
    return value


def _attention(theirs: str, ours: str, layer: Attention | AttentionPool) -> Iterator[Counterpart]:
    if isinstance(layer, Attention):
        yield from _heads(theirs, ("query", "key", "value"), f"{ours}.qkv", layer.heads)
    else:
        yield from _heads(theirs, ("query",), f"{ours}.q", layer.heads)
        yield from _heads(theirs, ("key", "value"), f"{ours}.kv", layer.heads)
    width = layer.proj.in_features
    yield Counterpart(
        (f"{theirs}/out/kernel",),
        (f"{ours}.proj.weight",),
        lambda tensors: [_of_heads(tensors[0], 0, layer.heads).flatten(0, 1).T],
        lambda tensors: [tensors[0].T.reshape(layer.heads, width // layer.heads, -1)],
        "heads side by side, transposed",
    )
    yield same(f"{theirs}/out/bias", f"{ours}.proj.bias")
    if isinstance(layer.q_norm, nn.LayerNorm):
        yield same(f"{theirs}/query_ln/scale", f"{ours}.q_norm.weight")
        yield same(f"{theirs}/key_ln/scale", f"{ours}.k_norm.weight")


def _routed(theirs: str, ours: str, layer: TokenLayer) -> Iterator[Counterpart]:
    """Experts stand as theirs do, along a first dimension."""
    for number in (1, 2):
        yield same(f"{theirs}/Mlp/Dense_{number - 1}/kernel", f"{ours}.experts.w{number}")
        yield same(f"{theirs}/Mlp/Dense_{number - 1}/bias", f"{ours}.experts.b{number}")
    if isinstance(layer, SlotMoE):
        width, slots = layer.router.mu.shape
        shape = (width, layer.experts.num, slots // layer.experts.num)
        yield reshaped(f"{theirs}/Router/mu", f"{ours}.router.mu", shape, (width, slots))
        yield same(f"{theirs}/Router/scale", f"{ours}.router.scale")
    else:
        yield turned(f"{theirs}/Router/dense/kernel", f"{ours}.router.weight", 1, 0)


def _members(theirs: str, ours: str, layer: Members) -> Iterator[Counterpart]:
    """Experts of all members along one dimension, member by member; a router's rows (d, members, experts of each)."""
    own = [f"{ours}.members.{number}" for number in range(len(layer.members))]
    for number in (1, 2):
        yield split(f"{theirs}/Mlp/Dense_{number - 1}/kernel", [f"{name}.experts.w{number}" for name in own])
        yield split(f"{theirs}/Mlp/Dense_{number - 1}/bias", [f"{name}.experts.b{number}" for name in own])
    yield Counterpart(
        (f"{theirs}/Router/dense/kernel",),
        tuple(f"{name}.router.weight" for name in own),
        lambda tensors: [part.T for part in tensors[0].flatten(1).chunk(len(own), 1)],
        lambda tensors: [torch.stack([part.T for part in tensors], 1)],
        "by member, transposed",
    )


def _positions(theirs: str, ours: str, network: ViTNetwork) -> Counterpart:
    """Those of another grid are zoomed to the model's, as their code does it (vmoe/initialization/rules.py)."""

    def read(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [resample_positions(tensors[0], network.grid, network.prefix, "zoom")]

    return Counterpart((theirs,), (ours,), read, change="positions, zoomed if of another grid")


def _network(network: ViTNetwork, at: str, names: _Names) -> Iterator[Counterpart]:
    yield turned("embedding/kernel", f"{at}patch_embed.proj.weight", 3, 2, 0, 1)
    yield same("embedding/bias", f"{at}patch_embed.proj.bias")
    if network.prefix:
        yield same("cls", f"{at}cls_token")
    if network.learned:
        yield _positions(f"{names.encoder}/posembed_input/pos_embedding", f"{at}pos_embed", network)
    for number, block in enumerate(network.blocks):
        assert isinstance(block, ViTBlock)
        theirs, ours = f"{names.encoder}/encoderblock_{number}", f"{at}blocks.{number}"
        yield from _norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
        yield from _attention(f"{theirs}/{names.attention}", f"{ours}.attn", block.attn)
        yield from _norm(f"{theirs}/LayerNorm_1", f"{ours}.norm2")
        if isinstance(block.mlp, Members):
            yield from _members(f"{theirs}/Moe", f"{ours}.mlp", block.mlp)
        elif isinstance(block.mlp, TokenLayer):
            yield from _routed(f"{theirs}/Moe", f"{ours}.mlp", block.mlp)
        else:
            yield from _mlp(f"{theirs}/{names.mlp}", f"{ours}.mlp")
    yield from _norm(f"{names.encoder}/encoder_norm", f"{at}norm")
    if network.classifier == "map":
        yield same("MapHead/probe", f"{at}attn_pool.latent")
        yield from _attention("MapHead/MultiHeadDotProductAttention", f"{at}attn_pool", network.attn_pool)
        yield from _norm("MapHead/LayerNorm", f"{at}attn_pool.norm")
        yield from _mlp("MapHead/Mlp", f"{at}attn_pool.mlp")
    if network.pre_logits is not None:
        yield from _dense("pre_logits", f"{at}pre_logits")
    yield from _dense("head", f"{at}head")


def _network_of(model: nn.Module) -> tuple[ViTNetwork, str] | None:
    """A vision transformer that stands alone, and where its tensors are in the model's."""
    inner = getattr(model, "network", None)
    if isinstance(model, ViTNetwork):
        return model, ""
    return (inner, "network.") if isinstance(inner, ViTNetwork) else None


def vmoe(model: nn.Module) -> list[Counterpart]:
    """The names of VisionTransformerMoe, of any of its routers, and of VisionTransformerMoeEnsemble (E3)."""
    own = _network_of(model)
    return [] if own is None else list(_network(*own, VMOE))


def vit_jax(model: nn.Module) -> list[Counterpart]:
    """The names of VisionTransformer; it has neither experts, nor QK-norm, nor attention pooling."""
    own = _network_of(model)
    pairs = [] if own is None else list(_network(*own, VIT_JAX))
    foreign = re.compile(r"\.(q_norm|router|attn_pool)\.")
    return [] if any(foreign.search(ours) for pair in pairs for ours in pair.ours) else pairs


LAYOUTS = {
    "vmoe": Layout(
        "V-MoE, Soft MoE, expert choice and E3 of google-research/vmoe (flax); wants gelu=tanh",
        "google-research/vmoe 942a78b",
        vmoe,
        "centred",
        (r"^(step|rngs|opt_state)(/|$)",),
        wants=partial(other_gelu, theirs="tanh"),
    ),
    "vit_jax": Layout(
        "dense ViTs of google-research/vision_transformer (flax); wants gelu=tanh",
        "google-research/vision_transformer c6de1e5",
        vit_jax,
        "centred",
        wants=partial(other_gelu, theirs="tanh"),
    ),
}
