"""Models with habits (they write into their images, squeeze, give tuples, ...): the right number, or one line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustmoe as rm
from robustmoe.attacks import PGD, Attack, Joint, Objective, Suite, Threat, linf
from robustmoe.attacks.base import looked_at
from robustmoe.cli import main
from robustmoe.evaluation.attacked import predictions
from robustmoe.models import Output, RoutedModel, as_routed
from robustmoe.models.norm import answers
from robustmoe.noise import Noise
from robustmoe.routing import Tape, top_k

EPS = 0.2
PGD_3 = f"pgd(linf({EPS}), steps=3)"
Net = Callable[[Tensor], Any]


def pictures(n: int = 6) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def linear() -> nn.Module:
    """4 classes; the logits are (x - 1/2) times standard normal weights."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(4, 16, generator=generator))
        net[1].bias.copy_(-0.5 * net[1].weight.sum(1))
    return net.eval()


class Habit(nn.Module):
    """The linear net with ``before`` it something done to the images, and ``after`` it something to the logits."""

    def __init__(self, before: Net = lambda x: x, after: Net = lambda logits: logits) -> None:
        super().__init__()
        self.net, self.before, self.after = linear(), before, after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.net(self.before(x)))


class Routed(RoutedModel):
    """A routed model of a user's own that writes into its images and squeezes: two linear experts of one pixel's
    choice.
    """

    def __init__(self, tidy: bool) -> None:
        super().__init__()
        self.first, self.second, self.tidy = linear(), linear(), tidy

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        x = 2 * (x - 0.25) if self.tidy else x.sub_(0.25).mul_(2)
        level = x[:, 0, 0, 0] - 0.5
        route = tape("router", top_k(torch.stack([level, -level], 1)[:, None], 1, "hard"))
        logits = torch.where(route.index[:, 0] == 0, self.first(x), -self.second(x))
        return logits if self.tidy else logits.squeeze()


def _written(x: Tensor) -> Tensor:
    return x.sub_(0.25).mul_(2.0)


def _through_data(x: Tensor) -> Tensor:
    x.data.sub_(0.25)  # no version of the tensor tells of it
    return x


def _tidy(x: Tensor) -> Tensor:
    return (x - 0.25) * 2.0


SAME: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "written": (lambda: Habit(_written), lambda: Habit(_tidy)),
    "written through .data": (lambda: Habit(_through_data), lambda: Habit(lambda x: x - 0.25)),
    "written, a function": (lambda: _function(_written), lambda: _function(_tidy)),
    "squeezed": (lambda: Habit(after=Tensor.squeeze), Habit),
    "routed, written, squeezed": (lambda: Routed(False), lambda: Routed(True)),
    "float64 logits": (lambda: Habit(after=Tensor.double), Habit),
    "scripted": (lambda: torch.jit.script(linear()), linear),
    "data parallel": (lambda: nn.DataParallel(Habit()), Habit),
}
"""Models with a habit, and the same function without."""


def _function(before: Net) -> Net:
    net = linear()
    return lambda x: net(before(x))


def predicted(model: Any, x: Tensor, y: Tensor, verbs: tuple[str, ...]) -> dict[str, Any]:
    """What the attack and these measurements say, on a batch of 5 and one of 1."""
    more = {"batch_size": 5, "device": "cpu"}
    attack = rm.build_attack(PGD_3)
    asked: dict[str, Callable[[], Any]] = {
        "evaluate": lambda: [
            (row.clean, row.adversarial) for row in rm.evaluate(model, x, y, attacks=[PGD_3], curve=(), **more)[0].rows
        ],
        "certify": lambda: [
            (proof.prediction, round(proof.radius, 4))
            for proof in rm.certify(model, x, y, certifiers=["smoothing(sigma=0.2, n=100, n0=10)"], **more)[0].rows
        ],
        "sweep": lambda: rm.sweep(model, x, y, attacks=[PGD_3], eps=[0.1], draws=0, **more).points[0].predicted,
        "blend": lambda: rm.blend(model, linear(), x, y, alphas=[0, 1], attack=PGD_3, **more).broken,
        "lipschitz": lambda: {
            name: [round(value, 3) for value in column]
            for name, column in rm.measure_lipschitz(model, x, y, attack=PGD_3, **more).model.items()
        },
        "dissect": lambda: {
            name: answers.predicted for name, answers in rm.dissect(model, x, y, attack=PGD_3, **more).under.items()
        },
    }
    values = {"attack on one": attack(model, x[:1], y[:1]).mul(1e4).round().tolist()}
    return values | {"attack": attack(model, x, y).mul(1e4).round().tolist()} | {verb: asked[verb]() for verb in verbs}


