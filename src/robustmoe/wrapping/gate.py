"""The codecs under the names that users write: ``rm.gate.triple(index=2)``. See `robustmoe.wrapping.codecs`."""

from __future__ import annotations

from robustmoe.wrapping.codecs import CallCodec as call
from robustmoe.wrapping.codecs import DenseCodec as dense
from robustmoe.wrapping.codecs import DispatchCodec as dispatch
from robustmoe.wrapping.codecs import FunctionsCodec as functions
from robustmoe.wrapping.codecs import IndexCodec as index
from robustmoe.wrapping.codecs import LogitsCodec as logits
from robustmoe.wrapping.codecs import PairCodec as pair
from robustmoe.wrapping.codecs import SlotsCodec as slots
from robustmoe.wrapping.codecs import TripleCodec as triple

__all__ = ["call", "dense", "dispatch", "functions", "index", "logits", "pair", "slots", "triple"]
