"""A model named FILE.py:NAME: what loads, and one line for every way in which it does not."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from robustmoe import user_model
from robustmoe.errors import UserError

EXAMPLE = Path(__file__).parents[1] / "examples" / "my_model.py"

GOOD = """
from torch import nn
import beside

class Net(nn.Linear):
    def __init__(self):
        super().__init__(2, beside.CLASSES)

def make_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, beside.CLASSES), nn.Dropout())

ready = nn.Flatten()

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


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """write(name, text): a file in the working folder, beside.py with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    (tmp_path / "beside.py").write_text("CLASSES = 7\n")

    def put(name: str, text: str = GOOD) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return name

    return put


def test_a_function_is_called_with_its_folder_on_the_path(write: Callable[..., str]) -> None:
    before = list(sys.path)
    model = user_model.load(f"{write('mine.py')}:make_model")
    assert isinstance(model, nn.Module)
    assert not any(module.training for module in model.modules())
    assert model(torch.rand(3, 1, 2, 2)).shape == (3, 7), "beside.py, which stands with it, says seven classes"
    assert sys.path == before


@pytest.mark.parametrize("name, kind", [("ready", nn.Flatten), ("Net", nn.Linear)])
def test_a_module_is_taken_and_a_class_is_built(name: str, kind: type, write: Callable[..., str]) -> None:
    assert isinstance(user_model.load(f"{write('mine.py')}:{name}"), kind)


def test_any_callable_is_a_model(write: Callable[..., str]) -> None:
    assert user_model.load(f"{write('mine.py')}:gives_a_function")(torch.rand(2, 1, 2, 2)).shape == (2, 4)


def test_a_file_is_read_anew(write: Callable[..., str]) -> None:
    write("mine.py", "def make():\n    return lambda x: 1\n")
    assert user_model.load("mine.py:make")(0) == 1  # type: ignore[arg-type]
    write("mine.py", "def make():\n    return lambda x: 23456\n")
    assert user_model.load("mine.py:make")(0) == 23456  # type: ignore[arg-type]


def test_the_example() -> None:
    model = user_model.load(f"{EXAMPLE}:make_model")
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    "text, message",
    [
        ("mine.py", "a model of your own is written FILE.py:NAME, such as my_file.py:make_model; got 'mine.py'"),
        ("mine.py:make-model", "is written FILE.py:NAME"),
        (":make_model", "is written FILE.py:NAME"),
        ("mien.py:make_model", r"there is no file 'mien.py'; did you mean 'mine.py'"),
        ("nowhere/mine.py:make_model", "there is no file 'nowhere/mine.py'$"),
        ("folder:make_model", "'folder' is a folder; expected a Python file"),
        ("weights.pt:make_model", "'weights.pt' is not a Python file"),
        (
            "mine.py:make_modle",
            r"mine.py has no 'make_modle'; did you mean 'make_model' or 'wants_more'\? known: Net, ",
        ),
        ("mine.py:number", "number in mine.py is of type int; expected an nn.Module, or a function without arguments"),
        ("mine.py:gives_nothing", r"gives_nothing\(\) in mine.py gives nothing \(it has no return\); expected a model"),
        (
            "mine.py:gives_numbers",
            r"gives_numbers\(\) in mine.py gives a value of type list; expected a model: a callable",
        ),
        ("mine.py:gives_a_class", r"gives_a_class\(\) in mine.py gives the class Net; expected a model"),
        ("mine.py:fails", r"fails\(\) in mine.py fails: KeyError: 'weights' \(mine.py, line 28\)"),
        ("mine.py:wants_more", r"wants_more\(\) in mine.py fails: TypeError: wants_more\(\) missing 1 required"),
        ("mine.py:leaves", r"leaves\(\) in mine.py fails: SystemExit: usage: train.py DATA \(mine.py, line 34\)"),
        ("syntax.py:make_model", r"syntax.py, line 2: .*: 'return x \+'"),
        ("imports.py:make_model", r"imports.py fails when it is run: ModuleNotFoundError: No module named 'nowhere_x'"),
        ("lines.py:make_model", r"lines.py fails when it is run: ValueError: first \(lines.py, line 1\)$"),
        ("beside_it.py:make_model", r"syntax.py, line 2: "),
    ],
)
def test_mistakes_are_one_line(text: str, message: str, write: Callable[..., str], tmp_path: Path) -> None:
    write("mine.py")
    if not text.startswith("mien"):
        write("syntax.py", "def make_model(x):\n    return x +\n")
        write("imports.py", "import nowhere_x\n")
        write("lines.py", "raise ValueError('first\\nsecond')\n")
        write("beside_it.py", "import syntax\n")
        write("weights.pt", "")
        (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message) as error:
        user_model.load(text)
    assert "\n" not in str(error.value)
    assert not [name for name in sys.modules if re.fullmatch("robustmoe_user_(syntax|imports|lines|beside_it)", name)]
