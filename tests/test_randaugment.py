"""RandAugment: each operation is pillow's, the draws are the image's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from robustmoe import spec
from robustmoe.data import CropFlip, RandAugment
from robustmoe.data.randaugment import GREY, OPERATIONS, transformed
from robustmoe.errors import UserError
from robustmoe.noise import Noise

GENERATOR = torch.Generator().manual_seed(0)
COARSE = torch.rand(6, 3, 5, 6, generator=GENERATOR)
LEVELS = (torch.nn.functional.interpolate(COARSE, size=(20, 24), mode="bilinear") * 200 + 20).floor()
"""Smooth images of unlike sides; some of their levels are missing."""
NOISE = Noise.of(torch.arange(6), 7)
NONE = CropFlip(padding=0, flip=False)
MAGNITUDE = 0.7


def enhanced(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, sign: kind(image).enhance(1.8 * MAGNITUDE + 0.1)


def through(a: float, b: float, c: float, d: float, e: float, f: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.NEAREST, fillcolor=(int(GREY),) * 3
    )


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto_contrast": lambda image, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, sign: ImageOps.equalize(image),
    "invert": lambda image, sign: ImageOps.invert(image),
    "rotate": lambda image, sign: image.rotate(sign * 30 * MAGNITUDE, fillcolor=(128,) * 3),
    "posterize": lambda image, sign: ImageOps.posterize(image, int(4 * MAGNITUDE)),
    "solarize": lambda image, sign: ImageOps.solarize(image, int(256 * MAGNITUDE)),
    "color": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "brightness": enhanced(ImageEnhance.Brightness),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, sign: through(1, sign * 0.3 * MAGNITUDE, 0, 0, 1, 0)(image),
    "shear_y": lambda image, sign: through(1, 0, 0, sign * 0.3 * MAGNITUDE, 1, 0)(image),
    "translate_x": lambda image, sign: through(1, 0, sign * 100 / 224 * MAGNITUDE * 24, 0, 1, 0)(image),
    "translate_y": lambda image, sign: through(1, 0, 0, 0, 1, sign * 100 / 224 * MAGNITUDE * 20)(image),
}


def by_pillow(name: str, signs: list[float]) -> Tensor:
    arrays = LEVELS.byte().permute(0, 2, 3, 1).numpy()
    images = [PILLOW[name](Image.fromarray(array), sign) for array, sign in zip(arrays, signs)]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_is_pillows(name: str) -> None:
    """All but the last level of rounding; of a turn, one pixel in a hundred lies on an edge between two."""
    sign = torch.tensor([-1.0, 1.0] * 3)
    ours = OPERATIONS[name](LEVELS, MAGNITUDE, sign, NOISE)
    apart = (ours - by_pillow(name, sign.tolist())).abs()
    if name == "rotate" or name.startswith("shear"):
        assert float((apart > 0).float().mean()) <= 0.01
    else:
        assert float(apart.max()) <= 1
        assert name in ("auto_contrast", "color", "contrast", "brightness", "sharpness") or not bool(apart.any())
    assert not torch.equal(ours, LEVELS)


def test_the_two_that_pillow_has_not() -> None:
    """Levels below the middle are raised; a square of twice 40 / 224 of the side is grey."""
    added = OPERATIONS["solarize_add"](LEVELS, 0.5, torch.ones(6), NOISE)
    assert torch.equal(added, torch.where(LEVELS < 128, LEVELS + 55, LEVELS))
    cut = OPERATIONS["cutout"](torch.zeros(6, 1, 56, 56), 1.0, torch.ones(6), NOISE)
    assert set(cut.unique().tolist()) == {0.0, GREY}
    full = [int(image.sum() / GREY) for image in cut]
    assert max(full) <= 20 * 20
    assert min(full) >= 10 * 10
    assert len(set(full)) > 1, "places differ"


def test_a_flat_image_stays_flat() -> None:
    flat = torch.full((2, 3, 4, 4), 77.0)
    for name in ("auto_contrast", "equalize", "color", "contrast", "sharpness"):
        assert torch.equal(OPERATIONS[name](flat, 0.5, torch.ones(2), NOISE[:2]), flat), name


def test_each_image_has_its_own_operation() -> None:
    x = LEVELS / 255
    choice = torch.tensor([2, 5, 16, 16, 2, 0])
    out = transformed(x, choice, 10.0, NOISE)
    torch.testing.assert_close(out[[0, 4]], 1 - x[[0, 4]])
    assert torch.equal(out[2:4], x[2:4]), "the seventeenth is none"
    assert torch.equal(out[1], x[1]), "the strongest solarize changes nothing, as in the code"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_draws_are_the_images(channels: int) -> None:
    """In any batch and order; another stream, another change; in [0, 1]; all of the list comes."""
    x = torch.rand(400, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    index = torch.arange(400)
    augment = RandAugment(layers=2, magnitude=9.0)
    whole = augment(x, Noise.of(index, 5))
    some = torch.tensor([17, 3, 399])
    assert torch.equal(augment(x[some], Noise.of(index[some], 5)), whole[some])
    assert not torch.equal(augment(x, Noise.of(index, 6)), whole)
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1
    once = RandAugment(1, 9.0, first=NONE)(x, Noise.of(index, 5))
    same = float((once == x).flatten(1).all(1).float().mean())
    assert 1 / 17 / 3 < same < 3 / 17 + (2 / 17 if channels == 1 else 0)


def test_without_layers_it_is_crop_and_flip() -> None:
    x, first = LEVELS / 255, CropFlip(padding=2)
    assert torch.equal(RandAugment(0, 10.0, first)(x, NOISE), first(x, NOISE))
    built = spec.build("rand_augment(2, 15, first=crop_flip(padding=28))", "augment")
    assert built == RandAugment(2, 15.0, CropFlip(28))
    for text, told in (("rand_augment(-1)", "layers must be 0 or more"), ("rand_augment(2, 31)", "magnitude must be")):
        with pytest.raises(UserError, match=told):
            spec.build(text, "augment")
