"""The operations that bounds go through, each with its value, its interval rule, and its linear rule.

Interval rule: from lower and upper bounds of the inputs to bounds of the output (Gowal et al. 2018, IBP). Linear rule:
a lower bound A . output >= A' . input + b, which is an equality for affine operations and a relaxation of the others
(Zhang et al. 2018, CROWN). Coefficients A are (s, n, ...): s rows for each of n images. The
affine ones are here, the others in `robustmoe.certification.nonlinear`; `robustmoe.certification.functions` says which
torch function is which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from robustmoe.certification.windows import Coefficients, Sliding, Windows, dot


class Unbounded(Exception):
    """No rule for a function, or for the way it is called; the message names it."""


class Slot(NamedTuple):
    """Stands for a value that depends on the image, among the arguments of a function."""

    shape: torch.Size

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Round(NamedTuple):
    """centre + scale * d with ||d||_2 <= eps an image: what an l2 ball is before any coordinates are added up."""

    centre: Tensor
    scale: Tensor
    eps: Tensor


class Jointly(ABC):
    """Values (n, ..., e) of which more is known, row by row, than the interval of each: the weights of a gate.
    ``shares``: none is below 0.
    """

    shares = False

    @abstractmethod
    def lowest(self, above: Tensor) -> Tensor:
        """(s, n, ...) the minimum of the sum over each row of ``above`` (s, n, ..., e) times these values."""


def by_image(rows: Tensor) -> Tensor:
    """(s, n): the sums over all rows of an image of (s, n, ...)."""
    return rows.flatten(2).sum(2) if rows.ndim > 2 else rows


@dataclass(frozen=True)
class Interval:
    """``lower`` <= value <= ``upper``, each (n, ...); ``round``: the l2 ball, while it is one; ``joint``: what is known
    of the values together.
    """

    lower: Tensor
    upper: Tensor
    round: Round | None = None
    joint: Jointly | None = None

    def meet(self, other: Interval) -> Interval:
        """What lies in both."""
        return Interval(
            torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper), self.round, self.joint
        )


class Pulled(NamedTuple):
    """Coefficients (s, n, ...) of each input, and what they leave over (s, n)."""

    coefficients: tuple[Tensor, ...]
    bias: Tensor | None


class PulledWindows(NamedTuple):
    """The same of windows; some may be whole maps now."""

    coefficients: tuple[Coefficients, ...]
    bias: Tensor | None


class Slopes(NamedTuple):
    """Bounds of derivatives, each (s, n, ...)."""

    lower: Tensor
    upper: Tensor


def times(slopes: Slopes, lower: Tensor, upper: Tensor) -> Slopes:
    """Bounds of the products of what lies within either pair."""
    corners = torch.stack([side * factor for side in slopes for factor in (lower, upper)])
    return Slopes(corners.amin(0), corners.amax(0))


class Operation(ABC):
    """A function of one or more tensors. Subclasses are frozen dataclasses. ``mains``: the inputs whose bounds matter
    most, where it is not affine. ``chooses``: whether it is a decision, which can change where it is `open`.
    """

    affine = True
    mains: tuple[int, ...] = (0,)
    chooses = False

    @abstractmethod
    def __call__(self, *inputs: Tensor) -> Tensor:
        """The value."""

    @abstractmethod
    def interval(self, *inputs: Interval) -> Interval:
        """Bounds of the value, from those of the inputs."""

    @abstractmethod
    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        """The linear rule for coefficients ``above`` (s, n, *output); ``inputs``: their bounds."""

    def pull_windows(self, above: Windows, inputs: Sequence[Interval]) -> PulledWindows:
        """The same for coefficients that are 0 but for windows; where they do not stay that, they become whole maps."""
        return PulledWindows(*self.pull(above.dense(), inputs))

    def open(self, x: Interval) -> Tensor:
        """Of an operation that is not affine: where closer bounds of its input would make a closer relaxation."""
        return (x.lower < 0) & (x.upper > 0)

    @abstractmethod
    def slopes(self, above: Slopes, inputs: Sequence[Interval]) -> tuple[Slopes, ...]:
        """The chain rule with bounds: from those of derivatives in the output to those in each input, anywhere within
        its bounds (Clarke's, where there is a corner).
        """


def _rows(function: Callable[[Tensor], Tensor], above: Tensor) -> Tensor:
    """``function`` on (s n, ...), for (s, n, ...)."""
    return function(above.flatten(0, 1)).unflatten(0, above.shape[:2])


class Affine(Operation):
    """A linear function plus a constant. ``by_number``: each number that comes out is a function of one that goes in,
    and no two of the same.
    """

    by_number = False

    def absolute(self) -> Operation:
        """The same with the sizes of its weights, without the constant."""
        return self

    def slopes(self, above: Slopes, inputs: Sequence[Interval]) -> tuple[Slopes, ...]:
        middles = self.pull(0.5 * (above.lower + above.upper), inputs).coefficients
        reaches = self.absolute().pull(0.5 * (above.upper - above.lower), inputs).coefficients
        return tuple(Slopes(middle - reach, middle + reach) for middle, reach in zip(middles, reaches, strict=True))


@dataclass(frozen=True, eq=False)
class Shaped(Affine):
    """The same numbers in another shape."""

    by_number = True

    function: Callable[[Tensor], Tensor]

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def interval(self, *inputs: Interval) -> Interval:
        (x,) = inputs
        ball = x.round and Round(self.function(x.round.centre), self.function(x.round.scale), x.round.eps)
        lower, upper = self.function(x.lower), self.function(x.upper)
        rows = x.joint is not None and lower.shape[-1] == x.lower.shape[-1]
        return Interval(lower, upper, ball, ShapedJointly(x.joint, x.lower.shape) if x.joint and rows else None)

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        return Pulled((above.reshape(above.shape[0], *inputs[0].lower.shape),), None)


@dataclass(frozen=True)
class ShapedJointly(Jointly):
    """The rows of values of ``shape`` (n, ..., e), otherwise arranged."""

    inner: Jointly
    shape: torch.Size

    @property
    def shares(self) -> bool:  # type: ignore[override]
        return self.inner.shares

    def lowest(self, above: Tensor) -> Tensor:
        return self.inner.lowest(above.reshape(len(above), *self.shape)).reshape(above.shape[:-1])


@dataclass(frozen=True, eq=False)
class Cast(Affine):
    """The same numbers in another precision. Rounding keeps order, so bounds stay bounds."""

    by_number = True

    function: Callable[[Tensor], Tensor]

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def interval(self, *inputs: Interval) -> Interval:
        return Interval(self.function(inputs[0].lower), self.function(inputs[0].upper))

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        return Pulled((above.to(inputs[0].lower),), None)

    def pull_windows(self, above: Windows, inputs: Sequence[Interval]) -> PulledWindows:
        return PulledWindows((above.of(above.values.to(inputs[0].lower)),), None)


@dataclass(frozen=True, eq=False)
class Weighing(Affine):
    """A linear function without negative weights, of one input or several: means, average pooling, padding by 0,
    slices, concatenation, other orders of the dimensions; and ``shift``, where there is one.
    """

    function: Callable[..., Tensor]
    shift: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        value = self.function(*inputs)
        return value if self.shift is None else value + self.shift

    def interval(self, *inputs: Interval) -> Interval:
        return Interval(self(*(x.lower for x in inputs)), self(*(x.upper for x in inputs)))

    def absolute(self) -> Operation:
        return Weighing(self.function)

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        with torch.enable_grad():
            at = [torch.zeros_like(x.lower).requires_grad_() for x in inputs]
            out = self.function(*at)
        coefficients = torch.autograd.grad(out, at, above, is_grads_batched=True, create_graph=above.requires_grad)
        return Pulled(coefficients, None if self.shift is None else dot(above, self.shift))


@dataclass(frozen=True, eq=False)
class Scaling(Affine):
    """scale * x + shift, number by number; both broadcast to (n, ...)."""

    by_number = True

    scale: Tensor
    shift: Tensor

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.scale * inputs[0] + self.shift

    def interval(self, *inputs: Interval) -> Interval:
        (x,) = inputs
        a, b = self.scale * x.lower + self.shift, self.scale * x.upper + self.shift
        ball = x.round and Round(self(x.round.centre), self.scale.abs() * x.round.scale, x.round.eps)
        return Interval(torch.minimum(a, b), torch.maximum(a, b), ball, x.joint and ScaledJointly(x.joint, self))

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        return Pulled((above * self.scale,), dot(above, self.shift))

    def pull_windows(self, above: Windows, inputs: Sequence[Interval]) -> PulledWindows:
        return PulledWindows((above.of(above.values * above.pick(self.scale)),), above.dot(self.shift))

    def absolute(self) -> Operation:
        return Scaling(self.scale.abs(), torch.zeros_like(self.shift))


@dataclass(frozen=True)
class ScaledJointly(Jointly):
    """Values times a scale plus a shift, number by number."""

    inner: Jointly
    scaling: Scaling

    def lowest(self, above: Tensor) -> Tensor:
        scale, shift = (each.to(above) for each in (self.scaling.scale, self.scaling.shift))
        return self.inner.lowest(above * scale) + (above * shift).sum(-1)


@dataclass(frozen=True, eq=False)
class Adding(Affine):
    """The first input plus ``sign`` times the second, of one shape."""

    sign: int

    def __call__(self, *inputs: Tensor) -> Tensor:
        return inputs[0] + self.sign * inputs[1]

    def interval(self, *inputs: Interval) -> Interval:
        x, y = inputs
        low, high = (y.lower, y.upper) if self.sign > 0 else (-y.upper, -y.lower)
        return Interval(x.lower + low, x.upper + high)

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        return Pulled((above, self.sign * above), None)

    def pull_windows(self, above: Windows, inputs: Sequence[Interval]) -> PulledWindows:
        return PulledWindows((above, above.of(self.sign * above.values)), None)

    def absolute(self) -> Operation:
        return Adding(1)


class _Weighted(Affine):
    """weight . x + bias. Subclasses say how to apply a weight to x, and its transpose to coefficients."""

    weight: Tensor
    bias: Tensor | None

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Without the bias."""

    @abstractmethod
    def transposed(self, above: Tensor, size: torch.Size) -> Tensor:
        """(m, *output) -> (m, *size)."""

    def outputs(self, x: Tensor) -> Tensor | None:
        """(s, n, ..., e) the weights of every output, for values x (n, ..., e); None where these are not row by row."""
        return None

    @abstractmethod
    def spread(self) -> Tensor:
        """The bias, to be added to outputs; 0 without."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.apply(inputs[0], self.weight) + self.spread()

    def interval(self, *inputs: Interval) -> Interval:
        (x,) = inputs
        middle = self(0.5 * (x.lower + x.upper))
        reach = self.apply(0.5 * (x.upper - x.lower), self.weight.abs())
        bounds = Interval(middle - reach, middle + reach)
        rows = None if x.joint is None else self.outputs(x.lower)
        if x.joint is not None and rows is not None:
            least, most = x.joint.lowest(rows).movedim(0, -1), -x.joint.lowest(-rows).movedim(0, -1)
            return bounds.meet(Interval(least + self.spread(), most + self.spread()))
        if x.round is None:
            return bounds
        middle, squares = self(x.round.centre), self.apply(x.round.scale.square(), self.weight.square())
        eps = x.round.eps.view(-1, *[1] * (middle.ndim - 1))
        reach = eps * squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
        return bounds.meet(Interval(middle - reach, middle + reach))

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        size = inputs[0].lower.shape[1:]
        below = _rows(lambda a: self.transposed(a, size), above)
        return Pulled((below,), None if self.bias is None else dot(above, self.spread()))


@dataclass(frozen=True, eq=False)
class MatrixProduct(_Weighted):
    """A linear layer on (n, ..., inputs)."""

    weight: Tensor
    bias: Tensor | None = None

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def transposed(self, above: Tensor, size: torch.Size) -> Tensor:
        return above @ self.weight

    def outputs(self, x: Tensor) -> Tensor | None:
        return self.weight.view(-1, *[1] * (x.ndim - 1), x.shape[-1]).expand(-1, *x.shape)

    def spread(self) -> Tensor:
        return self.weight.new_zeros(()) if self.bias is None else self.bias

    def absolute(self) -> Operation:
        return MatrixProduct(self.weight.abs())


@dataclass(frozen=True, eq=False)
class Convolution(_Weighted):
    """A convolution of two dimensions."""

    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any]

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, **self.options)

    def transposed(self, above: Tensor, size: torch.Size) -> Tensor:
        return conv2d_input((len(above), *size), self.weight, above, **self.options)

    @property
    def sliding(self) -> Sliding:
        return Sliding((self.weight.shape[2], self.weight.shape[3]), **self.options)

    def pull_windows(self, above: Windows, inputs: Sequence[Interval]) -> PulledWindows:
        height, width = inputs[0].lower.shape[2:]
        field = self.sliding.field(above.window)
        if field[0] * field[1] >= height * width:
            return super().pull_windows(above, inputs)
        below = above.before(self.sliding, self.weight, (height, width))
        return PulledWindows((below,), None if self.bias is None else above.dot(self.spread()))

    def spread(self) -> Tensor:
        return self.weight.new_zeros(()) if self.bias is None else self.bias.view(-1, 1, 1)

    def absolute(self) -> Operation:
        return Convolution(self.weight.abs(), None, self.options)
