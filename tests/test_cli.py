"""`robustmoe.cli`: parsing, help, one-line errors and exit codes. The work behind a verb is replaced by a recorder."""

from __future__ import annotations

import errno
import inspect
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from robustmoe import cli, listing, recipe, spec, verbs
from robustmoe.cli import main
from robustmoe.errors import UserError
from robustmoe.flags import parse
from robustmoe.options import BlendOptions, EvaluateOptions

RECIPE = 'model = "resnet18"\ndata = "digits"\nmethod = "standard"\nepochs = 3\n'


class Calls(list[tuple[tuple[Any, ...], dict[str, Any]]]):
    """Records calls; returns or raises what it is told."""

    result: Any = None
    error: BaseException | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.append((args, kwargs))
        if self.error is not None:
            raise self.error
        return self.result


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> Calls:
    """Put a recorder where a verb finds its work."""
    calls, fake = Calls(), types.ModuleType(module)
    setattr(fake, function, calls)
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(f"robustmoe.{module.partition('.')[2]}", fake, raising=False)
    return calls


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "small.toml").write_text(RECIPE)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def trained(here: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return stand_in(monkeypatch, "robustmoe.training", "train")


@pytest.fixture
def evaluated(here: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return stand_in(monkeypatch, "robustmoe.evaluation", "evaluate_run")


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line on stderr of a command that fails."""
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("robustmoe: ")
    assert err.count("\n") == 1
    return err.removeprefix("robustmoe: ").rstrip("\n")


# ---------------------------------------------------------------------------------------------- help


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from robustmoe.cli import main\n"
        "from robustmoe.verbs import VERBS\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0\n"
        "assert all(main([verb, '--help']) == 0 for verb in VERBS) and main(['list']) == 0\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'rich', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


def test_python_dash_m() -> None:
    command = [sys.executable, "-m", "robustmoe", "evaluat"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("robustmoe: unknown verb 'evaluat'; did you mean 'evaluate'")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_names_every_verb(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in verbs.VERBS)


@pytest.mark.parametrize("argv", [["--help"], *([verb, "--help"] for verb in verbs.VERBS)], ids=" ".join)
def test_help_fits_80_columns_and_shows_an_example(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-2] == "example:"
    assert lines[-1].startswith("  robustmoe ")


def test_the_examples_of_help_are_commands_that_are_taken() -> None:
    for name, verb in verbs.VERBS.items():
        _, _, example = (inspect.getdoc(verb) or "").partition("Example: robustmoe ")
        command, *argv = shlex.split(example)
        assert command == name
        parse(name, verb, argv)


def test_help_of_train_shows_every_field_with_its_words_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--checkpoint-every N steps between checkpoints; 0 = one at the end of each epoch (recipe default: 0)" in out
    assert "over all processes together; auto = as many as the memory holds (recipe default: 128)" in out
    assert "RECIPE a recipe file" in out


# ---------------------------------------------------------------------------------------------- train


def test_train_passes_the_recipe_with_overrides(trained: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--epochs 5 --batch-size=8 --val-limit none --augment crop_flip(padding=4) --attack a --attack b(1)"
    flags = [*words.split(), "--precision", "bf16"]
    broken = ["train", "small.toml", *flags, "--model", "[not: yaml"]
    assert "model: cannot read '[not: yaml'" in refused(broken, capsys)
    assert main(["train", "small.toml", *flags]) == 0
    ((recipe, out), keywords) = trained[0]
    assert (recipe.epochs, recipe.batch_size, recipe.val_limit, recipe.model) == (5, 8, None, "resnet18")
    assert (recipe.augment, recipe.attacks, recipe.precision) == ("crop_flip(padding=4)", ("a", "b(1)"), "bf16")
    assert (out, keywords) == (Path("runs/small"), {"resume": False})
    assert capsys.readouterr().out == "run folder: runs/small\nnext: robustmoe evaluate runs/small\n"


def test_train_refuses_a_used_folder_unless_it_resumes(trained: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["train", "small.toml", "--out", "runs/one"], capsys)
    assert message == "'runs/one' already holds a run; add --resume to go on, or choose another --out"
    assert "is a file" in refused(["train", "small.toml", "--out", "small.toml"], capsys)
    assert trained == []
    assert main(["train", "small.toml", "--out", "runs/one", "--resume"]) == 0
    assert (trained[0][0][1:], trained[0][1]) == ((Path("runs/one"),), {"resume": True})


def test_a_worker_does_not_refuse_the_folder_the_first_process_made_and_is_silent(
    trained: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "small.toml", "--out", "runs/one"]) == 0
    assert len(trained) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "argv, message",
    [
        ("train", "the following arguments are required: RECIPE; see robustmoe train --help"),
        ("report", "the following arguments are required: RUN; see robustmoe report --help"),
        ("train smal.toml", "there is no recipe 'smal.toml'; .*"),
        ("train small.toml --epoch 3", "unknown option '--epoch'; did you mean '--epochs'.*"),
        ("train small.toml --batch-sise 3", "unknown option '--batch-sise'; did you mean '--batch-size'.*"),
        ("train small.toml --epochs x", "--epochs must be int; got 'x'"),
        ("train small.toml --threads x", "--threads must be int or None; got 'x'"),
        ("train small.toml --epochs", "argument --epochs: expected one argument; see robustmoe train --help"),
        ("train small.toml --epochs 0", "small.toml: epochs must be at least 1; got 0"),
        ("train small.toml --precision fp8", "--precision must be one of 'fp32', 'bf16', 'fp16'; got 'fp8'"),
        ("train small.toml other", "unrecognized arguments: other; see robustmoe train --help"),
        ("train small.toml -q", "unknown option .-q.; nothing is needed here, leave it out"),
        ("evaluate runs/on", r"there is no run folder 'runs/on'; did you mean 'runs/one'\? known: runs/one"),
        ("evaluate small.toml", "'small.toml' is a file, not a run folder"),
        ("evaluate runs/one --attack pgd(", "cannot read 'pgd\\(': .*"),
        ("evaluate runs/one --curve 0,x", "'0,x' is not a list of numbers.*"),
        ("evaluate runs/one --split tets", "--split must be one of 'test', 'val', 'train'; got 'tets'"),
        ("blend runs/one --clean high", "--clean must be float or None; got 'high'"),
        ("blend runs/one runs/two", r"there is no run folder 'runs/two'; .*"),
        ("analyze runs/one", "'runs/one' has no rows yet; robustmoe evaluate runs/one makes them"),
        ("list atack", r"unknown kind or name 'atack'; did you mean 'attack'.*"),
        ("list digits_densee", r"unknown kind or name .*; did you mean 'digits_dense'.*, recipes, zoo, layouts"),
        ("--verbose", "unknown verb '--verbose'; .*"),
    ],
)
def test_a_mistake_is_one_line(here: Path, argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(message, refused(argv.split(), capsys))


# ---------------------------------------------------------------------------------------------- other verbs


def test_evaluate_passes_its_flags_and_prints_the_table(
    evaluated: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated.result = []
    monkeypatch.setattr("robustmoe.reporting.summary_table", lambda results, audit: f"a table of {len(results)}")
    flags = ["--attack", "pgd(linf(8/255), steps=2)", "--attack=fgsm", "--limit", "5", "--curve", "0, 2/255"]
    assert main(["evaluate", "runs/one", *flags, "--split", "val", "--batch-size", "3", "--out", "other"]) == 0
    assert capsys.readouterr().out == "a table of 0\n"
    (args, keywords) = evaluated[0]
    assert args == (Path("runs/one"),)
    options = EvaluateOptions(
        attacks=("pgd(linf(8/255), steps=2)", "fgsm"), split="val", limit=5, batch_size=3, curve=(0.0, 2 / 255)
    )
    assert keywords == {"data": None, "out": Path("other/rows"), "options": options}


def test_evaluate_by_default_takes_the_attacks_of_the_recipe(evaluated: Calls) -> None:
    evaluated.result = []
    assert main(["evaluate", "runs/one", "--curve", "none"]) == 0
    assert main(["evaluate", "runs/one"]) == 0
    (none, auto) = (vars(keywords["options"]) for _, keywords in evaluated)
    assert (none["attacks"], none["curve"], none["batch_size"]) == ((), (), 128)
    assert auto["curve"] is None


def test_blend_passes_its_flags_and_prints_the_table(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch, "robustmoe.evaluation", "blend_run")

    class Curve:
        header = types.SimpleNamespace(run="b")

        def __str__(self) -> str:
            return "the table of b"

    calls.result = Curve()
    assert main(["blend", "runs/one"]) == 0
    assert capsys.readouterr().out == (
        "the table of b\n\nrun folder: b\nnext: robustmoe evaluate b; report shows the curve\n"
    )
    flags = ["--alphas", "0, 1", "--attack", "pgd(l2(0.5))", "--mix", "logits", "--sharpen", "nuts", "--clean", "0.9"]
    flags += ["--certifier", "bounds(l2(0.5))"]
    more = ["--limit", "5", "--batch-size", "3", "--seed", "2", "--device", "cpu", "--out", "b"]
    assert main(["blend", "runs/one", "runs/one", *flags, *more]) == 0
    assert calls == [
        (
            (Path("runs/one"),),
            {"options": BlendOptions(), "out": None},
        ),
        (
            (Path("runs/one"), Path("runs/one")),
            {
                "options": BlendOptions(
                    alphas=(0.0, 1.0), attack="pgd(l2(0.5))", mix="logits", sharpen="nuts", clean=0.9,
                    certifier="bounds(l2(0.5))", limit=5, batch_size=3, seed=2, device="cpu",
                ),
                "out": "b",
            },
        ),
    ]  # fmt: skip
    capsys.readouterr()
    calls.error = KeyboardInterrupt()
    assert refused(["blend", "runs/one"], capsys, 130) == "stopped; the same command goes on where it was"


def test_report_takes_several_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch, "robustmoe.reporting", "report")
    calls.result = Path("x.html")
    assert main(["report", "runs/one", "runs/one", "--out", "x.html"]) == 0
    assert calls == [(([Path("runs/one")] * 2, Path("x.html")), {"figures": None, "format": "svg"})]
    assert capsys.readouterr().out == "x.html\n"


def test_demo(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "robustmoe.demo", "demo")
    calls.result = Path("d/report.html")
    assert main(["demo", "--out", "d"]) == 0
    assert calls == [((Path("d"), 1), {})]
    assert capsys.readouterr().out == "report: d/report.html\n"


def test_list_the_kinds_one_kind_or_one_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(width: int = 8) -> int:
        """A small one."""
        return width

    monkeypatch.setattr(spec, "TABLES", {"model": lambda: {"small": small}, "data": lambda: {"digits": lambda: 0}})
    monkeypatch.setattr(listing.index, "entries", spec.describe)
    assert main(["list", "models"]) == 0
    assert capsys.readouterr().out == "models\n  small(width=8)\n      A small one.\n"
    assert main(["list", "small"]) == 0
    assert capsys.readouterr().out == (
        "small: a model\n  A small one.\n\narguments:\n  width=8 (a whole number)\n"
        "      channels of the stem and the first stage.\n\nexample:\n"
        '  robustmoe train digits_hard_moe --model "small"\n'
    )
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["models", "data"]


def test_every_kind_has_its_words() -> None:
    assert listing.KINDS.keys() == spec.TABLES.keys()


def test_verbs_are_plain_functions(trained: Calls) -> None:
    assert verbs.train("small.toml", {"epochs": 1}, out="x").startswith("run folder: x\n")
    with pytest.raises(UserError, match="unknown field 'epoch'"):
        verbs.train("small.toml", {"epoch": 1})


# ---------------------------------------------------------------------------------------------- ends


def test_ctrl_c(trained: Calls, evaluated: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    trained.error = evaluated.error = KeyboardInterrupt()
    assert refused(["train", "small.toml"], capsys, 130) == "stopped; go on with --resume"
    assert refused(["evaluate", "runs/one"], capsys, 130) == "stopped; the same command goes on where it was"


def test_sigterm_in_training_says_how_to_go_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = types.ModuleType("robustmoe.training")
    unwound = []

    def train(*args: Any, **more: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            unwound.append(True)

    fake.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "robustmoe.training", fake)
    monkeypatch.setattr("robustmoe.training", fake, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    assert refused(["train", "small.toml"], capsys, 143) == "stopped; go on with --resume"
    assert unwound == [True]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "number, advice",
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "ask its owner for the right to it, or use a copy that is yours"),
        (errno.EPERM, "ask its owner for the right to it, or use a copy that is yours"),
        (errno.EROFS, "ask its owner for the right to it, or use a copy that is yours"),
        (errno.ENOTDIR, "check the path"),
    ],
)
def test_no_place_to_write_is_one_line(
    trained: Calls, number: int, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trained.error = OSError(number, os.strerror(number), "runs/small/state.pt")
    assert refused(["train", "small.toml"], capsys) == f"{os.strerror(number)}: runs/small/state.pt; {advice}"


def test_a_bug_shows_its_traceback(trained: Calls) -> None:
    for error in (ZeroDivisionError("a bug"), OSError(errno.ENOENT, "gone"), ValueError("a bug")):
        trained.error = error
        with pytest.raises(type(error)):
            main(["train", "small.toml"])


def test_a_closed_pipe_is_quiet() -> None:
    code = (
        "import sys, os\n"
        "from robustmoe import cli\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "sys.exit(cli.main(['--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_sigterm_does_not_cut_off_the_line_of_a_process_whose_peer_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sends SIGTERM as soon as it sees a dead peer; the session ignores it then, until the line is written."""
    handlers = []

    class Stderr(io.StringIO):
        def write(self, text: str) -> int:
            handlers.append(signal.getsignal(signal.SIGTERM))
            return super().write(text)

    def lost(argv: list[str]) -> str:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise UserError("process 0 of 2 stopped")

    before, stderr = signal.getsignal(signal.SIGTERM), Stderr()
    monkeypatch.setattr(cli, "_run", lost)
    monkeypatch.setattr(sys, "stderr", stderr)
    assert cli.main(["train"]) == 2
    assert stderr.getvalue() == "robustmoe: process 0 of 2 stopped\n"
    assert set(handlers) == {signal.SIG_IGN}
    assert signal.getsignal(signal.SIGTERM) == before


def test_list_recipes_and_what_one_of_them_says(capsys: pytest.CaptureFixture[str]) -> None:
    files = recipe.every()
    assert len(files) == len({file.name for file in (Path(__file__).parents[1] / "recipes").rglob("*.toml")}) > 100
    assert main(["list", "recipes"]) == 0
    said = capsys.readouterr().out
    assert [line.strip() for line in said.splitlines() if line.startswith("  ") and line[2] != " "] == [
        file.stem for file in files
    ]
    assert max(map(len, said.splitlines())) <= 80
    assert " ".join(said.split()).count(" GMAC an image and pass") == len(files)
    assert "not said" not in said
    assert main(["list", "digits_hard_moe"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "balance=0.1); 60 epochs; 0.0001 GMAC an image and pass, 0.05 M parameters; result: smaller runs" in said
    assert "A hard-routed MoE of two networks" in said
    assert "robustmoe train digits_hard_moe robustmoe certify runs/digits_hard_moe" in said
    assert main(["train", "nope"]) == 2
    assert "robustmoe list recipes has them all" in capsys.readouterr().err
