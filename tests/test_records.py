"""The result file: round trips, resuming after a kill at any byte, and one-line errors."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from objective_infos import JOINT, ROUTER_ONLY
from robustmoe.errors import UserError
from robustmoe.records import (
    WORK,
    Audit,
    Check,
    Checks,
    Evaluation,
    Example,
    Header,
    Passed,
    RouterInfo,
    Row,
    Writer,
    append_json,
    examples_path,
    read,
    read_examples,
    read_jsonl,
    write_atomic,
    write_examples,
)
from robustmoe.records.typed import encode

CHECK = Check("H2", "inside the ball", "pass", 0.031, "Largest size 0.031.")


def make_header(**changes: Any) -> Header:
    values: dict[str, Any] = {
        "run": "a run", "model": "pathway(resnet18)", "data": "digits", "split": "test", "attack": "pgd(linf(8/255))",
        "objective": JOINT, "norm": "linf", "eps": 8 / 255, "role": "main", "method": None, "n": 3, "seed": 0,
        "data_hash": "d", "index_hash": "i", "model_hash": "m", "versions": {"torch": "2.13.0"}, "commit": None,
        "device": "cpu", "threads": 1, "precision": "fp32", "command": "robustmoe evaluate", "classes": ["a", "b"],
        "routers": {"router": RouterInfo(2, 1, 1)}, "parameters": 10, "started": "2026-11-21T10:00:00",
    }  # fmt: skip
    return Header(**{**values, **changes})


def make_row(index: int, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "index": index, "label": 1, "clean": 1, "adversarial": 0,
        "size": {"linf": 0.03, "l2": 0.5, "l1": 9.0, "box": 0.0}, "rerouted": {"router": 1.0}, "router_exposed": 1,
        "experts_exposed": 0, "route_clean": {"router": [1, 0]}, "route_adversarial": {"router": [0, 1]},
    }  # fmt: skip
    return Row(**{**values, **changes})


def finished(path: Path, indices: list[int], **changes: Any) -> Path:
    with Writer(path, make_header(**changes)) as writer:
        writer.write([make_row(index) for index in indices])
        writer.finish([CHECK], 1.5)
    return path


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses to let a file grow past ``size`` bytes: a real failed write, also as root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_round_trip(tmp_path: Path) -> None:
    rows = [
        make_row(2),
        make_row(0, router_exposed=None, experts_exposed=None),
        make_row(1),
    ]
    with Writer(tmp_path / "new" / "rows.jsonl", make_header()) as writer:
        writer.write(rows[:2])
        writer.write(rows[2:])
        writer.write(rows)  # already there: skipped
        assert writer.done == {0, 1, 2}
        writer.finish([CHECK], 1.5)
    header, back, checks = read(tmp_path / "new" / "rows.jsonl")
    assert header == make_header()
    assert back == sorted(rows, key=lambda row: row.index)
    assert checks == Checks([CHECK], 1.5)
    first = json.loads((tmp_path / "new" / "rows.jsonl").read_text().splitlines()[0])
    assert (first["kind"], first["version"], first["routers"]) == (
        "header", 3, {"router": {"experts": 2, "k": 1, "items": 1}},
    )  # fmt: skip


def test_resume_after_a_kill_at_every_byte_of_a_batch(tmp_path: Path) -> None:
    """A batch counts from its last byte on: rows and part lines without the line that ends them are cut."""
    path = tmp_path / "rows.jsonl"
    batch = [make_row(1, part="one")], 1.5, [Passed(2, "one"), Passed(3, "one")], 7
    with Writer(path, make_header(parts=["one"])) as writer:
        writer.write([make_row(0)])
        first = len(path.read_bytes())
        writer.write(*batch)
    whole = path.read_bytes()
    assert [json.loads(line)["kind"] for line in whole[first:].splitlines()] == ["row", "part", "part", "time"]
    for end in range(first, len(whole) + 1):
        path.write_bytes(whole[:end])
        done = end == len(whole)
        row_is_whole = b"\n" in whole[first:end]
        assert [row.index for row in read(path).rows] == [0, 1][: 1 + row_is_whole]  # a reader may see it before
        with Writer(path, make_header(parts=["one"])) as writer:
            assert writer.done == ({0, 1} if done else {0})
            assert writer.passed == ({"one": {2, 3}} if done else {})
            assert (writer.seconds, writer.queries) == ((1.5, 7) if done else (0.0, 0))
            writer.write(*batch)  # done already: nothing is written twice
        assert path.read_bytes() == whole
    with Writer(path, make_header(parts=["one"])) as writer:
        writer.finish([CHECK], 9.0)
    assert read(path).checks == Checks([CHECK], 9.0, 7)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_no_other_version_is_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "old.jsonl", [{**make_header().to_dict(), "version": 1}, encode(make_row(0))])
    for use in (read, lambda path: Writer(path, make_header())):
        with pytest.raises(UserError, match="rows file of version 1, this robustmoe reads version 3: install"):
            use(path)


def test_a_shorter_file_is_extended(tmp_path: Path) -> None:
    def shorter(n: int) -> Header:
        return make_header(n=n, index_hash=f"first {n}")

    short, long = shorter(2), make_header(n=4, index_hash="all")
    path = tmp_path / "rows.jsonl"
    with Writer(path, short) as writer:
        writer.write([make_row(0), make_row(1)], 3.0)
        writer.finish([CHECK], 4.0)
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds other work: its n is 2, this one's is 4"):
        Writer(path, long)
    with pytest.raises(UserError, match="holds other work: its n is 2, this one's is 4"):
        Writer(path, long, lambda n: make_header(n=n, index_hash="other images"))
    for bound in ({"parts": ["a", "b"]}, {"attack": "apgd(linf(0.1), rng=autoattack)"}):  # batches would be cut anew
        write_lines(tmp_path / "bound.jsonl", [make_header(n=2, **bound).to_dict()])
        with pytest.raises(UserError, match="holds other work: its n is 2, this one's is 4"):
            Writer(tmp_path / "bound.jsonl", make_header(n=4, **bound), lambda n, b=bound: make_header(n=n, **b))
    assert path.read_bytes() == before
    with Writer(path, long, shorter) as writer:
        assert (writer.done, writer.checks, writer.seconds, writer.header) == ({0, 1}, None, 3.0, long)
        with pytest.raises(
            UserError, match="being written by this process"
        ):  # the new file is locked as the old one was
            Writer(path, long, shorter)
        writer.write([make_row(2), make_row(3)], 1.0)
        writer.finish([CHECK], 5.0)
    assert read(path) == Evaluation(long, [make_row(i) for i in range(4)], Checks([CHECK], 5.0))
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    with pytest.raises(UserError, match="holds other work: its n is 4, this one's is 2"):
        Writer(path, short, shorter)


@pytest.mark.parametrize(
    "bound", [{"parts": ["a"]}, {"attack": "apgd(linf(0.1), rng=autoattack)"}, {"attack": "Own(rng='autoattack')"}]
)
def test_the_batch_size_belongs_to_the_work_where_rows_depend_on_it(bound: dict[str, Any], tmp_path: Path) -> None:
    finished(tmp_path / "free.jsonl", [0], batch_size=8)
    with Writer(tmp_path / "free.jsonl", make_header(batch_size=9)) as writer:
        assert writer.done == {0}
    finished(tmp_path / "bound.jsonl", [0], batch_size=8, **bound)
    with pytest.raises(UserError, match="holds other work: its batch_size is 8, this one's is 9; choose another --out"):
        Writer(tmp_path / "bound.jsonl", make_header(batch_size=9, **bound))


def test_resume_after_a_kill_inside_the_header(tmp_path: Path) -> None:
    path = finished(tmp_path / "rows.jsonl", [0])
    whole = path.read_bytes()
    for end in (0, 1, 10, 40, whole.index(b"\n")):
        path.write_bytes(whole[:end])
        finished(path, [0])
        assert path.read_bytes() == whole


def test_resume_after_a_kill_inside_the_checks(tmp_path: Path) -> None:
    path = finished(tmp_path / "rows.jsonl", [0, 1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert read(path).checks is None
    with Writer(path, make_header()) as writer:
        assert writer.checks is None
        writer.finish([CHECK], 1.5)
    assert path.read_bytes() == whole


def test_a_finished_file_can_be_continued(tmp_path: Path) -> None:
    path = finished(tmp_path / "rows.jsonl", [0])
    with Writer(path, make_header()) as writer:
        assert writer.checks == Checks([CHECK], 1.5)
        writer.finish([CHECK], 2.5)
        writer.write([make_row(1)])
        assert writer.checks is None
    assert [row.index for row in read(path).rows] == [0, 1]
    assert read(path).checks is None


def test_where_and_when_may_differ_on_resume(tmp_path: Path) -> None:
    path = finished(tmp_path / "rows.jsonl", [0])
    with Writer(path, make_header(device="cuda", started="later", command="other", threads=9, run="moved")) as writer:
        assert writer.done == {0}
        assert writer.header == make_header()


@pytest.mark.parametrize("field", WORK)
def test_resume_of_other_work_names_the_field(tmp_path: Path, field: str) -> None:
    path = finished(tmp_path / "rows.jsonl", [0])
    before = path.read_bytes()
    other = {
        "n": 4,
        "seed": 4,
        "eps": 0.5,
        "norm": "l2",
        "objective": ROUTER_ONLY,
        "role": "curve",
        "routers": {},
        "parts": ["a", "b"],
        "files": {"mine.py": "0123456789abcdef"},
    }.get(field, "else")
    says = f"its {field} is .*, this one's is {re.escape(repr(other))}"
    if field == "files":
        says = re.escape("another content of mine.py (SHA-256 none then, 0123456789ab now)")
    with pytest.raises(UserError, match=rf"holds other work: {says}; choose another --out or delete the file"):
        Writer(path, make_header(**{field: other}))
    assert path.read_bytes() == before


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("no newline")
    with pytest.raises(UserError, match="is not a rows file and was left alone"):
        Writer(path, make_header())
    path.write_text("line\n")
    with pytest.raises(UserError, match=r"thesis\.txt, line 1: not a JSON object; delete that line or the file"):
        Writer(path, make_header())
    assert path.read_text() == "line\n"


@pytest.mark.parametrize(
    "line, match",
    [
        ("{", r"line 2: not a JSON object"),
        ("[1]", r"line 2: not a JSON object"),
        ('{"kind":"rho"}', r"line 2: unknown kind 'rho'; known: header, row, part, time, checks"),
        ('{"kind":"row","index":0}', r"line 2: row: field 'label' is missing"),
        (json.dumps({**encode(make_row(0)), "clean": "1"}), r"row: field 'clean' must be a whole number, got '1'"),
        (json.dumps({**encode(make_row(0)), "clean": True}), r"row: field 'clean' must be a whole number, got True"),
        (json.dumps({**encode(make_row(0)), "size": [1]}), r"row: field 'size' must be an object, got \[1\]"),
        (
            json.dumps({**encode(make_row(0)), "size": {"l2": "x"}}),
            r"field 'size\[l2\]' must be a number, got 'x'",
        ),
        (
            json.dumps({**encode(make_row(0)), "route_clean": {"r": 1}}),
            r"field 'route_clean\[r\]' must be a list",
        ),
        (json.dumps({**encode(make_row(0)), "more": 1}), r"row: unknown field 'more'"),
        ('{"kind":"checks","seconds":1,"checks":[1]}', r"checks: field 'checks\[0\]' must be an object, got 1"),
        (
            json.dumps({"kind": "checks", "seconds": 1, "checks": [{**vars(CHECK), "status": "ok"}]}),
            r"checks: field 'checks\[0\].status' must be one of pass, not run, warn, fail, got 'ok'",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, match: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(make_header().to_dict()) + "\n" + line + "\n")
    with pytest.raises(UserError, match=match):
        read(path)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"version": 2}, "rows file of version 2, this robustmoe reads version 3"),
        ({"version": None}, "rows file of version None"),
        ({"kind": "row"}, "its first line must be"),
        ({"norm": "l7"}, "'norm' must be one of linf, l2, l1, got 'l7'"),
        ({"role": ""}, "'role' must be one of main, curve"),
        ({"precision": "fp64"}, "'precision' must be one of strict, fast, fp32, got 'fp64'"),
        ({"objective": None}, "'objective' must be an object, got None"),
        ({"routers": {"r": {"experts": 2}}}, r"field 'routers\[r\].k' is missing"),
    ],
)
def test_bad_headers_are_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        Header.from_dict({**make_header().to_dict(), **changes})


def test_a_clean_evaluation_has_no_objective() -> None:
    header = make_header(attack=None, objective=None)
    assert Header.from_dict(json.loads(json.dumps(header.to_dict()))) == header


def test_a_header_that_was_told_no_batch_size_names_none() -> None:
    """Zero: the report's JSON and its provenance then leave it out."""
    told = make_header().to_dict()
    del told["batch_size"]
    assert Header.from_dict(told).batch_size == 0


