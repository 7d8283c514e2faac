"""Random crop, flip and cutout, batched on the device, drawn for each image from its own `robustmoe.noise.Noise`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe.errors import UserError
from robustmoe.noise import Noise


def augment(
    x: Float[Tensor, "n ch h w"], noise: Noise, padding: int, flip: bool, cutout: int = 0
) -> Float[Tensor, "n ch h w"]:
    """Returns each image of ``x`` (n, ch, h, w) moved by up to ``padding`` pixels, zeros entering, and mirrored half
    the time; then a square of ``cutout`` pixels a side set to 0.

    Equal to padding with zeros, cropping h x w at a uniform place, then a horizontal flip with probability 1/2 where
    ``flip`` (He et al., CVPR 2016, section 4.2, for CIFAR with padding 4). The square's centre is a uniform pixel, so
    that it may stick out (DeVries and Taylor 2017, whose zeros are those of the normalised image). The draws come from
    ``noise`` (n streams) alone, so an image gets the same crop in any batch, order or process. `UserError` on a
    negative padding or cutout, or another number of streams than images.
    """
    n = len(x)
    for name, pixels in (("padding", padding), ("cutout", cutout)):
        if pixels < 0:
            raise UserError(f"the {name} is {pixels}, expected 0 or more pixels")
    if len(noise) != n:
        raise UserError(
            f"there are {n} images and {len(noise)} streams of noise; make one with Noise.of(batch.index, ...)"
        )
    if padding or flip:
        x = _moved(x, noise, padding, flip)
    return _cut_out(x, noise, cutout) if cutout else x


def _moved(x: Tensor, noise: Noise, padding: int, flip: bool) -> Tensor:
    n, ch, h, w = x.shape
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


def _cut_out(x: Tensor, noise: Noise, side: int) -> Tensor:
    u = noise.fold(3).uniform(2)
    inside = []
    for axis, length in enumerate(x.shape[2:]):
        first = (u[:, axis, None] * length).long() - side // 2  # of an even side, the centre is right of the middle
        place = torch.arange(length, device=x.device)
        inside.append((place >= first) & (place < first + side))
    return x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


@dataclass(frozen=True)
class CropFlip:
    """Random crop after ``padding`` with zeros, and random mirroring (``flip``): what CIFAR is trained with; and a
    square of ``cutout`` pixels a side set to 0 (see `augment`). Called as f(x, noise).
    """

    padding: int = 4
    flip: bool = True
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("padding", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more pixels; got {getattr(self, name)}")

    def __call__(self, x: Float[Tensor, "n ch h w"], noise: Noise) -> Float[Tensor, "n ch h w"]:
        return augment(x, noise, self.padding, self.flip, self.cutout)
