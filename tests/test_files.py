"""What a command may write over, who may write at the same time, and what a killed writer leaves."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forks import fork
from robustmoe import provenance
from robustmoe.cli import main
from robustmoe.errors import UserError
from robustmoe.records import contents, locks, read, record, writing
from robustmoe.records.files import explained, write_own

TRAINING = ["--model", "small_cnn(width=2)", "--method", "standard", "--val-limit", "8", "--threads", "1"]
ATTACK = "pgd(linf(0.1), steps=1)"
ROWS = "rows/pgd-linf-0.1-steps-1-keep-first.jsonl"
OWN = """
import torch


def make(num_classes, image_shape):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))
"""

# ------------------------------------------------------------------------------------------------ whose file it is


def test_nothing_but_a_file_of_ours_is_overwritten(tmp_path: Path) -> None:
    path, mark = tmp_path / "sweep.json", '{"kind":"sweep"'
    write_own(path, '{"kind":"sweep", "n": 1}', mark)
    path.write_text('{\n  "kind": "sweep"\n}')  # as an editor may have laid it out
    write_own(path, '{"kind":"sweep", "n": 2}', mark)
    for mine in ("mine", '{"kind": "sweeping"}', '{"type":"x","kind":"sweep"}', " " * 2000 + '{"kind":"sweep"'):
        path.write_text(mine)
        with pytest.raises(UserError, match=r"sweep\.json is there, and robustmoe did not write it, so it was left al"):
            write_own(path, '{"kind":"sweep"}', mark)
        assert path.read_text() == mine
    path.write_text("")  # an empty file holds nothing
    write_own(path, '{"kind":"sweep", "n": 2}', mark)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is there, and robustmoe did not write it"):
        write_own(tmp_path / "pipe", '{"kind":"sweep"}', mark)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link is there, and robustmoe did not write it"):
        write_own(tmp_path / "link", '{"kind":"sweep"}', mark)


def test_a_folder_of_a_users_own_is_no_place_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    command = ["audit", "mine.py:make", "--data", "digits", "--out", "project"]
    for name, text, said in (
        ("config.json", '{"name": "my project"}', "project/config.json: "),
        ("config.json", json.dumps(config_of_a_run()), "holds something else than a model of your own"),
        ("report.html", "<p>mine</p>", "report.html is there, and robustmoe did not write it"),
        ("notes.txt", "mine", "project: not a run folder"),
    ):
        Path("project").mkdir(exist_ok=True)
        for path in Path("project").iterdir():
            path.unlink()
        (Path("project") / name).write_text(text)
        assert main(command) == 2
        assert said in capsys.readouterr().err
        assert {path.name: path.read_text() for path in Path("project").iterdir()} == {name: text}


def config_of_a_run() -> dict[str, Any]:
    return {"model": "resnet8", "data": "digits", "num_classes": 10, "image_shape": [1, 8, 8], "mean": [0], "std": [1]}


# ------------------------------------------------------------------------------------------------ one writer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_writer")
    (folder / "mine.py").write_text(OWN)
    recipe = {"data": "digits", "epochs": 1, "batch_size": 64, "max_steps": 1, "attacks": [ATTACK]}
    (folder / "r.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in recipe.items()))
    assert main(["train", str(folder / "r.toml"), *TRAINING, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def busy() -> Iterator[Callable[[Path, str], None]]:
    """busy(folder, what): from now on another writer is at work there, in a thread."""
    begun, over, threads = threading.Event(), threading.Event(), []

    def hold(folder: Path, what: str) -> None:
        with writing(folder, what):
            begun.set()
            assert over.wait(60)

    def start(folder: Path, what: str) -> None:
        threads.append(threading.Thread(target=hold, args=(folder, what)))
        threads[-1].start()
        assert begun.wait(10)

    yield start
    over.set()
    for thread in threads:
        thread.join()


def commands(run: Path, place: Path) -> dict[str, list[str]]:
    """Each verb that writes, told to write into ``place`` (``run``, where it wants a run)."""
    here, few = str(place), ["--limit", "2", "--device", "cpu"]
    return {
        "train": ["train", str(run.parent / "r.toml"), *TRAINING, "--out", here, "--resume"],
        "evaluate": ["evaluate", here, *few, "--attack", ATTACK],
        "check": ["check", here, *few],
        "dissect": ["dissect", here, *few],
        "sweep": ["sweep", here, *few],
        "lipschitz": ["lipschitz", here, *few],
        "certify": ["certify", here, *few],
        "blend": ["blend", str(run), str(run), *few, "--out", here],
        "audit": ["audit", f"{run.parent / 'mine.py'}:make", "--data", "digits", *few, "--out", here],
        "demo": ["demo", "--out", here],
    }


@pytest.mark.parametrize("what", [locks.WHOLE, ROWS], ids=["whole", "rows"])
@pytest.mark.parametrize("verb", commands(Path(), Path()))
def test_every_pair_of_verbs_on_one_folder(
    verb: str,
    what: str,
    run: Path,
    tmp_path: Path,
    busy: Callable[[Path, str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A verb writes a whole folder, but evaluate one file in it: so two kinds of writers stand for the first of each
    pair, and which kind the second is, it says itself.
    """
    asked: list[str] = []
    enter = locks._enter
    place = tmp_path / "fresh" if verb in ("blend", "audit", "demo") else run
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    busy(place, what)
    monkeypatch.setattr(locks, "_enter", lambda *given: asked.append(given[2]) or enter(*given))
    capsys.readouterr()
    assert main(commands(run, place)[verb]) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"robustmoe: {re.escape(str(place))}\S* is being written by another process \(process {os.getpid()} on \S+, "
        r"since 20\d\d-\S+ \S+: .+\); wait for it, or write to another place \(--out, or a copy of the run\)",
        said,
    )
    assert asked == [ROWS if verb == "evaluate" else locks.WHOLE]
    assert {path: path.read_bytes() for path in before} == before


