"""What is looked for inside a foreign model: routing that is not declared (R18), gradients that do not pass (G15, G2),
who draws random numbers (R7).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustmoe as rm
from faulty_models import Mix, on
from planted import PLANTED, as_function
from robustmoe.data import Batch
from robustmoe.evaluation.checks import Subject
from robustmoe.evaluation.checks.hidden import hidden
from robustmoe.evaluation.checks.inside import modules_read_by
from robustmoe.evaluation.checks.passing import foreign_differences, gradient_off
from robustmoe.evaluation.checks.routers import random_module_quickly
from robustmoe.models import as_routed
from robustmoe.records import Check
from robustmoe.routing import Tape

N = 8


def pictures() -> Tensor:
    return torch.rand(N, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def asked(model: Callable[[Tensor], Tensor], x: Tensor | None = None) -> Subject:
    x = pictures() if x is None else x
    return on(as_routed(model).eval(), Batch(x, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x))))


# ------------------------------------------------------------------------------------------------ R18


class Experts(nn.Module):
    """A stem, four alike experts and a linear gate; ``how`` says what is made of them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.score, self.head = nn.Linear(48, 16), nn.Linear(16, 4), nn.Linear(16, 5)
        self.units = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)])
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        f = self.stem(x.flatten(1) - 0.5)
        g = 3 * self.score(f)
        return self.head(getattr(self, self.how)(f, g))

    def every(self, f: Tensor) -> Tensor:
        return torch.stack([unit(f) for unit in self.units], 1)

    def loop(self, f: Tensor, g: Tensor) -> Tensor:
        out, chosen = torch.zeros_like(f), g.argmax(1)
        for expert, unit in enumerate(self.units):
            mine = chosen == expert
            if mine.any():
                out[mine] = unit(f[mine])
        return out

    def item(self, f: Tensor, g: Tensor) -> Tensor:
        return torch.stack([self.units[int(score.argmax().item())](row) for row, score in zip(f, g)])

    def picked(self, f: Tensor, g: Tensor) -> Tensor:
        return self.every(f)[torch.arange(len(f)), g.argmax(1)]

    def mask(self, f: Tensor, g: Tensor) -> Tensor:
        return (F.one_hot(g.max(1).indices, 4).float()[:, :, None] * self.every(f)).sum(1)

    def cut_softmax(self, f: Tensor, g: Tensor) -> Tensor:
        second = g.topk(2, -1).values[:, -1:]
        weight = g.masked_fill(g < second, -torch.inf).softmax(1)
        return (weight[:, :, None] * self.every(f)).sum(1)

    def threshold(self, f: Tensor, g: Tensor) -> Tensor:
        return torch.where((g[:, 0] > g[:, 1].mean())[:, None], self.units[0](f), self.units[1](f))

    def branch(self, f: Tensor, g: Tensor) -> Tensor:
        return torch.stack([self.units[0 if float(score[0]) > float(score[1]) else 1](row) for row, score in zip(f, g)])

    def soft(self, f: Tensor, g: Tensor) -> Tensor:
        return (g.softmax(1)[:, :, None] * self.every(f)).sum(1)

    def noisy(self, f: Tensor, g: Tensor) -> Tensor:
        return (F.gumbel_softmax(g, hard=True)[:, :, None] * self.every(f)).sum(1)


