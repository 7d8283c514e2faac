"""BatchNorm with a scale and a shift for each image (or region of it) and channel, and averages over fields of a map,
in as few passes over the maps as a CPU allows, forward and back.

On maps in channels-last memory torch's own broadcasting walks runs as short as there are channels, and the gradient of
its pooling comes in another memory order and is copied. What is not `quick` is done by torch's own operations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from robustmoe import compat
from robustmoe.models.norm import at_least_float32


def quick(x: Tensor, *others: Tensor) -> bool:
    """Returns whether x lies in a CPU's memory with its channels last, and nothing but autograd looks at what is
    done.
    """
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and not compat.in_function_transform()
        and not any(torch.autograd.forward_ad.unpack_dual(each).tangent is not None for each in (x, *others))
    )


def side(x: Float[Tensor, "n d h w"], numbers: Float[Tensor, "m d"]) -> int:
    """Returns how many regions a side of a map has, ``numbers`` being of each region, row by row, image by image: 1 too
    where a single row is for all images.
    """
    return math.isqrt(max(1, len(numbers) // len(x)))


def regions(numbers: Float[Tensor, "m d"], x: Float[Tensor, "n d h w"]) -> Tensor:
    """Returns the numbers of each region at its pixels, (n, d, h, w); of a single region as (n, d, 1, 1)."""
    parts = side(x, numbers)
    if parts == 1:
        return numbers[:, :, None, None]
    return F.interpolate(numbers.view(len(x), parts, parts, -1).permute(0, 3, 1, 2), x.shape[2:])


def normed(
    x: Float[Tensor, "n d h w"],
    scale: Float[Tensor, "m d"],
    shift: Float[Tensor, "m d"],
    mean: Float[Tensor, " d"],
    var: Float[Tensor, " d"],
    eps: float,
    of_batch: bool,
) -> Float[Tensor, "n d h w"]:
    """Returns scale * (x - mean) / sqrt(var + eps) + shift of a `quick` x, scale and shift being of each of m / n
    `regions`, which divide its sides. ``of_batch``: mean and variance are those of x, and the gradient passes them;
    otherwise they are constants.
    """
    out: Tensor = _Normed.apply(x, scale, shift, mean, var, eps, of_batch)
    return out


def field_means(x: Float[Tensor, "n d h w"], pool: int) -> Float[Tensor, "n f"]:
    """Returns the averages over ``pool`` x ``pool`` fields, channel by channel, in float32 at least."""
    if quick(x) and x.shape[2] % pool == x.shape[3] % pool == 0:
        out: Tensor = _FieldMeans.apply(x, pool)
        return out
    return averaged(x, pool)


def averaged(x: Float[Tensor, "n d h w"], pool: int) -> Float[Tensor, "n f"]:
    """As `field_means`, by torch's own pooling."""
    x = at_least_float32(x)
    return x.mean((2, 3)) if pool == 1 else F.adaptive_avg_pool2d(x, pool).flatten(1)


# ------------------------------------------------------------------------------------------------ passes

TOGETHER = 2**19
"""Values of a half-precision map that are in float32 at once: 2 MB, which stays in the cache."""


