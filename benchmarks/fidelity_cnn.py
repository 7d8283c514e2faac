"""Convolutional networks of other code and ours, from the same weights: python benchmarks/fidelity_cnn.py SOURCE PATH.

SOURCE is one of `SOURCES`, PATH a checkout of its repository, which is imported; nothing of it stands here. KASTEL's
code also wants einops, and --vision. Random weights in their names go to both. Printed are the largest difference of
the logits, their deviation, and how many routers chose the same. ``--write`` keeps the rows
(docs/results/fidelity_cnn.json), and the small nets as cases under tests/golden/fidelity, to which
tests/test_fidelity.py holds ours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import results
from tests.golden_weights import Case, Drawn, draw, write_case
from torch import Tensor, nn

from robustmoe.models import RoutedModel, build_model
from robustmoe.routing import Routing
from robustmoe.weights import LAYOUTS
from robustmoe.weights.fitting import fits

Routes = Callable[[nn.Module, Tensor], dict[str, Tensor]]
"""Their experts (n, 1, k) by router of ours, for images as their network takes them."""

Make = Callable[..., nn.Module]

PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CLEAR = 1e-3
"""No router may be nearer to a tie, relative to its logits' deviation: rounding must not decide."""


@dataclass(frozen=True)
class Twin:
    """``theirs`` makes their network; ``ours`` is the same in this package. ``golden``: kept as a case, under ``name``.
    ``inside``: their network normalises the images itself. ``routes``: what their routers chose, which depends on the
    tensors that match ``deciding`` alone. ``still``: tensors without effect, left as if fresh.
    """

    name: str
    ours: str
    theirs: Make
    golden: bool = False
    size: int = 32
    num_classes: int = 10
    inputs: tuple[tuple[float, ...], tuple[float, ...]] = PLAIN
    inside: bool = False
    routes: Routes | None = None
    deciding: str = ""
    still: str = "^$"


@dataclass(frozen=True)
class Source:
    """``layout`` of ``repository`` at ``commit``; ``twins(path)`` imports it from there."""

    layout: str
    repository: str
    commit: str
    twins: Callable[[Path], list[Twin]]


# ------------------------------------------------------------------------------------------------ weights and answers


def bounds(name: str, shape: tuple[int, ...], still: str) -> tuple[float, float]:
    """What a tensor is drawn between: weights by their fan-in, BatchNorms as after training."""
    leaf = name.rpartition(".")[2]
    if re.search(still, name):
        value = 1.0 if leaf in ("weight", "running_var") else 0.0
        return value, value
    if len(shape) > 1:
        wide = (6 / int(np.prod(shape[1:]))) ** 0.5
        return -wide, wide
    return (0.5, 1.5) if leaf in ("running_var", "weight") else (-0.2, 0.2)


def weights_of(net: nn.Module, still: str) -> dict[str, Drawn]:
    """The draws of all their tensors; those of one storage are one draw."""
    out: dict[str, Drawn] = {}
    first: dict[int, str] = {}
    for name, value in net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            key, shape = first.setdefault(value.data_ptr(), name), tuple(value.shape)
            out[name] = Drawn(shape, *bounds(key, shape, still), "" if key == name else key)
    return out


def fill(net: nn.Module, case: Case, only: str = "") -> None:
    """Puts the weights of the case into their network; those whose names match ``only`` alone."""
    chosen = {name: each for name, each in case.weights.items() if re.search(only, name)}
    state = {name: torch.from_numpy(draw(case.seed, each.key or name, each)) for name, each in chosen.items()}
    net.load_state_dict(state, strict=False)