class SoftMoE(nn.Module):
    """Puigcerver et al. 2024 on the 16 pixels of an image: slots are mixtures of tokens, tokens mixtures of slots."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(3, 2, 2))
        self.experts = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        logits = torch.einsum("ntd,des->ntes", tokens, self.slots).flatten(2)
        mixed = torch.einsum("nts,ntd->nsd", logits.softmax(1), tokens)
        out = torch.cat([expert(part) for expert, part in zip(self.experts, mixed.chunk(2, 1))], 1)
        return self.head(torch.einsum("nts,nsd->ntd", logits.softmax(2), out).flatten(1))


HOWS = ["loop", "item", "picked", "mask", "cut_softmax", "threshold", "branch", "soft", "noisy"]


@pytest.mark.parametrize("how", HOWS)
def test_routing_that_is_not_declared_fails(how: str) -> None:
    for model in (Experts(how), nn.Sequential(Experts(how)), _in_a_lambda(Experts(how))):
        answer = hidden(asked(model))
        assert answer.status == "fail", answer.sentence
        assert "rm.wrap(model, " in answer.sentence


def test_the_advice_is_what_helps() -> None:
    """What the sentence says to run makes a model that the check passes, with a router in its trace."""
    model = Experts("loop").eval()
    sentence = hidden(asked(model)).sentence
    call = sentence.partition("attacked: ")[2]
    wrapped = eval(call, {"rm": rm, "model": model, "x": pictures()})
    assert len(wrapped.run(pictures()).trace) == 1
    assert hidden(asked(wrapped)).status == "pass"
    assert gradient_off(asked(wrapped)).status == "pass"
    assert "rm.wrap(model, example=x)" in hidden(asked(_in_a_lambda(model))).sentence


def _in_a_lambda(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: 2 * model.eval()(x)


def test_a_hidden_soft_moe_fails() -> None:
    answer = hidden(asked(SoftMoE()))
    assert answer.status == "fail"
    assert "(experts)" in answer.sentence


def test_the_module_and_the_call_are_named() -> None:
    sentence = hidden(asked(nn.Sequential(nn.Identity(), Experts("picked")))).sentence
    assert "argmax of 4 in module '1' (Experts) decides what the logits are made of" in sentence
    assert "module 'net' (Experts)" in hidden(asked(partial(lambda x, net: net(x), net=Experts("picked")))).sentence
    assert "module 'units.0' (Sequential)" in hidden(asked(Experts("loop"))).sentence


OWN_THRESHOLD = ["capacity", "stale route"]
"""Their experts ask for themselves whether an image is bright, beside the router."""


@pytest.mark.parametrize(
    "planted",
    [p for p in PLANTED if isinstance(p.model, type) and p.name != "dead router"],
    ids=lambda planted: planted.name,
)
def test_every_planted_router_is_seen_where_it_is_hidden(planted: rm.RoutedModel) -> None:
    case = planted.make()  # type: ignore[operator]
    assert hidden(asked(as_function(case.model), case.x)).status == "fail"
    declared = hidden(asked(nn.Sequential(nn.Identity(), case.model), case.x))
    assert declared.status == ("fail" if planted.name in OWN_THRESHOLD else "pass")


def test_a_router_that_is_declared_is_none_and_one_beside_it_is() -> None:
    class Beside(Mix):
        def body(self, x: Tensor, tape: Tape) -> Tensor:
            logits = super().body(x, tape)
            return torch.where((logits[:, :1] > logits[:, :1].mean()), logits, logits.flip(1))

    x = torch.rand(N, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    assert hidden(asked(Mix("hard"), x)).status == "pass"
    answer = hidden(asked(Beside("hard"), x))
    assert answer.status == "fail"
    assert "a threshold" in answer.sentence


COMPILED = """
import torch
from planted import PLANTED
from robustmoe.attacks import FGSM, linf
from robustmoe.data import Batch
from robustmoe.evaluation.checks import Subject
from robustmoe.evaluation.checks.hidden import hidden
from robustmoe.models import as_routed

