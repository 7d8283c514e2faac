"""The evaluation engine: parts of a suite worked by hand, kills at any point, two processes, certificates, counts."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forks import fork, fork_pair, gloo_threads
from robustmoe import analysis, records
from robustmoe.attacks import PGD, Attack, Joint, Objective, Threat, linf
from robustmoe.attacks.base import Suite, part_noise
from robustmoe.data import from_arrays
from robustmoe.errors import UserError
from robustmoe.evaluation import engine, evaluate, measuring
from robustmoe.models import RoutedModel, build_model
from robustmoe.models.base import Output
from robustmoe.noise import Noise

N = 12
LEVELS = torch.arange(N) % 6
X = (LEVELS.float() / 10).view(-1, 1, 1, 1).repeat(1, 1, 1, 2)
Y = torch.where(torch.arange(N) == 7, 5, LEVELS)  # image 7 shows 1 and is labelled 5: wrong from the start
SEEN: list[tuple[str, list[int], list[int]]] = []
"""What toy attacks were shown: their name, the levels (1 a tenth of brightness) and the noise of each image."""


def summaries_of(*given: Any, **options: Any) -> list[analysis.EvaluationSummary]:
    """Numbers of what `evaluate` gives."""
    return [record.summary() for record in evaluate(*given, **options)]


@pytest.fixture(autouse=True)
def _forget() -> None:
    SEEN.clear()


def nearest(x: Tensor) -> Tensor:
    """Logits (n, 10): class c is a brightness of c / 10. Adding 0.1 to an image of class c makes it class c + 1."""
    return -((x[:, 0, 0, :1] - torch.arange(10) / 10) ** 2)


@dataclasses.dataclass(frozen=True)
class Breaks(Attack):
    """Breaks exactly the images with these labels. Costs a gradient and a forward pass, 4, an image."""

    labels: tuple[int, ...] = ()
    name: str = ""
    herd: bool = False  # moves the others by their batch's mean: what it gives then tells which images stood together
    threat: Threat = linf(0.1)  # noqa: RUF009
    objective: Objective = Joint()  # noqa: RUF009
    seed: int = 0

    def queries(self, output: Output) -> int:
        return 4

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        SEEN.append((self.name, (10 * x[:, 0, 0, 0]).round().int().tolist(), noise.state.tolist()))
        moving = x.clone().requires_grad_(True)
        torch.autograd.grad(model.run(moving).logits.sum(), moving)
        model.run(x)
        hit = torch.isin(y, torch.tensor(self.labels, dtype=torch.int64))[:, None, None, None]
        return x + torch.where(hit, 0.1 * (0.9 + 0.1 * x.mean()) if self.herd else 0.1, 0.01)


@dataclasses.dataclass(frozen=True)
class Some(Suite):
    """The given attacks, in order."""

    members: tuple[tuple[str, Attack], ...]
    threat: Threat = linf(0.1)  # noqa: RUF009
    objective: Objective = Joint()  # noqa: RUF009
    seed: int = 0

    def parts(self, output: Output) -> list[tuple[str, Attack]]:
        return list(self.members)


def some(*parts: tuple[str, tuple[int, ...]], herd: bool = False, **changes: Any) -> Some:
    return Some(tuple((name, Breaks(labels, name, herd)) for name, labels in parts), **changes)


THREE = (("one", (0, 2)), ("two", (2, 3)), ("three", (5,)))
HERD = some(*THREE, herd=True)


def file_of(folder: Path) -> Path:
    (found,) = [file for file in folder.glob("*.jsonl") if not file.name.endswith(".examples.jsonl")]
    return found


def rows(folder: Path) -> dict[int, records.Row]:
    return {row.index: row for row in records.read(file_of(folder)).rows}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file_of(folder).read_text().splitlines()]


def go(folder: Path | str, attack: Attack, batch_size: int = 4, precision: Any = "fp32", **options: Any) -> Any:
    (one,) = summaries_of(nearest, X, Y, attacks=[attack], out=folder, batch_size=batch_size, precision=precision,
                      device="cpu", **options)  # fmt: skip
    return one


# ------------------------------------------------------------------------------------------------ parts


def test_the_parts_of_a_suite_by_hand(tmp_path: Path) -> None:
    """Levels are 0 1 2 3 4 5 0 1 2 3 4 5; image 7 is wrong. The first part breaks 0 and 2 (images 0, 2, 6, 8), the
    second, which sees 1 3 4 5 3 4 5, breaks 3 (images 3, 9), the third breaks 5 (images 5, 11)."""
    one = go(tmp_path, some(*THREE))
    found = rows(tmp_path)
    assert {i: row.part for i, row in found.items()} == {
        0: "one", 1: "", 2: "one", 3: "two", 4: "", 5: "three", 6: "one", 7: "clean", 8: "one", 9: "two", 10: "",
        11: "three",
    }  # fmt: skip
    assert (one.clean.count, one.robust.count) == (11, 3)
    for i, row in found.items():  # a survivor comes back as it was, and so does an image that was not attacked
        assert row.size["linf"] == pytest.approx(0.0 if row.part in ("", "clean") else 0.1, abs=1e-6)
        assert row.adversarial == (LEVELS[i] if row.part in ("", "clean") else LEVELS[i] + 1)
    assert [(name, levels) for name, levels, _ in SEEN] == [
        ("one", [0, 1, 2, 3]), ("one", [4, 5, 0, 2]), ("one", [3, 4, 5]),
        ("two", [1, 3, 4, 5]), ("two", [3, 4, 5]),
        ("three", [1, 4, 5, 4]), ("three", [5]),
    ]  # fmt: skip
    header, _, checks = records.read(file_of(tmp_path))
    assert (header.parts, header.batch_size, header.precision) == (["one", "two", "three"], 4, "fp32")
    assert checks is not None
    assert checks.queries == 4 * (11 + 7 + 5)
    passed = [(line["part"], line["index"]) for line in lines(tmp_path) if line["kind"] == "part"]
    assert [index for part, index in passed if part == "clean"] == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert [index for part, index in passed if part == "one"] == [1, 3, 4, 5, 9, 10, 11]
    assert [index for part, index in passed if part == "two"] == [1, 4, 5, 10, 11]
    assert len(passed) == 11 + 7 + 5  # the last part leaves none


def test_a_suite_of_one_part_and_a_simple_attack(tmp_path: Path) -> None:
    """A simple attack is shown every image, also a wrong one, and its answer stands, also where it broke nothing."""
    go(tmp_path / "suite", some(("only", (1,))))
    go(tmp_path / "simple", Breaks((1,)))
    suite, simple = rows(tmp_path / "suite"), rows(tmp_path / "simple")
    assert [suite[i].part for i in (0, 1, 7)] == ["", "only", "clean"]
    assert {row.part for row in simple.values()} == {""}
    assert suite[0].size["linf"] == 0.0
    assert [simple[i].size["linf"] for i in (0, 7)] == pytest.approx([0.01, 0.01], abs=1e-6)
    assert simple[1].size == suite[1].size
    assert records.read(file_of(tmp_path / "simple")).header.parts == []
    assert {line["kind"] for line in lines(tmp_path / "simple")} == {"header", "row", "time", "checks"}


def test_a_suite_and_its_own_perturb_agree(tmp_path: Path) -> None:
    """`Suite.perturb`, which a user calls without the engine, breaks the same images with the same noise."""
    suite = some(*THREE, seed=3)
    go(tmp_path, suite, batch_size=N)
    mine = sorted((name, state) for name, _, states in SEEN for state in states)
    SEEN.clear()
    x_adv = suite(nearest, X, Y, Noise.of(torch.arange(N), 3))
    assert sorted((name, state) for name, _, states in SEEN for state in states) == mine
    found = rows(tmp_path)
    assert nearest(x_adv).argmax(1).tolist() == [found[i].adversarial for i in range(N)]


def test_noise_is_an_images_and_a_parts_own(tmp_path: Path) -> None:
    def shown(batch_size: int, attack: Attack) -> dict[str, list[int]]:
        SEEN.clear()
        go(tmp_path / f"{type(attack).__name__} {batch_size}", attack, batch_size)
        return {name: [s for n, _, states in SEEN if n == name for s in states] for name, _, _ in SEEN}

    by_four, by_five = shown(4, some(*THREE, seed=5)), shown(5, some(*THREE, seed=5))
    assert by_four == by_five  # the same noise, whatever the batches
    every = Noise.of(torch.arange(N), 5)
    for name, survivors in (("one", [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]), ("two", [1, 3, 4, 5, 9, 10, 11])):
        assert by_four[name] == part_noise(every, name).state[survivors].tolist()
    assert not set(by_four["one"]) & set(by_four["two"])
    assert shown(4, Breaks((1,), seed=5)) == {"": every.state.tolist()}  # a simple attack: as ever


@pytest.mark.parametrize("names", [("a", "a"), ("a", ""), ("clean", "b"), ("certified",), ()])
def test_names_of_parts_that_cannot_be(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the parts of Some are named .*; expected a name for each, all different"):
        go(tmp_path, some(*((name, (1,)) for name in names)))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ stopping, resuming


def killed(folder: str, batches: int) -> None:
    """The evaluation, killed by SIGKILL as it is about to attack one batch more than these."""
    real = engine.attack_batch
    done: list[int] = []

    def stop(*arguments: Any) -> Any:
        if len(done) == batches:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        return real(*arguments)

    engine.attack_batch = stop
    go(folder, HERD)


def test_sigkill_at_three_points_and_resume(tmp_path: Path) -> None:
    points = sorted(random.Random(0).sample(range(7), 3))  # the suite attacks 3 + 2 + 2 batches
    for point in points:
        child = fork("test_engine:killed", str(tmp_path / str(point)), point, output=tmp_path / "said")
        assert child.wait() == -signal.SIGKILL, child.output.read_text()
    go(tmp_path / "whole", HERD)
    whole, shown = rows(tmp_path / "whole"), [(name, levels) for name, levels, _ in SEEN]
    for point in points:
        assert len(rows(tmp_path / str(point))) < N
        SEEN.clear()
        go(tmp_path / str(point), HERD)
        assert [(name, levels) for name, levels, _ in SEEN] == shown[point:]  # the very same batches, none twice
        assert rows(tmp_path / str(point)) == whole


@pytest.mark.parametrize("attack", [HERD, Breaks((1, 3), herd=True)], ids=["suite", "simple"])
def test_a_file_cut_anywhere_is_completed_to_the_same_rows(attack: Attack, tmp_path: Path) -> None:
    """Cut at the ends of lines and inside them, also in the middle of a batch. The attack moves an image by the mean of
    its batch, so that one batch cut otherwise would change a size."""
    certified = {1: 1.0, 7: 1.0, 8: 0.05}
    go(tmp_path / "whole", attack, certified=certified)
    whole, checks = rows(tmp_path / "whole"), records.read(file_of(tmp_path / "whole")).checks
    written = file_of(tmp_path / "whole").read_bytes()
    ends = [i + 1 for i, byte in enumerate(written) if byte == 10]
    draw = random.Random(1)
    points = draw.sample(ends[1:], 5) + [draw.randrange(ends[0], len(written)) for _ in range(5)]
    assert checks is not None
    for point in points:
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / file_of(tmp_path / "whole").name).write_bytes(written[:point])
        go(tmp_path / "cut", attack, certified=certified)
        assert rows(tmp_path / "cut") == whole
        again = records.read(file_of(tmp_path / "cut")).checks
        assert again is not None
        assert (again.checks, again.queries) == (checks.checks, checks.queries)
        kept = written[: max(end for end in ends if end <= point)]
        assert file_of(tmp_path / "cut").read_bytes().startswith(kept[: ends[0]])


def test_another_batch_size_or_other_parts_of_a_suite_are_refused(tmp_path: Path) -> None:
    go(tmp_path / "a", HERD)
    file = file_of(tmp_path / "a")
    file.write_bytes(b"".join(line + b"\n" for line in file.read_bytes().splitlines()[:20]))
    before = file.read_bytes()
    with pytest.raises(UserError, match="holds other work: its batch_size is 4, this one's is 5; choose another --out"):
        go(tmp_path / "a", HERD, batch_size=5)
    first, *rest = before.splitlines(keepends=True)
    header = {**json.loads(first), "parts": ["one", "two"]}  # as an older version of the suite might have written
    file.write_bytes(json.dumps(header).encode() + b"\n" + b"".join(rest))
    with pytest.raises(UserError, match=r"holds other work: its parts is \['one', 'two'\], this one's is \['one', "):
        go(tmp_path / "a", HERD)
    file.write_bytes(before)
    with pytest.raises(UserError, match=r"holds other work: its precision is 'fp32', this one's is 'strict'"):
        go(tmp_path / "a", HERD, precision="strict")
    go(tmp_path / "a", HERD)
    go(tmp_path / "b", HERD)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_more_images_extend_a_simple_attack_only(tmp_path: Path) -> None:
    go(tmp_path / "simple", Breaks((1,), "simple"), limit=5)
    shown = len(SEEN)
    one = go(tmp_path / "simple", Breaks((1,), "simple"), batch_size=5)
    assert [levels for _, levels, _ in SEEN[shown:]] == [[5, 0, 1, 2, 3], [4, 5]]
    assert (one.n, one.complete) == (N, True)
    go(tmp_path / "whole", Breaks((1,), "simple"))
    assert rows(tmp_path / "simple") == rows(tmp_path / "whole")
    go(tmp_path / "suite", HERD, limit=5)
    with pytest.raises(UserError, match="holds other work: its n is 5, this one's is 12"):
        go(tmp_path / "suite", HERD)
    other = from_arrays(X.flip(0), Y.flip(0))
    go(tmp_path / "other", Breaks((1,)), limit=5)
    with pytest.raises(UserError, match="holds other work: its n is 5, this one's is 12"):
        evaluate(nearest, other, attacks=[Breaks((1,))], out=tmp_path / "other", precision="fp32", device="cpu")


# ------------------------------------------------------------------------------------------------ certificates


def test_certified_images_are_not_attacked(tmp_path: Path) -> None:
    """Of the images 0, 6 (level 0), 7 (wrong) and 4, certified at the attack's 0.1 or beyond: 7 is attacked by the
    simple attack all the same. Image 2 is certified for less."""
    certified = {0: 0.1, 6: 0.3, 7: 9.0, 4: 0.2, 2: 0.099, 1: float("nan"), 99: 1.0}
    one = go(tmp_path / "suite", some(*THREE), certified=certified)
    parts = {i: row.part for i, row in rows(tmp_path / "suite").items()}
    assert {i for i, part in parts.items() if part == "certified"} == {0, 4, 6}
    assert (parts[7], parts[2], parts[1]) == ("clean", "one", "")
    assert one.robust.count == 3 + 2  # 1, 4, 10 as before, and 0 and 6 besides
    assert [levels for name, levels, _ in SEEN if name == "one"] == [[1, 2, 3, 5], [2, 3, 4, 5]]
    SEEN.clear()
    go(tmp_path / "simple", Breaks((0, 2), "simple"), certified=certified)
    found = rows(tmp_path / "simple")
    assert {i for i, row in found.items() if row.part == "certified"} == {0, 4, 6}
    assert [levels for _, levels, _ in SEEN] == [[1, 2, 3, 5], [1, 2, 3, 4], [5]]  # image 7 shows 1
    assert all(found[i].size["linf"] == 0.0 and found[i].adversarial == found[i].label for i in (0, 4, 6))
    with pytest.raises(UserError, match="holds other work: its certified_hash is"):
        go(tmp_path / "simple", Breaks((0, 2), "simple"), certified={0: 0.1})
    with pytest.raises(
        UserError, match="the certified radii are of one norm, the attacks of l2 and linf; evaluate one"
    ):
        evaluate(nearest, X, Y, attacks=[Breaks((1,)), "fgsm(l2(0.1))"], certified=certified, device="cpu")
    go(tmp_path / "none", Breaks((0, 2)), certified={0: 0.05})  # nothing is certified so far: the same work as without
    go(tmp_path / "none", Breaks((0, 2)))


# ------------------------------------------------------------------------------------------------ counts, progress


@pytest.mark.parametrize("precision", ["fp32", "strict", "fast"])
def test_queries_by_hand(precision: Any, tmp_path: Path) -> None:
    """No image of brightness 0.5 is broken by 0.01: the judge is never asked, and an image costs what `queries` says.
    One that is wrong from the start costs the first gradient, and one question to the judge."""
    x, y = torch.full((5, 1, 1, 2), 0.5), torch.full((5,), 5)
    attack = PGD(linf(0.01), steps=3, restarts=2)  # 2 (3 x 3 + 1) = 20
    for name, each in (("pgd", attack), ("fgsm", "fgsm(linf(0.01))")):
        evaluate(nearest, x, y, attacks=[each], out=tmp_path / name, batch_size=2, precision=precision, device="cpu")
        _, _, checks = records.read(file_of(tmp_path / name))
        assert checks is not None
        assert checks.queries == {"pgd": 5 * 20, "fgsm": 5 * 3}[name]
    evaluate(nearest, x, y - 1, attacks=["pgd(linf(0.01), steps=1, keep=first)"], out=tmp_path / "wrong", device="cpu",
             precision=precision)  # fmt: skip
    _, _, checks = records.read(file_of(tmp_path / "wrong"))
    assert checks is not None
    assert checks.queries == 5 * (3 + 1)


def test_queries_survive_a_stop(tmp_path: Path) -> None:
    go(tmp_path, HERD)
    file = file_of(tmp_path)
    written = file.read_bytes().splitlines(keepends=True)
    times = [i for i, line in enumerate(written) if line.startswith(b'{"kind":"time"')]
    assert [json.loads(written[i])["queries"] for i in times] == [0, 0, 0, 16, 16, 12, 16, 12, 16, 4]
    file.write_bytes(b"".join(written[: times[5] + 1]))
    go(tmp_path, HERD)
    _, _, checks = records.read(file)
    assert checks is not None
    assert checks.queries == 4 * (11 + 7 + 5)


class Shown:
    """A bar that keeps what it was told."""

    def __init__(self, total: int, unit: str) -> None:
        self.totals, self.unit, self.done, self.said = [total], unit, 0, list[str]()

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, n: int = 1) -> None:
        self.done += n

    def expect(self, total: int) -> None:
        self.totals.append(total)

    def say(self, text: str) -> None:
        self.said.append(text)

    def log(self) -> None:
        self.said.append("now in the log")


def test_the_bar_counts_passes_and_expects_less_as_images_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Shown] = []

    def progress(total: int, name: str, unit: str) -> Shown:
        bars.append(Shown(total, unit))
        return bars[-1]

    monkeypatch.setattr(engine, "progress", progress)
    go(tmp_path / "a", some(*THREE))
    (bar,) = bars
    # 12 images, 3 parts, 4 passes each; image 7 is wrong; batches break 2, 2, 0; 1, 1; 1, 1 of the 11 others.
    left = [12, 12, 11, 11]  # at the start, and after each look of four images
    one = [4 * (4 + 2 * 9) + 4 * 7, 4 * 8 + 4 * (3 + 2 * 7), 4 * 11 + 4 * 2 * 7]
    two = [4 * 11 + 4 * 4 + 4 * (3 + 6), 4 * 18 + 4 * 5]
    assert bar.totals == [4 * 3 * n for n in left] + one + two + [4 * 18 + 4 * 5] * 2
    assert (bar.unit, bar.done) == ("passes", 4 * 23)
    assert bar.said[0] == "robust 100.0 %"
    assert bar.said[2:4] == ["robust 91.7 %", "one 1/3, robust 75.0 %"]  # 11 and 9 of 12
    speed = r", [\d.e+]+ images/s, memory peak [\d.]+ [MG]B"
    assert re.fullmatch(rf"one 1/3, robust 58.3 %{speed}", bar.said[4])
    assert bar.said.index("now in the log") == 5
    assert bar.said.count("now in the log") == 1
    assert re.fullmatch(rf"three 3/3, robust 25.0 %{speed}", bar.said[-1])

    @dataclasses.dataclass(frozen=True)
    class Unknown(Breaks):
        def queries(self, output: Output) -> int:
            return 0

    go(tmp_path / "b", Unknown((1,)))
    bar = bars[-1]
    assert (bar.totals, bar.unit, bar.done) == ([12], "images", 12)
    said = [text.partition(", ")[0] for text in bar.said if text != "now in the log"]
    assert said == ["robust 75.0 %", "robust 75.0 %", "robust 83.3 %"]  # 1 of 4, then 7 too (wrong, 5 is its label)


# ------------------------------------------------------------------------------------------------ precision


SUITE = Some((("pgd", PGD(linf(0.02), 3)), ("margin", PGD(linf(0.02), 5, objective=Joint("margin"), keep="first"))),
             threat=linf(0.02))  # fmt: skip
TINY = "ensemble(small_cnn(width=4), experts=3, gate=straight_through, router=small_cnn(width=4))"


@pytest.mark.parametrize("precision", ["fp32", "strict", "fast"])
def test_every_precision_is_judged_by_the_exact_model(
    precision: Any, tmp_path: Path, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Rows hold what the exact model says of the attacked images, whatever was climbed; and other batches give the same
    robust accuracy up to two images."""
    model, x = tiny("ensemble_straight"), images(24)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::6] = (y[::6] + 1) % 4
    judged: list[tuple[Tensor, list[int]]] = []
    real = engine.attack_batch

    def kept(*arguments: Any) -> Any:
        done = real(*arguments)
        judged.append((done.x_adv, done.batch.index.tolist()))
        return done

    robust = {}
    for size in (5, 24):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "attack_batch", kept)
            judged.clear()
            folder = tmp_path / str(size)
            (one,) = summaries_of(
                model, x, y, attacks=[SUITE], out=folder, batch_size=size, precision=precision, device="cpu"
            )
        assert one.robust is not None
        robust[size] = one.robust.count
        found, last = rows(folder), {}
        for x_adv, index in judged:
            with torch.no_grad():
                last |= dict(zip(index, model(x_adv).argmax(1).tolist()))
        broken = {i for i, row in found.items() if row.part in ("pgd", "margin")}
        assert all(found[i].adversarial == last[i] != found[i].label for i in broken)
        assert all(last[i] == found[i].label for i, row in found.items() if row.part == "")
        assert sum(row.part == "clean" for row in found.values()) == 4
        assert records.read(file_of(folder)).header.precision == precision
    assert 0 < robust[24] < 20
    assert abs(robust[5] - robust[24]) <= 2


