"""Mutation testing: of a fixed sample of planted faults, how many do the tests notice? Comparable over commits.

cosmic-ray makes the faults (`pip install -e '.[dev,mutants]' -c constraints.txt`): it is maintained, has operators for
arithmetic, comparisons, conditions, numbers, loops and decorators, and changes the file on disk, so that child
processes and jaxtyping's import hook see the fault too. mutmut 3 puts its own functions in place of ours instead,
which the hook, `inspect.signature` and pickles would see. The rest is here: cosmic-ray runs one command for all faults;
we run, in a fork of one warm process, only tests that execute the changed statement. A function that is imported
already gets its changed code in place; any other change makes the fork import robustmoe anew.

    python benchmarks/mutation.py trace TREE map.jsonl                  which test executes which statement
    python benchmarks/mutation.py sample TREE sample.json               --seed 15 --count 240
    python benchmarks/mutation.py port OLD NEW sample.json new.json     the same faults in another checkout
    python benchmarks/mutation.py run TREE sample.json map.jsonl rows.jsonl --cap 40
    python benchmarks/mutation.py table sample.json new.json before.jsonl after.jsonl --out docs/results/mutation.json

TREE is a checkout of its own: `run` changes its files, one at a time, and puts them back. Files of rows may be several,
with commas between. A run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import collections
import contextlib
import difflib
import functools
import gc
import importlib
import importlib.machinery
import inspect
import io
import json
import keyword
import os
import pkgutil
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "src/robustmoe"
BINARY, COMPARE, UNARY = "ReplaceBinaryOperator_", "ReplaceComparisonOperator_", "ReplaceUnaryOperator_"
OPERATORS = {
    "arithmetic": [
        *(BINARY + pair for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv")),
        *(BINARY + pair for pair in ("Pow_Mul", "BitAnd_BitOr", "BitOr_BitAnd", "LShift_RShift", "RShift_LShift")),
    ],
    "comparison": [
        *(COMPARE + pair for pair in ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_Gt", "LtE_Lt", "LtE_GtE")),
        *(COMPARE + pair for pair in ("Gt_GtE", "Gt_Lt", "GtE_Gt", "GtE_LtE", "Is_IsNot", "IsNot_Is")),
    ],
    "unary": [UNARY + pair for pair in ("USub_UAdd", "Delete_Not", "Delete_Invert")],
    "condition": ["AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"],
    "number": ["NumberReplacer"],
    "flow": ["ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop", "ExceptionReplacer"],
    "decorator": ["RemoveDecorator"],
}
"""Those of cosmic-ray whose faults are not plain nonsense (`+` to `<<`). A place is drawn first, then a fault there."""

WARM = (
    "torch numpy scipy.optimize scipy.stats sklearn.datasets safetensors.torch jaxtyping beartype PIL.Image rich pytest"
)
"""Imported once, before the forks."""

KILLED = ("failed", "timeout", "crash")
"""How the tests of a killed fault end."""

Mutant = dict[str, Any]
"""One fault: package, module, function, line, operator; ``tokens``, those of its logical line, of which those from
``start`` to ``stop`` become ``new``."""

# -------------------------------------------------------------------------------------------- which test executes what


class Trace:
    """Pytest's plugin of `trace`: every statement inside a function says once a test that it was executed.

    A row is a test, or a fixture that lives longer than a test, with its CPU seconds, children's included. Children
    write files of their own, see `follow`. Of the tests of one function, the parameters beyond ``MUTATION_GROUP``
    are not run: they are taken to execute what those do.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.child = -1
        self.outcome: dict[str, str] = {}
        builtins.__executed__ = self.executed  # type: ignore[attr-defined]
        importlib.machinery.SourceFileLoader.source_to_code = code_with_marks  # type: ignore[method-assign]

    def executed(self, statement: str) -> None:
        if statement not in self.seen:
            self.seen.add(statement)
            if self.child >= 0:
                os.write(self.child, f"{statement}\n".encode())

    def follow(self) -> None:
        """This process is a test's child: it writes what it executes at once, since it may be killed."""
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" (", 1)[0]
        name = f"{os.environ['MUTATION_MAP']}.{os.getpid()}.{time.time_ns()}"
        self.child = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(self.child, f"{test}\n".encode())
        self.seen.clear()

    def write(self, row: dict[str, Any]) -> None:
        with open(os.environ["MUTATION_MAP"], "a") as file:
            file.write(json.dumps(row | {"executes": sorted(self.seen)}) + "\n")

    @contextlib.contextmanager
    def row(self, **what: Any) -> Iterator[None]:
        """What is executed inside is one row, and counts nowhere else."""
        around, start = set(self.seen), cpu()
        self.seen.clear()
        self.outcome.clear()
        try:
            yield
        finally:
            self.write(what | {"cpu": round(cpu() - start, 3), "failed": dict(self.outcome)})
            self.seen.clear()
            self.seen.update(around)

    def choose(self, items: list[Any]) -> None:
        groups: dict[str, list[Any]] = collections.defaultdict(list)
        for item in items:
            groups[item.nodeid.split("[")[0]].append(item)
        limit, kept = int(os.environ["MUTATION_GROUP"]), set()
        for name, members in groups.items():
            kept |= {item.nodeid for item in random.Random(name).sample(members, min(limit, len(members)))}
        for item in items:
            if item.nodeid not in kept:
                self.write({"like": item.nodeid, "fixtures": item.fixturenames})
        items[:] = [item for item in items if item.nodeid in kept]


def cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Marks(ast.NodeTransformer):
    """Before every statement inside a function, a call that says that it is executed."""

    def __init__(self, module: str) -> None:
        self.module, self.inside = module, False

    def visit(self, node: ast.AST) -> ast.AST:
        around = self.inside
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.inside = isinstance(node, ast.FunctionDef)
        self.generic_visit(node)
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if self.inside and isinstance(block, list):
                first = 1 if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None else 0
                block[first:] = [part for statement in block[first:] for part in (self.mark(statement), statement)]
        self.inside = around
        return node

    def mark(self, statement: ast.stmt) -> ast.stmt:
        call = ast.parse(f"__executed__({f'{self.module}:{statement.lineno}'!r})").body[0]
        for node in ast.walk(call):
            ast.copy_location(node, statement)
        return call


plain_code = importlib.machinery.SourceFileLoader.source_to_code


def code_with_marks(loader: Any, data: bytes, path: Any, *, _optimize: int = -1) -> Any:
    if not (module := str(path).partition(f"{PACKAGE}/")[2]):
        return plain_code(loader, data, path, _optimize=_optimize)
    return compile(Marks(module).visit(ast.parse(data)), path, "exec", dont_inherit=True, optimize=_optimize)


@functools.cache
def tracer() -> Trace:
    return Trace()


if "MUTATION_MAP" in os.environ and __name__ == "mutation":  # imported as pytest's plugin, or by a test's child
    if os.environ.setdefault("MUTATION_PID", str(os.getpid())) == str(os.getpid()):
        import pytest

        os.register_at_fork(after_in_child=tracer().follow)

        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(items: list[Any]) -> None:
            tracer().choose(items)

        def pytest_runtest_logreport(report: Any) -> None:
            if not report.passed:
                tracer().outcome[report.when] = report.outcome

        @pytest.hookimpl(wrapper=True)
        def pytest_fixture_setup(fixturedef: Any, request: Any) -> Any:
            if fixturedef.scope == "function":
                return (yield)
            with tracer().row(fixture=fixturedef.argname, of=request.node.nodeid):
                return (yield)

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(item: Any) -> Any:
            with tracer().row(test=item.nodeid, fixtures=item.fixturenames):
                return (yield)
    else:
        tracer().follow()


