"""Any callable from images to logits as a `RoutedModel`, and the routed model that such a callable hides in itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe import compat
from robustmoe.models.base import RoutedModel, carrying
from robustmoe.models.parts import Leaf, Part
from robustmoe.models.token_layers import TokenLayer
from robustmoe.routing import Tape

_HOLDERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
"""Classes that call their ``module``, and change neither its images nor its outputs."""


class Plain(RoutedModel):
    """Any callable x -> logits as a `RoutedModel`.

    The routers of every `RoutedModel` that runs inside ``function``, on the same number of images, are told, and can be
    forced: a preprocessing, an average of two models or a wrapper of any kind hides none of them. Without one the trace
    is empty. ``eager``: what torch.compile made runs as it was written, since compiled code does not tell its routes.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], eager: bool = False) -> None:
        super().__init__()
        self.function = function
        self.eager = eager

    @property
    def foreign(self) -> bool:
        return True

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Any:
        """Returns what the function gives, whatever that is: `ask` makes logits of it."""
        slow = torch.compiler.set_stance("force_eager") if self.eager else contextlib.nullcontext()
        with slow, carrying(tape, len(x)):
            return self.function(x)

    def layers(self) -> dict[str, TokenLayer]:
        """Returns those of the one `RoutedModel` inside; {} where there is none, or several."""
        inside = _inside(self.function)
        return inside[0].layers() if len(inside) == 1 else {}

    def parts(self) -> Part:
        return Leaf(self.function)


def as_routed(model: Callable[[Tensor], Tensor]) -> RoutedModel:
    """Returns the model itself where it is a `RoutedModel`, and the one inside where a wrapper gives the same outputs
    (DataParallel, DistributedDataParallel, torch.compile, an averaged model, a Sequential of one, and these around each
    other). Any other callable x -> logits becomes a `Plain`.

    A compiled model is measured as it was written, to which it is equal up to rounding.
    """
    bare = unwrapped(model)
    if isinstance(bare, RoutedModel) and (not _sharded(bare) or "run" in vars(bare)):  # FSDP was told of `run`
        return bare
    inside = _inside(model)
    return Plain(bare if inside else model, eager=bool(inside) and any(map(compat.compiled, _modules(model))))


def unwrapped(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What is left of a model without the wrappers that do not change its outputs."""
    while isinstance(model, nn.Module) and not compat.has_hooks(model):
        inner: nn.Module | Tensor | None = compat.compiled(model)
        if type(model) in _HOLDERS:
            inner = model.module
        elif type(model) is nn.Sequential and len(model) == 1:
            inner = model[0]
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _modules(model: object) -> list[nn.Module]:
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _inside(model: object) -> list[RoutedModel]:
    """The `RoutedModel`s in a module, each as a whole: none that is a part of another."""
    inside: list[RoutedModel] = []
    for module in _modules(model):
        if isinstance(module, RoutedModel) and not any(module in outer.modules() for outer in inside):
            inside.append(module)
    return inside


def sharded(model: object) -> bool:
    """Whether a module's weights, or those of a part of it, are spread over processes (FSDP)."""
    return any(map(_sharded, _modules(model)))


def _sharded(model: nn.Module) -> bool:
    """Whether a module gathers its weights from the processes when it is called, and no sooner."""
    return any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(model).__mro__)
