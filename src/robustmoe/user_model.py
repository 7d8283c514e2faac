"""A user's own model, named as ``my_file.py:make_model``: imported by path, called, and checked. Every mistake is a
one-line `UserError`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from robustmoe.errors import UserError, nearest

FORM = "my_file.py:make_model"


def load(text: str) -> Callable[[Tensor], Tensor]:
    """The model that ``text``, "FILE.py:NAME", names: NAME() where it is a function or a class, NAME itself where it is
    an nn.Module. In eval mode, if it has modes.

    The file is run as a module of its own (relative to the working folder), with its folder on the import path
    meanwhile; running it runs whatever is in it. What the model gives is checked when it is evaluated.
    """
    file, name = _halves(text)
    with _importable(file.parent):
        module = _module(file)
        if not hasattr(module, name):
            raise UserError(f"{file} has no {name!r}; {nearest(name, _names(module))}")
        made: Any = getattr(module, name)
        if not isinstance(made, nn.Module):
            made = _made(made, file, name)
    if isinstance(made, type) or not callable(made):
        raise UserError(
            f"{name}() in {file} gives {_called(made)}; expected a model: a callable from images (n, ch, h, w) in "
            "[0, 1] to logits (n, classes), such as an nn.Module"
        )
    return made.eval() if isinstance(made, nn.Module) else made


def _halves(text: str) -> tuple[Path, str]:
    path, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier() or not path:
        raise UserError(f"a model of your own is written FILE.py:NAME, such as {FORM}; got {text!r}")
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"{path!r} is a folder; expected a Python file, such as {FORM}")
    if not file.is_file():
        near = [str(path) for path in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise UserError(f"there is no file {path!r}" + (f"; {nearest(str(file), near)}" if near else ""))
    if file.suffix != ".py":
        raise UserError(f"{path!r} is not a Python file; expected one, such as {FORM}")
    return file, name


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """``folder`` first on the import path, inside."""
    place = str(folder.resolve())
    sys.path.insert(0, place)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's file may have changed the path itself
            sys.path.remove(place)


def _module(file: Path) -> ModuleType:
    """The file, run anew. It is in `sys.modules` (dataclasses and pickle look there), unless it fails."""
    name = f"robustmoe_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever it is, it is the user's own; its traceback stays chained
        del sys.modules[name]
        if isinstance(error, SyntaxError):
            where = f"{error.filename or file}, line {error.lineno}"
            raise UserError(f"{where}: {error.msg}: {(error.text or '').strip()!r}") from error
        raise UserError(f"{file} fails when it is run: {_said(error)}{_line(error, file)}") from error
    return module


def _made(make: Any, file: Path, name: str) -> Any:
    if not callable(make):
        raise UserError(
            f"{name} in {file} is of type {type(make).__name__}; expected an nn.Module, or a function without "
            "arguments that makes one"
        )
    try:
        return make()
    except (Exception, SystemExit) as error:
        raise UserError(f"{name}() in {file} fails: {_said(error)}{_line(error, file)}") from error


def _said(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first:.200}" if first else type(error).__name__


def _line(error: BaseException, file: Path) -> str:
    """The last line of ``file`` that the error passed through, as " (file.py, line 7)"; "" where it did not."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == file.resolve():
            place = f" ({file.name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place


def _called(thing: Any) -> str:
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    return "nothing (it has no return)" if thing is None else f"a value of type {type(thing).__name__}"


def _names(module: ModuleType) -> list[str]:
    """What the file itself defines, public names only."""
    return [
        name
        for name, value in vars(module).items()
        if name[0] != "_"
        and not isinstance(value, ModuleType)
        and getattr(value, "__module__", module.__name__) == module.__name__
    ]