case = PLANTED[0].make()
compiled = torch.compile(case.model, backend="eager")
model = as_routed(lambda x: compiled(x) + 0)
batch = Batch(case.x, case.y, torch.arange(len(case.x)))
assert model.run(case.x).trace == {}
print(hidden(Subject(model, (FGSM(linf(0.1)),), batch, batch)))
"""


def test_a_routed_model_that_is_called_past_its_tape_is_named() -> None:
    class Past(nn.Module):
        def __init__(self, inner: rm.RoutedModel) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.body(x, Tape())

    case = PLANTED[0].make()
    for model in (Past(case.model), lambda x: case.model(torch.cat([x, x]))[: len(x)]):
        answer = hidden(asked(model, case.x))
        assert answer.status == "fail"
        assert "is a RoutedModel: call it as it is, on the same images, uncompiled" in answer.sentence


@pytest.mark.slow
def test_a_route_that_is_compiled_into_a_lambda_is_seen() -> None:
    """In a process of its own: torch.compile cannot read functions whose shapes are checked."""
    paths = os.pathsep.join([str(Path(rm.__file__).parents[1]), str(Path(__file__).parent)])
    script = [sys.executable, "-c", COMPILED]
    said = subprocess.run(script, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "status='fail'" in said.stdout
    assert "give the model that was compiled" in said.stdout


class Dense(nn.Module):
    """What dense networks do that looks like routing, and is none."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.gate, self.head = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        f = self.stem(x.flatten(2).transpose(1, 2))
        for block in self.blocks:
            f = f + getattr(self, self.how)(block(f))
        logits: Tensor = self.head(f.mean(1))
        self.last = logits.argmax(1)
        return logits

    def attention(self, f: Tensor) -> Tensor:
        return (f @ f.transpose(1, 2)).softmax(-1) @ f

    def squeeze(self, f: Tensor) -> Tensor:
        return f * self.gate(f.mean(1, keepdim=True)).sigmoid()

    def gated(self, f: Tensor) -> Tensor:
        return F.silu(self.gate(f)) * f

    def spatial_gate(self, f: Tensor) -> Tensor:
        u, v = f.chunk(2, -1)
        return torch.cat([u, u * self.gate(f)[..., :8]], -1) + 0 * v.sum()

    def pooled(self, f: Tensor) -> Tensor:
        return f + f.max(1, keepdim=True).values + f.amax(2, keepdim=True) + f.sort(1).values[:, :1]

    def dropped(self, f: Tensor) -> Tensor:
        return F.dropout(f, 0.5, self.training)

    def relu(self, f: Tensor) -> Tensor:
        return f * (f > 0) + torch.where(f.norm(dim=-1, keepdim=True) == 0, 1.0, f)


DENSE = ["attention", "squeeze", "gated", "spatial_gate", "pooled", "dropped", "relu"]


@pytest.mark.parametrize("how", DENSE)
def test_dense_networks_are_not_said_to_route_nor_to_hide_a_gradient(how: str) -> None:
    for check in (hidden, gradient_off, foreign_differences):
        answer = check(asked(Dense(how)))
        assert answer.status == "pass", answer.sentence


SURVEY = Path(__file__).parents[1] / "docs" / "results" / "looking_inside.json"


def test_every_dense_network_of_the_survey_passes_and_every_hidden_router_is_marked() -> None:
    numbers = json.loads(SURVEY.read_text(encoding="utf-8"))
    assert len(numbers["dense"]) >= 25
    for name, row in numbers["dense"].items():
        assert [row[id] for id in ("R18", "G15", "G2", "R7")] == ["pass"] * 4, name
    printed = numbers["printed"]
    for name in ("a pathway, its body called by a plain module", "a hard top-1", "a pathway of filters", "a Soft MoE"):
        assert "do NOT quote this number" in printed[name]
        assert "R18 hidden routers" in printed[name]
    for name in ("a pathway in DataParallel", "a pathway behind torch.compile"):
        assert "router attacked: yes" in printed[name]


def test_names_alone_warn() -> None:
    class MoELayer(nn.Linear):
        pass

    answer = hidden(asked(nn.Sequential(nn.Flatten(), MoELayer(48, 5))))
    assert answer.status == "warn"
    assert "module '1' (MoELayer) has the name" in answer.sentence


def test_the_modules_that_a_function_reads() -> None:
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)

    class Caller:
        def __init__(self) -> None:
            self.nets = [first, second]

        def __call__(self, x: Tensor) -> Tensor:
            return x

    def outer(x: Tensor, net: nn.Module = first) -> Tensor:
        return net(second(x))

    assert modules_read_by(outer) == {"net": first, "second": second}
    assert modules_read_by(Caller()) == {"nets_0": first, "nets_1": second}
    assert modules_read_by(Caller().__call__) == {"nets_0": first, "nets_1": second}
    assert modules_read_by(partial(outer, net=second)) == {"net": second, "second": second}
    assert modules_read_by(lambda x: outer(x)) == {"net": first, "second": second}
    assert modules_read_by(torch.sin) == {}


# ------------------------------------------------------------------------------------------------ G15, G2


