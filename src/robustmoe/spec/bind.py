"""Tree to object: names looked up, arguments counted, named, built and checked."""

from __future__ import annotations

import ast
import inspect
import typing
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from robustmoe.errors import UserError, nearest
from robustmoe.spec.familiar import argument
from robustmoe.spec.hints import ANYTHING, SCALARS, arms_of, conform, hint_text, item_hint, signature_of, takes_bare
from robustmoe.spec.own import OwnPart, Written, called, is_own, part_of
from robustmoe.spec.parse import number, render, short

Table = Mapping[str, Callable[..., Any] | OwnPart]
Kinds = Mapping[str, Callable[[], Table]]


def mapping(kind: str | Table, kinds: Kinds) -> Table:
    """Returns the table of a kind; a table itself is returned as it is."""
    if not isinstance(kind, str):
        return kind
    if kind not in kinds:
        raise UserError(f"unknown kind {kind!r}; {nearest(kind, kinds)}")
    return kinds[kind]()


Wanted = Callable[[str], "type | None"]
"""Kind -> the class of its things; None where they are any callable."""

AT_BUILDING = ("num_classes", "image_shape")
"""Arguments of a model of a user's own that are known when it is built; a text need not give them."""


SIZES = frozenset(
    (
        "channels",
        "cutout",
        "depth",
        "experts",
        "growth",
        "heads",
        "hidden",
        "padding",
        "patch",
        "size",
        "slots",
        "width",
    )
)
LARGEST = 4096
"""Arguments of our own names that say how large a thing is made, and the largest that they may be: beyond it memory
would be full before anything is known to be wrong."""


