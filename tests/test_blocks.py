"""Every block of code in README and docs: what can be run runs, the rest names nothing that is not there."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import blocks
from blocks import PAGES, Block, check, commands, counts, run, write

CODE = {name: blocks.blocks(name) for name in PAGES if counts(name)}
PRINTED = {
    "docs/start.md": [r"^pgd\(.*\n.*$", "router_only", "^route_beam", "worst of 4"],
    "docs/wrap.md": [r"^    -> rm\.gate\.triple\(\)$", "worst of 2"],
}
"""What a page's blocks print, where the page does not show it."""
RESULTS = Path(__file__).parents[1] / "docs" / "results"


def page_of(name: str, how: tuple[str, ...]) -> Any:
    return pytest.param(name, how, id=f"{name} {how[-1]}", marks=pytest.mark.notebooks if "slow" in how else [])


def words(text: str) -> list[str]:
    return re.sub(r"[\d.–!]+|-{5,}| {2,}", " ", text).split()


@pytest.mark.parametrize("name", CODE)
def test_what_is_named_is_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(CODE[name])
    for block in CODE[name]:
        try:
            check(block)
        except Exception as error:
            error.add_note(f"in {block}")
            raise


RUNS = [
    page_of(name, ("run", "slow") if how == "slow" else ("run",))
    for name, page in CODE.items()
    for how in ("run", "slow")
    if any(block.how == how and block.kind in ("python", "shell") for block in page)
]


@pytest.mark.parametrize("name, how", RUNS)
def test_the_blocks_of_a_page_run(
    name: str, how: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Line for line what the page shows, but for the numbers: those are of the CPU that its results file names."""
    monkeypatch.chdir(tmp_path)
    write(CODE[name])
    module = types.ModuleType("page")  # dataclasses look up the module that they are of
    monkeypatch.setitem(sys.modules, "page", module)
    printed, since = "", ""
    for block in CODE[name]:
        if block.kind.startswith("output ") and since:
            said = json.loads((RESULTS / f"{block.kind.split()[1]}.json").read_text())["output"]
            assert words(since) == words("\n".join(said))
            since = ""
        elif block.how in how:
            run(block, vars(module))
            since += capsys.readouterr().out
            printed += since
    for pattern in PRINTED.get(name, ()):
        assert re.search(pattern, printed, re.MULTILINE), pattern


def test_most_blocks_are_looked_at_and_reasons_are_given() -> None:
    for page in CODE.values():
        for block in page:
            assert block.how in ("run", "slow") or len(block.how.split()) >= 2, f"{block}: why is it not run?"
    whole = sum((counts(name) for name in CODE if not name.startswith("docs/studies/")), blocks.Counter())
    assert whole["run"] + whole["slow"] >= 20


# ------------------------------------------------------------------------------------------------ the checker itself


def block(kind: str, code: str) -> Block:
    return Block("page.md", 1, kind, code, "run")


@pytest.mark.parametrize(
    "kind, code, said",
    [
        ("python", "import robustmoe as rm\nrm.evaluate_all()", "rm has no evaluate_all"),
        ("python", "from robustmoe.attacks import PGD, Nope", "robustmoe.attacks has no Nope"),
        ("python", "x = (", "never closed"),
        ("shell", "robustmoe evaluat runs/a", "there is no verb evaluat"),
        ("shell", "robustmoe evaluate runs/a --limits 5", "unknown option '--limits'"),
        ("shell", 'robustmoe evaluate runs/a --attack "pdg(linf(0.1))"', "pdg"),
        ("shell", 'robustmoe evaluate runs/a --attack "pgd(linf(0.1), step=3)"', "step"),
        ("shell", "robustmoe train no_recipe --out runs/a", "there is no recipe"),
        ("shell", 'robustmoe train digits_hard_moe --method "at(pgd(linf(0.1)), betta=1)"', "betta"),
        ("shell", "robustmoe dissect RUN [--limit 5] [--atack x]", "unknown option '--atack'"),
        ("shell", "for r in runs/*; do robustmoe certify $r --certifierr x; done", "unknown option"),
        ("shell", "torchrun --nproc-per-node 2 -m robustmoe trian a", "there is no verb trian"),
        ("shell", "pip install 'robustmoe[figurs]'", "there is no extra figurs"),
        ("shell", "python benchmarks/no.py --out x", "there is no benchmarks/no.py"),
        ("toml", "a = ", "Invalid"),
    ],
)
def test_a_mistake_is_seen(kind: str, code: str, said: str) -> None:
    with pytest.raises(Exception, match=re.escape(said)):
        check(block(kind, code))


def test_commands_are_split_as_a_shell_does() -> None:
    code = 'robustmoe evaluate a \\\n  --attack "pgd(linf(0.1), steps=2)"  # it\'s a comment\n'
    code += "for x in a b; do robustmoe report $x; done && make test\n"
    assert commands(code) == [
        ["robustmoe", "evaluate", "a", "--attack", "pgd(linf(0.1), steps=2)"],
        ["robustmoe", "report", "$x"],
        ["make", "test"],
    ]


def test_a_command_that_fails_or_is_another_programs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="analyze runs/none"):
        run(block("shell", "robustmoe analyze runs/none"), {})
    with pytest.raises(AssertionError, match="mark its block"):
        run(block("shell", "pip install x"), {})