VERBS = {
    "written": ("evaluate", "certify", "sweep", "blend", "lipschitz"),
    "written through .data": ("certify",),
    "squeezed": ("evaluate", "certify", "sweep", "blend"),
    "routed, written, squeezed": ("certify", "dissect"),
    "scripted": ("evaluate",),
}
"""What is compared, beside the attack."""


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name", SAME)
def test_a_habit_changes_no_number(name: str) -> None:
    """Every measurement of the model is that of the same function without the habit, and the images stay."""
    habit, tidy = (make() for make in SAME[name])
    x = pictures()
    with torch.no_grad():
        y = tidy(x.clone()).argmax(1)
    verbs = VERBS.get(name, ())
    assert predicted(habit, x, y, verbs) == predicted(tidy, x, y, verbs)
    kept = pictures()
    rm.build_attack(PGD_3)(habit, kept, y)
    assert torch.equal(kept, pictures())


def test_a_writer_gets_copies_and_others_get_their_own_images() -> None:
    """After the first pass, only the model that writes is handed another tensor than the one that was asked about."""
    for before, alone in ((_written, False), (_tidy, True)):
        outer, seen, x = Habit(before), [], pictures()
        outer.net.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        outer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        model = as_routed(outer)
        for _ in range(3):
            model.run(x)
        assert [at is x for at in seen[::2]] == [False, alone, alone]


# ------------------------------------------------------------------------------------------------ what is refused


class Freed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        raise RuntimeError("no way back")


def _later(count: int, bad: Net) -> Net:
    """``bad`` from the pass of that number on."""
    passes = iter(range(10**9))
    return lambda value: bad(value) if next(passes) >= count else value