class Cut(nn.Module):
    """A stem, and a branch whose gradient is off in some way (``how``)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.branch, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(128, 5)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = getattr(self, self.how)(x) if self.how in PIXELS else x
        f = torch.tanh(self.stem(x))
        f = f + self.branch(f) if self.how in PIXELS else getattr(self, self.how)(f)
        return self.head(f.flatten(1))

    def rounded(self, x: Tensor) -> Tensor:
        return torch.round(16 * x) / 16

    def cast(self, x: Tensor) -> Tensor:
        return (16 * x).byte().float() / 16

    def straight_through(self, x: Tensor) -> Tensor:
        return x + (torch.round(16 * x) / 16 - x).detach()

    def no_grad(self, f: Tensor) -> Tensor:
        with torch.no_grad():
            g = self.branch(f)
        return f + g

    def decorated(self, f: Tensor) -> Tensor:
        return f + torch.no_grad()(self.branch)(f)

    def inference(self, f: Tensor) -> Tensor:
        with torch.inference_mode():
            g = self.branch(f)
        return f + g.clone()

    def detached(self, f: Tensor) -> Tensor:
        return f + self.branch(f).detach()

    def data(self, f: Tensor) -> Tensor:
        return f + self.branch(f).data

    def filled(self, f: Tensor) -> Tensor:
        out = torch.zeros_like(f)
        out[:, :4] = self.branch(f).detach()[:, :4]
        return f + out

    def numbers(self, f: Tensor) -> Tensor:
        return f + 3 * torch.stack([torch.full_like(row, float(row[0, 0, 0].item())) for row in self.branch(f)])

    def stable_softmax(self, f: Tensor) -> Tensor:
        e = (f - f.amax(1, keepdim=True).detach()).exp()
        return e / e.sum(1, keepdim=True) + self.branch(f)

    def logged(self, f: Tensor) -> Tensor:
        self.mean = f.detach().mean().item()
        return f + self.branch(f)

    def masked(self, f: Tensor) -> Tensor:
        return f * (f.detach() > -0.9) + self.branch(f)

    def signed_root(self, f: Tensor) -> Tensor:
        return f.sign() * (f.abs() + 0.01).sqrt() + self.branch(f)

    def interpolated(self, f: Tensor) -> Tensor:
        table, at = torch.linspace(-1, 1, 41).square(), 10 * (f + 2)
        low = at.floor()
        return table[low.long()] * (1 - at + low) + table[low.long() + 1] * (at - low) + self.branch(f)

    def own_backward(self, f: Tensor) -> Tensor:
        squares: Tensor = Square.apply(f)
        return squares + self.branch(f)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x)
        return x.detach() * x

    @staticmethod
    def backward(ctx, slope: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return 2 * ctx.saved_tensors[0] * slope


PIXELS = ["rounded", "cast", "straight_through"]
OFF = ["rounded", "cast", "no_grad", "decorated", "inference", "detached", "data", "filled"]
FINE = ["straight_through", "stable_softmax", "logged", "masked", "signed_root", "interpolated", "own_backward"]


@pytest.mark.parametrize("how", OFF)
def test_a_gradient_that_is_off_fails(how: str) -> None:
    answer = gradient_off(asked(Cut(how)))
    assert answer.status == "fail", answer.sentence
    assert "the image's gradient is off by" in answer.sentence


@pytest.mark.parametrize("how", FINE)
def test_a_gradient_that_is_off_without_effect_passes(how: str) -> None:
    assert gradient_off(asked(Cut(how))).status == "pass"


def test_the_share_that_is_missing_by_hand() -> None:
    """3 x + (4 x).detach(): the gradient is 3 of 7."""
    answer = gradient_off(asked(lambda x: 3 * x.flatten(1) + 4 * x.flatten(1).detach()))
    assert answer.value == pytest.approx(4 / 7, rel=1e-5)


def test_the_module_is_named_and_where_numbers_leave_torch() -> None:
    answer = gradient_off(asked(Cut("no_grad")))
    assert "computed without gradients (no_grad) in module 'branch' (Conv2d)" in answer.sentence
    passing, failing = gradient_off(asked(Cut("numbers"))), foreign_differences(asked(Cut("numbers")))
    assert passing.status == "pass", "a number outside of torch is no tensor that could be followed"
    assert failing.status == "fail"
    assert "numbers leave torch by item in the model's own code" in failing.sentence


@pytest.mark.parametrize("how", [how for how in OFF if how not in PIXELS])
def test_finite_differences_say_the_same(how: str) -> None:
    assert foreign_differences(asked(Cut(how))).status == "fail"
    assert foreign_differences(asked(_in_a_lambda(Cut(how)))).status == "fail", "in float32 too"


@pytest.mark.parametrize("how", [how for how in FINE if how != "straight_through"])
def test_finite_differences_pass_where_the_gradient_is_right(how: str) -> None:
    assert foreign_differences(asked(Cut(how))).status == "pass"
    assert foreign_differences(asked(_in_a_lambda(Cut(how)))).status == "pass", "in float32 too"


def test_what_is_built_of_our_own_parts_is_not_looked_into(tiny: Callable[..., rm.RoutedModel]) -> None:
    model = tiny("ensemble_straight")
    x = torch.rand(N, 3, 8, 8)
    assert hidden(asked(model, x)).status == gradient_off(asked(model, x)).status == "pass"
    assert foreign_differences(asked(model, x)).status == "not run"


# ------------------------------------------------------------------------------------------------ R7


class TupleGate(nn.Module):
    """A gate that gives a tuple and draws in eval mode, as st-moe-pytorch's does."""

    def forward(self, f: Tensor) -> tuple[dict[str, Tensor], int]:
        return {"scores": f + torch.zeros_like(f).uniform_(0, 1)}, 3


