"""Random numbers that belong to an image, not to a process: a counter-based generator over (key, image, position).

Every random draw of this project (attack starts, augmentation, data order) comes from here, so a result does not
depend on batch size, order, number of processes or resume: the draw for image 17 in epoch 3 is the same wherever it
is made. The mixer is splitmix64 (Steele, Lea and Flood, OOPSLA 2014), written with wrapping int64 arithmetic: equal
bits on CPU and CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


_AT_ONCE = 2**17
"""Numbers that a CPU draws at a time: what is worked on stays in its cache."""


def _shift_(z: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's is arithmetic), in place."""
    return z.bitwise_right_shift_(bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix_(z: Tensor) -> Tensor:
    """splitmix64's output function, in place."""
    z += _GOLDEN
    shifted = torch.empty_like(z)
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        z ^= _shift_(shifted.copy_(z), bits)
        z *= factor
    z ^= _shift_(shifted.copy_(z), 31)
    return z


def _mix(z: Tensor) -> Tensor:
    return _mix_(z.clone())


@dataclass(frozen=True)
class Noise:
    """A stream of random numbers for each of n images.

    ``state`` (n,) int64 holds one stream an image. `fold` derives an independent stream; `uniform` and `normal` draw.
    Drawing twice from the same `Noise` gives the same numbers: fold first.
    """

    state: Int[Tensor, " n"]

    @classmethod
    def of(cls, index: Int[Tensor, " n"], *key: int) -> Noise:
        """Streams of the images ``index`` (n,), any stable integers, under ``key`` (seed, epoch, ...)."""
        return cls(_mix(_mix(index.to(torch.int64)))).fold(*key)  # twice: (image, key) must not equal (key, image)

    def fold(self, *key: int | Int[Tensor, " n"]) -> Noise:
        """Derives streams from these by each integer of ``key`` in turn; a tensor has one integer a stream."""
        state = self.state
        for part in key:
            key_part = part.to(state) if isinstance(part, Tensor) else state.new_full((), part)  # sent by no copy
            state = _mix(state ^ _mix(key_part))
        return Noise(state)

    def __getitem__(self, select: Tensor | slice) -> Noise:
        return Noise(self.state[select])

    def __len__(self) -> int:
        return self.state.shape[0]

    def bits(self, *shape: int) -> Int[Tensor, "n ..."]:
        """64 random bits for each of (n, *shape) places."""
        places = _mix_(torch.arange(math.prod(shape), dtype=torch.int64, device=self.state.device))
        return _mix_(~self.state[:, None] ^ places[None]).reshape(len(self), *shape)  # ~: no fold is a draw

    def uniform(self, *shape: int) -> Float[Tensor, "n ..."]:
        """Uniform in [0, 1), float32, (n, *shape): the top 24 of 64 bits, so every value is exact."""
        return self._drawn(lambda some: _shift_(some.bits(*shape), 40).to(torch.float32).mul_(2.0**-24), shape)

    def normal(self, *shape: int) -> Float[Tensor, "n ..."]:
        """Standard normal, float32, (n, *shape), by Box and Muller from two independent uniforms."""

        def draw(some: Noise) -> Tensor:
            radius = some.fold(1).uniform(*shape).neg_().log1p_().mul_(-2.0).sqrt_()
            return radius.mul_(some.fold(2).uniform(*shape).mul_(2.0 * math.pi).cos_())

        return self._drawn(draw, shape)

    def _drawn(self, draw: Callable[[Noise], Tensor], shape: tuple[int, ...]) -> Tensor:
        """What ``draw`` gives for all streams, a few images at a time."""
        images = max(1, _AT_ONCE // max(1, math.prod(shape)))
        if len(self) <= images or self.state.device.type != "cpu":
            return draw(self)
        return torch.cat([draw(Noise(state)) for state in self.state.split(images)])


def permutation(n: int, *key: int) -> Int[Tensor, " n"]:
    """Returns a random order of 0..n-1 that depends on ``key`` alone (the data order of an epoch, a held-out split)."""
    return torch.argsort(Noise.of(torch.arange(n), *key).state, stable=True)
