"""The code of README and docs as tests see it: ``python -m tests.blocks`` counts what is run.

Python blocks of a page run in order, in one namespace, in an empty folder; one whose first line is ``# my_file.py`` (or
``.toml``) is written there under that name. A block that begins with a command (`COMMANDS`) is a shell block; its
robustmoe commands run in this process. What stands before a block, at the end of a line or on one of its own, says
otherwise::

    <!-- not run: needs CIFAR-10 -->   its names, flags and specs are checked, and it does not run
    <!-- slow -->                      it runs in `make notebooks`

``<!-- setup`` begins a comment of several lines: Python that runs in its place, for what a page takes as given. A block
of output behind ``<!-- output: NAME -->`` (see `pages`) is what the blocks before it printed, but for the numbers.
"""

from __future__ import annotations

import ast
import builtins
import functools
import glob
import importlib
import re
import shlex
import shutil
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import robustmoe as rm
from robustmoe import recipe, spec
from robustmoe.cli import main
from robustmoe.flags import parse
from robustmoe.verbs import VERBS

ROOT = Path(__file__).parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page
    for page in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs/studies").glob("*.md")),
    )
}
COMMANDS = ("robustmoe", "make", "pip", "python", "python3", "torchrun", "for", "pdflatex", "OMP_NUM_THREADS=1")
LINES_OF_README = "a line each of many commands; the page that it leads to runs them"

_BLOCK = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->|^```(?P<kind>\w*)\n(?P<fenced>.*?)^```$|"
    r"(?:(?<=\n\n)(?P<indented>(?:    [^\n]*\n)+))",
    re.MULTILINE | re.DOTALL,
)
_MARK = re.compile(r"<!-- (?:(slow)|not run: ([^>]+)) -->\s*\Z")
STAND_FOR = {"N": "1", "METHOD": "standard", "MODEL": "linear"}
_OUTPUT = re.compile(r"<!-- output: (\S+) -->\s*\Z")
_PLACE = re.compile(r"\b(RUN|RECIPE|DIR)\b")
_KINDS = {"attack": "attack", "attacks": "attack", "certifier": "certifier", "certifiers": "certifier",
          "method": "method", "threat": "threat", "model": "model", "optimizer": "optimizer"}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A block of a page. ``kind``: setup, python, shell, toml, text, or "output" and the name of its file. ``how``:
    run, slow, or why it is not run."""

    page: str
    line: int
    kind: str
    code: str
    how: str

    @property
    def runs(self) -> bool:
        return self.how in ("run", "slow")

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(name: str) -> list[Block]:
    """The blocks of a page, in order."""
    text = PAGES[name].read_text(encoding="utf-8")
    made: list[Block] = []
    for match in _BLOCK.finditer(text):
        code = match["setup"] or match["fenced"] or match["indented"] or ""
        kind = "setup" if match["setup"] else match["kind"] or _kind_of(code)
        mark = _MARK.search(text[: match.start()])
        how = "run" if mark is None else mark[2] or "slow"
        output = _OUTPUT.search(text[: match.start()])
        kind = f"output {output[1]}" if output else kind
        if kind == "shell" and _PLACE.search(code):
            how = "RUN stands for a run folder"
        if kind == "shell" and name.startswith("docs/studies/"):
            how = "a study's commands take hours"
        if kind == "shell" and name == "README.md":
            how = LINES_OF_README
        made.append(Block(name, text[: match.start()].count("\n") + 2, kind, code, how))
    return made


def _kind_of(code: str) -> str:
    words = code.split()
    return "shell" if words and words[0] in COMMANDS else "text"


# ------------------------------------------------------------------------------------------------ what is not run


def check(block: Block) -> None:
    """What can be seen of a block without running it: names, flags and specs."""
    if block.kind in ("python", "setup"):
        check_python(block.code)
    elif block.kind == "shell":
        for command in commands(block.code):
            _check_command(command)
    elif block.kind == "toml":
        tomllib.loads(block.code)


def write(page: list[Block]) -> None:
    """Write the files that a page shows into the working folder, and the examples that a clone has."""
    shutil.copytree(ROOT / "examples", "examples")
    for block in page:
        if named := re.match(r"# (\w+\.(?:py|toml))\n", block.code):
            Path(named[1]).write_text(block.code, encoding="utf-8")


def check_python(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("robustmoe"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rm":
            assert hasattr(rm, node.attr), f"rm has no {node.attr}"


def commands(code: str) -> list[list[str]]:
    """The words of each command of a shell block: comments gone, loops once with their variable in place."""
    code = re.sub(r"(?<=\s)\[(-[^\]]*|RUN [.]{3})\]", lambda match: match[1].replace("RUN ...", "RUN"), code)
    made: list[list[str]] = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        made.append([])
        for word in lexer:
            if set(word) <= set(";&|"):
                made.append([])
            elif word not in ("do", "done"):
                made[-1].append(word)
    return [command for command in made if command and command[0] != "for"]


def _check_command(words: list[str]) -> None:
    while "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]
    if "robustmoe" in words[:6]:
        _check_verb(words[words.index("robustmoe") + 1 :])
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:] if "=" not in target)
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in (
            extra for word in words for group in re.findall(r"\[(.*?)\]", word) for extra in group.split(",")
        ):
            assert extra in extras, f"there is no extra {extra}"
    elif words[0].startswith("python") and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"


def _check_verb(words: list[str]) -> None:
    verb, *argv = words
    if verb.startswith("-"):
        return
    assert verb in VERBS, f"there is no verb {verb}"
    given = parse(verb, VERBS[verb], [STAND_FOR.get(word, word).replace("$seed", "0") for word in argv])
    fields = dict(given.get("fields", {}))
    if verb == "train" and not given["recipe"].isupper() and not given["recipe"].startswith("my_"):
        recipe.load_recipe(ROOT / given["recipe"] if "/" in given["recipe"] else given["recipe"], **fields)
    options = vars(given["options"]) if "options" in given else {}
    for name, value in {**given, **options, **fields}.items():
        for text in value if isinstance(value, tuple) else (value,):
            if name in _KINDS and isinstance(text, str) and not text.isupper():
                _check_spec(text, _KINDS[name], verb)


def _check_spec(text: str, kind: str, verb: str) -> None:
    """Own files may be missing, run folders stand for models, and a certifier's name may be "none"."""
    if kind == "model" and verb == "audit" and ":" not in text:
        return
    if all(Path(name.rpartition(":")[0]).is_file() for name in spec.own_names(text)):
        spec.build(text, kind)


