"""A model that draws random numbers in eval mode, held still: each of its draws is the same for every image, in every
pass and batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from robustmoe import generators
from robustmoe.wrapping.watching import drawing, tensors_of

_replaying: ContextVar[Replayed | None] = ContextVar("robustmoe_replaying", default=None)


def drawn() -> int:
    """How many random calls the pass of this moment has replayed; 0 where none is replayed."""
    mode = _replaying.get()
    return 0 if mode is None else mode.number


@contextlib.contextmanager
def rewound(number: int) -> Iterator[None]:
    """Inside, replayed random calls are counted on from ``number``: what ran then runs again with the same draws."""
    mode = _replaying.get()
    now = drawn()
    try:
        if mode is not None:
            mode.number = number
        yield
    finally:
        if mode is not None:
            mode.number = now


class Replayed(TorchFunctionMode):
    """Inside, the n-th random call of a pass gives what ``draw`` and n say, and the same for each of the ``images``;
    the generators outside are not moved.

    What is drawn has the images along its first dimension (or several rows an image, together); else it is drawn whole.
    """

    def __init__(self, images: int, draw: int) -> None:
        super().__init__()
        self.images, self.draw = images, draw
        self.number = 0
        self._tokens: list[Token[Replayed | None]] = []

    def __enter__(self) -> Replayed:
        self._tokens.append(_replaying.set(self))
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        _replaying.reset(self._tokens.pop())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not drawing(name, args, kwargs):
            return func(*args, **kwargs)
        self.number += 1
        given = next(tensors_of((args, kwargs)), None)
        with generators.kept():
            if given is not None and given.ndim and self.images and len(given) % self.images == 0:
                return self._by_image(func, name, given, args, kwargs)
            return self._whole(func, args, kwargs)

    def _seed(self) -> None:
        generators.begin_at(1_000_003 * self.draw + self.number)

    def _by_image(self, func: Any, name: str, given: Tensor, args: Any, kwargs: Any) -> Any:
        """Image by image, from the same place of the generator."""
        parts = []
        for part in given.split(len(given) // self.images):
            self._seed()
            mine = tuple(part if value is given else value for value in args)
            parts.append(func(*mine, **{key: part if value is given else value for key, value in kwargs.items()}))
        if name.endswith("_"):  # in place: the parts are views of it
            return given
        return torch.cat(parts)

    def _whole(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Drawn by its shape: for the first image, and again for each."""
        self._seed()
        shape = next((value for value in args if isinstance(value, tuple | list)), args)
        sizes = [size for size in shape if isinstance(size, int)]
        result = func(*args, **kwargs)
        if not (isinstance(result, Tensor) and sizes and result.ndim and tuple(result.shape) == tuple(sizes)):
            return result
        if self.images and len(result) % self.images == 0:
            rows = len(result) // self.images
            return result[:rows].repeat(self.images, *(1 for _ in sizes[1:]))
        return result