def test_two_rows_of_one_image(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [make_header().to_dict(), encode(make_row(0)), encode(make_row(0))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read(path).rows == [make_row(0)]
    append_json(path, encode(make_row(0, clean=0)))
    with pytest.raises(UserError, match="line 4: image 0 has two different rows"):
        read(path)
    finished(tmp_path / "b.jsonl", [0])
    append_json(tmp_path / "b.jsonl", encode(make_row(1)))
    with pytest.raises(UserError, match="line 5: lines after the checks"):
        read(tmp_path / "b.jsonl")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no rows in .*none\.jsonl; `robustmoe evaluate RUN` makes them"):
        read(tmp_path / "none.jsonl")


def test_append_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    append_json(path, {"epoch": 1})
    with open(path, "a") as file:
        file.write('{"epoch":')
    assert read_jsonl(path) == [{"epoch": 1}]
    append_json(path, {"epoch": 2})
    assert read_jsonl(path) == [{"epoch": 1}, {"epoch": 2}]


def test_examples(tmp_path: Path) -> None:
    path = examples_path(tmp_path / "rows" / "pgd-v1.2.jsonl")
    assert path == tmp_path / "rows" / "pgd-v1.2.examples.jsonl"
    examples = [Example(4, 1, 1, 0, {"router": [1, 0]}, {"router": [0, 1]}, "AAAA", "BBBB")]
    write_examples(path, examples)
    assert read_examples(path, make_header()) == examples


def test_examples_say_where_each_item_went(tmp_path: Path) -> None:
    path = tmp_path / "pgd.examples.jsonl"
    header = make_header(routers={"router": RouterInfo(3, 2, 2)})
    counts = ({"router": [2, 1, 1]}, {"router": [1, 1, 2]})
    every = [
        Example(4, 1, 1, 0, *counts, "AAAA", "BBBB", {"router": [[0, 2], [1, 0]]}, {"router": [[2], [2, 0]]}),
        Example(5, 1, 1, 0, *counts, "AAAA", "BBBB"),  # no router chooses
    ]
    write_examples(path, every)
    assert read_examples(path, header) == every
    old = json.loads(path.read_text().splitlines()[1])
    assert old.pop("layout") == 2
    del old["experts_clean"], old["experts_adversarial"]
    path.write_text(json.dumps(old) + "\n")
    assert read_examples(path, header) == every[1:], "a file of before the experts were kept"
    write_examples(path, every)  # over it
    for field, value, problem in (
        ("layout", 3, "field 'layout' must be 2"),
        ("experts_clean", {}, "are of different routers"),
        ("experts_clean", {"router": [[0, 3], [1]]}, "of different experts from 0 to 2"),
        ("experts_clean", {"router": [[0, 0], [1]]}, "of different experts from 0 to 2"),
        ("experts_clean", {"router": [[0, 1]]}, "is of 1 items, expected 2"),
        ("experts_clean", {"router": [[-1], [1]]}, "of at least 0"),
    ):
        path.write_text(json.dumps({**encode(every[0]), field: value}) + "\n")
        with pytest.raises(UserError, match=rf"line 1: .*{problem}"):
            read_examples(path, header)
    gone = {"elsewhere": [[0], [1]]}
    path.write_text(json.dumps({**encode(every[0]), "experts_clean": gone, "experts_adversarial": gone}) + "\n")
    with pytest.raises(UserError, match=r"line 1: .*is of a router 'elsewhere'"):
        read_examples(path, header)


def test_write_atomic(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "config.json"
    write_atomic(path, "é")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    with (
        no_file_larger_than(1000),
        pytest.raises(UserError, match=r"cannot write .*config\.json: File too large; free"),
    ):
        write_atomic(path, b"x" * 2000)
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["config.json"]  # no temporary file is left
    with pytest.raises(UserError, match="a part of that path is a file"):
        write_atomic(path / "below", "x")
    with pytest.raises(UserError, match=r"cannot write .*: Is a directory"):
        write_atomic(tmp_path / "deep", "x")


def test_no_space(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write /dev/full: No space left on device; free some space, or write"):
        append_json("/dev/full", {"epoch": 1})
    with pytest.raises(UserError, match="is not a regular file"):
        Writer("/dev/full", make_header())
    path = finished(tmp_path / "rows.jsonl", [0])
    before = path.read_bytes()
    with Writer(path, make_header()) as writer:
        with no_file_larger_than(len(before) + 50), pytest.raises(UserError, match=r"rows\.jsonl: File too large"):
            writer.write([make_row(1), make_row(2)])
        assert writer.done == {0}
        assert [row.index for row in read(path).rows] == [0]
        writer.write([make_row(1), make_row(2)])  # there is room again
    assert [row.index for row in read(path).rows] == [0, 1, 2]


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of that path is a file; move it away"):
        Writer(tmp_path / "file" / "rows.jsonl", make_header())
    with pytest.raises(UserError, match="is not a regular file"):
        Writer(tmp_path, make_header())


def test_readers_do_not_import_torch() -> None:
    code = "import sys, robustmoe.records, robustmoe.analysis, robustmoe.reporting; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_audit_survives_its_file(tmp_path: Path) -> None:
    audit = Audit("hash", ["pgd(linf(8/255))"], 64, 3, [Check("G2", "finite differences", "warn", [1, 0.5], "so.")])
    assert Audit.read(tmp_path) is None
    audit.write(tmp_path)
    assert Audit.read(tmp_path) == audit


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_hash": 3}', '{"model_hash": "a", "attacks": [], "n": 1, "seed": 0}']
)
def test_a_bad_audit_is_named(tmp_path: Path, text: str) -> None:
    Audit.path(tmp_path).write_text(text)
    with pytest.raises(UserError, match=r"checks\.json: .*`robustmoe check` makes it anew"):
        Audit.read(tmp_path)
