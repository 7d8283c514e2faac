"""What the checks R18, G15, G2 and R7 say of dense networks (they have to say nothing) and of hidden routers.

``python -m benchmarks.looking_inside`` builds every network below from random weights, at 32 to 64 pixels, asks the
checks, and writes docs/results/looking_inside.json (about five minutes on one thread; with names, only those, and
nothing is written). It needs timm and transformers, the extra "wild"; neither needs torchvision here.

A network gets logits of ordinary size: BatchNorm's statistics are those of one batch of noise, and what starts at zero
(a residual branch's last scale) starts at one, so that no branch is dead.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.results import RESULTS, described, write
from tests import planted
from tests.wild_models import without_torchvision
from torch import Tensor, nn

import robustmoe as rm
from robustmoe.attacks import PGD, linf
from robustmoe.data import Batch
from robustmoe.evaluation.checks import CHECKS, Subject
from robustmoe.models import RoutedModel, as_routed, build_model
from robustmoe.routing import Tape

Make = Callable[[], nn.Module]

FILE = RESULTS / "looking_inside.json"
ASKED = ("R18", "G15", "G2", "R7")
CLASSES, IMAGES, SEED = 10, 16, 0
PGD_PASSES = 500 * (3 * 20 + 3)
"""Forward passes of a PGD-20 on 500 images, a gradient counted as 3, and of what is asked of clean and attacked images.
"""

TIMM: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "resnext26ts": {},
    "seresnext26t_32x4d": {},
    "skresnet18": {},
    "resnest14d": {},
    "res2net50_14w_8s": {},
    "densenet121": {},
    "mobilenetv3_small_050": {},
    "efficientnet_lite0": {},
    "regnety_002": {},
    "convnext_atto": {},
    "convnextv2_atto": {},
    "nf_regnet_b0": {},
    "ghostnet_050": {},
    "repvgg_a0": {},
    "poolformer_s12": {},
    "edgenext_xx_small": {},
    "mobilevit_xxs": {},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 3},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 3},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 3},
    "beit_base_patch16_224": {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1), "embed_dim": 24},
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1), "embed_dim": 24},
    "mixer_s32_224": {"img_size": 64},
    "gmlp_ti16_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "cait_xxs24_224": {"img_size": 64, "depth": 2},
    "xcit_nano_12_p16_224": {"img_size": 64, "depth": 2},
    "pvt_v2_b0": {},
    "twins_svt_small": {"img_size": 64, "depths": (1, 1, 1, 1)},
    "coatnet_nano_rw_224": {"img_size": 64},
    "visformer_tiny": {"img_size": 64},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192)},
    "hiera_tiny_224": {"img_size": 64, "stages": (1, 1, 1, 1)},
}
"""Dense image classifiers of timm, the small ones, with the arguments that make them smaller."""


def of_transformers() -> dict[str, Make]:
    """Dense image classifiers of transformers, from small configurations."""
    import transformers as hf

    classes = {"num_labels": CLASSES}
    sized = {**classes, "image_size": 64}
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    vit = {**sized, **small, "patch_size": 16}
    stages = {**classes, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
    heads = {"num_attention_heads": [1, 2, 4, 4]}
    necks = {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 12, 16, 24, 32, 40, 64]}
    focal = {"embed_dim": 24, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]}
    configs: dict[str, dict[str, Any]] = {
        "ViT": vit,
        "DeiT": vit,
        "Beit": vit,
        "ViTMSN": vit,
        "Dinov2": {**vit, "image_size": 56, "patch_size": 14, "use_swiglu_ffn": True},
        "ResNet": {**stages, "embedding_size": 16},
        "RegNet": {**stages, "embedding_size": 16, "groups_width": 8},
        "ConvNext": stages,
        "ConvNextV2": stages,
        "Swin": {**sized, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        "PoolFormer": stages,
        "Segformer": {**stages, **heads},
        "Pvt": {**sized, **heads, "hidden_sizes": [16, 32, 40, 48], "depths": [1, 1, 1, 1]},
        "MobileNetV2": {**classes, "depth_multiplier": 0.35},
        "MobileViT": {**sized, **necks},
        "FocalNet": {**sized, **focal},
    }

    def make(name: str, options: dict[str, Any]) -> Make:
        kind, config = getattr(hf, f"{name}ForImageClassification"), getattr(hf, f"{name}Config")
        return lambda: Logits(kind(config(**options)))

    return {f"transformers {name}": make(name, options) for name, options in configs.items()}


class Logits(nn.Module):
    """A classifier of transformers as one from images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def dense() -> dict[str, Make]:
    """Every dense network, by name."""
    with without_torchvision():
        import timm

    def make(name: str, options: dict[str, Any]) -> Make:
        return lambda: timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)

    networks = {f"timm {name}": make(name, options) for name, options in TIMM.items()}
    return networks | of_transformers()