@torch.no_grad()
def run(twin: Twin, source: Source, n: int = 6) -> tuple[Case, dict[str, Any]]:
    """Both on the same weights and images, of the first seed by which a router (of several two) sends images to two
    experts and all decide clearly.
    """
    net, shape = twin.theirs().eval(), (3, twin.size, twin.size)
    said = f"{source.repository} at {source.commit}"
    weights = weights_of(net, twin.still)
    for seed in range(400):
        case = Case(source.layout, twin.ours, said, shape, twin.num_classes, seed, n, twin.inputs, weights, [], {})
        x = torch.from_numpy(case.images())
        if not twin.inside:
            x = (x - torch.tensor(twin.inputs[0])[:, None, None]) / torch.tensor(twin.inputs[1])[:, None, None]
        routes: dict[str, Tensor] = {}
        if twin.routes is not None:
            fill(net, case, twin.deciding)
            routes = twin.routes(net, x)
            if sum(len(each.unique()) > 1 for each in routes.values()) < min(2, len(routes)):
                continue
        fill(net, case)
        logits = net(x)
        row, margin = compared(case, logits, routes)
        if margin > CLEAR:
            listed = {name: each.tolist() for name, each in routes.items()}
            return replace(case, logits=logits.double().tolist(), routes=listed), row
    raise SystemExit(f"{twin.name}: no seed spreads the routes")


def compared(case: Case, logits: Tensor, routes: Mapping[str, Tensor]) -> tuple[dict[str, Any], float]:
    """A row, and how far our routers are from a tie, relative to their logits' deviation."""
    mean, std = case.inputs
    model: RoutedModel = build_model(case.model, case.num_classes, case.image_shape, mean, std)
    weights = {name: torch.from_numpy(value) for name, value in case.tensors().items()}
    fit = fits({"": weights}, model, {case.layout: LAYOUTS[case.layout]})[0]
    if not fit.whole:
        raise SystemExit(f"{case.model}: {fit.problems()}")
    model.load_state_dict(dict(fit.given), strict=False)
    output = model.run(torch.from_numpy(case.images()))
    equal = [torch.equal(output.trace[name].index.sort()[0], each.sort()[0]) for name, each in routes.items()]
    row = {
        "model": case.model,
        "source": case.source,
        "difference": float((output.logits - logits).abs().max()),
        "deviation": float(logits.double().std()),
        "routers": len(routes),
        "same routes": sum(equal),
    }
    return row, min((margin_of(output.trace[name]) for name in routes), default=1.0)


def margin_of(routing: Routing) -> float:
    best = routing.logits.sort(-1, descending=True)[0]
    return float((best[..., routing.k - 1] - best[..., routing.k]).min() / routing.logits.std())


# ------------------------------------------------------------------------------------------------ AdvMoE


