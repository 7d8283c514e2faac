"""Models spread over processes (gloo): they train what one process trains, each process holds less, and a run goes on
with another number of processes. One launch of two processes serves every claim.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forks import fork_pair, gloo_threads
from robustmoe.errors import UserError

VIT = "vit_moe(tiny, width=16, depth=2, heads=2, patch=4, mlp_ratio=2, experts=4, placement=(0, 1)"
STEPS = 8
COMMON: dict[str, Any] = {
    "data": "digits",
    "optimizer": "sgd(lr=0.02, momentum=0.9, weight_decay=5e-4, undecayed='.*bias')",
    "schedule": "constant",
    "epochs": 1,
    "batch_size": 24,
    "max_steps": STEPS,
    "val_limit": 9,  # odd: of two processes one validates an image that is not counted
    "threads": 1,
}
SCENARIOS: dict[str, dict[str, Any]] = {
    "full": {  # gradients that begin at the routers, in validation; averaged weights; clipping
        "sharding": "full",
        "model": f"{VIT}, k=2, capacity=2.0)",
        "method": "at(pgd(linf(0.1), steps=1, keep=last), balance=0.1)",
        "ema": 0.9,
        "clip": 1.0,
        "val_attack": "pgd(linf(0.1), steps=1, objective=router_only)",
    },
    "full_norms": {  # any model, as one unit; BatchNorm sees the whole batch; two gradients a step
        "sharding": "full",
        "model": "resnet8(width=4)",
        "method": "awp(at(fgsm(linf(0.1))))",
        "max_steps": 2,
    },
    "experts": {
        "sharding": "experts",
        "model": f"{VIT}, k=2, expert_dropout=0.1)",
        "method": "at(pgd(linf(0.1), steps=1, keep=last), balance=0.1)",
        "optimizer": "adamw(lr=1e-4)",
        "ema": 0.9,
        "clip": 1.0,
        "val_attack": "pgd(linf(0.1), steps=1, objective=router_only)",
    },
    "slots": {
        "sharding": "experts",
        "model": f"{VIT}, k=1, choice=slots, expert_dropout=0.1)",
        "method": "trades(pgd(linf(0.1), steps=1, keep=last))",
        "max_steps": 3,
    },
}
STOPPED = 5
"""The step after which "full" stops once, and goes on."""


def train_one(name: str, out: Path, resume: bool = False, dies: bool = False, **fields: Any) -> int:
    """Trains a scenario into ``out``; returns the bytes of weights and optimiser state that this process holds at the
    end. ``dies``: before its third checkpoint.
    """
    from robustmoe.recipe import Recipe
    from robustmoe.training import loop, train
    from robustmoe.training.sharding import held_bytes

    held: list[int] = []
    original = loop.save

    def save(parts: loop.RunParts, *more: Any) -> None:
        held.append(held_bytes(parts.model, parts.optimisers))
        if dies and len(held) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        original(parts, *more)

    loop.save = save
    try:
        train(Recipe(**{**COMMON, **SCENARIOS[name], **fields}), out, resume=resume)
    finally:
        loop.save = original
    return held[-1]


def worker(folder: str) -> None:
    """What each of two processes does. The second one dies in the last run."""
    torch.set_num_threads(1)
    out, rank = Path(folder), int(os.environ["RANK"])
    train_one("full", out / "full", max_steps=STOPPED)
    if rank == 0:
        shutil.copytree(out / "full", out / "stopped")
    held = {name: train_one(name, out / name, resume=name == "full") for name in SCENARIOS}
    said = {"held": held, "threads": gloo_threads(), "seconds": time.process_time()}
    (out / f"rank{rank}.json").write_text(json.dumps(said))
    try:
        train_one("experts", out / "dead", dies=rank == 1, checkpoint_every=2)
    except UserError as error:
        (out / "error").write_text(str(error))


def of_four(folder: str, steps: int) -> None:
    """What each of four, or then two, processes does."""
    torch.set_num_threads(1)
    for name in ("full", "experts"):
        train_one(name, Path(folder) / name, resume=(Path(folder) / name).exists(), max_steps=steps)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the two-process runs, and what each process had to say."""
    out = tmp_path_factory.mktemp("sharded")
    children = fork_pair("test_sharding:worker", str(out), output=out / "said")
    assert [child.wait() for child in children] == [0, -9], [child.output.read_text() for child in children]
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    print("CPU seconds of each process:", [rank["seconds"] for rank in ranks])
    return out, ranks


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The folder of the same runs by one process, and the bytes that it held."""
    out = tmp_path_factory.mktemp("alone")
    return out, {name: train_one(name, out / name, sharding="none") for name in SCENARIOS}


def furthest(one: Path, two: Path) -> float:
    """The largest difference of a weight of two runs, as any reader of model.safetensors finds it."""
    from safetensors.torch import load_file

    weights: list[dict[str, Tensor]] = [load_file(run / "model.safetensors") for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    difference = max(float((value - weights[1][name]).abs().max()) for name, value in weights[0].items())
    print(f"{two}: largest difference of a weight {difference:.3g}")
    return difference


@pytest.mark.parametrize("name", SCENARIOS)
def test_spread_over_two_processes_it_trains_what_one_trains(
    name: str, launched: tuple[Path, list[dict[str, Any]]], alone: tuple[Path, dict[str, int]]
) -> None:
    """One of them, "full", also stopped and went on."""
    from robustmoe.records import read_jsonl

    assert furthest(alone[0] / name, launched[0] / name) < 1e-5
    whole, spread = (read_jsonl(folder / name / "metrics.jsonl")[-1] for folder in (alone[0], launched[0]))
    for field in ("val_clean", "val_robust", "val_n", "train_accuracy"):
        assert whole[field] == spread[field], field
    for field in ("loss", "grad_norm"):
        assert spread[field] == pytest.approx(whole[field], abs=1e-5), field
    for router, line in whole["routers"].items():
        for field in ("load", "consistency", "moved"):
            assert spread["routers"][router][field] == line[field], (router, field)


def test_each_process_holds_its_share(
    launched: tuple[Path, list[dict[str, Any]]], alone: tuple[Path, dict[str, int]]
) -> None:
    """Of "full" half of all, but for tensors of an odd number of rows, and AdamW's counts of steps; of "experts" half
    of what belongs to an expert.
    """
    whole, ranks = alone[1], launched[1]
    for name in ("full", "full_norms"):
        assert sum(rank["held"][name] for rank in ranks) == whole[name]
        assert max(rank["held"][name] for rank in ranks) < 0.52 * whole[name]
    experts = 2 * 4 * (2 * 16 * 32 + 32 + 16) * 4  # layers, experts, both matrices and biases, bytes
    copies = {"experts": 3, "slots": 2}  # the weights, and AdamW's two or SGD's one of each
    for name, number in copies.items():
        assert [rank["held"][name] for rank in ranks] == [whole[name] - number * experts // 2] * 2


def test_no_thread_of_a_session_outlives_it(launched: tuple[Path, list[dict[str, Any]]]) -> None:
    """Meshes and spread models hold process groups, whose threads could abort a process that ends."""
    assert [rank["threads"] for rank in launched[1]] == [[], []]


def test_a_checkpoint_of_two_goes_on_in_one(
    launched: tuple[Path, list[dict[str, Any]]], alone: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    run = shutil.copytree(launched[0] / "stopped", tmp_path / "run")
    train_one("full", run, resume=True)
    assert furthest(alone[0] / "full", run) < 1e-5
    assert sorted(path.name for path in run.glob("state*")) == [f"state-0-{STEPS}", "state.pt"]


def test_a_dead_process_ends_the_run_in_one_line_and_resume_goes_on(
    launched: tuple[Path, list[dict[str, Any]]], alone: tuple[Path, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (launched[0] / "error").read_text()
    assert said.startswith("process 0 of 2 stopped: another process of this run died")
    assert "--resume" in said
    assert "\n" not in said
    run = launched[0] / "dead"
    assert (run / "state-0-4").is_dir()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # as torchrun --max-restarts says: no --resume is needed
    train_one("experts", run)
    assert furthest(alone[0] / "experts", run) < 1e-5


@pytest.mark.slow
def test_four_processes_train_what_one_trains_and_two_and_one_go_on(
    alone: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    for processes, steps in ((4, 3), (2, 6)):
        children = fork_pair(
            "test_sharding:of_four", str(tmp_path), steps, output=tmp_path / "said", processes=processes
        )
        assert [child.wait() for child in children] == [0] * processes, [child.output.read_text() for child in children]
    for name in ("full", "experts"):
        train_one(name, tmp_path / name, resume=True)
        assert furthest(alone[0] / name, tmp_path / name) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds torchrun's workers in /proc")
def test_torchrun_starts_a_run_anew_and_it_goes_on(alone: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    from test_distributed import torchrun, workers_of

    recipe, run = tmp_path / "r.toml", tmp_path / "run"
    settings = {**COMMON, **SCENARIOS["experts"], "checkpoint_every": 1}
    recipe.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    process = torchrun("--max-restarts", "1", "-m", "robustmoe", "train", str(recipe), "--out", str(run))
    while not (run / "state.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    text, _ = process.communicate(timeout=180)
    assert process.returncode == 0, text
    assert "going on from epoch 1" in text
    assert furthest(alone[0] / "experts", run) < 1e-5


def test_one_process_writes_and_reads_the_parts_of_a_convolutional_net(tmp_path: Path) -> None:
    """Its weights are channels-last."""
    conv = {"model": "conv_small", "method": "standard", "ema": 0.0, "clip": 0.0, "val_attack": None}
    train_one("full", tmp_path / "whole", max_steps=4, **conv)
    train_one("full", tmp_path / "two", max_steps=2, **conv)
    train_one("full", tmp_path / "two", max_steps=4, resume=True, **conv)
    assert furthest(tmp_path / "whole", tmp_path / "two") == 0.0


def test_a_model_in_python_is_not_sharded_in_one_process_either(tmp_path: Path) -> None:
    import robustmoe as rm

    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    with pytest.raises(UserError, match="sharding=full: a model in Python stays whole where it is"):
        rm.train(
            net, torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]), method="standard", epochs=1, sharding="full",
            out=tmp_path / "run",
        )  # fmt: skip


REFUSED = {
    "PGD makes as many passes as its images need": {"val_attack": "pgd(linf(0.1), restarts=2)"},
    "APGD makes as many passes as its images need": {"method": "consistent(standard, attack=apgd(linf(0.1)))"},
    "certificates need the whole model": {"val_certifier": "smoothing(0.25)"},
    "certified training reads weights outside": {"method": "certified(linf(0.1))", "model": "small_cnn"},
    "the model has no experts of tokens": {"sharding": "experts", "model": "small_cnn"},
    "3 experts cannot be shared out evenly by 2 processes": {
        "sharding": "experts",
        "model": "vit_moe(tiny, width=16, depth=2, heads=2, patch=4, experts=3, placement=(1,))",
    },
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_sharded_is_refused_in_one_line(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any process waits for another one."""
    from robustmoe import distributed

    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(UserError, match=words) as error:
        train_one("full", tmp_path / "run", **REFUSED[words])
    assert "expected" in str(error.value)
    assert "\n" not in str(error.value)
