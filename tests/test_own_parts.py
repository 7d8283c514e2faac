"""Parts of a user's own, my_file.py:name in a spec: what they make, where they are recorded, and one line for every
mistake.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import robustmoe as rm
from robustmoe import records, spec
from robustmoe.attacks import PGD, Attack, linf
from robustmoe.cli import main
from robustmoe.data import Data
from robustmoe.errors import UserError
from robustmoe.models import Ensemble, OwnModel, RoutedModel
from robustmoe.spec import offered, own

MODELS = """
from dataclasses import dataclass
from torch import nn
import beside
from robustmoe.models import NetworkSpec

class Net(nn.Linear):
    def __init__(self):
        super().__init__(2, beside.CLASSES)

def make_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, beside.CLASSES), nn.Dropout())

ready = nn.Flatten()

def of_data(num_classes, image_shape, bias=True):
    return nn.Sequential(nn.Flatten(), nn.Linear(image_shape[1] * image_shape[2], num_classes, bias))

@dataclass(frozen=True)
class Described(NetworkSpec):
    depth: int = 1

    def network(self, num_classes, image_shape):
        return of_data(num_classes, image_shape)

def gives_a_function():
    return lambda x: x.flatten(1)

def gives_nothing():
    Net()

def gives_a_class():
    return Net

def gives_numbers():
    return [1, 2]

def fails():
    helper = {}
    return helper["weights"]

def wants_more(path):
    return Net()

def leaves():
    raise SystemExit("usage: train.py DATA")

number = 3
"""

PARTS = """
from dataclasses import dataclass
import torch
from robustmoe.attacks import PGD, Attack, Joint, Objective, Score, Threat, linf
from robustmoe.data import digits
from robustmoe.training import Loss, Method, Phase

@dataclass(frozen=True)
class Shift(Attack):
    threat: Threat
    by: float = 1.0
    objective: Objective = Joint()
    seed: int = 0

    def perturb(self, model, x, y, noise):
        return self.threat.project(x + self.by * self.threat.eps, x)

def weak(eps):
    return PGD(linf(eps), steps=2)

STRONG = PGD(linf(0.1), steps=7)

def squared(beta: float = 1.0):
    def loss(model, x, y, noise):
        logits = model.run(x).logits
        right = torch.nn.functional.one_hot(y, logits.shape[1])
        return Loss(beta * (logits - right).square().mean(), (logits.argmax(1) == y).sum())
    return Method((Phase("all", "", loss),))

def halved():
    return lambda progress: 0.5

def noisy(sigma):
    return lambda x, noise: (x + sigma * noise.normal(*x.shape[1:]).to(x)).clamp(0, 1)

def few():
    return digits(val=0.3)

def raising():
    def loss(model, x, y, noise):
        raise RuntimeError("out of\\nluck")
    return Method((Phase("all", "", loss),))

