"""What the four kinds of objective say of themselves in a header."""

from __future__ import annotations

from robustmoe.records import ObjectiveInfo

JOINT = ObjectiveInfo("joint", aims_at_router=True, aims_at_experts=True, needs_router=False)
EXPERTS_ONLY = ObjectiveInfo("experts_only", aims_at_router=False, aims_at_experts=True, needs_router=True)
ROUTER_ONLY = ObjectiveInfo("router_only", aims_at_router=True, aims_at_experts=False, needs_router=True)
ROUTING = ObjectiveInfo("routing", aims_at_router=True, aims_at_experts=True, needs_router=True)
