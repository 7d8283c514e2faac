"""One pass of a model whose code is not of this package: its images stay what they are, its logits are (n, c), and what
goes wrong is one line that names it.

Many models write into their images (a normalisation in place), or end in ``squeeze()``; they are measured as if they
did not. What cannot be measured is refused, in any pass and not only in the first.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from robustmoe import compat
from robustmoe import spec as specs
from robustmoe.errors import UserError, out_of_memory
from robustmoe.progress import note

EXPECTED = "expected a function from images (n, ch, h, w) in float32 to one tensor of logits (n, classes)"


@dataclass
class Manners:
    """How a model treats its images. ``writes``: it changes them, so it gets copies; ``seen``: the modes (training
    or not) in which it was compared with a copy.
    """

    writes: bool = False
    seen: set[bool] = field(default_factory=set)


_MANNERS: WeakKeyDictionary[nn.Module, Manners] = WeakKeyDictionary()
"""Of every model that was asked; nothing of ours stands on a user's own module."""


def foreign_pass(model: Any, x: Tensor, tape: Any) -> Tensor:
    """The logits (n, c) that the ``body`` of ``model``, a `RoutedModel`, gives for the images x, which are not changed.
    UserError where it fails, or gives something else.
    """
    if torch.compiler.is_compiling():
        logits: Tensor = model.body(x, tape)
        return logits
    with blaming(model, x):
        output = left_alone(model, x, lambda images: model.body(images, tape))
    return _logits(output, x)


def left_alone(model: nn.Module, x: Tensor, call: Callable[[Tensor], Any]) -> Any:
    """What ``call``, a pass of the model, gives for x, or for a copy of it where the model writes into its images.

    The first pass in each mode has a copy that is compared with x; later ones cost nothing.
    """
    manners = _MANNERS.setdefault(model, Manners())
    if manners.writes or x.is_inference() or compat.in_function_transform() or x.is_meta:
        return call(x.clone())
    at = x if model.training in manners.seen else x.clone()
    before = compat.times_written(at)
    output = call(at)
    if at is not x:
        manners.writes |= compat.times_written(at) != before or not torch.equal(at.detach(), x.detach())
        manners.seen.add(model.training)
    elif compat.times_written(at) != before:
        raise UserError(
            "the model has written into its images, which it did not in the first pass; expected one that leaves them "
            "alone: let it work on x.clone()"
        )
    return output


def _logits(output: Any, x: Tensor) -> Tensor:
    """The output as logits (n, c) on the images' device: those of one image may be (c,). Else UserError."""
    if not isinstance(output, Tensor):
        raise UserError(f"the model gives {_described(output)}; {EXPECTED}{_how_to_pick(output)}")
    if output.layout != torch.strided:
        raise UserError(f"the model gives a sparse tensor; {EXPECTED}: lambda x: model(x).to_dense()")
    if not output.is_floating_point():
        raise UserError(f"the model gives a tensor of {output.dtype}; {EXPECTED}, in floating point")
    if output.ndim == 1 and len(x) == 1 and len(output) > 1:
        output = output[None]
    if output.ndim != 2 or len(output) != len(x):
        raise UserError(
            f"the model gives a tensor of shape {tuple(output.shape)} for images {tuple(x.shape)}; {EXPECTED}"
        )
    return output if output.device == x.device else output.to(x.device)


def check_classes(logits: Tensor, highest: int) -> None:
    """UserError unless the logits (n, c) have a column for each label up to ``highest``, and two at least."""
    classes = logits.shape[1]
    if classes < 2:
        raise UserError(
            f"the model gives logits of shape {tuple(logits.shape)}; expected a column for each class, two at least: "
            "of a model with a single score, torch.cat([-score, score], 1) / 2"
        )
    if highest >= classes:
        raise UserError(
            f"label {highest} is out of range: the model has {classes} classes; expected labels 0 to {classes - 1}"
        )


@dataclass
class FirstLook:
    """What a model's passes have to have, where nobody has looked at it before: an output for each label up to
    ``highest``, and, if ``gradient``, a gradient; a note says where it has none.
    """

    model: nn.Module
    highest: int
    gradient: bool

    def see(self, x: Tensor, logits: Tensor) -> None:
        """Is told of every pass of the model."""
        check_classes(logits, self.highest)
        if self.gradient and x.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            self.gradient = False
            note(
                "the model's logits have no gradient (no_grad, detach, numpy?): an attack that climbs stays where it "
                "starts; square(...) needs none"
            )


_AWAITED: ContextVar[FirstLook | None] = ContextVar("awaited", default=None)


@contextlib.contextmanager
def awaited(model: nn.Module, highest: int, gradient: bool) -> Iterator[None]:
    """Inside, the passes of the model are looked at (see `FirstLook`)."""
    token = _AWAITED.set(FirstLook(model, highest, gradient))
    try:
        yield
    finally:
        _AWAITED.reset(token)


def first_look(model: nn.Module) -> FirstLook | None:
    """What looks at the passes of this very model; None where nothing does."""
    look = _AWAITED.get()
    return look if look is not None and look.model is model else None


