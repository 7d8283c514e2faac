"""Evaluation: rows against values worked by hand, resuming, dishonest attacks, defaults, the trap of a hard route."""

from __future__ import annotations

import base64
import dataclasses
import importlib
import io
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from forks import fork
from objective_infos import EXPERTS_ONLY, JOINT, ROUTER_ONLY, ROUTING
from robustmoe import analysis, records, spec
from robustmoe.attacks import PGD, Attack, Joint, Objective, Threat, build_attack, exact_of, linf
from robustmoe.errors import UserError
from robustmoe.evaluation import evaluate, evaluate_run
from robustmoe.evaluation.choosing import spec_or_repr, threat_of
from robustmoe.models import RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.reporting import summary_table
from robustmoe.routing import Tape, straight_through, top_k
from robustmoe.training import build_method
from robustmoe.training.checkpoint import load_model, save_weights
from robustmoe.training.parts import threat_trained_for

engine = importlib.import_module("robustmoe.evaluation.engine")
measuring = importlib.import_module("robustmoe.evaluation.measuring")
EPS = 8 / 255


def summaries_of(*given: Any, **options: Any) -> list[analysis.EvaluationSummary]:
    """Numbers of what `evaluate` gives."""
    return [record.summary() for record in evaluate(*given, **options)]


class Toy(RoutedModel):
    """An image is its first two pixels, p and q. Expert 0 where p < 1/2, else expert 1. Expert 0 says class 0 where
    q < 1/2, else class 1; expert 1 says the opposite.
    """

    def __init__(self, gate: str = "hard") -> None:
        super().__init__()
        self.gate = gate
        self.middle = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("hidden", torch.zeros(1), persistent=False)

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        p, q = x.flatten(1)[:, 0], x.flatten(1)[:, 1]
        logits = torch.stack([self.middle - p, p - self.middle], 1)[:, None]
        routing = tape("router", straight_through(logits) if self.gate == "straight" else top_k(logits, 1, "hard"))
        experts = torch.stack([0.5 - q, q - 0.5, q - 0.5, 0.5 - q], 1).view(-1, 2, 2)  # (n, expert, class)
        chosen = experts.gather(1, routing.index[:, 0, :, None].expand(-1, -1, 2))
        return (routing.weight[:, 0, :, None] * chosen).sum(1)


class Trap(RoutedModel):
    """Hard routes: expert 0 where p < 1/2 says class 0 by a margin of 2, whatever the image; expert 1 says class 1."""

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        p, q = x.flatten(1)[:, 0], x.flatten(1)[:, 1]
        logits = torch.stack([0.5 - p, p - 0.5], 1)[:, None]
        first = tape("router", top_k(logits, 1, "hard")).index[:, 0, 0] == 0
        return torch.stack([torch.where(first, 2 + 0.1 * q, 0.0), torch.where(first, 0.0, 2 + 0.1 * q)], 1)


@dataclasses.dataclass(frozen=True)
class Shift(Attack):
    """A user's own attack: adds the same to every image."""

    threat: Threat
    dp: float
    dq: float
    objective: Objective = Joint()  # noqa: RUF009
    seed: int = 0

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return x + torch.tensor([self.dp, self.dq]).view(1, 1, 1, 2)


@dataclasses.dataclass(frozen=True)
class Cheat(Attack):
    """An attack that does not keep to the rules, in the way ``how`` says."""

    how: str
    threat: Threat = linf(EPS)  # noqa: RUF009
    objective: Objective = Joint()  # noqa: RUF009
    seed: int = 0

    def __call__(self, model: Any, x: Tensor, y: Tensor, noise: Noise | None = None) -> Tensor:
        x_adv = super().__call__(model, x, y, noise)
        if self.how == "modes":  # after `perturb`, whose modes are put back
            exact_of(model).train()
        return x_adv

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        exact = exact_of(model)
        assert isinstance(exact, Toy)
        if self.how == "ball":
            return x + 2 * EPS
        if self.how == "box":
            return torch.where(x > 0.95, x + EPS, x)
        if self.how == "nan":  # one of the images, and not the first
            return torch.cat([x[:-1], torch.full_like(x[-1:], torch.nan)])
        if self.how == "in place":
            y.fill_(1)
            return x.add_(0.1)
        if self.how == "weights":
            exact.middle.data += 0.25
        if self.how == "hidden buffer":
            exact.hidden += 1
        if self.how == "frozen":
            exact.middle.requires_grad_(False)
        return x.double() if self.how == "double" else x


