"""The command line: a verb is a plain function below, its flags are its arguments, and it returns what is printed.

Nothing heavy is imported before a verb runs, so ``--help`` is instant. A user's mistake is one line on stderr and
exit code 2; any other exception is a bug and shows its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from robustmoe import recipe as recipes
from robustmoe import spec
from robustmoe.errors import UserError, nearest
from robustmoe.flags import Verb, parse, summary
from robustmoe.progress import first_process, note

# ------------------------------------------------------------------------------------------------ verbs


def train(
    recipe: Annotated[str, "a recipe file, or the name of one in recipes/"],
    out: Annotated[str | None, "the run folder (default: runs/ and the recipe's name)"] = None,
    resume: Annotated[bool, "go on from the last checkpoint in the run folder"] = False,
    **fields: Any,
) -> str:
    """Train a model as a recipe says; every field of the recipe is also a flag."""
    settings = recipes.load(recipe, **fields)
    folder = Path(out) if out is not None else Path("runs") / recipes.resolve(recipe).stem
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file, not a run folder; choose another --out")
    if first_process() and not resume and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{str(folder)!r} is not empty: add --resume to go on, or choose another --out")
    from robustmoe import training

    training.train(settings, folder, resume)
    return f"run folder: {folder}\nnext: robustmoe evaluate {folder}"


def evaluate(
    run: Annotated[str | None, "a run folder (or give --model)"] = None,
    model: Annotated[str | None, "a model of your own instead of a run: my_file.py:make_model (with --data)"] = None,
    attack: Annotated[
        tuple[str, ...],
        "an attack, such as pgd(linf(8/255), steps=50) or autoattack(linf(8/255)); repeat for more "
        "(default: the recipe's)",
    ] = (),
    data: Annotated[str | None, "another data set than the run's"] = None,
    split: Annotated[Literal["test", "val"], "which images"] = "test",
    limit: Annotated[int | None, "at most this many images"] = None,
    batch_size: Annotated[int, "images at a time"] = 128,
    curve: Annotated[
        str, "radii of the accuracy curve, such as 0,2/255,4/255; auto = around the attack's; none = no curve"
    ] = "auto",
    precision: Annotated[
        Literal["strict", "fast", "fp32"],
        "what attacks climb: strict = a frozen fp32 copy, fast = the network in bf16 (every success is confirmed by "
        "the exact model), fp32 = the model itself",
    ] = "strict",
    seed: Annotated[int, "decides every random draw of the attacks"] = 0,
    device: Annotated[str, "cpu, cuda, cuda:1, mps; auto takes the best there is"] = "auto",
    out: Annotated[str | None, "folder of the rows (default: RUN/rows)"] = None,
) -> str:
    """Attack a trained model and measure what survives; images that are done are not done again."""
    if (run is None) == (model is None):
        raise UserError("evaluate needs one of a run folder and --model my_file.py:make_model; see --help")
    if model is not None and data is None:
        raise UserError(f"--model {model} needs images to be attacked on; expected --data, such as --data digits")
    for text in attack:
        spec.canonical(text)
    radii = {"auto": None, "none": ()}[curve] if curve in ("auto", "none") else spec.numbers(curve)
    common: dict[str, Any] = {
        "attacks": attack,
        "split": split,
        "limit": limit,
        "batch_size": batch_size,
        "precision": precision,
        "curve": radii,
        "seed": seed,
        "device": device,
    }
    rows = None if out is None else Path(out)
    if run is not None:
        folder = _run_folder(run)
        from robustmoe import records
        from robustmoe.evaluation import evaluate_run
        from robustmoe.reporting import summary_table

        results = evaluate_run(folder, data=data, out=rows, **common)
        return summary_table(results, records.read_audit(folder))
    assert model is not None
    assert data is not None
    from robustmoe import user_model
    from robustmoe.evaluation import evaluate_model
    from robustmoe.reporting import summary_table

    own = user_model.load(model)
    rows = rows or Path("runs") / f"{Path(model.partition(':')[0]).stem}-{model.partition(':')[2]}" / "rows"
    note(f"rows: {rows}")
    return summary_table(evaluate_model(own, data, name=model, out=rows, **common))


def check(
    run: Annotated[str, "a run folder"],
    attack: Annotated[
        tuple[str, ...], "an attack whose number is in question; repeat for more (default: the recipe's)"
    ] = (),
    limit: Annotated[int, "images to check on"] = 64,
    only: Annotated[str, "ids of some checks, such as G2,R4 (default: all)"] = "",
    seed: Annotated[int, "decides every random draw"] = 0,
    device: Annotated[str, "cpu, cuda, cuda:1, mps; auto takes the best there is"] = "auto",
) -> str:
    """Ask every check whether this model's robust accuracy can be believed; minutes, not hours."""
    folder = _run_folder(run)
    for text in attack:
        spec.canonical(text)
    ids = [key.strip() for key in only.split(",") if key.strip()]
    from robustmoe import records
    from robustmoe.evaluation.checks.run import check_run
    from robustmoe.reporting.card import card

    audit = check_run(folder, attacks=attack, limit=limit, device=device, seed=seed, only=ids)
    if ids:
        return card([found for found in audit.checks if found.id in ids])
    records.write_audit(folder, audit)
    return f"{card(audit.checks)}\nwritten to {records.audit_path(folder)}; analyze and report show it"