class Gated(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.before, self.gate, self.after = nn.Linear(48, 4), gate, nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.gate(self.before(x.flatten(1)))[0]["scores"])


def test_the_module_that_draws_is_named_also_where_it_gives_a_tuple() -> None:
    answer = random_module_quickly(asked(Gated(TupleGate())))
    assert (answer.status, answer.value) == ("fail", "module 'gate' (TupleGate)")
    assert "draws random numbers by uniform_" in answer.sentence


def test_a_draw_that_changes_nothing_warns() -> None:
    class Seldom(nn.Module):
        def forward(self, f: Tensor) -> tuple[dict[str, Tensor], int]:
            return {"scores": f + (torch.rand_like(f) > 2)}, 3

    answer = random_module_quickly(asked(Gated(Seldom())))
    assert (answer.status, answer.value) == ("warn", "module 'gate' (Seldom)")
    assert "2 passes on the same 4 images agree, others need not" in answer.sentence


def test_where_none_of_torch_draws_the_first_that_differs_is_named() -> None:
    class Counts(nn.Module):
        calls = 0

        def forward(self, f: Tensor) -> tuple[dict[str, Tensor], int]:
            self.calls += 1
            return {"scores": f + self.calls}, 3

    answer = random_module_quickly(asked(Gated(Counts())))
    assert (answer.status, answer.value) == ("fail", "module 'gate' (Counts)")
    assert "outside of torch" in answer.sentence


# ------------------------------------------------------------------------------------------------ what is told


def told(model: Callable[[Tensor], Tensor], capsys: pytest.CaptureFixture[str]) -> tuple[rm.records.Evaluation, str]:
    x = pictures()
    y = as_routed(model).eval().run(x).logits.argmax(1)
    (result,) = rm.evaluate(model, x, y, attacks="pgd(linf(0.1), steps=2)")
    return result, capsys.readouterr().err


def test_a_hidden_router_is_told_in_rows_terminal_python_and_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    result, err = told(Experts("picked"), capsys)
    summary = result.summary()
    assert [sentence.partition(" ")[0] for sentence in summary.failed] == ["R18"]
    assert summary.router_attacked is False
    assert isinstance(result.checks.checks[-1], Check)
    assert next(check for check in result.checks.checks if check.id == "R18").status == "fail"
    assert err.count("\n") == 1
    assert "R18 hidden routers: routing that is not declared: argmax of 4" in err
    page = " ".join(str(rm.records.Records([result])).split())
    assert "do NOT quote this number" in page
    assert "router attacked: NO" in page
    assert "rm.wrap(model, " in page


def test_a_warning_is_told_once_and_stands_in_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Softmax(1))
    result, err = told(linear, capsys)
    assert [sentence.partition(" ")[0] for sentence in result.summary().warned] == ["H6"]
    assert result.summary().failed == ()
    assert err.count("H6 outputs: the outputs look like probabilities") == 1
    assert told(linear[:2], capsys)[1] == ""
