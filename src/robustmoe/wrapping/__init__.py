"""Anybody's model as a routed one: its routers are found, its decisions recorded and replayed, and nothing of it is
changed.
"""

from __future__ import annotations

from robustmoe.wrapping.watching import Cut, Decision, Draw, Seen, watch

__all__ = ["Cut", "Decision", "Draw", "Seen", "watch"]
