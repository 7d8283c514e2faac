"""A writer that is stopped at any one of its writes: at every file it opens, cuts, fills, flushes, renames and removes.

What is on the disk at such a point is what a kill there leaves, also with half of the file that is being filled. Each
is gone on from, and ends as if nobody had stopped it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forks import fork
from robustmoe.records import Check, Passed, Writer, contents, read
from test_records import make_header, make_row

EVENTS = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir")


def at_every_point(folder: Path, visit: Callable[[str], None]) -> Callable[[], None]:
    """From now on, before anything changes in the folder, ``visit`` is told what; returns what ends it."""
    live = [True]

    def told(event: str, path: Any) -> None:
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)
        if live[0] and Path(os.path.abspath(name)).is_relative_to(folder):
            live[0] = False
            visit(f"{event} {os.path.relpath(name, folder)}")
            live[0] = True

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if not live[0] or event not in EVENTS or not isinstance(given[0], str | bytes | int | os.PathLike):
            return
        if event != "open" or (isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            told(event, given[0])

    sys.addaudithook(hook)
    for name in ("write", "fsync"):
        original = getattr(os, name)

        def called(descriptor: int, *rest: Any, original: Any = original, name: str = name) -> Any:
            told(name, descriptor)
            return original(descriptor, *rest)

        setattr(os, name, called)
    return lambda: live.__setitem__(0, False)


# ------------------------------------------------------------------------------------------------ a training


def snapshots(folder: Path, kept: Path, points: Counter[str]) -> tuple[Callable[[str], None], dict[str, Path]]:
    """What keeps a copy of the folder at each point, and one with half of a file that is to be flushed; each content
    once. ``points``: how many there were of each kind.
    """
    states: dict[str, Path] = {}
    seen: set[str] = set()

    def there() -> list[Path]:
        return list(folder.rglob("*")) if folder.is_dir() else []

    def keep(point: str) -> None:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in there() if path.is_file()}
        versions = [("", files)]
        event, _, name = point.partition(" ")
        points[event] += 1
        if event == "fsync":
            versions.append((" half", {**files, name: files[name][: len(files[name]) // 2]}))
        for half, content in versions:
            known = repr(sorted((plain(name), data) for name, data in content.items() if not name.endswith(".lock")))
            if known in seen:
                continue
            seen.add(known)
            copy = kept / str(len(states))
            for name, data in content.items():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes(data)
            copy.mkdir(parents=True, exist_ok=True)
            states[f"{len(states)}: {point}{half}"] = copy

    return keep, states


def plain(name: str) -> str:
    """A name without the letters that are drawn."""
    return f"{name.rsplit('.', 2)[0]}.tmp" if name.endswith(".tmp") else name


def a_training_stopped_anywhere(place: str) -> None:
    """Two epochs of two steps, with averaged weights and a checkpoint after each step."""
    from robustmoe.recipe import Recipe
    from robustmoe.training import train
    from robustmoe.training.checkpoint import read_state
    from test_loop import equal

    recipe = Recipe(
        model="small_cnn(width=2)",
        data="digits(val=0.3)",
        method="standard",
        epochs=2,
        batch_size=512,
        ema=0.5,
        val_limit=4,
        checkpoint_every=1,
        threads=1,
        augment="crop_flip(padding=1)",
    )
    run = Path(place) / "run"
    points: Counter[str] = Counter()
    keep, states = snapshots(run, Path(place) / "states", points)
    end = at_every_point(run, keep)
    train(recipe, run)
    end()

    def ends(folder: Path) -> tuple[Any, ...]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        config = json.loads((folder / "config.json").read_text())
        return (folder / "model.safetensors").read_bytes(), [{**line, "seconds": 0} for line in lines], config

    state = read_state(run / "state.pt")
    for point, folder in states.items():
        train(recipe, folder, resume=(folder / "config.json").exists())
        again = read_state(folder / "state.pt")
        assert ends(folder) == ends(run), point
        assert all(equal(state[part], again[part]) for part in ("model", "optimisers", "average", "rng")), point
        assert contents(folder) == sorted(folder.iterdir()), f"{point}: something is left"
    print(f"{sum(points.values())} points, {points}; {len(states)} states", *states, sep="\n")
    assert len(states) >= 20  # how many differ hangs on the length of a time in the log
    assert (points["fsync"], points["os.rename"]) == (8, 6), points


def test_a_training_stopped_at_any_write_ends_as_if_nobody_had(tmp_path: Path) -> None:
    child = fork("test_crash:a_training_stopped_anywhere", str(tmp_path), output=tmp_path / "said")
    assert child.wait() == 0, child.output.read_text()


# ------------------------------------------------------------------------------------------------ a rows file


def evaluated(path: Path, n: int = 3, version: str = "1") -> None:
    """An evaluation: a batch an image, with a part of a suite, examples, checks."""
    from robustmoe.records import Example, examples_path, write_examples

    header = make_header(n=n, index_hash=f"first {n}", versions={"torch": version})
    with Writer(path, header, lambda n: make_header(n=n, index_hash=f"first {n}")) as writer:
        for at in range(n):
            if at not in writer.done:
                if at == 0:
                    write_examples(examples_path(path), [Example(0, 1, 1, 0, {}, {}, "AAAA", "BBBB")])
                writer.write([make_row(at)], 1.0, [Passed(at, "clean")], 5)
        if writer.checks is None:
            writer.finish([Check("G1", "name", "pass", None, "said")], 1.0)


def rows_stopped_anywhere(place: str) -> None:
    """Each point by a child of its own that leaves there, in each of three works that follow one another."""
    works = [(1, "1"), (2, "1"), (2, "2")]  # an image; one more; under other versions, with half of the images done
    counts = []
    for at, work in enumerate(works):
        start = Path(place) / f"start{at}"
        start.mkdir()
        for before in works[:at]:
            evaluated(start / "rows" / "a.jsonl", *before)
        if work == (2, "2"):
            cut_to_batches(start / "rows" / "a.jsonl", 1)
        straight = Path(place) / f"straight{at}"
        shutil.copytree(start, straight)
        evaluated(straight / "rows" / "a.jsonl", *work)
        for number in range(1, 200):
            folder = Path(place) / f"{at}-{number}"
            shutil.copytree(start, folder)
            if not left_at(number, folder, work):
                break
            evaluated(folder / "rows" / "a.jsonl", *work)
            assert same_but_for_time(folder, straight), f"{work}, point {number}"
            assert contents(folder) == sorted(folder.iterdir()), f"{work}, point {number}: something is left"
            assert sorted(path.name for path in (folder / "rows").iterdir()) == ["a.examples.jsonl", "a.jsonl"]
        counts.append(number - 1)
    print(counts)
    assert min(counts) >= 10


def cut_to_batches(path: Path, batches: int) -> None:
    lines, kept = path.read_bytes().splitlines(keepends=True), []
    for line in lines:
        kept.append(line)
        batches -= b'"time"' in line
        if batches == 0:
            break
    path.write_bytes(b"".join(kept))


def same_but_for_time(folder: Path, straight: Path) -> bool:
    """Equal rows and checks; of who took it up, all but the time."""
    results = [read(place / "rows" / "a.jsonl") for place in (folder, straight)]
    heads = [[(each.versions, each.done) for each in result.header.resumed] for result in results]
    return heads[0] == heads[1] and results[0].rows == results[1].rows and results[0].checks == results[1].checks


def left_at(number: int, folder: Path, work: tuple[int, str]) -> bool:
    """Whether a child that evaluates into the folder came to the point of that number, and left there."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def leave(point: str) -> None:
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)

        at_every_point(folder, leave)
        evaluated(folder / "rows" / "a.jsonl", *work)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_a_rows_file_stopped_at_any_write_ends_as_if_nobody_had(tmp_path: Path) -> None:
    child = fork("test_crash:rows_stopped_anywhere", str(tmp_path), output=tmp_path / "said")
    assert child.wait() == 0, child.output.read_text()
