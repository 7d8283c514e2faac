"""A thing is written as a call, everywhere the same text: ``pgd(linf(8/255), steps=50)``.

`build` makes the object a text names, `text` writes an object back, `canonical` gives a text its one normal form,
`describe` lists what can be written. A text is parsed with `ast` and nothing of it is evaluated but calls of known
names, numbers with ``+ - * / **``, strings, booleans, ``None``, lists and tuples. A bare name is a call without
arguments, except where the argument it is given for is a string or a literal: ``pgd(linf(8/255), keep=last)``.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import inspect
import keyword
import operator
import re
import types
import typing
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, Literal

from robustmoe.errors import UserError, nearest

Table = Mapping[str, Callable[..., Any]]


def _table(module: str, name: str) -> Callable[[], Table]:
    def load() -> Table:
        table: Table = getattr(import_module(module), name)
        return table

    return load


TABLES: dict[str, Callable[[], Table]] = {
    "model": _table("robustmoe.models", "MODELS"),
    "data": _table("robustmoe.data", "DATASETS"),
    "attack": _table("robustmoe.attacks", "ATTACKS"),
    "threat": _table("robustmoe.attacks", "THREATS"),
    "objective": _table("robustmoe.attacks", "OBJECTIVES"),
    "method": _table("robustmoe.training", "METHODS"),
    "optimizer": _table("robustmoe.training", "OPTIMIZERS"),
    "schedule": _table("robustmoe.training", "SCHEDULES"),
    "augment": _table("robustmoe.data", "AUGMENTS"),
}
"""The kinds of things, and where their names are: imported when first asked for."""

_MAX_TEXT, _MAX_DEPTH, _MAX_EXPONENT, _MAX_NUMBER = 4000, 50, 64, 10**100
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_SCALARS = (bool, int, float, str, types.NoneType)
_ANYTHING = inspect.Parameter.empty


# ------------------------------------------------------------------------------------------------ public


def build(text: str, kind: str | Table, *more: str | Table) -> Any:
    """The object that ``text`` names.

    ``kind`` is a key of `TABLES`, or a table (name -> callable). The outermost name must be of that kind; names
    inside it may be of any kind, or from the tables in ``more``. A mistake is a one-line `UserError`.
    """
    return _Reader(kind, more).outermost(_parse(text))


def numbers(text: str) -> tuple[float, ...]:
    """The numbers of a list such as ``0, 2/255, 4/255``."""
    node = _parse(text)
    items = node.elts if isinstance(node, ast.Tuple | ast.List) else [node]
    if not all(_is_arithmetic(item) for item in items):
        raise UserError(f"{_short(text)!r} is not a list of numbers, such as '0, 2/255, 4/255'")
    return tuple(float(_number(item)) for item in items)


def canonical(text: str) -> str:
    """The normal form of ``text``: one spacing, ``resnet18()`` as ``resnet18``, ``8/255`` as written. No look-up."""
    return _render(_parse(text))


def text(obj: Any, *tables: str | Table) -> str:
    """``obj`` written as a call: an instance of a frozen dataclass that, or whose factory, is in a table.

    The inverse of `build`. Only what differs from its default is written. The tables are those of all kinds, or the
    ones given. Where several names make an equal object, the one that needs the fewest arguments wins, and a factory
    (``resnet18``) before its class.
    """
    return _Writer(tables or tuple(TABLES)).call(obj)


def describe(kind: str) -> list[tuple[str, str, str]]:
    """For each name of a kind: (name, signature, first line of its docstring)."""
    rows = []
    for name, function in sorted(_mapping(kind).items()):
        parameters = ", ".join(_describe_parameter(p) for p in _signature(function).parameters.values())
        line = (inspect.getdoc(function) or "").partition("\n")[0]
        rows.append((name, f"{name}({parameters})" if parameters else name, line))
    return rows


def conform(value: Any, hint: Any) -> Any:
    """``value`` as the annotation ``hint`` wants it (an int becomes a float, a list a tuple); else a `TypeError`.

    int excludes bool. Annotations other than scalars, None, Union, Literal, sequences and classes are not checked.
    """
    arms = _arms(hint)
    if len(arms) == 1:
        return _conform_one(value, arms[0])
    accepted = []
    for arm in arms:
        try:
            accepted.append(_conform_one(value, arm))
        except TypeError:
            continue
    if not accepted:
        raise TypeError(f"expected {hint_text(hint)}")
    return next((result for result in accepted if type(result) is type(value)), accepted[0])


def hint_text(hint: Any) -> str:
    """An annotation in words: "float or None", "one of 'fp32', 'bf16'", "list of int"."""
    words = []
    for arm in _arms(hint):
        origin, args = typing.get_origin(arm), [a for a in typing.get_args(arm) if a is not Ellipsis]
        if arm is types.NoneType or arm is None:
            words.append("None")
        elif origin is Literal:
            words.append(repr(args[0]) if len(args) == 1 else "one of " + ", ".join(map(repr, args)))
        elif origin in _SEQUENCES:
            words.append("list of " + " and ".join(hint_text(a) for a in args))
        else:
            words.append(getattr(arm, "__name__", str(arm)))
    return " or ".join(words)


# ------------------------------------------------------------------------------------------------ text -> tree


def _short(text: str, width: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _parse(text: str) -> ast.expr:
    """The tree of ``text``, made of allowed constructs only."""
    if not isinstance(text, str):
        raise UserError(f"expected a text such as 'name(argument, key=value)', got {type(text).__name__}")
    text = text.strip()
    if not text:
        raise UserError("expected a text such as 'name(argument, key=value)', got an empty one")
    if len(text) > _MAX_TEXT:
        raise UserError(f"{_short(text)!r} is too long: {len(text)} characters, at most {_MAX_TEXT}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval").body
    except SyntaxError as e:
        lines = text.splitlines()
        place = sum(len(line) + 1 for line in lines[: (e.lineno or 1) - 1]) + max((e.offset or 1) - 1, 0)
        near = f"before {_short(text[place:], 20)!r}" if place < len(text) else "the end"
        raise UserError(f"cannot read {_short(text)!r}: {e.msg} (character {place + 1}, {near})") from None
    except (RecursionError, MemoryError):
        raise UserError(f"{_short(text)!r} is nested too deeply") from None
    except ValueError as e:  # null bytes, integers of thousands of digits
        raise UserError(f"cannot read {_short(text)!r}: {e}") from None
    _validate(tree, text)
    return tree


def _validate(tree: ast.expr, text: str) -> None:
    stack: list[tuple[ast.AST, int]] = [(tree, 1)]
    while stack:
        node, depth = stack.pop()
        if depth > _MAX_DEPTH:
            raise UserError(f"{_short(text)!r} is nested too deeply")
        forbidden = _forbidden(node)
        if forbidden:
            allowed = "calls of known names, numbers, strings and lists"
            raise UserError(f"{forbidden} is not allowed in {_short(text)!r}: write {allowed}")
        stack += [(child, depth + 1) for child in ast.iter_child_nodes(node)]


def _forbidden(node: ast.AST) -> str:
    """What is forbidden about a node, in words; empty for an allowed one."""
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
            return "" if isinstance(value, _SCALARS) else f"the constant {value!r}"
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


def _number(node: ast.expr) -> int | float:
    """The value of an arithmetic expression, kept small: no power can take long or fill the memory."""
    match node:
        case ast.Constant(value=value):
            result = value
        case ast.UnaryOp(operand=operand):
            result = -_number(operand)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _number(left), _number(right)
            if isinstance(op, ast.Pow) and abs(b) > _MAX_EXPONENT:
                raise UserError(f"the exponent of '{_shorthand(node)}' is too large: at most {_MAX_EXPONENT}")
            try:
                result = _OPERATORS[type(op)](a, b)
            except ArithmeticError as e:
                raise UserError(f"'{_shorthand(node)}' has no value: {e}") from None
    if isinstance(result, complex):
        raise UserError(f"'{_shorthand(node)}' is not a real number")
    if isinstance(result, int) and abs(result) > _MAX_NUMBER:
        raise UserError(f"'{_shorthand(node)}' is too large a whole number")
    assert isinstance(result, int | float)
    return result


def _shorthand(node: ast.expr) -> str:
    return _short(_arithmetic(node), 40)


def _render(node: ast.AST) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Call(func=func, args=args, keywords=keywords):
            inside = [_render(a) for a in args] + [f"{k.arg}={_render(k.value)}" for k in keywords]
            return f"{_render(func)}({', '.join(inside)})" if inside else _render(func)
        case ast.List(elts=elts):
            return f"[{', '.join(map(_render, elts))}]"
        case ast.Tuple(elts=elts):
            return f"({', '.join(map(_render, elts))}{',' if len(elts) == 1 else ''})"
        case ast.Constant(value=str() | bool() | None as value):
            return repr(value)
    assert isinstance(node, ast.expr)
    _number(node)
    return _arithmetic(node)


_SIGNS: dict[type[ast.operator], tuple[str, int]] = {
    ast.Add: ("+", 1),
    ast.Sub: ("-", 1),
    ast.Mult: ("*", 2),
    ast.Div: ("/", 2),
    ast.Pow: ("**", 4),
}
"""Sign and binding strength; a minus in front binds with strength 3, a number with 5."""


def _arithmetic(node: ast.expr, strength: int = 0) -> str:
    """An arithmetic expression without spaces, in parentheses where it binds less than ``strength``."""
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            sign, own = _SIGNS[type(op)]
            sides = (5, 3) if own == 4 else (own, own + 1)
            written = f"{_arithmetic(left, sides[0])}{sign}{_arithmetic(right, sides[1])}"
        case ast.UnaryOp(operand=operand):
            written, own = f"-{_arithmetic(operand, 3)}", 3
        case _:
            written, own = ast.unparse(node), 5
    return f"({written})" if own < strength else written


# ------------------------------------------------------------------------------------------------ annotations


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature, with annotations evaluated where all of them can be."""
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, TypeError, AttributeError, SyntaxError):
        return inspect.signature(function)


