"""The self-tests of a wrapped model: is it the same model, can it be replayed and forced, what is to be known of it?

What would make numbers wrong is refused, in one sentence that names the router. What only limits what can be said is a
note. Some tests settle how a router is read, and give back better sites.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from robustmoe import generators
from robustmoe.attacks.base import evaluating
from robustmoe.errors import UserError
from robustmoe.models.base import Output
from robustmoe.models.norm import difference, largest
from robustmoe.routing import Routing, Trace, detach, to_expert
from robustmoe.wrapping.codecs import CallCodec, FunctionsCodec, explains, text_of
from robustmoe.wrapping.finding import seen_of
from robustmoe.wrapping.findings import outermost
from robustmoe.wrapping.model import Climbs, Pick, WrappedModel
from robustmoe.wrapping.opening import Open
from robustmoe.wrapping.passes import Site
from robustmoe.wrapping.watching import Cut, Draw, watch

CLOSE = 1e-6
"""How far a replay may be off, relative to the largest logit of the example."""
APART = 1e-4
"""How far an image alone may be off the same image in its batch: sums run in another order there."""
FEW = 4
"""Images of the example that are used."""


@dataclass(frozen=True)
class Tested:
    """What the tests gave: the sites as they are to be read, the modules to climb, and the notes."""

    sites: tuple[Site, ...]
    climbs: Climbs
    notes: tuple[str, ...]


def tested(model: nn.Module, sites: Sequence[Site], example: Tensor, output: Pick, noise: str) -> Tested:
    """Runs the self-tests on the first images of the example, in eval mode. UserError where it is refused."""
    with evaluating(model), torch.no_grad():
        trial = Trial(model, tuple(sites), example[:FEW].detach(), output)
        trial.notes += [] if noise != "free" else trial.random()
        trial.unchanged()
        trial.settle_order()
        trial.settle_weights()
        trial.replayed()
        trial.differentiable()
        trial.settle_width()
        trial.forced()
        trial.alone()
        trial.explained()
        climbs = trial.gradient()
    return Tested(trial.sites, climbs, tuple(trial.notes))


class Trial:
    """A model under its self-tests. Passes draw the same random numbers each time, if the model draws any."""

    def __init__(self, model: nn.Module, sites: tuple[Site, ...], x: Tensor, output: Pick) -> None:
        self.model, self.sites, self.x, self.output = model, sites, x, output
        self.notes: list[str] = []
        seen = seen_of(model, x)
        self.draws: tuple[Draw, ...] = tuple(dict.fromkeys(seen.draws))
        self.cuts: tuple[Cut, ...] = seen.cuts

    def wrapped(self, sites: Sequence[Site] | None = None, climbs: Climbs = None) -> WrappedModel:
        """The model wrapped with these sites, its draws held."""
        return WrappedModel(
            self.model, self.sites if sites is None else sites, self.output, climbs, draws=1 if self.draws else 0
        )

    def run(self, forced: Trace | None = None, sites: Sequence[Site] | None = None, x: Tensor | None = None) -> Output:
        """A pass on the example, or other images."""
        return self.wrapped(sites).run(self.x if x is None else x, forced=forced)

    def off(self, logits: Tensor, other: Tensor) -> float:
        """The largest difference, relative to the largest logit."""
        scale = largest(other).clamp(min=torch.finfo(other.dtype).tiny)
        return float((difference(logits, other).max() / scale).nan_to_num(nan=torch.inf))

    # -------------------------------------------------------------------------------------------- the same model

    def random(self) -> list[str]:
        """A note on each module that draws random numbers."""
        return [
            f"{_named(draw.path)} ({draw.module}) draws random numbers in eval mode ({draw.call}): its answers differ "
            "from pass to pass; noise='replay' holds them, noise='average' takes the mean"
            for draw in self.draws
        ]

    def unchanged(self) -> None:
        """Watched, the model answers the same to the bit, and every router is asked."""
        bare = WrappedModel(self.model, (), self.output)
        with _seeded():
            expected = bare.run(self.x).logits
        with _seeded():
            output = WrappedModel(self.model, self.sites, self.output).run(self.x)
        for site in self.sites:
            if site.name not in output.trace:
                raise UserError(
                    f"router {site.name!r} took no decision in a pass on the example: it does not run, its call is "
                    f"another, or the model is compiled (wrap it before that); expected {_asked(site)}"
                )
        if not torch.equal(output.logits, expected):
            names = ", ".join(repr(site.name) for site in self.sites)
            off = self.off(output.logits, expected)
            raise UserError(
                f"the model answers otherwise when router {names} is watched, by {off:.1g} of its largest logit; "
                "expected the same answer to the bit, so it cannot be wrapped"
            )

    def differentiable(self) -> None:
        """The gradient of the watched model can be taken where that of the model itself can."""
        at = self.x.clone().requires_grad_(self.x.is_floating_point())
        try:
            with torch.enable_grad():
                logits = self.wrapped().run(at).logits
                if logits.requires_grad:
                    torch.autograd.grad(logits.sum(), at, allow_unused=True)
        except Exception as error:  # whatever torch says; checkpointed parts run again when nobody watches
            names = ", ".join(repr(site.name) for site in self.sites)
            raise UserError(
                f"no gradient can be taken when router {names} is watched ({type(error).__name__}); expected one: turn "
                "off gradient checkpointing, if the model has it on"
            ) from error

    def replayed(self) -> None:
        """The model on its own trace answers as it does freely; each router is asked apart, so that it can be named."""
        free = self.run()
        for name, routing in detach(free.trace).items():
            off = self.off(self.run({name: routing}).logits, free.logits)
            if not off <= CLOSE:
                raise UserError(
                    f"router {name!r}: its own decision, replayed, changes the answer by {off:.1g} of the largest "
                    f"logit; expected at most {CLOSE:g}, so {self._text(name)} does not say all that it decides"
                )

    def alone(self) -> None:
        """An image alone is answered, and routed, as in its batch; else a note says which router looks at others."""
        if len(self.x) < 2:
            return
        free, single = self.run(), self.run(x=self.x[:1])
        off = self.off(single.logits, free.logits[:1])
        moved = [name for name, r in single.trace.items() if not _alike(r, free.trace[name][:1])]
        if moved:
            self.notes.append(
                f"router {moved[0]!r} sends an image elsewhere when it is alone: its decisions depend on the other "
                "images of the batch (capacity, or statistics of the batch)"
            )
        elif off > APART:
            self.notes.append(
                f"an image alone is answered otherwise than in its batch, by {off:.1g} of the largest logit: the model "
                "mixes the images of a batch"
            )

    def explained(self) -> None:
        """A note on a router that does not choose the highest of the scores that are recorded, and on a gate that seems
        to use every expert while the code after it leaves some out.
        """
        free = self.run()
        for name, routing in detach(free.trace).items():
            least = routing.weight[..., -1:]
            if routing.k == routing.num_experts and routing.slots is None and float(least.max()) > 1e-3:
                without = replace(routing, weight=torch.cat([routing.weight[..., :-1], 0 * least], -1))
                if self.off(self.run({name: without}).logits, free.logits) <= CLOSE:
                    self.notes.append(
                        f"router {name!r} is recorded as one that uses all experts, but the code after it leaves out "
                        "those of little weight: where it changes whom it leaves out is not seen"
                    )
            if routing.k < routing.num_experts and not explains(routing.logits, routing.index):
                self.notes.append(
                    f"router {name!r} does not choose the highest of the scores that it is recorded with (noise, or a "
                    "limit that is not seen): distances to its boundaries are those of another rule"
                )

    # -------------------------------------------------------------------------------------------- how it is read

    def settle_order(self) -> None:
        """Are the items of an image side by side, or is the sequence first? What is said of an image alone tells."""
        if len(self.x) < 2:
            return
        batch, single = self.run().trace, self.run(x=self.x[-1:]).trace
        for site in self.sites:
            if batch[site.name].index.shape[1] < 2:
                continue
            if _near(single[site.name].logits, batch[site.name].logits[-1:]):
                continue
            other = replace(site, swapped=True)
            swapped = self.run(sites=[other if each is site else each for each in self.sites]).trace[site.name]
            if _near(single[site.name].logits, swapped.logits[-1:]):
                self._change(site, other)

    def settle_weights(self) -> None:
        """Does the code after an intercepted top-k divide by the sum? Then twice the weights change nothing."""
        for site in self.sites:
            if not (isinstance(site.codec, CallCodec) and site.codec.name in ("topk", "max")):
                continue
            if site.codec.weights != "values":
                continue
            free = self.run()
            own = free.trace[site.name]
            if own.k == 1 and bool((own.weight == 1).all()):
                continue
            twice = {site.name: replace(own, weight=2 * own.weight)}
            if self.off(self.run(twice).logits, free.logits) <= CLOSE:
                self._change(site, replace(site, codec=replace(site.codec, weights="renormalised")))

    def settle_width(self) -> None:
        """Does the code after a router take more experts an item than it chooses, and may one be given twice?"""
        for site in self.sites:
            free = self.run()
            own = free.trace[site.name]
            if own.k == own.num_experts:
                continue
            if own.k > 1:
                single = to_expert({site.name: own}, 0)
                same, others = (self._tried(single, replace(site, same=same)) for same in (True, False))
                if same is None or (others is not None and self.off(same, others) > CLOSE):
                    self._change(site, replace(site, same=False))
                    site = next(each for each in self.sites if each.path == site.path)
            wide = self._tried({site.name: _widened(own)}, replace(site, wide=True))
            if wide is not None and self.off(wide, free.logits) <= CLOSE:
                self._change(site, replace(site, wide=True))

    def _tried(self, forced: Trace, site: Site) -> Tensor | None:
        """The logits on a forced route, read so; None where the model does not take it."""
        try:
            return self.run(forced, [site if each.path == site.path else each for each in self.sites]).logits
        except Exception:  # whatever the foreign code raises: it takes no such decision
            return None

    def _change(self, site: Site, other: Site) -> None:
        self.sites = tuple(other if each.path == site.path else each for each in self.sites)

    # -------------------------------------------------------------------------------------------- forced

    def forced(self) -> None:
        """A forced expert alone contributes. Where the experts are modules in a list, what the others say is disturbed:
        the answer must not change; where its own is, it must.
        """
        trace = self.run().trace
        for site in self.sites:
            calls = {name: own for name, own in trace.items() if name.partition("#")[0] == site.name}
            last = trace[site.name].num_experts - 1
            try:
                answers = [self.run(to_expert(calls, expert)).logits for expert in (0, last)]
            except UserError as error:
                self.notes.append(f"{error}: attacks that force single experts do not run on it")
                continue
            if self.off(answers[0], answers[1]) <= CLOSE:
                self.notes.append(
                    f"router {site.name!r} has no say: all to expert 0 and all to expert {last} give the same answer "
                    "(equal experts, or no router)"
                )
                continue
            lists = experts_of(self.model, site.path, last + 1)
            if lists and not any(self._obeys(experts, to_expert(calls, last), answers[1]) for experts in lists):
                raise UserError(
                    f"router {site.name!r}: forced to expert {last} alone, other experts still contribute; expected "
                    f"that expert only, so {text_of(site.codec)} does not hold the route"
                )

    def _obeys(self, experts: Sequence[nn.Module], forced: Trace, answer: Tensor) -> bool:
        """Whether of these experts the last one alone has a say in a forced ``answer``."""
        with disturbed(experts[:-1]):
            others = self.run(forced).logits
        with disturbed(experts[-1:]):
            mine = self.run(forced).logits
        return self.off(others, answer) <= CLOSE < self.off(mine, answer)

    # -------------------------------------------------------------------------------------------- gradients

    def gradient(self) -> Climbs:
        """The way to climb where parts run without gradient, or a note where there is none."""
        if not self.cuts:
            return None
        places = outermost(self.cuts)
        off = [path for path, how in places if how in ("no_grad", "inference_mode")]
        ways: list[Climbs] = ["opened", *self._ways(off)] if off else []
        for climbs in ways:
            if self._climbable(climbs):
                how = dict(places)[off[0]]
                way = "the same calls with gradients on" if climbs == "opened" else "the way that it goes in training"
                self.notes.append(
                    f"{_named(off[0])} runs without gradient in eval mode ({how}); gradients are taken through "
                    f"{way}, which gives the same values"
                )
                return climbs
        for path, how in places:
            blind = how in ("no_grad", "inference_mode")
            ends = "gradient attacks are blind there" if blind else "its gradient is not that of the answer"
            self.notes.append(f"{_named(path)} passes no gradient ({how}), though the answer depends on it: {ends}")
        return None

    def _ways(self, paths: list[str]) -> Iterator[tuple[str, ...]]:
        """Which modules could say that they train: those without gradient, with what is beside their experts, with all
        that is inside them; none of torch's own (a BatchNorm would count, a dropout would drop).
        """
        modules = dict(self.model.named_modules())
        paths = [path for path in paths if path in modules]
        beside = [
            f"{path}.{name}".strip(".")
            for path in paths
            for name, child in modules[path].named_children()
            if not isinstance(child, nn.ModuleList | nn.ModuleDict)
        ]
        inside = [f"{path}.{name}".strip(".") for path in paths for name, _ in modules[path].named_modules()]
        for way in (paths, [*paths, *beside], inside):
            yield tuple(path for path in dict.fromkeys(way) if not _of_torch(modules[path]))

    def _climbable(self, climbs: Climbs) -> bool:
        """Whether this way gives equal values and a gradient, ends none, draws nothing more and moves no buffer."""
        exact = self.run().logits
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        modules = [self.model.get_submodule(path) for path in climbs] if isinstance(climbs, tuple) else []
        at = self.x.clone().requires_grad_(True)
        try:
            for module in modules:
                module.training = True
            with torch.enable_grad(), Open() if climbs == "opened" else contextlib.nullcontext():
                logits = self.wrapped().run(at).logits
                torch.autograd.grad(logits.sum(), at)
                seen = watch(self.model, self.x)
            off = any(cut.how in ("no_grad", "inference_mode") for cut in seen.cuts)
            moved = any(not torch.equal(buffers[name], buffer) for name, buffer in self.model.named_buffers())
            same = self.off(logits.detach(), exact) <= CLOSE
            return same and not moved and not off and len(seen.draws) <= len(self.draws)
        except Exception:  # whatever the foreign code raises: it is no way to go
            return False
        finally:
            for module in modules:
                module.training = False
            for name, buffer in self.model.named_buffers():
                if not torch.equal(buffers[name], buffer):
                    buffer.copy_(buffers[name])

    def _text(self, name: str) -> str:
        site = next(site for site in self.sites if site.name == name.partition("#")[0])
        return text_of(site.codec)


def experts_of(model: nn.Module, path: str, experts: int) -> list[list[nn.Module]]:
    """The lists of so many modules at, or beside, the module at ``path``."""
    lists = []
    for near in dict.fromkeys((path, path.rpartition(".")[0])):
        module = model.get_submodule(near)
        for inside in (module, *module.children(), *(g for c in module.children() for g in c.children())):
            if isinstance(inside, nn.ModuleList) and len(inside) == experts:
                lists.append(list(inside))
    return lists


@contextlib.contextmanager
def disturbed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, what these modules say is off, by another amount in each feature (a norm takes equal ones out again)."""

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        return output + torch.arange(output.numel(), device=output.device).remainder(7).view(output.shape)

    hooks = [module.register_forward_hook(disturb) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Torch's generators start at the same place inside, and are where they were afterwards."""
    with generators.seeded(0):
        yield


def _widened(own: Routing) -> Routing:
    """The same decision, written with every expert, those that are not chosen with weight 0."""
    missing = own.logits.detach().masked_fill(
        torch.zeros_like(own.logits, dtype=torch.bool).scatter(-1, own.index, True), -torch.inf
    )
    rest = torch.argsort(missing, dim=-1, descending=True, stable=True)[..., : own.num_experts - own.k]
    return Routing(
        own.logits,
        torch.cat([own.index, rest], -1),
        torch.cat([own.weight, torch.zeros_like(rest, dtype=own.weight.dtype)], -1),
    )


def _alike(a: Routing, b: Routing) -> bool:
    return torch.equal(a.chosen(), b.chosen())


def _near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _named(path: str) -> str:
    return f"module {path!r}" if path else "the model itself"


def _asked(site: Site) -> str:
    if isinstance(site.codec, FunctionsCodec) or not site.codec.call:
        return f"the module at {site.path!r} to run"
    return f"a call of {site.codec.call} in the forward of {site.name!r} itself"