def trace(tree: Path, out: Path, group: int, tests: list[str]) -> int:
    """Runs the suite once, without jaxtyping's hook (the hook shows nothing more, and costs half)."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(
            "import os\nif 'MUTATION_PID' in os.environ:\n    import mutation\n"
        )
        here = Path(__file__).parent.resolve()
        variables = {
            "PYTHONPATH": f"{folder}:{here}:{tree.resolve() / 'src'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPYCACHEPREFIX": folder,
            "MUTATION_MAP": str(out.resolve()),
            "MUTATION_GROUP": str(group),
        }
        flags = ["-q", "-p", "mutation", "-p", "no:cacheprovider", "--jaxtyping-packages=", *tests]
        command = [sys.executable, "-m", "pytest", *flags]
        return subprocess.run(command, cwd=tree, env=os.environ | variables, check=False).returncode


# ------------------------------------------------------------------------------------------------------- the sample


def excluded(node: Any) -> bool:
    """Whether no test can or should notice: annotations, what only type checkers read, texts, messages of errors."""
    child = node
    while (parent := child.parent) is not None:
        if parent.type in ("raise_stmt", "import_from", "import_name", "fstring"):
            return True
        if parent.type == "annassign" and child is parent.children[1]:
            return True
        if parent.type in ("param", "funcdef") and child is parent.annotation:
            return True
        if parent.type == "tfpdef" and child is parent.children[-1]:
            return True
        if parent.type == "if_stmt" and "TYPE_CHECKING" in parent.children[1].get_code():
            return True
        if parent.type == "parameters" and node.type == "operator":
            return True
        child = parent
    return False


def logical_lines(source: str) -> list[list[tokenize.TokenInfo]]:
    """The tokens of each logical line, comments left out."""
    lines: list[list[tokenize.TokenInfo]] = [[]]
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            lines.append([])
        elif token.type not in layout:
            lines[-1].append(token)
    return [line for line in lines if line]


def functions(source: str) -> list[tuple[int, int, str]]:
    """First line (decorators too), last line and qualified name of every function and class."""

    def inside(node: ast.AST, name: str) -> Iterator[tuple[int, int, str]]:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{name}.{child.name}".lstrip(".")
                first = min(child.lineno, *(d.lineno for d in child.decorator_list), child.lineno)
                yield first, child.end_lineno or child.lineno, inner
            yield from inside(child, inner)

    return list(inside(ast.parse(source), ""))


def changed_line(before: str, after: str) -> Mutant | None:
    """The one logical line that differs: its number, its tokens, and which of them become what."""
    old, new = logical_lines(before), logical_lines(after)
    texts = [[token.string for token in line] for line in old], [[token.string for token in line] for line in new]
    at = next((i for i, pair in enumerate(zip(*texts)) if pair[0] != pair[1]), len(texts[1]))
    whole = len(old) - len(new)  # 1 where the line itself went
    if at == len(old) or whole not in (0, 1) or texts[0][at + 1 :] != texts[1][at + 1 - whole :]:
        return None
    line, other = texts[0][at], [] if whole else texts[1][at]
    short = min(len(line), len(other))
    start = next((i for i in range(short) if line[i] != other[i]), short)
    end = next((i for i in range(short - start) if line[-1 - i] != other[-1 - i]), short - start)
    row = {"line": old[at][0].start[0], "tokens": line, "start": start, "stop": len(line) - end}
    return row | {"new": other[start : len(other) - end]}


def sample(tree: Path, out: Path, seed: int, count: int) -> None:
    """Draws ``count`` faults, each package its share by lines of code, at least 8."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    root = tree / PACKAGE
    places: dict[str, dict[tuple[str, str, Any], list[tuple[str, int]]]] = collections.defaultdict(dict)
    size: collections.Counter[str] = collections.Counter()
    for path in sorted(root.rglob("*.py")):
        source, module = path.read_text(), path.relative_to(root).as_posix()
        package = module.split("/")[0] if "/" in module else "(top)"
        size[package] += source.count("\n")
        nodes = list(ast_nodes(get_ast(source)))
        for family, names in OPERATORS.items():
            for name in names:
                operator = get_operator(f"core/{name}")()
                spots = [(node, span[0]) for node in nodes for span in operator.mutation_positions(node)]
                for occurrence, (node, place) in enumerate(spots):
                    if not excluded(node):
                        places[package].setdefault((module, family, place), []).append((name, occurrence))
    draw, mutants = random.Random(seed), []
    for package in sorted(places):
        order, wanted = sorted(places[package]), max(8, round(count * size[package] / size.total()))
        draw.shuffle(order)
        for module, _family, place in order:
            name, occurrence = draw.choice(places[package][module, _family, place])
            source = (root / module).read_text()
            mutated = mutate_code(source, get_operator(f"core/{name}")(), occurrence)
            try:
                same = ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source))
            except SyntaxError:
                continue
            if not same and (change := changed_line(source, mutated)):
                around = [name for first, last, name in functions(source) if first <= place[0] <= last]
                where = {"package": package, "module": module, "function": around[-1] if around else ""}
                mutants.append({"id": len(mutants), **where, "operator": name, **change})
                wanted -= 1
            if not wanted:
                break
    out.write_text(json.dumps({"seed": seed, "mutants": mutants}))


