"""What the command line can do: a verb is a plain function, its flags are its arguments, and it returns what is
printed. Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from robustmoe import hub, spec, zoo
from robustmoe import recipe as recipes
from robustmoe.errors import UserError
from robustmoe.flags import Verb
from robustmoe.listing import list_names
from robustmoe.options import (
    AuditOptions,
    BlendOptions,
    CertifyOptions,
    CheckOptions,
    DissectOptions,
    EvaluateOptions,
    EvaluateTarget,
    ImportOptions,
    LipschitzOptions,
    Mark,
    OwnData,
    SweepOptions,
    Target,
)
from robustmoe.outgoing import pull, push, track
from robustmoe.progress import first_process, note, show
from robustmoe.reading import analyze, compare, merge, report
from robustmoe.runs import run_folder

DryRun = Annotated[bool, "say in seconds how long it would take and how much memory, part by part, and write nothing"]


def train(
    recipe: Annotated[str, "a recipe file, or the name of one in recipes/", Mark.POSITIONAL],
    fields: Annotated[Mapping[str, Any], recipes.Recipe] = {},
    out: Annotated[str | None, "the run folder (default: runs/ and the recipe's name)"] = None,
    resume: Annotated[bool, "go on from the last checkpoint in the run folder"] = False,
    seeds: Annotated[
        str | None, "several seeds, such as 0..4 or 0,3,7: one training each, in OUT-seed0, OUT-seed3, ..."
    ] = None,
    dry_run: DryRun = False,
) -> str:
    """Train a model as a recipe says; each field of the recipe is a flag.

    Example: robustmoe train digits_hard_moe --epochs 2 --out runs/digits
    """
    settings = recipes.load_recipe(recipe, **fields)
    folder = Path(out) if out is not None else Path("runs") / recipes.resolve(recipe).stem
    if seeds is not None and "seed" in fields:
        raise UserError("--seed and --seeds both say the seed; expected one of them")
    trainings = {folder: settings} if seeds is None else recipes.seeded(settings, folder, seeds)
    from robustmoe.records import check_folder

    begun = {where: resume and (seeds is None or (where / "config.json").is_file()) for where in trainings}
    for where, goes_on in begun.items():
        if first_process():
            check_folder(where, goes_on)
    if dry_run:
        from robustmoe.forecasting import forecast

        several = "" if seeds is None else f"\nfor each of {len(trainings)} seeds"
        done = "\nsteps that are done already are not taken off" if resume else ""
        return f"{forecast(settings)}{several}{done}"
    from robustmoe import training

    for where, each in trainings.items():
        training.train(each, where, resume=begun[where])
    places = "\n".join(f"run folder: {where}" for where in trainings)
    then = "" if seeds is None else f", for each of them; then robustmoe compare {folder}-seed*"
    return f"{places}\nnext: robustmoe evaluate {next(iter(trainings))}{then}"


def evaluate(target: EvaluateTarget, options: EvaluateOptions, dry_run: DryRun = False) -> str:
    """Attack a model and measure what survives.

    Images that are done are not done again.

    Example: robustmoe evaluate runs/digits --attack "pgd(linf(0.1), steps=50)"
    """
    if dry_run:
        return _forecast_of(target, options)
    folder = _folder(target)
    own = target.model is not None
    from robustmoe import records
    from robustmoe.evaluation import evaluate_run
    from robustmoe.reporting import summary_table

    out = None if own or target.out is None else Path(target.out) / "rows"
    results = evaluate_run(folder, data=None if own else target.data, out=out, options=options)
    return summary_table(results, records.Audit.read(folder))


def _forecast_of(target: Target, options: EvaluateOptions | CertifyOptions) -> str:
    """What a measurement would take. The run folder of a model of a user's own is made where it goes again."""
    with tempfile.TemporaryDirectory(prefix="robustmoe-") as place:
        own = target.model is not None
        folder = _folder(dataclasses.replace(target, out=f"{place}/run") if own else target, told=False)
        from robustmoe.forecasting import forecast

        data: dict[str, Any] = {} if own or not isinstance(options, EvaluateOptions) else {"data": target.data}
        return str(forecast(folder, **data, options=options))


