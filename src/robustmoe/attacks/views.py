"""Views of a routed model: the same weights with another route, or another gradient of the route, for an attack to
climb. The exact model judges.

A hard route hides the router from every gradient, and a saturated gate nearly does; an attack that climbs a view sees
it again (Athalye et al. 2018 call it a differentiable approximation). Nothing a view says is believed: `attack_view` is
a `Surrogate`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe import spec as specs
from robustmoe.attacks.base import Attack, Wrapped, changed
from robustmoe.attacks.fmn import FMN
from robustmoe.attacks.half import LowPrecision
from robustmoe.attacks.surrogate import Surrogate, exact_of
from robustmoe.errors import UserError
from robustmoe.models.base import Output, RoutedModel
from robustmoe.models.dual import DualModel
from robustmoe.noise import Noise
from robustmoe.routing import Routing, Tape, Trace, soft

COLDEST = 1e-9
"""The lowest temperature of a soft gate: logits over it stay finite."""

Rule = Callable[[str, Routing], Routing]
"""(router's name, what it decided) -> what to use instead."""
Count = Callable[[int, bool], None]


class RuleTape(Tape):
    """Hands ``rule(name, fresh)`` to the tape beneath (default: a new one), so a decision forced there wins over the
    rule. ``fresh``: what each router itself decided.
    """

    def __init__(self, rule: Rule, beneath: Tape | None = None) -> None:
        self.rule = rule
        self.beneath = Tape() if beneath is None else beneath
        self.forced, self.trace, self._prefix = self.beneath.forced, self.beneath.trace, ""
        self.noise = self.beneath.noise
        self.fresh: Trace = {}

    def under(self, prefix: str) -> RuleTape:
        inner = RuleTape(self.rule, self.beneath.under(prefix))
        inner.fresh, inner._prefix = self.fresh, f"{self._prefix}{prefix}."
        return inner

    def __call__(self, name: str, fresh: Routing) -> Routing:
        full = self._prefix + name
        self.fresh[full] = fresh
        return self.beneath(name, self.rule(full, fresh))


class View(ABC):
    """How a model is seen. Subclasses are frozen dataclasses and stand in `VIEWS`.

    ``same_value``: the view's logits are the exact ones, only its gradient differs.
    """

    same_value: ClassVar[bool] = False

    @abstractmethod
    def rule(self, name: str, fresh: Routing) -> Routing:
        """What to use for a router's own decision."""

    def body(self, model: RoutedModel, x: Tensor, tape: Tape, count: Count, sole: str | None) -> Float[Tensor, "n c"]:
        """The logits seen. ``count(n, gradient)`` is called for every pass after the first. ``sole``: the model's
        `sole_router`.
        """
        return model.ask(x, RuleTape(self.rule, tape))

    def of(self, model: RoutedModel, count: Count) -> RoutedModel:
        """The model seen. A dual model is seen half by half, and blended as it was at this moment; bf16 stays bf16."""
        if isinstance(model, LowPrecision):
            return LowPrecision(self.of(model.model, count))
        if isinstance(model, DualModel):
            return self.of_dual(model, count)
        return _Seen(model, self, count)

    def of_dual(self, model: DualModel, count: Count) -> DualModel:
        """Both halves seen, each with its own routers, under the model's own blend."""
        standard, robust = self.of(model.standard, count), self.of(model.robust, count)
        return DualModel(standard, robust, model.alpha, model.mix, model.sharpen, model.mixer)

    def passes(self, output: Output) -> int:
        """Passes of the model in one of the view."""
        return 1


@dataclass(frozen=True)
class Exact(View):
    """The model as it is."""

    same_value: ClassVar[bool] = True

    def rule(self, name: str, fresh: Routing) -> Routing:
        return fresh


@dataclass(frozen=True)
class StraightThrough(View):
    """The exact values; backward, each chosen weight moves also with its softmax probability, or with its logit
    ("identity"). ``surrogate``: "softmax" or "identity"; only "softmax" shows the logits of the unchosen.
    """

    same_value: ClassVar[bool] = True
    surrogate: Literal["softmax", "identity"] = "softmax"

    def rule(self, name: str, fresh: Routing) -> Routing:
        score = fresh.logits if self.surrogate == "identity" else torch.softmax(fresh.logits, -1)
        score = score.gather(-1, fresh.index)
        return Routing(fresh.logits, fresh.index, fresh.weight + (score - score.detach()))


@dataclass(frozen=True)
class Soft(View):
    """All experts, by softmax(logits / ``temperature``).

    With one top-1 router that decides once an image: log sum_k softmax(g / T)_k p_k(y | x), over one forced pass for
    each expert, in log space; for T -> 0 the exact prediction. Otherwise (several routers, tokens, k above 1) the
    experts are mixed in the layer, as the layer mixes its chosen ones. The halves of a dual model are softened each in
    its own way, then blended; a further pass of one half counts as a pass.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not COLDEST <= self.temperature < math.inf:
            raise UserError(f"temperature must be above 0, a number from {COLDEST:g}; got {self.temperature}")

    def rule(self, name: str, fresh: Routing) -> Routing:
        return soft(fresh.logits, self.temperature)

    def body(self, model: RoutedModel, x: Tensor, tape: Tape, count: Count, sole: str | None) -> Float[Tensor, "n c"]:
        if sole is None:
            return model.ask(x, RuleTape(self.rule, tape))
        first = RuleTape(ExpertView(0).rule)
        outputs = [model.ask(x, first)]
        given = self.rule(sole, first.fresh[sole])
        used = tape(sole, given)
        gradient = torch.is_grad_enabled() and x.requires_grad
        if used is not given:  # the route is held from outside
            count(len(x), gradient)
            return model.ask(x, Tape({sole: used}))
        for expert in range(1, given.num_experts):
            count(len(x), gradient)
            outputs.append(model.ask(x, RuleTape(ExpertView(expert).rule)))
        gate = torch.log_softmax(given.logits[:, 0] / self.temperature, -1)
        return torch.logsumexp(gate[:, :, None] + torch.log_softmax(torch.stack(outputs, 1), -1), 1)

    def passes(self, output: Output) -> int:
        parts = halves(output.trace)
        if parts:
            return sum(self.passes(Output(output.logits, trace)) for trace in parts.values()) - 1
        name = sole_router(output.trace)
        return 1 if name is None else output.trace[name].num_experts


@dataclass(frozen=True)
class ExpertView(View):
    """Every item to expert ``k`` with weight 1, at every router: an attack on it transfers from that expert."""

    k: int = 0

    def rule(self, name: str, fresh: Routing) -> Routing:
        if not 0 <= self.k < fresh.num_experts:
            raise UserError(f"expert {self.k} does not exist at {name!r}: it has experts 0 to {fresh.num_experts - 1}")
        ones = torch.ones_like(fresh.logits[..., :1])
        return Routing(fresh.logits, torch.full_like(ones, self.k, dtype=torch.long), ones)


@dataclass(frozen=True)
class HalfView(View):
    """One half of a dual model alone, before any sharpening; the other one only records its routes. An attack on it
    transfers to the blend, past a sharpening that hides the gradient (cf. MixedNUTS, arXiv 2402.02263).
    ``half``: "robust" or "standard".

    UserError for any other model.
    """

    half: Literal["standard", "robust"] = "robust"

    def rule(self, name: str, fresh: Routing) -> Routing:
        return fresh

    def of(self, model: RoutedModel, count: Count) -> RoutedModel:
        if not isinstance(model, LowPrecision | DualModel):
            raise UserError(
                f"the view half({self.half}) is one half of a dual model, such as dual(resnet8, resnet8); this model "
                f"is a {type(model).__name__}"
            )
        return super().of(model, count)

    def of_dual(self, model: DualModel, count: Count) -> DualModel:
        return model.at(1.0 if self.half == "robust" else 0.0)


def sole_router(trace: Trace) -> str | None:
    """The name of the only router, where it picks one of several experts once an image."""
    routers = image_routers(trace)
    return next(iter(routers)) if len(routers) == len(trace) == 1 else None


def image_routers(trace: Trace) -> Trace:
    """The routers that leave experts out, where each of them picks one expert once an image; {} where one does not."""
    routers = {name: routing for name, routing in trace.items() if routing.k < routing.num_experts}
    return routers if all(tuple(routing.index.shape[1:]) == (1, 1) for routing in routers.values()) else {}


def halves(trace: Trace) -> dict[str, Trace]:
    """The traces of a dual model's halves, "standard" and "robust", by the routers' names there; {} for another model
    (and for a dual of two dense networks, which leaves no trace).
    """
    traces: dict[str, Trace] = {"standard": {}, "robust": {}}
    for full, routing in trace.items():
        half, _, name = full.partition(".")
        if half not in traces or not name:
            return {}
        traces[half][name] = routing
    return traces if trace else {}


VIEWS: dict[str, Callable[..., View]] = {
    "exact": Exact,
    "straight_through": StraightThrough,
    "soft": Soft,
    "expert": ExpertView,
    "half": HalfView,
}


class _Seen(RoutedModel):
    """``model`` through ``view``. ``count``: see `View.body`. How many routers a model has, one image tells, once."""

    def __init__(self, model: RoutedModel, view: View, count: Count) -> None:
        super().__init__()
        self.model = model
        self.view = view
        self.count = count
        self._sole: list[str | None] = []

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        if not self._sole:
            with torch.no_grad():
                self._sole.append(sole_router(self.model.run(x[:1]).trace))
        return self.view.body(self.model, x, tape, self.count, self._sole[0])


def _uncounted(n: int, gradient: bool) -> None:
    pass


def attack_view(model: RoutedModel, view: View | str) -> Surrogate:
    """``model`` as ``view`` (or its spec, "soft(0.3)") shows it, judged by ``model``; of a `Surrogate`, its climbed
    part, judged by its exact one.

    Where the view keeps the values, the judge is asked only about images that the view calls broken; otherwise about
    all. A dense model looks the same in every view.
    """
    if isinstance(view, str):
        view = cast(View, specs.build(view, "view"))
    given = isinstance(model, Surrogate)
    if isinstance(view, Exact) and isinstance(model, Surrogate):
        return model
    climbed, on_pass = (model.climbed, model.on_pass) if isinstance(model, Surrogate) else (model, None)
    close = view.same_value and (not given or bool(model.close))
    seen = climbed if isinstance(view, Exact) else view.of(climbed, on_pass or _uncounted)
    return Surrogate(seen, exact_of(model), close=close, on_pass=on_pass)


@dataclass(frozen=True)
class Viewed(Wrapped):
    """``attack`` through ``view``: the view is climbed, the exact model says what is broken."""

    view: View
    attack: Attack

    def queries(self, output: Output) -> int:
        """The attack's passes, each as many as the view's; a view of other values is judged once a gradient."""
        queries = self.attack.queries(output)
        return queries * self.view.passes(output) + (0 if self.view.same_value else -(-queries // 3))

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return self.attack(attack_view(model, self.view), x, y, noise)


def at_radius(attack: Attack, eps: float) -> Attack:
    """The attack at another radius, in pixels; a step size that it names is scaled with it."""
    changes: dict[str, object] = {"threat": dataclasses.replace(attack.threat, eps=eps)}
    step = getattr(attack.inner if isinstance(attack, Wrapped) else attack, "step_size", None)
    if step is not None and attack.threat.eps > 0 and not isinstance(attack, FMN):  # FMN's search knows no eps
        changes["step_size"] = step * eps / attack.threat.eps
    return changed(attack, **changes)


def each_expert(attack: Attack, output: Output) -> list[tuple[str, Attack]]:
    """``attack`` on every single expert in turn, by name ("expert 0", ...), for a model that gave ``output``: transfer
    from the experts. Routers of different sizes share the experts that all of them have; none for a dense model.
    """
    experts = min((routing.num_experts for routing in output.trace.values()), default=0)
    return [(f"expert {k}", Viewed(ExpertView(k), attack)) for k in range(experts)]
