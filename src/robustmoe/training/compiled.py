"""`torch.compile` as a switch: the networks inside a model are compiled where steps of a training call them, and
nowhere else.

Routers, experts and whole networks are compiled each by itself, so that decisions, dispatch and trace stay what they
are. A step gives what it gives without, up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from robustmoe import distributed
from robustmoe.errors import UserError, first_line
from robustmoe.recipe import Recipe

BACKEND = "inductor"


def check(recipe: Recipe, in_python: bool) -> None:
    """UserError where a recipe's ``compile`` goes not with the rest. ``in_python``: the model was given in Python."""
    if not recipe.compile:
        return
    if in_python:
        raise UserError("compile=True compiles a model where it is, and this one is yours; expected one that is named")
    if recipe.sharding != "none" or distributed.world() > 1:
        raise UserError("compile=True was never tried with several processes; expected one process, or compile=False")


def prepare(model: nn.Module, device: torch.device) -> None:
    """Has the model's networks compiled when they are first called inside `at_work`. UserError where torch cannot
    compile on this device.
    """
    try:
        with at_work(True):
            torch.compile(lambda x: x.sin() + 1, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, of Triton, or of torch: what is missing is said in many ways
        raise UserError(f"compile: torch cannot compile for {device.type} here: {first_line(error)}") from error
    for network in _networks(model):
        network.compile(backend=BACKEND)


def _networks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parameters that are called: those in a list one by one."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from _networks(child)
        elif next(child.parameters(), None) is not None:
            yield child


def held(asked: bool) -> contextlib.AbstractContextManager[object]:
    """Returns a context in which what is to be compiled runs as it is written, but for what `at_work` says. Where
    nobody ``asked`` for compiling it does nothing (and torch's compiler, whose import is slow, is left alone).
    """
    return torch.compiler.set_stance("force_eager") if asked else contextlib.nullcontext()


def at_work(asked: bool) -> contextlib.AbstractContextManager[object]:
    """Returns a context in which the networks run compiled, where somebody ``asked`` for that."""
    return torch.compiler.set_stance("default") if asked else contextlib.nullcontext()