def test_two_evaluations_may_write_two_files_of_one_folder(
    run: Path, busy: Callable[[Path, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    busy(run, "rows/another.jsonl")
    assert main(commands(run, run)["evaluate"]) == 0
    (run / ROWS).unlink()
    assert [path.name for path in run.iterdir() if path.name.startswith(".robustmoe")] != []
    assert not any(path.name.startswith(".robustmoe") for path in contents(run))


def hold_until_killed(folder: str, what: str) -> None:
    with writing(folder, what):
        (Path(folder) / "begun").touch()
        time.sleep(60)


def test_the_lock_of_a_killed_writer_is_no_lock_and_its_halves_of_files_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for what in (locks.WHOLE, "rows/a.jsonl"):
        child = fork("test_files:hold_until_killed", str(folder), what, output=tmp_path / "said")
        while not (folder / "begun").exists():
            assert child.poll() is None, child.output.read_text()
            time.sleep(0.01)
        (folder / "begun").unlink()
        with (
            pytest.raises(UserError, match=rf"being written by another process \(process {child.pid} on "),
            writing(folder),
        ):
            pass
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert [path.name for path in folder.iterdir()] != []
        with writing(folder):
            assert len(list(folder.iterdir())) == 1
        assert list(folder.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    left = [
        ".config.json.ab.tmp",
        ".state.pt.0123abcd.tmp",
        "rows/.a.examples.jsonl.00ff00ff.tmp",
        "rows/.a.jsonl.1f.tmp",
    ]
    left += ["rows/.a-curve.jsonl.1f.tmp"]
    mine = [".config.json.xyz.tmp", ".notes.txt.ab.tmp", "config.json.ab.tmp", "deep/.config.json.ab.tmp", ".tmp"]
    (tmp_path / "deep").mkdir()
    for name in (*left, *mine):
        (tmp_path / name).write_text("half")
    there = lambda: sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.tmp"))  # noqa: E731
    with writing(tmp_path, "rows/a.jsonl"):
        assert there() == sorted([*left[:2], left[4], *mine])
    with writing(tmp_path):
        assert there() == sorted(mine)


def test_a_kill_while_the_first_file_is_written_is_no_dead_end(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.json.ab12.tmp").write_text('{"model": ')
    command = commands(run, folder)["train"]
    assert main(command) == 2  # there is no run to resume
    assert main(command[:-1]) == 0
    assert [path.name for path in contents(folder)] == ["config.json", "metrics.jsonl", "model.safetensors", "state.pt"]
    assert len(list(folder.iterdir())) == 4


def two_at_once(gate: str, *arguments: str) -> int:
    """The command line, as soon as the file ``gate`` is there."""
    while not Path(gate).exists():
        time.sleep(0.001)
    return main(list(arguments))


def test_of_two_trainings_into_one_folder_one_runs(run: Path, tmp_path: Path) -> None:
    command = commands(run, tmp_path / "both")["train"][:-1]
    children = [
        fork(
            "test_files:two_at_once",
            str(tmp_path / "go"),
            *command,
            "--seed",
            str(seed),
            output=tmp_path / f"said{seed}",
        )
        for seed in (1, 2)
    ]
    (tmp_path / "go").touch()
    codes = [child.wait() for child in children]
    assert sorted(codes) == [0, 2], [child.output.read_text() for child in children]
    winner, said = codes.index(0) + 1, children[codes.index(2)].output.read_text()
    assert "being written by another process" in said or "already holds a run" in said
    alone = tmp_path / "alone"
    assert main([*commands(run, alone)["train"][:-1], "--seed", str(winner)]) == 0
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "both", alone)]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "both" / "config.json").read_text())["seed"] == winner
    assert len((tmp_path / "both" / "metrics.jsonl").read_text().splitlines()) == 1


# ------------------------------------------------------------------------------------------------ other versions

FILES = {"sweep": "sweep.json", "lipschitz": "lipschitz.json", "certify": "certificates/*.json", "blend": "blend.json"}
MORE = {
    "sweep": ["--attack", ATTACK, "--eps", "0.1", "--draws", "0"],
    "lipschitz": ["--batch-size", "1", "--attack", ATTACK],
    "certify": ["--batch-size", "1", "--certifier", "bounds(linf(0.1), search=0)"],
    "blend": ["--attack", ATTACK, "--alphas", "0.5,1"],
}


@pytest.mark.parametrize("verb", FILES)
def test_work_that_other_versions_take_up_says_so_and_keeps_it(
    verb: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    if verb != "blend":
        shutil.copytree(run, folder)
    command = [*commands(run, folder)[verb], *MORE[verb]]
    now = provenance.versions()
    written: list[Any] = []

    def write(path: Path, *given: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_own(path, *given)

    with monkeypatch.context() as patch:
        patch.setattr(provenance, "versions", lambda: {**now, "torch": "2.1.0"})
        patch.setattr(record, "write_own", write)
        assert main(command) == 130
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().err
    assert len(re.findall(r"goes on under other versions: torch 2\.1\.0 then, \S+ now \(\d done before\)\n", said)) == 1
    (file,) = folder.glob(FILES[verb])
    header = json.loads(file.read_text())["header"]
    assert header["versions"]["torch"] == "2.1.0"
    assert [entry["versions"]["torch"] for entry in header["resumed"]] == [now["torch"]]
    before = file.read_bytes()
    assert main(command) == 0  # all is done: nobody takes anything up
    assert "other versions" not in capsys.readouterr().err
    assert json.loads(file.read_text())["header"] == json.loads(before)["header"]


def test_a_training_and_an_evaluation_that_other_versions_take_up(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "rows", ignore_errors=True)
    now = provenance.versions()
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "versions", lambda: {**now, "robustmoe": "9.9"})
        assert main([*commands(run, folder)["train"], "--max-steps", "2"]) == 0
        assert main([*commands(run, folder)["evaluate"], "--curve", "0.05"]) == 0
        rows = folder / ROWS
        rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:1]))
    said = f"robustmoe {now['robustmoe']} then, 9.9 now (1 done before)\n"
    assert f"{folder} goes on under other versions: {said}" in capsys.readouterr().err
    assert main(commands(run, folder)["evaluate"]) == 0
    said = f"goes on under other versions: robustmoe 9.9 then, {now['robustmoe']} now (0 done before)\n"
    assert f"{rows} {said}" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    assert (config["versions"], [entry["versions"]["robustmoe"] for entry in config["resumed"]]) == (now, ["9.9"])
    header = read(rows).header
    assert header.versions["robustmoe"] == "9.9"
    assert [(entry.versions["robustmoe"], entry.done) for entry in header.resumed] == [(now["robustmoe"], 0)]


