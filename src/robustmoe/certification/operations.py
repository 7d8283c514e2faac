"""The operations that bounds go through, each with its value, its interval rule, and its linear rule.

Interval rule: from lower and upper bounds of the inputs to bounds of the output (Gowal et al. 2018, IBP). Linear rule:
a lower bound A . output >= A' . input + b, which is an equality for affine operations and a relaxation of the others
(Zhang et al. 2018, CROWN). Coefficients A are (s, n, ...): s rows for each of n images.
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


@dataclass(frozen=True)
class Interval:
    """``lower`` <= value <= ``upper``, each (n, ...); ``round``: the l2 ball, while it is one."""

    lower: Tensor
    upper: Tensor
    round: Round | None = None

    def meet(self, other: Interval) -> Interval:
        """What lies in both."""
        return Interval(torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper), self.round)


class Pulled(NamedTuple):
    """Coefficients (s, n, ...) of each input, and what they leave over (s, n)."""

    coefficients: tuple[Tensor, ...]
    bias: Tensor | None


class Operation(ABC):
    """A function of one or more tensors. Subclasses are frozen dataclasses."""

    affine = True

    @abstractmethod
    def __call__(self, *inputs: Tensor) -> Tensor:
        """The value."""

    @abstractmethod
    def interval(self, *inputs: Interval) -> Interval:
        """Bounds of the value, from those of the inputs."""

    @abstractmethod
    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        """The linear rule for coefficients ``above`` (s, n, *output); ``inputs``: their bounds."""


def _rows(function: Callable[[Tensor], Tensor], above: Tensor) -> Tensor:
    """``function`` on (s n, ...), for (s, n, ...)."""
    return function(above.flatten(0, 1)).unflatten(0, above.shape[:2])


def _dot(above: Tensor, value: Tensor) -> Tensor:
    """(s, n) the sums of the products of (s, n, ...) and what broadcasts to (n, ...)."""
    return (above * value).flatten(2).sum(2)


# ------------------------------------------------------------------------------------------------ affine


@dataclass(frozen=True, eq=False)
class Shaped(Operation):
    """The same numbers in another shape."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def interval(self, *inputs: Interval) -> Interval:
        (x,) = inputs
        ball = x.round and Round(self.function(x.round.centre), self.function(x.round.scale), x.round.eps)
        return Interval(self.function(x.lower), self.function(x.upper), ball)

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        return Pulled((above.reshape(above.shape[0], *inputs[0].lower.shape),), None)


@dataclass(frozen=True, eq=False)
class Weighing(Operation):
    """A linear function without negative weights and without a bias, of one input or several: means, average pooling,
    padding by 0, slices, concatenation.
    """

    function: Callable[..., Tensor]

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)

    def interval(self, *inputs: Interval) -> Interval:
        return Interval(self.function(*(x.lower for x in inputs)), self.function(*(x.upper for x in inputs)))

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        with torch.enable_grad():
            at = [torch.zeros_like(x.lower).requires_grad_() for x in inputs]
            out = self.function(*at)
        found = torch.autograd.grad(out, at, above, is_grads_batched=True, create_graph=above.requires_grad)
        return Pulled(found, None)


@dataclass(frozen=True, eq=False)
class Scaling(Operation):
    """scale * x + shift, number by number; both broadcast to (n, ...)."""

    scale: Tensor
    shift: Tensor

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.scale * inputs[0] + self.shift

    def interval(self, *inputs: Interval) -> Interval:
        (x,) = inputs
        a, b = self.scale * x.lower + self.shift, self.scale * x.upper + self.shift
        ball = x.round and Round(self(x.round.centre), self.scale.abs() * x.round.scale, x.round.eps)
        return Interval(torch.minimum(a, b), torch.maximum(a, b), ball)

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        return Pulled((above * self.scale,), _dot(above, self.shift))


@dataclass(frozen=True, eq=False)
class Adding(Operation):
    """The first input plus ``sign`` times the second, of one shape."""

    sign: int

    def __call__(self, *inputs: Tensor) -> Tensor:
        return inputs[0] + self.sign * inputs[1]

    def interval(self, *inputs: Interval) -> Interval:
        x, y = inputs
        low, high = (y.lower, y.upper) if self.sign > 0 else (-y.upper, -y.lower)
        return Interval(x.lower + low, x.upper + high)

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        if inputs[0].lower.shape != inputs[1].lower.shape:
            raise Unbounded("a sum of two shapes")
        return Pulled((above, self.sign * above), None)


