"""`robustmoe.spec`: texts to objects and back, over toy tables."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from robustmoe import spec
from robustmoe.errors import UserError


@dataclass(frozen=True)
class Ball:
    norm: Literal["linf", "l2"]
    eps: float

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ValueError(f"eps must be 0 or more; got {self.eps}")


@dataclass(frozen=True)
class Climb:
    """Climb a loss.

    More words.
    """

    ball: Ball
    steps: int = 10
    step_size: float | None = None
    loss: Literal["ce", "margin"] = "ce"
    keep: bool = True


@dataclass(frozen=True)
class Several:
    members: tuple[Climb, ...] = ()
    names: list[str] = field(default_factory=list)
    pair: tuple[int, float] = (1, 2.0)
    label: str = "a b"
    anything: Any = None


@dataclass(frozen=True)
class Net:
    depth: int = 18
    width: int = 64


@dataclass(frozen=True)
class Mix:
    inner: Net
    experts: int = 2


def linf(eps: float) -> Ball:
    """A cube."""
    return Ball("linf", eps)


def l2(eps: float) -> Ball:
    return Ball("l2", eps)


def net18(width: int = 64) -> Net:
    return Net(18, width)


def stored(place: str | os.PathLike[str]) -> str:
    return str(place)


def joined(*members: Climb, name: str = "x") -> Several:
    return Several(members, label=name)


def raises(message: str) -> Net:
    raise TypeError(message)


BALLS: dict[str, Callable[..., Any]] = {"linf": linf, "l2": l2, "stored": stored}
CLIMBS: dict[str, Callable[..., Any]] = {"climb": Climb, "several": Several, "joined": joined}
NETS: dict[str, Callable[..., Any]] = {"net": Net, "net18": net18, "mix": Mix, "raises": raises}
ALL = (CLIMBS, BALLS, NETS)


def build(text: str) -> Any:
    return spec.build(text, {**CLIMBS, **BALLS, **NETS})


@pytest.mark.parametrize(
    "text, expected",
    [
        ("linf(8/255)", Ball("linf", 8 / 255)),
        ("linf(eps=2**-3 * (1 + 1) - 0.25 + 1)", Ball("linf", 1.0)),
        ("  climb( linf(1) ,steps = 3,) ", Climb(Ball("linf", 1.0), 3)),
        ("climb(l2(0.5), 7, 1, margin, False)", Climb(Ball("l2", 0.5), 7, 1.0, "margin", False)),
        ("climb(l2(0.5), loss='margin', step_size=None)", Climb(Ball("l2", 0.5), loss="margin")),
        ("net18", Net(18, 64)),
        ("net18()", Net(18, 64)),
        ("mix(net18, experts=4)", Mix(Net(18), 4)),
        ("mix(\n  net(width=8),\n)", Mix(Net(width=8))),
        ("several([climb(linf(1)), climb(l2(2))])", Several((Climb(Ball("linf", 1.0)), Climb(Ball("l2", 2.0))))),
        ("several(names=(a, 'b c'), pair=[3, 4], label=plain)", Several((), ["a", "b c"], (3, 4.0), "plain")),
        ("several(anything=[1, (2, 'x'), -3.5, True])", Several(anything=[1, (2, "x"), -3.5, True])),
        ("joined(climb(linf(1)), name=two)", Several((Climb(Ball("linf", 1.0)),), label="two")),
    ],
)
def test_a_text_builds_its_object(text: str, expected: object) -> None:
    assert build(text) == expected


def test_an_int_given_for_a_float_becomes_one() -> None:
    assert isinstance(build("linf(1)").eps, float)


@pytest.mark.parametrize(
    "obj, expected",
    [
        (Ball("linf", 8 / 255), "linf(8/255)"),
        (Ball("l2", 0.5 / 255), "l2(0.5/255)"),
        (Ball("linf", 51 / 255), "linf(0.2)"),
        (Ball("l2", 12.0), "l2(12)"),
        (Ball("l2", 0.031), "l2(0.031)"),
        (Ball("l2", float("inf")), "l2(1e309)"),
        (Climb(Ball("linf", 4 / 255)), "climb(linf(4/255))"),
        (
            Climb(Ball("l2", 1.0), 50, 2 / 255, "margin", False),
            "climb(l2(1), steps=50, step_size=2/255, loss=margin, keep=False)",
        ),
        (Net(), "net18"),
        (Net(18, 8), "net18(width=8)"),
        (Net(34), "net(depth=34)"),
        (Mix(Net(18, 8), 4), "mix(net18(width=8), experts=4)"),
        (Several(names=["a", "b c", "None"]), "several(names=[a, 'b c', 'None'])"),
        (Several((Climb(Ball("linf", 1.0)),)), "several(members=(climb(linf(1)),))"),
        (Several(anything=(1, "x")), "several(anything=(1, 'x'))"),
        (Several(pair=(3, -0.5), label="it's"), 'several(pair=(3, -0.5), label="it\'s")'),
    ],
)
def test_an_object_writes_its_text_and_back(obj: object, expected: str) -> None:
    assert spec.text(obj, *ALL) == expected
    assert build(expected) == obj
    assert spec.canonical(expected) == expected


def test_what_stands_in_no_table_cannot_be_written() -> None:
    with pytest.raises(UserError, match="a complex cannot be written as a call: no name makes a complex"):
        spec.text(1j, *ALL)
    with pytest.raises(UserError, match=r"a Mix cannot be written .* no name makes a object"):
        spec.text(Mix(object()), *ALL)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="nan"):
        spec.text(Ball("l2", float("nan")), BALLS)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("pgd( linf(8 / 255),steps= 50 , )", "pgd(linf(8/255), steps=50)"),
        ("resnet18", "resnet18"),
        ("resnet18( )", "resnet18"),
        ('a("x y", [1,2 ], (3,), -(1+2)*3, None)', "a('x y', [1, 2], (3,), -(1+2)*3, None)"),
        ("a(5e-4, 1e-10)", "a(0.0005, 1e-10)"),
        (
            "a(-2**2, (-2)**2, 1-(2-3), (1-2)-3, 2**(3**2), (2**3)**2, 2/(3*4), -(-1))",
            "a(-2**2, (-2)**2, 1-(2-3), 1-2-3, 2**3**2, (2**3)**2, 2/(3*4), --1)",
        ),
        ("a(\n b,\n c=d(2 ** -1)\n)", "a(b, c=d(2**-1))"),
    ],
)
def test_canonical_is_one_form_and_stable(text: str, expected: str) -> None:
    assert spec.canonical(text) == expected
    assert spec.canonical(expected) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("clim(linf(1))", r"unknown name 'clim'; did you mean 'climb' or 'linf'\? known: climb, joined,"),
        (
            "climb(linv(1))",
            r"in 'climb\(linv\(1\)\)': argument 'ball': unknown name 'linv'; .*'linf'\? known: l2, linf$",
        ),
        (
            "climb(linf(1), stepz=3)",
            r"'climb' has no argument 'stepz'; did you mean 'steps' or 'step_size'\? known: ball,",
        ),
        ("climb(linf(1), steps=3, steps=4)", "argument 'steps' is given twice"),
        ("climb(linf(1), ball=l2(1))", "multiple values for argument 'ball'; it is climb"),
        ("climb", "in 'climb': missing a required argument: 'ball'"),
        ("climb(linf)", "^in 'linf': missing a required argument: 'eps'"),
        ("linf(1, 2)", r"in 'linf\(1, 2\)': too many positional arguments; it is linf\(eps\)"),
        ("climb(linf(1), steps=2.5)", r"argument 'steps': expected int, got 2.5 \(float\)"),
        ("climb(linf(1), steps=True)", r"argument 'steps': expected int, got True \(bool\)"),
        ("climb(linf(1), step_size='a')", "argument 'step_size': expected float or None, got 'a'"),
        ("climb(linf(1), keep=1)", "argument 'keep': expected bool, got 1"),
        ("climb(net18)", r"argument 'ball': expected Ball, got net18 \(Net\)"),
        ("climb(linf(1), loss='mse')", "argument 'loss': expected one of 'ce', 'margin', got 'mse'"),
        ("climb(linf(1), loss=marginn)", r"unknown name 'marginn'; did you mean 'margin'\? known: ce, margin"),
        ("several(pair=(1, 2, 3))", "argument 'pair': expected 2 values"),
        ("several(members=[linf(1)])", "argument 'members': expected Climb"),
        ("several(members=3)", "argument 'members': expected list of Climb, got 3"),
        ("stored(data)", "argument 'place': unknown name 'data'; write a text in quotes"),
        ("climb(linf(-1))", r"^in 'linf\(-1\)': eps must be 0 or more; got -1.0$"),
        ("raises('two\nlines')", "cannot read"),
        ("raises('words')", r"in \"raises\('words'\)\": words"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_write(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "an empty one"),
        ("8/255", "expected a call .*, got '8/255'"),
        ("climb(linf(1)", r"cannot read 'climb\(linf\(1\)': '\(' was never closed \(character 6, before"),
        ("climb linf", "cannot read 'climb linf': invalid syntax"),
        ("__import__('os')", "unknown name '__import__'"),
        ("climb(__import__('os').system('x'))", r"attribute access \('.system'\) is not allowed"),
        ("climb.__class__", "attribute access"),
        ("climb(linf(1))[0]", "a subscript is not allowed"),
        ("climb(*[1])", r"'\*' is not allowed"),
        ("climb(**a)", r"'\*\*' is not allowed"),
        ("climb([x for x in a])", "ListComp is not allowed"),
        ("climb(lambda: 1)", "a lambda is not allowed"),
        ("climb(f'{x}')", "an f-string is not allowed"),
        ("climb(1 if 2 else 3)", "IfExp is not allowed"),
        ("climb(x := 1)", "NamedExpr is not allowed"),
        ("climb({'a': 1})", "Dict is not allowed"),
        ("climb(b'a')", "the constant b'a' is not allowed"),
        ("climb(1j)", "the constant 1j is not allowed"),
        ("climb(...)", "the constant Ellipsis is not allowed"),
        ("climb()()", "a call of something that is not a name"),
        ("climb(7 // 2)", "the operator FloorDiv is not allowed"),
        ("climb(not 2)", "the operator Not is not allowed"),
        ("climb('a' * 10**9)", "arithmetic on anything but numbers"),
        ("climb(x + 1)", "arithmetic on anything but numbers"),
        ("linf(9**9**9)", r"the exponent of '9\*\*9\*\*9' is too large"),
        ("linf(10**64*10**64)", "too large a whole number"),
        ("linf(1e300**2)", "has no value"),
        ("linf(1/0)", "'1/0' has no value: division by zero"),
        ("linf((-8)**0.5)", "is not a real number"),
        ("linf(" + "9" * 3000 + ")", "too large"),
        ("linf(" + "-" * 200 + "1)", "nested too deeply"),
        ("linf(" * 300 + ")" * 300, "too many nested parentheses|nested too deeply"),
        ("[" * 60 + "]" * 60, "nested too deeply"),
        ("linf(1" + "+1" * 3000 + ")", "too long"),
        ("linf(\x00)", "cannot read"),
    ],
)
def test_a_hostile_or_broken_text_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_canonical_refuses_what_build_refuses() -> None:
    for text in ("a.b", "a(9**9**9)", "a(1/0)", "a(*b)"):
        with pytest.raises(UserError):
            spec.canonical(text)


def test_kinds_are_looked_up_lazily_and_inner_names_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> spec.Table:
        raise AssertionError("this kind was not needed")

    tables: dict[str, Callable[[], spec.Table]] = {"climb": lambda: CLIMBS, "ball": lambda: BALLS, "net": never}
    monkeypatch.setattr(spec, "TABLES", tables)
    assert spec.build("climb(linf(1))", "climb") == Climb(Ball("linf", 1.0))
    with pytest.raises(UserError, match=r"'linf' is of kind 'ball', not 'climb'; .*known: climb, joined, several"):
        spec.build("linf(1)", "climb")
    with pytest.raises(UserError, match=r"unknown kind 'clim'; did you mean 'climb'\?"):
        spec.build("linf(1)", "clim")


def test_a_name_of_two_kinds_means_the_one_that_fits() -> None:
    assert spec.build("mix(same)", {"mix": Mix}, {"same": linf}, {"same": net18}) == Mix(Net())


def test_describe_names_arguments_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "TABLES", {"climb": lambda: CLIMBS, "ball": lambda: BALLS})
    assert spec.describe("ball") == [
        ("l2", "l2(eps: float)", ""),
        ("linf", "linf(eps: float)", "A cube."),
        ("stored", "stored(place: str | PathLike[str])", ""),
    ]
    rows = {name: (signature, line) for name, signature, line in spec.describe("climb")}
    assert rows["climb"] == ("climb(ball: Ball, steps=10, step_size=None, loss=ce, keep=True)", "Climb a loss.")
    assert rows["joined"][0] == "joined(*members: Climb, name=x)"


def test_numbers() -> None:
    assert spec.numbers("0, 2/255,4/255") == (0.0, 2 / 255, 4 / 255)
    assert spec.numbers("8/255") == (8 / 255,)
    with pytest.raises(UserError, match="is not a list of numbers"):
        spec.numbers("0, a")
