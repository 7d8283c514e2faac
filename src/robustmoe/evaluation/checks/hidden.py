"""Check R18: does the model route, though it does not say so?

What is looked for: choices whose result reaches the logits, modules that run or not as the image wants it, soft gates
over alike modules, and names. What is declared (the routers of the trace) is held meanwhile, so that it is none.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustmoe.attacks.base import evaluating
from robustmoe.evaluation.checks.inside import Inside, built_in, called, innermost, modules_read_by, uncompiled
from robustmoe.evaluation.checks.registry import Answer, check
from robustmoe.evaluation.checks.subject import Subject
from robustmoe.models.base import RoutedModel
from robustmoe.models.foreign import hearable
from robustmoe.routing import Routing, Trace, detach
from robustmoe.wrapping import find_routers
from robustmoe.wrapping.codecs import text_of
from robustmoe.wrapping.watching import SHAPED, Watcher, dimension, entering, tensors_of

FEW = 8
"""Images that are looked at, together and one by one."""

MOST = 64
"""A choice among more is hardly one of experts (of a codebook's words, of an attention's keys): it warns."""

CHOOSES = frozenset({"topk", "argmax", "argmin", "max", "min", "sort", "argsort", "multinomial", "gumbel_softmax"})
"""Calls that choose: their integers are a choice; of topk and max the values too, once something is compared with them.
"""

LARGEST = frozenset({"topk", "max", "min", "amax", "amin", "kthvalue"})
COMPARES = frozenset({"eq", "ne", "gt", "ge", "lt", "le", "greater", "less", "greater_equal", "less_equal", "isin"})

NAMES = re.compile(r"MoE|Moe(?![a-z])|(?<![A-Za-z])moe(?![a-z])|[Rr]out(?:er|ing)|[Ee]xpert|[Mm]ixture_?[Oo]f")
"""What routers, experts and their layers are called; a gate is also a part of many a dense layer."""

KEEPS = frozenset(
    {"getitem", "get", "unsqueeze", "squeeze", "view", "reshape", "expand", "detach", "clone", "to", "sub"}
)
"""Calls whose result still is the largest number, up to its shape and scale."""


class Choice(NamedTuple):
    """A call that may gate: ``call`` among so many ``choices`` in a module. ``kind``: "hard" (integers, a threshold),
    "value" (the largest numbers, of which a comparison makes a choice), "soft" (a softmax).
    """

    path: str
    module: str
    call: str
    choices: int
    kind: str


class Choices(Watcher):
    """The mode of the check: which choices each tensor depends on. ``images``: how many are asked about."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images
        self._choices: dict[int, tuple[Tensor, frozenset[Choice]]] = {}
        self.read: set[Choice] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        given = [*tensors_of((args, kwargs))]
        known = [tensor for tensor in given if self.knows(tensor)]
        before = frozenset().union(*(self.of(tensor) for tensor in given))
        kept = frozenset(choice for choice in before if choice.kind != "value" or name in KEEPS | LARGEST)
        result = super().__torch_function__(func, types, args, kwargs)
        if name in ("item", "tolist", "int", "index", "bool", "numpy"):
            self.read |= before
        if before or known:
            results = [args[0]] if name == "setitem" else [*tensors_of(result)]
            for tensor in results if name not in SHAPED else ():
                self._choices[id(tensor)] = tensor, kept | self._made(name, args, kwargs, known, before, tensor)
        return result

    def of(self, tensor: Tensor) -> frozenset[Choice]:
        """The choices that a tensor depends on."""
        return self._choices[id(tensor)][1] if id(tensor) in self._choices else frozenset()

    def _made(
        self, name: str, args: Any, kwargs: Any, known: list[Tensor], before: frozenset[Choice], result: Tensor
    ) -> frozenset[Choice]:
        """The choice that this call makes, if it makes one in this result."""
        whole = not result.is_floating_point()
        if name in COMPARES:
            values = [choice for choice in before if choice.kind == "value"]
            return frozenset(choice._replace(kind="hard") for choice in values) | self._threshold(name, known, result)
        if name not in CHOOSES | LARGEST | {"softmax"} or not known or not known[0].is_floating_point():
            return frozenset()
        dim = dimension(name, args, kwargs) if name not in ("amax", "amin", "argmin") else -1
        dim = 0 if dim is None and known[0].ndim == 1 else dim
        if dim is None or known[0].ndim == 0:
            return frozenset()
        choices = known[0].shape[dim]
        hard = name in CHOOSES and (whole or name == "gumbel_softmax")
        kind = "hard" if hard else "soft" if name == "softmax" else "value"
        return frozenset({Choice(*self.where, name, choices, kind)})

    def _threshold(self, name: str, known: list[Tensor], result: Tensor) -> frozenset[Choice]:
        """A comparison that gives one yes or no an image, not the same for all images."""
        if result.dtype != torch.bool or result.numel() != self.images or not known or self.images < 2:
            return frozenset()
        return frozenset(
            {Choice(*self.where, f"{name} (a threshold)", 2, "hard")} if result.any() != result.all() else ()
        )


