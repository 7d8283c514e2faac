"""Files and arguments that were made to do harm: one line each, nothing large is allocated, nothing is obeyed."""

from __future__ import annotations

import copy
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import test_blend_report
import test_certify
import test_dissection
import test_laboratory
import test_sweep
from robustmoe import cli, recipe, records, spec
from robustmoe.errors import UserError
from robustmoe.models import build_model, memory
from robustmoe.progress import show
from robustmoe.records.training import read_metrics
from robustmoe.reporting import report
from test_report import make_header, make_rows, make_run

CONTROL = "\x1b]0;pwned\x07\u202e\x9b2J"
DEEP = "[" * 200_000

# ------------------------------------------------------------------------------------------------ the terminal


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every text, and of every key that is a name of somebody's own, in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*place, key))
    if isinstance(value, str):
        yield place


def planted(value: Any, place: tuple[Any, ...]) -> Any:
    """A copy of a JSON value with the control characters at the end of the text there."""
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] += CONTROL
    return value


def renamed(value: Any, name: str) -> Any:
    """A copy in which the control characters stand in every key, or text, that is ``name``."""
    return json.loads(json.dumps(value).replace(json.dumps(name), json.dumps(name + CONTROL)))


@pytest.mark.parametrize(
    "record", [test_sweep.record, test_dissection.record, test_laboratory.record, test_certify.record,
               test_blend_report.make_blend], ids=["sweep", "dissection", "lipschitz", "certificates", "blend"],
)  # fmt: skip
def test_no_text_of_a_record_reaches_the_terminal_as_it_is(record: Callable[[], records.Record]) -> None:
    """Each is told, or refused, with escapes."""
    kept = record()
    whole = json.loads(json.dumps(kept.to_dict()))
    told = 0
    for data in [renamed(whole, "router"), *(planted(whole, place) for place in leaves(whole))]:
        try:
            text = str(type(kept).from_dict(data))
            told += 1
        except UserError as error:
            text = str(error)
        assert not set("\x1b\x07\u202e\x9b") & set(text)
    assert told >= 10, "most free texts are not refused"


def test_no_text_of_a_run_reaches_the_terminal_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, n=20, curve=False, training=False, examples=False)
    (rows,) = (run / "rows").glob("attack0.jsonl")
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for other in run.glob("rows/attack[123].jsonl"):
        other.unlink()
    seen = 0
    for data in [renamed(lines, "router"), *(planted(lines, place) for place in leaves(lines) if place[0] in (0, 21))]:
        rows.write_text("".join(json.dumps(line) + "\n" for line in data))
        seen += cli.main(["analyze", str(run)]) == 0
        out, err = capfd.readouterr()
        assert not set("\x1b\x07\u202e\x9b") & set(out + err)
    assert seen >= 10
    rows.write_text("".join(json.dumps(line) + "\n" for line in planted(lines, (0, "attack"))))
    assert cli.main(["analyze", str(run)]) == 0
    assert "\\x1b]0;pwned\\x07" in capfd.readouterr().out, "it is shown, escaped"
    text = "".join(json.dumps(line) + "\n" for line in renamed(planted(lines, (0, "command")), "router"))
    rows.write_text(text)
    for file in (page := report([run], tmp_path / "page.html"), page.with_suffix(".md"), page.with_suffix(".json")):
        assert not set("\x1b\x07\u202e\x9b") & set(file.read_text()), "nor a file that a person may print there"


def test_text_that_a_terminal_cannot_show() -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    show("L∞ ≤ é \udcff\tend\n", terminal)
    assert terminal.buffer.getvalue() == b"L\\u221e \\u2264 \\xe9 \\udcff\tend\n\n"


# ------------------------------------------------------------------------------------------------ files