def dissect(
    run: Annotated[str, "a run folder"],
    attack: Annotated[
        str | None,
        "a pgd on the whole model, from which all attacks are made, such as pgd(linf(8/255), steps=50) (default: 20 "
        "steps at the threat of the run)",
    ] = None,
    limit: Annotated[int, "images to ask about"] = 500,
    batch_size: Annotated[int, "images at a time"] = 128,
    seed: Annotated[int, "decides every random draw of the attacks"] = 0,
    device: Annotated[str, "cpu, cuda, cuda:1, mps; auto takes the best there is"] = "auto",
) -> str:
    """Take a routed model apart: does its router give way first, or its experts?"""
    folder = _run_folder(run)
    if attack is not None:
        spec.canonical(attack)
    from robustmoe import records
    from robustmoe.evaluation import dissect_run
    from robustmoe.reporting import dissection_table

    found = dissect_run(folder, attack=attack, limit=limit, batch_size=batch_size, seed=seed, device=device)
    return f"{dissection_table(found)}\n\nwritten to {records.dissection_path(folder)}; report shows it"


def lipschitz(
    run: Annotated[str, "a run folder"],
    attack: Annotated[
        str | None,
        "the attack whose changes are split, and whose norm and eps radii are told in, such as pgd(linf(8/255), "
        "steps=50) (default: 20 steps at the threat of the run)",
    ] = None,
    limit: Annotated[int, "images to measure on"] = 64,
    batch_size: Annotated[int, "images at a time"] = 32,
    seed: Annotated[int, "decides every random draw"] = 0,
    device: Annotated[str, "cpu, cuda, cuda:1, mps; auto takes the best there is"] = "auto",
) -> str:
    """Measure how far the model can move, through its experts and its routers: slopes, radii, jumps, loads."""
    folder = _run_folder(run)
    if attack is not None:
        spec.canonical(attack)
    from robustmoe import records
    from robustmoe.evaluation import lipschitz_run
    from robustmoe.reporting import lipschitz_table

    found = lipschitz_run(folder, attack=attack, limit=limit, batch_size=batch_size, seed=seed, device=device)
    return f"{lipschitz_table(found)}\n\nwritten to {records.lipschitz_path(folder)}; report shows it"


def sweep(
    run: Annotated[str, "a run folder"],
    attack: Annotated[
        tuple[str, ...],
        "an attack, made again at every eps; repeat for more (default: vmoe_pgd(linf(8/255)), the paper's, weak, and "
        "pgd(linf(8/255), steps=50, restarts=2))",
    ] = (),
    eps: Annotated[
        str, "radii in pixels of [0, 1]; paper = 1/255 to 20/255 and six below 1/255, as in arXiv 2210.10253"
    ] = "1/255,2/255,4/255,8/255,12/255,16/255",
    draws: Annotated[int, "draws of random experts; 0 = nothing about redundancy"] = 5,
    limit: Annotated[int, "images to ask about"] = 500,
    batch_size: Annotated[int, "images at a time"] = 128,
    seed: Annotated[int, "decides every random draw"] = 0,
    device: Annotated[str, "cpu, cuda, cuda:1, mps; auto takes the best there is"] = "auto",
) -> str:
    """Attack at every eps: accuracy and routes, weak beside strong; and how redundant the experts are."""
    folder = _run_folder(run)
    for text in attack:
        spec.canonical(text)
    from robustmoe import records
    from robustmoe.evaluation import sweep_run
    from robustmoe.reporting import sweep_table

    found = sweep_run(
        folder, attacks=attack, eps=eps, draws=draws, limit=limit, batch_size=batch_size, seed=seed, device=device
    )
    return f"{sweep_table(found)}\n\nwritten to {records.sweep_path(folder)}; report shows it"


