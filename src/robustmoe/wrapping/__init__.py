"""Anybody's model as a routed one: its routers are found, its decisions recorded and replayed, and nothing of it is
changed.
"""

from __future__ import annotations

from robustmoe.wrapping import gate
from robustmoe.wrapping.codecs import CODECS
from robustmoe.wrapping.described import WrappedSpec
from robustmoe.wrapping.finding import find_routers
from robustmoe.wrapping.findings import Finding, RouterFindings
from robustmoe.wrapping.making import wrap
from robustmoe.wrapping.model import WrappedModel
from robustmoe.wrapping.said import Codec, Said
from robustmoe.wrapping.watching import Cut, Decision, Draw, Seen, watch

__all__ = [
    "CODECS",
    "Codec",
    "Cut",
    "Decision",
    "Draw",
    "Finding",
    "RouterFindings",
    "Said",
    "Seen",
    "WrappedModel",
    "WrappedSpec",
    "find_routers",
    "gate",
    "watch",
    "wrap",
]
