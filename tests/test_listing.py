"""`robustmoe list`: every name, every argument with its meaning, an example that is taken, all within 80 columns."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest

from robustmoe import recipe, spec
from robustmoe.cli import main
from robustmoe.spec import index
from robustmoe.spec.hints import signature_of
from robustmoe.spec.meanings import cited, first_sentence, meaning, sentences
from robustmoe.spec.own import OwnPart
from robustmoe.spec.pages import EXAMPLES, call_of, takes_of

EVERY = [
    (kind, name, entry.thing if isinstance(entry, OwnPart) else entry)
    for kind, load in spec.TABLES.items()
    for name, entry in sorted(load().items())
]


def test_every_argument_of_every_name_has_its_meaning() -> None:
    silent = [
        f"{kind} {name}: {argument}"
        for kind, name, thing in EVERY
        for argument in signature_of(thing).parameters
        if not meaning(kind, thing, argument)
    ]
    assert len(EVERY) > 100
    assert silent == [], "say it in the docstring, behind ``name``:"


def test_every_name_begins_with_a_whole_sentence() -> None:
    for kind, name, thing in EVERY:
        line = first_sentence(inspect.getdoc(thing) or "")
        assert line.endswith((".", ".)")), f"{kind} {name}: {line!r}"
        assert line.count("(") == line.count(")"), f"{kind} {name} is cut: {line!r}"


@pytest.mark.parametrize("kind", spec.TABLES)
def test_lists_and_pages_fit_80_columns(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind]) == 0
    names = [name for other, name, _ in EVERY if other == kind]
    text = "\n".join([capsys.readouterr().out, *(spec.explain(kind, name) for name in names)])
    wide = [line for line in text.splitlines() if len(line) > 80]
    assert wide == []
    assert "``" not in text


def test_the_index_is_what_the_tables_say() -> None:
    assert index.FILE.read_text(encoding="utf-8") == index.written(), "python -m robustmoe.spec.index writes it anew"


def test_a_list_needs_no_torch() -> None:
    code = "import sys; from robustmoe.cli import main; [main(['list', kind]) for kind in sys.argv[1:]]"
    code += "; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, *spec.TABLES], stdout=subprocess.DEVNULL).returncode == 0


def test_what_installed_packages_offer_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    described = spec.describe("schedule")
    assert index.entries("schedule") == described
    monkeypatch.setattr(index, "packages", lambda kinds: {"package": "1.0"} if kinds == ["schedule"] else {})
    monkeypatch.setattr(spec, "describe", lambda kind: [*described, ("offered", "offered", "One.")])
    assert index.entries("schedule")[-1] == ("offered", "offered", "One.")


@pytest.mark.parametrize("beside", ["", "recipes", "zoo", "layouts"])
def test_the_other_lists_fit_80_columns(beside: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", *beside.split()]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_every_example_is_taken() -> None:
    """But for those of the user's own folders and files, and data sets, which would be loaded."""
    assert EXAMPLES.keys() == spec.TABLES.keys()
    trained = {words[2] for words in map(str.split, EXAMPLES.values()) if words[:2] == ["robustmoe", "train"]}
    assert trained <= {file.stem for file in recipe.every()}
    for kind, name, thing in EVERY:
        call = call_of(name, thing)
        if kind != "data" and "path/to" not in call and "runs/" not in call and "my_file" not in call:
            spec.build(call, kind)
        assert f'{call}"' in " ".join(spec.explain(kind, name).replace("\\\n", "").split()) or kind in (
            "objective",
            "view",
        )


def test_papers_stand_in_the_docstrings() -> None:
    papers = {name: cited(thing) for kind, name, thing in EVERY if kind in ("attack", "method", "model")}
    assert papers["pgd"][0] == "Madry et al. 2018"
    assert papers["trades"] == ["Zhang et al. 2019"]
    assert "Croce and Hein 2020" in papers["autoattack"]
    assert papers["wide_resnet"][0] == "Zagoruyko and Komodakis 2016"
    assert papers["mart"] == ["Wang et al., ICLR 2020"]


def test_a_docstring_is_read_argument_by_argument() -> None:
    @dataclass
    class Thing:
        """Does it (Some et al. 2018) with ``steps``. Then stops.

        ``keep``: "last", the last; more of it. ``a``, ``b``: two numbers. Where ``steps`` is 0, nothing.
        """

        steps: int
        keep: Literal["last", "first"]
        a: float
        b: float | None
        seed: int = 0
        silent: int = 0

    said: Callable[[str], str] = lambda name: meaning("attack", Thing, name)  # noqa: E731
    Thing.__module__ = "robustmoe.thing"
    assert first_sentence(Thing.__doc__ or "") == "Does it (Some et al. 2018) with ``steps``."
    assert said("keep") == '"last", the last; more of it.'
    assert said("b") == "``a``, ``b``: two numbers. Where ``steps`` is 0, nothing."
    assert said("seed") == "decides every random draw."
    assert said("silent") == ""
    assert [takes_of(p.annotation) for p in signature_of(Thing).parameters.values()][:4] == [
        "a whole number", "last or first", "a number", "a number or None",
    ]  # fmt: skip


def test_sentences_end_where_they_end() -> None:
    text = 'As of V. Someone et al. 2020, eps = 0.5 is "small". (Not here.) It is 3.5 of `x`. `Y` too'
    assert sentences(text) == [
        'As of V. Someone et al. 2020, eps = 0.5 is "small".',
        "(Not here.)",
        "It is 3.5 of `x`.",
        "`Y` too",
    ]


def test_a_name_of_two_kinds_has_two_pages(capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for _, name, _ in EVERY]
    twice = sorted({name for name in names if names.count(name) > 1})
    for name in twice:
        assert main(["list", name]) == 0
        said = capsys.readouterr().out
        assert len(re.findall(rf"(?m)^{name}: an? ", said)) == names.count(name)