# ------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    "verb, number, said",
    [
        ("read", errno.EACCES, "Permission denied; ask its owner for the right to read it"),
        ("write", errno.EACCES, "Permission denied; ask for the right to write there, or write to another place"),
        ("write", errno.EROFS, "Read-only file system; write to another place"),
        ("write", errno.ENOSPC, "No space left on device; free some space, or write to another place"),
        ("read", errno.EIO, "Input/output error; check the path and its permissions"),
    ],
)
def test_what_failed_and_what_to_do(verb: str, number: int, said: str) -> None:
    with pytest.raises(UserError, match=f"^cannot {verb} there: {said}"), explained(verb, Path("there")):
        raise OSError(number, os.strerror(number))


def test_where_the_system_cannot_lock_nothing_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    def flock(*given: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with writing(tmp_path):
            (tmp_path / "state.pt").touch()
    assert capsys.readouterr().err.count(f"warning: the file system of {tmp_path} cannot lock files") == 1, "once"


def test_the_commit_is_asked_of_git_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        said = {"ls-files": "", "rev-parse": "abc\n", "status": " M loop.py\n"}[command[1]]
        return subprocess.CompletedProcess(command, 0, said, "")

    provenance.commit.cache_clear()
    try:
        monkeypatch.setattr(provenance.subprocess, "run", run)
        assert [provenance.commit(), provenance.commit()] == ["abc+", "abc+"]
        assert len(asked) == 3
    finally:
        provenance.commit.cache_clear()
