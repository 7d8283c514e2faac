"""Work that machines share without a common file system: its shards, joined, are what one machine does, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from robustmoe import UserError, cli
from robustmoe.analysis import robust
from robustmoe.attacks import PGD, l2
from robustmoe.evaluation import certify_run, evaluate_run
from robustmoe.evaluation.engine import in_share
from robustmoe.records import Certificates, append_json, examples_path, merge, read, rows_files
from robustmoe.records.typed import encode
from test_engine import Some
from test_evaluation import make_run

PARTS = (("one", PGD(l2(0.1), steps=1)), ("two", PGD(l2(0.3), steps=2)))
ATTACKS = (PGD(l2(0.3), steps=2), Some(PARTS, l2(0.3)))
WORK = {"limit": 21, "batch_size": 4}
BOUNDS = "bounds(l2(0.1), how=ibp, search=0)"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that one machine evaluated ("one"), and three copies of it that did a shard each."""
    place = tmp_path_factory.mktemp("shared")
    run = make_run(place / "run")
    for name in ("one", "a", "b", "c"):
        shutil.copytree(run, place / name)
    evaluate_run(place / "one", attacks=ATTACKS, curve=(), **WORK)
    certify_run(place / "one", certifiers=BOUNDS, **WORK)
    for number, name in enumerate("abc", 1):
        evaluate_run(place / name, attacks=ATTACKS, shard=f"{number}/3", **WORK)
        certify_run(place / name, certifiers=BOUNDS, shard=f"{number}/3", **WORK)
    return place


def shards(place: Path, names: str = "abc") -> list[Path]:
    return [place / name / f"shard-{'abc'.index(name) + 1}-of-3" for name in names]


def test_the_shards_of_a_set_are_whole_batches_in_turn() -> None:
    assert [in_share(10, 2, (number, 3)) for number in (1, 2, 3)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5]]
    assert in_share(3, 2, (1, 1)) == [0, 1, 2]


def test_merged_shards_are_what_one_machine_does(shared: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(shared / "run", whole)
    written = merge(shards(shared, "cab"), whole)
    assert {path.name for path in written if path.suffix == ".jsonl"} == {path.name for path in rows_files(whole)}
    pgd, suite = (
        next(path for path in rows_files(shared / "one") if path.name.startswith(name)) for name in ("pgd", "some")
    )
    alone, joined = read(pgd), read(whole / "rows" / pgd.name)
    assert joined.rows == alone.rows
    assert (joined.header.shard, joined.checks) == ("3 shards", None)
    assert examples_path(whole / "rows" / pgd.name).read_bytes() == examples_path(pgd).read_bytes()
    there, here = (read(path).rows for path in (whole / "rows" / suite.name, suite))
    assert [(row.index, row.label, row.clean) for row in there] == [(row.index, row.label, row.clean) for row in here]
    assert sum(robust(a) != robust(b) for a, b in zip(there, here)) <= 1, "its parts have other batches: last digits"
    assert {row.part for row in there} == {row.part for row in here}
    (proven,), (alone_proven,) = Certificates.read_all(whole), Certificates.read_all(shared / "one")
    assert [(row.index, row.radius, row.prediction) for row in proven.rows] == [
        (row.index, row.radius, row.prediction) for row in alone_proven.rows
    ]
    assert proven.done

    results = evaluate_run(whole, attacks=ATTACKS, curve=(), **WORK)  # the checks, and nothing attacked again
    assert [result.rows for result in results] == [read(whole / "rows" / path.name).rows for path in (pgd, suite)]
    assert results[0].checks is not None
    assert alone.checks is not None
    assert [(each.id, each.status) for each in results[0].checks.checks] == [
        (each.id, each.status) for each in alone.checks.checks
    ]
    assert certify_run(whole, certifiers=BOUNDS, **WORK)[0].rows == proven.rows
    assert merge(shards(shared), whole)  # again: nothing changes
    text = (whole / "rows" / pgd.name).read_bytes()
    for end in (len(text), 1, text.index(b"\n") + 9):  # and after a kill
        (whole / "rows" / pgd.name).write_bytes(text[:end])
        assert merge(shards(shared), whole)
        assert read(whole / "rows" / pgd.name).rows == alone.rows


def test_what_does_not_make_a_whole_is_refused(shared: Path, tmp_path: Path) -> None:
    a, b, c = shards(shared)
    with pytest.raises(UserError, match=r"of its 3 shards there is no 2/3; name its folder too"):
        merge([a, c], tmp_path / "out")
    with pytest.raises(UserError, match=r"shard 1/3 is there twice: .*a/shard-1-of-3.* and .*copy"):
        merge([a, shutil.copytree(a, tmp_path / "copy"), b, c], tmp_path / "out")
    with pytest.raises(UserError, match=r"is no shard of a work; expected what --shard made"):
        merge([shared / "one", b, c], tmp_path / "out")
    with pytest.raises(UserError, match=r"has no shard; `robustmoe evaluate RUN --shard 1/1` makes one"):
        merge([shared / "run"], tmp_path / "out")
    with pytest.raises(UserError, match="nothing to merge"):
        merge([], tmp_path / "out")
    other = shutil.copytree(shared / "run", tmp_path / "other")
    evaluate_run(other, attacks=ATTACKS[0], shard="2/3", **{**WORK, "limit": 20})
    evaluate_run(other, attacks=ATTACKS[0], shard="2/2", **WORK)
    for folder, said in (("shard-2-of-3", "their headers differ in"), ("shard-2-of-2", "is one of 2 shards, ")):
        with pytest.raises(UserError, match=said):
            merge([a, other / folder, c], tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_shards_of_another_model_or_other_batches_are_refused(shared: Path, tmp_path: Path) -> None:
    a, b, c = shards(shared)
    run = shutil.copytree(shared / "run", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "model": "small_cnn"}))
    with pytest.raises(UserError, match=r"is not the run of the shards: they are of .*, .*run small_cnn; choose"):
        merge([a, b, c], run)
    (run / "config.json").write_text(json.dumps(config))
    (run / "rows").mkdir()
    head = rows_files(shared / "one")[0].read_text().splitlines(keepends=True)[0]
    hashed = read(rows_files(shared / "one")[0]).header.model_hash
    (run / "rows" / "other.jsonl").write_text(head.replace(hashed, "0" * 64))
    with pytest.raises(UserError, match=r"is not the run of the shards: they are of .* with other weights; choose"):
        merge([a, b, c], run)

    other = shutil.copytree(b, tmp_path / "other")
    for file in rows_files(other):
        file.write_text(file.read_text().replace('"batch_size":4', '"batch_size":3'))
    with pytest.raises(
        UserError, match=r"is not a shard of .*: their (batch sizes are 3 and 4|headers differ in batch)"
    ):
        merge([a, other, c], tmp_path / "out")

    many = shutil.copytree(a, tmp_path / "many")
    for file in rows_files(many):
        file.write_text(file.read_text().replace('"shard":"1/3"', '"shard":"1/999999"'))
    with pytest.raises(UserError, match=r"there is no 2/999999, no 3/999999, no 4/999999, no 5/999999 \.\.\.; name"):
        merge([many], tmp_path / "out")