def test_a_precision_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="precision must be one of 'strict', 'fast', 'fp32'; got 'fp64'"):
        go(tmp_path, HERD, precision="fp64")


# ------------------------------------------------------------------------------------------------ two processes


def scenarios(out: Path) -> dict[str, Any]:
    """What one process or two do: summaries of a suite that tells its batches, a simple attack, a routed model."""
    found: dict[str, Any] = {}
    for name, attack, options in (
        ("suite", HERD, {}),
        ("certified", HERD, {"certified": {0: 0.1, 7: 1.0}}),
        ("simple", Breaks((1,), herd=True), {}),
        ("one batch", Breaks((1,), herd=True), {"batch_size": N}),  # the second process has none
    ):
        found[name] = dataclasses.asdict(go(out / name, attack, **options))
    generator = torch.Generator().manual_seed(4)
    x, model = torch.rand(13, 3, 8, 8, generator=generator), build_model(TINY, 4, (3, 8, 8), seed=0)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    (one,) = summaries_of(model, x, y, attacks=[SUITE], out=out / "routed", batch_size=3, device="cpu")
    found["routed"] = dataclasses.asdict(one)
    return found


class Fails(Breaks):
    """Not even a tensor of images where level 5 is shown (the second batch of four)."""

    def __call__(self, model: Any, x: Any, y: Any, noise: Any = None) -> Any:
        return x[:1] if 5 in y.tolist() else super().__call__(model, x, y, noise)