def optml(path: Path) -> list[Twin]:
    sys.path.insert(0, str(path))
    models = importlib.import_module("models")
    resnet = importlib.import_module("models.resnet_cifar_moe")
    large = importlib.import_module("models.resnet_imagenet_moe")
    wide, wide_large = (importlib.import_module(f"models.wrn_{form}_moe") for form in ("cifar", "imagenet"))

    def moe(make: Make, experts: int, ratio: float, *args: Any, **more: Any) -> Callable[[], nn.Module]:
        def made() -> nn.Module:
            net, router = make(*args, n_expert=experts, ratio=ratio, **more), models.build_router(num_experts=experts)
            for module in list(net.modules()):
                if hasattr(module, "router"):
                    module.router = router
            return net

        return made

    def twin(name: str, backbone: str, make: Make, *args: Any, **more: Any) -> Twin:
        experts, ratio = more.pop("experts", 2), more.pop("ratio", 0.5)
        form = {key: more.pop(key) for key in ("golden", "size", "num_classes", "still") if key in more}
        built = moe(make, experts, ratio, *args, num_classes=form.get("num_classes", 10), **more)
        ours = f"pathway({backbone}, experts={experts}, ratio={ratio})"
        return Twin(
            name,
            ours,
            built,
            routes=lambda net, x: {"router": net.router(x).argmax(1)[:, None, None]},
            deciding=r"^router\.|\.router\.",
            **form,
        )

    def dense(name: str, ours: str, size: int = 32, **more: Any) -> Twin:
        make = getattr(models, name)
        return Twin(f"optml_{name}_{more.get('ratio', 1)}", ours, lambda: make(num_classes=10, **more), size=size)

    dead, block = r"block\d\.layer\.0\.bn1\.", resnet.BasicBlock
    return [
        twin("optml_resnet10", "resnet10", resnet.ResNet, block, [1] * 4, golden=True, ratio=0.25),
        twin(
            "optml_resnet10_imagenet",
            "resnet10(stem=imagenet)",
            large.ResNet,
            large.BasicBlock,
            [1] * 4,
            golden=True,
            ratio=0.25,
            experts=3,
            size=64,
        ),
        twin(
            "optml_wrn_10_2",
            "wide_resnet(10, 2, released=True)",
            wide.WideResNet,
            10,
            widen_factor=2,
            still=dead,
            golden=True,
        ),
        twin(
            "optml_wrn_10_1_imagenet",
            "wide_resnet(10, 1, 'imagenet', released=True)",
            wide_large.WideResNet,
            10,
            widen_factor=1,
            still=dead,
            size=64,
            golden=True,
        ),
        twin("optml_vgg16", "vgg16", models.vgg16_bn_moe, golden=True, ratio=0.125),
        twin("optml_resnet18", "resnet18", models.resnet18_cifar_moe),
        twin("optml_resnet18_e5", "resnet18", models.resnet18_cifar_moe, experts=5),
        twin("optml_resnet18_r03", "resnet18", models.resnet18_cifar_moe, ratio=0.3),
        twin("optml_resnet18_r1", "resnet18", models.resnet18_cifar_moe, ratio=1.0),
        twin("optml_resnet34", "resnet34", models.resnet34_cifar_moe),
        twin("optml_resnet50", "resnet50", models.resnet50_cifar_moe),
        twin("optml_resnet18_tiny", "resnet18", models.resnet18_cifar_moe, size=64, num_classes=200),
        twin("optml_resnet18_imagenet", "resnet18(stem=imagenet)", models.resnet18_imagenet_moe, experts=5, size=96),
        twin("optml_resnet50_imagenet", "resnet50(stem=imagenet)", models.resnet50_imagenet_moe, experts=5, size=96),
        twin("optml_vgg16_half", "vgg16", models.vgg16_bn_moe),
        twin("optml_vgg16_64", "vgg16", models.vgg16_bn_moe, size=64, experts=3),
        twin("optml_wrn_28_4", "wide_resnet(28, 4, released=True)", models.wrn_28_4_cifar_moe, still=dead),
        twin("optml_wrn_28_10", "wide_resnet(28, 10, released=True)", models.wrn_28_10_cifar_moe, still=dead),
        twin(
            "optml_wrn_28_4_imagenet",
            "wide_resnet(28, 4, stem=imagenet, released=True)",
            models.wrn_28_4_imagenet_moe,
            experts=5,
            still=dead,
            size=96,
        ),
        dense("resnet18_cifar_ori", "resnet18"),
        dense("resnet18_cifar_ori", "slim(resnet18, ratio=0.5)", ratio=0.5),
        dense("resnet18_imagenet_ori", "slim(resnet18(stem=imagenet), ratio=0.5)", 96, ratio=0.5),
        dense("vgg16_bn_ori", "slim(vgg16, ratio=0.5)", ratio=0.5),
        dense("wrn_28_4_cifar_ori", "slim(wide_resnet(28, 4), ratio=0.5)", ratio=0.5),
        replace(dense("wrn_28_4_imagenet_ori", "wide_resnet(28, 4, stem=imagenet, released=True)", 96), still=dead),
    ]


# ------------------------------------------------------------------------------------------------ RT-ER and JTDMoE


