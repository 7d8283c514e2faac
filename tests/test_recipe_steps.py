"""What recipes that nobody timed say of a training step."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from recipe_steps import DENSE, FOLDER, ROOT, SHAPE, SMALL, Passes, line, passes, rendered, step, untimed
from robustmoe.costs import costs
from robustmoe.models import build_model

PGD2 = "pgd(linf(8/255), steps=2, step_size=5/255, start=near, keep=last)"


@pytest.mark.parametrize(
    "method, kind, part, expected",
    [
        ("standard", "dense", "network", Passes(1, 1, 0, 1)),
        ("at(pgd(linf(8/255), steps=7, keep=last))", "dense", "network", Passes(8, 1, 7, 1)),
        # TRADES: the clean answer that the attack leaves, two climbs, and clean and attacked images to train on.
        (f"trades({PGD2})", "dense", "network", Passes(5, 2, 2, 2)),
        (f"trades({PGD2})", "pathway", "router", Passes(5, 2, 2, 2)),
        # The same for the experts and for the router, whose gradient goes back through the experts.
        (f"advmoe({PGD2}, variant=bilevel)", "pathway", "network", Passes(10, 4, 6, 2)),
        (f"advmoe({PGD2}, variant=bilevel)", "pathway", "router", Passes(10, 4, 4, 2)),
    ],
)
def test_passes_are_those_of_the_method(method: str, kind: str, part: str, expected: Passes) -> None:
    assert passes(method, kind)[part] == expected


class Flops(TorchDispatchMode):
    """Torch's own counts, operation by operation. (Its counter wants a backward pass that fills ``grad``.)"""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (counted := flop_registry.get(func.overloadpacket)) is not None:
            self.total += counted(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize(
    "method, kind",
    [
        (f"trades({PGD2})", "dense"),
        (f"trades({PGD2})", "pathway"),
        (f"advmoe({PGD2}, variant=bilevel)", "pathway"),
        (f"advmoe({PGD2}, variant=released, alpha=6.0)", "pathway"),
    ],
)
def test_products_are_those_that_torch_counts(method: str, kind: str) -> None:
    """To 5 %: what comes before the first weight that moves is not gone back through, and is counted here."""
    model = build_model(SMALL.get(kind, DENSE).replace("resnet8(width=4)", "resnet8(width=32)"), 4, SHAPE)
    own = costs(model, 4, SHAPE)
    counted = passes(method, kind)
    expected = counted["network"].products(own.macs - own.router_macs, own.macs - own.router_macs)
    expected += counted["router"].products(own.router_macs, own.router_macs) if "router" in counted else 0.0
    with Flops() as flops:
        step(method, model, 8)
    assert flops.total / 2 / 8 == pytest.approx(expected, rel=0.05)


def test_products_by_hand() -> None:
    """Three climbs of 10 forward and 10 back in eval mode, one pass of 40 and twice 40 back in train mode."""
    assert Passes(4, 1, 3, 1).products(10, 40) == 3 * 20 + 40 + 2 * 40


def test_every_recipe_that_nobody_timed_says_what_a_step_costs() -> None:
    """Here, or in the words on its cost."""
    here = untimed()
    assert len(here) == len(list(FOLDER.glob("*.toml")))
    for path in here:
        text = path.read_text(encoding="utf-8")
        assert rendered(text, line(path)) == text, f"{path.name}: python -m tests.recipe_steps"
        assert len(line(path)) <= 120
    for path in set((ROOT / "recipes").rglob("*.toml")) - set(here):
        text = " ".join(path.read_text(encoding="utf-8").replace("\n#", " ").split())
        if "Not timed." in text:
            assert re.search(r"every image (\d+ times?|once) through (the|a) network", text), path.name


def test_a_line_that_is_not_true_is_seen() -> None:
    path = untimed()[0]
    text = path.read_text(encoding="utf-8")
    assert rendered(text.replace("TMAC", "GMAC"), line(path)) == text
    assert text.count("TMAC") == 1
