"""One pass of a foreign model with its decisions on a tape: hooks on its routers, and calls intercepted inside them.

Everything lives as long as the pass. Hooks know the pass that they belong to (a context variable), so passes that are
nested or run in several threads do not mix.
"""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustmoe import compat
from robustmoe.errors import UserError
from robustmoe.routing import Routing, Tape
from robustmoe.wrapping.codecs import SOFT, CallCodec, SlotsCodec, text_of
from robustmoe.wrapping.draws import drawn, rewound
from robustmoe.wrapping.own import OwnGates, own_weights
from robustmoe.wrapping.said import Codec, Said, logarithm
from robustmoe.wrapping.watching import dimension, tensors_of

SQUASHES = frozenset({"softmax", "sigmoid"})
CHOOSES = frozenset({"topk", "argmax", "max", "sort", "argsort"})
RESHAPES = frozenset({"float", "to", "type_as", "view", "reshape", "contiguous", "squeeze", "unsqueeze", "flatten"})


@dataclass(frozen=True)
class Site:
    """A place where a model decides: the ``path`` of the module ("" is the model itself) and the ``codec``. The other
    fields are `Said`'s.
    """

    path: str
    codec: Codec
    swapped: bool = False
    same: bool = True
    wide: bool = False

    @property
    def name(self) -> str:
        """The router's name in a trace; its second call in a pass is "name#2"."""
        return self.path or "model"


