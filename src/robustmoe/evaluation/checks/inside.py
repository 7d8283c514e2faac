"""A model as the checks look into it: its function, and the modules that it runs, by the names that its owner knows."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robustmoe.models.base import RoutedModel
from robustmoe.models.plain import Plain
from robustmoe.routing import Routing
from robustmoe.wrapping import WrappedModel


class Inside(nn.Module):
    """``function``, with the modules that it runs as its parts, so that hooks can tell which of them runs.

    Paths are those in the model that the caller gave: of a module its own, of a lambda the names of the variables that
    it reads; "" is the function itself.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.function_itself = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function_itself(x)

    @classmethod
    def of(cls, model: RoutedModel, forced: Mapping[str, Routing] | None = None) -> Inside:
        """The model's logits, on its own routes or on ``forced`` ones (of as many images as it is asked about)."""
        inner = innermost(model)
        parts = dict(inner.named_children()) if isinstance(inner, nn.Module) else modules_read_by(inner)
        return cls(lambda x: model.run(x, forced=forced).logits, parts)


def innermost(model: RoutedModel) -> Any:
    """What the caller gave: of a function or of a wrapped model that itself."""
    inner: Any = model
    while isinstance(inner, Plain | WrappedModel):
        inner = inner.function if isinstance(inner, Plain) else inner.model
    return inner


def modules_read_by(function: Any, depth: int = 2) -> dict[str, nn.Module]:
    """The modules that a function, a bound method, a partial or a callable object has at hand, by their names there."""
    parts: dict[str, nn.Module] = {}
    for name, value in _read_by(function).items():
        for key, item in _items(name, value):
            if isinstance(item, nn.Module):
                parts.setdefault(key, item)
            elif depth and callable(item) and not isinstance(item, type) and not inspect.isbuiltin(item):
                parts = {**modules_read_by(item, depth - 1), **parts}
    return {name.replace(".", "_") or "module": part for name, part in parts.items()}


def _read_by(function: Any) -> dict[str, Any]:
    if isinstance(function, functools.partial):
        return {
            **{f"argument {i}": value for i, value in enumerate(function.args)},
            **function.keywords,
            "func": function.func,
        }
    if inspect.ismethod(function):
        return {**_read_by(function.__func__), **_fields(function.__self__)}
    if inspect.isfunction(function):
        read = inspect.getclosurevars(function)
        return {**read.globals, **read.nonlocals, **(function.__kwdefaults__ or {}), **_defaults(function)}
    return _fields(function)


def _fields(value: Any) -> dict[str, Any]:
    return {"self": value} if isinstance(value, nn.Module) else dict(getattr(value, "__dict__", {}))


def _defaults(function: Any) -> dict[str, Any]:
    values = function.__defaults__ or ()
    return dict(zip(list(inspect.signature(function).parameters)[-len(values) :], values)) if values else {}


def _items(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple):
        yield from ((f"{name}_{i}", item) for i, item in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"{name}_{key}", item) for key, item in value.items())
    else:
        yield name, value


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Inside, what torch.compile made runs as it was written, so that it can be looked into. (Where its machinery was
    never imported, which takes seconds, nothing was compiled.)
    """
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def built_in(model: RoutedModel) -> bool:
    """Whether every part of the model is a class of this package or of torch.nn: it declares its routers, and its
    gradients were tested.
    """
    return not isinstance(model, Plain) and all(
        type(module).__module__.partition(".")[0] == "robustmoe" or type(module).__module__.startswith("torch.nn.")
        for module in model.modules()
    )


def called(path: str, module: str) -> str:
    """A module, as a sentence names it."""
    return f"module {path!r} ({module})" if path else "the model's own code"