def _arms(hint: Any) -> tuple[Any, ...]:
    """The members of a union, flat; one arm for anything else."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _arms(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(arm for member in typing.get_args(hint) for arm in _arms(member))
    return (hint,)


def _conform_one(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if hint is None or hint is types.NoneType:
        good = value is None
    elif origin is Literal:
        good = any(value == a and type(value) is type(a) for a in typing.get_args(hint))
    elif hint is int:
        good = isinstance(value, int) and not isinstance(value, bool)
    elif hint is float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if good else value
    elif hint in _SEQUENCES or origin in _SEQUENCES:
        return _conform_sequence(value, hint)
    elif isinstance(hint, type) and origin is None:
        try:
            good = isinstance(value, hint)
        except TypeError:  # a Protocol that cannot be checked
            good = True
    else:
        good = True
    if not good:
        raise TypeError(f"expected {hint_text(hint)}")
    return value


def _conform_sequence(value: Any, hint: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise TypeError(f"expected {hint_text(hint)}")
    container = list if (typing.get_origin(hint) or hint) is list else tuple
    args = typing.get_args(hint)
    if container is tuple and typing.get_origin(hint) is tuple and args[-1:] != (Ellipsis,) and len(args) != len(value):
        raise TypeError(f"expected {len(args)} values")
    return container(conform(item, _item_hint(hint, i)) for i, item in enumerate(value))


def _item_hint(hint: Any, place: int) -> Any:
    """The annotation of the item at ``place`` of a sequence annotated ``hint``."""
    for arm in _arms(hint):
        args = typing.get_args(arm)
        if typing.get_origin(arm) in _SEQUENCES and args:
            fixed = typing.get_origin(arm) is tuple and args[-1] is not Ellipsis
            return (args[place] if place < len(args) else _ANYTHING) if fixed else args[0]
    return _ANYTHING


def _takes_bare(name: str, hint: Any) -> bool:
    """Whether a bare name given for an argument annotated ``hint`` is that string, and not a call."""
    arms = _arms(hint)
    if any(name in typing.get_args(arm) for arm in arms if typing.get_origin(arm) is Literal):
        return True
    return str in arms and all(arm is None or arm in _SCALARS or typing.get_origin(arm) is Literal for arm in arms)


# ------------------------------------------------------------------------------------------------ tree -> object


def _mapping(kind: str | Table) -> Table:
    if not isinstance(kind, str):
        return kind
    if kind not in TABLES:
        raise UserError(f"unknown kind {kind!r}; {nearest(kind, TABLES)}")
    return TABLES[kind]()


class _Reader:
    """Builds the calls of one text. Names are looked up in the kind asked for, then in the others."""

    def __init__(self, kind: str | Table, more: tuple[str | Table, ...]) -> None:
        self.label = kind if isinstance(kind, str) else "name"
        self.asked = _mapping(kind)
        self.others: tuple[str | Table, ...] = (*more, *(TABLES if isinstance(kind, str) else ()))

    def outermost(self, node: ast.expr) -> Any:
        """The object of the whole text."""
        match node:
            case ast.Call(func=ast.Name(id=name)) | ast.Name(id=name):
                return self._call(node, name, self._asked(name))
        raise UserError(f"expected a call such as 'name(argument, key=value)', got {_short(_render(node))!r}")

    def _call(self, node: ast.expr, name: str, function: Callable[..., Any]) -> Any:
        """What ``function`` makes of the arguments of ``node``, a call or a bare name."""
        where = f"in {_short(_render(node))!r}"
        arguments = self._bind(node, name, _signature(function), where)
        try:
            return function(*arguments.args, **arguments.kwargs)
        except (ValueError, TypeError) as e:
            if isinstance(e, UserError) and str(e).startswith(("in '", 'in "')):
                raise
            raise UserError(f"{where}: {e}") from e

    def _find(self, name: str, hint: Any) -> Callable[..., Any] | None:
        """What ``name`` stands for in an argument annotated ``hint``: of several kinds, the one that fits."""
        classes, first = _classes(hint), None
        for table in self._tables():
            if name in table:
                if not classes or _makes(table[name], classes):
                    return table[name]
                first = first or table[name]
        return first

    def _asked(self, name: str) -> Callable[..., Any]:
        if name in self.asked:
            return self.asked[name]
        for other in self.others:
            if name in _mapping(other):
                kind = f"of kind {other!r}" if isinstance(other, str) else "an inner name"
                raise UserError(f"{name!r} is {kind}, not {self.label!r}; {nearest(name, self.asked)}")
        raise UserError(f"unknown {self.label} {name!r}; {nearest(name, self.asked)}")

    def _bind(self, node: ast.expr, name: str, signature: inspect.Signature, where: str) -> inspect.BoundArguments:
        """The arguments of a call: counted, named, built and checked."""
        args = node.args if isinstance(node, ast.Call) else []
        keywords = [(str(k.arg), k.value) for k in node.keywords] if isinstance(node, ast.Call) else []
        parameters = signature.parameters
        by_keyword = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for place, (key, _) in enumerate(keywords):
            if key not in by_keyword and not takes_any:
                takes = nearest(key, by_keyword) if by_keyword else "it takes none"
                raise UserError(f"{where}: {name!r} has no argument {key!r}; {takes}")
            if key in [other for other, _ in keywords[:place]]:
                raise UserError(f"{where}: argument {key!r} is given twice")
        try:
            bound = signature.bind(*args, **dict(keywords))
        except TypeError as e:
            raise UserError(f"{where}: {e}; it is {name}({', '.join(map(str, parameters))})") from None
        for key, given in bound.arguments.items():
            parameter = parameters[key]
            if parameter.kind is parameter.VAR_POSITIONAL:
                bound.arguments[key] = tuple(self._argument(item, parameter, where) for item in given)
            elif parameter.kind is parameter.VAR_KEYWORD:
                bound.arguments[key] = {k: self._argument(item, parameter, where) for k, item in given.items()}
            else:
                bound.arguments[key] = self._argument(given, parameter, where)
        return bound

    def _argument(self, node: ast.expr, parameter: inspect.Parameter, where: str) -> Any:
        hint = parameter.annotation
        value = self._value(node, hint, f"{where}: argument {parameter.name!r}")
        try:
            return conform(value, hint)
        except OverflowError as e:
            raise UserError(f"{where}: argument {parameter.name!r}: {e}") from None
        except TypeError as e:
            given = f"{_short(_render(node), 60)} ({type(value).__name__})"
            raise UserError(f"{where}: argument {parameter.name!r}: {e}, got {given}") from None

    def _value(self, node: ast.expr, hint: Any, where: str) -> Any:
        match node:
            case ast.Name(id=name) if _takes_bare(name, hint):
                return name
            case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
                function = self._find(name, hint)
                if function is None:
                    raise UserError(f"{where}: unknown name {name!r}; {self._expected(name, hint)}")
                return self._call(node, name, function)
            case ast.List(elts=elts):
                return [self._value(item, _item_hint(hint, i), where) for i, item in enumerate(elts)]
            case ast.Tuple(elts=elts):
                return tuple(self._value(item, _item_hint(hint, i), where) for i, item in enumerate(elts))
            case ast.Constant(value=str() | bool() | None as value):
                return value
        return _number(node)

    def _expected(self, name: str, hint: Any) -> str:
        """The names that would do for an argument annotated ``hint``; all names where none is known to."""
        arms = _arms(hint)
        if str in arms:
            return "write a text in quotes"
        fit = {str(a) for arm in arms if typing.get_origin(arm) is Literal for a in typing.get_args(arm)}
        classes = _classes(hint)
        for table in self._tables():
            fit |= {other for other, function in table.items() if _makes(function, classes)}
        return nearest(name, fit or set().union(*self._tables()))

    def _tables(self) -> Iterator[Table]:
        yield self.asked
        yield from map(_mapping, self.others)


def _classes(hint: Any) -> tuple[type, ...]:
    """The classes that a table entry could make for an argument annotated ``hint``."""
    return tuple(arm for arm in _arms(hint) if isinstance(arm, type) and arm not in (_ANYTHING, object, *_SCALARS))


def _makes(function: Callable[..., Any], classes: tuple[type, ...]) -> bool:
    """Whether a table entry, a class or an annotated factory, makes an instance of one of ``classes``."""
    made = function if isinstance(function, type) else _signature(function).return_annotation
    return isinstance(made, type) and issubclass(made, classes)


# ------------------------------------------------------------------------------------------------ object -> text


class _Writer:
    """Writes objects as calls of the names of some tables."""

    def __init__(self, tables: tuple[str | Table, ...]) -> None:
        self.entries = [entry for table in tables for entry in _mapping(table).items()]

    def call(self, obj: Any) -> str:
        """``obj`` as a call of a name that makes an equal one: see `text` for which."""
        found: list[tuple[int, bool, str]] = []
        reason = f"no name makes a {type(obj).__name__}"
        for name, function in self.entries:
            signature = _signature(function)
            is_class = function is type(obj)
            made = signature.return_annotation
            if not is_class and not (isinstance(made, type) and isinstance(obj, made)):
                continue
            try:
                arguments = self._arguments(obj, signature)
                if is_class or function(*arguments.args, **arguments.kwargs) == obj:
                    found.append((len(arguments.arguments), is_class, self._write_call(name, arguments)))
            except UserError as e:
                reason = str(e)
            except (AttributeError, ValueError, TypeError):  # this factory does not make such an object; another may
                continue
        if not found:
            raise UserError(f"a {type(obj).__name__} cannot be written as a call: {reason}")
        return min(found)[-1]

    def _arguments(self, obj: Any, signature: inspect.Signature) -> inspect.BoundArguments:
        """The attributes of ``obj`` that a signature names and that differ from its defaults."""
        arguments = inspect.BoundArguments(signature, OrderedDict())
        fields = dataclasses.fields(obj) if dataclasses.is_dataclass(obj) else ()
        factories = {f.name: f.default_factory for f in fields}
        for name, parameter in signature.parameters.items():
            default = parameter.default
            if type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
                default = factories[name]()  # type: ignore[operator]
            needed = default is parameter.empty
            if needed or (hasattr(obj, name) and getattr(obj, name) != default):
                arguments.arguments[name] = getattr(obj, name)
        return arguments

    def _write_call(self, name: str, arguments: inspect.BoundArguments) -> str:
        """Arguments without a default by position, the others by keyword."""
        inside, positional = [], True
        for key, parameter in arguments.signature.parameters.items():
            if key not in arguments.arguments:
                continue
            value = arguments.arguments[key]
            if parameter.kind is parameter.VAR_POSITIONAL:
                inside += [self.value(item, parameter.annotation) for item in value]
                continue
            needed = parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
            positional = positional and needed
            written = self.value(value, parameter.annotation)
            inside.append(written if positional else f"{key}={written}")
        return f"{name}({', '.join(inside)})" if inside else name

    def value(self, value: Any, hint: Any) -> str:
        if value is None or isinstance(value, bool | int):
            return repr(value)
        if isinstance(value, float):
            return _float_text(value, hint)
        if isinstance(value, str):
            bare = value.isidentifier() and not keyword.iskeyword(value) and _takes_bare(value, hint)
            return value if bare else repr(value)
        if isinstance(value, list | tuple):
            items = ", ".join(self.value(item, _item_hint(hint, i)) for i, item in enumerate(value))
            if isinstance(value, list):
                return f"[{items}]"
            return f"({items},)" if len(value) == 1 else f"({items})"
        return self.call(value)


def _float_text(value: float, hint: Any) -> str:
    """``8/255`` where that is exact and shorter than the decimal; ``12`` for 12.0 where a float is asked for anyway."""
    if value != value:
        raise UserError("nan cannot be written in a call")
    if abs(value) == float("inf"):
        return "1e309" if value > 0 else "-1e309"
    arms = _arms(hint)
    if value == int(value) and abs(value) < 1e6 and float in arms and int not in arms:
        return str(int(value))
    halves = round(value * 510)
    fraction = f"{halves // 2 if halves % 2 == 0 else halves / 2}/255"
    return fraction if len(fraction) < len(repr(value)) and halves / 2 / 255 == value else repr(value)


def _describe_parameter(parameter: inspect.Parameter) -> str:
    star = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
    star = "**" if parameter.kind is parameter.VAR_KEYWORD else star
    if parameter.default is parameter.empty:
        hint = "" if parameter.annotation is _ANYTHING else f": {_hint_source(parameter.annotation)}"
        return f"{star}{parameter.name}{hint}"
    default = parameter.default
    if type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return f"{parameter.name}=…"
    try:
        return f"{parameter.name}={_Writer(tuple(TABLES)).value(default, parameter.annotation)}"
    except UserError:
        return f"{parameter.name}={getattr(default, '__name__', default)}"


def _hint_source(hint: Any) -> str:
    """An annotation as one writes it, without module names."""
    if isinstance(hint, str):
        return hint
    return getattr(hint, "__name__", "") if typing.get_origin(hint) is None else re.sub(r"\b\w+\.", "", str(hint))
