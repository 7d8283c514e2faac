"""Which torch function is which operation: what a network may call, and how.

Every rule gets the arguments of a call, with a `Slot` in the place of what depends on the image, and gives the
operation or raises `Unbounded`. Whatever does not leave the images where they are, one a row, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe.certification.attention import Centring, FromLeft, MeanSquare, PairProduct, Unit
from robustmoe.certification.definitions import centred, mean_square, over_root
from robustmoe.certification.gates import CHOICES, BestChosen, Product, Softmax
from robustmoe.certification.nonlinear import MaxPool, Relu, gelu, sigmoid, silu, tanh
from robustmoe.certification.operations import (
    Adding,
    Cast,
    Convolution,
    MatrixProduct,
    Operation,
    Scaling,
    Shaped,
    Slot,
    Unbounded,
    Weighing,
)
from robustmoe.routing import Gating, chosen_weights

Rule = Callable[..., Operation | list[Operation]]


def _fixed(*arguments: object) -> None:
    """Raises Unbounded where one of the arguments depends on the image."""
    for each in arguments:
        members = each if isinstance(each, list | tuple) else [each]
        if any(isinstance(member, Slot) for member in members):
            raise Unbounded("a function whose parameters depend on the image")


def _by_image(operation: Shaped | Weighing, *inputs: Slot) -> Operation:
    """The operation, unless the first dimension of its result is no longer the images'."""
    shape = operation.function(*(torch.empty(each.shape, device="meta") for each in inputs)).shape
    if not shape or shape[0] != inputs[0].shape[0]:
        raise Unbounded(f"a function that makes {tuple(shape)} of images {tuple(inputs[0].shape)}")
    return operation


def _applied(kind: type[Shaped] | type[Weighing], function: Callable[..., Tensor]) -> Callable[..., Operation]:
    def rule(x: Slot, *args: Any, **kwargs: Any) -> Operation:
        _fixed(*args, *kwargs.values())
        if "out" in kwargs:
            raise Unbounded("a function with out=")
        return _by_image(kind(lambda each: function(each, *args, **kwargs)), x)

    return rule


def _view(x: Slot, *shape: Any) -> Operation:
    if any(isinstance(each, torch.dtype) for each in shape):
        raise Unbounded("a view of another dtype")
    return _applied(Shaped, Tensor.reshape)(x, *shape)