def timl(path: Path) -> list[Twin]:
    sys.modules.setdefault("timm", types.ModuleType("timm"))  # asked for by name alone where no ViT is built
    sys.path.insert(0, str(path))
    moe, resnet = importlib.import_module("models.moe"), importlib.import_module("models.resnet")
    ours = "ensemble({}, experts=4, router=linear, gate=hard)"

    def small(make: Make) -> Make:
        """With ResNet-10 as expert: their class takes ResNet18 from its module."""

        def made() -> nn.Module:
            moe.ResNet18 = lambda: resnet.ResNet(resnet.BasicBlock, [1] * 4)
            net = make()
            moe.ResNet18 = resnet.ResNet18
            return net

        return made

    def chosen(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return {"router": net.router(x)[:, None, None]}

    def of_both(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        halves = (("standard", net.Smoe), ("robust", net.Rmoe))
        return {f"{name}.router": half.router(x)[:, None, None] for name, half in halves}

    whole, both = (lambda: moe.MOE_Resnet18(4, 10, 32)), (lambda: moe.Dual_Model_resnet18(0.7, 32))
    dual = f"dual({ours}, {ours}, alpha=0.7, mix=logits)"
    return [
        Twin(
            "timl_moe",
            ours.format("resnet10").replace("experts=4", "experts=2"),
            small(lambda: moe.MOE_Resnet18(2, 10, 32)),
            True,
            inputs=CIFAR10,
            routes=chosen,
            deciding=r"router\.",
        ),
        Twin("timl_moe_resnet18", ours.format("resnet18"), whole, routes=chosen, deciding=r"router\."),
        Twin("timl_dual_resnet18", dual.format("resnet18", "resnet18"), both, routes=of_both, deciding=r"router\."),
    ]


# ------------------------------------------------------------------------------------------------ Robust Experts


def kastel(path: Path) -> list[Twin]:
    """Wants einops, and --vision PATH, a checkout of pytorch/vision."""
    sys.path.insert(0, str(path))
    importlib.import_module("src.models.nn")
    unused = {
        "deeplabv3plus": {"__path__": []},
        "deeplabv3plus.sync_batchnorm": {"SynchronizedBatchNorm2d": nn.Identity},
    }
    for name, values in unused.items():  # asked for by name alone, and not in the repository
        module = types.ModuleType(f"src.models.nn.{name}")
        module.__dict__.update(values)
        sys.modules[module.__name__] = module
    block, conv, kinds = (
        importlib.import_module(f"src.models.nn.moe.{name}")
        for name in ("resnet_block_moe", "resnet_conv_moe", "routing")
    )
    routers = {
        "gap_fc": kinds.GlobalAvgLinearRoutingNetwork,
        "conv_gap": kinds.ConvGlobalAvgRoutingNetwork,
        "conv3_gap": partial(kinds.ConvGlobalAvgRoutingNetwork, kernel_size=(3, 3)),
        "double_conv": partial(kinds.DoubleConvGlobalAvgRoutingNetwork, kernel_size=(1, 1)),
        "fixed_gap": kinds.GlobalAvgDeterministicRoutingNetwork,
        "channel_gap": kinds.SingleEntryDeterministicRoutingNetwork,
    }

    def chosen(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        gates = {name.removesuffix(".gate"): gate for name, gate in net.named_modules() if name.endswith(".gate")}
        hooks = [
            gate.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out[1].nonzero()[:, 1]}))
            for name, gate in gates.items()
        ]
        net(x)
        for hook in hooks:
            hook.remove()
        return {router_of(name): each.view(len(x), 1, -1) for name, each in seen.items()}

    def twin(name: str, ours: str, make: Make, router: str, k: int = 1, golden: bool = False, layers: int = 18) -> Twin:
        made = partial(make, routing_layer_type=routers[router], num_experts=3, k=k, layers=layers, num_channels=3,
                       small_inputs=True, num_classes=10, use_ste=True, expert_capacity=None)  # fmt: skip
        spec = f"{ours}, experts=3, router={router}{f', k={k}' if k > 1 else ''})"
        return Twin(f"kastel_{name}", spec, made, golden, routes=chosen)

    blocks, last, convs = block.ResNetBlockMoE, block.ResNetResidualBlockMoE, conv.ResNetConvMoE
    late = partial(convs, moe_layer_prefix="layer4.1.conv2")
    return [
        *(twin(f"block_{name}", "block_moe(resnet18", blocks, name) for name in routers),
        twin("conv3_gap", "block_moe(resnet10", blocks, "conv3_gap", golden=True, layers=10),
        twin(
            "double_conv",
            "conv_moe(resnet10, convs=last",
            partial(convs, moe_layer_prefix="layer4.0.conv2"),
            "double_conv",
            golden=True,
            layers=10,
        ),
        twin("residual", "block_moe(resnet18, blocks=last", last, "conv3_gap"),
        twin("block_k2", "block_moe(resnet18", blocks, "gap_fc", 2),
        twin("conv", "conv_moe(resnet18, shortcuts=True", convs, "conv3_gap"),
        twin("conv_last", "conv_moe(resnet18, convs=last", late, "gap_fc"),
        twin("block_resnet50", "block_moe(resnet50", blocks, "gap_fc", layers=50),
    ]


