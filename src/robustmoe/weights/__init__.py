"""Weights of other code: read with nothing executed, put in their places, and written out again."""

from __future__ import annotations

from robustmoe.weights.exporting import export_run
from robustmoe.weights.importing import Imported, import_run
from robustmoe.weights.layouts import LAYOUTS
from robustmoe.weights.loading import Loaded, load_weights
from robustmoe.weights.pairs import Counterpart, Layout

__all__ = ["LAYOUTS", "Counterpart", "Imported", "Layout", "Loaded", "export_run", "import_run", "load_weights"]
