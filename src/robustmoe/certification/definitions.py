"""Functions that bounds know by what they are made of: attention and LayerNorm, written with functions that have rules.

What is written here is compared with torch's own at another point of the ball, as every step is
(`robustmoe.certification.graph.check`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from robustmoe.certification.operations import Unbounded
from robustmoe.models.norm import unit_length


def centred(x: Tensor) -> Tensor:
    """Rows less their mean."""
    if has_torch_function_unary(x):
        rows: Tensor = handle_torch_function(centred, (x,), x)
        return rows
    return x - x.mean(-1, keepdim=True)


def mean_square(x: Tensor, eps: float) -> Tensor:
    """The mean of each row's squares, plus eps."""
    if has_torch_function_unary(x):
        mean: Tensor = handle_torch_function(mean_square, (x,), x, eps)
        return mean
    return x.square().mean(-1, keepdim=True) + eps


def over_root(x: Tensor, squares: Tensor, eps: float, from_mean: bool) -> Tensor:
    """Rows over the root of their `mean_square`; ``from_mean``: rows that sum to 0."""
    if has_torch_function_unary(x):
        rows: Tensor = handle_torch_function(over_root, (x,), x, squares, eps, from_mean)
        return rows
    return x * torch.rsqrt(squares)


def _normed(x: Tensor, eps: float, from_mean: bool) -> Tensor:
    return over_root(x, mean_square(x, eps), eps, from_mean)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        raise Unbounded("attention with a mask, dropout or grouped queries")
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scale is None else scale), key.transpose(-2, -1))
    return torch.matmul(torch.softmax(scores, -1), value)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _moved(_normed(centred(_rows(x, normalized_shape, eps)), eps, True), weight, bias)


def _rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    small = torch.finfo(x.dtype).eps if eps is None else eps
    return _moved(_normed(_rows(x, normalized_shape, small), small, False), weight, None)


def _unit_length(x: Tensor, eps: float, dim: int = -1) -> Tensor:
    if dim % x.ndim != x.ndim - 1 or x.ndim < 2:
        raise Unbounded("rows of length 1 along another dimension than the last")
    d = x.shape[-1]
    return _normed(x, eps / d, False) * d**-0.5


def _rows(x: Tensor, shape: Sequence[int], eps: float) -> Tensor:
    if len(shape) != 1 or x.ndim < 2 or not eps > 0:
        raise Unbounded("a LayerNorm over more than the last dimension, or without an eps above 0")
    return x


def _moved(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


MADE_OF: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: _attention,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    unit_length: _unit_length,
}
"""What each of these is made of."""
