"""Text to tree, of allowed constructs only; the numbers in a tree; and the tree's one normal form."""

from __future__ import annotations

import ast
import math
import operator
import posixpath
import re
import warnings
from collections.abc import Callable
from typing import Any

from robustmoe.errors import UserError
from robustmoe.spec.hints import SCALARS

_MAX_TEXT, _MAX_DEPTH, _MAX_EXPONENT, _MAX_NUMBER = 4000, 50, 64, 10**100
_OPERATORS: dict[type[ast.operator], tuple[Callable[[Any, Any], Any], str, int]] = {
    ast.Add: (operator.add, "+", 1),
    ast.Sub: (operator.sub, "-", 1),
    ast.Mult: (operator.mul, "*", 2),
    ast.Div: (operator.truediv, "/", 2),
    ast.Pow: (operator.pow, "**", 4),
}
"""Value, sign and binding strength; a minus in front binds with strength 3, a number with 5."""


def numbers(text: str) -> tuple[float, ...]:
    """Returns the numbers of a list such as ``0, 2/255, 4/255``."""
    node = tree_of(text)
    items = node.elts if isinstance(node, ast.Tuple | ast.List) else [node]
    if not all(_is_arithmetic(item) for item in items):
        raise UserError(f"{short(text)!r} is not a list of numbers, such as '0, 2/255, 4/255'")
    values = tuple(float(number(item)) for item in items)
    if not all(map(math.isfinite, values)):
        raise UserError(f"{short(text)!r} holds a number that is not finite")
    return values


def canonical(text: str) -> str:
    """Returns the normal form of ``text``: one spacing, ``resnet18()`` as ``resnet18``, ``8/255`` as written. No
    look-up.
    """
    return render(tree_of(text))


def short(text: str, width: int = 100) -> str:
    """``text`` on one line and cut to ``width``, for a message."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def tree_of(text: str) -> ast.expr:
    """Returns the tree of ``text``, made of allowed constructs only."""
    if not isinstance(text, str):
        raise UserError(f"expected a text such as 'name(argument, key=value)', got {type(text).__name__}")
    text = text.strip()
    if not text:
        raise UserError("expected a text such as 'name(argument, key=value)', got an empty one")
    if len(text) > _MAX_TEXT:
        raise UserError(f"{short(text)!r} is too long: {len(text)} characters, at most {_MAX_TEXT}")
    if text.endswith(".py"):
        raise UserError(f"{short(text)!r} is a file; expected a name in it, such as {short(text)}:name")
    plain, files = _without_files(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(plain, mode="eval").body
    except SyntaxError as e:
        lines = text.splitlines()
        place = sum(len(line) + 1 for line in lines[: (e.lineno or 1) - 1]) + max((e.offset or 1) - 1, 0)
        near = f"before {short(text[place:], 20)!r}" if place < len(text) else "the end"
        hint = "; a part of your own is written my_file.py:name" if text[place : place + 1] == ":" else ""
        raise UserError(f"cannot read {short(text)!r}: {e.msg} (character {place + 1}, {near}){hint}") from None
    except (RecursionError, MemoryError):
        raise UserError(f"{short(text)!r} is nested too deeply") from None
    except ValueError as e:  # null bytes, integers of thousands of digits
        raise UserError(f"cannot read {short(text)!r}: {e}") from None
    _validate(tree, text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = files.get(node.id, node.id)
    return tree


_OWN = re.compile(
    r"""(?P<string>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")"""
    r"""|(?P<file>(?:[A-Za-z]:(?=[\\/]))?[^\s'"(),=\[\]:][^'"(),=\[\]:]*\.py):(?P<name>[^\W\d]\w*)"""
)
"""A string, which is passed over, or ``path/my_file.py:name``; the path may hold spaces, but no quotes, commas, colons,
parentheses or signs of equality.
"""


def _without_files(text: str) -> tuple[str, dict[str, str]]:
    """Returns the text with each ``my_file.py:name`` as a plain name of the same length, and what these stand for."""
    names: dict[str, str] = {}
    if ".py:" not in text:
        return text, names

    def plain(match: re.Match[str]) -> str:
        if match["file"] is None:
            return match[0]
        name = f"_{len(names)}_".ljust(len(match[0]), "_")
        names[name] = f"{posixpath.normpath(match['file'].replace(chr(92), '/'))}:{match['name']}"
        return name

    return _OWN.sub(plain, text), names


def own_names(text: str) -> list[str]:
    """Returns every ``my_file.py:name`` in ``text``, each once."""
    names = [node.id for node in ast.walk(tree_of(text)) if isinstance(node, ast.Name) and ":" in node.id]
    return list(dict.fromkeys(names))


