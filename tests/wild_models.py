"""Classifiers with routed layers of real packages in them, at the smallest sizes; see test_wild.py.

`make wild` installs the packages (the extra "wild"); without them the tests of a file that calls `needed` are skipped.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

WIDTH, EXPERTS = 16, 4
MISSING = (
    'needs the extra "wild" (st-moe-pytorch, soft-moe-pytorch, mixture-of-experts, transformers, timm): run `make wild`'
)


def needed() -> None:
    """Skips the file that asks, where a package is missing."""
    for package in ("st_moe_pytorch", "soft_moe_pytorch", "mixture_of_experts", "transformers"):
        pytest.importorskip(package, reason=MISSING)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The packages warn of what is their own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Classifier(nn.Module):
    """Sixteen patches of an image (3, 16, 16), a routed layer beside the tokens, the mean, ten classes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.moe = layer
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2).contiguous()
        out = self.moe(h)
        out = out if isinstance(out, Tensor) else out[0]
        return self.head((h + out.reshape(h.shape)).mean(1))


@dataclass(frozen=True)
class Wild:
    """A package's model. ``path``, ``codec``: what is guessed; ``k`` of the ``experts``; ``random``: it draws in eval
    mode.
    """

    make: Callable[[], nn.Module]
    path: str
    codec: str
    k: int = 2
    random: bool = False
    experts: int = EXPERTS


def _of(package: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return Classifier(getattr(importlib.import_module(package), name)(dim=WIDTH, num_experts=EXPERTS, **options))

    return make


SIZES = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}


def _block(family: str, layer: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A routed block of transformers, with weights that are all of some size (the package leaves them empty)."""

    def make() -> nn.Module:
        code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        described = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
        settings = getattr(described, config)(**options)
        settings._experts_implementation = "eager"
        block = getattr(code, layer)(settings)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3)
        return Classifier(block)

    return make


class _Nothing(type):
    """A class that is not there; what is asked of it is its name."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Absent(types.ModuleType):
    """What stands for a part of torchvision while timm is imported: its names, and nothing behind them."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or _Nothing(name, (), {})


@contextlib.contextmanager
def without_torchvision() -> Iterator[None]:
    """timm names torchvision when it is imported, for image transforms and frozen norms; its networks need neither."""
    parts = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".utils")
    names = [] if importlib.util.find_spec("torchvision") else [f"torchvision{part}" for part in parts]
    sys.modules.update({name: _Absent(name) for name in names})
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class Outputs(nn.Module):
    """A layer that gives its tokens and losses, as one that gives its tokens."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def timm_vit() -> nn.Module:
    """timm's vision transformer with an st-moe layer in the place of its second MLP."""
    with without_torchvision():
        timm = importlib.import_module("timm")
    net: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=10
    )
    layer = importlib.import_module("st_moe_pytorch").MoE(dim=24, num_experts=EXPERTS, gating_top_n=2)
    net.blocks[1].mlp = Outputs(layer)
    return net


WILD = {
    "st-moe-pytorch": Wild(_of("st_moe_pytorch", "MoE", gating_top_n=2), "moe.gate", "dispatch", random=True),
    "mixture-of-experts": Wild(_of("mixture_of_experts", "MoE"), "moe.gate", "dispatch", random=True),
    "soft-moe-pytorch": Wild(_of("soft_moe_pytorch", "SoftMoE", num_slots=3), "moe", "slots", k=EXPERTS),
    "timm and st-moe": Wild(timm_vit, "blocks.1.mlp.layer.gate", "dispatch", random=True),
    "qwen3_vl_moe": Wild(
        _block(
            "qwen3_vl_moe",
            "Qwen3VLMoeTextSparseMoeBlock",
            "Qwen3VLMoeTextConfig",
            moe_intermediate_size=12,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            **SIZES,
        ),
        "moe.gate",
        "triple",
    ),
    "glm4v_moe": Wild(
        _block(
            "glm4v_moe",
            "Glm4vMoeTextMoE",
            "Glm4vMoeTextConfig",
            moe_intermediate_size=12,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            **SIZES,
        ),
        "moe.gate",
        "triple",
    ),
    "aria": Wild(
        _block(
            "aria",
            "AriaTextMoELayer",
            "AriaTextConfig",
            intermediate_size=12,
            moe_num_experts=EXPERTS,
            moe_topk=2,
            **SIZES,
        ),
        "moe.router",
        "triple",
    ),
    "qwen3_5_moe": Wild(
        _block(
            "qwen3_5_moe",
            "Qwen3_5MoeSparseMoeBlock",
            "Qwen3_5MoeTextConfig",
            moe_intermediate_size=12,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            shared_expert_intermediate_size=12,
            **SIZES,
        ),
        "moe.gate",
        "triple",
    ),
    "mixtral": Wild(
        _block(
            "mixtral",
            "MixtralSparseMoeBlock",
            "MixtralConfig",
            intermediate_size=12,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            **SIZES,
        ),
        "moe.gate",
        "triple",
    ),
    "deepseek_v3": Wild(
        _block(
            "deepseek_v3",
            "DeepseekV3MoE",
            "DeepseekV3Config",
            moe_intermediate_size=12,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            **SIZES,
        ),
        "moe.gate",
        "triple",
        experts=8,
    ),
    "llama4": Wild(
        _block(
            "llama4",
            "Llama4TextMoe",
            "Llama4TextConfig",
            intermediate_size=12,
            num_local_experts=EXPERTS,
            num_experts_per_tok=1,
            **SIZES,
        ),
        "moe.router",
        "dense(k=1, output=0, logits=1)",
        k=1,
    ),
    "gpt_oss": Wild(
        _block(
            "gpt_oss",
            "GptOssMLP",
            "GptOssConfig",
            intermediate_size=12,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            **SIZES,
        ),
        "moe.router",
        "triple",
    ),
    "switch_transformers": Wild(
        _block(
            "switch_transformers",
            "SwitchTransformersSparseMLP",
            "SwitchTransformersConfig",
            d_model=WIDTH,
            d_ff=12,
            num_experts=EXPERTS,
            expert_capacity=64,
        ),
        "moe.router",
        "call(name=argmax)",
        k=1,
    ),
    "dbrx": Wild(_block("dbrx", "DbrxFFN", "DbrxConfig", d_model=WIDTH), "moe", "call(weights=renormalised)", k=1),
}
"""The routed layers of packages on PyPI, by the name of the package or of the family in transformers."""


def example(n: int = 6) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(5))