def pixels(*pairs: tuple[float, float]) -> Tensor:
    return torch.tensor(pairs).view(-1, 1, 1, 2)


FOUR, LABELS = pixels((0.45, 0.2), (0.2, 0.45), (0.45, 0.45), (0.7, 0.2)), torch.zeros(4, dtype=torch.int64)
MANY = torch.rand(16, 1, 1, 2, generator=torch.Generator().manual_seed(3))
MANY_LABELS = torch.tensor([0, 1] * 8)
PGD5 = "pgd(linf(0.1), steps=5)"


def rows_of(folder: Path) -> list[records.Evaluation]:
    files = [file for file in folder.glob("*.jsonl") if not file.name.endswith(".examples.jsonl")]
    return [records.read(file) for file in sorted(files)]


# ------------------------------------------------------------------------------------------------ rows


def test_rows_by_hand(tmp_path: Path) -> None:
    (one,) = summaries_of(Toy(), FOUR, LABELS, attacks=[Shift(linf(0.1), 0.1, 0.1)], out=tmp_path)
    ((header, rows, checks),) = rows_of(tmp_path)
    assert (header.precision, header.batch_size, header.parts) == ("strict", 128, [])
    size = {"linf": 0.1, "l2": 0.1 * math.sqrt(2), "l1": 0.2, "box": 0.0}
    assert all(row.size == pytest.approx(size, abs=1e-6) for row in rows)
    seen = [
        (row.label, row.clean, row.adversarial, row.router_exposed, row.experts_exposed, row.rerouted["router"])
        for row in rows
    ]
    assert seen == [
        # (.45, .2) -> (.55, .3): sent to expert 1, which turns it. Its own expert would have held.
        (0, 0, 1, 1, 0, 1.0),
        # (.2, .45) -> (.3, .55): its expert errs, the route stays.
        (0, 0, 1, 0, 1, 0.0),
        # (.45, .45) -> (.55, .55): each of the two alone breaks it, both together do not.
        (0, 0, 0, 1, 1, 1.0),
        # (.7, .2): wrong from the start.
        (0, 1, 1, 1, 1, 0.0),
    ]
    routes = [(row.route_clean["router"], row.route_adversarial["router"]) for row in rows]
    assert routes == [([1, 0], [0, 1]), ([1, 0], [1, 0]), ([1, 0], [0, 1]), ([0, 1], [0, 1])]
    assert (one.clean.count, one.robust.count, one.router_exposed.count, one.experts_exposed.count) == (3, 1, 1, 1)
    assert one.rerouted == {"router": 0.5}
    assert header.routers == {"router": records.RouterInfo(experts=2, k=1, items=1)}
    assert (header.n, header.norm, header.eps, header.objective, header.role) == (4, "linf", 0.1, JOINT, "main")
    assert header.attack == repr(Shift(linf(0.1), 0.1, 0.1))  # a class of the user's own has no spec
    assert checks is not None
    statuses = {check.id: check.status for check in checks.checks}
    assert {"G1", "H1", "H2", "H3", "H4", "H6", "H7", "R1"} <= set(statuses)
    assert [name for name, status in statuses.items() if status != "pass"] == ["R1"]
    assert statuses["R1"] == "fail"


def test_a_dense_model_has_no_exposures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = summaries_of(
        lambda x: torch.cat([x[:, 0, 0, :1], 0.5 + 0 * x[:, 0, 0, 1:]], 1), FOUR, LABELS, attacks=PGD5, out=tmp_path
    )
    assert (one.objective, one.router_exposed, one.experts_exposed, one.rerouted) == (JOINT, None, None, {})
    assert one.router_attacked is None
    ((header, rows, _),) = rows_of(tmp_path)
    assert (header.routers, rows[0].route_clean, rows[0].router_exposed) == ({}, {}, None)
    assert capsys.readouterr().err == "", "nobody asked for attacks on a router"


def test_a_logit_that_is_not_finite_is_no_right_answer() -> None:
    def broken(x: Tensor) -> Tensor:  # class 0 by its place among NaNs, were it counted
        return torch.where(x[:, 0, 0, :1] > 0.5, torch.nan, torch.tensor([[1.0, 0.0]]))

    (one,) = summaries_of(broken, FOUR, LABELS, attacks=[Shift(linf(0.1), 0.1, 0.0)])
    assert (one.clean.count, one.robust.count) == (3, 1)
    assert any(sentence.startswith("H6 outputs: the logits are not finite") for sentence in one.failed)


