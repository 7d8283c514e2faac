"""RandAugment (Cubuk et al. 2020): some transformations an image, drawn from a list, all at one strength.

The list, and what a strength means, are those of the code that V-MoE was trained with (tensorflow/tpu, EfficientNet):
16 transformations and once in 17 none; a strength of 10 is the whole range; ``posterize`` and ``solarize`` are weaker
the larger it is. Its pixels of shift and cutout, meant for images of 224, scale with the side here. Geometry takes the
nearest pixel; what enters is grey. All images of a batch are worked on at once, on their device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from robustmoe.data.augment import CropFlip
from robustmoe.noise import Noise

GREY, SIDE, SHIFT, HALF_CUTOUT = 128.0, 224, 100, 40
"""What enters the image, of 255; the side of an image for which the code's shift and half cutout are meant."""

RANDAUGMENT, CUTOUT = 4, 5
"""The streams of the choice and of the square's place; those below are `robustmoe.data.augment.augment`'s."""

Levels = Float[Tensor, "n ch h w"]


def mapped(x: Levels, table: Float[Tensor, "n ch 256"]) -> Levels:
    """Returns each level as the ``table`` has it."""
    return table.gather(2, x.long().flatten(2)).reshape(x.shape)


def auto_contrast(x: Levels) -> Levels:
    """The least level of each channel becomes 0, the largest 255."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, ((x - low) * 255 / (high - low).clamp(min=1)).floor(), x)


def equalize(x: Levels) -> Levels:
    """The levels of each channel become about equally frequent."""
    n, ch = x.shape[:2]
    places = x.long().flatten(2)
    counts = torch.zeros(n, ch, 256, device=x.device).scatter_add_(2, places, torch.ones_like(places, dtype=x.dtype))
    last = counts.gather(2, places.amax(2, keepdim=True))
    step = ((places.shape[2] - last) / 255).floor()
    below = counts.cumsum(2) - counts
    table = ((below + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(max=255)
    return torch.where(step[..., None] > 0, mapped(x, table), x)


def luma(x: Levels) -> Float[Tensor, "n 1 h w"]:
    """The grey image; of RGB by ITU-R 601-2, rounded as pillow does."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True).floor()
    weights = x.new_tensor([19595, 38470, 7471])[:, None, None]
    return ((x * weights).sum(1, keepdim=True).add(0x8000) / 65536).floor()


def blended(degenerate: Tensor, x: Levels, factor: float) -> Levels:
    """From the ``degenerate`` image (0) over the image itself (1) and on."""
    return (degenerate + factor * (x - degenerate)).clamp(0, 255).floor()


def smooth(x: Levels) -> Levels:
    """Weighted means of 3 x 3 pixels, 5 for the one in the middle; the border stays."""
    if min(x.shape[2:]) < 3:
        return x
    kernel = x.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]).div(13).expand(x.shape[1], 1, 3, 3)
    out = x.clone()
    out[:, :, 1:-1, 1:-1] = (F.conv2d(x, kernel, groups=x.shape[1]) + 0.5).floor().clamp(0, 255)
    return out


def affine(x: Levels, matrix: Float[Tensor, "n 6"]) -> Levels:
    """The pixel whose centre is (u, v) becomes the one at (a u + b v + c, d u + e v + f); grey beyond the border."""
    h, w = x.shape[2:]
    v, u = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
    at = torch.stack([u + 0.5, v + 0.5, torch.ones_like(u)]).reshape(3, -1)
    across, down = (matrix.reshape(-1, 2, 3) @ at).floor().long().unbind(1)
    inside = (across >= 0) & (across < w) & (down >= 0) & (down < h)
    places = (down.clamp(0, h - 1) * w + across.clamp(0, w - 1))[:, None].expand(-1, x.shape[1], -1)
    moved = x.flatten(2).gather(2, places)
    return torch.where(inside[:, None], moved, torch.full_like(moved, GREY)).reshape(x.shape)


def rotated(x: Levels, degrees: Float[Tensor, " n"]) -> Levels:
    """Turned about the middle, counter-clockwise."""
    middle_y, middle_x = (side / 2 for side in x.shape[2:])
    angle = -degrees * math.pi / 180
    a, b = angle.cos(), angle.sin()
    rows = [a, b, middle_x - a * middle_x - b * middle_y, -b, a, middle_y + b * middle_x - a * middle_y]
    return affine(x, torch.stack(rows, 1))