class _Weighted(Operation):
    """weight . x + bias. Subclasses say how to apply a weight to x, and its transpose to coefficients."""

    weight: Tensor
    bias: Tensor | None

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Without the bias."""

    @abstractmethod
    def transposed(self, above: Tensor, size: torch.Size) -> Tensor:
        """(m, *output) -> (m, *size)."""

    @abstractmethod
    def spread(self, ndim: int) -> Tensor:
        """The bias, to be added to outputs of so many dimensions; 0 without."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        out = self.apply(inputs[0], self.weight)
        return out + self.spread(out.ndim)

    def interval(self, *inputs: Interval) -> Interval:
        (x,) = inputs
        middle = self(0.5 * (x.lower + x.upper))
        reach = self.apply(0.5 * (x.upper - x.lower), self.weight.abs())
        found = Interval(middle - reach, middle + reach)
        if x.round is None:
            return found
        middle, squares = self(x.round.centre), self.apply(x.round.scale.square(), self.weight.square())
        eps = x.round.eps.view(-1, *[1] * (middle.ndim - 1))
        reach = eps * squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
        return found.meet(Interval(middle - reach, middle + reach))

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        size = inputs[0].lower.shape[1:]
        below = _rows(lambda a: self.transposed(a, size), above)
        return Pulled((below,), None if self.bias is None else _dot(above, self.spread(above.ndim - 1)))


@dataclass(frozen=True, eq=False)
class Dense(_Weighted):
    """A linear layer on (n, ..., inputs)."""

    weight: Tensor
    bias: Tensor | None = None

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def transposed(self, above: Tensor, size: torch.Size) -> Tensor:
        return above @ self.weight

    def spread(self, ndim: int) -> Tensor:
        return self.weight.new_zeros(()) if self.bias is None else self.bias


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

    def spread(self, ndim: int) -> Tensor:
        return self.weight.new_zeros(()) if self.bias is None else self.bias.view(-1, 1, 1)


# ------------------------------------------------------------------------------------------------ not affine


class Elementwise(Operation):
    """A function of one variable, between two lines on every interval."""

    affine = False

    @abstractmethod
    def lines(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slope and offset of a line below the function, then of one above it, on [lower, upper]."""

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        low, low_offset, high, high_offset = self.lines(inputs[0].lower, inputs[0].upper)
        positive, negative = above.clamp(min=0), above.clamp(max=0)
        return Pulled((positive * low + negative * high,), _dot(positive, low_offset) + _dot(negative, high_offset))


@dataclass(frozen=True, eq=False)
class Relu(Elementwise):
    """max(x, 0). The line below is 0 or x, whichever leaves the smaller area (CROWN's adaptive choice)."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return F.relu(inputs[0])

    def interval(self, *inputs: Interval) -> Interval:
        return Interval(F.relu(inputs[0].lower), F.relu(inputs[0].upper))

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, high = lower.clamp(max=0), upper.clamp(min=0)
        chord = high / (high - low).clamp(min=torch.finfo(low.dtype).tiny)  # 1 where active, 0 where not
        below = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, 0.0, (upper > -lower).to(low.dtype)))
        return below, torch.zeros_like(low), chord, -chord * low


# ------------------------------------------------------------------------------------------------ the rules


def _fixed(*arguments: object) -> None:
    """Raises Unbounded where one of the arguments depends on the image."""
    for each in arguments:
        if isinstance(each, Slot) or (isinstance(each, list | tuple) and any(isinstance(one, Slot) for one in each)):
            raise Unbounded("a function whose parameters depend on the image")


def _shaped(function: Callable[..., Tensor]) -> Callable[..., Operation]:
    def rule(x: Slot, *args: Any, **kwargs: Any) -> Operation:
        _fixed(*args, *kwargs.values())
        return Shaped(lambda each: function(each, *args, **kwargs))

    return rule


def _weighing(function: Callable[..., Tensor]) -> Callable[..., Operation]:
    def rule(x: Slot, *args: Any, **kwargs: Any) -> Operation:
        _fixed(*args, *kwargs.values())
        return Weighing(lambda each: function(each, *args, **kwargs))

    return rule


def _cat(tensors: Sequence[Any], dim: int = 0) -> Operation:
    if not all(isinstance(each, Slot) for each in tensors):
        raise Unbounded("torch.cat of something that does not depend on the image")
    return Weighing(lambda *parts: torch.cat(parts, dim))