def audit(
    model: Annotated[str, "a model of your own, my_file.py:make_model, or a run folder", Mark.POSITIONAL],
    options: AuditOptions,
    data: Annotated[str | None, "the data set that it is attacked on, such as digits (of a run: its own)"] = None,
    out: Annotated[str | None, "the run folder (default: runs/ and the names of file and model)"] = None,
) -> str:
    """Audit a model made elsewhere: find its routers, attack, report.

    Checks, AutoAttack with the attacks on the routing, and a dissection, in one folder. What is done is not done again.

    Example: robustmoe audit my_file.py:make_model --data digits --threat "linf(0.1)"
    """
    is_run = model.startswith((zoo.PREFIX, hub.PREFIX)) or Path(model).is_dir()
    if is_run and (data or out):
        raise UserError("--data and --out go with a model of your own; a run has its own data and folder")
    if not is_run and data is None:
        raise UserError(f"{model} needs images to be attacked on; expected --data, such as --data digits")
    from robustmoe import records
    from robustmoe.evaluation.auditing import audit as made
    from robustmoe.evaluation.own_run import default_folder
    from robustmoe.reporting import report as write
    from robustmoe.reporting import report_files, summary_table

    target = str(run_folder(model)) if is_run else model
    folder = Path(target) if is_run else Path(out or default_folder(spec.canonical(model)))
    report_files(folder / "report.html")  # not after the work: whether it can be written
    done = made(target, data, out=None if is_run else folder, options=options)
    page = write([done.folder], done.folder / "report.html")
    lines = [summary_table(done.results, records.Audit.read(done.folder)), "", f"report: {page}"]
    if done.unwrapped:
        lines.insert(1, f"routing was seen, but not wrapped: {done.unwrapped}")
    return "\n".join(lines)


def check(target: Target, options: CheckOptions) -> str:
    """Ask every check whether a robust accuracy can be believed.

    It takes minutes, not hours.

    Example: robustmoe check runs/digits --only G2,R4
    """
    folder = _folder(target)
    from robustmoe import records
    from robustmoe.evaluation.checks.run import check_run
    from robustmoe.reporting.card import card

    if options.only:
        return card([answer for answer in check_run(folder, options=options).checks if answer.id in options.only])
    with records.writing(folder):
        audit = check_run(folder, options=options)
        try:
            audit.write(folder)
        except UserError:
            show(card(audit.checks), sys.stdout)  # of minutes of work, which are not lost with the file
            raise
    return f"{card(audit.checks)}\nwritten to {records.Audit.path(folder)}; analyze and report show it"


def import_weights(
    file: Annotated[str, "the weights: a file of torch, safetensors, numpy or flax", Mark.POSITIONAL],
    options: ImportOptions,
    as_: Annotated[str | None, "the model they are of, such as vit_moe(size=vmoe_small, patch=32) (needed)"] = None,
    out: Annotated[str | None, "the run folder (default: runs/ and the file's name)"] = None,
) -> str:
    """Make a run folder of weights that other code trained.

    Nothing in the file is executed. What was put where is printed; a guess is offered, and never taken.

    Example: robustmoe import wrn.pt --as wrn_28_10 --data cifar10
    """
    if as_ is None:
        raise UserError(f"{file} does not say which model it is of; expected --as, such as --as resnet18")
    folder = Path(out) if out is not None else Path("runs") / Path(file).name.partition(".")[0]
    from robustmoe.weights import import_run

    imported = import_run(file, as_, out=folder, options=options)
    following = f"audit {folder}" if options.data is not None else f"evaluate {folder} --data DATA"
    images = "" if options.inputs else f"\nimages: {imported.inputs}, as this layout's nets take them; else --inputs"
    return f"{imported.loaded}{images}\nrun folder: {folder}\nnext: robustmoe {following}"


def export(
    run: Annotated[str, "a run folder", Mark.POSITIONAL],
    out: Annotated[
        str | None, "a file: .safetensors, .pt, .npz or .onnx; without an ending a folder with a model card (needed)"
    ] = None,
    layout: Annotated[
        str | None,
        "whose names and shapes, see robustmoe list layouts (default: as it was imported, else ours)",
    ] = None,
) -> str:
    """Write a run's model for other code.

    Weights in other code's layout, an ONNX graph that is compared with torch, or a folder to share, whose model card
    has what was measured.

    Example: robustmoe export runs/digits --out digits.onnx
    """
    if out is None:
        raise UserError("expected --out: a file such as model.pt or model.onnx, or a folder to share")
    folder = run_folder(run)
    if not Path(out).suffix:
        if layout is not None:
            raise UserError("a folder to share holds a run, in our own layout; leave --layout out, or name a file")
        from robustmoe.reporting.sharing import share

        return "\n".join(str(path) for path in share(folder, out))
    from robustmoe.weights import export_run

    return export_run(folder, out, layout)


def dissect(target: Target, options: DissectOptions) -> str:
    """Take a routed model apart: do its experts or its router break first?

    Example: robustmoe dissect runs/digits --limit 200
    """
    folder = _folder(target)
    from robustmoe import records
    from robustmoe.evaluation import dissect_run

    record = dissect_run(folder, options=options)
    return f"{record}\n\nwritten to {records.Dissection.path(folder)}; report shows it"


def lipschitz(target: Target, options: LipschitzOptions) -> str:
    """Measure how far a model can move through its experts and routers.

    Example: robustmoe lipschitz runs/digits --limit 32
    """
    folder = _folder(target)
    from robustmoe import records
    from robustmoe.evaluation import lipschitz_run

    record = lipschitz_run(folder, options=options)
    return f"{record}\n\nwritten to {records.Lipschitz.path(folder)}; report shows it"