class Sign(NamedTuple):
    """One sign of routing: a sentence, and whether nothing but routing gives it."""

    text: str
    sure: bool


@check("R18", "hidden routers", "model", "cheap")
def hidden(case: Subject) -> Answer:
    """Routing that the model does not declare. A route that is not declared is attacked by none of the attacks on
    routers, and behind a hard one there is no gradient: its robust accuracy says little.

    It fails for a choice among at most 64 (a topk, an argmax, a threshold) on which the logits depend, for modules that
    run for one image and not for another (or on other numbers of items), for a softmax over as many as there are alike
    modules beside it, and for a routed model that runs inside without telling its routes. It warns for choices among
    more, and where only names say so.
    """
    if built_in(case.model):
        return Answer("pass", 0, "every part is one of this package or of torch.nn: its routers are declared")
    trace = detach(case.output.trace)
    with evaluating(case.model), uncompiled(), torch.no_grad():
        signs = [*_untold(case, trace), *_chosen(case.model, case.whole.x[:FEW], trace)]
        signs += _conditional(case.model, case.whole.x[:FEW], trace)
        signs = signs or _named(case.model, trace)
    if not signs:
        return Answer("pass", 0, "no routing was seen" if not trace else "no routing was seen but the declared one")
    sure = any(sign.sure for sign in signs)
    said = "; ".join(dict.fromkeys(sign.text for sign in signs if sign.sure >= sure))
    text = f"routing that is not declared: {said}"
    with evaluating(case.model), uncompiled():
        advice = _advice(case.model, case.whole.x[:FEW])
    return Answer("fail" if sure else "warn", len(signs), f"{text}. {advice}")


def _advice(model: RoutedModel, x: Tensor) -> str:
    """What to do, with the routers and their codecs as `find_routers` guesses them."""
    inner = innermost(model)
    parts = Inside.of(model).named_modules()
    routed = next((path for path, module in parts if path and isinstance(module, RoutedModel)), None)
    if routed is not None:
        return (
            f"{routed!r} is a RoutedModel: call it as it is, on the same images, uncompiled; then its routes are told"
        )
    if not isinstance(inner, nn.Module):
        name = next(iter(modules_read_by(inner)), "module")
        return f"Give a module in place of the function, wrapped: rm.wrap({name}, example=x)"
    with contextlib.suppress(Exception):  # a guess at a model that may be anything
        routers = {path: text_of(codec) for path, codec in find_routers(inner, x).routers.items()}
        if 0 < len(routers) <= 2:
            return f"Wrap it, so that its routers are attacked: rm.wrap(model, {routers}, example=x)"
    return "Wrap it, so that its routers are attacked: rm.wrap(model, example=x); rm.find_routers(model, x) lists them"


def _held(trace: Trace, rows: list[int]) -> dict[str, Routing] | None:
    held = {name: routing[torch.tensor(rows, device=routing.index.device)] for name, routing in trace.items()}
    return held or None


def _untold(case: Subject, trace: Trace) -> list[Sign]:
    """Routers that are told only where nothing is compiled."""
    more = set(case.model.run(case.whole.x[:FEW]).trace) - set(trace)
    if not more:
        return []
    text = f"router {sorted(more)[0]!r} runs inside what torch.compile made; give the model that was compiled"
    return [Sign(text, True)]