def test_rows_do_not_depend_on_the_batch_and_are_flushed_with_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = engine.attack_batch

    def counted(*args: Any) -> Any:
        (file,) = (tmp_path / "5").glob("*first.jsonl")
        seen.append(len(records.read(file).rows) if file.read_bytes() else 0)
        return real(*args)

    attack = "pgd(linf(0.1), steps=5, restarts=2)"
    for size in (1, 16):
        evaluate(Toy("straight"), MANY, MANY_LABELS, attacks=[attack], batch_size=size, out=tmp_path / str(size))
    monkeypatch.setattr(engine, "attack_batch", counted)
    evaluate(Toy("straight"), MANY, MANY_LABELS, attacks=[PGD5], batch_size=5, out=tmp_path / "5")
    assert seen == [0, 5, 10, 15]
    assert rows_of(tmp_path / "1")[0].rows == rows_of(tmp_path / "16")[0].rows
    assert {row.adversarial != row.label for row in rows_of(tmp_path / "16")[0].rows} == {True, False}


def test_hashes_change_with_the_model_and_the_data(tmp_path: Path) -> None:
    def hashes(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, name: str) -> tuple[str, str]:
        evaluate(model, x, y, attacks=[Shift(linf(0.1), 0.1, 0.0)], out=tmp_path / name)
        header = rows_of(tmp_path / name)[0].header
        return header.model_hash, header.data_hash

    toy = hashes(Toy(), FOUR, LABELS, "a")
    assert toy == hashes(Toy(), FOUR, LABELS, "b")
    other = Toy()
    other.middle.data += 1e-6
    assert hashes(other, FOUR, LABELS, "c") == (hashes(other, FOUR, LABELS, "d")[0], toy[1])
    assert hashes(other, FOUR, LABELS, "e")[0] != toy[0]
    hidden = Toy()
    hidden.hidden += 1
    assert hashes(hidden, FOUR, LABELS, "f")[0] != toy[0]
    assert hashes(Toy(), FOUR + 1e-6, LABELS, "g")[1] != toy[1]
    assert hashes(Toy(), FOUR, LABELS + 1, "h")[1] != toy[1]
    assert hashes(Toy(), FOUR[:2], LABELS[:2], "i")[1] != toy[1]
    # A plain function has no weights to be known by: what it says stands for it.
    plain = [hashes(lambda x, s=s: s * x[:, 0, 0], FOUR, LABELS, f"plain{s}")[0] for s in (1, 2)]
    assert plain[0] != plain[1]


def test_another_model_does_not_go_on_in_the_same_file(tmp_path: Path) -> None:
    attacks = [Shift(linf(0.1), 0.1, 0.0)]
    evaluate(lambda x: x[:, 0, 0], FOUR, LABELS, attacks=attacks, out=tmp_path)
    with pytest.raises(UserError, match=r"holds other work: its model_hash is '.{12}', this one's is '.{12}'"):
        evaluate(lambda x: -x[:, 0, 0], FOUR, LABELS, attacks=attacks, out=tmp_path)
    with pytest.raises(UserError, match="holds other work: its n is 4, this one's is 2; choose another --out"):
        evaluate(lambda x: x[:, 0, 0], FOUR, LABELS, attacks=attacks, out=tmp_path, limit=2)


def test_examples_are_pngs_of_the_images(tmp_path: Path) -> None:
    x = torch.rand(6, 3, 1, 2, generator=torch.Generator().manual_seed(5))
    evaluate(Toy(), x, torch.tensor([0, 1] * 3), attacks=[Shift(linf(0.1), 0.0, 0.0)], out=tmp_path)
    (file,) = tmp_path.glob("*.examples.jsonl")
    header = rows_of(tmp_path)[0].header
    examples = records.read_examples(file, header)
    rows = {row.index: row for row in rows_of(tmp_path)[0].rows}
    assert {example.index for example in examples} == {i for i, row in rows.items() if row.clean == row.label}
    for example in examples:
        for text in (example.before, example.after):
            image = Image.open(io.BytesIO(base64.b64decode(text)))
            assert image.format == "PNG"
            levels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
            assert torch.equal(levels, (x[example.index] * 255).round().to(torch.uint8))
    # A file begun anew has its own examples, not those that lay there.
    for file in tmp_path.glob("*.jsonl"):
        file.write_bytes(b"" if not file.name.endswith(".examples.jsonl") else file.read_bytes()[:10])
    evaluate(Toy(), x, torch.tensor([0, 1] * 3), attacks=[Shift(linf(0.1), 0.0, 0.0)], out=tmp_path)
    assert records.read_examples(next(tmp_path.glob("*.examples.jsonl")), header) == examples


