"""An attack is not believed where a loss or a gradient is not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from robustmoe import asking
from robustmoe.errors import UserError


class NotFiniteError(UserError):
    """An attack met a loss or gradient that is not finite: the robust accuracy it gave would mean nothing."""


class _Met:
    """Whether all that an attack met was finite: kept on the device, which is asked once."""

    def __init__(self) -> None:
        self.flag: Tensor | None = None

    def note(self, flag: Tensor) -> None:
        self.flag = flag if self.flag is None else self.flag & flag

    def ask(self) -> None:
        flag, self.flag = self.flag, None
        if flag is not None and not bool(flag):
            raise _error()


_MET: ContextVar[_Met | None] = ContextVar("met", default=None)


def require_finite(*values: Tensor) -> None:
    """Raises `NotFiniteError` unless every number is finite; where asking waits for the device, not before the end of
    the attack (see `in_the_end`).
    """
    if asking.free(values[0]):
        if not all(_is_finite(value) for value in values):
            raise _error()
        return
    flag = torch.stack([torch.isfinite(value).all() for value in values]).all()
    met = _MET.get()
    if met is None:
        met = _Met()
        met.note(flag)
        met.ask()
    else:
        met.note(flag)


def _is_finite(values: Tensor) -> bool:
    """Returns whether all are, which their sum says by one operation; it may overflow where they do not."""
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


@contextlib.contextmanager
def in_the_end() -> Iterator[None]:
    """Inside, `require_finite` may wait until here: an attack that goes on with broken numbers does no harm, since what
    it gives is thrown away. An error that they lead to is told as what it is.
    """
    token = _MET.set(met := _Met())
    try:
        yield
    except Exception:
        met.ask()
        raise
    else:
        met.ask()
    finally:
        _MET.reset(token)


def _error() -> NotFiniteError:
    return NotFiniteError(
        "the attack's loss or gradient is not finite; the model's outputs are broken (NaN or infinite logits), and no "
        "robust accuracy can be measured"
    )