def moved(x: Levels, place: int, amount: Float[Tensor, " n"]) -> Levels:
    """The affine map that is the identity but for the number at ``place`` of its six."""
    matrix = torch.eye(2, 3, device=x.device).reshape(1, 6).repeat(len(x), 1)
    matrix[:, place] = amount
    return affine(x, matrix)


def cut_out(x: Levels, half: int, noise: Noise) -> Levels:
    """A square of twice ``half`` pixels a side about a uniform pixel is grey."""
    u = noise.fold(CUTOUT).uniform(2)
    inside = []
    for axis, length in enumerate(x.shape[2:]):
        centre = (u[:, axis, None] * length).long()
        place = torch.arange(length, device=x.device)
        inside.append((place >= centre - half) & (place < centre + half))
    return x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], GREY)


Operation = Callable[[Levels, float, Float[Tensor, " n"], Noise], Levels]
"""Levels, the strength (10 is the whole range, here 1), a sign and a stream an image."""

OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda x, m, sign, noise: auto_contrast(x),
    "equalize": lambda x, m, sign, noise: equalize(x),
    "invert": lambda x, m, sign, noise: 255 - x,
    "rotate": lambda x, m, sign, noise: rotated(x, sign * 30 * m),
    "posterize": lambda x, m, sign, noise: (x / 2 ** (8 - min(8, int(4 * m)))).floor() * 2 ** (8 - min(8, int(4 * m))),
    "solarize": lambda x, m, sign, noise: torch.where(x < int(256 * m), x, 255 - x),
    "color": lambda x, m, sign, noise: blended(luma(x), x, 1.8 * m + 0.1),
    "contrast": lambda x, m, sign, noise: blended((luma(x).mean((2, 3), keepdim=True) + 0.5).floor(), x, 1.8 * m + 0.1),
    "brightness": lambda x, m, sign, noise: blended(torch.zeros_like(x), x, 1.8 * m + 0.1),
    "sharpness": lambda x, m, sign, noise: blended(smooth(x), x, 1.8 * m + 0.1),
    "shear_x": lambda x, m, sign, noise: moved(x, 1, sign * 0.3 * m),
    "shear_y": lambda x, m, sign, noise: moved(x, 3, sign * 0.3 * m),
    "translate_x": lambda x, m, sign, noise: moved(x, 2, sign * SHIFT / SIDE * m * x.shape[3]),
    "translate_y": lambda x, m, sign, noise: moved(x, 5, sign * SHIFT / SIDE * m * x.shape[2]),
    "cutout": lambda x, m, sign, noise: cut_out(x, int(HALF_CUTOUT / SIDE * m * x.shape[2]), noise),
    "solarize_add": lambda x, m, sign, noise: torch.where(x < 128, (x + int(110 * m)).clamp(0, 255), x),
}
"""By name; images of one channel have no colour, and there ``color`` changes nothing."""


CROP_FLIP = CropFlip()


@dataclass(frozen=True)
class RandAugment:
    """RandAugment(``layers``, ``magnitude``) after ``first`` (`CropFlip`): see the head of this module. Called as
    f(x, noise); the draws come from ``noise`` alone, so an image is changed alike in any batch, order or process. An
    image that is changed is taken in 256 levels.
    """

    layers: int = 2
    magnitude: float = 10.0
    first: CropFlip = CROP_FLIP

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ValueError(f"layers must be 0 or more transformations an image; got {self.layers}")
        if not 0 <= self.magnitude <= 30:
            raise ValueError(f"magnitude must be from 0 to 30; got {self.magnitude}")

    def __call__(self, x: Float[Tensor, "n ch h w"], noise: Noise) -> Float[Tensor, "n ch h w"]:
        x = self.first(x, noise)
        for layer in range(self.layers):
            own = noise.fold(RANDAUGMENT, layer)
            x = transformed(x, (own.uniform() * (len(OPERATIONS) + 1)).long(), self.magnitude, own.fold(1))
        return x


def transformed(
    x: Float[Tensor, "n ch h w"], choice: Int[Tensor, " n"], magnitude: float, noise: Noise
) -> Float[Tensor, "n ch h w"]:
    """Returns each image of ``x`` in [0, 1] under the operation of its number in `OPERATIONS` (beyond: unchanged)."""
    out = x.clone()
    sign = torch.where(noise.uniform() < 0.5, -1.0, 1.0)
    for number, operation in enumerate(OPERATIONS.values()):
        rows = torch.nonzero(choice == number)[:, 0]
        if len(rows):
            levels = (x[rows] * 255).round()
            out[rows] = operation(levels, magnitude / 10, sign[rows], noise[rows]) / 255
    return out