def blend(
    runs: Annotated[tuple[str, ...], "a standard and a robust run, in this order; or one run of a dual model"],
    alphas: Annotated[
        str, "shares of the robust half, such as 0,0.5,0.9,1; 0..1 = 0,0.25,0.5,0.6,0.7,0.8,0.9,0.95,1"
    ] = "0..1",
    attack: Annotated[
        str | None,
        "a pgd on the whole model, from which all attacks are made, such as pgd(linf(8/255), steps=50) (default: 20 "
        "steps at the threat of the robust run)",
    ] = None,
    mix: Annotated[
        Literal["probabilities", "logits"] | None, "what is mixed (default: as the dual run does, else probabilities)"
    ] = None,
    sharpen: Annotated[
        str | None, "what is done to the robust half first, such as scaled(2) or nuts (default: as the dual run does)"
    ] = None,
    clean: Annotated[
        float | None, "a clean accuracy, such as 0.9; the largest alpha that has it on validation is chosen"
    ] = None,
    limit: Annotated[int, "test images to ask about"] = 500,
    batch_size: Annotated[int, "images at a time"] = 128,
    seed: Annotated[int, "decides every random draw of the attacks"] = 0,
    device: Annotated[str, "cpu, cuda, cuda:1, mps; auto takes the best there is"] = "auto",
    out: Annotated[str | None, "the run folder of the blend (default: runs/blend- and the names of the runs)"] = None,
) -> str:
    """Blend a standard and a robust run at every alpha, and attack each: what does accuracy cost in robustness?"""
    if len(runs) > 2:
        raise UserError(f"blend takes two runs, or one of a dual model; got {len(runs)}")
    folders = [_run_folder(run) for run in runs]
    from robustmoe.evaluation import blend_run
    from robustmoe.reporting import blend_table

    found = blend_run(
        *folders,
        alphas=alphas,
        attack=attack,
        mix=mix,
        sharpen=sharpen,
        clean=clean,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        device=device,
        out=out,
    )
    where = found.header.run
    return f"{blend_table(found)}\n\nrun folder: {where}\nnext: robustmoe evaluate {where}; report shows the curve"


def analyze(run: Annotated[str, "a run folder that was evaluated"]) -> str:
    """Print the tables of an evaluated run."""
    folder = _run_folder(run)
    from robustmoe import records
    from robustmoe.reporting import summary_table

    files = sorted(f for f in (folder / "rows").glob("*.jsonl") if not f.name.endswith(".examples.jsonl"))
    if not files:
        raise UserError(f"{run!r} has no rows yet; robustmoe evaluate {run} makes them")
    return summary_table([records.read(f) for f in files], records.read_audit(folder))


def report(
    runs: Annotated[tuple[str, ...], "run folders that were evaluated"],
    out: Annotated[str, "the file to write"] = "report.html",
) -> str:
    """Write one self-contained HTML report about one or more evaluated runs."""
    folders = [_run_folder(run) for run in runs]
    from robustmoe.reporting import report as write

    return str(write(folders, Path(out)))


def theory(
    experiments: Annotated[tuple[str, ...], "X1, X1b, X1c, X2 to X11 (default: all, in about a minute)"] = (),
    seed: Annotated[int, "decides every random draw"] = 0,
    out: Annotated[str, "folder of the figures"] = "runs/theory",
) -> str:
    """Check the theory of robust MoEs on synthetic data: expected beside measured, with figures."""
    from robustmoe.reporting.theory import draw, theory_table
    from robustmoe.theory import run

    found = run(experiments, seed)
    figures = draw(found, out)
    return "\n".join([theory_table(found), "", *(f"figure: {path}" for path in figures)]).rstrip()


