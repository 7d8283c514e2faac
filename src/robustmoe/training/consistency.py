"""Consistency of routers (or logits) between an image and its attacked twin, added to the loss of any method."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe.attacks import Attack, evaluating, kl
from robustmoe.errors import UserError
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.training.auxiliary import in_global_batch
from robustmoe.training.methods import check_weight
from robustmoe.training.phases import Loss, LossFunction, Method, Pair, Phase

Consistency = Literal["kl", "jsd", "prc", "lipschitz"]
Of = Literal["router", "model"]

Logits = Float[Tensor, "n t e"]


def consistent(
    method: Method,
    loss: Consistency = "kl",
    weight: float = 1.0,
    of: Of = "router",
    attack: Attack | None = None,
) -> Method:
    """``method`` with ``weight`` * a loss of what changes between clean and attacked images added to every phase.

    ``loss``: "kl", KL(clean || attacked); "jsd", their Jensen-Shannon divergence; "prc", the co-assignment matrix of
    Kada et al. 2025 towards the identity, which spreads the load too (see `prc`; theirs pairs two geometric views, here
    it is the same token clean and attacked); "lipschitz", the squared change over that of the pixels (J-TLAT, arXiv
    2602.01369). ``of``: of the "router", every router's logits, a mean over the routers, or of the "model", its logits
    (not with "prc").

    The attacked images are the ones the phase itself trains on. With ``attack`` they are made anew, for a term with an
    attack of its own (``pgd(linf(8/255), objective=router_only)``, say); a method without an attack needs it. A phase
    that attacks nothing, of a method that does, attacks for this term. The term takes two further passes, with the
    model in eval mode (no noise, running statistics) and with gradient on both sides. Raises ValueError where there is
    no attack, and for loss=prc of=model.
    """
    check_weight("weight", weight)
    check_consistency(loss)
    if of == "model" and loss == "prc":
        raise ValueError("loss=prc balances what it is of, and classes are not to be balanced; expected of=router")
    against = attack or method.attack
    if against is None:
        raise ValueError(
            "consistent compares clean with attacked images, and this method has no attack; give one with attack=, "
            "such as attack=pgd(linf(8/255), steps=2)"
        )

    def with_term(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        terms = (Consistent(phase.loss, loss, weight, of, against, anew=attack is not None) for phase in phases)
        return tuple(replace(phase, loss=term) for phase, term in zip(phases, terms))

    ramp = method.ramp
    later = None if ramp is None else lambda progress: with_term(ramp(progress))
    return Method(with_term(method.phases), method.attack or attack, method.threat, later)


@dataclass(frozen=True)
class Consistent:
    """The loss of `consistent` in one phase, a `LossFunction`: that of ``own``, and the term."""

    own: LossFunction
    loss: Consistency
    weight: float
    of: Of
    attack: Attack
    anew: bool

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        """Returns the loss with what `consistent` adds to it."""
        own = self.own(model, x, y, noise)
        if not self.weight:
            return own
        pair = own.pair
        if pair is None or self.anew:
            pair = Pair(x, self.attack(model, x, y, noise.fold(CONSISTENCY)))
        with evaluating(model):
            clean, attacked = model.run(pair.x), model.run(pair.x_adv)
        return own._replace(value=own.value + self.weight * self.term(clean, attacked, pair))

    def term(self, clean: Output, attacked: Output, pair: Pair) -> Float[Tensor, ""]:
        """Returns the loss of two passes over the images ``pair``: of the model, or the mean over its routers."""
        if self.of == "model":
            return LOSSES[self.loss](clean.logits[:, None], attacked.logits[:, None], pair)
        if not clean.trace:
            raise UserError("consistent(of=router) needs a model with a router; this one is dense: expected of=model")
        pairs = ((routing.logits, attacked.trace[name].logits) for name, routing in clean.trace.items())
        return torch.stack([LOSSES[self.loss](before, after, pair) for before, after in pairs]).mean()


CONSISTENCY = zlib.crc32(b"consistency")


def divergence(clean: Logits, attacked: Logits, pair: Pair) -> Float[Tensor, ""]:
    """KL(clean || attacked), the mean over items."""
    return kl(clean, attacked).mean()


def jensen_shannon(clean: Logits, attacked: Logits, pair: Pair) -> Float[Tensor, ""]:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, the mean over items: from 0 to log 2."""
    log_p, log_q = torch.log_softmax(clean, -1), torch.log_softmax(attacked, -1)
    log_m = torch.logaddexp(log_p, log_q)  # log 2 too large, and log_softmax in kl takes that off again
    return (kl(log_p, log_m) + kl(log_q, log_m)).mean() / 2


def prc(clean: Logits, attacked: Logits, pair: Pair) -> Float[Tensor, ""]:
    """0.005 * mean (M_ii - 1)^2 + 0.05 * mean over i != j of M_ij^2, with M = e * the mean over items of p_clean
    p_attacked^T (the patch-wise routing consistency of Kada et al. 2025, with the weights of its code): 0 where every
    item is sure of one expert, the same in both, and every expert has its share. M is that of the global batch. Theirs
    is not adversarial: its pairs are the same patch in two geometric views of an image.
    """
    experts = clean.shape[-1]
    p, q = torch.softmax(clean, -1).flatten(0, 1), torch.softmax(attacked, -1).flatten(0, 1)
    matrix = experts * in_global_batch(p.T @ q / len(p))
    same = torch.diagonal(matrix)
    others = (matrix - torch.diag(same)).square().sum() / max(1, experts * (experts - 1))
    return 0.005 * (same - 1).square().mean() + 0.05 * others


def lipschitz(clean: Logits, attacked: Logits, pair: Pair) -> Float[Tensor, ""]:
    """Returns the mean over images of MSE(clean, attacked) / MSE(x, x_adv), the latter in pixels of [0, 1]. An image
    moved by less than 1e-4 (root mean square) counts as moved by that: an attack may leave an image as it is.
    """
    moved = (pair.x_adv - pair.x).flatten(1).square().mean(1)
    change = (clean - attacked).flatten(1).square().mean(1)
    return (change / moved.clamp(min=1e-8)).mean()


LOSSES: dict[Consistency, Callable[[Logits, Logits, Pair], Tensor]] = {
    "kl": divergence,
    "jsd": jensen_shannon,
    "prc": prc,
    "lipschitz": lipschitz,
}


def check_consistency(loss: str) -> None:
    """Raises ValueError where there is no loss of that name."""
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
