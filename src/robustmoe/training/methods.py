"""Training methods for any model: standard, adversarial training (AT), TRADES."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe import distributed
from robustmoe.attacks import PGD, Attack, Joint, kl
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Routing
from robustmoe.training.phases import Loss, LossFunction, Method, Phase

ALL = ""  # every name matches


def load_balance(routing: Routing) -> Tensor:
    """e * sum over experts of (share of the decisions) * (mean router probability) - 1: 0 when balanced (Fedus et al.
    2021, Switch).

    The shares carry no gradient; over several processes they are those of the global batch, so that the averaged
    gradient is the global one.
    """
    share = routing.chosen().float().mean((0, 1)) / routing.k
    share = distributed.all_reduce_sum(share.detach()) / distributed.world()
    return routing.num_experts * (share * torch.softmax(routing.logits, -1).mean((0, 1))).sum() - 1


def _auxiliary(output: Output, balance: float) -> Tensor:
    """What a training loss adds for the routers; never part of what an attack climbs."""
    zero = output.logits.new_zeros(())
    return balance * sum((load_balance(routing) for routing in output.trace.values()), zero) if balance else zero


def _check_weight(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must be 0 or more; got {value}")


def _classification(label_smoothing: float, balance: float, attack: Attack | None) -> LossFunction:
    def loss(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        output = model.run(x if attack is None else attack(model, x, y, noise))
        value = F.cross_entropy(output.logits, y, label_smoothing=label_smoothing)
        return Loss(value + _auxiliary(output, balance), (output.logits.argmax(1) == y).sum())

    return loss


def standard(label_smoothing: float = 0.0, balance: float = 0.0) -> Method:
    """Cross-entropy on clean images. ``balance``: weight of the routers' `load_balance` loss."""
    _check_weight("balance", balance)
    return Method((Phase("all", ALL, _classification(label_smoothing, balance, None)),))


def at(attack: Attack, label_smoothing: float = 0.0, balance: float = 0.0) -> Method:
    """Adversarial training (Madry et al. 2018): cross-entropy on the images as ``attack`` leaves them.

    The attack runs on the model in eval mode. With ``pgd(linf(8/255), steps=1, step_size=10/255, keep=last)`` it is the
    one-step training of Wong et al. 2020. ``balance``: weight of the routers' `load_balance` loss.
    """
    _check_weight("balance", balance)
    return Method((Phase("all", ALL, _classification(label_smoothing, balance, attack)),), attack)


def trades(attack: Attack, beta: float = 6.0, balance: float = 0.0) -> Method:
    """TRADES (Zhang et al. 2019): cross-entropy on clean images + beta * KL(clean || attacked), the attack climbing
    that KL.

    A `PGD` whose objective is the plain cross-entropy is taken with the KL loss instead, as in the paper. The KL is a
    mean over the batch, its gradient flows through both sides (as released); the clean and the attacked batch pass in
    train mode one after the other. ``balance``: weight of the routers' `load_balance` loss on the clean images.
    """
    _check_weight("beta", beta)
    _check_weight("balance", balance)
    climb = (
        replace(attack, objective=Joint("kl")) if isinstance(attack, PGD) and attack.objective == Joint() else attack
    )

    def loss(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        x_adv = climb(model, x, y, noise)
        clean, attacked = model.run(x), model.run(x_adv).logits
        value = F.cross_entropy(clean.logits, y) + beta * kl(clean.logits, attacked).mean() + _auxiliary(clean, balance)
        return Loss(value, (attacked.argmax(1) == y).sum())

    return Method((Phase("all", ALL, loss),), climb)