@dataclass(frozen=True)
class Dark(Objective):
    name = "dark"
    aims_at_router = False

    def __call__(self, model, x, y):
        return lambda x_adv, rows=None: Score(-x_adv.flatten(1).sum(1), torch.zeros(len(x_adv), dtype=torch.bool))
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """write(name, text): a file in the working folder, beside.py with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    (tmp_path / "beside.py").write_text("CLASSES = 7\n")

    def put(name: str, text: str = MODELS) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return name

    return put


def model_of(text: str) -> RoutedModel:
    return rm.build_model(text, 5, (1, 2, 2))


# ------------------------------------------------------------------------------------------------ models


def test_a_function_is_called_with_its_folder_on_the_path(write: Callable[..., str]) -> None:
    before = list(sys.path)
    model = model_of(f"{write('mine.py')}:make_model")
    assert not any(module.training for module in model.modules())
    assert model(torch.rand(3, 1, 2, 2)).shape == (3, 7), "beside.py, which stands with it, says seven classes"
    assert sys.path == before


@pytest.mark.parametrize("name, kind", [("ready", nn.Flatten), ("Net", nn.Linear)])
def test_a_module_is_taken_and_a_class_is_built(name: str, kind: type, write: Callable[..., str]) -> None:
    (inside,) = model_of(f"{write('mine.py')}:{name}").children()
    assert isinstance(inside, kind)


def test_any_callable_is_a_model(write: Callable[..., str]) -> None:
    assert model_of(f"{write('mine.py')}:gives_a_function")(torch.rand(2, 1, 2, 2)).shape == (2, 4)


def test_a_model_is_told_of_the_data_and_seeded(write: Callable[..., str]) -> None:
    text = f"{write('mine.py')}:of_data(bias=False)"
    first, again = (rm.build_model(text, 3, (1, 4, 4), seed=1) for _ in range(2))
    assert [tuple(p.shape) for p in first.parameters()] == [(3, 16)]
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), again.parameters()))
    assert not torch.equal(next(first.parameters()), next(rm.build_model(text, 3, (1, 4, 4), seed=2).parameters()))


@pytest.mark.parametrize("name", ["of_data", "Described(depth=2)"])
def test_a_network_of_a_users_own_is_expert_and_router(name: str, write: Callable[..., str]) -> None:
    text = f"ensemble({write('mine.py')}:{name}, experts=3, router=mine.py:of_data)"
    described = spec.build(text, "model")
    assert isinstance(described, Ensemble)
    assert spec.text(described) == text
    output = rm.build_model(text, 5, (1, 2, 2)).run(torch.rand(4, 1, 2, 2))
    assert (output.logits.shape, output.trace["router"].logits.shape) == ((4, 5), (4, 1, 3))


def test_a_file_is_run_once_for_each_content(write: Callable[..., str]) -> None:
    write("mine.py", "import torch\ndef make():\n    return lambda x: x[:, 0, 0] + 1\n")
    assert model_of("mine.py:make")(torch.zeros(1, 1, 1, 1)) == 1
    first = own.part_of("mine.py:make").thing
    assert own.part_of("./mine.py:make").thing is first
    write("mine.py", "import torch\ndef make():\n    return lambda x: x[:, 0, 0] + 2\n")
    assert model_of("mine.py:make")(torch.zeros(1, 1, 1, 1)) == 2


# ------------------------------------------------------------------------------------------------ every kind


@pytest.mark.parametrize(
    "text, kind, written",
    [
        ("parts.py:Shift(linf(8 / 255),by=2)", "attack", "parts.py:Shift(linf(8/255), by=2)"),
        ("parts.py:weak(0.2)", "attack", "pgd(linf(0.2), steps=2)"),
        ("parts.py:STRONG", "attack", "pgd(linf(0.1), steps=7)"),
        ("./a folder/../parts.py:STRONG", "attack", "pgd(linf(0.1), steps=7)"),
        ("bf16(parts.py:Shift(linf(0.1)))", "attack", "bf16(parts.py:Shift(linf(0.1)))"),
        ("pgd(linf(0.1), objective=parts.py:Dark)", "attack", "pgd(linf(0.1), objective=parts.py:Dark)"),
        ("through(soft, parts.py:weak(0.2))", "attack", "through(soft, pgd(linf(0.2), steps=2))"),
    ],
)
def test_an_attack_is_made_and_written(text: str, kind: str, written: str, write: Callable[..., str]) -> None:
    write("parts.py", PARTS)
    write("a folder/other.py", "")
    made = spec.build(text, kind)
    assert isinstance(made, Attack)
    assert spec.text(made) == written
    assert spec.build(written, kind) == made
    assert spec.canonical(spec.canonical(text)) == spec.canonical(text)
    assert spec.files(text, None) == {"parts.py": hashlib.sha256(PARTS.encode()).hexdigest()}


def test_the_other_kinds(write: Callable[..., str]) -> None:
    write("parts.py", PARTS)
    assert len(spec.build("parts.py:few", "data").val) > len(spec.build("digits", "data").val)
    assert spec.build("parts.py:halved", "schedule")(0.9) == 0.5
    assert callable(spec.build("parts.py:noisy(0.1)", "augment"))
    assert spec.build("parts.py:squared(2)", "method").phases[0].name == "all"
    assert spec.build("at(parts.py:weak(0.2))", "method").attack == PGD(linf(0.2), steps=2)


def test_an_objective_is_climbed(write: Callable[..., str]) -> None:
    write("parts.py", PARTS)
    attack = rm.build_attack("pgd(linf(0.1), steps=10, start=clean, objective=parts.py:Dark)")
    x = torch.full((2, 1, 2, 2), 0.5)
    torch.testing.assert_close(attack(lambda x: x.flatten(1), x, torch.tensor([0, 1])), x - 0.1)


def test_a_path_with_spaces_and_a_string_that_looks_like_one(write: Callable[..., str]) -> None:
    write("my files/parts.py", PARTS)
    assert spec.build("bf16(my files/parts.py:STRONG)", "attack").attack == PGD(linf(0.1), steps=7)
    assert spec.canonical("folder('parts.py:few', size=8)") == "folder('parts.py:few', size=8)"
    assert spec.files("folder('parts.py:few', size=8)") == {}


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "text, message",
    [
        ("mine.py", "'mine.py' is a file; expected a name in it, such as mine.py:name"),
        ("mine:make_model", r"cannot read 'mine:make_model': .*; a part of your own is written my_file.py:name"),
        (":make_model", "cannot read ':make_model'"),
        ("mien.py:make_model", r"there is no file 'mien.py'; did you mean 'mine.py'"),
        ("nowhere/mine.py:make_model", "there is no file 'nowhere/mine.py'; a path is relative to the working folder"),
        ("folder.py:make_model", "'folder.py' is a folder; expected a Python file"),
        (
            "mine.py:make_modle",
            r"mine.py has no 'make_modle'; did you mean 'make_model' or 'wants_more'\? known: Described, Net, ",
        ),
        ("mine.py:number", "mine.py:number gives a value of type int; expected a model: an nn.Module"),
        ("mine.py:number(1)", "mine.py:number is a value of type int, no function or class; write it without arg"),
        ("mine.py:gives_nothing", r"mine.py:gives_nothing gives nothing \(it has no return\); expected a model"),
        ("mine.py:gives_numbers", r"mine.py:gives_numbers gives a value of type list; expected a model: an nn.Module"),
        ("mine.py:gives_a_class", r"mine.py:gives_a_class gives the class Net; expected a model"),
        ("mine.py:fails", r"mine.py:fails fails: KeyError: 'weights' \(mine.py, line 40\)"),
        ("mine.py:wants_more", r"in 'mine.py:wants_more': missing a required argument: 'path'"),
        ("mine.py:make_model(width=3)", r"'mine.py:make_model' has no argument 'width'; it takes none"),
        ("mine.py:leaves", r"mine.py:leaves fails: SystemExit: usage: train.py DATA \(mine.py, line 46\)"),
        ("syntax.py:make_model", r"syntax.py, line 2: .*: 'return x \+'"),
        ("imports.py:make_model", r"imports.py fails when it is run: ModuleNotFoundError: No module named 'nowhere_x'"),
        ("lines.py:make_model", r"lines.py fails when it is run: ValueError: first \(lines.py, line 1\)$"),
        ("beside_it.py:make_model", r"syntax.py, line 2: "),
        (
            "ensemble(mine.py:gives_a_function)",
            "mine.py:gives_a_function gives a value of type function; expected a ne",
        ),
    ],
)
def test_mistakes_are_one_line(text: str, message: str, write: Callable[..., str], tmp_path: Path) -> None:
    write("mine.py")
    if not text.startswith("mien"):
        write("syntax.py", "def make_model(x):\n    return x +\n")
        write("imports.py", "import nowhere_x\n")
        write("lines.py", "raise ValueError('first\\nsecond')\n")
        write("beside_it.py", "import syntax\n")
        (tmp_path / "folder.py").mkdir()
    with pytest.raises(UserError, match=message) as error:
        model_of(text)
    assert "\n" not in str(error.value)
    assert not [name for name in sys.modules if re.match("robustmoe_own_(syntax|imports|lines|beside_it)_", name)]


@pytest.mark.parametrize(
    "kind, text, message",
    [
        (
            "method",
            "parts.py:Shift(linf(0.1))",
            "gives a value of type Shift; expected a method: robustmoe.training.Me",
        ),
        ("attack", "parts.py:squared", "gives a value of type Method; expected an attack: robustmoe.attacks.Attack"),
        ("objective", "parts.py:few", "gives a value of type Data; expected an objective: robustmoe.attacks.Objective"),
        ("data", "parts.py:weak(0.1)", "gives a value of type PGD; expected a data: robustmoe.data.Data"),
        ("certifier", "parts.py:squared", "expected a certifier: robustmoe.certification.Certifier"),
        ("schedule", "parts.py:few", "expected a schedule: a function"),
        ("augment", "parts.py:few", "expected an augment: a function"),
        ("method", "at(parts.py:squared)", r"argument 'attack': expected Attack, got parts.py:squared \(Method\)"),
        ("attack", "parts.py:weak(-1.0)", r"parts.py:weak fails: eps must .* \(parts.py, line 19\)"),
        ("method", "parts.py:squared(beta='a')", "argument 'beta': expected float, got 'a'"),
        ("method", "parts.py:squared(beta=high)", "argument 'beta': unknown name 'high'; expected float$"),
    ],
)
def test_what_kind_was_expected(kind: str, text: str, message: str, write: Callable[..., str]) -> None:
    write("parts.py", PARTS)
    with pytest.raises(UserError, match=message) as error:
        spec.build(text, kind)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ packages


def forget() -> None:
    offered._entries.cache_clear()
    offered.parts_offered.cache_clear()


def offer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: str) -> None:
    """An installed package that offers parts."""
    about = tmp_path / "site" / "my_parts-1.2.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-parts\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text(entries)
    (tmp_path / "site" / "my_parts.py").write_text(PARTS + MODELS.replace("import beside", "class beside: CLASSES = 7"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    forget()


def test_a_package_offers_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries = "[robustmoe.attack]\nshift = my_parts:Shift\npgd = my_parts:weak\nlost = nowhere_x:y\n"
    offer(monkeypatch, tmp_path, f"{entries}[robustmoe.model]\nseven = my_parts:make_model\n")
    try:
        attack = spec.build("shift(linf(0.1), by=0.5)", "attack")
        assert spec.text(attack) == "shift(linf(0.1), by=0.5)"
        assert spec.build("pgd(linf(0.1))", "attack") == PGD(linf(0.1)), "a name of ours stays ours"
        assert isinstance(spec.build("seven", "model"), OwnModel)
        assert model_of("seven")(torch.rand(2, 1, 2, 2)).shape == (2, 7)
        assert spec.packages() == {"my-parts": "1.2"}
        listed = {name: signature for name, signature, _ in spec.describe("attack")}
        assert listed["shift"].startswith("shift(threat: Threat, by=1, ")
        with pytest.raises(UserError, match="'lost' of the package my-parts cannot be loaded: ModuleNotFoundError: No"):
            spec.build("lost", "attack")
    finally:
        forget()


# ------------------------------------------------------------------------------------------------ from recipe to report

RECIPE = """
model = "mine.py:of_data"
data = "parts.py:few"
method = "method.py:squared(beta=2)"
schedule = "parts.py:halved"
augment = "parts.py:noisy(0.05)"
val_attack = "parts.py:Shift(linf(0.05))"
epochs = 1
batch_size = 256
val_limit = 8
attacks = ["parts.py:Shift(linf(0.1))"]
"""


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_run_from_recipe_to_report(write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    write("mine.py"), write("parts.py", PARTS), write("method.py", PARTS), write("own.toml", RECIPE)
    assert main(["train", "own.toml", "--out", "run", "--threads", "1"]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["files"] == {"mine.py": sha(MODELS), "parts.py": sha(PARTS), "method.py": sha(PARTS)}
    assert config["threat"] == "linf(0.05)", "what a later evaluation needs of the method"
    Path("method.py").unlink()  # a run outlives its method
    arguments = ["evaluate", "run", "--limit", "4", "--curve", "none"]
    assert main(arguments) == 0
    (rows,) = records.rows_files("run")
    assert records.read(rows).header.attack == "parts.py:Shift(linf(0.1))"
    assert records.read(rows).header.files == config["files"], "the method's as it was trained with"
    assert main(["report", "run", "--out", "page.html"]) == 0
    assert f"<dt>hash of method.py</dt><dd>{sha(PARTS)}</dd>" in Path("page.html").read_text()
    capsys.readouterr()
    write("parts.py", f"{PARTS}\n")
    assert main(arguments) == 2
    changed = f"SHA-256 {sha(PARTS)[:12]} then, {sha(PARTS + chr(10))[:12]} now"
    assert f"holds other work: another content of parts.py ({changed}); choose" in capsys.readouterr().err
    write("parts.py", PARTS), write("mine.py", f"{MODELS}\n")
    rm.load_model("run")
    assert "run: mine.py has changed since the run was made (SHA-256" in capsys.readouterr().err
    write("mine.py"), write("method.py", f"{PARTS}\n")
    assert main(["train", "own.toml", "--out", "run", "--resume", "--threads", "1"]) == 2
    expected = (
        f"run was trained with method.py of SHA-256 {sha(PARTS)[:12]}, the file is now {sha(PARTS + chr(10))[:12]};"
    )
    assert expected in capsys.readouterr().err


def test_a_loss_that_raises_is_one_line(write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    write("mine.py"), write("parts.py", PARTS), write("own.toml", RECIPE)
    flags = ["--method", "parts.py:raising", "--data", "digits", "--threads", "1", "--val_attack", "none"]
    assert main(["train", "own.toml", "--out", "run", *flags]) == 2
    assert capsys.readouterr().err == "robustmoe: parts.py fails: RuntimeError: out of (parts.py, line 41)\n"
    assert isinstance(spec.build("digits", "data"), Data)


def test_a_bug_of_ours_is_no_users_fault() -> None:
    assert spec.blamed(RuntimeError("x")) is None


def test_an_attack_that_is_no_dataclass_says_so(write: Callable[..., str]) -> None:
    text = PARTS.replace("@dataclass(frozen=True)\n", "") + "\ndef shift():\n    return Shift()\n"
    write("parts.py", text)
    with pytest.raises(UserError, match=r"Shift is no frozen dataclass; .* @dataclass\(frozen=True\)"):
        rm.build_attack("parts.py:shift")