# ------------------------------------------------------------------------------------- the same fault in another tree


@dataclass(frozen=True)
class Line:
    module: str
    function: str
    number: int
    tokens: tuple[str, ...]


def lines_of(root: Path) -> list[Line]:
    lines = []
    for path in sorted(root.rglob("*.py")):
        source, module = path.read_text(), path.relative_to(root).as_posix()
        spans = functions(source)
        for line in logical_lines(source):
            number = line[0].start[0]
            around = [name for first, last, name in spans if first <= number <= last]
            tokens = tuple(token.string for token in line)
            lines.append(Line(module, around[-1] if around else "", number, tokens))
    return lines


def alike(first: collections.Counter[str], second: collections.Counter[str]) -> float:
    """The share of common tokens, of all."""
    return (first & second).total() / max((first | second).total(), 1)


def shape(tokens: tuple[str, ...]) -> list[str]:
    """Names may be other names elsewhere."""
    return ["name" if token.isidentifier() and not keyword.iskeyword(token) else token for token in tokens]


def span_in(mutant: Mutant, other: tuple[str, ...]) -> tuple[int, int] | None:
    """Where the tokens that change, and both their neighbours, stand in another line; None where they do not."""
    mine, start, stop = tuple(mutant["tokens"]), mutant["start"], mutant["stop"]
    blocks = difflib.SequenceMatcher(None, shape(mine), shape(other), autojunk=False).get_matching_blocks()
    at = {block.a + i: block.b + i for block in blocks for i in range(block.size)} | {-1: -1, len(mine): len(other)}
    if not all(i in at for i in range(start - 1, stop + 1)):
        return None
    first, last = at[start - 1] + 1, at[stop]
    return (first, last) if other[first:last] == mine[start:stop] else None


def port(old: Path, new: Path, sample: Path, out: Path) -> None:
    """Finds the line of every fault in another tree, by its tokens and by those of the function around it.

    Prints what is not the same line any more, to be looked at. A fault whose line is gone keeps line 0.
    """
    before, after = lines_of(old / PACKAGE), lines_of(new / PACKAGE)
    groups: dict[tuple[str, str], list[Line]] = collections.defaultdict(list)
    for line in after:
        groups[line.module, line.function].append(line)
    bags = {key: collections.Counter(token for line in group for token in line.tokens) for key, group in groups.items()}
    counts = [collections.Counter(line.tokens) for line in after]
    mutants = json.loads(sample.read_text())
    for mutant in mutants["mutants"]:
        if not mutant["line"]:
            continue
        module, function = mutant["module"], mutant["function"]
        mine = [line for line in before if (line.module, line.function) == (module, function)]
        around = collections.Counter(token for line in mine for token in line.tokens)
        own = collections.Counter(mutant["tokens"])
        place = [line.number for line in mine].index(mutant["line"]) / len(mine)
        scores = []
        same = [pair for pair in zip(after, counts) if pair[0].tokens == tuple(mutant["tokens"])]
        for line, count in same or zip(after, counts):
            if (likeness := alike(own, count)) > 0.3:
                group = groups[line.module, line.function]
                names = (line.function.rpartition(".")[2] == function.rpartition(".")[2]) + (line.module == module)
                score = 0.6 * likeness + 0.4 * alike(around, bags[line.module, line.function]) + 0.1 * names
                scores.append((score - 0.1 * abs(group.index(line) / len(group) - place), line))
        best = sorted(scores, key=lambda scored: -scored[0])[:5]
        score, line, span = next(
            ((s, at, span) for s, at in best if (span := span_in(mutant, at.tokens))), (0.0, None, None)
        )
        text = " ".join(mutant["tokens"])
        if line is None or score < 0.7:
            print("gone ", mutant["id"], module, function, text[:110], *([best[0]] if best else []), sep="\n    ")
            mutant |= {"line": 0}
        else:
            if line.tokens != tuple(mutant["tokens"]):
                print(
                    "other",
                    mutant["id"],
                    f"{score:.2f}",
                    line.module,
                    line.function,
                    text,
                    " ".join(line.tokens),
                    sep="\n    ",
                )
            mutant |= {"module": line.module, "function": line.function, "line": line.number}
            mutant |= {"tokens": line.tokens, "start": span[0], "stop": span[1]}
    out.write_text(json.dumps(mutants))


