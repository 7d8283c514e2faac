"""Parts of a user's own, ``my_file.py:name`` in the place of a name.

A file is run as a module of its own, once for each content that it has. What it defines is called as any name of ours
is, and what the call gives is checked. Every mistake is a one-line `UserError`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from robustmoe.errors import UserError, nearest

FORM = "my_file.py:name"


@dataclass(frozen=True)
class OwnPart:
    """What a name of a user's own stands for. ``name``: as it is written; ``file``: where it is defined, None for a
    package's.
    """

    name: str
    thing: Any
    file: Path | None = None

    @property
    def is_called(self) -> bool:
        """Whether the bare name is a call without arguments: so a function and a class, while an object is itself."""
        return inspect.isroutine(self.thing) or isinstance(self.thing, type | functools.partial)

    def signature(self) -> inspect.Signature:
        """Returns the arguments that it takes; any where Python does not know."""
        try:
            return inspect.signature(self.thing, eval_str=True)
        except (NameError, AttributeError, SyntaxError):  # annotations that cannot be evaluated here
            return inspect.signature(self.thing)
        except (ValueError, TypeError):
            anything = inspect.Parameter
            kinds = (("args", anything.VAR_POSITIONAL), ("kwargs", anything.VAR_KEYWORD))
            return inspect.Signature([anything(name, kind) for name, kind in kinds])

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the call gives. UserError where it raises: the error's message, and the line of the file."""
        with importable(self.file):
            try:
                return self.thing(*args, **kwargs)
            except (Exception, SystemExit) as error:  # whatever it is, it is the user's own
                raise UserError(f"{self.name} fails: {said(error)}{line(error, self.file)}") from error


class Written:
    """An object that knows the text it is written as. (A base class for what is built later than it is named.)"""

    text: str


# ------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class _Loaded:
    """A file that was run: the path as a user wrote it first, the SHA-256 of what was run, and the module."""

    written: str
    sha256: str
    module: ModuleType


_files: dict[Path, _Loaded] = {}


def is_own(name: str) -> bool:
    """Whether ``name`` is of the form `FORM`."""
    return ":" in name


def part_of(name: str) -> OwnPart:
    """What ``my_file.py:name`` stands for. The path is relative to the working folder, and running the file runs
    whatever is in it.
    """
    path, _, attribute = name.rpartition(":")
    file = _file(path)
    module = _module(path, file).module
    if not hasattr(module, attribute):
        raise UserError(f"{path} has no {attribute!r}; {nearest(attribute, _names(module))}")
    return OwnPart(name, getattr(module, attribute), file)


def sha256_of(path: str) -> str:
    """The SHA-256 of a file of parts: of what was run in this process, or of the file if it was not run yet."""
    file = _file(path)
    loaded = _files.get(file.resolve())
    return hashlib.sha256(_read(path, file)).hexdigest() if loaded is None else loaded.sha256


def class_name(kind: type) -> str | None:
    """``my_file.py:Name`` of a class that stands in such a file; None for any other."""
    for loaded in _files.values():
        if loaded.module.__name__ == kind.__module__ and getattr(loaded.module, kind.__name__, None) is kind:
            return f"{loaded.written}:{kind.__name__}"
    return None


def blamed(error: BaseException) -> str | None:
    """An error that passed through a file of parts, in one line; None where it passed through none."""
    for file, loaded in _files.items():
        if place := line(error, file):
            return f"{loaded.written} fails: {said(error)}{place}"
    return None


def _file(path: str) -> Path:
    file = Path(os.path.expanduser(path))  # which leaves a user who is not there as it is written
    if file.is_dir():
        raise UserError(f"{path!r} is a folder; expected a Python file, such as {FORM}")
    if not file.is_file():
        near = [str(other) for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        hint = f"; {nearest(str(file), near)}" if near else "; a path is relative to the working folder"
        raise UserError(f"there is no file {path!r}{hint}")
    return file


def _read(path: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error


def _module(path: str, file: Path) -> _Loaded:
    """The file's module: run anew where its content is not what was run before. It is in `sys.modules` (dataclasses and
    pickle look there), unless it fails.
    """
    content = _read(path, file)
    sha256 = hashlib.sha256(content).hexdigest()
    loaded = _files.get(file.resolve())
    if loaded is not None and loaded.sha256 == sha256:
        return loaded
    name = f"robustmoe_own_{file.stem}_{hashlib.sha256(bytes(file.resolve()) + content).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with importable(file):
        try:
            exec(compile(content, str(file), "exec"), module.__dict__)
        except (Exception, SystemExit) as error:  # whatever it is, it is the user's own; its traceback stays chained
            del sys.modules[name]
            if isinstance(error, SyntaxError):
                where = f"{error.filename or path}, line {error.lineno}"
                raise UserError(f"{where}: {error.msg}: {(error.text or '').strip()!r}") from error
            raise UserError(f"{path} fails when it is run: {said(error)}{line(error, file)}") from error
    _files[file.resolve()] = _Loaded(path if loaded is None else loaded.written, sha256, module)
    return _files[file.resolve()]


@contextlib.contextmanager
def importable(file: Path | None) -> Iterator[None]:
    """The file's folder first on the import path, inside."""
    if file is None:
        yield
        return
    place = str(file.parent.resolve())
    sys.path.insert(0, place)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's file may have changed the path itself
            sys.path.remove(place)


def said(error: BaseException) -> str:
    """The error's type and the first line of its message; of a `UserError` the message alone."""
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, UserError):
        return first
    return f"{type(error).__name__}: {first:.200}" if first else type(error).__name__


def line(error: BaseException, file: Path | None) -> str:
    """The last line of ``file`` that the error passed through, as " (file.py, line 7)"; "" where it did not."""
    place = ""
    trace = error.__traceback__ if file is not None else None
    while trace is not None and file is not None:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == file.resolve():
            place = f" ({file.name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place


def called(thing: Any) -> str:
    """What a call gave, in words."""
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
