"""`OwnModel`: a model of a user's own, ``my_file.py:make_model`` in a spec, called when it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from robustmoe import spec as specs
from robustmoe.errors import UserError
from robustmoe.models.base import ImageShape, ModelSpec, NetworkSpec, RoutedModel
from robustmoe.models.foreign import require_weights, to_eval
from robustmoe.models.norm import Normalise
from robustmoe.models.plain import as_routed

EXPECTED = "expected a model: an nn.Module, or another callable, from images (n, ch, h, w) in [0, 1] to logits (n, c)"


@dataclass(frozen=True)
class OwnModel(specs.Written, NetworkSpec):
    """``text`` names it in a file of a user's own, or in a package. ``make(num_classes=..., image_shape=...)`` makes it
    when it is built, with the weights that it brings.

    Alone it gets images in [0, 1], and routes where it is a `RoutedModel`. As an expert or a router of a model of ours
    it gets what these get, normalised images.
    """

    text: str
    make: Callable[..., Any] = field(compare=False, repr=False)

    def made(self, num_classes: int, image_shape: ImageShape) -> Any:
        """Returns what the user's own code gives, a module in eval mode. UserError for what is no model, for a module
        that cannot be put in that mode, or whose weights hold no numbers.
        """
        made = self.make(num_classes=num_classes, image_shape=image_shape)
        if isinstance(made, type) or not (callable(made) or isinstance(made, ModelSpec)):
            raise UserError(f"{self.text} gives {specs.called(made)}; {EXPECTED}")
        if isinstance(made, nn.Module):
            require_weights(made)
            to_eval(made)
        return made

    def network(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        made = self.made(num_classes, image_shape)
        if isinstance(made, NetworkSpec):
            return made.network(num_classes, image_shape)
        if not isinstance(made, nn.Module) or isinstance(made, RoutedModel):
            raise UserError(f"{self.text} gives {specs.called(made)}; expected a network without routers, an nn.Module")
        return made

    def build(self, num_classes: int, image_shape: ImageShape, normalise: Normalise) -> RoutedModel:
        made = self.made(num_classes, image_shape)
        if isinstance(made, ModelSpec):
            return made.build(num_classes, image_shape, normalise)
        return as_routed(made)