def certify(target: Target, options: CertifyOptions, dry_run: DryRun = False) -> str:
    """Prove how far no attack can change an answer, or what hinders it.

    Images that are done stay done.

    Example: robustmoe certify runs/digits --certifier "bounds(linf(0.1))"
    """
    if dry_run:
        return _forecast_of(target, options)
    folder = _folder(target)
    from robustmoe import records
    from robustmoe.evaluation import certify_run
    from robustmoe.reporting import text

    certified = certify_run(folder, options=options)
    results = [records.read(path) for path in records.rows_files(folder)]
    tables = "\n\n".join(text(record, results) for record in certified)
    then = "report shows it" if options.shard is None else "robustmoe merge joins the shards"
    return f"{tables}\n\nwritten to {options.folder(folder) / 'certificates'}; {then}"


def sweep(target: Target, options: SweepOptions) -> str:
    """Attack at every eps, weakly and strongly; are the experts redundant?

    Example: robustmoe sweep runs/digits --eps 0.05,0.1,0.2 --draws 0
    """
    folder = _folder(target)
    from robustmoe import records
    from robustmoe.evaluation import sweep_run

    record = sweep_run(folder, options=options)
    return f"{record}\n\nwritten to {records.Sweep.path(folder)}; report shows it"


def blend(
    runs: Annotated[
        tuple[str, ...], "a standard and a robust run, in this order; or one run of a dual model", Mark.POSITIONAL
    ] = (),
    *,
    options: BlendOptions,
    models: Annotated[
        tuple[str, ...],
        "a model of your own in the place of a run: my_file.py:make_model (with --data); after the runs",
    ] = (),
    data: OwnData = None,
    out: Annotated[str | None, "the run folder of the blend (default: runs/blend- and the names of the runs)"] = None,
) -> str:
    """Blend a standard and a robust run: what does robustness cost?

    Every blend is attacked as the model that it is.

    Example: robustmoe blend runs/standard runs/robust --alphas 0,0.5,0.9,1
    """
    if not 1 <= len(runs) + len(models) <= 2:
        raise UserError(f"blend takes two runs or models, or one run of a dual model; got {len(runs) + len(models)}")
    folders = [run_folder(run) for run in runs] + [_folder(Target(model=model, data=data)) for model in models]
    from robustmoe.evaluation import blend_run

    record = blend_run(*folders, options=options, out=out)
    where = record.header.run
    return f"{record}\n\nrun folder: {where}\nnext: robustmoe evaluate {where}; report shows the curve"


def theory(
    experiments: Annotated[
        tuple[str, ...], "X1, X1b, X1c, X2 to X11 (default: all, in about a minute)", Mark.POSITIONAL
    ] = (),
    seed: Annotated[int, "decides every random draw"] = 0,
    out: Annotated[str, "folder of the figures"] = "runs/theory",
) -> str:
    """Check the theory of robust MoEs on synthetic data, with figures.

    Example: robustmoe theory X1 X2
    """
    from robustmoe.reporting.theory import draw, theory_table
    from robustmoe.theory import run

    done = run(experiments, seed)
    page = draw(done, out)
    return theory_table(done) + ("" if page is None else f"\n\nfigures: {page}")


def demo(
    out: Annotated[str, "folder of the demo"] = "runs/demo",
    seed: Annotated[int, "decides every random draw of its trainings"] = 1,
) -> str:
    """Train, attack, certify and report on digits that need no download.

    Example: robustmoe demo --out runs/demo
    """
    from robustmoe import demo as demonstration

    return f"report: {demonstration.demo(Path(out), seed)}"


VERBS: dict[str, Verb] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "audit": audit,
    "import": import_weights,
    "export": export,
    "check": check,
    "dissect": dissect,
    "lipschitz": lipschitz,
    "certify": certify,
    "sweep": sweep,
    "blend": blend,
    "merge": merge,
    "analyze": analyze,
    "report": report,
    "compare": compare,
    "track": track,
    "push": push,
    "pull": pull,
    "theory": theory,
    "list": list_names,
}

GO_ON = "stopped; the same command goes on where it was"
STOPPED = {
    "train": "stopped; go on with --resume",
    **dict.fromkeys(("evaluate", "audit", "dissect", "lipschitz", "certify", "sweep", "blend", "track"), GO_ON),
}


def _folder(target: Target, told: bool = True) -> Path:
    """The run folder that is measured: the one that was named, or that of a model of a user's own."""
    if (target.run is None) == (target.model is None):
        raise UserError("expected one of a run folder and --model my_file.py:make_model; see --help")
    if target.run is not None:
        if not isinstance(target, EvaluateTarget) and (target.data or target.out):
            raise UserError("--data and --out go with --model; a run has its own data and folder")
        return run_folder(target.run)
    assert target.model is not None
    if target.data is None:
        raise UserError(f"--model {target.model} needs images; expected --data, such as --data digits")
    from robustmoe.evaluation.own_run import own_run

    folder = own_run(target.model, target.data, target.out)
    if told:
        note(f"run folder: {folder}")
    return folder
