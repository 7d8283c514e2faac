"""Small classifiers around routed layers that others published, each at a named version.

Nothing of that code stands here: packages are installed (the extra `wild`), and repositories that are no package are
imported from a checkout that the user names. The nets around the layers, and the experts where the published ones are
large, are ours and small.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.wild_models import without_torchvision
from torch import Tensor, nn

WIDTH, EXPERTS, CLASSES = 32, 4, 10


@dataclass(frozen=True)
class Images:
    """What a net is for: images of ``channels`` x ``size`` x ``size``. A transformer cuts them into 16 tokens; a
    convolutional net has a first stride that brings 32 pixels to 16.
    """

    channels: int
    size: int

    @property
    def patch(self) -> int:
        """Pixels of a token's side."""
        return self.size // 4

    @property
    def stride(self) -> int:
        """Of the first convolution."""
        return 2 if self.size > 16 else 1


@dataclass(frozen=True)
class Public:
    """Published code: ``build(module, images)`` makes a classifier from what ``module`` gives; it is of a package,
    or of a repository with the ``commit`` that its checkout should have.
    """

    title: str
    module: str
    build: Callable[[Any, Images], nn.Module]
    package: str | None = None
    repository: str | None = None
    commit: str | None = None
    under: str = ""

    def make(self, source: Path | None, images: Images) -> nn.Module:
        """A fresh classifier; ``source``: the checkout of a repository."""
        if self.repository is None:
            return self.build(importlib.import_module(self.module), images)
        if source is None:
            raise SystemExit(f"{self.title}: expected a checkout of {self.repository} (--source NAME=PATH)")
        with without_torchvision(), _on_path(source / self.under):
            return self.build(importlib.import_module(self.module), images)

    def version(self) -> str:
        """What the numbers are of: package and version, or repository and commit."""
        from importlib.metadata import version

        return f"{self.repository} {self.commit}" if self.package is None else f"{self.package} {version(self.package)}"


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Imports from a checkout, whose top-level names are forgotten afterwards (several call theirs `models`)."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith(str(folder)):
                del sys.modules[name]


class Small(nn.Sequential):
    """A classifier of 3 convolutions: an expert, where the published one is a ResNet-18."""

    def __init__(self, stride: int) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, stride, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128, CLASSES),
        )