def _raises(value: Tensor) -> Tensor:
    raise RuntimeError("mat1 and mat2")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a tuple": (lambda: Habit(after=lambda z: (z, z)), r"gives a tuple of 2; expected .*lambda x: model\(x\)\[0\]"),
    "a dict": (lambda: Habit(after=lambda z: {"out": z}), r"gives a dict; expected .*lambda x: model\(x\)\['out'\]"),
    "nothing": (lambda: Habit(after=lambda z: None), r"gives nothing \(it has no return\); expected"),
    "classes": (lambda: Habit(after=lambda z: z.argmax(1)), "gives a tensor of torch.int64; expected .*floating point"),
    "int": (lambda: Habit(after=Tensor.long), "gives a tensor of torch.int64; expected .*floating point"),
    "bool": (lambda: Habit(after=lambda z: z > 0), "gives a tensor of torch.bool; expected .*floating point"),
    "complex": (lambda: Habit(after=lambda z: z * 1j), "gives a tensor of torch.complex64; expected .*floating point"),
    "sparse": (lambda: Habit(after=Tensor.to_sparse), "gives a sparse tensor; expected"),
    "rows": (lambda: Habit(after=lambda z: z[:-1]), r"of shape \(\d+, 4\) for images \(\d+, 1, 4, 4\); expected"),
    "flat": (lambda: Habit(after=Tensor.flatten), r"gives a tensor of shape \(\d+,\) for images"),
    "a score": (lambda: Habit(after=lambda z: z[:, :1]), r"expected a column for each class, two at least"),
    "few classes": (lambda: Habit(after=lambda z: z[:, :2]), "label 3 is out of range: the model has 2 classes"),
    "fails": (lambda: Habit(_raises), r"the model fails on images .*RuntimeError: mat1 and mat2"),
    "fails later": (lambda: Habit(_later(2, _raises)), r"the model fails on images .*RuntimeError: mat1 and mat2"),
    "rows later": (lambda: Habit(after=_later(2, lambda z: z[:-1])), r"of shape \(\d+, 4\) for images"),
    "in place later": (lambda: Habit(_later(2, _written)), "has written into its images|in-place operation"),
    "backward": (lambda: Habit(after=Freed.apply), r"no gradient can be taken through .*\(RuntimeError: no way"),
    "half": (lambda: Habit().half(), r"Its weights are float16: give model.float\(\), or lambda x: model\(x.to"),
    "double": (lambda: Habit().double(), r"Its weights are float64: give model.float\(\), or lambda"),
    "meta": (lambda: Habit().to("meta"), r"weight '.*net.1.weight' is on the meta device and holds no numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_one_line(name: str) -> None:
    """By every verb, where the habit is one that they could treat differently; by two of them else."""
    make, message = REFUSED[name]
    x = pictures()
    with torch.no_grad():
        y = linear()(x).argmax(1)
    asked: dict[str, Callable[[Any], object]] = {
        "attack": lambda model: rm.build_attack(PGD_3)(model, x, y),
        "sweep": lambda model: rm.sweep(model, x, y, attacks=[PGD_3], eps=[0.1], draws=0, device="cpu"),
    }
    if name in ("a tuple", "meta", "fails later", "half"):
        asked["evaluate"] = lambda model: rm.evaluate(model, x, y, attacks=[PGD_3], curve=(), device="cpu")
        asked["blend"] = lambda model: rm.blend(model, linear(), x, y, alphas=[0, 1], attack=PGD_3, device="cpu")
    if name in ("a tuple", "meta", "rows later"):
        asked["certify"] = lambda model: rm.certify(model, x, y, certifiers=["smoothing(n=100, n0=10)"], device="cpu")
    if name in ("a tuple", "meta", "backward"):
        asked["lipschitz"] = lambda model: rm.measure_lipschitz(model, x, y, attack=PGD_3, device="cpu")
    for verb, ask in asked.items():
        with pytest.raises(rm.UserError) as raised:
            ask(make())
        assert re.search(message, str(raised.value)), (verb, str(raised.value))
        assert "\n" not in str(raised.value)


def test_the_habit_of_one_image_is_no_failure_of_check_h4() -> None:
    x = pictures()
    with torch.no_grad():
        y = linear()(x).argmax(1)
    (record,) = rm.evaluate(Habit(after=Tensor.squeeze), x, y, attacks=[PGD_3], curve=(), device="cpu")
    assert record.checks is not None
    assert {check.id: check.status for check in record.checks.checks}["H4"] == "pass"


# ------------------------------------------------------------------------------------------------ classes


def test_classes_at_minus_infinity_are_never_chosen() -> None:
    """Two masked classes of six change no answer, no certificate and no check."""
    off = torch.tensor([-torch.inf, -torch.inf])
    x, plain = pictures(), Habit()
    masked = Habit(after=lambda logits: torch.cat([logits, off.expand(len(logits), 2)], 1))
    with torch.no_grad():
        y = plain(x).argmax(1)
    more = {"batch_size": 5, "device": "cpu"}
    records = [rm.evaluate(model, x, y, attacks=[PGD_3], curve=(), **more)[0] for model in (plain, masked)]
    numbers = [record.summary() for record in records]
    assert numbers[0].clean.value == numbers[1].clean.value == 1.0
    assert [row.adversarial for row in records[0].rows] == [row.adversarial for row in records[1].rows]
    said = {check.id: check for check in records[1].checks.checks}
    assert all(said[id].status == "pass" for id in ("H1", "H4", "H6", "H7", "R7"))
    assert said["H6"].sentence.startswith("2 of 6 classes are masked (-inf), never chosen")
    proofs = [
        rm.certify(model, x, y, certifiers=["smoothing(n=100, n0=10)"], **more)[0].rows for model in (plain, masked)
    ]
    assert [(p.prediction, p.radius) for p in proofs[0]] == [(p.prediction, p.radius) for p in proofs[1]]
    with pytest.raises(rm.UserError, match="2 of the 6 classes have logits that are not finite, which have no slope"):
        rm.measure_lipschitz(masked, x, y, attack=PGD_3, device="cpu")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_other_numbers_that_are_not_finite_name_no_class(bad: float) -> None:
    logits = torch.tensor([[1.0, bad, 0.0], [1.0, -torch.inf, 0.0], [-torch.inf] * 3])
    assert answers(logits).tolist() == [False, True, False]
    assert predictions(Output(logits, {})) == [-1, 0, -1]


def test_more_outputs_than_classes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr by every measurement, once; and by check H1. As many outputs as classes: not a word."""
    x, y = pictures(), torch.arange(6) % 4
    for classes, told in ((3, True), (4, False)):
        for ask in (
            lambda classes=classes: rm.sweep(
                Habit(), x, y % 3, num_classes=classes, attacks=[PGD_3], eps=[0.1], draws=0
            ),
            lambda classes=classes: rm.evaluate(Habit(), x, y % 3, num_classes=classes, attacks=[PGD_3], curve=(0.1,)),
        ):
            record = ask()
            said = capsys.readouterr().err
            assert said.count("the model has 4 outputs, the data 3 classes: output k is read as class k") == told
        assert {check.id: check.status for check in record[0].checks.checks}["H1"] == ("warn" if told else "pass")
        assert record[0].header.classes == ["0", "1", "2", "3"]


# ------------------------------------------------------------------------------------------------ called directly

ATTACKS = [
    PGD_3,
    f"fgsm(linf({EPS}))",
    f"apgd(linf({EPS}), steps=3)",
    f"fab(linf({EPS}), steps=3)",
    f"fmn(linf({EPS}), steps=3)",
    f"square(linf({EPS}), steps=3)",
    f"autoattack(linf({EPS}))",
]


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.int8, torch.uint8, list, np.asarray])
def test_labels_of_any_integer_type(kind: Any) -> None:
    """The same attacked images, to the bit; and the caller's labels stay what they are."""
    x, net = pictures(), linear()
    with torch.no_grad():
        y = net(x).argmax(1)
    given = y.tolist() if kind is list else np.asarray(y) if kind is np.asarray else y.to(kind)
    for text in ATTACKS[:6]:
        attack = rm.build_attack(text)
        assert torch.equal(attack(net, x, given), attack(net, x, y))


@pytest.mark.parametrize("text", ATTACKS)
def test_what_an_attack_is_called_with_is_looked_at(text: str) -> None:
    attack, net, x, y = rm.build_attack(text), linear(), pictures(), torch.arange(6) % 4
    for bad, message in (
        ((2 * x - 0.5, y), r"the images range from -0\.\d+ to 1\.\d+, expected \[0, 1\].*normalisation belongs inside"),
        (((255 * x).byte(), y), r"the images are torch.uint8, expected floating point in \[0, 1\]"),
        ((x / 0, y), "image 0 holds a value that is not finite"),
        ((x[0], y), "expected four axes"),
        ((x[:, :, :3], y), r"the model fails on images \(6, 1, 3, 4\) \(RuntimeError: mat1 and mat2"),
        ((x, y - 1), "the labels of the batch range from -1 to 2"),
        ((x, y + 2), "label 5 is out of range: the model has 4 classes"),
        ((x, y.float()), "the labels of the batch are torch.float32, expected integers"),
        ((x, y[:3]), r"6 images and labels of shape \(3,\)"),
        ((x, ["cat"] * 6), "the labels of the batch cannot be made a tensor"),
        ((x, y, Noise.of(torch.arange(3), 0)), "6 images and 3 streams of noise"),
    ):
        with pytest.raises(rm.UserError, match=message):
            attack(net, *bad)
    assert attack(net, x[:0], y[:0]).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_other_floats_are_attacked_in_the_models_own(dtype: torch.dtype) -> None:
    """As in an evaluation: in float32, inside the ball and the box; in float64 where the weights are, too."""
    x, y, net = pictures().to(dtype), torch.arange(6) % 4, linear()
    x_adv = rm.build_attack(PGD_3)(net, x, y)
    assert x_adv.dtype == torch.float32
    assert torch.equal(x_adv, rm.build_attack(PGD_3)(net, x.float(), y))
    assert float((x_adv - x.float()).abs().max()) <= EPS + 1e-6
    wide = rm.build_attack(PGD_3)(net.double(), x.double(), y)
    assert wide.dtype == torch.float64
    assert torch.allclose(wide.float(), x_adv, atol=1e-5)


def test_rounding_above_one_is_clipped_and_the_callers_images_stay() -> None:
    x, y, net = pictures(), torch.arange(6) % 4, linear()
    x[0, 0, 0], x[1, 0, 0] = 1 + 1e-7, -1e-7
    kept = x.clone()
    x_adv = rm.build_attack(PGD_3)(net, x, y)
    assert torch.equal(x_adv, rm.build_attack(PGD_3)(net, x.clamp(0, 1), y))
    assert torch.equal(x, kept)
    assert rm.evaluate(net, x, y, attacks=[PGD_3], curve=(), device="cpu")[0].summary().clean.n == 6
    with pytest.raises(rm.UserError, match="the images range from 0"):
        rm.build_attack(PGD_3)(net, (x + 1e-3).clamp(min=0), y)


def test_a_model_without_gradient_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = pictures(), torch.arange(6) % 4
    for text, told in ((PGD_3, True), (f"square(linf({EPS}), steps=3)", False)):
        rm.build_attack(text)(Habit(after=Tensor.detach), x, y)
        assert ("the model's logits have no gradient" in capsys.readouterr().err) == told
    rm.sweep(Habit(after=Tensor.detach), x, y, attacks=[PGD_3], eps=[0.1], draws=0, device="cpu")
    assert "the model's logits have no gradient" in capsys.readouterr().err
    rm.build_attack(PGD_3)(Habit(), x, y)
    assert capsys.readouterr().err == ""
    with pytest.raises(rm.UserError, match="the attack's loss or gradient is not finite"):
        rm.build_attack(PGD_3)(Habit(after=lambda z: z * torch.nan), x, y)


@dataclass(frozen=True)
class Two(Suite):
    threat: Threat
    objective: Objective
    seed: int

    def parts(self, output: Output) -> list[tuple[str, Attack]]:
        return [(f"part {steps}", PGD(self.threat, steps=steps)) for steps in (1, 2)]


def test_a_look_costs_no_pass() -> None:
    """A look costs no pass: the first one is looked at."""
    counted: list[int] = []
    net, x = linear(), pictures()
    net.register_forward_hook(lambda module, args, output: counted.append(len(args[0])))
    with torch.no_grad():
        y = net(x).argmax(1)
    suite = Two(linf(EPS), Joint(), 0)
    runs = []
    for before in (contextlib.nullcontext(), looked_at()):
        counted.clear()
        with before:
            suite(net, x, y)
        runs.append(list(counted))
    assert runs[0] == runs[1]
    assert len(runs[0]) > 3


# ------------------------------------------------------------------------------------------------ trained


def trained(model: nn.Module, out: Path) -> Path:
    x, y = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(3)), torch.arange(20) % 4
    method = f"at(pgd(linf({EPS}), steps=1))"
    return rm.train(model, x, y, out=out, method=method, epochs=1, batch_size=8, augment=None, device="cpu")


