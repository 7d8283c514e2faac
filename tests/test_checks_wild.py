"""What the checks say of real packages: their routers are seen until they are wrapped. Of dense networks they say
nothing (``python -m benchmarks.looking_inside`` asks more of them).
"""

from __future__ import annotations

import pytest
import torch

import robustmoe as rm
from faulty_models import on
from robustmoe.data import Batch
from robustmoe.evaluation.checks import Subject
from robustmoe.evaluation.checks.hidden import hidden
from robustmoe.evaluation.checks.passing import gradient_off
from robustmoe.evaluation.checks.routers import random_module_quickly
from robustmoe.models import RoutedModel, as_routed
from wild_models import WILD, example, needed, quiet  # noqa: F401 (quiet is a fixture)

pytestmark = pytest.mark.wild

needed()


def asked(model: RoutedModel) -> Subject:
    x = example(8)
    return on(model.eval(), Batch(x, torch.zeros(8, dtype=torch.long), torch.arange(8)))


@pytest.mark.parametrize("name", sorted(WILD))
def test_a_router_of_a_real_package_is_seen_until_it_is_wrapped(name: str) -> None:
    model = WILD[name].make().eval()
    answer = hidden(asked(as_routed(model)))
    assert answer.status == "fail"
    assert f"rm.wrap(model, {{'{WILD[name].path}': " in answer.sentence
    wrapped = asked(rm.wrap(model, example=example(8)))
    assert [check(wrapped).status for check in (hidden, gradient_off)] == ["pass", "pass"]


def test_the_gate_that_draws_is_named() -> None:
    """Its output is a tuple, and the first plain tensor that differs comes out of an activation (R7 blamed that)."""
    answer = random_module_quickly(asked(as_routed(WILD["mixture-of-experts"].make().eval())))
    assert answer.status in ("fail", "warn"), "whether 2 passes differ is a matter of chance"
    assert answer.value == "module 'moe.gate' (Top2Gating)"


@pytest.mark.parametrize("kind", ["ViT", "Swin", "ConvNextV2", "Segformer", "Dinov2"])
def test_dense_networks_of_transformers(kind: str) -> None:
    from benchmarks.looking_inside import asked as surveyed
    from benchmarks.looking_inside import of_transformers

    row = surveyed(f"transformers {kind}", of_transformers()[f"transformers {kind}"])
    assert row["said"] == []
