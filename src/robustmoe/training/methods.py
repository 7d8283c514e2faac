"""Training methods for any model: standard, on Gaussian noise, adversarial training (AT), TRADES, MART, AWP."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from robustmoe.attacks import PGD, Attack, Joint, Objective, Wrapped, changed, kl
from robustmoe.models.base import RoutedModel
from robustmoe.noise import Noise
from robustmoe.training.auxiliary import BalanceLoss, auxiliary, check_balance_loss
from robustmoe.training.mixup import CrossEntropy, Labelled, mixed
from robustmoe.training.phases import Loss, LossFunction, Method, Pair, Phase, router_noise

ROUTERS = r".*\brouters?\."
EXPERTS = rf"(?!{ROUTERS})"
ALL = ""
"""Parameters by their names: the routers', all others, every one."""

Moves = Literal["all", "experts", "routers"]


def check_weight(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must be 0 or more; got {value}")


def _one_phase(moves: Moves, loss: LossFunction, attack: Attack | None = None) -> Method:
    """``loss`` alone, on all parameters ("experts": all but the routers')."""
    params = {"all": ALL, "experts": EXPERTS, "routers": ROUTERS}[moves]
    return Method((Phase(moves, params, loss),), attack)


def _classification(
    label_smoothing: float,
    balance: float,
    balance_loss: BalanceLoss,
    mixup: float,
    loss: CrossEntropy,
    attack: Attack | None = None,
    sigma: float = 0.0,
) -> LossFunction:
    """Cross-entropy and the routers' loss on clean, attacked, or (``sigma`` above 0) noisy images."""
    for name, weight in (("balance", balance), ("mixup", mixup)):
        check_weight(name, weight)
    check_balance_loss(balance_loss)

    def of_batch(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        given = mixed(x, y, noise, mixup) if mixup else Labelled(x, y)
        x_adv = None if attack is None else attack(model, given.x, given.label, noise)
        seen = given.x if x_adv is None else x_adv
        if sigma:
            seen = seen + sigma * noise.fold(GAUSSIAN).normal(*x.shape[1:]).to(x)
        output = model.run(seen, noise=router_noise(noise))
        value = given.cross_entropy(output.logits, label_smoothing, loss)
        value = value + auxiliary(output.trace, balance, balance_loss)
        right = (output.logits.argmax(1) == given.label).sum()
        return Loss(value, right, None if x_adv is None else Pair(given.x, x_adv))

    return of_batch


GAUSSIAN = zlib.crc32(b"gaussian")


def standard(
    label_smoothing: float = 0.0,
    balance: float = 0.0,
    balance_loss: BalanceLoss = "switch",
    moves: Moves = "all",
    mixup: float = 0.0,
    loss: CrossEntropy = "softmax",
) -> Method:
    """Cross-entropy on clean images. ``balance``: weight of the routers' loss of the name ``balance_loss`` (see
    `robustmoe.training.auxiliary`). ``moves``: the parameters that move, "all", the "routers" alone, or the "experts"
    (all but the routers'): with a recipe's ``init``, to harden one part of a trained model. ``mixup``: above 0, images
    and labels are mixed by shares from Beta(mixup, mixup), see `robustmoe.training.mixup`. ``loss``: "sigmoid" in place
    of the softmax's cross-entropy that of a sigmoid for each class, V-MoE's.
    """
    return _one_phase(moves, _classification(label_smoothing, balance, balance_loss, mixup, loss))


def gaussian(
    sigma: float = 0.25,
    label_smoothing: float = 0.0,
    balance: float = 0.0,
    balance_loss: BalanceLoss = "switch",
    moves: Moves = "all",
    mixup: float = 0.0,
    loss: CrossEntropy = "softmax",
) -> Method:
    """Cross-entropy on images plus noise from N(0, sigma^2), the training for randomised smoothing (Lecuyer et al.
    2019; Cohen et al. 2019): one fresh noisy copy of an image a step.

    ``sigma``: in pixels of [0, 1]; the noisy images are not clipped, as in `robustmoe.certification.Smoothing`.
    ``label_smoothing``, ``balance_loss``, ``moves``, ``mixup``, ``loss``: as in `standard`; ``balance`` too, on the
    noisy images.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be above 0, in pixels of [0, 1]; got {sigma}")
    return _one_phase(moves, _classification(label_smoothing, balance, balance_loss, mixup, loss, sigma=sigma))


def at(
    attack: Attack,
    label_smoothing: float = 0.0,
    balance: float = 0.0,
    balance_loss: BalanceLoss = "switch",
    moves: Moves = "all",
    mixup: float = 0.0,
    loss: CrossEntropy = "softmax",
) -> Method:
    """Adversarial training (Madry et al. 2018): cross-entropy on the images as ``attack`` leaves them.

    ``label_smoothing``, ``balance``, ``balance_loss``: as in `standard`, on the attacked images. The attack runs on the
    model in eval mode. With ``pgd(linf(8/255), steps=1, step_size=10/255, keep=last)`` it is the one-step training of
    Wong et al. 2020. ``moves``, ``loss``: as there (the attack climbs its own); ``mixup``: as there, the mixed image
    attacked as one of the label that has the larger share.
    """
    return _one_phase(moves, _classification(label_smoothing, balance, balance_loss, mixup, loss, attack), attack)


def trades(
    attack: Attack,
    beta: float = 6.0,
    balance: float = 0.0,
    balance_loss: BalanceLoss = "switch",
    moves: Moves = "all",
) -> Method:
    """TRADES (Zhang et al. 2019): cross-entropy on clean images + ``beta`` * KL(clean || attacked), the attack climbing
    that KL.

    A `PGD` whose objective is the plain cross-entropy is taken with the KL loss instead, as in the paper. The KL is a
    mean over the batch, its gradient flows through both sides (as released); the clean and the attacked batch pass in
    train mode one after the other. ``balance``, ``balance_loss``: as in `standard`, on the clean images;
    ``moves``: as there.
    """
    check_weight("beta", beta)
    check_weight("balance", balance)
    check_balance_loss(balance_loss)
    climb = climbing(attack, Joint("kl"))
    return _one_phase(moves, trades_loss(climb, beta, balance, balance_loss), climb)


def mart(
    attack: Attack,
    beta: float = 6.0,
    balance: float = 0.0,
    balance_loss: BalanceLoss = "switch",
    moves: Moves = "all",
) -> Method:
    """MART (Wang et al., ICLR 2020): -log q_y - log(1 - max_{k != y} q_k) + ``beta`` * KL(p || q) (1 - p_y), p the
    softmax of the clean and q of the attacked image; the mean over images.

    In log space; the released code adds small numbers inside the logarithms. The attack climbs its own objective (the
    paper's the cross-entropy); both batches pass in train mode, clean first. The default beta is that of the released
    function, whose script for ResNet-18 says 5. ``balance``, ``balance_loss``: as in `standard`, on the
    attacked images; ``moves``: as there.
    """
    check_weight("beta", beta)
    check_weight("balance", balance)
    check_balance_loss(balance_loss)

    def loss(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        x_adv = attack(model, x, y, noise)
        draws = router_noise(noise)
        clean, attacked = model.run(x, noise=draws).logits, model.run(x_adv, noise=draws)
        value = mart_loss(clean, attacked.logits, y, beta) + auxiliary(attacked.trace, balance, balance_loss)
        return Loss(value, (attacked.logits.argmax(1) == y).sum(), Pair(x, x_adv))

    return _one_phase(moves, loss, attack)


def mart_loss(
    clean: Float[Tensor, "n c"], attacked: Float[Tensor, "n c"], y: Int[Tensor, " n"], beta: float
) -> Float[Tensor, ""]:
    """Returns the loss of `mart` from the logits of both."""
    log_q = torch.log_softmax(attacked, 1)
    label = F.one_hot(y, log_q.shape[1]).bool()
    rival = F.one_hot(log_q.masked_fill(label, -torch.inf).argmax(1), log_q.shape[1]).bool()
    others = torch.logsumexp(log_q.masked_fill(rival, -torch.inf), 1)
    missing = 1 - torch.softmax(clean, 1)[label]
    return (others.neg() - log_q[label] + beta * kl(clean, attacked) * missing).mean()


def awp(method: Method, gamma: float = 0.005, start: float = 0.0) -> Method:
    """``method`` with adversarial weight perturbation (AWP, Wu et al., NeurIPS 2020) in every phase, of the weights
    that it moves: see `robustmoe.training.uphill`.

    ``gamma``: how far each weight matrix is moved, as a share of its norm (the paper's default). ``start``: the share
    of the training before which there is none. A step costs one more pass forward and back, no further attack.
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be above 0, a share of the weights' norm; got {gamma}")
    if not 0 <= start < 1:
        raise ValueError(f"start must be in [0, 1), a share of the training; got {start}")

    def phases(progress: float) -> tuple[Phase, ...]:
        now = method.at(progress).phases
        return tuple(replace(phase, awp=gamma) for phase in now) if progress >= start else now

    return replace(method, phases=phases(start), ramp=phases if start or method.ramp else None)


def climbing(attack: Attack, objective: Objective) -> Attack:
    """``attack`` with ``objective`` where it names none of its own (a `PGD` of the plain cross-entropy)."""
    inner = attack.inner if isinstance(attack, Wrapped) else attack
    plain = isinstance(inner, PGD) and inner.objective == Joint()
    return changed(attack, objective=objective) if plain else attack


def trades_loss(
    attack: Attack, beta: float, balance: float = 0.0, balance_loss: BalanceLoss = "switch"
) -> LossFunction:
    """CE(clean) + beta * KL(clean || attacked), a mean over the batch; see `trades`."""

    def loss(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        x_adv = attack(model, x, y, noise)
        draws = router_noise(noise)
        clean, attacked = model.run(x, noise=draws), model.run(x_adv, noise=draws).logits
        value = F.cross_entropy(clean.logits, y) + beta * kl(clean.logits, attacked).mean()
        value = value + auxiliary(clean.trace, balance, balance_loss)
        return Loss(value, (attacked.argmax(1) == y).sum(), Pair(x, x_adv))

    return loss