def router_of(layer: str) -> str:
    """Our name of a router by their path of its layer."""
    _, stage, *inside = layer.split(".")
    inner = ".".join(inside).replace("downsample.0", "shortcut.conv")
    return f"network.stages.{int(stage.removeprefix('layer')) - 1}.{inner}.router"


# ------------------------------------------------------------------------------------------------ dense networks


def torchvision(path: Path) -> list[Twin]:
    models = vision(path)
    block, net, vit = models.resnet.BasicBlock, models.resnet.ResNet, models.vision_transformer.VisionTransformer
    small, attentive = (lambda: net(block, [1] * 4, 7)), (lambda: vit(32, 8, 2, 4, 32, 128, num_classes=10))
    return [
        Twin("torchvision_resnet10", "resnet10(stem=imagenet)", small, True, size=64, num_classes=7),
        Twin("torchvision_vit", "vit(patch=8, width=32, depth=2, heads=4)", attentive, True),
        *(
            Twin(f"torchvision_{name}", f"{name}(stem=imagenet)", getattr(models, name), size=96, num_classes=1000)
            for name in ("resnet18", "resnet34", "resnet50")
        ),
        Twin(
            "torchvision_wide_resnet50_2",
            "resnet50(stem=imagenet, inner=2)",
            models.resnet.wide_resnet50_2,
            size=96,
            num_classes=1000,
        ),
    ]


