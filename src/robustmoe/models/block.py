"""MoE layers inside a CNN ("Robust Experts", ICCV workshops 2025, arXiv 2509.05086): residual blocks (`BlockMoE`) or
single convolutions (`ConvMoE`) of late stages become experts of full width, with a router on the feature map they get.
"""

from __future__ import annotations

import contextlib
import copy
import math
from abc import abstractmethod
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from robustmoe.errors import UserError
from robustmoe.models.backbone import Backbone, initialise
from robustmoe.models.base import ImageShape, ModelSpec, NetworkModel, RoutedModel
from robustmoe.models.convolution import Conv
from robustmoe.models.layer_routers import LayerRouter, layer_router, shared_out
from robustmoe.models.mixing import mix_sparse
from robustmoe.models.norm import Normalise, at_least_float32
from robustmoe.noise import Noise
from robustmoe.routing import Gate, Routing, Tape, choose, straight_through


class _Pass(NamedTuple):
    """What the routed layers of a network need in one pass: the tape, how many images, who was called already."""

    tape: Tape
    images: int
    called: set[str]


_PASS: ContextVar[_Pass | None] = ContextVar("robustmoe_pass", default=None)


@contextlib.contextmanager
def handing_down(tape: Tape, images: int) -> Iterator[None]:
    """Inside, every `RoutedLayer` of this thread hands its decisions to ``tape``.

    A network's own forward takes no tape, so the tape travels in a context variable, for the length of one
    `RoutedModel.body`: each thread has its own, the inner of two nested ones counts, and no module keeps anything.
    """
    token = _PASS.set(_Pass(tape, images, set()))
    try:
        yield
    finally:
        _PASS.reset(token)


def check_experts(experts: int, k: int) -> None:
    if not 1 <= k <= experts:
        raise ValueError(f"k must be between 1 and the number of experts, {experts}; got {k}")


class RoutedLayer(nn.Module):
    """Experts in the place of one layer of a network: a feature map (n, d, h, w) goes to the k experts that the router
    picks for it, and to no others.

    ``name``: the layer's path in the `RoutedModel`, under which its router is in the trace. Raises UserError outside
    of that model's pass (activation checkpointing calls a layer again there), in a second call in one pass, and for
    a batch that is not the pass's images. ``noise`` and ``capacity``: see `BlockMoE`.
    """

    def __init__(
        self,
        name: str,
        router: nn.Module,
        experts: list[nn.Module],
        k: int,
        gate: Gate | None,
        noise: float = 0.0,
        capacity: float | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.router = router
        self.experts = nn.ModuleList(experts)
        self.k = k
        self.gate = gate
        self.noise = noise
        self.capacity = capacity

    def forward(self, x: Float[Tensor, "n d h w"], segments: None = None) -> Tensor:
        """``segments``: there for backbones whose blocks take it; nothing else is routed in this model."""
        now = _PASS.get()
        if now is None:
            raise UserError(
                f"the routed layer {self.name!r} was called outside of its model; call the model, model(x) or "
                "model.run(x), and not its network"
            )
        if self.name in now.called:
            raise UserError(f"the routed layer {self.name!r} is called twice in one pass; expected once an image")
        if x.shape[0] != now.images:
            raise UserError(
                f"the routed layer {self.name!r} got {x.shape[0]} items in a pass of {now.images} images; expected one "
                "feature map an image"
            )
        now.called.add(self.name)
        router = f"{self.name}.router"
        logits = at_least_float32(self.router(x))[:, None]
        routing = now.tape(router, self._decide(logits, now.tape.draws(router)))
        return mix_sparse(list(self.experts), x, routing.index[:, 0], routing.weight[:, 0], routing.sizes)

    def _decide(self, logits: Float[Tensor, "n 1 e"], draws: Noise | None) -> Routing:
        """Decides by default as the paper: at k = 1 straight through the softmax, above it the chosen, renormalised."""
        noisy = self.noise > 0 and draws is not None
        if noisy or (self.training and self.capacity is not None):
            return self._weighted(logits, self._shared_out(logits[:, 0].detach(), draws if noisy else None))
        if self.gate is None and self.k == 1:
            return straight_through(logits, surrogate="softmax")
        return choose(logits, self.gate or "renormalised", self.k)

    def _shared_out(self, logits: Float[Tensor, "n e"], draws: Noise | None) -> Int[Tensor, "n k"]:
        """The experts of a training batch: of probabilities over their deviation in the batch, with noise."""
        p = torch.softmax(logits, 1)
        scores = p / p.std().clamp(min=torch.finfo(p.dtype).tiny) if p.numel() > 1 else p
        if draws is not None:
            scores = scores + self.noise * draws.normal(p.shape[1]).to(p)
        index = shared_out(scores, self.k, self.capacity if self.training else None)
        return index.gather(1, p.gather(1, index).argsort(dim=1, descending=True, stable=True))

    def _weighted(self, logits: Float[Tensor, "n 1 e"], index: Int[Tensor, "n k"]) -> Routing:
        """The decision for experts that were chosen otherwise than by the logits alone."""
        index = index[:, None]
        share = torch.softmax(logits, -1).gather(-1, index)
        if self.gate is None and self.k == 1:
            share = share - share.detach() + 1
        elif self.gate != "vmoe":
            share = torch.softmax(logits.gather(-1, index), -1)
        return Routing(logits, index, share)


def replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """``new`` wherever ``old`` stands in ``network``."""
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, new)