def _described(output: Any) -> str:
    if output is None:
        return "nothing (it has no return)"
    if isinstance(output, list | tuple):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


def _how_to_pick(output: Any) -> str:
    """What a user can write to get the logits."""
    if isinstance(output, dict) and output:
        return f"; pick them: lambda x: model(x)[{'logits' if 'logits' in output else next(iter(output))!r}]"
    if hasattr(output, "logits"):
        return "; pick them: lambda x: model(x).logits"
    return "; pick them: lambda x: model(x)[0]" if isinstance(output, list | tuple) and output else ""


# ------------------------------------------------------------------------------------------------ what goes wrong


@contextlib.contextmanager
def blaming(model: nn.Module, x: Tensor, whoever: bool = False) -> Iterator[None]:
    """Inside, an error of the model's own code (or of torch, called by it) becomes a UserError, with the error chained.
    One that this package raised itself stays as it is, unless ``whoever`` raised it does not matter.
    """
    try:
        yield
    except Exception as error:  # whatever it is, it comes from the user's own model
        if isinstance(error, UserError) or (ours(error) and not whoever):
            raise
        raise UserError(
            out_of_memory(error)
            or f"the model fails on images {tuple(x.shape)} ({specs.said(error)}); {EXPECTED}{_hint(model, x)}"
        ) from error


@contextlib.contextmanager
def blaming_backward(model: nn.Module) -> Iterator[None]:
    """Inside, an error of a backward pass through a model whose code is not of this package becomes a UserError."""
    try:
        yield
    except Exception as error:
        if ours(error) or not _in_backward(error) or not runs_foreign(model):
            raise
        raise UserError(
            out_of_memory(error)
            or f"no gradient can be taken through the model ({specs.said(error)}); expected one that torch can "
            "differentiate: look for in-place changes, gradients that are freed, or a backward pass of its own"
        ) from error


def hearable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model that hooks can be put on, by their paths: all but the scripted ones."""
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield path, module


def is_foreign(module: nn.Module) -> bool:
    """Whether a module's class is neither of this package nor of torch."""
    return type(module).__module__.partition(".")[0] not in ("robustmoe", "torch")


def runs_foreign(model: nn.Module) -> bool:
    """Whether any code that is not of this package or torch runs in a model: of a module, or of a function inside."""
    return any(is_foreign(module) or getattr(module, "foreign", False) for module in model.modules())


def to_eval(model: nn.Module) -> None:
    """Puts a module in eval mode. UserError where its own code, or a module that holds itself, does not let it."""
    try:
        model.eval()
    except Exception as error:  # whatever it is, it is the user's own
        raise UserError(
            f"the model cannot be put in eval mode ({specs.said(error)}); expected an nn.Module whose eval() works"
        ) from error


def require_weights(model: nn.Module) -> None:
    """UserError for weights that no measurement can use: made in inference mode, or without numbers (lazy, meta)."""
    for name, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
        if nn.parameter.is_lazy(weight):
            raise UserError(
                f"the model's weight {name!r} has no shape yet (a lazy module); run the model once on images, or load "
                "its weights, before it is measured"
            )
        if weight.is_inference():
            raise UserError(
                "the model's weights were made inside torch.inference_mode(), so that no gradient passes them; make "
                "(or load, or move) the model outside of it"
            )
        if weight.is_meta:
            raise UserError(
                f"the model's weight {name!r} is on the meta device and holds no numbers; make it on a real device "
                "(model.to_empty(device='cpu')), and load the weights"
            )


def _modules_passed(error: BaseException) -> list[str]:
    """The names of the modules whose code the error passed through, the place where it was raised last."""
    names, trace = [], error.__traceback__
    while trace is not None:
        names.append(str(trace.tb_frame.f_globals.get("__name__", "")))
        trace = trace.tb_next
    return names


def ours(error: BaseException, *callers: str) -> bool:
    """Whether the error was raised by this package: a wrong input that it has noticed, or a bug of its own. Not where
    the model is called (here, in `robustmoe.models.plain` and in ``callers``), since nothing else can be wrong there.
    """
    last = _modules_passed(error)[-1]
    return last.partition(".")[0] == "robustmoe" and last not in (__name__, "robustmoe.models.plain", *callers)


def _in_backward(error: BaseException) -> bool:
    return any(name.startswith("torch.autograd") for name in _modules_passed(error))


def _hint(model: nn.Module, x: Tensor) -> str:
    """What probably is wrong: weights of another dtype or device than the images."""
    weights = list(itertools.chain(model.parameters(), model.buffers()))
    kinds = {weight.dtype for weight in weights if weight.is_floating_point()}
    places = {str(weight.device) for weight in weights}
    if not kinds:
        return ""
    if x.dtype not in kinds:
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        kind = next(iter(kinds))
        return f". Its weights are {names}: give model.float(), or lambda x: model(x.to({kind}))"
    if str(x.device) not in places or len(places) > 1:
        return f". Its weights are on {' and '.join(sorted(places))}, the images on {x.device}"
    return ""
