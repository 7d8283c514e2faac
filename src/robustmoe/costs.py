"""What a model costs: parameters, and multiply-adds an image, its routers counted; the table of the architectures."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from robustmoe import compat
from robustmoe import spec as specs
from robustmoe.attacks.base import evaluating
from robustmoe.models import ImageShape, ModelSpec, Normalise, RoutedModel
from robustmoe.routing import Routing, Tape


@dataclass(frozen=True)
class Costs:
    """``parameters`` of the whole model and ``macs``, multiply-adds an image (those of convolutions and matrix
    products); of these the routers' own are ``router_parameters`` and ``router_macs``.
    """

    parameters: int
    router_parameters: int
    macs: int
    router_macs: int


class _First(Tape):
    """Every router chooses its first k experts. The index has values even where tensors have none (the meta device):
    who groups a batch by expert reads them.
    """

    def __call__(self, name: str, fresh: Routing) -> Routing:
        super().__call__(name, fresh)
        device = "cpu" if fresh.index.is_meta else fresh.index.device
        index = torch.arange(fresh.k, device=device).expand(fresh.index.shape)
        return Routing(fresh.logits, index, fresh.weight)


class _Products(TorchFunctionMode):
    """Leaves out BatchNorms and ReLUs, which are no products: on the meta device they are most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in _LEFT_OUT else func(*args, **(kwargs or {}))


_LEFT_OUT = (torch.batch_norm, F.batch_norm, torch.relu, F.relu)