class Dies(Breaks):
    """The process that attacks the second batch of the second part is killed."""

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        if os.environ.get("RANK") == "1" and len(x) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().perturb(model, x, y, noise)


def mortal(dies: bool) -> Some:
    kind = Dies if dies else Breaks
    return Some(tuple((name, kind(labels, name, True)) for name, labels in THREE))


def worker(folder: str, run: str) -> int:
    """What each of two processes does; the second dies in the end."""
    from robustmoe import cli, distributed

    torch.set_num_threads(1)
    out = Path(folder)
    rank = os.environ["RANK"]
    arguments = ["--attack", "pgd(linf(0.1), steps=2)", "--limit", "20", "--batch-size", "6", "--curve", "0.05"]
    try:
        with distributed.session(torch.device("cpu")):
            found: dict[str, Any] = {"cli": cli.main(["evaluate", run, *arguments, "--out", str(out / "cli")])}
            found |= scenarios(out)
            try:
                go(out / "fails", Fails())
            except UserError as error:
                found["fails"] = str(error)
            try:  # each process has another model
                model = build_model(TINY, 4, (3, 8, 8), seed=int(rank))
                evaluate(model, torch.rand(4, 3, 8, 8), [0, 1, 2, 3], attacks=["fgsm(linf(0.1))"], device="cpu")
            except UserError as error:
                found["apart"] = str(error)
            (out / f"rank{rank}.json").write_text(json.dumps(found))
            go(out / "dies", mortal(True))
    except UserError as error:
        (out / "dies.txt").write_text(str(error))
        (out / "threads.json").write_text(json.dumps(gloo_threads()))
        return 2
    return 0


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes did."""
    from test_evaluation import make_run

    out = tmp_path_factory.mktemp("two")
    make_run(out / "run")
    first, second = fork_pair("test_engine:worker", str(out), str(out / "run"), output=out / "said")
    assert (first.wait(), second.wait()) == (2, -signal.SIGKILL), first.output.read_text() + second.output.read_text()
    return out


def test_two_processes_write_what_one_writes(launched: Path, tmp_path: Path) -> None:
    ranks = [json.loads((launched / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]  # each process gives every result
    alone = scenarios(tmp_path)
    assert {name: ranks[0][name] for name in alone} == json.loads(json.dumps(alone))
    for name in alone:
        assert rows(launched / name) == rows(tmp_path / name), name
        two, one = (records.read(file_of(folder / name)).checks for folder in (launched, tmp_path))
        assert two is not None
        assert one is not None
        assert (two.checks, two.queries) == (one.checks, one.queries)
        examples = [next((folder / name).glob("*.examples.jsonl")).read_bytes() for folder in (launched, tmp_path)]
        assert examples[0] == examples[1]
    said = (launched / "said.0").read_text()
    assert said.count("pgd(linf(0.1), steps=2, keep=first)") >= 1
    assert ranks[0]["cli"] == 0


def test_the_command_line_is_shared_too(launched: Path, tmp_path: Path) -> None:
    from robustmoe.evaluation import evaluate_run

    arguments: dict[str, Any] = {"limit": 20, "batch_size": 6, "curve": [0.05], "out": tmp_path}
    evaluate_run(launched / "run", attacks=["pgd(linf(0.1), steps=2)"], **arguments)
    names = sorted(file.name for file in tmp_path.glob("*.jsonl"))
    assert len(names) == 4  # two files, each with its examples
    assert sorted(file.name for file in (launched / "cli" / "rows").glob("*.jsonl")) == names
    for name in names:
        if not name.endswith(".examples.jsonl"):
            assert records.read(launched / "cli" / "rows" / name).rows == records.read(tmp_path / name).rows


def test_a_mistake_in_one_process_is_told_by_all(launched: Path) -> None:
    """The second batch, which fails, is the second process's; then each has other weights and other images."""
    found = [json.loads((launched / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["fails"] == found[1]["fails"]
    assert found[0]["fails"].startswith("the attack gives a tensor of shape (1, 1, 1, 2); expected an attacked image")
    assert [each["apart"][:52] for each in found] == ["the processes hold different models or images; build"] * 2


def test_a_dead_peer_is_one_line_and_one_process_goes_on(launched: Path, tmp_path: Path) -> None:
    said = (launched / "dies.txt").read_text()
    assert said.startswith("process 0 of 2 stopped: another process of this run died")
    assert "\n" not in said
    assert json.loads((launched / "threads.json").read_text()) == []  # nothing is left that could abort it at its end
    assert "terminate called" not in (launched / "said.0").read_text()
    file = file_of(launched / "dies")
    left = records.read(file)
    assert 0 < len(left.rows) < N
    header = {**left.header.to_dict(), "attack": measuring.spec_or_repr(mortal(False))}  # the same, but it lives
    (tmp_path / "a").mkdir()
    again = tmp_path / "a" / f"{records.file_stem(measuring.spec_or_repr(mortal(False)))}.jsonl"
    again.write_bytes(json.dumps(header).encode() + b"\n" + file.read_bytes().partition(b"\n")[2])
    go(tmp_path / "a", mortal(False))
    go(tmp_path / "b", mortal(False))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
