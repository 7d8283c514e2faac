"""The layouts that weights are read from and written in, by name."""

from __future__ import annotations

from robustmoe.weights.layouts import flax_vit
from robustmoe.weights.layouts.kastel import KASTEL
from robustmoe.weights.layouts.optml import OPTML
from robustmoe.weights.layouts.own import NETWORK, OWN
from robustmoe.weights.layouts.robustbench import ROBUSTBENCH
from robustmoe.weights.layouts.timl import TIML
from robustmoe.weights.layouts.torchvision import TORCHVISION
from robustmoe.weights.pairs import Layout

LAYOUTS: dict[str, Layout] = {
    "own": OWN,
    "network": NETWORK,
    **flax_vit.LAYOUTS,
    "torchvision": TORCHVISION,
    "robustbench": ROBUSTBENCH,
    "optml": OPTML,
    "timl": TIML,
    "kastel": KASTEL,
}