def changed(path: Path, at: int, **fields: Any) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[at].update(fields)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "at, fields, message",
    [
        (1, {"label": 10**9}, "line 2: row: field 'label' must be from 0 to 9, got 1000000000"),
        (1, {"label": 10**6, "clean": 10**6}, "line 2: row: field 'label' must be from 0 to 9"),
        (1, {"label": -1}, "line 2: row: field 'label' must be a whole number of at least 0, got -1"),
        (1, {"adversarial": 99}, "line 2: row: field 'adversarial' must be from -1 to 9, got 99"),
        (1, {"router_exposed": 10}, "line 2: row: field 'router_exposed' must be from -1 to 9, got 10"),
        (1, {"index": -3}, "line 2: row: field 'index' must be a whole number of at least 0, got -3"),
        (1, {"index": 10**30}, "line 2: row: field 'index' must be a whole number of at most 9223372036854775807"),
        (1, {"rerouted": {}}, r"line 2: row: field 'rerouted' is of the routers \[\], expected \['router'\]"),
        (1, {"rerouted": {"router": 1.5}}, r"field 'rerouted\[router\]' must be a number of at most 1.0, got 1.5"),
        (1, {"route_clean": {"router": [1]}}, r"field 'route_clean\[router\]' must have 4 numbers, got 1"),
        (1, {"route_clean": {"router": [1, 0, 0, -1]}}, r"field 'route_clean\[router\]\[3\]' must be a whole number"),
        (1, {"route_clean": {"router": [2, 0, 0, 0]}}, r"router\]' gives one expert 2 items, an image has 1"),
        (1, {"route_adversarial": {"router": [1, 1, 0, 0]}}, r"is of 2 choices, expected at most 1 x 1 \(items x k\)"),
        (1, {"size": {"l2": 1.0}}, r"field 'size' is of \['l2'\], expected linf, l2, l1, box"),
        (1, {"part": "1"}, r"field 'part' must be one of \('', 'clean', 'certified'\), got '1'"),
        (1, {"size": {"linf": -1.0}}, "field 'size' must be of numbers of at least 0"),
        (0, {"classes": []}, "line 1: header: field 'classes' must be a list of at least 1 entries, got "),
        (0, {"n": 3}, "line 5: this is row 4 of the 3 images that the file is about"),
        (0, {"eps": float("nan")}, "field 'eps' must be a number of at least 0.0, got nan"),
        (0, {"routers": {"router": {"experts": 10**9, "k": 1, "items": 1}}}, "a whole number of at most 65536"),
        (0, {"version": 99, "versions": {"robustmoe": "7.0"}}, "version 3: install robustmoe 7.0, or evaluate again"),
        (0, {"version": [], "versions": 3}, r"of version \[\], .*: install the robustmoe that wrote it, or"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_their_header(at: int, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    header = make_header(n=8)
    path = tmp_path / "rows.jsonl"
    with records.Writer(path, header) as writer:
        writer.write(make_rows(header, 0.5))
    changed(path, at, **fields)
    for use in (records.read, lambda path: records.Writer(path, header)):
        with pytest.raises(UserError, match=message):
            use(path)


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("entropy",), {}, r"field 'entropy' is of the routers \[\], expected \['router'\]"),
        (("narrow",), {"gate": [0.0] * 4}, r"field 'narrow' is of a router 'gate', expected \['router'\]"),
        (("forced",), [[10, 0, 0, 0], [0] * 4], r"forced\[0\] must be from -1 to 9"),
        (("index",), [0, 1, 2, 2], "an image is there twice"),
        (
            ("under", "flip", "routes", "router", 2),
            [9, 0],
            r"under\['flip'\].routes\['router'\]\[2\] gives one expert 9",
        ),
        (("header", "routers", "router", "experts"), 65536, "field 'forced' is of 2 experts, expected 65536"),
        (("seconds",), float("nan"), "field 'seconds' must be a number of at least 0"),
    ],
)
def test_a_dissection_that_does_not_fit(place: tuple[str, ...], value: Any, message: str, tmp_path: Path) -> None:
    data = json.loads(json.dumps(test_dissection.record().to_dict()))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "dissection.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        records.Dissection.read(tmp_path)


KINDS = ["config.json", "rows/attack0.jsonl", "rows/attack1.examples.jsonl", "metrics.jsonl", "sweep.json",
         "dissection.json", "lipschitz.json", "blend.json", "checks.json", "certificates/x.json"]  # fmt: skip


def test_nesting_without_end_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path, n=8, curve=False)
    for kind in KINDS:
        path = run / kind
        before = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{DEEP}\n")
        with pytest.raises(UserError, match=rf"{path.name}(, line 1: not a JSON object|: .*it is nested too deeply)"):
            report([run], tmp_path / "page.html")
        path.unlink() if before is None else path.write_bytes(before)
    value = json.loads("[" * 500 + "]" * 500)
    check = {"id": "G1", "name": "", "status": "pass", "value": value, "sentence": ""}
    audit = {"kind": "checks", "version": 1, "model_hash": "m", "attacks": [], "n": 1, "seed": 0, "checks": [check]}
    (run / "checks.json").write_text(json.dumps(audit))
    with pytest.raises(UserError, match=r"field 'checks\[0\].value\[0\]\[0\]\[0\]' must be"):
        report([run], tmp_path / "page.html")