class InColour(nn.Module):
    """Gives a network of three channels a grey image three times."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x.repeat(1, 3 // x.shape[1], 1, 1))
        return out


HandsOn = Callable[[Any], tuple[Any, ...]]


class Block(nn.Module):
    """A transformer's block, with a published routed layer where its MLP would be. ``hands_on`` takes from the layer's
    output what the next block's layer is given beside its tokens.
    """

    def __init__(self, layer: nn.Module, hands_on: HandsOn) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.layer, self.hands_on = layer, hands_on

    def forward(self, tokens: Tensor, *given: Any) -> tuple[Any, ...]:
        x = self.before(tokens)
        tokens = tokens + self.attention(x, x, x, need_weights=False)[0]
        out = self.layer(self.between(tokens), *given)
        return tokens + (out if isinstance(out, Tensor) else out[0]), *self.hands_on(out)


class TokenNet(nn.Module):
    """A vision transformer of two blocks and 16 tokens; ``layer(i)`` makes the routed layer of block i."""

    def __init__(
        self,
        images: Images,
        layer: Callable[[int], nn.Module],
        hands_on: Callable[[Any], tuple[Any, ...]] = lambda _: (),
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(images.channels, WIDTH, images.patch, stride=images.patch)
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, WIDTH))
        self.blocks = nn.ModuleList([Block(layer(i), hands_on) for i in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens, given = self.patches(x).flatten(2).transpose(1, 2) + self.place, ()
        for block in self.blocks:
            tokens, *given = block(tokens, *given)
        out: Tensor = self.head(self.norm(tokens).mean(1))
        return out


def _rt_er(module: Any, images: Images) -> nn.Module:
    """The published class and router; its four ResNet-18 give way to small experts."""
    net = module.MOE_Resnet18(num_experts=EXPERTS, num_classes=CLASSES, size=images.size)
    net.experts = nn.ModuleList([Small(images.stride) for _ in range(EXPERTS)])
    return InColour(net)


def _advmoe(module: Any, images: Images) -> nn.Module:
    """Published routed convolutions in a small net, and the published scheme: one router for all of them."""

    class Pathway(module.MoEBase):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            conv, stride = module.MoEConv, images.stride
            stem = nn.Conv2d(3, 16, 3, stride, padding=1)
            self.router = nn.Sequential(stem, nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 2))
            self.first = conv(3, 24, 3, stride, padding=1, n_expert=2)
            self.second = conv(24, 32, 3, 2, padding=1, n_expert=2)
            self.third = conv(32, 32, 3, padding=1, n_expert=2)
            self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in (24, 32, 32)])
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            self.set_score(self.router(x))
            for conv, norm in zip((self.first, self.second, self.third), self.norms):
                x = norm(conv(x)).relu()
            out: Tensor = self.head(x)
            return out

    return InColour(Pathway())


def _robust_experts(module: Any, images: Images) -> nn.Module:
    """The published layer and top-1 gate, straight-through as published, around convolutions late in a small net."""
    gate_module = importlib.import_module("src.models.nn.moe.gate.topk")
    scores = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, EXPERTS), nn.Softmax(dim=1))
    gate = gate_module.TopKGate(scores, k=1, use_straight_through_estimator=True, balancing_alpha=0.5)
    experts = nn.ModuleList([nn.Conv2d(32, 32, 3, padding=1) for _ in range(EXPERTS)])
    body = list(Small(images.stride))
    return InColour(nn.Sequential(*body[:4], module.MOELayer(gate, experts), *body[5:]))


def _dit_moe(module: Any, images: Images) -> nn.Module:
    return TokenNet(
        images, lambda _: module.SparseMoeBlock(WIDTH, mlp_ratio=2, num_experts=EXPERTS, num_experts_per_tok=2)
    )


def _qwen(module: Any, images: Images) -> nn.Module:
    configs = importlib.import_module("transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe")
    sizes = {"hidden_size": WIDTH, "moe_intermediate_size": 2 * WIDTH, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    return _started(
        TokenNet(images, lambda _: module.Qwen3VLMoeTextSparseMoeBlock(_eager(configs.Qwen3VLMoeTextConfig(**sizes))))
    )


def _glm(module: Any, images: Images) -> nn.Module:
    configs = importlib.import_module("transformers.models.glm4v_moe.configuration_glm4v_moe")
    sizes = {"hidden_size": WIDTH, "moe_intermediate_size": 2 * WIDTH, "n_routed_experts": EXPERTS}
    sizes |= {"num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    return _started(TokenNet(images, lambda _: module.Glm4vMoeTextMoE(_eager(configs.Glm4vMoeTextConfig(**sizes)))))


def _eager(config: Any) -> Any:
    config._experts_implementation = "eager"
    return config


def _started(net: nn.Module) -> nn.Module:
    """These layers leave their weights to the model around them."""
    for name, value in net.named_parameters():
        if ".layer." in name and value.dim() > 1:
            nn.init.normal_(value, std=value.shape[-1] ** -0.5)
        elif ".layer." in name:
            nn.init.zeros_(value)
    for name, value in net.named_buffers():
        if ".layer." in name:
            nn.init.zeros_(value)
    return net


def _st_moe(module: Any, images: Images) -> nn.Module:
    return TokenNet(images, lambda _: module.MoE(dim=WIDTH, num_experts=EXPERTS, gating_top_n=2))


def _soft_moe(module: Any, images: Images) -> nn.Module:
    return TokenNet(images, lambda _: module.SoftMoE(dim=WIDTH, num_experts=EXPERTS, seq_len=16))


def _mixture(module: Any, images: Images) -> nn.Module:
    return TokenNet(images, lambda _: module.MoE(dim=WIDTH, num_experts=EXPERTS, second_policy_eval="all"))


def _acmoe(module: Any, images: Images) -> nn.Module:
    """Soft MoE with the published router: the second layer weighs its features by what the first one chose."""
    sizes = {"dim": WIDTH, "num_experts": EXPERTS, "slots_per_expert": 4, "mix_k": 1, "layer": _mlp}
    return TokenNet(images, lambda i: module.SoftMoELayerWrapper(**sizes, acmoe=i > 0), lambda out: (out[1][1],))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


TIML, OPTML = "TIML-Group/Robust-MoE-Dual-Model", "OPTML-Group/Robust-MoE-CNN"
PUBLIC = {
    "rt_er": Public("RT-ER's class and router", "models.moe", _rt_er, repository=TIML, commit="30ef94d"),
    "advmoe": Public("AdvMoE's convolutions", "models.layers.moe_layer", _advmoe, repository=OPTML, commit="c50796f"),
    "robust_experts": Public(
        "Robust Experts' layer and gate",
        "src.models.nn.moe.layer",
        _robust_experts,
        repository="KASTEL-MobilityLab/robust-sparse-moes",
        commit="ed22e81",
    ),
    "dit_moe": Public("DiT-MoE's block", "models", _dit_moe, repository="feizc/DiT-MoE", commit="bd34bbb"),
    "qwen3_vl": Public(
        "Qwen3-VL-MoE's block",
        "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
        _qwen,
        package="transformers",
    ),
    "glm4v": Public(
        "GLM-4V-MoE's block", "transformers.models.glm4v_moe.modeling_glm4v_moe", _glm, package="transformers"
    ),
    "st_moe": Public("st-moe-pytorch", "st_moe_pytorch", _st_moe, package="st-moe-pytorch"),
    "soft_moe": Public("soft-moe-pytorch", "soft_moe_pytorch", _soft_moe, package="soft-moe-pytorch"),
    "acmoe": Public(
        "ACMoE's Soft MoE",
        "softmoe",
        _acmoe,
        repository="Fsoft-AIC/Tight-Clusters-Make-Specialized-Experts",
        commit="4762d61",
        under="softmoe-image-classification",
    ),
    "mixture_of_experts": Public("mixture-of-experts", "mixture_of_experts", _mixture, package="mixture-of-experts"),
}
