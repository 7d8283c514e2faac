"""Two processes (gloo) train what one process trains; under torchrun a peer that dies ends the run in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forks import fork_pair, gloo_threads

BATCH = 12
COMMON: dict[str, Any] = {
    "data": "digits",
    "optimizer": "sgd(lr=0.02, momentum=0.9, weight_decay=5e-4)",
    "schedule": "constant",
    "epochs": 1,
    "batch_size": BATCH,
    "max_steps": 5,
    "seed": 0,  # with it no image is within 1e-4 of a tie between two experts, where rounding would decide
    "val_limit": 33,  # odd: the two processes validate 17 and 16 images
    "threads": 1,
}
ENSEMBLE = "ensemble(resnet8(width=4), experts=4, router=small_cnn(width=4), standardise=True)"
PATHWAY = "pathway(resnet8(width=8), experts=4, ratio=0.5, router=small_cnn(width=4), standardise=True)"
SCENARIOS: dict[str, dict[str, Any]] = {
    "ensemble": {
        "model": ENSEMBLE,
        "method": "standard(balance=0.1)",
        "augment": "crop_flip(padding=1, flip=False)",
        "max_steps": 10,
    },
    "ensemble_at": {
        "model": ENSEMBLE,
        "method": "at(pgd(linf(0.1), steps=1, keep=last), balance=0.1)",
        "ema": 0.9,
        "clip": 1.0,
    },
    "pathway_at": {
        "model": PATHWAY,
        "method": "at(pgd(linf(0.1), steps=2, keep=last), balance=0.1)",
        "val_attack": "pgd(linf(0.1), steps=2)",
    },
    "pathway_advmoe": {  # two mini-batches a step; not the KL, whose gradient near the clean image is all rounding
        "model": PATHWAY,
        "method": "advmoe(pgd(linf(0.1), steps=1, objective=joint(margin), start=near, keep=last), balance=0.1)",
        "max_steps": 3,
    },
}
TRAINING_PASSES = {"pathway_advmoe": 4}
"""Passes in train mode a step, where they are not one: clean and attacked images, for two phases."""


def train_one(name: str, out: Path) -> dict[str, Any]:
    """Train a scenario into ``out``; what this process alone knows: its weights, its experts' batches, its writes."""
    import hashlib

    from robustmoe.models.convolution import Segments
    from robustmoe.recipe import Recipe
    from robustmoe.training import loop, train

    kept: list[loop.RunParts] = []
    sizes: list[list[int]] = []
    original = loop.build_parts

    def build(*arguments: Any, **more: Any) -> loop.RunParts:
        parts = original(*arguments, **more)
        kept.append(parts)
        network = getattr(parts.model, "network", None)
        if network is not None:  # one routed convolution tells the sizes for all

            def of_segments(module: Any, inputs: tuple[Any, ...]) -> None:
                if module.training and isinstance(inputs[1], Segments):
                    sizes.append(inputs[1].sizes)

            network.register_forward_pre_hook(of_segments)
        else:
            for expert in parts.model.experts:

                def of_batch(module: Any, inputs: tuple[Any, ...]) -> None:
                    if module.training:
                        sizes.append([len(inputs[0])])

                expert.register_forward_pre_hook(of_batch)
        return parts

    loop.build_parts = build
    try:
        train(Recipe(**{**COMMON, **SCENARIOS[name]}), out)
    finally:
        loop.build_parts = original
    digest = hashlib.sha256()
    state = kept[0].model.state_dict()
    average = kept[0].average
    for value in [*state.values(), *(average.state.values() if average else ())]:
        digest.update(value.contiguous().numpy().tobytes())
    return {"weights": digest.hexdigest(), "sizes": [size for batch in sizes for size in batch]}


def validate_some() -> dict[str, Any]:
    """Validation of fresh models, by however many processes there are: exact counts."""
    from robustmoe import spec
    from robustmoe.attacks import build_attack
    from robustmoe.models import build_model
    from robustmoe.training.health import validate

    data = spec.build("digits", "data")
    out = {}
    for name, text in (("ensemble", ENSEMBLE), ("pathway", PATHWAY), ("dense", "small_cnn")):
        model = build_model(text, 10, (1, 8, 8), data.mean, data.std)
        for n in (1, 33):  # with one image the second process has none
            attack = build_attack("pgd(linf(0.05), steps=2)")
            result = validate(model, data.val.head(n), attack, 7, torch.device("cpu"), seed=5)
            out[f"{name} {n}"] = [
                round(result.clean * n, 9),
                round((result.robust or 0.0) * n, 9),
                result.n,
                result.load,
            ]
    return out