def list_names(
    kind: Annotated[str | None, "model, attack, data, ... (default: all)"] = None,
    costs: Annotated[
        bool, "of the models: parameters and multiply-adds of every architecture (some ten seconds)"
    ] = False,
) -> str:
    """List what can be named: models, attacks, data sets, methods, with their arguments."""
    if costs:
        if kind not in ("model", "models"):
            given = "no kind" if kind is None else repr(kind)
            raise UserError(f"--costs are those of the models; got {given}; write: robustmoe list models --costs")
        from robustmoe import costs as counted

        return counted.table(counted.rows())
    if kind is None:
        kinds = list(spec.TABLES)
    else:
        kinds = [k for k in spec.TABLES if kind in (k, _plural(k))]
        if not kinds:
            raise UserError(f"unknown kind {kind!r}; {nearest(kind, spec.TABLES)}")
    blocks = []
    for k in kinds:
        rows = [f"  {signature}\n      {line}" if line else f"  {signature}" for _, signature, line in spec.describe(k)]
        blocks.append("\n".join([_plural(k), *rows]))
    return "\n\n".join(blocks)


def demo(out: Annotated[str, "folder of the demo"] = "runs/demo") -> str:
    """Train, attack and report on real digits that need no download."""
    from robustmoe import demo as demonstration

    return f"report: {demonstration.demo(Path(out))}"


VERBS: dict[str, Verb] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "check": check,
    "dissect": dissect,
    "lipschitz": lipschitz,
    "sweep": sweep,
    "blend": blend,
    "analyze": analyze,
    "report": report,
    "theory": theory,
    "list": list_names,
}

_STOPPED = {
    "train": "stopped; go on with --resume",
    "evaluate": "stopped; the same command goes on where it was",
    "dissect": "stopped; the same command goes on where it was",
    "lipschitz": "stopped; the same command goes on where it was",
    "sweep": "stopped; the same command goes on where it was",
    "blend": "stopped; the same command goes on where it was",
}


def _plural(kind: str) -> str:
    return kind if kind == "data" else f"{kind}s"


def _run_folder(run: str) -> Path:
    folder = Path(run)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{run!r} is a file, not a run folder")
    near = {str(f.parent) for place in (folder.parent, Path("runs")) for f in place.glob("*/config.json")}
    raise UserError(f"there is no run folder {run!r}" + (f"; {nearest(run, near)}" if near else ""))


# ------------------------------------------------------------------------------------------------ main


class _Terminated(BaseException):
    """SIGTERM came: unwind, say how to resume, leave."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM unwinds the stack, so that what is being written is finished or dropped."""

    def stop(number: int, frame: Any) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 and 143 for a stop."""
    argv = list(sys.argv[1:] if argv is None else argv)
    stopped = _STOPPED.get(argv[0], "stopped") if argv else "stopped"
    try:
        with _terminable() if argv[:1] and argv[0] in _STOPPED else contextlib.nullcontext():
            text = _run(argv)
        if first_process():
            print(text, flush=True)
        return 0
    except SystemExit as e:  # --help
        return e.code if isinstance(e.code, int) else 0
    except UserError as e:
        return _fail(str(e), 2)
    except (KeyboardInterrupt, _Terminated) as e:
        code = 143 if isinstance(e, _Terminated) else 130
        return _fail(stopped, code) if first_process() else code
    except BrokenPipeError:  # the reader has seen enough; point stdout elsewhere, so that the exit is quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if e.errno not in _NO_PLACE:
            raise
        return _fail(f"{e.strerror}: {e.filename}" if e.filename else str(e.strerror), 2)


def _fail(message: str, code: int) -> int:
    print(f"robustmoe: {message}", file=sys.stderr)
    return code


def _run(argv: Sequence[str]) -> str:
    if not argv or argv[0] in ("-h", "--help", "help"):
        return _help()
    if argv[0] == "--version":
        return f"robustmoe {_version()}"
    if argv[0] not in VERBS:
        raise UserError(f"unknown verb {argv[0]!r}; {nearest(argv[0], VERBS)}")
    return VERBS[argv[0]](**parse(argv[0], VERBS[argv[0]], argv[1:]))


def _version() -> str:
    from importlib.metadata import version

    return version("robustmoe")


def _help() -> str:
    verbs = "\n".join(f"  {name:10}{summary(verb)}" for name, verb in VERBS.items())
    return (
        "usage: robustmoe VERB ...\n\n"
        "Adversarially robust Mixture-of-Experts vision models: train, attack, evaluate, report, router included.\n\n"
        f"{verbs}\n\n"
        "robustmoe VERB --help lists the arguments of a verb; robustmoe --version."
    )


if __name__ == "__main__":
    sys.exit(main())
