"""Torch's own generators, the CPU's and each GPU's: where they are, and back there. Our own draws need none of them
(see `robustmoe.noise`); dropout, fresh weights and foreign models do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def _gpus() -> bool:
    """Whether there are GPUs with generators that may have been asked: where CUDA has not begun, none has."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Afterwards all generators are where they were."""
    before, gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all() if _gpus() else []
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


def begin_at(seed: int) -> None:
    """All generators begin at ``seed``. (``torch.manual_seed`` does the same, and imports torch's compiler.)"""
    torch.default_generator.manual_seed(seed)
    if _gpus():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the generators begin at ``seed``; afterwards all are where they were."""
    with kept():
        begin_at(seed)
        yield


def state_on(device: torch.device) -> Tensor | None:
    """Where the generator of a GPU is; None of another device, whose draws are the CPU's."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def go_on(device: torch.device, state: Tensor | None) -> None:
    """Puts the generator of a GPU back to where `state_on` found one of its kind."""
    if device.type == "cuda" and state is not None:
        torch.cuda.set_rng_state(state, device)
