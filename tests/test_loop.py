"""A run that is killed goes on to the very weights of a run that was not; what it keeps; what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forks import fork
from robustmoe import compat
from robustmoe.cli import main
from robustmoe.data import DATASETS, Data, ImageSet
from robustmoe.data.sets import digits
from robustmoe.errors import UserError
from robustmoe.recipe import Recipe
from robustmoe.records import read_jsonl
from robustmoe.training import TrainingStopped, load_model, train
from robustmoe.training.checkpoint import read_state, read_weights, save_state

STEPS = 20
"""Batches of 64 in an epoch of `PLAIN`: 1295 training images."""

SHORT = 10
"""Batches of 32 in an epoch of `FIELDS`: 331 training images."""

FIELDS: dict[str, Any] = {
    "model": "pathway(resnet8(width=4), experts=2, router=small_cnn(width=4), standardise=True)",
    "data": "digits(val=0.77)",
    "method": "at(pgd(linf(0.1), steps=1, keep=last), balance=0.1)",
    "optimizer": "sgd(lr=0.05)",
    "schedule": "one_cycle",
    "epochs": 2,
    "batch_size": 32,
    "augment": "crop_flip(padding=1)",
    "precision": "bf16",
    "ema": 0.95,
    "val_attack": "pgd(linf(0.1), steps=2)",
    "val_limit": 40,
    "threads": 1,
    "seed": 1,
}
PLAIN: dict[str, Any] = {
    "model": "small_cnn(width=4)",
    "data": "digits",
    "method": "standard",
    "optimizer": "adamw(lr=0.01)",
    "epochs": 2,
    "batch_size": 64,
    "threads": 1,
}
"""The quickest run there is."""


def toml(path: Path, fields: dict[str, Any]) -> str:
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items()))
    return str(path)


def equal(a: Any, b: Any) -> bool:
    """Equal in structure, and every tensor bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, averaged weights, and the metrics but for the time they took."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    a, b = read_state(one / "state.pt"), read_state(other / "state.pt")
    for part in ("model", "optimisers", "average", "rng"):
        assert equal(a[part], b[part]), part
    lines = [read_jsonl(run / "metrics.jsonl") for run in (one, other)]
    for line in [*lines[0], *lines[1]]:
        del line["seconds"]
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `FIELDS` that nobody disturbed."""
    return train(Recipe(**FIELDS), tmp_path_factory.mktemp("straight") / "run")


# ------------------------------------------------------------------------------------------------ killed


def killed_in_epoch_2(*arguments: str) -> int:
    """The command line, in a process that is killed before step 8 of epoch 2."""
    from robustmoe.training import loop

    original = loop.take_step

    def step(parts: Any, state: Any, *rest: Any) -> Any:
        if (state.epoch, state.step) == (1, 7):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(parts, state, *rest)

    loop.take_step = step
    return main(list(arguments))


@pytest.mark.parametrize("every", [3, 0], ids=["checkpoint_every_3_steps", "checkpoint_every_epoch"])
def test_kill_9_in_the_middle_of_an_epoch_then_resume_is_bit_for_bit_the_straight_run(
    every: int, straight: Path, tmp_path: Path
) -> None:
    recipe = toml(tmp_path / "r.toml", {**FIELDS, "checkpoint_every": every})
    run = tmp_path / "run"
    child = fork("test_loop:killed_in_epoch_2", "train", recipe, "--out", str(run), output=tmp_path / "said")
    assert child.wait() == -signal.SIGKILL, child.output.read_text()
    state = read_state(run / "state.pt")["progress"]
    assert (state["epoch"], state["step"]) == (1, 6 if every else 0)
    assert len(read_jsonl(run / "metrics.jsonl")) == 1
    assert main(["train", recipe, "--out", str(run), "--resume"]) == 0
    assert_same_run(straight, run)


def test_half_precision_that_the_processor_does_not_have_is_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for here in (True, False):
        monkeypatch.setattr(compat, "multiplies", lambda device, dtype, here=here: here)
        train(
            Recipe(**{**PLAIN, "precision": "bf16", "batch_size": 4, "max_steps": 1, "val_limit": 4}),
            tmp_path / str(here),
        )
        said = "precision=bf16: this cpu has no such products, and steps take several times those of fp32"
        assert (said in capsys.readouterr().err) is not here


def test_kill_9_of_the_plain_command_then_the_plain_command_with_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No help from inside: the command as users type it, killed when the first epoch's line is there."""
    fields = {**PLAIN, "epochs": 60, "checkpoint_every": 7, "val_limit": 8}
    recipe, run = toml(tmp_path / "r.toml", fields), tmp_path / "run"
    child = fork("robustmoe.cli:main", ["train", recipe, "--out", str(run)], output=tmp_path / "said")
    while not (run / "metrics.jsonl").exists():
        assert child.poll() is None, child.output.read_text()
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    state = read_state(run / "state.pt")["progress"]
    assert state["epoch"] < 60
    stop = str((state["epoch"] + 2) * STEPS)  # to the end of the next epoch but one
    capsys.readouterr()
    assert main(["train", recipe, "--out", str(run), "--resume", "--max-steps", stop]) == 0
    out, error = capsys.readouterr()
    assert out.startswith(f"run folder: {run}")
    assert f"going on from epoch {state['epoch'] + 1}, step {state['step']}" in error
    train(Recipe(**{**fields, "max_steps": int(stop)}), tmp_path / "straight")
    assert_same_run(tmp_path / "straight", run)