class _Body(nn.Module):
    """The model as a module that takes the tape, so that torch's counter sees the names inside."""

    def __init__(self, model: RoutedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        return self.model.ask(x, tape)


def costs(model: str | ModelSpec | RoutedModel, num_classes: int = 10, image_shape: ImageShape = (3, 32, 32)) -> Costs:
    """Returns what a model costs on images of ``image_shape`` (ch, h, w).

    Every router sends the image to its first k experts, and what then runs is counted: for experts of equal size that
    is the cost of any route, and it does not grow with their number. A spec is built and counted without values (on
    torch's meta device); a model is run on one black image in eval mode, where it is (``num_classes`` is then its
    own). A router is what stands at its name in the trace; one that is no module costs nothing. Raises UserError for a
    spec that does not build.
    """
    if isinstance(model, RoutedModel):
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with evaluating(model):
            return _counted(model, torch.zeros(1, *image_shape, device=device))
    spec: ModelSpec = specs.build(model, "model") if isinstance(model, str) else model
    half = (0.5,) * image_shape[0]
    with torch.device("meta"):
        built = spec.build(num_classes, image_shape, Normalise(half, half)).eval()
    return _counted(built, torch.zeros(1, *image_shape, device="meta"))


@torch.no_grad()
def _counted(model: RoutedModel, x: Tensor) -> Costs:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    tape = _First()
    counts = {compat.grouped_product(): _grouped_flops}
    fewer = _Products() if x.is_meta else contextlib.nullcontext()
    with sdpa_kernel(SDPBackend.MATH), fewer, FlopCounterMode(display=False, custom_mapping=counts) as counter:
        _Body(model)(x, tape)
    flops: dict[str, Any] = {name: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}
    routers = tuple(f"{name}." for name in tape.trace)
    return Costs(
        sum(sizes.values()),
        sum(size for name, size in sizes.items() if name.startswith(routers)),
        counter.get_total_flops() // 2,
        sum(flops.get(f"_Body.model.{name}", 0) for name in tape.trace) // 2,
    )


def _grouped_flops(items: Any, weights: Any, *_: Any, **__: Any) -> int:
    """Counts torch's grouped product of (m, d) and (e, d, h), which its counter does not know (nor the CPU's fused
    attention: the plain one is run here).
    """
    return 2 * items[0] * items[1] * weights[2]


# ------------------------------------------------------------------------------------------------ the table

SMALL = ("resnet18", "resnet34", "resnet50", "wrn_28_10", "vgg16", "densenet40")
LARGE = (*(name if name == "vgg16" else f"{name}(stem=imagenet)" for name in SMALL), "densenet121")

TABLE = {32: (10, SMALL), 64: (200, SMALL), 128: (200, SMALL), 224: (1000, LARGE)}
"""Pixels along a side; the classes of the data set meant, CIFAR-10, Tiny-ImageNet (as it is, and enlarged to 128 as in
AdvMoE's code) or ImageNet; and the architectures in their form for it.
"""

ROUTER_PIXELS = {224: (224, 64)}
"""What the router sees where that is not the image as it is: here there are two rows."""


@dataclass(frozen=True)
class ArchitectureCosts:
    """One architecture at one image size: ``dense``, ``slim`` (every width halved), and the ``pathway`` model of two
    experts at ratio 0.5, whose ResNet-20 router sees ``router_pixels`` along a side.
    """

    architecture: str
    image_shape: ImageShape
    num_classes: int
    router_pixels: int
    dense: Costs
    slim: Costs
    pathway: Costs

    @property
    def slim_percent(self) -> float:
        """The slim network's multiply-adds, per cent of the dense one's."""
        return 100 * self.slim.macs / self.dense.macs

    @property
    def pathway_percent(self) -> float:
        """The same of the pathway model, its router counted."""
        return 100 * self.pathway.macs / self.dense.macs


def rows() -> list[ArchitectureCosts]:
    """Returns the costs of every architecture at every image size; some ten seconds on one thread."""
    entries = []
    for size, (classes, names) in TABLE.items():
        shape = (3, size, size)
        for name in names:
            dense, slim = costs(name, classes, shape), costs(f"slim({name}, ratio=0.5)", classes, shape)
            for pixels in ROUTER_PIXELS.get(size, (size,)):
                router = "resnet20" if pixels == size else f"downsampled(resnet20, size={pixels})"
                pathway = costs(f"pathway({name}, experts=2, ratio=0.5, router={router})", classes, shape)
                entries.append(ArchitectureCosts(name, shape, classes, pixels, dense, slim, pathway))
    return entries


COLUMNS = ("dense", "slim", "pathway", "router")
WHERE = ["architecture", "pixels", "classes"]
NOTE = """slim: every width halved. pathway: experts=2, ratio=0.5, without its router;
its GMAC is one pathway's, for any number of experts. router: resnet20, at so
many pixels (at 64 of 224: downsampled(resnet20, size=64)). GMAC: 10^9
multiply-adds of convolutions and linear layers."""


def table(entries: list[ArchitectureCosts]) -> str:
    """Returns the rows as lines of text, in three tables."""
    parameters = [[*WHERE, *COLUMNS], *map(_parameters, entries)]
    macs = [[*WHERE[:2], *COLUMNS, "at"], *map(_macs, entries)]
    shares = [[*WHERE[:2], "at", "slim", "pathway + router"], *map(_shares, entries)]
    titled = {"million parameters": parameters, "GMAC an image": macs, "% of dense GMAC": shares}
    return "\n\n".join(["\n".join([title, *_lines(cells)]) for title, cells in titled.items()] + [NOTE])


def _lines(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]


def _parameters(row: ArchitectureCosts) -> list[str]:
    own = row.pathway.parameters - row.pathway.router_parameters
    millions = [n / 1e6 for n in (row.dense.parameters, row.slim.parameters, own, row.pathway.router_parameters)]
    return [row.architecture, str(row.image_shape[2]), str(row.num_classes), *(f"{n:.3f}" for n in millions)]


def _macs(row: ArchitectureCosts) -> list[str]:
    own = row.pathway.macs - row.pathway.router_macs
    gmacs = [n / 1e9 for n in (row.dense.macs, row.slim.macs, own, row.pathway.router_macs)]
    return [row.architecture, str(row.image_shape[2]), *(f"{n:.4f}" for n in gmacs), str(row.router_pixels)]


def _shares(row: ArchitectureCosts) -> list[str]:
    percents = [f"{row.slim_percent:.0f}", f"{row.pathway_percent:.0f}"]
    return [row.architecture, str(row.image_shape[2]), str(row.router_pixels), *percents]