def test_a_model_that_writes_is_trained_as_one_that_does_not(tmp_path: Path) -> None:
    writes, tidy = Habit(_written), Habit(_tidy)
    for name, model in (("writes", writes), ("tidy", tidy)):
        trained(model, tmp_path / name)
    assert torch.equal(writes.net[1].weight, tidy.net[1].weight)
    assert not torch.equal(writes.net[1].weight, linear()[1].weight)


@pytest.mark.parametrize("name", ["a tuple", "int", "a score", "few classes", "half", "meta", "fails"])
def test_what_cannot_be_trained_is_told_before_there_is_a_folder(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises(rm.UserError, match=message):
        trained(make(), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


# ------------------------------------------------------------------------------------------------ from a file

FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.net, self.after, self.passes = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), after, 0

    def forward(self, x):
        self.passes += 1
        return self.after(self.net(x), self.passes)

class Freed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        raise RuntimeError("no way back")

def written(logits, passes):
    raised = logits.exp()
    return raised * 2 + raised.zero_() + logits

def integers():
    return Net(lambda logits, passes: logits.long())

def rows_later():
    return Net(lambda logits, passes: logits if passes < 4 else logits[1:])

def backward():
    return Net(lambda logits, passes: Freed.apply(logits))

def spoilt():
    return Net(written)

def meta():
    return Net(None).to("meta")

def no_modes():
    net = Net(None)
    net.train = None
    return net
"""


@pytest.mark.parametrize(
    "verb, name, message",
    [
        ("check", "integers", "the model gives a tensor of torch.int64"),
        ("evaluate", "rows_later", r"the model gives a tensor of shape \(3, 10\) for images \(4, 1, 8, 8\)"),
        ("evaluate", "backward", "no gradient can be taken through the model .RuntimeError: no way back."),
        ("check", "spoilt", "no gradient can be taken through the model .RuntimeError: one of the variables needed"),
        ("sweep", "meta", "the model's weight 'net.1.weight' is on the meta device"),
        ("certify", "no_modes", r"the model cannot be put in eval mode .TypeError: 'NoneType' object is not"),
    ],
)
def test_a_model_of_a_file_that_fails_is_one_line(
    verb: str, name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    assert main([verb, "--model", f"mine.py:{name}", "--data", "digits", "--limit", "4", "--device", "cpu"]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if not text.startswith("run folder")]
    assert re.search(message, line)