def _reduced(function: Callable[..., Tensor]) -> Rule:
    def rule(x: Slot, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Operation:
        dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
        if not dims or any(each % x.ndim == 0 for each in dims):
            raise Unbounded(f"a mean or sum over the dimensions {dim}, the images' among them")
        return Weighing(lambda each: function(each, dims, keepdim))

    return rule


def _transpose(x: Slot, first: int, second: int) -> Operation:
    return _permute(x, [_swapped(each, first % x.ndim, second % x.ndim) for each in range(x.ndim)])


def _swapped(place: int, first: int, second: int) -> int:
    return {first: second, second: first}.get(place, place)


def _permute(x: Slot, *dims: Any) -> Operation:
    order = tuple(dims[0]) if len(dims) == 1 else dims
    if order[0] % x.ndim != 0:
        raise Unbounded(f"an order of dimensions, {order}, in which the images' is not the first")
    return Weighing(lambda each: each.permute(order))


def _cat(tensors: Sequence[Any], dim: int = 0) -> Operation:
    if dim % tensors[0].ndim == 0:
        raise Unbounded("torch.cat along the images")
    if all(isinstance(each, Slot) for each in tensors):
        return Weighing(lambda *parts: torch.cat(parts, dim))

    def function(*parts: Tensor) -> Tensor:
        """Of the constants nothing."""
        some = iter(parts)
        return torch.cat([next(some) if isinstance(each, Slot) else torch.zeros_like(each) for each in tensors], dim)

    with torch.enable_grad():  # recording has none; certified training moves a class token
        fixed = [each.new_zeros(each.shape) for each in tensors if not isinstance(each, Slot)]
        zeros = [fixed[0].new_zeros(each.shape) if isinstance(each, Slot) else each for each in tensors]
        return Weighing(function, torch.cat(zeros, dim))


def _pieces(function: Callable[..., Sequence[Tensor]], place: int) -> Rule:
    """A function that gives several tensors, an operation for each; ``place``: of its argument dim, behind x."""

    def rule(x: Slot, *args: Any, **kwargs: Any) -> list[Operation]:
        _fixed(*args, *kwargs.values())
        if kwargs.get("dim", args[place] if len(args) > place else 0) % x.ndim == 0:
            raise Unbounded("images taken apart")
        count = len(function(torch.empty(x.shape, device="meta"), *args, **kwargs))
        return [_by_image(Weighing(lambda each, i=i: function(each, *args, **kwargs)[i]), x) for i in range(count)]

    return rule


def _pad(x: Slot, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Operation:
    if mode != "constant" or value or min(pad) < 0:
        raise Unbounded(f"padding of mode {mode!r} by {value}")
    return _by_image(Weighing(lambda each: F.pad(each, pad)), x)


def _getitem(x: Slot, index: Any) -> Operation:
    _fixed(index)
    parts = index if isinstance(index, tuple) else (index,)
    used = sum(each is not None and each is not Ellipsis for each in parts)
    whole = isinstance(parts[0], slice) and parts[0] == slice(None)
    if not whole and not (parts[0] is Ellipsis and used < x.ndim):
        raise Unbounded("an index of the images")
    chosen = [each for each in parts if isinstance(each, list | Tensor)]
    if len(chosen) > 1 or (chosen and any(isinstance(each, int) for each in parts)):
        raise Unbounded("several indices by numbers")  # torch may put them first
    return _by_image(Weighing(lambda each: each[index]), x)


def _index_copy(whole: Any, dim: int, index: Tensor, x: Any) -> Operation:
    """Into zeros, in place: only what was made for it. (By now it is done: the rest of ``whole`` must be zeros.)"""
    if not isinstance(x, Slot):
        raise Unbounded("index_copy_ into a value that depends on the image")
    _fixed(whole, index)
    if dim % x.ndim == 0 or bool(whole.index_fill(dim, index, 0.0).any()):
        raise Unbounded("index_copy_ into other things than zeros")
    size = whole.shape[dim]

    def function(each: Tensor) -> Tensor:
        shape = [size if place == dim % each.ndim else length for place, length in enumerate(each.shape)]
        return each.new_zeros(shape).index_copy(dim, index, each)

    return Weighing(function)


def _interpolate(x: Slot, *args: Any, **kwargs: Any) -> Operation:
    mode = args[2] if len(args) > 2 else kwargs.get("mode", "nearest")
    if mode not in ("nearest", "nearest-exact", "bilinear", "area"):
        raise Unbounded(f"interpolation of mode {mode!r}")
    return _by_image(Weighing(lambda each: F.interpolate(each, *args, **kwargs)), x)


def _cast(function: Callable[..., Tensor]) -> Rule:
    def rule(x: Slot, *args: Any, **kwargs: Any) -> Operation:
        _fixed(*args, *kwargs.values())
        dtype = function(torch.empty([0] * x.ndim), *args, **kwargs).dtype
        if dtype not in (torch.float32, torch.float64):
            raise Unbounded(f"a cast to {dtype}")
        return Cast(lambda each: function(each, *args, **kwargs))

    return rule


def _dropout(x: Slot, p: float = 0.5, training: bool = True, inplace: bool = False) -> Operation:
    if training and p > 0:
        raise Unbounded("a dropout in train mode")
    return Shaped(lambda each: each)


def _linear(x: Any, weight: Any, bias: Any = None) -> Operation:
    _fixed(weight, bias)
    if x.ndim < 2:
        raise Unbounded("a linear layer over the images")
    return MatrixProduct(weight, bias)


def _mm(x: Any, weight: Any) -> Operation:
    if isinstance(x, Slot) and isinstance(weight, Slot):
        return _pair_product(x, weight)
    if not isinstance(x, Slot):
        if x.ndim < 2 or weight.ndim < 3:
            raise Unbounded("a matrix product over the images")
        return FromLeft(x)
    if weight.ndim != 2:
        raise Unbounded("a product with other things than one matrix")
    with torch.enable_grad():  # recording has none; certified training moves the weight
        return _linear(x, weight.t())


def _pair_product(x: Slot, y: Slot) -> Operation:
    if x.ndim < 3 or x.ndim != y.ndim or x.shape[:-2] != y.shape[:-2]:
        raise Unbounded(f"a matrix product of the shapes {tuple(x.shape)} and {tuple(y.shape)}")
    return PairProduct()


def _softmax(x: Slot, dim: int | None = None, dtype: Any = None) -> Operation:
    if x.ndim < 2 or dim is None or dim % x.ndim != x.ndim - 1 or dtype is not None:
        raise Unbounded("a softmax over another dimension than the last")
    return Softmax()


def _chosen_weights(x: Slot, k: int, gating: Gating) -> Operation:
    if gating != "hard" and math.comb(x.shape[-1], k) > CHOICES:
        raise Unbounded(f"a gate that weights {k} of {x.shape[-1]} experts by softmax, too many choices to try")
    return BestChosen(k, gating)


def _addcmul(shift: Any, x: Any, scale: Any, *, value: float = 1) -> Operation:
    """shift + x scale, all of the image, or x alone."""
    if value == 1 and isinstance(x, Slot) and not isinstance(shift, Slot) and not isinstance(scale, Slot):
        return _scaling(x, scale, shift)
    if value != 1 or not all(isinstance(each, Slot) for each in (shift, x, scale)):
        raise Unbounded("addcmul of some values that depend on the image and some that do not")
    return _product(x.shape, shift, x, scale)


def _product(shape: tuple[int, ...], *inputs: Slot) -> Operation:
    if any(each.ndim != len(shape) for each in inputs):
        raise Unbounded("a product of values of different numbers of dimensions")
    if np.broadcast_shapes(*(each.shape for each in inputs)) != shape:
        raise Unbounded(f"a product of the shapes {[tuple(each.shape) for each in inputs]}")
    return Product(shape[1:])


def _conv2d(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Operation:
    _fixed(weight, bias)
    if isinstance(padding, str):
        raise Unbounded(f"a convolution with padding={padding!r}")
    if x.ndim != 4:
        raise Unbounded(f"a convolution of {x.ndim} dimensions")
    options = {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation), "groups": groups}
    return Convolution(weight, bias, options)


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
    with torch.enable_grad():  # recording has none; certified training moves weight and bias
        scale = torch.rsqrt(running_var + eps)
        scale = scale if weight is None else scale * weight
        shift = -running_mean * scale
        shift = shift if bias is None else bias + shift
        spread = (-1, *[1] * (x.ndim - 2))
        return Scaling(scale.view(spread), shift.view(spread))


def _number(x: Slot, value: Any) -> Tensor:
    """What multiplies x or is added to it. Raises Unbounded where the result would have another shape."""
    constant = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    if np.broadcast_shapes(x.shape, constant.shape) != x.shape:
        raise Unbounded(f"a value {tuple(x.shape)} and a constant {tuple(constant.shape)}, which make a larger one")
    return constant


def _scaling(x: Slot, scale: Any, shift: Any) -> Operation:
    return Scaling(_number(x, scale), _number(x, shift))


def _plus(sign: int, x: Any, y: Any, *, alpha: float = 1) -> Operation:
    """x + sign y."""
    if alpha != 1:
        raise Unbounded("a sum with alpha")
    if not isinstance(y, Slot):
        return _scaling(x, 1.0, y if sign > 0 else -y)
    if not isinstance(x, Slot):
        return _scaling(y, sign, x)
    if x.shape != y.shape:
        raise Unbounded(f"a sum of the shapes {tuple(x.shape)} and {tuple(y.shape)}")
    return Adding(sign)


def _mul(x: Any, y: Any) -> Operation:
    if isinstance(x, Slot) and isinstance(y, Slot):
        return _product(np.broadcast_shapes(x.shape, y.shape), x, y)
    return _scaling(x, y, 0.0) if isinstance(x, Slot) else _scaling(y, x, 0.0)


def _div(x: Any, y: Any) -> Operation:
    if isinstance(y, Slot):
        raise Unbounded("a division by a value that depends on the image")
    return _scaling(x, 1.0 / y, 0.0)


def _relu(x: Slot, inplace: bool = False) -> Operation:
    if inplace:
        raise Unbounded("a ReLU in place")
    return Relu()


def _silu(x: Slot, inplace: bool = False) -> Operation:
    if inplace:
        raise Unbounded("a SiLU in place")
    return silu()


def _leaky_relu(x: Slot, negative_slope: float = 0.01, inplace: bool = False) -> Operation:
    if inplace or not 0 <= negative_slope <= 1:
        raise Unbounded(f"a leaky ReLU in place, or of slope {negative_slope}")
    return Relu(negative_slope)


def _max_pool2d(
    x: Slot,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Operation:
    if _pair(dilation) != (1, 1) or return_indices or x.ndim != 4:
        raise Unbounded("max-pooling with dilation or indices, or of other than 4 dimensions")
    kernel = _pair(kernel_size)
    return MaxPool(kernel, kernel if stride is None else _pair(stride), _pair(padding), ceil_mode)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value) * (3 - len(value))
    return both[0], both[1]


RULES: dict[Callable[..., Any], Rule] = {
    **{each: _applied(Shaped, each) for each in (Tensor.flatten, torch.flatten, Tensor.unflatten, Tensor.reshape)},
    **{each: _applied(Shaped, each) for each in (Tensor.contiguous, Tensor.squeeze, Tensor.unsqueeze)},
    Tensor.view: _view,
    Tensor.to: _cast(Tensor.to),
    Tensor.float: _cast(Tensor.float),
    Tensor.double: _cast(Tensor.double),
    F.dropout: _dropout,
    F.dropout2d: _dropout,
    Tensor.mean: _reduced(torch.mean),
    torch.mean: _reduced(torch.mean),
    Tensor.sum: _reduced(torch.sum),
    torch.sum: _reduced(torch.sum),
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.permute: _permute,
    torch.permute: _permute,
    torch.cat: _cat,
    **{each: _pieces(each, 0) for each in (torch.unbind, Tensor.unbind)},
    **{each: _pieces(each, 1) for each in (torch.chunk, Tensor.chunk, torch.split, Tensor.split)},
    Tensor.__getitem__: _getitem,
    Tensor.index_copy_: _index_copy,
    F.pad: _pad,
    F.interpolate: _interpolate,
    F.avg_pool2d: _applied(Weighing, F.avg_pool2d),
    F.adaptive_avg_pool2d: _applied(Weighing, F.adaptive_avg_pool2d),
    F.max_pool2d: _max_pool2d,
    F.linear: _linear,
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul), _mm),
    **dict.fromkeys((torch.softmax, Tensor.softmax), _softmax),
    F.softmax: lambda x, dim=None, _stacklevel=3, dtype=None: _softmax(x, dim, dtype),
    chosen_weights: _chosen_weights,
    centred: lambda x: Centring(),
    mean_square: lambda x, eps: MeanSquare(eps),
    over_root: lambda x, squares, eps, from_mean: Unit(eps, from_mean),
    torch.addcmul: _addcmul,
    F.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    Tensor.add: partial(_plus, 1),
    torch.add: partial(_plus, 1),
    Tensor.sub: partial(_plus, -1),
    torch.sub: partial(_plus, -1),
    Tensor.__rsub__: lambda x, y: _plus(-1, y, x),
    Tensor.neg: lambda x: _mul(x, -1),
    torch.neg: lambda x: _mul(x, -1),
    Tensor.mul: _mul,
    torch.mul: _mul,
    Tensor.div: _div,
    torch.div: _div,
    F.relu: _relu,
    Tensor.relu: _relu,
    torch.relu: _relu,
    F.leaky_relu: _leaky_relu,
    F.gelu: lambda x, approximate="none": gelu(approximate),
    F.silu: _silu,
    **{each: lambda x: sigmoid() for each in (torch.sigmoid, Tensor.sigmoid)},
    **{each: lambda x: tanh() for each in (torch.tanh, Tensor.tanh)},
}
"""What a network may call, and the operation that it is."""