class CallReader:
    """Builds the calls of one text. Names are looked up in the kind asked for, then in the others.

    ``wanted``: what a part of a user's own has to give. ``late``: the class that holds the call of a part until it is
    built, where a thing of that class is asked for.
    """

    def __init__(
        self,
        kind: str | Table,
        more: tuple[str | Table, ...],
        kinds: Kinds,
        wanted: Wanted | None = None,
        late: Callable[[], type] | None = None,
    ) -> None:
        self.label = kind if isinstance(kind, str) else "name"
        self.kinds, self.wanted, self.late = kinds, wanted, late
        self.asked = mapping(kind, kinds)
        self.others: tuple[str | Table, ...] = (*more, *(kinds if isinstance(kind, str) else ()))

    def outermost(self, node: ast.expr) -> Any:
        """Returns the object of the whole text."""
        match node:
            case ast.Call(func=ast.Name(id=name)) | ast.Name(id=name):
                function = self._asked(name)
                if not isinstance(function, OwnPart):
                    return self._call(node, name, function)
                wanted = self.wanted(self.label) if self.wanted and self.label in self.kinds else None
                value = self._call_part(node, function, (wanted,) if wanted else ())
                self._check(value, function, wanted)
                return value
        raise UserError(f"expected a call such as 'name(argument, key=value)', got {short(render(node))!r}")

    def _call(self, node: ast.expr, name: str, function: Callable[..., Any]) -> Any:
        """Returns what ``function`` makes of the arguments of ``node``, a call or a bare name."""
        where = f"in {short(render(node))!r}"
        arguments = self._bind(node, name, signature_of(function), where)
        try:
            return function(*arguments.args, **arguments.kwargs)
        except (ValueError, TypeError) as e:
            if isinstance(e, UserError) and str(e).startswith(("in '", 'in "')):
                raise
            raise UserError(f"{where}: {e}") from e

    def _call_part(self, node: ast.expr, part: OwnPart, classes: tuple[type, ...]) -> Any:
        """Returns what a part of a user's own stands for where a thing of ``classes`` is asked for."""
        if not part.is_called:
            thing = part.thing
            if isinstance(node, ast.Call):
                raise UserError(f"{part.name} is {called(thing)}, no function or class; write it without arguments")
            if not self._is_late(thing, classes):
                return thing
            return self._late_class()(render(node), lambda **known: thing)
        where, signature = f"in {short(render(node))!r}", part.signature()
        if not self._is_late(part.thing, classes):
            arguments = self._bind(node, part.name, signature, where)
            return part.call(*arguments.args, **arguments.kwargs)
        written = {keyword.arg for keyword in node.keywords} if isinstance(node, ast.Call) else set()
        later = [name for name in AT_BUILDING if name in signature.parameters and name not in written]
        kept = [p for name, p in signature.parameters.items() if name not in later]
        arguments = self._bind(node, part.name, signature.replace(parameters=kept), where)

        def make(**known: Any) -> Any:
            given = {**arguments.arguments, **{name: known[name] for name in later}}
            ordered = OrderedDict((name, given[name]) for name in signature.parameters if name in given)
            whole = inspect.BoundArguments(signature, ordered)
            return part.call(*whole.args, **whole.kwargs)

        return self._late_class()(render(node), make)

    def _is_late(self, thing: Any, classes: tuple[type, ...]) -> bool:
        """Whether the call of ``thing`` waits until it is built: a user's model, unless it is a description."""
        if self.late is None or not any(issubclass(self.late(), kind) for kind in classes):
            return False
        return not (issubclass(thing, classes) if isinstance(thing, type) else isinstance(thing, classes))

    def _late_class(self) -> Callable[..., Written]:
        assert self.late is not None
        return self.late()

    def _check(self, value: Any, part: OwnPart, wanted: type | None) -> None:
        """UserError where a part of a user's own gives something of another kind than asked for."""
        if wanted is not None and not isinstance(value, wanted):
            expected = f"{wanted.__module__.rpartition('.')[0]}.{wanted.__name__}"
        elif wanted is None and not callable(value):
            expected = "a function"
        else:
            return
        article = "an" if self.label[0] in "aeiou" else "a"
        raise UserError(f"{part.name} gives {called(value)}; expected {article} {self.label}: {expected}")

    def _find(self, name: str, hint: Any) -> Callable[..., Any] | OwnPart | None:
        """Returns what ``name`` stands for in an argument annotated ``hint``: of several kinds, the one that fits."""
        if is_own(name):
            return part_of(name)
        classes, first = _classes(hint), None
        for table in self._tables():
            if name in table:
                if not classes or _makes(table[name], classes):
                    return table[name]
                first = first or table[name]
        return first

    def _asked(self, name: str) -> Callable[..., Any] | OwnPart:
        if is_own(name):
            return part_of(name)
        if name in self.asked:
            return self.asked[name]
        for other in self.others:
            if name in mapping(other, self.kinds):
                kind = f"of kind {other!r}" if isinstance(other, str) else "an inner name"
                raise UserError(f"{name!r} is {kind}, not {self.label!r}; {nearest(name, self.asked)}")
        raise UserError(f"unknown {self.label} {name!r}; {nearest(name, self.asked)}")

    def _bind(self, node: ast.expr, name: str, signature: inspect.Signature, where: str) -> inspect.BoundArguments:
        """Returns the arguments of a call: counted, named, built and checked."""
        args = node.args if isinstance(node, ast.Call) else []
        keywords = [(str(k.arg), k.value) for k in node.keywords] if isinstance(node, ast.Call) else []
        parameters = signature.parameters
        by_keyword = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for place, (key, _) in enumerate(keywords):
            if key not in by_keyword and not takes_any:
                meant = argument(name, key, short(render(keywords[place][1]), 40), by_keyword)
                takes = meant or (nearest(key, by_keyword) if by_keyword else "it takes none")
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
                value = bound.arguments[key] = self._argument(given, parameter, where)
                if key in SIZES and isinstance(value, int) and value > LARGEST and not is_own(name):
                    raise UserError(f"{where}: argument {key!r}: expected at most {LARGEST}, got {value}")
        return bound

    def _argument(self, node: ast.expr, parameter: inspect.Parameter, where: str) -> Any:
        hint = parameter.annotation
        value = self._value(node, hint, f"{where}: argument {parameter.name!r}")
        try:
            return conform(value, hint)
        except OverflowError as e:
            raise UserError(f"{where}: argument {parameter.name!r}: {e}") from None
        except TypeError as e:
            given = f"{short(render(node), 60)} ({type(value).__name__})"
            raise UserError(f"{where}: argument {parameter.name!r}: {e}, got {given}") from None

    def _value(self, node: ast.expr, hint: Any, where: str) -> Any:
        match node:
            case ast.Name(id=name) if takes_bare(name, hint):
                return name
            case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
                function = self._find(name, hint)
                if function is None:
                    raise UserError(f"{where}: unknown name {name!r}; {self._expected(name, hint)}")
                if isinstance(function, OwnPart):
                    return self._call_part(node, function, _classes(hint))
                return self._call(node, name, function)
            case ast.List(elts=elts):
                return [self._value(item, item_hint(hint, i), where) for i, item in enumerate(elts)]
            case ast.Tuple(elts=elts):
                return tuple(self._value(item, item_hint(hint, i), where) for i, item in enumerate(elts))
            case ast.Constant(value=str() | bool() | None as value):
                return value
        return number(node)

    def _expected(self, name: str, hint: Any) -> str:
        """Returns the names that would do for an argument annotated ``hint``; all names where none is known to."""
        arms = arms_of(hint)
        if str in arms:
            return "write a text in quotes"
        fit = {str(a) for arm in arms if typing.get_origin(arm) is Literal for a in typing.get_args(arm)}
        classes = _classes(hint)
        for table in self._tables():
            fit |= {other for other, function in table.items() if _makes(function, classes)}
        if not fit and all(arm in SCALARS for arm in arms):
            return f"expected {hint_text(hint)}"
        return nearest(name, fit or set().union(*self._tables()))

    def _tables(self) -> Iterator[Table]:
        yield self.asked
        yield from (mapping(other, self.kinds) for other in self.others)


def _classes(hint: Any) -> tuple[type, ...]:
    """Returns the classes that a table entry could make for an argument annotated ``hint``."""
    return tuple(arm for arm in arms_of(hint) if isinstance(arm, type) and arm not in (ANYTHING, object, *SCALARS))


def _makes(function: Callable[..., Any] | OwnPart, classes: tuple[type, ...]) -> bool:
    """Returns whether a table entry, a class or an annotated factory, makes an instance of one of ``classes``."""
    function = function.thing if isinstance(function, OwnPart) else function
    made = function if isinstance(function, type) else signature_of(function).return_annotation
    return isinstance(made, type) and issubclass(made, classes)