@pytest.mark.parametrize("text", ["\\ud800", "\\uDFFF", "\\ud83d", "\udcff"])
def test_half_of_a_character_is_one_line(text: str, tmp_path: Path) -> None:
    """JSON may spell half a surrogate pair, which no text file can hold: neither a page nor another record."""
    run = make_run(tmp_path, n=4, curve=False)
    path = run / "rows/attack0.jsonl"
    whole = path.read_bytes()
    assert b'"model":"' in whole
    path.write_bytes(whole.replace(b'"model":"', b'"model":"' + text.encode("utf-8", "surrogatepass"), 1))
    with pytest.raises(UserError, match=r"attack0.jsonl, line 1: .*half of a character|not a JSON object"):
        report([run], tmp_path / "page.html")
    path.write_bytes(whole.replace(b'"model":"', b'"model":"\\ud83d\\ude00', 1))  # a whole one
    report([run], tmp_path / "page.html")
    assert "\U0001f600" in (tmp_path / "page.html").read_text()


def test_a_link_to_nowhere_and_a_pipe_are_no_files(tmp_path: Path) -> None:
    """Left out in silence, the strongest attack would be missing from the worst case."""
    run = make_run(tmp_path, n=8, curve=False)
    for kind in ("rows/attack0.jsonl", "sweep.json", "checks.json", "metrics.jsonl", "config.json"):
        path = run / kind
        before = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        for make in (lambda path: path.symlink_to("gone"), os.mkfifo):
            make(path)
            with pytest.raises(UserError, match=rf"{path.name}( is not a regular file|;|: No such file)"):
                report([run], tmp_path / "page.html")
            path.unlink()
        if before is not None:
            path.write_bytes(before)


CONFIG = {
    "model": "linear", "data": "digits", "num_classes": 10, "image_shape": [1, 8, 8], "mean": [0.3], "std": [0.3],
    "attacks": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("mean", 3, "config: field 'mean' must be a list or null, got 3"),
        ("mean", [0.1, 0.2], "config: field 'mean' has 2 entries, expected 1, one a channel"),
        ("std", ["a"], r"field 'std\[0\]' must be a number, got 'a'"),
        ("std", [0], r"field 'std\[0\]' must be a number above 0.0, got 0"),
        ("image_shape", [1, 8], r"field 'image_shape' must be a list of at least 3 entries, got \[1, 8\]"),
        ("image_shape", [1, 10**9, 8], r"field 'image_shape\[1\]' must be a whole number of at most 65536"),
        ("num_classes", "ten", "field 'num_classes' must be a whole number or null, got 'ten'"),
        ("num_classes", 10**12, "field 'num_classes' must be a whole number of at most 16777216"),
        ("model", 3, "field 'model' must be a text or null, got 3"),
        ("attacks", [3], r"field 'attacks\[0\]' must be a text, got 3"),
        ("files", {"a.py": 1}, r"field 'files\[a.py\]' must be a text, got 1"),
        ("seed", 2**63, "field 'seed' must be a whole number of at most 9223372036854775807"),
        ("colour", "red", "unknown field 'colour'"),
        ("model", None, r"the fields \['model'\] are missing"),
    ],
)
def test_a_config_that_does_not_fit(field: str, value: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, field: value}))
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        records.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert records.read_config(tmp_path) == CONFIG


