"""What is said of an epoch: the line of ``metrics.jsonl``, and the one for a person."""

from __future__ import annotations

from typing import TypedDict

from robustmoe.training.health import RouterLine


class EpochLine(TypedDict):
    """What ``metrics.jsonl`` says of an epoch."""

    epoch: int
    step: int
    seconds: float
    lr: dict[str, float]
    loss: dict[str, float]
    grad_norm: dict[str, float]
    train_accuracy: float | None
    val_clean: float
    val_robust: float | None
    val_certified: float | None
    val_n: int
    routers: dict[str, RouterLine]
    best: bool


def said(line: EpochLine, epochs: int) -> str:
    """Returns the epoch's line for a person."""
    accuracies = {
        "train": line["train_accuracy"],
        "val": line["val_clean"],
        "robust": line["val_robust"],
        "certified": line["val_certified"],
    }
    shown = [f"{kind} {100 * rate:.1f}%" for kind, rate in accuracies.items() if rate is not None]
    parts = [
        f"epoch {line['epoch']}/{epochs}",
        f"loss {' '.join(f'{loss:.3g}' for loss in line['loss'].values())}",
        *shown,
        f"{line['seconds']:.0f}s",
        *(["best"] if line["best"] else []),
    ]
    return "  ".join(parts)
