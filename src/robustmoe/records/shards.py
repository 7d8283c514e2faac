"""Shards of one work, made by machines without a common file system, joined to the whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from robustmoe.errors import UserError
from robustmoe.records.certificates import Certificates
from robustmoe.records.evaluation import Evaluation
from robustmoe.records.examples import Example, examples_path, read_examples, write_examples
from robustmoe.records.files import read_json, whole_lines
from robustmoe.records.locks import writing
from robustmoe.records.rows import Writer, differing, read, rows_files
from robustmoe.records.types import Header

Shard = TypeVar("Shard", Evaluation, Certificates)


def merge(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> list[Path]:
    """Joins the shards in ``folders`` (what ``evaluate --shard`` and ``certify --shard`` made) into the run folder
    ``out``, and returns the files written. Nothing is written unless all fit.

    UserError where a folder has no shard, where a shard is missing, there twice or not finished, where headers tell of
    different work, where two shards say different things of one image, or where ``out`` is a run of another model or
    has other work under a file's name. The checks of an evaluation are of all images: they are made anew when the whole
    is evaluated, which attacks nothing again.
    """
    if not folders:
        raise UserError("nothing to merge: give the folders of all shards")
    files = {folder: (rows_files(folder), sorted(Path(folder).glob(Certificates.file))) for folder in folders}
    for folder, (some, others) in files.items():
        if not some and not others:
            raise UserError(f"{folder} has no shard; `robustmoe evaluate RUN --shard 1/{len(folders)}` makes one")
    rows = _by_name((path for paths, _ in files.values() for path in paths), read)
    proofs = _by_name((path for _, paths in files.values() for path in paths), _certificates)
    joined = {name: joined_shards(shards) for name, shards in rows.items()}
    certified = {name: joined_shards(shards) for name, shards in proofs.items()}
    for whole in (*joined.values(), *certified.values()):
        _assert_of(Path(out), whole.header)
    with writing(Path(out)):
        written = [_write_rows(Path(out) / "rows" / name, joined[name], rows[name]) for name in joined]
        return written + [record.write(out) for record in certified.values() if _is_new(record, Path(out))]


def joined_shards(shards: Mapping[Path, Shard]) -> Shard:
    """Returns the shards of one record, by their files, as the record of the whole work."""
    first, (_, head) = next(iter(shards)), next(iter(shards.items()))
    of, seen = 0, dict[int, Path]()
    for path, shard in shards.items():
        number, _, count = shard.header.shard.partition("/")
        if not count:
            raise UserError(f"{path} is no shard of a work; expected what --shard made")
        of = of or int(count)
        if other := differing(head.header, replace(shard.header, shard=head.header.shard)):
            raise UserError(f"{path} is not a shard of {first}: their headers differ in {other}")
        if shard.header.batch_size != head.header.batch_size:  # whole batches are shared
            sizes = f"{shard.header.batch_size} and {head.header.batch_size}"
            raise UserError(f"{path} is not a shard of {first}: their batch sizes are {sizes}")
        if int(count) != of:
            raise UserError(f"{path} is one of {count} shards, {first} one of {of}")
        if int(number) in seen:
            raise UserError(f"shard {number}/{of} is there twice: {seen[int(number)]} and {path}")
        seen[int(number)] = path
    missing = list(islice((f"{number}/{of}" for number in range(1, of + 1) if number not in seen), 4))
    if missing:
        more = " ..." if of - len(seen) > len(missing) else ""
        raise UserError(
            f"{first.name}: of its {of} shards there is no {', no '.join(missing)}{more}; name its folder too"
        )
    header = replace(head.header, shard=f"{of} shards")
    rows = _rows_of(shards)
    if len(rows) < header.n:
        raise UserError(f"{first.name}: its shards have {len(rows)} of {header.n} images; let each finish first")
    if isinstance(head, Evaluation):
        return Evaluation(header, rows, None)
    return replace(head, header=header, rows=rows)


def _assert_of(run: Path, header: Header) -> None:
    """UserError where a run folder is of another model than the shards."""
    model = (read_json(run / "config.json", dict, "give another --out") or {}).get("model", header.model)
    hashes = {read(path).header.model_hash for path in rows_files(run) if whole_lines(path)} or {header.model_hash}
    if model != header.model or hashes != {header.model_hash}:
        what = f"{header.model}, {run} {model}" if model != header.model else f"{header.model} with other weights"
        raise UserError(f"{run} is not the run of the shards: they are of {what}; choose another --out")


def _rows_of(shards: Mapping[Path, Any]) -> list[Any]:
    rows: dict[int, Any] = {}
    for path, shard in shards.items():
        for row in shard.rows:
            if row.index in rows:
                raise UserError(f"{path}: image {row.index} is in another shard too; they were not made together")
            rows[row.index] = row
    return [rows[index] for index in sorted(rows)]


def _by_name(paths: Iterable[Path], reader: Any) -> dict[str, dict[Path, Any]]:
    """Returns the records by the name of their file, and each by its path."""
    named: dict[str, dict[Path, Any]] = {}
    for path in paths:
        named.setdefault(path.name, {})[path] = reader(path)
    return named


def _certificates(path: Path) -> Certificates:
    record = read_json(path, Certificates.from_dict, "make the shard anew")
    assert record is not None  # it was just seen
    return record


def _write_rows(path: Path, whole: Evaluation, shards: Mapping[Path, Evaluation]) -> Path:
    """Writes the whole, with the time and the passes of all, and the images to look at of the first that has some."""
    with Writer(path, whole.header) as writer:
        if len(writer.done) < whole.header.n:
            checks = [shard.checks for shard in shards.values() if shard.checks is not None]
            seconds, queries = sum(each.seconds for each in checks), sum(each.queries for each in checks)
            writer.write(whole.rows, seconds, queries=queries)
    if not examples_path(path).exists():
        write_examples(examples_path(path), _examples(shards))
    return path


def _examples(shards: Mapping[Path, Evaluation]) -> list[Example]:
    for path, shard in sorted(shards.items(), key=lambda pair: int(pair[1].header.shard.partition("/")[0])):
        if examples_path(path).exists() and (kept := read_examples(examples_path(path), shard.header)):
            return kept
    return []


def _is_new(record: Certificates, out: Path) -> bool:
    """Whether it is not there yet. UserError where other work is."""
    there = Certificates.read(out, record.certifier)
    if there is None:
        return True
    name = differing(there.header, record.header)
    if name or there.rows != record.rows:
        raise UserError(f"{there.path(out, there.which)} holds other work ({name or 'rows'}); choose another --out")
    return False
