"""What a user gives from Python, images and labels, as tensors; what they cannot be is one line."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from robustmoe.errors import UserError

ROUNDING = 1e-5
"""How far a pixel may be outside [0, 1] and count as rounding: a level is 0.004."""


def as_tensor(values: Any, name: str, wanted: str) -> Tensor:
    """``values`` as a tensor, cut from its graph. UserError where they are none; ``name``: what they are called."""
    try:
        if hasattr(values, "__array__") and not isinstance(values, Tensor):  # also a column of a table, a picture
            values = np.asarray(values)
            # a copy only where torch would warn (read only) or refuse (another order of bytes, negative strides)
            values = np.require(values, values.dtype.newbyteorder("="), ["C", "W"])
        tensor = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:  # texts, objects, rows of unequal length
        raise UserError(f"{name} cannot be made a tensor ({e}); expected {wanted}") from None
    kinds = {"on the meta device": tensor.is_meta, "quantised": tensor.is_quantized, "nested": tensor.is_nested}
    kind = next((kind for kind, it_is in kinds.items() if it_is), str(tensor.layout))
    if kind != "torch.strided":
        raise UserError(f"{name} are {kind}, without plain values; expected {wanted}")
    return tensor


def as_images(x: Any) -> Float[Tensor, "n ch h w"]:
    """``x`` as a tensor of images in [0, 1], of its own dtype. What is outside by rounding (`ROUNDING`, or one step of
    its dtype at 1) is clipped; `UserError` for what is further, not finite, or of another rank or dtype.
    """
    x = as_tensor(x, "the images", "floating point in [0, 1]")
    if x.ndim != 4:
        raise UserError(
            f"the images have shape {tuple(x.shape)}, expected four axes (images, channels, height, width); "
            "add the missing axis with x[None] (one image) or x[:, None] (one channel)"
        )
    if x.numel() == 0:
        raise UserError(f"there are no images: the shape is {tuple(x.shape)}; pass at least one")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise UserError(
            f"the images are {x.dtype}, expected floating point in [0, 1]; pass x / 255 if the levels are 0 to 255"
        )
    low, high = (float(value) for value in torch.aminmax(x))
    if not (math.isfinite(low) and math.isfinite(high)):  # both are NaN where a pixel is
        bad = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
        raise UserError(
            f"image {bad} holds a value that is not finite, expected every pixel in [0, 1]; remove or repair it"
        )
    slack = max(ROUNDING, torch.finfo(x.dtype).eps)
    if low < -slack or high > 1 + slack:
        raise UserError(
            f"the images range from {low:.6g} to {high:.6g}, expected [0, 1]; pass raw pixels, "
            "divided by 255 if they are 0 to 255: normalisation belongs inside the model"
        )
    return x.clamp(0.0, 1.0) if low < 0 or high > 1 else x


def as_labels(y: Any, num_images: int, num_classes: int | None, source: str) -> Int64[Tensor, " n"]:
    """``y`` as a tensor of int64; `UserError` unless it is (num_images,) integers in 0..num_classes-1. ``source`` says
    whose labels they are.
    """
    if num_images == 0:
        raise UserError(f"{source} holds no images, expected at least one; give another file or folder")
    labels = as_tensor(y, f"the labels of {source}", "integers, one an image")
    if labels.ndim != 1 or len(labels) != num_images:
        raise UserError(
            f"{source} has {num_images} images and labels of shape {tuple(labels.shape)}, expected ({num_images},)"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UserError(
            f"the labels of {source} are {labels.dtype}, expected integers; convert them, for example with y.long()"
        )
    labels = labels.to(torch.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        top = "0 or above" if num_classes is None else f"0 to {num_classes - 1} ({num_classes} classes)"
        raise UserError(f"the labels of {source} range from {low} to {high}, expected {top}; number the classes from 0")
    return labels
