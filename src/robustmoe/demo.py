"""The main job from end to end, on the digits that come with scikit-learn: train, attack, certify, report.

No download.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from robustmoe.errors import UserError
from robustmoe.progress import note
from robustmoe.recipe import Recipe
from robustmoe.records import contents, writing

EPS = "linf(0.1)"

ROUTED = Recipe(
    model="pathway(resnet8(width=16), experts=2, ratio=0.5, router=small_cnn, standardise=True)",
    data="digits",
    method=f"at(pgd({EPS}, steps=3, keep=last), balance=0.1)",
    schedule="one_cycle",
    epochs=8,
    batch_size=64,
    seed=1,
    val_attack=f"pgd({EPS}, steps=10)",
    threads=1,
    attacks=(
        f"pgd({EPS}, steps=20)",
        f"pgd({EPS}, steps=20, objective=experts_only)",
        f"pgd({EPS}, steps=20, objective=router_only)",
        f"expert_transition({EPS}, steps=20)",
    ),
)
"""A MoE-CNN of two pathways, adversarially trained; attacked as a whole, by its experts alone, by its router alone, and
by steering into each expert's region.
"""

DENSE = dataclasses.replace(ROUTED, model="resnet8(width=16)", method=f"at(pgd({EPS}, steps=3, keep=last))", attacks=())
"""Its dense twin: the backbone alone, the same data, attack and schedule. It meets as many attacks: `evaluate_run`'s
default of a dense model."""

PROVABLE = Recipe(
    model=(
        "ensemble(conv_small(width=8, hidden=32), experts=2, router=conv_small(width=4, hidden=16), standardise=True)"
    ),
    data="digits",
    method=f"certified({EPS}, stability=0.3, balance=0.1)",
    optimizer="adamw(lr=5e-3, weight_decay=0)",
    schedule="one_cycle(rise=0.3)",
    epochs=20,
    batch_size=64,
    clip=8.0,
    seed=1,
    val_certifier=f"bounds({EPS}, how=ibp, search=0)",
    threads=1,
    attacks=ROUTED.attacks,
)
"""A hard-routed MoE of two small networks, trained for certificates: what no attack at all can change."""

BOUNDS, SMOOTHING = f"bounds({EPS}, search=0)", "smoothing(sigma=0.25, n=500)"
RUNS = {"pathway": (BOUNDS, SMOOTHING), "dense": (BOUNDS,), "certified": (f"bounds({EPS}, search=3)",)}
"""The runs of the demo, and what certifies the first `CERTIFIED` images of each."""

CERTIFIED = 50


def demo(out: str | Path = "runs/demo", seed: int = 1) -> Path:
    """Train a routed model, its dense twin, and a routed model that certificates are for; attack and certify each, and
    write one report; returns its path.

    ``out`` must be empty or not there, or hold a demo of the same ``seed`` (of all three trainings), which then goes on
    where it was. Nothing is removed, and nothing but its report is overwritten.
    """
    from robustmoe.evaluation import certify_run, evaluate_run
    from robustmoe.reporting import report, report_files, story, summary_table
    from robustmoe.training import train

    out = Path(out)
    of_seed = {name: dataclasses.replace(recipe, seed=seed) for name, recipe in recipes().items()}
    started = {name for name, recipe in of_seed.items() if _is_there(out / name, recipe)}
    _no_strangers(out)
    report_files(out / "report.html")
    with writing(out):
        for name, recipe in of_seed.items():
            folder = out / name
            note(f"\ntraining {recipe.model} on {recipe.data} into {folder}")
            train(recipe, folder, resume=name in started)
            note(f"attacking {folder}")
            results = evaluate_run(folder)
            note(summary_table(results))
            note(f"certifying {folder}")
            for record in certify_run(folder, certifiers=RUNS[name], limit=CERTIFIED):
                note(f"{record.certifier}:\n{story(record, results)}")
        return report([out / name for name in of_seed], out / "report.html")


def recipes() -> dict[str, Recipe]:
    """The recipe of each of the `RUNS`."""
    return {"pathway": ROUTED, "dense": DENSE, "certified": PROVABLE}


def _no_strangers(out: Path) -> None:
    """UserError where the folder holds other things than a demo."""
    if out.is_file():
        raise UserError(f"{out} is a file; expected a folder for the demo: choose another --out")
    reports = [f"report{ending}" for ending in (".html", ".md", ".json")]
    strangers = {path.name for path in contents(out)} - {*RUNS, *reports}
    if strangers:
        raise UserError(f"{out} holds other things than a demo ({min(strangers)}); choose another --out")


def _is_there(folder: Path, recipe: Recipe) -> bool:
    """Whether the run was begun. UserError where the folder holds another run, or no run."""
    from robustmoe.training.checkpoint import read_config

    if not contents(folder):
        return False
    config = read_config(folder)
    for name, value in dataclasses.asdict(recipe).items():
        there = config.get(name)
        value = list(value) if isinstance(value, tuple) else value
        if there != value:
            raise UserError(
                f"{folder} is another run than the demo's: its {name} is {there!r}, expected {value!r}; choose another "
                "--out"
            )
    return True