def _images(x: Tensor) -> int:
    """Returns how many images of a map are in float32 at once: all, where it is in float32 itself."""
    return len(x) if x.dtype.itemsize >= 4 else max(1, TOGETHER // x[0].numel())


RUN = 256
"""Values in a run of a map that numbers meet at once, if it has so many channels or fewer."""


def _times(x: Float[Tensor, "n d h w"], parts: int) -> int:
    """Returns how often a pixel's channels stand in a run: a divisor of the number of pixels; a region's width, where
    there are several.
    """
    _, d, h, w = x.shape
    if parts > 1:
        return w // parts
    return math.gcd(h * w, 1 << max(0, RUN // d).bit_length() - 1) if d <= RUN else 1


def _runs(x: Float[Tensor, "n d h w"], times: int, parts: int) -> Float[Tensor, "a r b l"]:
    """Returns a map as runs of ``times`` * d values, a view of channels-last memory: a rows of regions, b in each of
    them, r runs in a region.
    """
    n, d, h, w = x.shape
    flat = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return flat.reshape(n * parts, h * w // times // parts**2, parts, times * d)


def _map(runs: Float[Tensor, "a r b l"], like: Float[Tensor, "n d h w"]) -> Float[Tensor, "n d h w"]:
    """Returns runs as the map that they are of."""
    n, d, h, w = like.shape
    return runs.view(n, h, w, d).permute(0, 3, 1, 2)


def _along(numbers: Float[Tensor, "m d"], times: int, parts: int) -> Float[Tensor, "a 1 b l"]:
    """Returns the numbers of each channel as one run a region."""
    m, d = numbers.shape
    return numbers[:, None].expand(m, times, d).reshape(m // parts, 1, parts, times * d)


def _spread(numbers: Float[Tensor, "m d"], times: int, parts: int, dtype: torch.dtype) -> Float[Tensor, "a 1 b l"]:
    """Returns `_along` in another dtype, rounded up in some places of the run and down in others: over the run a number
    is what it was, to 1 part in ``times`` of what rounding it would change.
    """
    if dtype == numbers.dtype:
        return _along(numbers, times, parts)
    m, d = numbers.shape
    step = torch.ldexp(torch.full_like(numbers, torch.finfo(dtype).eps), torch.frexp(numbers).exponent - 1)
    places = (torch.arange(times, dtype=numbers.dtype) + 0.5) / times - 0.5
    rounded = torch.addcmul(numbers[:, None], step[:, None], places[:, None]).to(dtype)
    return rounded.view(m // parts, 1, parts, times * d)


def _sums(runs: Float[Tensor, "a r b l"], d: int) -> Float[Tensor, "m d"]:
    """Returns the sum over the pixels of each region and channel, in float32 at least."""
    a, _, parts, _ = runs.shape
    if parts == 1:
        return at_least_float32(runs.view(a, -1, d).sum(1))
    return at_least_float32(runs.sum(1)).view(a * parts, -1, d).sum(1)


class _Normed(torch.autograd.Function):
    """`normed`. With x' = (x - mean) / sqrt(var + eps), the gradient g at the output, and averages E over images and
    pixels of a channel: dx = (scale g - E[scale g] - x' E[scale g x']) / sqrt(var + eps), the averages left out where
    the statistics are constants. All of it needs two sums an image and channel: of g and of g x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor, eps: float, of_batch: bool
    ) -> Tensor:
        parts = side(x, scale)
        times, inverse = _times(x, parts), torch.rsqrt(var + eps)
        rounded = (scale * inverse).to(x.dtype)
        start = torch.addcmul(shift, rounded.to(shift.dtype), mean, value=-1)
        slope = _along(rounded, times, parts)
        ctx.save_for_backward(x, scale, shift, mean, var, slope)
        ctx.eps, ctx.of_batch = eps, of_batch
        return _map(torch.addcmul(_spread(start, times, parts, x.dtype), _runs(x, times, parts), slope), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            return (*_by_definition(ctx, grad), None, None, None, None)
        x, scale, _, mean, var, slope = ctx.saved_tensors
        parts, d = side(x, scale), x.shape[1]
        times, inverse = _times(x, parts), torch.rsqrt(var + ctx.eps)
        above, runs = _runs(grad, times, parts), _runs(x, times, parts)
        to_scale, to_shift = None, None
        if any(ctx.needs_input_grad[1:3]) or ctx.of_batch:
            to_shift = _sums(above, d)
            to_scale = torch.addcmul(_sums(above * runs, d), to_shift, mean, value=-1) * inverse
        if not ctx.needs_input_grad[0]:
            to_x = None
        elif to_shift is None or to_scale is None or not ctx.of_batch:
            to_x = _map(above * slope, x)
        else:
            first, second = ((scale * each).sum(0) * d / x[0].numel() / len(x) for each in (to_shift, to_scale))
            tilt = -inverse.square() * second
            start = torch.addcmul(-inverse * first, tilt, mean, value=-1)
            start, tilt = (_along(each.to(x.dtype)[None], times, 1) for each in (start, tilt))
            to_x = _map(torch.addcmul(start, runs, tilt).addcmul_(above, slope), x)
        return to_x, to_scale, to_shift, None, None, None, None


def _by_definition(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the gradients of `normed` as a graph, by torch's own operations."""
    x, scale, shift, mean, var, _ = ctx.saved_tensors
    wide = x.to(scale.dtype)
    if ctx.of_batch:
        mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
    unit = (wide - mean[:, None, None]) * torch.rsqrt(var + ctx.eps)[:, None, None]
    out = (regions(scale, x) * unit + regions(shift, x)).to(x.dtype)
    wanted = [each for each, needed in zip((x, scale, shift), ctx.needs_input_grad) if needed]
    got = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return tuple(next(got) if needed else None for needed in ctx.needs_input_grad[:3])


class _FieldMeans(torch.autograd.Function):
    """`field_means` of maps whose sides the fields divide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: int) -> Tensor:
        ctx.shape, ctx.dtype, ctx.pool = x.shape, x.dtype, pool
        return torch.cat([averaged(part, pool) for part in x.split(_images(x))])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (n, d, h, w), pool = ctx.shape, ctx.pool
        each = (grad / (h * w // pool**2)).to(ctx.dtype).view(n, d, pool, pool).permute(0, 2, 3, 1)
        rows = each[:, :, :, None].expand(n, pool, pool, w // pool, d).reshape(n, pool, 1, w * d)
        return rows.expand(n, pool, h // pool, w * d).reshape(n, h, w, d).permute(0, 3, 1, 2), None
