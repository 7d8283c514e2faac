"""What goes out and comes back: a run sent to an experiment tracker, or to the hub and from it."""

from __future__ import annotations

from pathlib import Path
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


def push(
    run: Annotated[str, "a run folder that was evaluated", Mark.POSITIONAL],
    repo: Annotated[str, "where to: OWNER/NAME", Mark.POSITIONAL],
    public: Annotated[bool, "make a new repository for all to see (default: a private one)"] = False,
) -> str:
    """Put a run's model on the Hugging Face hub, with a model card.

    Weights, what they are, and a card with what was measured and what speaks against it, in one commit. state.pt and
    the rows stay here. Needs the extra hub and a token (hf auth login).

    Example: robustmoe push runs/digits me/digits-pathway
    """
    import tempfile

    from robustmoe import hub
    from robustmoe.reporting.sharing import share

    hub.parsed(repo)
    folder = run_folder(run)
    with tempfile.TemporaryDirectory(prefix="robustmoe-") as place:
        shared = f"{place}/{folder.resolve().name}"
        share(folder, shared, repo)
        address = hub.push_folder(Path(shared), repo, public, f"robustmoe push {folder.resolve().name}")
    return f"pushed to {address}\nnext: robustmoe evaluate {hub.PREFIX}{repo}"


def pull(
    repo: Annotated[str, "what: OWNER/NAME, or OWNER/NAME@REVISION", Mark.POSITIONAL],
    out: Annotated[str | None, "the run folder (default: runs/hub-OWNER--NAME)"] = None,
    revision: Annotated[str | None, "a branch, a tag or a commit (default: main)"] = None,
) -> str:
    """Get a run that was pushed to the Hugging Face hub.

    Weights are checked, and nothing in them is executed. hub:OWNER/NAME stands for the run wherever a run does.

    Example: robustmoe pull me/digits-pathway --out runs/theirs
    """
    from robustmoe import hub

    folder = hub.pull(repo, out, revision)
    return f"run folder: {folder}\nnext: robustmoe evaluate {folder}"
