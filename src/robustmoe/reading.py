"""What is read of runs that were measured: shards joined, tables, the report, comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from robustmoe.errors import UserError
from robustmoe.options import Mark
from robustmoe.runs import run_folder


def merge(
    folders: Annotated[tuple[str, ...], "the folders of all shards", Mark.POSITIONAL],
    out: Annotated[str | None, "the run folder that the whole goes into (needed)"] = None,
) -> str:
    """Join the shards of an evaluation or certification.

    Machines without a common file system each make one, with evaluate --shard 1/3, --shard 2/3, ... A shard that is
    missing or there twice is refused. Then evaluate makes the checks and the curve of the whole.

    Example: robustmoe merge runs/a/shard-1-of-2 copied/shard-2-of-2 --out runs/a
    """
    if out is None:
        raise UserError("expected --out: the run folder that the whole goes into, such as --out runs/a")
    from robustmoe import records

    files = records.merge(folders, run_folder(out))
    lines = [*(f"whole: {file}" for file in files)] or ["all of it is there already"]
    return "\n".join([*lines, f"next: robustmoe evaluate {out}, for the checks of the whole"])


def analyze(run: Annotated[str, "a run folder that was evaluated", Mark.POSITIONAL]) -> str:
    """Print the tables of an evaluated run.

    Example: robustmoe analyze runs/digits
    """
    folder = run_folder(run)
    from robustmoe import records
    from robustmoe.reporting import summary_table

    files = records.rows_files(folder)
    if not files:
        raise UserError(f"{run!r} has no rows yet; robustmoe evaluate {run} makes them")
    return summary_table([records.read(f) for f in files], records.Audit.read(folder))


def report(
    runs: Annotated[tuple[str, ...], "run folders that were evaluated", Mark.POSITIONAL],
    out: Annotated[str, "the file to write"] = "report.html",
    figures: Annotated[str | None, "a folder: every figure also as a file of its own, for a paper"] = None,
    format: Annotated[
        Literal["svg", "png", "pdf"] | None, "of these files (default: svg); png and pdf need the extra figures"
    ] = None,
) -> str:
    """Write one self-contained HTML report about evaluated runs.

    Example: robustmoe report runs/standard runs/robust --figures figures --format pdf
    """
    if format is not None and figures is None:
        raise UserError(f"--format {format} says how figures are written; expected --figures FOLDER beside it")
    folders = [run_folder(run) for run in runs]
    from robustmoe.reporting import report as write
    from robustmoe.reporting.figure_files import LIST

    page = write(folders, Path(out), figures=figures, format=format or "svg")
    return str(page) if figures is None else f"{page}\nfigures: {Path(figures) / LIST}"


def compare(
    runs: Annotated[
        tuple[str, ...],
        "run folders that were evaluated; the others are compared with the first recipe",
        Mark.POSITIONAL,
    ],
    out: Annotated[str | None, "also write the tables: a file that ends in .md, .csv, .tex or .json"] = None,
) -> str:
    """Compare recipes over their seeds, image by image.

    Runs that differ in their seed alone are one row: mean, deviation, interval. Each later recipe is compared with the
    first on the same images.

    Example: robustmoe compare runs/dense-seed* runs/pathway-seed* --out table.tex
    """
    folders = [run_folder(run) for run in runs]
    from robustmoe.reporting.comparison import compare as compared
    from robustmoe.reporting.formats import table_file, write_table

    path = None if out is None else table_file(out)
    comparison = compared(folders)
    if path is None:
        return str(comparison)
    write_table(path, comparison.grids(), comparison.numbers())
    return f"{comparison}\n\nwritten to {path}"