@dataclass(eq=False)
class _Call:
    """A call of a router's module that runs now."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: TorchFunctionMode
    drawn: int


_current: contextvars.ContextVar[Pass | None] = contextvars.ContextVar("robustmoe_pass", default=None)


class Pass:
    """Inside ``with Pass(...)`` the model's decisions go through the tape. ``images``: how many the pass is of.

    Raises UserError, from inside the model, where a router does not say what its codec is for.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], tape: Tape, images: int) -> None:
        self.tape, self.images = tape, images
        self._model, self._sites = model, sites
        self._modules = dict(model.named_modules())
        self._hooks: list[Any] = []
        self._modes: list[TorchFunctionMode] = []
        self._running: dict[str, list[_Call]] = {}
        self._depth: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._heard: dict[str, Tensor] = {}

    def __enter__(self) -> Pass:
        self._token = _current.set(self)
        try:
            for site in self._sites:
                self._watch(site)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        while self._modes:  # a pass that was stopped in the middle of a router
            self._modes.pop().__exit__(None, None, None)
        _current.reset(self._token)

    # -------------------------------------------------------------------------------------------- hooks

    def _watch(self, site: Site) -> None:
        module = self._modules[site.path]
        before = self._mine(lambda module, args, kwargs: self._begin(site, module, args, kwargs))
        after = self._mine(lambda module, args, kwargs, output: self._end(site, module, output))
        self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        if site.codec.call:
            for inner in module.modules():
                if inner is not module:
                    self._hooks.append(inner.register_forward_pre_hook(self._mine(self._deeper(site, 1))))
                    self._hooks.append(
                        inner.register_forward_hook(self._mine(self._deeper(site, -1)), always_call=True)
                    )
        elif isinstance(site.codec.logits, str):
            path = site.codec.logits
            hear = self._mine(lambda module, args, output: self._heard.__setitem__(path, output))
            self._hooks.append(self._modules[path].register_forward_hook(hear))

    def _mine(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, for this pass alone."""
        return lambda *args: hook(*args) if _current.get() is self else None

    def _deeper(self, site: Site, step: int) -> Callable[..., None]:
        def count(*args: Any) -> None:
            self._depth[site.path] += step

        return count

    def _begin(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mode: TorchFunctionMode
        mode = Intercept(self, site) if site.codec.call else Listen()
        self._running.setdefault(site.path, []).append(_Call(args, kwargs, mode, drawn()))
        mode.__enter__()
        self._modes.append(mode)

    def _end(self, site: Site, module: nn.Module, output: Any) -> Any:
        call = self._running[site.path].pop()
        self._modes.remove(call.mode)
        call.mode.__exit__(None, None, None)
        if output is None or site.codec.call:  # None: it was stopped by an error
            return None
        assert isinstance(call.mode, Listen)
        path = site.codec.logits
        logits = self._heard.get(path) if isinstance(path, str) else call.mode.logits
        said = self.said(site, output, logits, call.mode.chosen_by)

        def own(index: Tensor) -> Tensor:
            with rewound(call.drawn):
                return own_weights(site.codec, said, module, (call.args, call.kwargs), index)

        return self.decide(site, said, own)

    # -------------------------------------------------------------------------------------------- decisions

    def said(self, site: Site, output: Any, logits: Tensor | None, chosen_by: Tensor | None = None) -> Said:
        """What a router said in this pass."""
        return Said(output, self.images, logits, chosen_by, site.swapped, site.same, site.wide)

    def decide(self, site: Site, said: Said, own: Callable[[Tensor], Tensor]) -> Any:
        """Hands the decision to the tape; returns what the router is to say instead, None where it stays as it is.
        ``own``: the weights that the router gives to experts (n, t, k).
        """
        fresh, used, name = self.taken(site, said, own)
        return None if used is fresh else self.written(site, said, used, name)

    def written(self, site: Site, said: Said, used: Routing, name: str) -> Any:
        """What the router is to say. (Reading and writing are not the model's own calls: no mode sees them.)"""
        try:
            with compat.unseen():
                return site.codec.write(said, used)
        except ValueError as error:
            raise UserError(f"router {name!r} cannot be forced so: {error}") from error

    def taken(self, site: Site, said: Said, own: Callable[[Tensor], Tensor]) -> tuple[Routing, Routing, str]:
        """The router's own decision, the tape's, and the name in the trace."""
        self._calls[site.path] += 1
        count = self._calls[site.path]
        name = site.name if count == 1 else f"{site.name}#{count}"
        try:
            with compat.unseen():
                fresh = site.codec.read(said)
        except ValueError as error:
            raise UserError(f"router {name!r} cannot be read by {text_of(site.codec)}: {error}") from error
        if isinstance(self.tape, OwnGates):
            self.tape.own = own
        return fresh, self.tape(name, fresh), name

    def inside(self, site: Site) -> bool:
        """Whether the module of the site itself runs, and none inside it."""
        return self._depth[site.path] == 0


class Listen(TorchFunctionMode):
    """Inside a router: the scores that its softmax (or sigmoid) was given, else its top-k; and what the last top-k was
    given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logits: Tensor | None = None
        self._given: Tensor | None = None
        self._squashed: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        result = func(*args, **kwargs)
        if name in SQUASHES and self._squashed is None:
            self.logits, self._squashed = next(tensors_of((args, kwargs)), None), result
        elif name in CHOOSES and dimension(name, args, kwargs) is not None:
            self._given = next(tensors_of((args, kwargs)), None)
            self.logits = self._given if self.logits is None else self.logits
        return result

    @property
    def chosen_by(self) -> Tensor | None:
        """What the last top-k was given. Scores to which a bias was added without gradient move as they did before."""
        given, before = self._given, self._squashed
        if given is None or before is None or given.requires_grad or given.shape != before.shape:
            return given
        return given + (before - before.detach())


class Intercept(TorchFunctionMode):
    """Inside the module of a site: the calls of its codec become decisions."""

    def __init__(self, inside: Pass, site: Site) -> None:
        super().__init__()
        self.inside, self.site = inside, site
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._number = 0
        self._slots: dict[str, Tensor | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        result = func(*args, **kwargs)
        if name == self.site.codec.call and self.inside.inside(self.site):
            given = next(tensors_of((args, kwargs)), None)
            dim = dimension(name, args, kwargs)
            if given is not None and dim is not None and given.ndim > 1:
                if isinstance(self.site.codec, SlotsCodec):
                    return self._slotted(given, dim % given.ndim, result)
                if dim % given.ndim == given.ndim - 1 or name == "one_hot":
                    instead = self._call(name, given, result)
                    result = result if instead is None else instead
        self._follow(func, name, args, kwargs, result)
        return result

    def _call(self, name: str, given: Tensor, result: Any) -> Any:
        number, self._number = self._number, self._number + 1
        codec = self.site.codec
        assert isinstance(codec, CallCodec)
        if codec.nth is not None and codec.nth != number:
            return None
        logits = result.to(torch.get_default_dtype()) if name == "one_hot" else self._source(given)
        said = self.inside.said(self.site, result, given if name in SOFT else logits)

        def own(index: Tensor) -> Tensor:
            if name in ("argmax", "one_hot"):
                return torch.ones_like(index, dtype=said.items(given).dtype)
            if name in SOFT:
                return said.items(result).gather(-1, index)
            values = said.items(given).gather(-1, index)
            return codec.weigh(values)

        return self.inside.decide(self.site, said, own)

    def _slotted(self, given: Tensor, dim: int, result: Tensor) -> Tensor:
        """The two softmax calls of Soft MoE are one decision: the first takes it."""
        role = "dispatch" if dim == 1 else "combine"
        if role not in self._slots:
            codec, said = self.site.codec, self.inside.said(self.site, None, given)
            fresh, used, router = self.inside.taken(
                self.site, said, lambda index: fresh_weight(codec.read(said), index)
            )
            written = (None, None) if used is fresh else self.inside.written(self.site, said, used, router)
            self._slots = {"dispatch": written[0], "combine": written[1]}
        value = self._slots.pop(role)
        return result if value is None else value.reshape(result.shape).to(result.dtype)

    def _follow(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Remembers what a softmax or sigmoid was given, also where its result changes its shape afterwards."""
        given = next(tensors_of((args, kwargs)), None)
        if given is None or not isinstance(result, Tensor):
            return
        if name in SQUASHES:
            self._before[id(result)] = (result, given)
        elif name in RESHAPES and id(given) in self._before and args and args[0] is given:
            self._before[id(result)] = (result, func(self._before[id(given)][1], *args[1:], **kwargs))

    def _source(self, given: Tensor) -> Tensor:
        """The logits behind the scores of a call."""
        if id(given) in self._before:
            return self._before[id(given)][1]
        with torch.no_grad():
            sums = given.sum(-1)
            share = bool((given >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
        return logarithm(given) if share else given


def fresh_weight(fresh: Routing, index: Tensor) -> Tensor:
    """The weights that a decision of all experts gives to these."""
    empty = torch.zeros_like(fresh.logits)
    return empty.scatter(-1, fresh.index, fresh.weight).gather(-1, index)
