"""What the command line can do: a verb is a plain function, its flags are its arguments, and it returns what is
printed. Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from robustmoe import recipe as recipes
from robustmoe import spec
from robustmoe.errors import UserError, nearest
from robustmoe.flags import Verb
from robustmoe.progress import first_process, note


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
        return summary_table(results, records.Audit.read(folder))
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
    audit.write(folder)
    return f"{card(audit.checks)}\nwritten to {records.Audit.path(folder)}; analyze and report show it"


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
    return f"{dissection_table(found)}\n\nwritten to {records.Dissection.path(folder)}; report shows it"


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
    return f"{lipschitz_table(found)}\n\nwritten to {records.Lipschitz.path(folder)}; report shows it"


def certify(
    run: Annotated[str, "a run folder"],
    certifier: Annotated[
        tuple[str, ...],
        "what proves it, such as bounds(linf(2/255)) or smoothing(sigma=0.25); repeat for more (default: bounds at the "
        "threat of the run)",
    ] = (),
    limit: Annotated[int, "images to certify"] = 500,
    batch_size: Annotated[int, "images at a time"] = 32,
    seed: Annotated[int, "decides every random draw"] = 0,
    device: Annotated[str, "cpu, cuda, cuda:1, mps; auto takes the best there is"] = "auto",
) -> str:
    """Prove how far no attack can change what the model says, and say what stands in the way; images done stay done."""
    folder = _run_folder(run)
    for text in certifier:
        spec.canonical(text)
    from robustmoe import records
    from robustmoe.evaluation import certify_run
    from robustmoe.reporting import certificates_table

    found = certify_run(folder, certifiers=certifier, limit=limit, batch_size=batch_size, seed=seed, device=device)
    results = [records.read(path) for path in records.rows_files(folder)]
    tables = "\n\n".join(certificates_table(one, results) for one in found)
    return f"{tables}\n\nwritten to {folder / 'certificates'}; report shows it"


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
    return f"{sweep_table(found)}\n\nwritten to {records.Sweep.path(folder)}; report shows it"


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
    certifier: Annotated[
        str | None,
        "what proves a floor under every alpha, at the attack's eps, such as bounds(linf(2/255), search=0) "
        "(default: none)",
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
    if certifier is not None:
        spec.canonical(certifier)
    from robustmoe.evaluation import blend_run
    from robustmoe.reporting import blend_table

    found = blend_run(
        *folders,
        alphas=alphas,
        attack=attack,
        mix=mix,
        sharpen=sharpen,
        clean=clean,
        certified=certifier,
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

    files = records.rows_files(folder)
    if not files:
        raise UserError(f"{run!r} has no rows yet; robustmoe evaluate {run} makes them")
    return summary_table([records.read(f) for f in files], records.Audit.read(folder))


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


def demo(
    out: Annotated[str, "folder of the demo"] = "runs/demo",
    seed: Annotated[int, "decides every random draw of its trainings"] = 1,
) -> str:
    """Train, attack, certify and report on real digits that need no download."""
    from robustmoe import demo as demonstration

    return f"report: {demonstration.demo(Path(out), seed)}"


VERBS: dict[str, Verb] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "check": check,
    "dissect": dissect,
    "lipschitz": lipschitz,
    "certify": certify,
    "sweep": sweep,
    "blend": blend,
    "analyze": analyze,
    "report": report,
    "theory": theory,
    "list": list_names,
}

GO_ON = "stopped; the same command goes on where it was"
STOPPED = {
    "train": "stopped; go on with --resume",
    "evaluate": GO_ON,
    "dissect": GO_ON,
    "lipschitz": GO_ON,
    "certify": GO_ON,
    "sweep": GO_ON,
    "blend": GO_ON,
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
