"""The layouts that weights are read from and written in, by name."""

from __future__ import annotations

from robustmoe.weights.layouts import flax_vit
from robustmoe.weights.layouts.own import OWN
from robustmoe.weights.pairs import Layout

LAYOUTS: dict[str, Layout] = {
    "own": OWN,
    **flax_vit.LAYOUTS,
}
