"""One pass of a foreign model, watched: which module decides what, what passes no gradient, who draws random numbers.

A torch function mode sees every call of torch's own functions, and hooks, which live during the pass only, tell which
module it is made in. What runs inside a scripted or compiled module is not seen, nor what leaves torch (numpy).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustmoe.models.foreign import hearable


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CHOICES = _words("topk argmax max sort argsort one_hot multinomial gumbel_softmax softmax")
"""The calls in which a router may decide; of "max" and "softmax" those along one dimension."""

DRAWS = _words(
    "rand randn rand_like randn_like randint randint_like randperm normal bernoulli multinomial poisson gumbel_softmax "
    "uniform_ normal_ exponential_ bernoulli_ random_ log_normal_ geometric_ cauchy_"
)
"""The calls that draw random numbers whatever they are given."""

DROPS = _words("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout rrelu")
"""The calls that draw where they are told that the model trains."""

ROUNDS = _words("round floor ceil trunc fix sign sgn heaviside")
"""Functions whose gradient is zero wherever it exists."""

PRODUCTS = _words("matmul bmm baddbmm einsum mm")
"""Products, which attention takes of two tensors that both depend on the image."""

LAYERS = _words("linear conv1d conv2d conv3d embedding")

CASTS = _words("to long int short byte char type")

SHAPED = _words(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full "
    "new_tensor"
)
"""Functions that take the shape of a tensor, and none of its numbers."""


@dataclass(frozen=True)
class Decision:
    """A call that may be a router's decision: its scores depend on the image.

    ``path``: the innermost module that runs ("" is the model itself), of class ``module``; ``call``: torch's name of
    the function; ``nth``: how many such calls that module made before, in this call of it. ``shape`` of the scores,
    ``dim`` along which is chosen, ``k`` of how many (every one, for a softmax). ``gradient``: whether it ran with
    gradients on.
    """

    path: str
    module: str
    call: str
    nth: int
    shape: tuple[int, ...]
    dim: int
    k: int
    gradient: bool

    @property
    def choices(self) -> int:
        """Of how many ``k`` are chosen."""
        return self.shape[self.dim]


@dataclass(frozen=True)
class Cut:
    """A place where the image's gradient ends, though what is computed there goes on to the model's output.

    ``how``: "no_grad" (a call with gradients off), "inference_mode", "detach", "round" (a function without a slope) or
    "cast" (to integers and on). Of the last three the rest of a straight-through estimate is one: what is cut there may
    go on with a gradient beside. ``call``: the first such call in that module; ``calls``: how many there are.
    """

    path: str
    module: str
    call: str
    how: str
    calls: int


@dataclass(frozen=True)
class Draw:
    """A call that draws random numbers, in the innermost module that runs."""

    path: str
    module: str
    call: str


@dataclass(eq=False)
class Heard:
    """A call of `CHOICES`, with its tensors: ``scores`` that it was given, and its ``result``. ``entry``: the module
    call that it was made in (see `Entered`). ``product``: the scores are a product of two tensors that both depend on
    the image, as attention's are, with no layer after it.
    """

    decision: Decision
    scores: Tensor
    result: Any
    entry: int
    product: bool = False


@dataclass(eq=False)
class Entered:
    """A call of a module: what it was given and what it gave. ``number``: the calls of this pass are numbered in the
    order in which they began; ``parent``: the number of the call around it, -1 for none.
    """

    number: int
    parent: int
    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


class Seen(NamedTuple):
    """What `watch` saw: the model's ``output``, and its ``decisions``, ``cuts`` and ``draws`` in the order in which
    they came. ``heard`` and ``entered`` hold the tensors too, for those who look closer.
    """

    output: Any
    decisions: tuple[Decision, ...]
    cuts: tuple[Cut, ...]
    draws: tuple[Draw, ...]
    heard: tuple[Heard, ...]
    entered: tuple[Entered, ...]


def watch(model: Callable[[Tensor], Any], x: Tensor, tensors: bool = False) -> Seen:
    """Runs one pass of any model on the images x (n, ch, h, w), with gradients on, and tells what happened inside.

    The model may be any callable; where it is no nn.Module, every path is "". It runs in the modes that it is in (call
    ``eval()`` first, or use `robustmoe.attacks.evaluating`), and it is left as it was: hooks are gone also after an
    error, which is passed on. Few images are enough: the tensors of the pass are held until it ends.

    ``decisions``: calls of `CHOICES` whose scores depend on the image; an attention's softmax and a final argmax are
    among them, so a decision is not yet a router. ``cuts``: where gradients are off, or end, though the result reaches
    the output as numbers (not as an integer index, which has no gradient anyway; not what only a counter or a log
    gets; not the forward of an autograd function, which has a backward of its own). ``draws``: who draws random
    numbers. ``tensors``: keep ``heard`` and ``entered``, else they are empty.
    """
    watcher = Watcher()
    with torch.inference_mode(False), torch.enable_grad():
        at = x.detach().requires_grad_(x.is_floating_point()).clone()  # no leaf: a model may write into its images
        watcher.image(at)
        with entering(model, watcher), watcher:
            output = model(at)
    decisions = tuple(heard.decision for heard in watcher.heard)
    kept = (tuple(watcher.heard), tuple(watcher.entered)) if tensors else ((), ())
    return Seen(output, decisions, watcher.cuts(output), tuple(watcher.draws), *kept)


class Watcher(TorchFunctionMode):
    """The mode of `watch`: which tensors depend on the image, and where on their way a gradient ended."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Heard] = []
        self.entered: list[Entered] = []
        self.draws: list[Draw] = []
        self._stack: list[_Running] = [_Running(-1, "", "")]
        self._marks: dict[int, _Mark] = {}
        self._cuts: Counter[tuple[str, str, str]] = Counter()
        self._first: dict[tuple[str, str, str], str] = {}

    # -------------------------------------------------------------------------------------------- modules

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Is told that a module begins."""
        parent = self._stack[-1].entry
        entry = Entered(len(self.entered), parent, path, module, args, kwargs)
        self.entered.append(entry)
        self._stack.append(_Running(entry.number, path, type(module).__name__))

    def leave(self, output: Any) -> None:
        """Is told that the innermost module ends. Of a result that no call here has made (a scripted module's, a
        foreign operator's) the module's inputs are all that is known.
        """
        entry = self.entered[self._stack.pop().entry]
        entry.output = output
        given = [mark for t in tensors_of((entry.args, entry.kwargs)) if (mark := self._mark(t)) is not None]
        for tensor in tensors_of(output):
            if given and id(tensor) not in self._marks and not isinstance(tensor, nn.Parameter):
                self._note(tensor, frozenset().union(*(mark.cuts for mark in given)))

    # -------------------------------------------------------------------------------------------- calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute, such as T or data
            name = getattr(func.__self__, "__name__", "")
        given = [mark for t in tensors_of((args, kwargs)) if (mark := self._mark(t)) is not None]
        result = func(*args, **kwargs)
        self._drawn(name, args, kwargs)
        if given and name not in SHAPED:
            self._follow(name, given, args, result)
            if name in CHOICES:
                self._hear(name, args, kwargs, result)
        return result

    def _follow(self, name: str, given: list[_Mark], args: Any, result: Any) -> None:
        cuts = frozenset().union(*(mark.cuts for mark in given))
        live = any(mark.tensor.requires_grad for mark in given)  # else its gradient has ended before
        matrices = name in PRODUCTS and len(given) > 1 and not all(mark.tensor is given[0].tensor for mark in given)
        product = matrices or (name not in LAYERS and any(mark.product for mark in given))
        changed = [*tensors_of(result)]
        if name == "__setitem__":
            changed.append(args[0])
        for tensor in changed:
            here = cuts
            if tensor.is_floating_point():
                how = self._how(name, tensor) if live else None
                here = cuts if how is None else cuts | {self._cut(name, how)}
            elif live and name in CASTS and any(t.is_floating_point() for t in tensors_of(args)):
                here = cuts | {self._cut(name, "cast")}
            else:
                here = frozenset(cut for cut in cuts if cut[2] == "cast")
            self._note(tensor, here, product)

    def _how(self, name: str, result: Tensor) -> str | None:
        if name in ("detach", "detach_", "data"):
            return "detach"
        off = not result.requires_grad  # it has one as the result of an autograd function
        if torch.is_inference_mode_enabled() and off:
            return "inference_mode"
        if not torch.is_grad_enabled() and off:
            return "no_grad"
        return "round" if name.removesuffix("_") in ROUNDS else None

    def _cut(self, name: str, how: str) -> tuple[str, str, str]:
        cut = (self._stack[-1].path, self._stack[-1].module, how)
        self._cuts[cut] += 1
        self._first.setdefault(cut, name)
        return cut

    def _drawn(self, name: str, args: Any, kwargs: Any) -> None:
        if drawing(name, args, kwargs):
            self.draws.append(Draw(self._stack[-1].path, self._stack[-1].module, name))

    def _hear(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        scores = next(tensors_of((args, kwargs)), None)
        dim = dimension(name, args, kwargs)
        if scores is None or scores.ndim == 0 or dim is None:
            return
        frame = self._stack[-1]
        first = next(tensors_of(result), scores)
        shape = (*scores.shape, first.shape[-1]) if name == "one_hot" else tuple(scores.shape)
        k = int(args[1] if len(args) > 1 else kwargs["k"]) if name == "topk" else 1
        k = shape[dim] if name in ("softmax", "sort", "argsort") else k
        decision = Decision(
            frame.path, frame.module, name, frame.calls[name], shape, dim % len(shape), k, torch.is_grad_enabled()
        )
        frame.calls[name] += 1
        mark = self._mark(scores)
        self.heard.append(Heard(decision, scores, result, frame.entry, mark is not None and mark.product))

    # -------------------------------------------------------------------------------------------- what depends on what

    def image(self, x: Tensor) -> None:
        """Is told which tensor the images are."""
        self._note(x, frozenset())

    def knows(self, value: Any) -> bool:
        """Whether a value is a tensor that depends on the image."""
        return isinstance(value, Tensor) and self._mark(value) is not None

    @property
    def where(self) -> tuple[str, str]:
        """The path and the class of the innermost module that runs."""
        return self._stack[-1].path, self._stack[-1].module

    def _note(self, tensor: Tensor, cuts: frozenset[tuple[str, str, str]], product: bool = False) -> None:
        self._marks[id(tensor)] = _Mark(tensor, cuts, tensor.requires_grad, product)

    def _mark(self, tensor: Tensor) -> _Mark | None:
        """What is known of a tensor. One that came without a gradient and has one now is the result of an autograd
        function, whose own backward says how it moves.
        """
        mark = self._marks.get(id(tensor))
        if mark is not None and tensor.requires_grad and not mark.gradient:
            mark = self._marks[id(tensor)] = _Mark(tensor, frozenset(), True, mark.product)
        return mark

    def cuts(self, output: Any) -> tuple[Cut, ...]:
        """The places that lie on a way from the image to ``output``."""
        reached: set[tuple[str, str, str]] = set()
        for tensor in tensors_of(output):
            mark = self._mark(tensor)
            reached |= set() if mark is None else mark.cuts
        return tuple(
            Cut(path, module, self._first[path, module, how], how, count)
            for (path, module, how), count in self._cuts.items()
            if (path, module, how) in reached
        )


@dataclass(eq=False)
class _Running:
    """A module that runs: the number of its call, its path and class, and how often it made which call of `CHOICES`."""

    entry: int
    path: str
    module: str
    calls: Counter[str] = field(default_factory=Counter)


class _Mark(NamedTuple):
    """A tensor that depends on the image (held, so that its id is not used again), the cuts before it, whether it had a
    gradient when it was made, and whether it is a ``product`` (see `Heard`).
    """

    tensor: Tensor
    cuts: frozenset[tuple[str, str, str]]
    gradient: bool
    product: bool


_ATTENDS = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}
"""Attention's functions, and the place of the dropout probability among their arguments."""


def drawing(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the call of that name draws random numbers."""
    return (
        name in DRAWS or (name in DROPS and _drops(args, kwargs)) or (name in _ATTENDS and _attends(name, args, kwargs))
    )


def _drops(args: Any, kwargs: Any) -> bool:
    """Whether a dropout drops: it is told that the model trains, with a probability above 0."""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return bool(training) and isinstance(p, int | float) and p > 0


def _attends(name: str, args: Any, kwargs: Any) -> bool:
    """Whether an attention drops some of its weights."""
    place = _ATTENDS[name]
    p = kwargs.get("dropout_p", args[place] if len(args) > place else 0.0)
    return bool(kwargs.get("training", True)) and p > 0


def dimension(name: str, args: Any, kwargs: Any) -> int | None:
    """The dimension along which a call of `CHOICES` chooses; None where it chooses among all numbers of a tensor."""
    if name in ("one_hot", "multinomial"):
        return -1
    place, default = {"topk": (2, -1), "sort": (1, -1), "argsort": (1, -1), "gumbel_softmax": (4, -1)}.get(
        name, (1, None)
    )
    dim = kwargs.get("dim", args[place] if len(args) > place else default)
    return dim if isinstance(dim, int) and not isinstance(dim, bool) else None


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a value: itself, or in tuples, lists and dicts (a model's output class is a dict or a tuple)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)


@contextlib.contextmanager
def entering(model: Any, watcher: Watcher) -> Iterator[None]:
    """Inside, the watcher is told of every module's begin and end. The hooks are gone afterwards, in any case."""
    hooks = []

    def before(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: watcher.enter(path, module, args, kwargs)

    try:
        for path, module in hearable(model) if isinstance(model, nn.Module) else ():
            hooks.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            hooks.append(module.register_forward_hook(lambda module, args, output: watcher.leave(output)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