def vision(path: Path) -> Any:
    """torchvision.models with its ResNets and transformers alone, from a checkout that was not built: what they want of
    the rest is a name for weights that nobody asks for.
    """

    def ident(*_: Any, **__: Any) -> Callable[[Any], Any]:
        return lambda function: function

    class Asked:
        """Stands for a set of published weights."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.meta: dict[str, Any] = {}

        @classmethod
        def verify(cls, weights: Any) -> Any:
            return weights

    stubs: dict[str, dict[str, Any]] = {
        "torchvision": {"__path__": [str(path / "torchvision")]},
        "torchvision.utils": {"_log_api_usage_once": lambda *_: None, "_make_ntuple": None},
        "torchvision.transforms": {"__path__": []},
        "torchvision.transforms._presets": {
            "ImageClassification": object,
            "InterpolationMode": types.SimpleNamespace(BICUBIC=None, BILINEAR=None),
        },
        "torchvision.ops": {"__path__": [str(path / "torchvision" / "ops")]},
        "torchvision.models": {"__path__": [str(path / "torchvision" / "models")]},
        "torchvision.models._api": {"register_model": ident, "Weights": Asked, "WeightsEnum": Asked},
        "torchvision.models._meta": {"_IMAGENET_CATEGORIES": []},
        "torchvision.models._utils": {"handle_legacy_interface": ident, "_ovewrite_named_param": lambda *_: None},
    }
    for name, values in stubs.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        sys.modules[name] = module
    models = sys.modules["torchvision.models"]
    models.resnet = importlib.import_module("torchvision.models.resnet")
    models.vision_transformer = importlib.import_module("torchvision.models.vision_transformer")
    models.resnet10 = partial(models.resnet.ResNet, models.resnet.BasicBlock, [1] * 4)  # none of theirs: a small case
    for name in ("ResNet", "resnet18", "resnet34", "resnet50"):
        setattr(models, name, getattr(models.resnet, name))
    sys.modules["torchvision"].models = models
    return models


def robustbench(path: Path) -> list[Twin]:
    for name, inside in (("robustbench", ""), ("robustbench.model_zoo", "model_zoo")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path / "robustbench" / inside)]
    wide, dm, resnet = (
        importlib.import_module(f"robustbench.model_zoo.architectures.{name}")
        for name in ("wide_resnet", "dm_wide_resnet", "resnet")
    )
    v1, v2 = resnet.PreActBlock, resnet.PreActBlockV2

    def trades(name: str, depth: int, width: int, golden: bool = False) -> Twin:
        made = lambda: wide.WideResNet(depth, 10, width, sub_block1=golden)  # noqa: E731
        return Twin(f"robustbench_{name}", f"wide_resnet({depth}, {width})", made, golden)

    def deepmind(depth: int, width: int, activation: str, golden: bool = False) -> Twin:
        act = dm.Swish if activation == "silu" else nn.ReLU
        ours = f"wide_resnet({depth}, {width}, activation={activation}, padding=same)"
        made = lambda: dm.DMWideResNet(10, depth, width, act)  # noqa: E731
        return Twin(f"robustbench_dm_wrn_{depth}_{width}_{activation}", ours, made, golden, inputs=CIFAR10, inside=True)

    def preact(name: str, options: str, block: Any, blocks: list[int], golden: bool = False, **more: Any) -> Twin:
        depth = {4: 10, 8: 18, 16: 34}[sum(blocks)]
        ours = f"preact_resnet({depth}, {options})"
        return Twin(f"robustbench_preact_{name}", ours, lambda: resnet.PreActResNet(block, blocks, **more), golden)

    def deep(depth: int, activation: str, golden: bool = False) -> Twin:
        ours = f"preact_resnet({depth}, shortcut=conv3, activation={activation}, padding=same)"
        act = dm.Swish if activation == "silu" else nn.ReLU
        made = lambda: dm.DMPreActResNet(10, depth, 0, act)  # noqa: E731
        return Twin(f"robustbench_dm_preact_{depth}", ours, made, golden, inputs=CIFAR10, inside=True)

    return [
        trades("wrn_10_2", 10, 2, True),
        trades("wrn_28_10", 28, 10),
        trades("wrn_34_10", 34, 10),
        trades("wrn_34_20", 34, 20),
        trades("wrn_70_16", 70, 16),
        deepmind(10, 2, "silu", True),
        deepmind(10, 2, "relu", True),
        deepmind(28, 10, "silu"),
        deepmind(70, 16, "silu"),
        preact("v1", "shortcut=raw, last_norm=False", v1, [1] * 4, True),
        preact("v2", "shortcut=active", v2, [1] * 4, True, bn_before_fc=True),
        preact("18", "shortcut=raw, last_norm=False", v1, [2] * 4),
        preact("18_rice", "shortcut=active", v2, [2] * 4, bn_before_fc=True),
        deep(18, "silu", True),
        deep(34, "silu"),
        Twin("robustbench_resnet18", "resnet18", resnet.ResNet18),
        Twin("robustbench_resnet50", "resnet50", resnet.ResNet50),
    ]


SOURCES = {
    "optml": Source("optml", "github.com/OPTML-Group/Robust-MoE-CNN", "c50796f", optml),
    "timl": Source("timl", "github.com/TIML-Group/Robust-MoE-Dual-Model", "30ef94d", timl),
    "kastel": Source("kastel", "github.com/KASTEL-MobilityLab/robust-sparse-moes", "ed22e81", kastel),
    "torchvision": Source("torchvision", "github.com/pytorch/vision", "0.28.0", torchvision),
    "robustbench": Source("robustbench", "github.com/RobustBench/robustbench", "78fcc9e", robustbench),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--vision", type=Path, help="for kastel: a checkout of pytorch/vision")
    parser.add_argument("--only", default="", help="a regular expression of the names wanted")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    source, kept = SOURCES[options.source], {}
    if options.vision is not None:
        vision(options.vision)
    for twin in source.twins(options.path):
        if not re.search(options.only, twin.name):
            continue
        case, row = run(twin, source)
        kept[twin.name] = row
        share = row["difference"] / row["deviation"]
        print(
            f"{twin.name:36} {row['difference']:8.1e} of {row['deviation']:8.2e}: {share:7.1e}; "
            f"routes {row['same routes']} of {row['routers']}; seed {case.seed}",
            flush=True,
        )
        if options.write and twin.golden:
            write_case(twin.name, case)
    if options.write:
        path = results.RESULTS / "fidelity_cnn.json"
        numbers = json.loads(path.read_text())["numbers"] if path.is_file() else {}
        seeds = "of each net the first from 0 on by which the routes differ and are clear"
        about = results.described("python benchmarks/fidelity_cnn.py SOURCE PATH --write", seeds=seeds)
        results.write(path, about, numbers | kept)


if __name__ == "__main__":
    main()
