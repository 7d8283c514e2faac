"""Random crop and flip, batched on the device, drawn for each image from its own `robustmoe.noise.Noise`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe.errors import UserError
from robustmoe.noise import Noise


def augment(x: Float[Tensor, "n ch h w"], noise: Noise, padding: int, flip: bool) -> Float[Tensor, "n ch h w"]:
    """Each image of ``x`` (n, ch, h, w) moved by up to ``padding`` pixels, zeros entering, and mirrored half the time.

    Equal to padding with zeros, cropping h x w at a uniform place, then a horizontal flip with probability 1/2 where
    ``flip`` (He et al., CVPR 2016, section 4.2, for CIFAR with padding 4). The draws come from ``noise`` (n streams)
    alone, so an image gets the same crop in any batch, order or process. `UserError` on a negative padding or another
    number of streams than images.
    """
    n, ch, h, w = x.shape
    if padding < 0:
        raise UserError(f"the padding is {padding}, expected 0 or more pixels")
    if len(noise) != n:
        raise UserError(
            f"there are {n} images and {len(noise)} streams of noise; make one with Noise.of(batch.index, ...)"
        )
    if padding == 0 and not flip:
        return x
    corner = (noise.fold(1).uniform(2) * (2 * padding + 1)).long()  # (n, 2): top and left in the padded image
    rows = corner[:, :1] + torch.arange(h, device=x.device)
    cols = torch.arange(w, device=x.device).expand(n, w)
    if flip:
        mirrored = noise.fold(2).uniform(1) < 0.5
        cols = torch.where(mirrored, w - 1 - cols, cols)
    cols = cols + corner[:, 1:]
    padded = torch.nn.functional.pad(x, (padding, padding, padding, padding)).flatten(2)
    places = rows[:, :, None] * (w + 2 * padding) + cols[:, None, :]
    return padded.gather(2, places.reshape(n, 1, h * w).expand(n, ch, h * w)).reshape(n, ch, h, w)


@dataclass(frozen=True)
class CropFlip:
    """Random crop after padding with zeros, and random mirroring: what CIFAR is trained with. Called as f(x, noise)."""

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding must be 0 or more pixels; got {self.padding}")

    def __call__(self, x: Float[Tensor, "n ch h w"], noise: Noise) -> Float[Tensor, "n ch h w"]:
        return augment(x, noise, self.padding, self.flip)


AUGMENTS: dict[str, Callable[..., CropFlip]] = {"crop_flip": CropFlip}