# ---------------------------------------------------------------------------------------------------------- the run


def mutated(source: str, mutant: Mutant) -> tuple[str, tuple[int, int]]:
    """The source with the fault, and the place (line, column) of the fault."""
    line = next(line for line in logical_lines(source) if line[0].start[0] == mutant["line"])
    start, stop, new = mutant["start"], mutant["stop"], " ".join(mutant["new"])
    assert [token.string for token in line] == list(mutant["tokens"]), (
        f"{mutant['module']}:{mutant['line']} is another line"
    )
    rows = source.splitlines(keepends=True)
    if stop - start == len(line) and not new:
        del rows[line[0].start[0] - 1 : line[-1].end[0]]
        return "".join(rows), line[0].start

    def offset(place: tuple[int, int]) -> int:
        return sum(map(len, rows[: place[0] - 1])) + place[1]

    first = offset(line[start].start)
    last = first if start == stop else offset(line[stop - 1].end)
    return f"{source[:first]} {new} {source[last:]}", line[start].start


class Map:
    """What `trace` wrote: which tests execute a statement, and what they cost.

    ``own`` is a test's own CPU seconds, ``shared`` those of the fixtures that live longer than it.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.root, self.trees = (
            root,
            {p.relative_to(root).as_posix(): ast.parse(p.read_text()) for p in root.rglob("*.py")},
        )
        rows = [json.loads(line) for line in path.open()]
        self.executing: dict[str, set[str]] = collections.defaultdict(set)
        self.own: dict[str, float] = {}
        self.width: dict[str, int] = {}
        self.shared: dict[str, dict[str, float]] = collections.defaultdict(dict)
        executes, fixtures, inside = {}, {}, 0.0
        for row in rows:
            if "fixture" in row:
                inside += row["cpu"]
            elif "test" in row:
                if not row["failed"]:  # nor skipped
                    executes[row["test"]], fixtures[row["test"]] = set(row["executes"]), row["fixtures"]
                    self.own[row["test"]] = max(row["cpu"] - inside, 0.0)
                inside = 0.0
        for child in path.parent.glob(f"{path.name}.*.*"):
            test, *lines = child.read_text().splitlines()
            executes.get(test, set()).update(lines)
        groups = collections.defaultdict(list)
        for test in executes:
            groups[test.split("[")[0]].append(test)
        for row in rows:
            if "like" in row and (like := groups[row["like"].split("[")[0]]):
                executes[row["like"]] = set().union(*(executes[test] for test in like))
                fixtures[row["like"]] = row["fixtures"]
                self.own[row["like"]] = sum(self.own[test] for test in like) / len(like)
        for row in rows:
            for test in executes if "fixture" in row else ():
                if row["fixture"] in fixtures[test] and test.startswith(row["of"]):
                    executes[test].update(row["executes"])
                    self.shared[test][f"{row['fixture']} of {row['of']}"] = row["cpu"]
        for test, statements in executes.items():
            self.width[test] = len(statements)
            for statement in statements:
                self.executing[statement].add(test)

    def tests_of(self, module: str, place: tuple[int, int]) -> set[str]:
        """The tests that execute the statement there.

        Of a decorator or a default: those that execute its function; of what stands in a class or a module: those
        that execute any function of the class, or any that mentions the name.
        """
        path = [self.trees[module]]  # from the module down to the innermost statement there

        def inner(node: ast.AST) -> ast.stmt | None:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    first = min([child.lineno, *(d.lineno for d in getattr(child, "decorator_list", []))])
                    if first <= place[0] <= (child.end_lineno or 0):
                        return child
                elif isinstance(child, ast.ExceptHandler | ast.match_case) and (deeper := inner(child)):
                    return deeper
            return None

        while node := inner(path[-1]):
            path.append(node)
        here = path[-1]
        if isinstance(here, ast.FunctionDef):
            return self.executed(module, here.body)
        holder = next((node for node in reversed(path) if isinstance(node, ast.FunctionDef | ast.ClassDef)), None)
        if isinstance(holder, ast.FunctionDef):
            return self.executed(module, [here])
        if holder is not None:
            inside = [node for node in ast.walk(holder) if isinstance(node, ast.FunctionDef)]
            return self.executed(module, [s for node in inside for s in node.body]) | self.mentioning({holder.name})
        stored = (node for node in ast.walk(here) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
        return self.mentioning({node.id for node in stored})

    def executed(self, module: str, statements: list[ast.stmt]) -> set[str]:
        return set().union(*(self.executing.get(f"{module}:{each.lineno}", set()) for each in statements))

    def mentioning(self, names: set[str]) -> set[str]:
        tests = set()
        for module, tree in self.trees.items():
            for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
                used = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(function)}
                if used & names:
                    tests |= self.executed(module, function.body)
        return tests

    def chosen(self, tests: set[str], cap: float, first: str) -> tuple[list[str], list[str], float]:
        """Two lists of tests and their CPU seconds, ``cap`` at most.

        First the ones that execute least besides, of three files; then the others, cheapest first.
        """
        paid: set[str] = set()

        def price(test: str) -> float:
            return self.own[test] + sum(cost for name, cost in self.shared[test].items() if name not in paid)

        spent, begin, rest = 0.0, [], []
        files: collections.Counter[str] = collections.Counter()
        near = sorted(tests, key=lambda test: (test != first, self.width[test] + 2000 * price(test), test))
        for test in near:
            file = test.split("::")[0]
            if test == first or (price(test) < 3 and files[file] < 8 and (file in files or len(files) < 3)):
                begin.append(test)
                files[file] += 1
                spent += price(test)
                paid.update(self.shared[test])
        for test in sorted(tests - set(begin), key=lambda test: (price(test), test)):
            if spent + price(test) <= cap:
                rest.append(test)
                spent += price(test)
                paid.update(self.shared[test])
        rest.sort(key=lambda test: (bool(self.shared[test]), test.split("::")[0] if self.shared[test] else ""))
        return begin, rest, spent


def our_functions() -> dict[tuple[str, str, int], list[Any]]:
    """Every function of robustmoe, imported here, by its file, name and line."""
    robustmoe = importlib.import_module("robustmoe")
    for module in pkgutil.walk_packages(robustmoe.__path__, "robustmoe."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    functions = collections.defaultdict(list)
    for thing in gc.get_objects():
        if type(thing) is types.FunctionType and PACKAGE in thing.__code__.co_filename:
            code = thing.__code__
            functions[code.co_filename, code.co_qualname, code.co_firstlineno].append(thing)
    return functions


def put_in(old: types.CodeType, new: types.CodeType, functions: dict[tuple[str, str, int], list[Any]]) -> bool:
    """Gives functions that are imported their changed code; False where more than the inside of functions changed."""
    inner = [[const for const in code.co_consts if isinstance(const, types.CodeType)] for code in (old, new)]
    plain = [[const for const in code.co_consts if not isinstance(const, types.CodeType)] for code in (old, new)]
    if (
        old.co_code != new.co_code
        or plain[0] != plain[1]
        or old.co_names != new.co_names
        or len(inner[0]) != len(inner[1])
    ):
        return False
    for before, after in zip(*inner):
        if before != after and before.co_flags & inspect.CO_OPTIMIZED:
            holders = functions.get((before.co_filename, before.co_qualname, before.co_firstlineno), [])
            if not holders or before.co_freevars != after.co_freevars:
                return False
            for holder in holders:
                holder.__code__ = after
        elif before != after and not put_in(before, after, functions):
            return False
    return True


def run_tests(
    tree: Path, tests: list[str], limit: float, more: list[str], prepare: Callable[[], None]
) -> tuple[str, str, float]:
    """How the tests end in a fork of this process ("passed", "failed", "timeout" or "crash"), which, CPU seconds."""
    rank = {test: place for place, test in enumerate(tests)}
    with tempfile.TemporaryDirectory() as folder:
        note, start, wall = Path(folder, "failed"), cpu(), time.time()
        if (child := os.fork()) == 0:
            code = 70
            try:
                os.setsid()
                resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
                output = os.open(Path(folder, "output"), os.O_WRONLY | os.O_CREAT)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.chdir(tree)
                prepare()

                class Plugin:
                    @staticmethod
                    def pytest_collection_modifyitems(items: list[Any]) -> None:
                        items.sort(key=lambda item: rank.get(item.nodeid, -1))

                    @staticmethod
                    def pytest_runtest_logreport(report: Any) -> None:
                        if report.failed and not note.exists():
                            note.write_text(report.nodeid)

                    @staticmethod
                    def pytest_collectreport(report: Any) -> None:
                        if report.failed and not note.exists():
                            note.write_text(f"collecting {report.nodeid}")

                import pytest

                flags = [
                    "-x",
                    "-q",
                    "-p",
                    "no:cacheprovider",
                    "-m",
                    "",
                    "-W",
                    "ignore::pytest.PytestAssertRewriteWarning",
                ]
                flags += ["--basetemp", f"{folder}/tests", *more]
                code = int(pytest.main([*flags, *tests], plugins=[Plugin()]))
            finally:
                os._exit(code)
        status = None
        while status is None and time.time() < wall + max(240, 12 * limit):
            done, ended = os.waitpid(child, os.WNOHANG)
            status = ended if done else None
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the tests left behind, too
        if status is None:
            os.waitpid(child, 0)
        spent, who = cpu() - start, note.read_text() if note.exists() else ""
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        return "timeout", who, spent
    if os.WIFSIGNALED(status):
        return "crash", who, spent
    return "passed" if os.WEXITSTATUS(status) == 0 else "failed", who, spent


def run(
    tree: Path, sample: Path, trace_file: Path, out: Path, cap: float, first: str, only: str, alive: str, typed: bool
) -> None:
    tree = tree.resolve()
    root = tree / PACKAGE
    tests_of = Map(trace_file, root)
    done = {row["id"] for row in rows_of(str(out))} if out.exists() else set()
    killers = {row["id"]: row["by"] for row in rows_of(first)} if first else {}
    if alive:
        done |= {row["id"] for row in rows_of(alive) if row["outcome"] in KILLED}
    wanted = {int(number) for number in only.split(",") if number}
    sys.dont_write_bytecode = True  # caches in the tree are of the right source: times of the changed file are its own
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(root.parent)}
    sys.path.insert(0, str(root.parent))
    for module in WARM.split():
        importlib.import_module(module)
    sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the file is put back
    imported = {} if typed else our_functions()
    gc.freeze()  # else every fork's first collection copies the memory of torch
    for mutant in json.loads(sample.read_text())["mutants"]:
        if not mutant["line"] or mutant["id"] in done or (wanted and mutant["id"] not in wanted):
            continue
        path = root / mutant["module"]
        source, times = path.read_bytes(), path.stat()
        text, place = mutated(source.decode(), mutant)
        tests = tests_of.tests_of(mutant["module"], place)
        begin, rest, price = tests_of.chosen(tests, cap, killers.get(mutant["id"], ""))
        row = {"id": mutant["id"], "outcome": "not executed", "by": "", "cpu": 0.0}

        def prepare(path: Path = path, source: bytes = source, text: str = text) -> None:
            codes = [compile(version, str(path), "exec", dont_inherit=True) for version in (source, text)]
            if not put_in(codes[0], codes[1], imported):
                for name in [name for name in sys.modules if name.partition(".")[0] == "robustmoe"]:
                    del sys.modules[name]

        row |= {"executing": len(tests), "run": len(begin) + len(rest)}
        try:
            path.write_text(text)
            os.utime(path, (time.time() + 1e5 + mutant["id"],) * 2)
            for part in filter(None, (begin, rest)):
                more = [] if typed else ["--jaxtyping-packages="]
                row["outcome"], row["by"], spent = run_tests(tree, part, 2 * price + 25, more, prepare)
                row["cpu"] = round(row["cpu"] + spent, 2)
                if row["outcome"] != "passed":
                    break
        finally:
            path.write_bytes(source)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row["id"], mutant["module"], mutant["function"], row["outcome"], row["by"], row["cpu"], flush=True)


def rows_of(files: str) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files.split(",") for line in Path(file).open()]


# --------------------------------------------------------------------------------------------------------- the table


def ends(files: str) -> dict[int, dict[str, Any]]:
    """How each fault ended: killed where any of its rows says so, else its last row."""
    last: dict[int, dict[str, Any]] = {}
    for row in rows_of(files):
        if last.get(row["id"], {}).get("outcome") not in KILLED:
            last[row["id"]] = row
    return last


def table(sample: Path, ported: Path, before: str, after: str, out: str, commits: list[str], how: str) -> None:
    """Prints the counts by package; writes them, and each fault with how it ended, where ``out`` says."""
    drawn, moved = (json.loads(path.read_text()) for path in (sample, ported))
    old, new = ends(before), ends(after)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for mutant, there in zip(drawn["mutants"], moved["mutants"]):
        mutant["before"] = old.get(mutant["id"], {"outcome": "not run"})
        mutant["after"] = new.get(mutant["id"], {"outcome": "not run"}) if there["line"] else {"outcome": "gone"}
        mutant["after"] |= {key: there[key] for key in ("module", "function", "line", "why") if key in there}
        killed = [mutant[time]["outcome"] in KILLED for time in ("before", "after")]
        for package in (mutant["package"], "all"):
            counts[package]["sampled"] += 1
            counts[package]["killed before"] += killed[0]
            counts[package]["gone since"] += not there["line"]
            counts[package]["killed before, not gone"] += killed[0] and there["line"] > 0
            counts[package]["killed after"] += killed[1]
            counts[package]["lost"] += killed[0] and there["line"] > 0 and not killed[1]
            counts[package]["won"] += killed[1] and not killed[0]
        if killed[0] and there["line"] and not killed[1]:
            print("lost", mutant["id"], there["module"], there["function"], "was killed by", mutant["before"]["by"])
    columns = list(counts["all"])
    print("| package |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for package, row in sorted(counts.items(), key=lambda pair: pair[0] == "all"):
        print("|", package, "|", " | ".join(str(row[column]) for column in columns), "|")
    if out:
        import results

        about = results.described(
            "python benchmarks/mutation.py table", seeds=[drawn["seed"]], commits=commits, how=how
        )
        results.write(Path(out), about, counts, mutants=drawn["mutants"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    files = {
        "trace": "tree out",
        "sample": "tree out",
        "port": "old new sample out",
        "run": "tree sample trace_file out",
        "table": "sample ported",
    }
    parts = {name: verbs.add_parser(name) for name in files}
    for name, positional in files.items():
        for argument in positional.split():
            parts[name].add_argument(argument, type=Path)
    parts["trace"].add_argument(
        "--group", type=int, default=3, help="tests run of each function, of all its parameters"
    )
    parts["trace"].add_argument("--tests", nargs="*", default=[], help="files of tests; default: all")
    parts["sample"].add_argument("--seed", type=int, default=15)
    parts["sample"].add_argument("--count", type=int, default=240)
    parts["run"].add_argument("--cap", type=float, default=40.0, help="CPU seconds of tests for each fault")
    parts["run"].add_argument("--first", default="", help="rows whose killing test is run first")
    parts["run"].add_argument("--alive", default="", help="rows: what was killed there is not run again")
    parts["run"].add_argument("--only", default="", help="numbers of faults, with commas between")
    parts["run"].add_argument(
        "--typed", action="store_true", help="with jaxtyping's hook, slower: for what lives without"
    )
    parts["table"].add_argument("before")
    parts["table"].add_argument("after")
    parts["table"].add_argument("--out", default="", help="a results file to write")
    parts["table"].add_argument("--how", default="", help="for the results file: which tests were run")
    parts["table"].add_argument("--commits", nargs=2, default=[], help="for the results file: of before and after")
    given = vars(parser.parse_args())
    verb = given.pop("verb")
    return {"trace": trace, "sample": sample, "port": port, "run": run, "table": table}[verb](**given) or 0


if __name__ == "__main__":
    sys.exit(main())
