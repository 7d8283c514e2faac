"""The operations of a network that are not affine: activations and max-pooling."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe.certification.operations import Interval, Operation, Pulled, PulledWindows, Slopes
from robustmoe.certification.windows import Windows, dot


class Elementwise(Operation):
    """A function of one variable, between two lines on every interval."""

    affine = False

    @abstractmethod
    def lines(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Slope and offset of a line below the function, then of one above it, on [lower, upper]; None: 0."""

    @abstractmethod
    def derivative(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the function's slope on [lower, upper]."""

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        low, low_offset, high, high_offset = self.lines(inputs[0].lower, inputs[0].upper)
        positive, negative = above.clamp(min=0), above.clamp(max=0)
        bias = dot(negative, high_offset)
        bias = bias if low_offset is None else bias + dot(positive, low_offset)
        return Pulled((torch.addcmul(positive * low, negative, high),), bias)

    def pull_windows(self, above: Windows, inputs: Sequence[Interval]) -> PulledWindows:
        low, low_offset, high, high_offset = self.lines(inputs[0].lower, inputs[0].upper)
        positive, negative = above.of(above.values.clamp(min=0)), above.of(above.values.clamp(max=0))
        bias = negative.dot(high_offset)
        bias = bias if low_offset is None else bias + positive.dot(low_offset)
        values = torch.addcmul(positive.values * above.pick(low), negative.values, above.pick(high))
        return PulledWindows((above.of(values),), bias)

    def slopes(self, above: Slopes, inputs: Sequence[Interval]) -> tuple[Slopes, ...]:
        least, most = self.derivative(inputs[0].lower, inputs[0].upper)
        corners = (above.lower * least, above.lower * most, above.upper * least, above.upper * most)
        return (
            Slopes(
                torch.minimum(torch.minimum(*corners[:2]), torch.minimum(*corners[2:])),
                torch.maximum(torch.maximum(*corners[:2]), torch.maximum(*corners[2:])),
            ),
        )


@dataclass(frozen=True, eq=False)
class Relu(Elementwise):
    """max(x, leak x), leak in [0, 1]. The line below is leak x or x, whichever leaves the smaller area (CROWN's
    adaptive choice).
    """

    leak: float = 0.0

    def __call__(self, *inputs: Tensor) -> Tensor:
        return F.leaky_relu(inputs[0], self.leak) if self.leak else F.relu(inputs[0])

    def interval(self, *inputs: Interval) -> Interval:
        return Interval(self(inputs[0].lower), self(inputs[0].upper))

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        low, high = lower.clamp(max=0), upper.clamp(min=0)
        share = high / (high - low).clamp(min=torch.finfo(low.dtype).tiny)  # 1 where active, 0 where not
        below = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, 0.0, (upper > -lower).to(low.dtype)))
        bent = 1 - self.leak
        return self.leak + bent * below, None, self.leak + bent * share, -bent * share * low

    def derivative(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        full = torch.ones_like(lower)
        return torch.where(lower >= 0, full, self.leak * full), torch.where(upper <= 0, self.leak * full, full)


@dataclass(frozen=True, eq=False)
class Smooth(Elementwise):
    """``function``, which is everywhere within ``error`` of the function ``near``, and its slope within
    ``slope_error`` of near's ``slope``.

    ``near`` bends at ``bends`` (ascending), and is concave before the first, convex after it (or, with ``rises``,
    convex before the first), and so on in turn. ``least``: where near's only minimum lies, between two numbers, and a
    number just below it; None: it increases everywhere.

    Lines: of a few slopes (the chord's, the tangents' at both ends and in the middle) the one that leaves the smallest
    area. Given a slope a, near(x) - a x is least at an end of the interval or at the one stationary point of a convex
    piece. That point is searched by bisection; what is used is the tangent there, which is below a convex function
    wherever the search ended.
    """

    function: Callable[[Tensor], Tensor]
    near: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    bends: tuple[float, ...]
    rises: bool
    least: tuple[float, float, float] | None = None
    error: float = 0.0
    slope_error: float = 0.0

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def interval(self, *inputs: Interval) -> Interval:
        lower, upper = inputs[0].lower, inputs[0].upper
        ends = self.near(lower), self.near(upper)
        low = torch.minimum(*ends)
        if self.least is not None:
            before, after, value = self.least
            low = torch.where((lower < after) & (upper > before), low.clamp(max=value), low)
        return Interval(low - self.error, torch.maximum(*ends) + self.error)

    def open(self, x: Interval) -> Tensor:
        return x.upper > x.lower

    def derivative(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        places = [lower, upper, *(torch.minimum(torch.maximum(lower.new_tensor(b), lower), upper) for b in self.bends)]
        slopes = torch.stack([self.slope(place) for place in places])
        return slopes.amin(0) - self.slope_error, slopes.amax(0) + self.slope_error

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        middle, width = 0.5 * (lower + upper), upper - lower
        tangent = self.slope(middle)
        room = torch.finfo(lower.dtype).eps ** 0.5
        chord = torch.where(width > room, (self.near(upper) - self.near(lower)) / width.clamp(min=room), tangent)
        slopes = torch.stack([chord, tangent, self.slope(lower), self.slope(upper)])
        lines = []
        for sign in (1.0, -1.0):
            offsets = sign * self._least(slopes, lower, upper, sign) - sign * self.error
            best = (sign * (slopes * middle + offsets)).argmax(0, keepdim=True)
            lines += [slopes.gather(0, best)[0], offsets.gather(0, best)[0]]
        return lines[0], lines[1], lines[2], lines[3]

    def _least(self, slopes: Tensor, lower: Tensor, upper: Tensor, sign: float) -> Tensor:
        """A lower bound on [lower, upper] of ``sign`` times (near(x) - slope x), for slopes (k, n, ...)."""

        def tilted(x: Tensor) -> Tensor:
            return sign * (self.near(x) - slopes * x)

        least = torch.minimum(tilted(lower), tilted(upper))
        edges = (-math.inf, *self.bends, math.inf)
        for place, (left, right) in enumerate(pairwise(edges)):
            if ((place % 2 == 0) == self.rises) != (sign > 0):
                continue
            start, stop = lower.clamp(left, right), upper.clamp(left, right)
            with torch.no_grad():
                a, b = start.expand_as(slopes), stop.expand_as(slopes)
                for _ in range(30):
                    point = 0.5 * (a + b)
                    beyond = sign * (self.slope(point) - slopes) > 0
                    a, b = torch.where(beyond, a, point), torch.where(beyond, point, b)
                point = 0.5 * (a + b)
                rate = sign * (self.slope(point) - slopes)  # 0, or the point is an end: no gradient is lost
            bound = tilted(point) + torch.minimum(rate * (start - point), rate * (stop - point))
            least = torch.where(start < stop, torch.minimum(least, bound), least)
        return least


def _bell(x: Tensor) -> Tensor:
    """The cumulative distribution of the standard normal."""
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def _gelu_slope(x: Tensor) -> Tensor:
    return _bell(x) + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def gelu(approximate: str) -> Smooth:
    """x Phi(x), whose second derivative is phi(x) (2 - x^2): convex between -sqrt 2 and sqrt 2. The "tanh" form is
    within 0.00048 of it, and its slope within 0.0012 (tests/test_bounds.py shows it).
    """
    tanh = approximate == "tanh"
    return Smooth(
        lambda x: F.gelu(x, approximate=approximate),
        F.gelu,
        _gelu_slope,
        (-math.sqrt(2), math.sqrt(2)),
        rises=False,
        least=(-0.7518, -0.7517, -0.1699713),
        error=5e-4 if tanh else 0.0,
        slope_error=2e-3 if tanh else 0.0,
    )


def _silu_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))