def side(name: str) -> int:
    """The pixels of an image's side."""
    return 56 if "patch14" in name or "Dinov2" in name else 64


def lively(model: nn.Module, x: Tensor) -> nn.Module:
    """The network in eval mode, with the statistics of one batch in its BatchNorms, what was zero being so no more."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = "gamma" in name or "scale" in name or name.endswith("weight")
            if scale and parameter.numel() and float(parameter.abs().max()) < 1e-3:
                parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=0.1)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = 1.0
        model.train()
        model(x)
    return model.eval()


def asked(name: str, make: Make) -> dict[str, Any]:
    """What the checks say of one network, and what they cost beside a PGD-20 on 500 images."""
    torch.manual_seed(SEED)
    x = torch.rand(IMAGES, 3, side(name), side(name))
    model = as_routed(lively(make(), x))
    with torch.no_grad():
        y = model.run(x).logits.argmax(1)
        started = time.perf_counter()
        model.run(x)
        forward = (time.perf_counter() - started) / IMAGES
    batch = Batch(x, y, torch.arange(IMAGES))
    case = Subject(model, (PGD(linf(8 / 255), steps=20),), batch, batch)
    started = time.perf_counter()
    with torch.no_grad():
        answers = [CHECKS[id].asked["cheap"](case) for id in ASKED]
    seconds = time.perf_counter() - started
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": parameters,
        "seconds": round(seconds, 2),
        "passes": round(seconds / forward),
        "of_a_pgd_20": round(seconds / forward / PGD_PASSES, 4),
        **{answer.id: answer.status for answer in answers},
        "said": [answer.sentence for answer in answers if answer.status != "pass"],
    }


class Called(nn.Module):
    """A routed model in a plain module that goes past what tells its routes: ``body`` with a tape of its own."""

    def __init__(self, model: RoutedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.body(x, Tape())


def hidden() -> dict[str, tuple[Callable[[Tensor], Tensor], str]]:
    """Models with routers that are hidden or wrapped, and what is evaluated on them: the images of digits, or those of
    the planted models.
    """
    pathway = build_model("pathway(resnet8(width=4), experts=2, router=linear)", 10, (1, 8, 8), seed=SEED)
    return {
        "a pathway, its body called by a plain module": (Called(pathway), "digits"),
        "a pathway in DataParallel": (nn.DataParallel(pathway), "digits"),
        "a pathway behind torch.compile": (torch.compile(pathway, backend="eager"), "digits"),
        "a compiled pathway in a lambda": (_compiled(pathway), "digits"),
        "a hard top-1": (planted.HiddenTop1(), "planted"),
        "a pathway of filters": (planted.HiddenPathway(), "planted"),
        "a Soft MoE": (planted.HiddenSoftMoE(), "planted"),
        "experts under no_grad": (planted.OffExperts(), "bright and dark"),
    }


def _compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(model, backend="eager")
    return lambda x: compiled(x)


def printed(model: Callable[[Tensor], Tensor], name: str, images: str) -> str:
    """What `rm.evaluate` prints of it after PGD-20, on 64 digits or on the planted images."""
    if images == "digits":
        return str(rm.evaluate(model, "digits", attacks="pgd(linf(0.1), steps=20)", limit=64, name=name))
    x, y = planted.images() if images == "planted" else planted._bright_and_dark()
    return str(rm.evaluate(model, x, y, attacks="pgd(linf(8/255), steps=20)", name=name))


def main(names: list[str]) -> None:
    shown = {}
    for name, (model, images) in hidden().items():
        shown[name] = printed(model, name, images)
        print(f"{shown[name]}\n", flush=True)
    networks = {name: make for name, make in dense().items() if not names or any(part in name for part in names)}
    rows = {}
    for name, make in networks.items():
        rows[name] = asked(name, make)
        print(name, rows[name], flush=True)
    alarms = sum(bool(row["said"]) for row in rows.values())
    print(f"{len(rows)} dense networks, {alarms} with an alarm")
    if names:
        return
    shares = [100 * row["of_a_pgd_20"] for row in rows.values()]
    numbers = {
        "dense": {"networks": len(rows), "alarms": alarms},
        "cost": {"median": statistics.median(shares), "max": max(shares)},
    }
    write(FILE, described("python -m benchmarks.looking_inside", seeds=[SEED]), numbers, dense=rows, printed=shown)


if __name__ == "__main__":
    main(sys.argv[1:])