def test_examples_keep_the_expert_of_each_item_and_are_of_the_same_images_at_every_radius(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "vit_moe(patch=4, width=16, depth=2, heads=2, experts=3, k=2, placement=(0, 1))")
    attack = "pgd(linf(0.4), steps=3)"
    evaluate_run(run, attacks=[attack], limit=40, curve=(0.01, 0.1, 0.8))
    files = {path: records.read(path) for path in records.rows_files(run)}
    kept = {
        file.header.eps: records.read_examples(records.examples_path(path), file.header) for path, file in files.items()
    }
    main = {example.index: example for example in kept[0.4]}
    assert 0 < len(main) <= 10
    seen: dict[int, int] = dict.fromkeys(main, 0)
    lost = {0.01: [], 0.1: [0.01], 0.8: [0.01, 0.1, 0.4]}  # what a smaller radius breaks is not attacked again
    for file in files.values():
        if (eps := file.header.eps) != 0.4:
            assert {example.index for example in kept[eps]} <= set(main)
            broken = {row.index for other in files.values() if other.header.eps in lost[eps] for row in other.rows
                      if row.adversarial != row.label}  # fmt: skip
            assert {example.index for example in kept[eps]} == set(main) - broken
    for example in [example for every in kept.values() for example in every]:
        seen[example.index] += 1
        for counts, experts in (
            (example.route_clean, example.experts_clean),
            (example.route_adversarial, example.experts_adversarial),
        ):
            assert [len(items) for items in experts.values()] == [5, 5]  # a class token, 2 x 2 patches
            assert {
                name: [sum(e in item for item in items) for e in range(3)] for name, items in experts.items()
            } == counts
        assert example.before == main[example.index].before
    assert max(seen.values()) > 1
    test = spec.build("digits", "data").test
    x = test.batch([test.index.tolist().index(index) for index in main]).x
    trace = load_model(run).run(x).trace
    for i, example in enumerate(main.values()):
        assert example.experts_clean == {name: routing.index[i].tolist() for name, routing in trace.items()}


def test_examples_of_routers_that_send_all_to_all_have_no_route(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "ensemble(small_cnn(width=4), experts=2, gate=soft, router=small_cnn(width=4))")
    evaluate_run(run, attacks=["fgsm(linf(0.1))"], limit=40, curve=())
    (path,) = records.rows_files(run)
    examples = records.read_examples(records.examples_path(path), records.read(path).header)
    assert examples
    assert all(example.experts_clean == example.experts_adversarial == {} for example in examples)


# ------------------------------------------------------------------------------------------------ resuming


def many(folder: Path | str) -> Path:
    """The evaluation that is stopped and taken up again."""
    torch.set_num_threads(1)
    evaluate(Toy("straight"), MANY, MANY_LABELS, attacks=[PGD5], batch_size=4, out=folder)
    return Path(folder) / f"{records.file_stem(spec_or_repr(build_attack(PGD5).for_verdict()))}.jsonl"


