"""What is printed outside the records' tables (tests/test_golden.py) and `list` fits 80 columns too."""

from __future__ import annotations

from robustmoe import costs
from robustmoe.records import Check
from robustmoe.reporting.card import card
from robustmoe.training.lines import EpochLine, said


def test_an_epoch_fits_a_line() -> None:
    line: EpochLine = {
        "epoch": 100, "step": 3900, "seconds": 234.0, "lr": {}, "loss": {"experts": 1.234, "router": 0.988},
        "grad_norm": {}, "train_accuracy": 0.512, "val_clean": 0.823, "val_robust": 0.412, "val_certified": None,
        "val_n": 1000, "routers": {}, "best": True,
    }  # fmt: skip
    assert said(line, 100) == "epoch 100/100  loss 1.23 0.988  train 51.2%  val 82.3%  robust 41.2%  234s  best"
    assert len(said(line, 100)) == 80


def test_every_architecture_s_costs_fit() -> None:
    large = costs.Costs(300_000_000, 272_474, 88_888_888_888, 2_000_000_000)
    names = [(size, classes, name) for size, (classes, every) in costs.TABLE.items() for name in every]
    rows = [
        costs.ArchitectureCosts(name, (3, size, size), classes, size, large, large, large)
        for size, classes, name in names
    ]
    assert len(rows) > 10
    assert max(len(line) for line in costs.table(rows).splitlines()) <= 80


def test_a_card_of_checks_fits() -> None:
    long = "A sentence of many words that goes on and on, " * 5 + "to its end."
    checks = [Check(f"G{n}", "a name of some length", status, {"a": 1}, long) for n, status in enumerate(
        ("pass", "warn", "fail", "not run"))]  # fmt: skip
    assert max(map(len, card(checks).splitlines())) <= 80