def worker(folder: str) -> None:
    """What each of two processes does."""
    from robustmoe import distributed

    torch.set_num_threads(1)
    out = Path(folder)
    rank = int(os.environ["RANK"])
    wrote: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (written or event in ("os.rename", "os.mkdir", "os.truncate")) and str(arguments[0]).startswith(str(out)):
            wrote.append(str(arguments[0]))

    sys.addaudithook(audit)
    with distributed.session(torch.device("cpu")):
        found: dict[str, Any] = {name: train_one(name, out / name) for name in SCENARIOS}
        found["validation"] = validate_some()
        found["wrote"] = len(wrote)
    found["threads"] = gloo_threads()
    (out / f"rank{rank}.json").write_text(json.dumps(found))


def torchrun(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0", *arguments]
    return subprocess.Popen(
        launch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the two-process runs, and what each process had to say."""
    out = tmp_path_factory.mktemp("two")
    children = fork_pair("test_distributed:worker", str(out), output=out / "said")
    assert [child.wait() for child in children] == [0, 0], [child.output.read_text() for child in children]
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_what_one_trains(
    name: str, launched: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    from robustmoe.records import read_jsonl
    from robustmoe.training.checkpoint import read_state, read_weights

    out, ranks = launched
    alone = train_one(name, tmp_path)
    assert ranks[0][name]["weights"] == ranks[1][name]["weights"]  # the replicas are equal, bit for bit
    # In every pass both processes enter each of 4 experts, one of them at times without an image.
    sizes = [rank[name]["sizes"] for rank in ranks]
    passes = {**COMMON, **SCENARIOS[name]}["max_steps"] * TRAINING_PASSES.get(name, 1)
    assert [len(each) for each in sizes] == [4 * passes, 4 * passes]
    assert any((here == 0) != (there == 0) for here, there in zip(*sizes))
    assert sum(alone["sizes"]) == sum(sizes[0]) + sum(sizes[1]) == BATCH * passes

    one, two = read_state(tmp_path / "state.pt"), read_state(out / name / "state.pt")
    differences = {key: float((value - two["model"][key]).abs().max()) for key, value in one["model"].items()}
    worst = max(differences, key=lambda key: differences[key])
    print(f"{name}: largest difference of a weight {differences[worst]:.3g} at {worst}")
    assert differences[worst] < 5e-5, worst
    kept_one, kept_two = (read_weights(folder / "model.safetensors") for folder in (tmp_path, out / name))
    assert max(float((value - kept_two[key]).abs().max()) for key, value in kept_one.items()) < 5e-5

    (line_one,), (line_two,) = (read_jsonl(folder / "metrics.jsonl") for folder in (tmp_path, out / name))
    for field in ("val_clean", "val_robust", "val_n", "train_accuracy"):
        assert line_one[field] == line_two[field], field
    assert line_two["loss"] == pytest.approx(line_one["loss"], abs=1e-5)
    assert line_two["routers"]["router"]["load"] == line_one["routers"]["router"]["load"]


def test_validation_by_two_processes_counts_what_one_counts(launched: tuple[Path, list[dict[str, Any]]]) -> None:
    _, ranks = launched
    assert ranks[0]["validation"] == ranks[1]["validation"] == json.loads(json.dumps(validate_some()))


def test_the_first_process_alone_writes(launched: tuple[Path, list[dict[str, Any]]]) -> None:
    _, ranks = launched
    assert ranks[0]["wrote"] > 4 * len(SCENARIOS)  # config, state, weights, metrics
    assert ranks[1]["wrote"] == 0


def test_no_thread_of_a_session_outlives_it(launched: tuple[Path, list[dict[str, Any]]]) -> None:
    """One that drops its last tensor while Python ends aborts the process, whose work was done (exit code -6)."""
    _, ranks = launched
    assert [rank["threads"] for rank in ranks] == [[], []]


def test_processes_that_torchrun_starts_anew_do_not_meet_those_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share torchrun's store, in which the dead ones' addresses still stand: to wait for them is to hang."""
    import torch.distributed as dist

    from robustmoe import distributed

    kept: list[Any] = []
    shared = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *told, **more: iter([(shared, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *told, store, **more: kept.append(store))
    monkeypatch.setattr(distributed, "_end", lambda error: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for attempt, session in (("0", 0), ("0", 1), ("1", 0)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        monkeypatch.setattr(distributed, "_sessions", session)
        with distributed.session(torch.device("cpu")):
            assert not kept[-1].check(["address of 0"]), (attempt, session)
            kept[-1].set("address of 0", "here")


def workers_of(pid: int) -> dict[int, int]:
    """rank -> pid of torchrun's workers."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
            if ranks:
                found[ranks[0]] = int(child)
    return found


def until_saved(run: Path, alive: Callable[[], str | None]) -> None:
    """Waits for the run's first checkpoint; ``alive`` gives what a process that ended has said."""
    deadline = time.monotonic() + 90
    while not (run / "state.pt").exists():
        assert (said := alive()) is None, said
        assert time.monotonic() < deadline
        time.sleep(0.02)


def killed_forked(recipe: Path, run: Path) -> str:
    """What the first of two forked processes says after the second is killed."""
    command = ["train", str(recipe), "--out", str(run)]
    first, second = fork_pair("robustmoe.cli:main", command, output=run.with_name("first"))
    until_saved(run, lambda: None if first.poll() is second.poll() is None else first.output.read_text())
    os.kill(second.pid, signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    assert first.wait() == 2
    return first.output.read_text()


def killed_under_torchrun(recipe: Path, run: Path) -> str:
    """What the first of torchrun's two workers says on stderr after the second is killed."""
    logs = run.with_name("logs")
    arguments = ["--redirects", "3", "--log-dir", str(logs), "-m", "robustmoe", "train", str(recipe), "--out", str(run)]
    process = torchrun(*arguments)
    until_saved(run, lambda: None if process.poll() is None else process.communicate()[0])
    workers = workers_of(process.pid)
    assert set(workers) == {0, 1}
    os.kill(workers[1], signal.SIGKILL)
    text, _ = process.communicate(timeout=60)
    assert process.returncode != 0, text
    (error,) = logs.glob("*/attempt_0/0/stderr.log")
    return error.read_text()


@pytest.mark.parametrize(
    "launcher",
    [
        "fork",
        pytest.param(
            "torchrun",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds torchrun's workers in /proc"),
            ],
        ),
    ],
)
def test_a_dead_peer_ends_the_run_in_one_line_and_resume_goes_on(launcher: str, tmp_path: Path) -> None:
    """Forked, told what torchrun tells its workers; in `make test-slow` under torchrun itself, whose three processes
    import torch. What its SIGTERM to the living peer does is in test_cli.
    """
    from robustmoe.recipe import Recipe
    from robustmoe.records import read_jsonl
    from robustmoe.training import train
    from robustmoe.training.checkpoint import read_state

    settings = {**COMMON, **SCENARIOS["ensemble"], "epochs": 400, "checkpoint_every": 3, "val_limit": 8}
    del settings["max_steps"]
    recipe, run = tmp_path / "r.toml", tmp_path / "run"
    recipe.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    said = {"fork": killed_forked, "torchrun": killed_under_torchrun}[launcher](recipe, run)
    told = [line for line in said.splitlines() if not line.startswith(("epoch ", "warning: router", "run folder: "))]
    assert len(told) == 1, told
    died = "robustmoe: process 0 of 2 stopped: another process of this run died"
    assert told[0].startswith(died if launcher == "fork" else (died, "robustmoe: stopped;"))
    assert "--resume" in told[0]

    state = read_state(run / "state.pt")["progress"]
    done = state["epoch"] * (1295 // BATCH) + state["step"]  # of 1295 training images
    print(f"killed after step {done}")
    command = ["train", str(recipe), "--out", str(run), "--resume", "--max-steps", str(done + 5), "--threads", "1"]
    children = fork_pair("robustmoe.cli:main", command, output=tmp_path / "said")
    assert [child.wait() for child in children] == [0, 0], [child.output.read_text() for child in children]
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["step"] == done + 5
    if done < 200:  # and it is the run of one process that was never killed
        train(Recipe(**{**settings, "max_steps": done + 5}), tmp_path / "one")
        one, two = (read_state(folder / "state.pt")["model"] for folder in (tmp_path / "one", run))
        assert max(float((value - two[key]).abs().max()) for key, value in one.items()) < 1e-3
