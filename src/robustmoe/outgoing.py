"""What goes out: a run sent to an experiment tracker."""

from __future__ import annotations

from typing import Annotated, Literal

from robustmoe.options import Mark
from robustmoe.runs import run_folder


def track(
    runs: Annotated[tuple[str, ...], "run folders, also of a training that is at work", Mark.POSITIONAL],
    to: Annotated[
        Literal["tensorboard", "mlflow", "wandb"], "the tracker; each is an extra: pip install 'robustmoe[wandb]'"
    ] = "tensorboard",
    out: Annotated[
        str | None, "the folder to write to, or the address of an MLflow server (default: runs/ and the tracker's name)"
    ] = None,
    follow: Annotated[bool, "wait for the runs to begin; go on until nobody writes in their folders any more"] = False,
) -> str:
    """Send runs to TensorBoard, MLflow or Weights & Biases.

    The numbers of each epoch, the loads of the experts, and what was measured. What was sent is not sent again.

    Example: robustmoe track runs/digits --to tensorboard --follow
    """
    folders = [run_folder(run, begun=not follow) for run in runs]
    from robustmoe.reporting.tracking import track as sent

    return sent(folders, to, out, follow)
