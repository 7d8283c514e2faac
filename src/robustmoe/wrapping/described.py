"""`WrappedSpec`: `rm.wrap` of a model of a user's own as a spec, ``wrapped(my_file.py:make_model)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robustmoe.errors import UserError
from robustmoe.models import ImageShape, ModelSpec, Normalise, OwnModel, RoutedModel
from robustmoe.wrapping.making import wrap
from robustmoe.wrapping.said import Codec

EXAMPLES, SEED = 4, 17
"""Random images that a wrapped model is tested on whenever it is built, and the seed that they are drawn from."""


@dataclass(frozen=True)
class WrappedSpec(ModelSpec):
    """``model`` of a user's own with its routers seen, see `robustmoe.wrap`.

    ``routers``: pairs of a module's path and its codec, such as ``routers=(('moe.gate', dispatch),)``; none: the best
    guess, made anew whenever the model is built. ``output``, ``noise``: as in `robustmoe.wrap`.
    """

    model: OwnModel
    routers: tuple[tuple[str, Codec], ...] = ()
    output: str | int | None = None
    noise: Literal["free", "replay", "average"] = "free"

    def build(self, num_classes: int, image_shape: ImageShape, normalise: Normalise) -> RoutedModel:
        made = self.model.made(num_classes, image_shape)
        if not isinstance(made, nn.Module):
            raise UserError(f"{self.model.text} gives a {type(made).__name__}; only an nn.Module can be wrapped")
        routers = dict(self.routers) or None
        return wrap(made.eval(), routers, example=example_of(image_shape), output=self.output, noise=self.noise)


def example_of(image_shape: ImageShape) -> Tensor:
    """Random images (n, ch, h, w) in [0, 1], always the same."""
    return torch.rand(EXAMPLES, *image_shape, generator=torch.Generator().manual_seed(SEED))


MODELS = {"wrapped": WrappedSpec}
