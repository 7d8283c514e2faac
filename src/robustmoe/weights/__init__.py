"""Weights of other code: read with nothing executed, put in their places, and written out again."""

from __future__ import annotations

from robustmoe.weights.layouts import LAYOUTS
from robustmoe.weights.loading import Loaded, load_weights
from robustmoe.weights.pairs import Counterpart, Layout

__all__ = ["LAYOUTS", "Counterpart", "Layout", "Loaded", "load_weights"]
