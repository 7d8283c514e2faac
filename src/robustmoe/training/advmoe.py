"""AdvMoE (Zhang et al., ICCV 2023): experts and router trained against attack in turn.

We could not read the paper's algorithm; its abstract and its released code disagree on what the router learns. Both
are here, told apart by name, with the controls that say what helps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from robustmoe.attacks import PGD, Attack, Diluted, Held, Joint, changed, evaluating, kl, linf
from robustmoe.attacks.views import RuleTape
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise, permutation
from robustmoe.routing import Routing, Tape, Trace
from robustmoe.training.auxiliary import BalanceLoss, check_balance_loss
from robustmoe.training.methods import ALL, EXPERTS, ROUTERS, check_weight, climbing, trades_loss
from robustmoe.training.phases import Loss, Method, Pair, Phase, router_noise

Variant = Literal["bilevel", "released"]
Target = Literal["residue", "random", "none"]

_ATTACK = PGD(linf(8 / 255), steps=2, step_size=5 / 255, keep="last", start="near")


def advmoe(
    attack: Attack = _ATTACK,
    variant: Variant = "bilevel",
    beta: float = 6.0,
    alpha: float = 6.0,
    target: Target = "residue",
    oracle: bool = False,
    shared_attack: bool = False,
    router_lr: float = 1.0,
    balance: float = 0.0,
    balance_loss: BalanceLoss = "switch",
) -> Method:
    """AdvMoE: on each batch the experts move, then the router, each against an attack of its own.

    ``variant``: "bilevel", what the abstract implies: both minimise the whole model's TRADES loss (``beta``), the
    router through the straight-through route and on a mini-batch of its own. "released", what the code does: the
    experts minimise TRADES; the router minimises ``alpha`` * CE(its logits, y mod E) + ``beta`` * KL(clean ||
    attacked) of its logits, and never sees the classification loss; both attacks climb the `Diluted` sum of the two KL.
    All KL are in log space; the released code's native KL has NaN gradients at large logit gaps, and trains no router.

    ``attack``: a `PGD` that names no objective climbs the variant's own; the default is the released code's (2 steps of
    5/255 from a near start). With ``objective=experts_only`` the routing is fixed. ``target`` (released): "residue", y
    mod E; "random", a fixed balanced partition of the classes (control); "none", no label target (alpha = 0). ``alpha``
    (released): the weight of the cross-entropy of the router with its label target. ``oracle`` (released): the experts
    are trained on the target's route, not on the router's. ``shared_attack`` (released): one attack for both, made
    before either moves, and forward passes shared; as L_router does not depend on the experts, this is one phase.
    ``router_lr``: the router's learning rate over the run's. ``balance`` (bilevel): weight of the ``balance_loss`` (see
    `robustmoe.training.auxiliary`) in the router's phase.

    Raises ValueError for settings that the variant does not have.
    """
    for name, value in (("beta", beta), ("alpha", alpha), ("balance", balance)):
        check_weight(name, value)
    check_balance_loss(balance_loss)
    if not router_lr > 0:
        raise ValueError(f"router_lr must be above 0; got {router_lr}")
    if variant == "bilevel":
        for name, asked in (("shared_attack", shared_attack), ("oracle", oracle), ("target", target != "residue")):
            if asked:
                raise ValueError(
                    f"{name} belongs to variant=released; the bilevel router has no label target and its own batch"
                )
        climb = climbing(attack, Joint("kl"))
        experts = Phase("experts", EXPERTS, trades_loss(climb, beta))
        router = Phase("router", ROUTERS, trades_loss(climb, beta, balance, balance_loss), own_batch=True, lr=router_lr)
        return Method((experts, router), climb)
    if balance:
        raise ValueError("balance belongs to variant=bilevel; the released router is balanced by its label target")
    if oracle and target == "none":
        raise ValueError("oracle needs a label target; expected target=residue or target=random")
    if shared_attack and router_lr != 1:
        raise ValueError("with shared_attack router and experts move in one phase; router_lr must be 1")
    released = _Released(climbing(attack, Diluted("kl", 1.0)), alpha if target != "none" else 0.0, beta, target, oracle)
    if shared_attack:
        return Method((Phase("both", ALL, released.both),), released.attack)
    return Method(
        (Phase("experts", EXPERTS, released.experts), Phase("router", ROUTERS, released.router, lr=router_lr)),
        released.attack,
    )


@dataclass(frozen=True)
class _Released:
    """The losses of the released code (``train_moe.py``, trainer), forward passes without a use left out."""

    attack: Attack
    alpha: float
    beta: float
    target: Target
    oracle: bool

    def experts(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        """CE(clean) + beta * KL(clean || attacked) of the whole model; its gradient stops at the route."""
        forced = self._oracle_route(model, x, y)
        x_adv = self._attacked(model, x, y, noise, forced)
        clean, attacked = (_run(model, images, forced, noise) for images in (x, x_adv))
        return self._experts_loss(clean, attacked, y)._replace(pair=Pair(x, x_adv))

    def router(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        """alpha * CE(router, target) + beta * KL(clean || attacked) of the router; experts run in the attack alone. Of
        what the routers decide without noise.
        """
        x_adv = self._attacked(model, x, y, noise, self._oracle_route(model, x, y))
        return Loss(self._router_loss(model, model.route(x), model.route(x_adv), x, y), None, Pair(x, x_adv))

    def both(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        """Returns the sum of the two, on one attacked batch and the same passes."""
        forced = self._oracle_route(model, x, y)
        x_adv = self._attacked(model, x, y, noise, forced)
        clean, attacked = (_run(model, images, forced, noise) for images in (x, x_adv))
        value, correct, _ = self._experts_loss(clean, attacked, y)
        value = value + self._router_loss(model, clean.trace, attacked.trace, x, y)
        return Loss(value, correct, Pair(x, x_adv))

    def _experts_loss(self, clean: Output, attacked: Output, y: Tensor) -> Loss:
        value = F.cross_entropy(clean.logits, y) + self.beta * kl(clean.logits, attacked.logits).mean()
        return Loss(value, (attacked.logits.argmax(1) == y).sum())

    def _router_loss(self, model: RoutedModel, clean: Trace, attacked: Trace, x: Tensor, y: Tensor) -> Tensor:
        """Mean over the routers."""
        losses = []
        for name, routing in clean.items():
            value = self.beta * kl(routing.logits, attacked[name].logits).mean()
            if self.alpha:
                items = routing.logits.shape[:2]
                expert = self._expert_of(model, x, y, routing.num_experts)[:, None].expand(items)
                value = value + self.alpha * F.cross_entropy(routing.logits.movedim(-1, 1), expert)
            losses.append(value)
        return torch.stack(losses).mean()

    def _attacked(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise, forced: Trace) -> Tensor:
        attack = changed(self.attack, objective=Held(forced, "kl")) if forced else self.attack
        return attack(model, x, y, noise)

    def _oracle_route(self, model: RoutedModel, x: Tensor, y: Tensor) -> Trace:
        """Sends each image to its target's expert; {} where the router decides."""
        if not self.oracle:
            return {}
        with torch.no_grad(), evaluating(model):
            trace = model.route(x)
        forced = {}
        for name, routing in trace.items():
            expert = self._expert_of(model, x, y, routing.num_experts)
            index = expert[:, None, None].expand(*routing.logits.shape[:2], 1)
            forced[name] = Routing(routing.logits, index, torch.ones_like(routing.logits[..., :1]))
        return forced

    def _expert_of(self, model: RoutedModel, x: Tensor, y: Tensor, experts: int) -> Int[Tensor, " n"]:
        """Returns the label target: class modulo E, of the classes in their own order or in a fixed random one."""
        if self.target == "residue":
            return y % experts
        with torch.no_grad(), evaluating(model):
            classes = model(x[:1]).shape[1]
        return permutation(classes, PARTITION).to(y.device)[y] % experts


PARTITION = 2308
"""The key of the random partition: the same classes go together in every run, whatever its seed."""


def _without_gradient(name: str, fresh: Routing) -> Routing:
    slots = None if fresh.slots is None else fresh.slots.detach()
    return replace(fresh, weight=fresh.weight.detach(), slots=slots)


def _run(model: RoutedModel, x: Tensor, forced: Trace, noise: Noise) -> Output:
    """Runs one pass whose logits give the routers no gradient; those of the trace do."""
    tape = RuleTape(_without_gradient, Tape(forced, router_noise(noise)))
    return Output(model.ask(x, tape), tape.trace)