def _validate(tree: ast.expr, text: str) -> None:
    nodes: list[tuple[ast.AST, int]] = [(tree, 1)]
    for node, depth in nodes:  # grows as it is gone through
        if depth > _MAX_DEPTH:
            raise UserError(f"{short(text)!r} is nested too deeply")
        nodes += [(child, depth + 1) for child in ast.iter_child_nodes(node)]
    for node, _ in nodes:
        forbidden = _forbidden(node)
        if forbidden:
            allowed = "calls of known names, numbers, strings and lists"
            raise UserError(f"{forbidden} is not allowed in {short(text)!r}: write {allowed}")


def _forbidden(node: ast.AST) -> str:
    """Returns what is forbidden about a node, in words; empty for an allowed one."""
    match node:
        case ast.Call(func=ast.Name()) | ast.Name() | ast.Load() | ast.List() | ast.Tuple():
            return ""
        case ast.Attribute(attr=attr):
            return f"attribute access ('.{attr}')"
        case ast.Call(func=ast.Attribute(attr=attr)):
            return f"attribute access ('.{attr}')"
        case ast.Call():
            return "a call of something that is not a name"
        case ast.keyword(arg=arg):
            return "'**'" if arg is None else ""
        case ast.Starred():
            return "'*'"
        case ast.Constant(value=value):
            return "" if isinstance(value, SCALARS) else f"the constant {value!r}"
        case ast.BinOp() | ast.UnaryOp(op=ast.USub()):
            return "" if _is_arithmetic(node) else "arithmetic on anything but numbers"
        case ast.USub():
            return ""
        case ast.operator():
            return "" if type(node) in _OPERATORS else f"the operator {type(node).__name__}"
        case ast.UnaryOp(op=op):
            return f"the operator {type(op).__name__}"
    return {"Subscript": "a subscript", "Lambda": "a lambda", "JoinedStr": "an f-string"}.get(
        type(node).__name__, f"the construct {type(node).__name__}"
    )


def _is_arithmetic(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=value):
            return isinstance(value, int | float) and not isinstance(value, bool)
        case ast.BinOp(left=left, op=op, right=right):
            # An operator that is not allowed is reported by itself.
            return type(op) not in _OPERATORS or (_is_arithmetic(left) and _is_arithmetic(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _is_arithmetic(operand)
    return False


def number(node: ast.expr) -> int | float:
    """Returns the value of an arithmetic expression, kept small: no power can take long or fill the memory."""
    match node:
        case ast.Constant(value=value):
            result = value
        case ast.UnaryOp(operand=operand):
            result = -number(operand)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = number(left), number(right)
            if isinstance(op, ast.Pow) and abs(b) > _MAX_EXPONENT:
                raise UserError(f"the exponent of '{_shorthand(node)}' is too large: at most {_MAX_EXPONENT}")
            try:
                result = _OPERATORS[type(op)][0](a, b)
            except ArithmeticError as e:
                raise UserError(f"'{_shorthand(node)}' has no value: {e}") from None
    if isinstance(result, complex):
        raise UserError(f"'{_shorthand(node)}' is not a real number")
    if isinstance(result, int) and abs(result) > _MAX_NUMBER:
        raise UserError(f"'{_shorthand(node)}' is too large a whole number")
    assert isinstance(result, int | float)
    return result


def _shorthand(node: ast.expr) -> str:
    return short(_arithmetic(node), 40)


def render(node: ast.AST) -> str:
    """Returns a tree in its normal form."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Call(func=func, args=args, keywords=keywords):
            inside = [render(a) for a in args] + [f"{k.arg}={render(k.value)}" for k in keywords]
            return f"{render(func)}({', '.join(inside)})" if inside else render(func)
        case ast.List(elts=elts):
            return f"[{', '.join(map(render, elts))}]"
        case ast.Tuple(elts=elts):
            return f"({', '.join(map(render, elts))}{',' if len(elts) == 1 else ''})"
        case ast.Constant(value=str() | bool() | None as value):
            return repr(value)
    assert isinstance(node, ast.expr)
    number(node)
    return _arithmetic(node)


def _arithmetic(node: ast.expr, strength: int = 0) -> str:
    """Returns an arithmetic expression without spaces, in parentheses where it binds less than ``strength``."""
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            _, sign, own = _OPERATORS[type(op)]
            sides = (5, 3) if own == 4 else (own, own + 1)
            written = f"{_arithmetic(left, sides[0])}{sign}{_arithmetic(right, sides[1])}"
        case ast.UnaryOp(operand=operand):
            written, own = f"-{_arithmetic(operand, 3)}", 3
        case _:
            written, own = ast.unparse(node), 5
    return f"({written})" if own < strength else written