def _chosen(model: RoutedModel, x: Tensor, trace: Trace) -> list[Sign]:
    """Choices on which the logits depend, the declared routers held."""
    inside, watcher = Inside.of(model, _held(trace, list(range(len(x))))), Choices(len(x))
    at = x.detach().clone()
    watcher.image(at)
    with entering(inside, watcher), watcher:
        logits = inside(at)
    modules = dict(inside.named_modules())
    signs = []
    for choice in sorted(watcher.of(logits) | watcher.read):
        if any(choice.path == name or (name and choice.path.startswith(f"{name}.")) for name in trace):
            continue  # a declared router's own affair: its gates may be its own while its choice is held
        where = called(choice.path, choice.module)
        alike = _alike_beside(modules, choice)
        reaches = choice in watcher.of(logits)
        if choice.kind == "hard" and (reaches or alike):
            of = f" of {choice.choices}" if "threshold" not in choice.call else ""
            signs.append(Sign(f"{choice.call}{of} in {where} decides what the logits are made of", _few(choice)))
        elif choice.kind == "soft" and reaches and alike:
            text = f"a softmax over {choice.choices} in {where} weights as many alike modules ({alike})"
            signs.append(Sign(text, True))
    return signs


def _few(choice: Choice) -> bool:
    return choice.choices <= MOST


def _alike_beside(modules: Mapping[str, nn.Module], choice: Choice) -> str:
    """The path of as many alike modules as there are choices, in the module that chooses or in the one around it; of
    experts by their name also of modules, or of one tensor's weights, of which the choices are a multiple (slots).
    """
    around = {choice.path, choice.path.rpartition(".")[0]}
    for path, module in modules.items():
        if path not in around and path.rpartition(".")[0] not in around:
            continue
        named = bool(NAMES.search(f"{path} {type(module).__name__}"))
        if _many(module, choice.choices, multiple=named):
            return path or type(module).__name__
    return ""


def _many(module: nn.Module, count: int, multiple: bool) -> bool:
    """Whether a module is a list of ``count`` alike modules; with ``multiple``, also of a divisor of it, or holds
    weights of so many experts in one tensor.
    """
    sizes = [len(module)] if isinstance(module, nn.ModuleList | nn.ModuleDict) and _alike(module) else []
    if multiple:
        sizes += [len(weight) for weight in module.parameters(recurse=False) if weight.ndim >= 3]
    return any(size > 1 and (size == count or (multiple and count % size == 0)) for size in sizes)


def _alike(group: nn.ModuleList | nn.ModuleDict) -> bool:
    """Whether all modules of a group are the same but for their weights, which they have."""
    members = list(group.children())
    shapes = [[(name, weight.shape) for name, weight in member.named_parameters()] for member in members]
    return len(members) > 1 and bool(shapes[0]) and len({repr(member) for member in members}) == 1


def _conditional(model: RoutedModel, x: Tensor, trace: Trace) -> list[Sign]:
    """Modules that one image runs and another does not, or on other numbers of items, the declared routers held."""
    inside = Inside.of(model, _held(trace, [0]))
    try:
        steps = [_steps(inside, x[i : i + 1]) for i in (0, *range(len(x)))]
    except Exception:  # the model does not take one image alone; check H4 says so
        return []
    if steps[0] != steps[1]:  # it is random, or keeps something: R7 and R13 say so
        return []
    first, modules = steps[0], dict(inside.named_modules())
    differ = [path for path in modules if any(step.get(path) != first.get(path) for step in steps)]
    outer = [path for path in differ if path.rpartition(".")[0] not in differ]
    if not outer:
        return []
    names = " and ".join(called(path, type(modules[path]).__name__) for path in outer[:2])
    more = f" ({len(outer)} in all)" if len(outer) > 2 else ""
    return [Sign(f"{names}{more} run on so many items as each image wants", True)]


def _steps(inside: Inside, x: Tensor) -> dict[str, Counter[tuple[int, ...]]]:
    """How often each module ran on an input of which shape."""
    steps: dict[str, Counter[tuple[int, ...]]] = {}

    def noting(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            shape = next((tuple(t.shape) for t in tensors_of((args, kwargs))), ())
            steps.setdefault(path, Counter())[shape] += 1

        return hook

    hooks = [
        module.register_forward_pre_hook(noting(path), with_kwargs=True) for path, module in hearable(inside) if path
    ]
    try:
        inside(x)
    finally:
        for hook in hooks:
            hook.remove()
    return steps


def _named(model: RoutedModel, trace: Trace) -> list[Sign]:
    """Names alone, where no router is declared: what is scripted, or runs outside of torch, is not seen."""
    if trace:
        return []
    named = [
        called(path, type(module).__name__)
        for path, module in Inside.of(model).named_modules()
        if path and NAMES.search(f"{path.rpartition('.')[2]} {type(module).__name__}")
    ]
    return [Sign(f"{named[0]} has the name of a part of a mixture of experts", False)] if named else []