def silu() -> Smooth:
    """x sigmoid(x), whose second derivative is sigmoid(x) sigmoid(-x) (2 - x tanh(x / 2)): convex between -2.3994 and
    2.3994, the roots of x tanh(x / 2) = 2.
    """
    bend = 2.3993572805154675
    return Smooth(F.silu, F.silu, _silu_slope, (-bend, bend), rises=False, least=(-1.2785, -1.2784, -0.2784646))


def sigmoid() -> Smooth:
    return Smooth(
        torch.sigmoid, torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x), bends=(0.0,), rises=True
    )


def tanh() -> Smooth:
    return Smooth(torch.tanh, torch.tanh, lambda x: 1 - torch.tanh(x).square(), bends=(0.0,), rises=True)


@dataclass(frozen=True, eq=False)
class MaxPool(Operation):
    """Max-pooling over windows of ``kernel`` (height, width).

    Below: the input of the window whose lower bound is largest. Above: the same one where it is the largest everywhere
    in the bounds, else the largest upper bound.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil: bool

    affine = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        return F.max_pool2d(inputs[0], self.kernel, self.stride, self.padding, ceil_mode=self.ceil)

    def interval(self, *inputs: Interval) -> Interval:
        return Interval(self(inputs[0].lower), self(inputs[0].upper))

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        highs, best, alone = self._ranked(inputs[0])
        through = above.clamp(min=0) + torch.where(alone, above.clamp(max=0), 0.0)
        below = self._scatter(through, best, inputs[0].lower.shape)
        return Pulled((below,), dot(torch.where(alone, 0.0, above.clamp(max=0)), highs.amax(-1)))

    def slopes(self, above: Slopes, inputs: Sequence[Interval]) -> tuple[Slopes, ...]:
        """Of a window without a winner every input that could be it has between 0 and all of the slope."""
        highs, best, alone = self._ranked(inputs[0])
        size = inputs[0].lower.shape
        chosen = [self._scatter(torch.where(alone, each, 0.0), best, size) for each in above]
        least = self._windows(inputs[0].lower).amax(-1)
        low, high = (torch.where(alone, 0.0, each) for each in (above.lower.clamp(max=0), above.upper.clamp(min=0)))
        for place in range(highs.shape[-1]):
            here = torch.full_like(best, place)
            possible = highs[..., place] >= least
            chosen[0] = chosen[0] + self._scatter(torch.where(possible, low, 0.0), here, size)
            chosen[1] = chosen[1] + self._scatter(torch.where(possible, high, 0.0), here, size)
        return (Slopes(*chosen),)

    def _windows(self, x: Tensor) -> Tensor:
        """(n, c, height, width, window) the inputs of every window; -inf, or -1 of integers, outside of the image."""
        shape = self(torch.empty(x.shape, device="meta")).shape[2:]
        last = [
            (out - 1) * stride + kernel - size - padding
            for out, stride, kernel, size, padding in zip(shape, self.stride, self.kernel, x.shape[2:], self.padding)
        ]
        padded = F.pad(
            x, (self.padding[1], last[1], self.padding[0], last[0]), value=-math.inf if x.is_floating_point() else -1
        )
        return padded.unfold(2, self.kernel[0], self.stride[0]).unfold(3, self.kernel[1], self.stride[1]).flatten(4)

    def _ranked(self, x: Interval) -> tuple[Tensor, Tensor, Tensor]:
        """Upper bounds by window; the place in each window of the largest lower bound; whether it is the maximum
        everywhere.
        """
        lows = self._windows(x.lower.clamp(min=torch.finfo(x.lower.dtype).min))
        highs = self._windows(x.upper)
        best = lows.argmax(-1, keepdim=True)
        rivals = highs.scatter(-1, best, -math.inf).amax(-1)
        return highs, best[..., 0], lows.gather(-1, best)[..., 0] >= rivals

    def _scatter(self, values: Tensor, place: Tensor, size: torch.Size) -> Tensor:
        """Values (s, n, c, height, width) of windows, at the ``place`` in each, summed up by input (s, *size); those
        outside of the image are dropped.
        """
        pixels = size[2] * size[3]
        numbers = torch.arange(pixels, device=values.device).view(1, 1, *size[2:])
        windows = self._windows(numbers).expand(*place.shape, -1)
        index = windows.gather(-1, place[..., None])[..., 0].flatten(2)
        index = torch.where(index < 0, pixels, index).expand(len(values), -1, -1, -1)
        sums = values.new_zeros(len(values), *size[:2], pixels + 1).scatter_add(-1, index, values.flatten(3))
        return sums[..., :-1].unflatten(-1, size[2:])