@pytest.mark.parametrize(
    "line, message",
    [
        ("{}", "epoch: field 'epoch' is missing"),
        ('{"epoch":1}', "epoch 1 comes after epoch 1"),
        ('{"epoch":0}', "epoch: field 'epoch' must be a whole number of at least 1, got 0"),
        ('{"epoch":1,"val_clean":2}', "epoch: field 'val_clean' must be a number of at most 1.0, got 2"),
        ('{"epoch":1,"routers":{"r":{"load":3}}}', r"epoch: field 'routers\[r\].load' must be a list or null, got 3"),
    ],
)
def test_metrics_that_do_not_fit(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"epoch":1,"loss":{{"all":NaN}}}}\n{line}\n{{"epo')
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line 2: {message}.*; delete that line or the file"):
        read_metrics(tmp_path / "metrics.jsonl")


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("text", ["x" * 70_000, "[" * 900 + "]" * 900, "\x1b" * 1000])
def test_a_message_about_a_long_text_is_short(text: str, tmp_path: Path) -> None:
    """What was wrong stands first, what to do last: the middle is left out."""
    said = str(UserError(f"seed: expected int, got {text!r}; give one"))
    assert said.startswith("seed: expected int, got ")
    assert said.endswith("; give one")
    assert len(said) < 2050
    assert str(UserError("x" * 2000)) == "x" * 2000
    (tmp_path / "r.toml").write_text(f"{RECIPE}seed = {json.dumps(text)}\n")
    with pytest.raises(UserError, match="seed: expected int, got ") as caught:
        recipe.load_recipe(tmp_path / "r.toml")
    assert len(str(caught.value)) < 2050


RECIPE = 'model = "linear"\ndata = "digits"\nmethod = "standard"\nepochs = 1\n'
LONG = "n" * 300


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train", "r.toml", "--seed", str(2**63)], "--seed must be a number below 2**63"),
        (["train", "r.toml", "--threads", str(10**30)], "--threads must be a number below 2**63"),
        (["train", "r.toml", "--threads", str(10**9)], "threads must be at most 1024"),
        (["train", "r.toml", "--clip", "inf"], "--clip must be a finite number"),
        (["train", "r.toml", "--ema", "nan"], "--ema must be a finite number"),
        (["train", "r.toml", "--out", LONG], "File name too long"),
        (["train", "r.toml", "--out", "a\0b"], "--out must be a text without a zero byte"),
        (["train", "r.toml", "--model", "+".join("1" * 1990)], "is nested too deeply"),
        (["train", "~nobodyxx/x"], "there is no recipe '~nobodyxx/x'"),
        (["train", "deep.toml"], "deep.toml is nested too deeply"),
        (["train", "digits.toml"], "digits.toml is not a TOML file: Exceeds the limit"),
        (["train", "large.toml"], "seed: expected a number below 2**63"),
        (["evaluate", LONG], "File name too long"),
        (["evaluate", ".", "--seed", str(2**64)], "--seed must be a number below 2**63"),
        (["analyze", LONG], "File name too long"),
        (["sweep", ".", "--eps", "1e999"], "holds a number that is not finite"),
        (["blend", ".", "--clean", "nan"], "--clean must be a finite number"),
        (["train", "r.toml", "--out", "r\udcff"], "--out must be a text in UTF-8 (rename the file or folder)"),
        (["check", ".", "--device", "\x1b[2J"], "config.json"),
    ],
)
def test_arguments_out_of_every_range(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text(RECIPE)
    Path("deep.toml").write_text(f"model = {DEEP}")
    Path("digits.toml").write_text("epochs = " + "9" * 5000)
    Path("large.toml").write_text(f"{RECIPE}seed = {2**63}")
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize(
    "text, kind, message",
    [
        ("resnet8(width=1000000)", "model", "argument 'width': expected at most 4096, got 1000000"),
        ("ensemble(linear, experts=1000000000)", "model", "argument 'experts': expected at most 4096"),
        ("crop_flip(padding=10000000)", "augment", "argument 'padding': expected at most 4096"),
        ("folder(root='x', size=1000000)", "data", "argument 'size': expected at most 4096"),
        ("sgd(momentum=-3)", "optimizer", "momentum must be at least 0 and below 1; got -3"),
        ("sgd(lr=1e999)", "optimizer", "lr must be above 0, weight_decay 0 or more, both finite; got inf"),
        ("sgd(momentum=0, nesterov=True)", "optimizer", "nesterov needs a momentum above 0"),
        ("adamw(beta2=1)", "optimizer", "beta2 must be at least 0 and below 1; got 1"),
        ("pgd(linf(0.1), steps=10**60)", "attack", "argument 'steps': expected a number below 2**63"),
        ("folder(root='a\\0b')", "data", "argument 'root': expected a text without a zero byte"),
    ],
)
def test_specs_out_of_every_range(text: str, kind: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        spec.build(text, kind)
    assert message in str(caught.value)


def test_a_model_larger_than_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused while it is built, before the weights are drawn; what fits in is built, and leaves no hook."""
    from torch.nn.modules import module

    monkeypatch.setattr(memory, "memory", lambda: 2**20)
    with pytest.raises(UserError, match=r"needs more than 0\.0 GiB for its weights, this machine has 0\.0 GiB; expec"):
        build_model("resnet8(width=512)", 10, (3, 32, 32))
    build_model("linear", 10, (1, 8, 8))
    assert not module._global_parameter_registration_hooks
    monkeypatch.undo()
    assert 2**28 < memory.memory() < 2**50


def test_what_the_machine_lacks_is_one_line_and_a_fault_of_ours_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised: list[Exception] = []

    def verb() -> str:
        raise raised[-1]

    monkeypatch.setitem(cli.VERBS, "list", verb)
    allocator = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory\nmore"
    for error in (MemoryError(), RuntimeError(allocator), RuntimeError("CUDA out of memory. Tried to allocate")):
        raised.append(error)
        assert cli.main(["list"]) == 2
        assert capsys.readouterr().err.startswith("robustmoe: out of memory (")
    for fault in (KeyError("entropy"), RuntimeError("shapes differ"), RecursionError("ours"), OSError(5, "I/O")):
        raised.append(fault)
        with pytest.raises(type(fault)) as caught:
            cli.main(["list"])
        assert "please report it" in caught.value.__notes__[0]