def crashed(call: str, *arguments: str) -> int:
    """The command line, in a process that ends as ``os.call`` is to write its fourth checkpoint: with half of it on the
    disk, or all of it under its temporary name.
    """
    original = getattr(os, call)
    calls: list[str] = []

    def crash(*given: Any) -> Any:
        target = given[0]
        name = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        if ".state.pt." in name:
            calls.append(name)
            if len(calls) == 4:
                if call == "fsync":
                    os.truncate(name, os.path.getsize(name) // 2)
                os._exit(9)
        return original(*given)

    setattr(os, call, crash)
    return main(list(arguments))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(call: str, straight: Path, tmp_path: Path) -> None:
    """Of a run with one every 5 steps: epoch 1 at 5 and 10 steps, after epoch 1, and epoch 2 at 5, which is lost."""
    recipe = toml(tmp_path / "r.toml", {**FIELDS, "checkpoint_every": 5})
    run = tmp_path / "run"
    child = fork("test_loop:crashed", call, "train", recipe, "--out", str(run), output=tmp_path / "said")
    assert child.wait() == 9, child.output.read_text()
    left = list(run.glob(".state.pt.*.tmp"))
    assert len(left) == 1
    state = read_state(run / "state.pt")["progress"]
    assert (state["epoch"], state["step"]) == (1, 0)
    assert main(["train", recipe, "--out", str(run), "--resume"]) == 0
    assert_same_run(straight, run)


def test_a_run_killed_before_its_first_checkpoint_can_be_resumed(tmp_path: Path) -> None:
    recipe = Recipe(**PLAIN)
    train(recipe, tmp_path / "straight")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes((tmp_path / "straight" / "config.json").read_bytes())
    (run / ".state.pt.0123.tmp").write_bytes(b"PK\x03\x04 half a checkpoint")
    with pytest.raises(UserError, match="already holds a run; add --resume to go on"):
        train(recipe, run)
    train(recipe, run, resume=True)
    assert_same_run(tmp_path / "straight", run)


def test_a_run_killed_between_last_step_and_validation_does_not_blame_its_router(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint every 10 steps, of epochs of 10 steps: nothing is left to do but to validate."""
    from robustmoe.training import health

    class Killed(BaseException):
        pass

    def killed(*arguments: Any) -> None:
        raise Killed

    recipe = Recipe(**{**FIELDS, "checkpoint_every": SHORT})
    with monkeypatch.context() as patch:
        patch.setattr(health, "validate", killed)
        with pytest.raises(Killed):
            train(recipe, tmp_path / "run")
    state = read_state(tmp_path / "run" / "state.pt")["progress"]
    assert (state["epoch"], state["step"]) == (0, SHORT)
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(straight, tmp_path / "run")
    assert "got no gradient" not in capsys.readouterr().err


def spoilt(run: Path, what: str) -> None:
    """A run whose first epoch is done, with one of its files changed."""
    if what == "classes":
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, "classes": [*config["classes"][:9], "ten"]}))
    elif what == "metrics gone":
        (run / "metrics.jsonl").unlink()
    elif what.startswith("state"):
        state = run / "state.pt"
        saved = read_state(state)
        state.unlink()
        if what == "state is a link":
            state.symlink_to("nowhere")
        elif what == "state lacks a field":
            del saved["progress"]["seen"]
            save_state(state, saved)


@pytest.mark.parametrize(
    "what, code, message",
    [
        ("nothing", 0, "going on from epoch 2, step 2\n"),
        ("classes", 2, "was trained on other classes than digits has now (such as 'ten', now '9')"),
        ("metrics gone", 0, "metrics.jsonl tells of 0 of the 1 epochs that are done; it goes on without the others"),
        ("state is gone", 2, "metrics.jsonl tells of 2 epochs, and"),
        ("state is a link", 2, "state.pt is not a regular file, or a link to none: no checkpoint to resume from"),
        ("state lacks a field", 2, "state.pt: the checkpoint is damaged (progress: field 'seen' is missing)"),
    ],
)
def test_a_resume_with_a_file_that_was_changed(
    what: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = toml(tmp_path / "r.toml", PLAIN), tmp_path / "run"
    assert main(["train", recipe, "--out", str(run), "--max-steps", str(STEPS + 2)]) == 0
    spoilt(run, what)
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    capsys.readouterr()
    assert main(["train", recipe, "--out", str(run), "--resume"]) == code
    assert message in capsys.readouterr().err
    if code:
        assert before == {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    else:
        assert [line["epoch"] for line in read_jsonl(run / "metrics.jsonl")] == (
            [2] if what == "metrics gone" else [1, 2]
        )


# ------------------------------------------------------------------------------------------------ no space


@pytest.fixture
def file_size() -> Iterator[Callable[[int], None]]:
    """file_size(n): no file may grow past n bytes (EFBIG; Python ignores SIGXFSZ)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_for_a_checkpoint_is_one_line_and_the_run_can_go_on(
    file_size: Callable[[int], None], straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = toml(tmp_path / "r.toml", FIELDS), tmp_path / "run"
    assert main(["train", recipe, "--out", str(run), "--max-steps", str(SHORT)]) == 0
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    capsys.readouterr()
    file_size(len(before["model.safetensors"]) + 1000)  # the weights fit, the checkpoint does not
    assert main(["train", recipe, "--out", str(run), "--resume"]) == 2
    file_size(resource.RLIM_INFINITY)
    *_, error = capsys.readouterr().err.splitlines()
    full = f"{os.strerror(errno.EFBIG)}; free some space, or write to another place (--out, or a copy of the run)"
    assert error == f"robustmoe: cannot write {run}/state.pt: {full}"
    after = {file.name: file.read_bytes() for file in run.iterdir()}
    assert set(after) == set(before)  # no temporary file is left
    assert after["state.pt"] == before["state.pt"]
    assert main(["train", recipe, "--out", str(run), "--resume"]) == 0
    assert_same_run(straight, run)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot write .*locked/run: Permission denied; ask for the right"):
        train(Recipe(**PLAIN), tmp_path / "locked" / "run")


# ------------------------------------------------------------------------------------------------ refused


def test_where_a_run_may_start_and_resume(tmp_path: Path) -> None:
    recipe = Recipe(**{**PLAIN, "max_steps": 1})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, not a run folder; choose another --out"):
        train(recipe, tmp_path / "file")
    with pytest.raises(UserError, match=r"there is no run to resume \(no config.json\); start it without --resume"):
        train(recipe, tmp_path / "run", resume=True)
    train(recipe, tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run; add --resume to go on, or choose another --out"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    "field, value",
    [
        ("model", "small_cnn(width=5)"),
        ("method", "standard(balance=0.1)"),
        ("optimizer", "sgd(lr=0.01)"),
        ("schedule", "constant"),
        ("epochs", 3),
        ("batch_size", 32),
        ("augment", "crop_flip(padding=1)"),
        ("inputs", "centred"),
        ("precision", "bf16"),
        ("ema", 0.5),
        ("clip", 1.0),
        ("seed", 7),
        ("val_attack", "fgsm(linf(0.1))"),
        ("val_limit", 3),
    ],
)
def test_resume_with_another_recipe_names_the_field(field: str, value: Any, stopped: Path) -> None:
    with pytest.raises(UserError, match=f"was trained with {field} = .*, this command says .*resume with the same"):
        train(Recipe(**{**PLAIN, field: value}), stopped, resume=True)


@pytest.mark.parametrize(
    "inputs, mean, std",
    [("raw", [0.0], [1.0]), ("centred", [0.5], [0.5]), ("data", list(digits().mean), list(digits().std))],
)
def test_how_a_model_takes_its_images(
    inputs: str, mean: list[float], std: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands in config.json, in the model that a measurement loads, and a resumed run is the straight one."""
    recipe = {**PLAIN, "inputs": inputs}
    straight = train(Recipe(**recipe), tmp_path / "straight")
    stopped = train(Recipe(**recipe, max_steps=3), tmp_path / "stopped")
    train(Recipe(**recipe), stopped, resume=True)
    config = json.loads((stopped / "config.json").read_text())
    assert (config["inputs"], config["mean"], config["std"]) == (inputs, mean, std)
    models = [load_model(run) for run in (straight, stopped)]
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(models[0](x), models[1](x))
    seen: list[Tensor] = []
    models[1].network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    models[1](x)
    torch.testing.assert_close(seen[0], (x - mean[0]) / std[0])


def test_a_run_from_before_a_field_goes_on(stopped: Path, tmp_path: Path) -> None:
    """Its config.json has no ``inputs``: it took its images as runs without the field did, and no other way."""
    run = copy(stopped, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    del config["inputs"]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was trained with inputs = 'data', this command says 'raw'"):
        train(Recipe(**PLAIN, inputs="raw"), run, resume=True)
    train(Recipe(**PLAIN), run, resume=True)


def test_inputs_that_the_model_does_not_take(stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"inputs=raw, but what init=.* gives was trained on images of another mean"):
        train(Recipe(**PLAIN, inputs="raw", init=str(stopped)), tmp_path / "run")
    with pytest.raises(UserError, match="inputs=raw is for models of this package; one of your own takes pixels"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "digits", method="standard", epochs=1, inputs="raw")


def test_resume_with_other_images_is_refused(stopped: Path) -> None:
    with pytest.raises(UserError, match="was trained with data_hash"):
        train(Recipe(**{**PLAIN, "data": "digits(val=0.2)"}), stopped, resume=True)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `PLAIN`, stopped after 3 steps."""
    return train(Recipe(**{**PLAIN, "max_steps": 3}), tmp_path_factory.mktemp("stopped") / "run")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_resume_from_a_truncated_checkpoint_is_one_line(keep: float, stopped: Path, tmp_path: Path) -> None:
    run = copy(stopped, tmp_path / "run")
    whole = (run / "state.pt").read_bytes()
    (run / "state.pt").write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(
        UserError, match=r"state\.pt: the checkpoint is (damaged|broken) .* Start the run anew in another --out"
    ):
        train(Recipe(**PLAIN), run, resume=True)


def test_resume_from_the_checkpoint_of_another_architecture_names_the_tensor(stopped: Path, tmp_path: Path) -> None:
    run = copy(stopped, tmp_path / "run")
    other = train(Recipe(**{**PLAIN, "model": "small_cnn(width=5)", "max_steps": 1}), tmp_path / "other")
    identity = read_state(run / "state.pt")["run"]
    (run / "state.pt").write_bytes((other / "state.pt").read_bytes())
    with pytest.raises(UserError, match=r"state\.pt is the checkpoint of another run than config\.json beside it says"):
        train(Recipe(**PLAIN), run, resume=True)
    save_state(run / "state.pt", {**read_state(other / "state.pt"), "run": identity})
    with pytest.raises(UserError, match=r"another architecture: 'network\.conv1\.weight' has shape \(5, 1, 3, 3\)"):
        train(Recipe(**PLAIN), run, resume=True)


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "epoch -1": (lambda s: s["progress"].update(epoch=-1), "'epoch' must be a whole number of at least 0, got -1"),
    "epoch 3": (lambda s: s["progress"].update(epoch=3), "it is at epoch 3, step 3, of 2 epochs of 20 steps"),
    "step 21": (lambda s: s["progress"].update(step=21), "it is at epoch 0, step 21, of 2 epochs of 20 steps"),
    "step 1.5": (lambda s: s["progress"].update(step=1.5), "'step' must be a whole number, got 1.5"),
    "best nan": (lambda s: s["progress"].update(best=math.nan), "'best' must be .*, got nan"),
    "best 2": (lambda s: s["progress"].update(best=2.0), "'best' must be a number of at most 1.0, got 2.0"),
    "no best": (lambda s: s["progress"].clear() or s["progress"].update(more=1), "unknown field 'more'"),
    "progress": (lambda s: s.update(progress=[]), "expected an object"),
    "sums": (lambda s: s["progress"].update(sums={"all": 3}), "'sums.all.' must be an object, got 3"),
    "no optimiser": (lambda s: s.update(optimisers=[]), "it has not the 1 optimisers of the method"),
    "two optimisers": (lambda s: s["optimisers"].append(s["optimisers"][0]), "it has not the 1 optimisers"),
    "no groups": (lambda s: s["optimisers"][0].clear(), "it has not the 1 optimisers"),
    "other groups": (lambda s: s["optimisers"][0]["param_groups"][0].pop("params"), "AdamW does not take its state"),
    "fewer": (lambda s: s["optimisers"][0]["param_groups"][0]["params"].pop(), "AdamW does not take its state"),
    "average": (lambda s: s.update(average={"steps": 1, "state": {}}), "its averaged weights are not those"),
    "rng": (lambda s: s.update(rng=s["rng"][:8]), "its random state is none of torch's"),
    "rng None": (lambda s: s.update(rng=None), "its random state is none of torch's"),
    "model": (lambda s: s.update(model=[1]), "it holds something else than tensors"),
    "model None": (lambda s: s["model"].update({"network.conv1.weight": None}), "it holds something else than tensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_with_a_field_out_of_range_is_one_line_and_changes_nothing(
    damage: str, stopped: Path, tmp_path: Path
) -> None:
    """Also where its digest is right: the fields are looked at before anything is changed."""
    change, said = DAMAGES[damage]
    run = copy(stopped, tmp_path / "run")
    state = read_state(run / "state.pt")
    change(state)
    save_state(run / "state.pt", state)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError, match=said) as error:
        train(Recipe(**PLAIN), run, resume=True)
    assert str(error.value).startswith(f"{run}/state.pt: ")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("metrics.jsonl", b"{}\n", "line 1: epoch: field 'epoch' is missing"),
        ("metrics.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("metrics.jsonl", b'{"epoch":1}\n{"epoch":1}\n', "line 2: epoch 1 comes after epoch 1"),
        ("model.safetensors", None, "no such file; expected the weights of a run"),
        ("model.safetensors", b"x", "the file is damaged"),
    ],
)
def test_a_damaged_file_beside_the_checkpoint_is_one_line_and_changes_nothing(
    name: str, text: bytes | None, said: str, whole_epoch: Path, tmp_path: Path
) -> None:
    run = copy(whole_epoch, tmp_path / "run")
    if text is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(text)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError, match=rf"{re.escape(name)}[:,] {said}"):
        train(Recipe(**PLAIN), run, resume=True)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.fixture(scope="module")
def whole_epoch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `PLAIN`, stopped after its first epoch."""
    return train(Recipe(**{**PLAIN, "max_steps": STEPS}), tmp_path_factory.mktemp("whole_epoch") / "run")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_resume_with_a_damaged_config_is_one_line(text: str, stopped: Path, tmp_path: Path) -> None:
    run = copy(stopped, tmp_path / "run")
    (run / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: the file is (damaged|broken)"):
        train(Recipe(**PLAIN), run, resume=True)


def copy(run: Path, to: Path) -> Path:
    to.mkdir()
    for file in run.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


# ------------------------------------------------------------------------------------------------ what is kept


def test_max_steps_then_without_it_is_the_straight_run(straight: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, at an epoch's end, and past it."""
    for stop in (SHORT - 3, SHORT, SHORT + 1):
        recipe = Recipe(**{**FIELDS, "max_steps": stop})
        train(recipe, tmp_path / "run", resume=stop != SHORT - 3)
        state = read_state(tmp_path / "run" / "state.pt")["progress"]
        assert state["epoch"] * SHORT + state["step"] == stop
        before = (tmp_path / "run" / "state.pt").read_bytes()
        train(recipe, tmp_path / "run", resume=True)  # there is nothing to do, and nothing is done
        assert (tmp_path / "run" / "state.pt").read_bytes() == before
        load_model(tmp_path / "run")
    train(Recipe(**FIELDS), tmp_path / "run", resume=True)
    assert_same_run(straight, tmp_path / "run")


def test_part_of_an_epoch_is_never_the_best(tmp_path: Path, scores: Callable[[list[float]], None]) -> None:
    """Validation says 0.5 after epoch 1, 0.9 after part of epoch 2, then 0.4: the best epoch is the first."""
    scores([0.5, 0.9, 0.4])
    recipe = {**PLAIN, "schedule": "constant"}
    train(Recipe(**{**recipe, "max_steps": STEPS + 5}), tmp_path / "run")
    kept = (tmp_path / "run" / "model.safetensors").read_bytes()
    train(Recipe(**recipe), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == kept
    assert [(line["epoch"], line["best"]) for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [
        (1, True),
        (2, False),
    ]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """scores(s): the next validations find these accuracies."""
    from robustmoe.training import health

    def give(values: list[float]) -> None:
        rest = iter(values)
        monkeypatch.setattr(health, "validate", lambda *a: health.Validation(next(rest), None, 10, {}, {}, {}))

    return give


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_best_epoch_by_validation_is_kept(
    ema: float, tmp_path: Path, scores: Callable[[list[float]], None]
) -> None:
    """The last epoch is worse; an equal score does not replace an earlier one."""
    fields = {**PLAIN, "schedule": "constant", "ema": ema}
    scores([0.4])
    first = train(Recipe(**{**fields, "epochs": 1}), tmp_path / "first")
    scores([0.4, 0.4, 0.3])
    train(Recipe(**{**fields, "epochs": 3}), tmp_path / "run")
    kept = read_weights(tmp_path / "run" / "model.safetensors")
    assert equal(kept, read_weights(first / "model.safetensors"))
    assert [line["best"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [True, False, False]
    state = read_state(tmp_path / "run" / "state.pt")
    assert not equal(kept, dict(sorted(state["model"].items())))
    if ema:  # the averaged weights are what is kept
        assert equal(kept, read_sorted(read_state(first / "state.pt")["average"]["state"]))
    else:
        assert equal(kept, read_sorted(read_state(first / "state.pt")["model"]))


def read_sorted(state: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(state.items()))


class Sealed(ImageSet):
    """A split that nobody may open."""

    image_shape = (1, 8, 8)

    def _refuse(self, *arguments: Any) -> Any:
        raise AssertionError("the test split was read")

    batch = subset = head = _contents = _refuse


def test_the_test_split_is_never_read_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sealed() -> Data:
        data = digits()
        return dataclasses.replace(data, test=Sealed(data.test.labels, data.test.index))

    monkeypatch.setitem(DATASETS, "sealed", sealed)
    fields = {**PLAIN, "data": "sealed", "val_attack": "fgsm(linf(0.1))", "checkpoint_every": 9}
    train(Recipe(**{**fields, "max_steps": 25}), tmp_path / "run")
    train(Recipe(**fields), tmp_path / "run", resume=True)
    with pytest.raises(AssertionError, match="the test split was read"):
        sealed().test.batch([0])


def test_same_seed_same_weights_other_seed_other_weights(tmp_path: Path) -> None:
    runs = [
        train(Recipe(**{**PLAIN, "epochs": 1, "seed": seed}), tmp_path / str(number))
        for number, seed in enumerate((0, 0, 1))
    ]
    torch.manual_seed(99)  # no draw comes from torch's global generator
    first, again, other = (read_weights(run / "model.safetensors") for run in runs)
    assert equal(first, again)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.startswith("network."))


def test_a_run_says_what_it_was(tmp_path: Path) -> None:
    """config.json has every field of the recipe and the facts; a metrics line has the epoch's."""
    recipe = Recipe(**{**PLAIN, "epochs": 1})
    run = train(recipe, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    assert {name: config[name] for name in PLAIN} == {**PLAIN, "epochs": 1}
    assert config["images"] == {"train": 1295, "val": 143, "test": 359}
    assert "clean accuracy on 143" in config["selection"]
    assert config["selection"].endswith("the test set is never seen")
    # 1 -> 4 -> 8 channels of 3 x 3 with biases, then 8 -> 10: 40 + 296 + 90
    assert config["parameters"] == 426
    (line,) = read_jsonl(run / "metrics.jsonl")
    assert (line["epoch"], line["step"], line["val_n"], line["val_robust"], line["routers"]) == (1, 20, 143, None, {})
    assert line["lr"]["all"] == pytest.approx(0.005 * (1 + math.cos(math.pi * 19 / 20)))


# ------------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize(
    "method, said",
    [
        ("standard", r"in phase 'all' the gradient of 'network\.conv1\.weight' \(6 of 6 parameters\) is not finite"),
        ("at(pgd(linf(0.1), steps=1))", r"in phase 'all' the attack's loss or gradient is not finite; .*"),
    ],
)
def test_weights_that_overflow_stop_the_run_in_one_line_and_lose_nothing(
    method: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of 1e30 throws the weights to 1e30 in the first step; the next forward pass overflows."""
    fields = {**PLAIN, "method": method, "optimizer": "sgd(lr=1e30, momentum=0.0, weight_decay=0.0)"}
    recipe, run = toml(tmp_path / "r.toml", fields), tmp_path / "run"
    assert main(["train", recipe, "--out", str(run), "--max-steps", "1"]) == 0
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    with pytest.raises(TrainingStopped, match=rf"^stopped in epoch 1, step 2: {said}.*start anew in another --out"):
        train(Recipe(**fields), run, resume=True)
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.name != "metrics.jsonl"} == {
        name: content for name, content in before.items() if name != "metrics.jsonl"
    }
    capsys.readouterr()
    assert main(["train", recipe, "--out", str(run), "--resume"]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("robustmoe: ")]) == 1


def test_a_validation_attack_that_meets_infinite_weights_stops_in_one_line(tmp_path: Path) -> None:
    fields = {**PLAIN, "optimizer": "sgd(lr=1e30, momentum=0.0, weight_decay=0.0)", "val_attack": "fgsm(linf(0.1))"}
    with pytest.raises(TrainingStopped, match="stopped in the validation after epoch 1: the attack's loss or gradient"):
        train(Recipe(**{**fields, "max_steps": 1}), tmp_path / "run")


def test_more_processes_than_a_batch_can_be_shared_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from robustmoe import distributed

    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(UserError, match="batch_size 64 cannot be shared by 3 processes; expected a multiple"):
        train(Recipe(**PLAIN), tmp_path / "run")