# ----------------------------------------------------------------------------------------------------- running


def run(block: Block, names: dict[str, Any]) -> None:
    """Run a block in the working folder, with the names that the blocks before it made."""
    if block.kind in ("python", "setup"):
        exec(compile(block.code, str(block), "exec"), names)
    elif block.kind == "shell":
        for line in _lines(block.code):
            for words in commands(line):
                argv = _argv(words)
                assert main(argv) == 0, f"{block}: {shlex.join(words)}"


def _lines(code: str) -> list[str]:
    """The lines of a shell block, loops written out."""
    lines: list[str] = []
    for line in code.replace("\\\n", " ").splitlines():
        loop = re.fullmatch(r"for (\w+) in (.*?); do (.*); done", line.strip())
        if loop is None:
            lines.append(line)
        else:
            places = [place for pattern in loop[2].split() for place in _matches(pattern)]
            lines += [loop[3].replace(f"${loop[1]}", place) for place in places]
    return lines


def _matches(word: str) -> list[str]:
    return sorted(glob.glob(word)) or [word] if any(mark in word for mark in "*?") else [word]


def _argv(words: list[str]) -> list[str]:
    """The arguments of a robustmoe command, as a shell gives them."""
    assert words[0] == "robustmoe", f"{words[0]} is no command that tests run; mark its block <!-- not run: why -->"
    return [place for word in words[1:] for place in (_matches(word) if "(" not in word else [word])]


@functools.cache
def counts(name: str) -> Counter[str]:
    """How many blocks of code a page has, by what is done with them."""
    code = [block for block in blocks(name) if block.kind in ("python", "shell", "toml")]
    return Counter(block.how if block.runs else "checked" for block in code)


def table() -> str:
    """Every page with code, and how many of its blocks run."""
    rows = [f"{'page':34} run  slow  checked  all"]
    whole: Counter[str] = Counter()
    for name in PAGES:
        if count := counts(name):
            whole += count
            rows.append(f"{name:34} {count['run']:3}  {count['slow']:4}  {count['checked']:7}  {count.total():3}")
    rows.append(f"{'all':34} {whole['run']:3}  {whole['slow']:4}  {whole['checked']:7}  {whole.total():3}")
    return "\n".join(rows)


if __name__ == "__main__":
    builtins.print(table(), file=sys.stdout)