def test_a_shard_that_is_not_finished_or_overlaps_is_refused(shared: Path, tmp_path: Path) -> None:
    a, b, c = shards(shared)
    half = shutil.copytree(b, tmp_path / "half")
    shutil.rmtree(half / "certificates")
    with pytest.raises(UserError, match=r"of its 3 shards there is no 2/3"):
        merge([a, half, c], tmp_path / "out")
    half = shutil.copytree(b, tmp_path / "half2")
    file = next(path for path in rows_files(half) if path.name.startswith("pgd"))
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:6]))  # the header and the first batch
    with pytest.raises(UserError, match=r"its shards have 17 of 21 images; let each finish first"):
        merge([a, half, c], tmp_path / "out")
    append_json(file, encode(read(next(path for path in rows_files(a) if path.name.startswith("pgd"))).rows[0]))
    with pytest.raises(UserError, match=r"is in another shard too; they were not made together"):
        merge([a, half, c], tmp_path / "out")
    assert not (tmp_path / "out" / "rows").exists()


def test_on_the_command_line(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(shared / "run", tmp_path / "run")
    work = ["--limit", "9", "--batch-size", "4", "--attack", "pgd(l2(0.3), steps=2)"]
    for shard in ("1/2", "2/2"):
        assert cli.main(["evaluate", str(run), "--shard", shard, *work]) == 0
    folders = [str(run / f"shard-{number}-of-2") for number in (1, 2)]
    assert cli.main(["merge", *folders, "--out", str(run)]) == 0
    assert f"next: robustmoe evaluate {run}" in capsys.readouterr().out
    assert cli.main(["evaluate", str(run), *work]) == 0
    capsys.readouterr()
    shard = ["--shard", "1/2", "--limit", "8", "--batch-size", "4", "--certifier", BOUNDS]
    assert cli.main(["certify", str(run), *shard]) == 0
    assert f"written to {run}/shard-1-of-2/certificates; robustmoe merge joins" in capsys.readouterr().out
    for arguments, said in (
        (["evaluate", str(run), "--shard", "3/2"], "shard is such as 2/3, the second of three; got '3/2'"),
        (["evaluate", str(run), "--shard", "half"], "shard is such as 2/3, the second of three; got 'half'"),
        (
            ["evaluate", str(run), "--shard", "2/3", "--limit", "4", *work[2:]],
            "shard 2/3: 4 images are 1 batch of 4, so",
        ),
        (["certify", str(run), "--shard", "1/3", "--limit", "4", "--batch-size", "4"], "so that not each of 3 shards"),
        (["evaluate", str(run), "--shard", "01/02", *work], "shard is such as 2/3, the second of three; got '01/02'"),
        (["evaluate", str(run), "--shard", "１/2", *work], "shard is such as 2/3, the second of three; got '１/2'"),
        (["merge", *folders, str(run / "shard-9"), "--out", str(run)], "shard-9 has no shard; `robustmoe evaluate"),
        (["evaluate", str(run), "--shard", "1/2", "--curve", "0.1", *work], "a curve takes what all shards found"),
        (["merge", folders[0], "--out", str(run)], "of its 2 shards there is no 2/2"),
        (["merge", *folders, "--out", str(tmp_path / "new")], "there is no run folder"),
        (["merge", *folders], "expected --out"),
    ):
        assert cli.main(arguments) == 2
        assert said in capsys.readouterr().err
