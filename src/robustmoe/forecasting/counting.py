"""The multiply-adds that a forecast names, or why there are none."""

from __future__ import annotations

from robustmoe.costs import costs
from robustmoe.errors import UserError, first_line
from robustmoe.models import RoutedModel


def counted(model: RoutedModel, image_shape: tuple[int, ...]) -> tuple[int | None, tuple[str, ...]]:
    """Returns the multiply-adds an image and pass, and the notes on them. None, and the reason, for a model that cannot
    be counted, or does not take one image alone: its times are forecast all the same.
    """
    try:
        return costs(model, image_shape=image_shape).macs, ()  # type: ignore[arg-type]
    except (RuntimeError, ValueError, NotImplementedError, UserError) as error:
        return None, (f"Multiply-adds were not counted: the model fails on one black image ({first_line(error)})",)