def _pad(x: Slot, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Operation:
    if mode != "constant" or value or min(pad) < 0:
        raise Unbounded(f"padding of mode {mode!r} by {value}")
    return Weighing(lambda each: F.pad(each, pad))


def _getitem(x: Slot, index: Any) -> Operation:
    _fixed(index)
    return Weighing(lambda each: each[index])


def _interpolate(x: Slot, *args: Any, **kwargs: Any) -> Operation:
    mode = args[2] if len(args) > 2 else kwargs.get("mode", "nearest")
    if mode not in ("nearest", "nearest-exact", "bilinear", "area"):
        raise Unbounded(f"interpolation of mode {mode!r}")
    return Weighing(lambda each: F.interpolate(each, *args, **kwargs))


def _linear(x: Slot, weight: Tensor, bias: Tensor | None = None) -> Operation:
    _fixed(weight, bias)
    return Dense(weight, bias)


def _conv2d(
    x: Slot,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Operation:
    _fixed(weight, bias)
    if isinstance(padding, str):
        raise Unbounded(f"a convolution with padding={padding!r}")
    return Convolution(weight, bias, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups})


def _batch_norm(
    x: Slot,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Operation:
    if training or running_mean is None or running_var is None:
        raise Unbounded("a BatchNorm in train mode")
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else bias + shift
    spread = (-1, *[1] * (x.ndim - 2))
    return Scaling(scale.view(spread), shift.view(spread))


def _add(x: Any, y: Any, *, alpha: float = 1) -> Operation:
    if alpha != 1:
        raise Unbounded("a sum with alpha")
    if isinstance(x, Slot) and isinstance(y, Slot):
        return _sum(x, y, 1)
    return Scaling(torch.ones(()), torch.as_tensor(y if isinstance(x, Slot) else x))


def _sub(x: Any, y: Any, *, alpha: float = 1) -> Operation:
    if alpha != 1:
        raise Unbounded("a difference with alpha")
    if isinstance(x, Slot) and isinstance(y, Slot):
        return _sum(x, y, -1)
    if isinstance(x, Slot):
        return Scaling(torch.ones(()), -torch.as_tensor(y))
    return Scaling(-torch.ones(()), torch.as_tensor(x))


def _sum(x: Slot, y: Slot, sign: int) -> Operation:
    if x.shape != y.shape:
        raise Unbounded(f"a sum of the shapes {tuple(x.shape)} and {tuple(y.shape)}")
    return Adding(sign)


def _mul(x: Any, y: Any) -> Operation:
    if isinstance(x, Slot) and isinstance(y, Slot):
        raise Unbounded("a product of two values that depend on the image")
    return Scaling(torch.as_tensor(y if isinstance(x, Slot) else x), torch.zeros(()))


def _div(x: Any, y: Any) -> Operation:
    if isinstance(y, Slot):
        raise Unbounded("a division by a value that depends on the image")
    return Scaling(1.0 / torch.as_tensor(y), torch.zeros(()))


def _relu(x: Slot, inplace: bool = False) -> Operation:
    if inplace:
        raise Unbounded("a ReLU in place")
    return Relu()


RULES: dict[Callable[..., Any], Callable[..., Operation]] = {
    Tensor.flatten: _shaped(Tensor.flatten),
    torch.flatten: _shaped(torch.flatten),
    Tensor.unflatten: _shaped(Tensor.unflatten),
    Tensor.reshape: _shaped(Tensor.reshape),
    Tensor.view: _shaped(Tensor.reshape),
    Tensor.contiguous: _shaped(Tensor.contiguous),
    Tensor.mean: _weighing(Tensor.mean),
    torch.mean: _weighing(torch.mean),
    torch.cat: _cat,
    Tensor.__getitem__: _getitem,
    F.pad: _pad,
    F.interpolate: _interpolate,
    F.avg_pool2d: _weighing(F.avg_pool2d),
    F.adaptive_avg_pool2d: _weighing(F.adaptive_avg_pool2d),
    F.linear: _linear,
    F.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    Tensor.add: _add,
    torch.add: _add,
    Tensor.sub: _sub,
    torch.sub: _sub,
    Tensor.mul: _mul,
    torch.mul: _mul,
    Tensor.div: _div,
    torch.div: _div,
    F.relu: _relu,
    Tensor.relu: _relu,
    torch.relu: _relu,
}
"""What a network may call, and the operation that it is."""