class LayeredModel(NetworkModel):
    """A backbone's network with `RoutedLayer`s in it: one decision an image and layer."""

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        with handing_down(tape, x.shape[0]):
            return self.answer(x)


@dataclass(frozen=True)
class LayerMoE(ModelSpec):
    """What `BlockMoE` and `ConvMoE` share: which stages, and the routers."""

    backbone: Backbone
    stages: tuple[int, ...] = (4,)
    experts: int = 4
    k: int = 1
    router: LayerRouter = "conv_gap"
    gate: Gate | None = None
    standardise: bool = False
    noise: float = 0.0
    capacity: float | None = None

    def __post_init__(self) -> None:
        check_experts(self.experts, self.k)
        if not (0 <= self.noise < math.inf):
            raise ValueError(f"noise must be a number from 0 on; got {self.noise}")
        if self.capacity is not None and not (0 < self.capacity < math.inf):
            raise ValueError(f"capacity must be above 0; got {self.capacity}")
        if (self.noise or self.capacity is not None) and self.gate not in (None, "renormalised", "vmoe"):
            raise ValueError(f"noise and capacity go with no gate, renormalised or vmoe; got gate {self.gate!r}")
        if not self.stages:
            raise ValueError("stages names no stage; expected some, such as (4,)")

    @abstractmethod
    def places(self, stage: nn.Module) -> list[str]:
        """Returns the paths, inside a stage, of the layers that become experts."""

    def build(self, num_classes: int, image_shape: ImageShape, normalise: Normalise) -> RoutedModel:
        network = self.backbone.make(num_classes, image_shape)
        for number in sorted(set(self.stages)):
            if not 1 <= number <= len(network.stages):
                raise ValueError(f"stages must be between 1 and {len(network.stages)} here; got {number}")
            stage = network.stages[number - 1]
            for path in self.places(stage):
                layer = stage.get_submodule(path)
                replace(network, layer, self._experts(f"network.stages.{number - 1}.{path}", layer))
        return LayeredModel(network, normalise)

    def _experts(self, name: str, layer: nn.Module) -> RoutedLayer:
        """Copies of the layer, the filters of each drawn anew."""
        experts = [copy.deepcopy(layer) for _ in range(self.experts)]
        for expert in experts:
            initialise(expert)
        first = next(module for module in layer.modules() if isinstance(module, nn.Conv2d))
        router = layer_router(first.in_channels, self.experts, self.router, self.standardise)
        return RoutedLayer(name, router, experts, self.k, self.gate, self.noise, self.capacity)


@dataclass(frozen=True)
class BlockMoE(LayerMoE):
    """Residual blocks of late stages as experts, BatchNorms included: in each of ``stages`` (1 is the first) "all"
    blocks, the "first" or the "last" one (arXiv 2509.05086, BlockMoE and its "residual" variant, the last). Of a
    backbone without residual blocks, what its stages consist of. ``blocks``: "all", "first" or "last".

    Every expert has the block's full width: with ``k`` = 1 a pass costs the dense network and the routers, and the
    parameters grow. ``router``: see `LayerRouter`. ``gate``: how the chosen are weighted, as in `Ensemble`; the default
    is the paper's (at k = 1 weight 1, with the straight-through gradient of the softmax; above it the softmax over the
    chosen). ``standardise``: router logits have mean 0 and variance 1 over the training batches (not the paper's).

    ``noise`` and ``capacity`` are the released code's training with another loss than "entropy" (there 0.1, and none
    for CIFAR, 1.5 for ImageNet): experts are chosen by probabilities over their deviation in the batch plus noise of
    that deviation, and no expert gets more than ceil(capacity k n / e) of a process's n images; the others go on to
    their next best (see `shared_out`). Gates and logits stay those without noise. In eval mode neither has an effect.
    Filters are drawn by He's fan-out, not the paper's fan-in.
    """

    blocks: Literal["all", "first", "last"] = "all"

    def places(self, stage: nn.Module) -> list[str]:
        blocks = [name for name, block in stage.named_children() if any(True for _ in block.parameters())]
        return {"all": blocks, "first": blocks[:1], "last": blocks[-1:]}[self.blocks]


@dataclass(frozen=True)
class ConvMoE(LayerMoE):
    """Single convolutions of late stages as experts; BatchNorms stay shared (arXiv 2509.05086, ConvMoE).

    ``convs``: in each of ``stages`` "all" convolutions or the "last" one. ``shortcuts``: the 1x1 convolutions of the
    shortcuts too; the released code's filter catches these (True gives its model). The rest: see `BlockMoE`.
    """

    convs: Literal["all", "last"] = "all"
    shortcuts: bool = False

    def places(self, stage: nn.Module) -> list[str]:
        main = [path for path, module in stage.named_modules() if isinstance(module, Conv)]
        side = [path for path in main if "shortcut" in path.split(".")]
        main = [path for path in main if path not in side]
        return (main if self.convs == "all" else main[-1:]) + (side if self.shortcuts else [])