def killed_at_the_third_batch(folder: str) -> None:
    real, calls = engine.attack_batch, []

    def stop(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    engine.attack_batch = stop
    many(folder)


def test_a_killed_evaluation_goes_on_and_ends_as_if_undisturbed(tmp_path: Path) -> None:
    child = fork("test_evaluation:killed_at_the_third_batch", str(tmp_path / "killed"), output=tmp_path / "said")
    assert child.wait() == -signal.SIGKILL, child.output.read_text()
    (killed,) = rows_of(tmp_path / "killed")
    assert ([row.index for row in killed.rows], killed.checks) == (list(range(8)), None)
    before = (tmp_path / "killed").glob("*first.jsonl").__next__().read_bytes()
    whole, resumed = records.read(many(tmp_path / "whole")), many(tmp_path / "killed")
    assert resumed.read_bytes().startswith(before)
    again = records.read(resumed)
    assert again.rows == whole.rows
    assert again.checks is not None
    assert whole.checks is not None
    assert again.checks.checks == whole.checks.checks
    assert records.difference(again.header, whole.header) is None


def test_ctrl_c_leaves_a_file_to_go_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = engine.attack_batch, []

    def stop(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "attack_batch", stop)
        with pytest.raises(KeyboardInterrupt):
            many(tmp_path / "a")
    (file,) = (tmp_path / "a").glob("*first.jsonl")
    assert len(records.read(file).rows) == 8
    # The first session is made to have taken 100 seconds a batch: the finished file counts them.
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    times = [line for line in lines if line["kind"] == "time"]
    assert len(times) == 2
    assert all(0 < line["seconds"] < 60 for line in times)
    file.write_text("".join(json.dumps({**n, "seconds": 100} if n["kind"] == "time" else n) + "\n" for n in lines))
    finished = records.read(many(tmp_path / "a"))
    assert finished.checks is not None
    assert 200 < finished.checks.seconds < 260
    assert finished.rows == records.read(many(tmp_path / "b")).rows


def test_a_finished_file_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = many(tmp_path)
    before = file.read_bytes(), file.stat().st_mtime_ns

    def never(*args: Any) -> Any:
        raise AssertionError("attacked again")

    monkeypatch.setattr(engine, "attack_batch", never)
    monkeypatch.setattr(measuring.checks, "before", never)
    (one,) = summaries_of(Toy("straight"), MANY, MANY_LABELS, attacks=[PGD5], out=tmp_path)
    assert (one.n, one.complete) == (16, True)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


def test_all_rows_but_no_checks_gets_its_checks(tmp_path: Path) -> None:
    file = many(tmp_path)
    whole = records.read(file)
    file.write_bytes(file.read_bytes()[:-9])
    assert records.read(file).checks is None
    again = records.read(many(tmp_path))
    assert (again.rows, again.checks.checks) == (whole.rows, whole.checks.checks)  # type: ignore[union-attr]


def test_one_writer_a_file(tmp_path: Path) -> None:
    file = many(tmp_path)
    before = file.read_bytes()
    with (
        records.Writer(file, records.read(file).header),
        pytest.raises(UserError, match="being written by this process"),
    ):
        many(tmp_path)
    assert file.read_bytes() == before


# ------------------------------------------------------------------------------------------------ dishonest attacks


@pytest.mark.parametrize(
    "how, check",
    [
        ("ball", "H2"),
        ("box", "H2"),
        ("nan", "H2"),
        ("in place", "H2"),
        ("weights", "H3"),
        ("hidden buffer", "H3"),
        ("modes", "H3"),
        ("frozen", "H3"),
    ],
)
def test_a_dishonest_attack_is_caught(how: str, check: str, tmp_path: Path) -> None:
    x = pixels((0.2, 0.2), (0.98, 0.98), (0.2, 0.3))
    (one,) = summaries_of(Toy("straight"), x, torch.tensor([0, 0, 0]), attacks=[Cheat(how)], out=tmp_path)
    assert any(sentence.startswith(check) for sentence in one.failed)
    ((header, rows, checks),) = rows_of(tmp_path)
    assert checks is not None
    assert [c.id for c in checks.checks if c.status == "fail"] == [check]
    assert [row.label for row in rows] == [0, 0, 0]
    assert [row.clean for row in rows] == [0, 0, 0]
    judged = analysis.judge([records.Evaluation(header, rows, checks)])
    assert not judged.trusted
    _, _, worst = summary_table(rows_of(tmp_path)).partition("\nworst of 1\n")
    assert " !" in worst.partition("\n")[0], "the numbers stand below the name"


def test_an_attack_that_gives_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a tensor of shape \(1, 1, 1, 2\); expected .* \(4, 1, 1, 2\)"):
        evaluate(Toy(), FOUR, LABELS, attacks=[Short("")])
    (one,) = summaries_of(Toy(), FOUR, LABELS, attacks=[Cheat("double")])  # judged in the images' own float32
    assert (one.clean, one.robust) == (one.robust, one.clean)


class Odd(Joint):
    name = "odd"
    aims_at_router = False


def test_an_objective_of_a_new_name_says_of_itself_what_it_aims_at(tmp_path: Path) -> None:
    (one,) = summaries_of(Toy("straight"), FOUR, LABELS, attacks=[Cheat("", objective=Odd())], out=tmp_path)
    (result,) = rows_of(tmp_path)
    assert result.header.objective == dataclasses.replace(JOINT, name="odd", aims_at_router=False)
    assert one.router_attacked is False
    assert analysis.names([result.header])[0].endswith(", odd")


class Short(Cheat):
    def __call__(self, model: Any, x: Any, y: Any, noise: Any = None) -> Any:
        return x[:1]


# ------------------------------------------------------------------------------------------------ the user's model


class Mixed(nn.Module):
    """Submodules in different modes; ``fail`` as told."""

    def __init__(self, fail: str = "") -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5))
        self.fail = fail
        self.two.eval()
        self.two[0].train()

    def forward(self, x: Tensor) -> Any:
        assert not self.two[0].training
        if self.fail == "raise":
            raise RuntimeError("mat1 and mat2\nshapes cannot be multiplied")
        return self.two(self.one(x.flatten(1)))


class Told(RoutedModel):
    """Its body gives what it is told."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found

    def body(self, x: Any, tape: Any) -> Any:
        return self.found


@pytest.mark.parametrize("fail", ["", "raise"])
def test_modes_are_left_as_found(fail: str) -> None:
    model = Mixed(fail)
    before = [module.training for module in model.modules()]
    assert set(before) == {True, False}
    weights = [p.clone() for p in model.parameters()]
    if fail:
        with pytest.raises(UserError):
            evaluate(model, FOUR, LABELS, attacks=["fgsm(linf(0.1))"])
    else:
        evaluate(model, FOUR, LABELS, attacks=["fgsm(linf(0.1))"])
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights, model.parameters()))


@pytest.mark.parametrize(
    "model, message",
    [
        (Mixed("raise"), r"the model fails on images \(4, 1, 1, 2\) \(RuntimeError: mat1 and mat2\); expected a fun"),
        (
            Told((LABELS, None)),
            r"the model gives a tuple of 2; expected .*\(n, ch, h, w\) .* one tensor of logits \(n, classes",
        ),
        (Told({"logits": LABELS}), r"the model gives a dict; expected"),
        (Told(torch.zeros(())), r"the model gives a tensor of shape \(\) for images \(4, 1, 1, 2\); expected"),
        (Told(torch.zeros(3, 2)), r"the model gives a tensor of shape \(3, 2\) for images \(4, 1, 1, 2\); expected"),
    ],
)
def test_a_model_that_is_none(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        evaluate(model, FOUR, LABELS, out=tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_attack_cannot_climb_is_marked_or_refused() -> None:
    blind = summaries_of(lambda x: (x[:, 0, 0] > 0.5).float(), FOUR, LABELS, attacks=[PGD5])[0]
    assert blind.robust.count == 4
    assert any("G1" in sentence and "no gradient at 100 %" in sentence for sentence in blind.failed)
    with pytest.raises(UserError, match="the attack on joint stopped: the attack's loss or gradient is not finite"):
        evaluate(lambda x: x[:, 0, 0] * torch.nan, FOUR, LABELS, attacks=[PGD5])


@pytest.mark.parametrize(
    "x, y, message",
    [
        (FOUR * 2 - 1, LABELS, r"the images range from -0.6 to 0.4, expected \[0, 1\]; pass raw pixels"),
        (FOUR * torch.nan, LABELS, "image 0 holds a value that is not finite"),
        (FOUR[0], LABELS, "expected four axes"),
        (FOUR, LABELS - 1, "range from -1 to -1, expected 0 or above"),
        (FOUR, LABELS + 2, "label 2 is out of range: the model has 2 classes; expected labels 0 to 1"),
        (FOUR, LABELS[:3], r"4 images and labels of shape \(3,\)"),
        (FOUR, None, "images were given without labels"),
    ],
)
def test_images_and_labels_that_are_none(x: Tensor, y: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(Toy(), x, y, attacks=[PGD5], out=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_that_is_none(size: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"the batch size is {size}, expected at least 1"):
        evaluate(Toy(), FOUR, LABELS, attacks=[PGD5], batch_size=size, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ which attacks


def test_the_hard_route_is_a_trap_that_the_default_attacks_see(tmp_path: Path) -> None:
    """The joint attack finds nothing, since no gradient crosses the route; 8/255 is enough to change every route."""
    x, y = pixels(*[(0.4688, 0.1 * i) for i in range(8)]), torch.zeros(8, dtype=torch.int64)
    summaries = summaries_of(Trap(), x, y, out=tmp_path)
    assert [(one.objective, one.robust.count) for one in summaries] == [
        (JOINT, 8), (EXPERTS_ONLY, 8), (ROUTER_ONLY, 0), (ROUTING, 0),
    ]  # fmt: skip
    (group,) = analysis.groups(rows_of(tmp_path))
    worst = analysis.worst_case([(result.header, result.rows) for result in group])
    assert (worst.clean.value, worst.robust.value) == (1.0, 0.0)
    judged = analysis.judge(group)
    assert judged.router_attacked is True
    assert judged.reason == "2 of 4 attacks aim at the router; check R1: the joint attack does not see the router"
    assert judged.trusted
    assert any("R1 router attacked: routing unattacked" in sentence for sentence in judged.warned)
    table = summary_table(group)
    assert "router attacked: yes" in table
    assert "check R1 was not run" not in table
    assert "  not run" not in table  # R1 is not run for the experts, but it is for the others

    (alone,) = [result for result in group if result.header.objective == JOINT]
    judged = analysis.judge([alone])
    assert (judged.router_attacked, judged.trusted) == (False, False)
    assert judged.reason.startswith("check R1 failed: routing unattacked")
    assert "router attacked: NO (check R1 failed" in summary_table([alone])
    assert "100.0% !" in summary_table([alone])
    assert summaries[0].router_attacked is False


def test_the_joint_file_alone_answers_for_the_router(tmp_path: Path) -> None:
    evaluate(Toy("straight"), MANY, MANY_LABELS, attacks=[PGD5, "pgd(linf(0.1), steps=5, objective=experts_only)"],
             out=tmp_path)  # fmt: skip
    judged = analysis.judge(rows_of(tmp_path))
    assert judged.reason == "1 of 2 attacks aim at the router; check R1 passed"
    assert judged.trusted


def test_the_same_attack_twice_is_one_attack() -> None:
    assert len(evaluate(Toy("straight"), FOUR, LABELS, attacks=[PGD5, PGD(linf(0.1), steps=5)])) == 1


def test_long_names_are_short_files() -> None:
    attack = PGD(linf(0.1), steps=3)
    assert records.file_stem(spec_or_repr(attack)) == "pgd-linf-0.1-steps-3"
    long = Cheat("x" * 300)
    assert len(records.file_stem(spec_or_repr(long))) < 160
    assert records.file_stem(spec_or_repr(long)) != records.file_stem(spec_or_repr(Cheat("x" * 301)))


# ------------------------------------------------------------------------------------------------ run folders

SMALL = "ensemble(linear, experts=2, router=linear)"


def make_run(folder: Path, model: str = SMALL, **changes: Any) -> Path:
    config = {
        "model": model, "data": "digits", "method": "at(pgd(l2(0.3), steps=1))", "threat": "l2(0.3)", "num_classes": 10,
        "image_shape": [1, 8, 8], "mean": [0.3], "std": [0.3], "attacks": [], "val_attack": None, **changes,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_weights(folder / "model.safetensors", build_model(model, 10, (1, 8, 8)).state_dict(), model)
    return folder


def headers(folder: Path) -> list[records.Header]:
    return [result.header for result in rows_of(folder)]


@pytest.mark.parametrize(
    "method, val_attack, threat",
    [
        ("at(pgd(l2(0.3), steps=1))", None, ("l2", 0.3)),
        ("trades(pgd(linf(0.2)))", "pgd(l1(3), steps=2)", ("linf", 0.2)),
        ("standard", "pgd(l1(3), steps=2)", ("l1", 3.0)),
        ("standard", None, ("linf", EPS)),
    ],
)
def test_the_threat_is_that_of_the_recipe(method: str, val_attack: str | None, threat: tuple[str, float]) -> None:
    attack = None if val_attack is None else build_attack(val_attack)
    found = threat_of({"threat": threat_trained_for(build_method(method), attack)})
    assert (found.norm, found.eps) == threat


def test_the_default_attacks_are_of_the_recipes_threat(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evaluate_run(run, limit=2, curve=())
    found = headers(run / "rows")
    assert {(header.norm, header.eps) for header in found} == {("l2", 0.3)}
    assert sorted(header.objective.name for header in found if header.objective) == [
        "experts_only",
        "joint",
        "router_only",
        "routing",
    ]
    assert sum("steps=20" in str(header.attack) for header in found) == 3
    assert sum(str(header.attack).startswith("expert_transition(") for header in found) == 1


def test_a_dense_model_meets_as_many_attacks_by_default(tmp_path: Path) -> None:
    """Four of PGD-20, as a routed model does; of two classes there is one rival alone."""
    dense = evaluate_run(make_run(tmp_path / "dense", "linear"), limit=2, curve=())
    routed = evaluate_run(make_run(tmp_path / "routed"), limit=2, curve=())
    assert len(dense) == len(routed) == 4
    assert [str(each.header.attack) for each in dense] == [
        f"pgd(l2(0.3), steps=20, {objective}keep=first)"
        for objective in (
            "", "objective=joint(loss=margin), ",
            "objective=targeted(loss=margin), ", "objective=targeted(rank=3, loss=margin), ",
        )
    ]  # fmt: skip
    binary = evaluate(build_model("linear", 2, (1, 8, 8)), torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 0]), curve=())
    assert len(binary) == 3


def test_the_recipes_own_attacks_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attacks = ["fgsm(linf(0.1))", "pgd(linf(0.1), steps=2, objective=router_only)"]
    run = make_run(tmp_path / "run", "linear", attacks=attacks)
    evaluate_run(run, limit=2, curve=())
    assert [header.attack for header in headers(run / "rows")] == ["fgsm(linf(0.1))"]
    assert "1 attack(s) on experts or routers alone left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="the model has no router, and every attack asked for"):
        evaluate_run(run, attacks=attacks[1:], limit=2)


def test_seeds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    attacks = ["pgd(linf(0.1), steps=1)", "pgd(linf(0.1), steps=1, seed=3)"]
    evaluate_run(run, attacks=attacks, limit=2, curve=(), seed=5)
    assert sorted(header.seed for header in headers(run / "rows")) == [3, 5]
    evaluate_run(run, attacks=attacks, limit=2, curve=())
    assert sorted(header.seed for header in headers(run / "rows")) == [0, 3, 5]


def test_the_curve_is_in_the_attacks_own_norm_and_one_family(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    table = summary_table(evaluate_run(run, attacks=["pgd(l2(0.4), steps=2, step_size=0.2)"], limit=4))
    found = headers(run / "rows")
    assert sorted(header.eps for header in found) == pytest.approx([0.1, 0.2, 0.4, 0.6, 0.8])
    assert {header.role for header in found if header.eps != 0.4} == {"curve"}
    assert {header.norm for header in found} == {"l2"}
    assert len({analysis.family(header) for header in found}) == 1
    assert "pgd(l2(eps), steps=2, keep=first), accuracy at eps (n = 4):" in table
    evaluate_run(run, attacks=["pgd(linf(0.6), steps=1)"], limit=4)  # twice that is no linf radius
    assert sorted(h.eps for h in headers(run / "rows") if h.norm == "linf") == pytest.approx([0.15, 0.3, 0.6, 0.9])


@pytest.mark.parametrize("radius", [-0.1, 1.5, math.inf, math.nan])
def test_a_radius_that_is_none(radius: float, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"is no radius of the linf curve; expected numbers from 0 to 1, in pixels"):
        evaluate_run(run, attacks=["fgsm(linf(0.1))"], limit=2, curve=(0.05, radius))
    assert not (run / "rows").exists()


def test_splits_have_their_own_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for split in ("test", "val", "train"):
        evaluate_run(run, attacks=["fgsm(linf(0.1))"], split=split, limit=3, curve=())
    names = sorted(f.name for f in (run / "rows").iterdir() if "examples" not in f.name)
    assert names == ["fgsm-linf-0.1-train.jsonl", "fgsm-linf-0.1-val.jsonl", "fgsm-linf-0.1.jsonl"]
    assert {header.split for header in headers(run / "rows")} == {"test", "val", "train"}
    with pytest.raises(UserError, match="split must be one of 'test', 'val', 'train'; got 'tets'"):
        evaluate_run(run, split="tets")


def test_a_router_that_no_attack_feels_is_not_attacked(tmp_path: Path) -> None:
    class Blind(Toy):
        def body(self, x: Tensor, tape: Tape) -> Tensor:
            return super().body(torch.cat([x[..., :1].detach(), x[..., 1:]], -1), tape)

    evaluate(Blind("straight"), FOUR, LABELS, out=tmp_path)
    judged = analysis.judge(rows_of(tmp_path))
    assert (judged.router_attacked, judged.trusted) == (False, False)
    assert sum(sentence.startswith("R1") for sentence in judged.failed) == 3


def test_a_curve_is_never_of_a_suite(tmp_path: Path) -> None:
    """A suite at every radius would take hours: none by default, and asking for one is refused before any work."""
    run = make_run(tmp_path / "run", "linear")
    suite = "autoattack(linf(0.1), version=rand)"
    results = evaluate_run(run, attacks=[suite, "fgsm(linf(0.1))"], limit=2)
    assert {result.header.attack.partition("(")[0] for result in results if result.header.role == "curve"} == {"fgsm"}
    assert len(evaluate_run(run, attacks=[suite], limit=2)) == 1
    with pytest.raises(UserError, match="a curve needs a simple attack beside the suite"):
        evaluate_run(run, attacks=[suite], limit=2, curve=[0.05], out=tmp_path / "rows")
    assert not (tmp_path / "rows").exists()
