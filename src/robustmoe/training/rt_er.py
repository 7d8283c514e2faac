"""RT-ER (Zhang et al., ICML 2025, eq. 2): adversarial training of a whole MoE, and of one more expert for each image.

The paper's text could not be read in full; what is called released is the code of the authors' repository. There the
router is never trained, BatchNorm sees one image at a time and the attack has no random start; none of that is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe.attacks import Attack, Held, Joint, changed, evaluating, kl
from robustmoe.attacks.routes.reach import reachable, route_radius
from robustmoe.models.base import RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Trace, detach, to_expert, to_rank
from robustmoe.training.auxiliary import BalanceLoss, auxiliary, check_balance_loss
from robustmoe.training.methods import ALL, check_weight
from robustmoe.training.phases import Loss, Method, Pair, Phase, router_noise

Protect = Literal["second", "random", "reachable", "all"]
Label = Literal["kl", "ce"]


def rt_er(
    attack: Attack,
    beta: float = 6.0,
    protect: Protect = "second",
    loss: Label = "kl",
    balance: float = 0.0,
    balance_loss: BalanceLoss = "switch",
    stability: float = 0.0,
) -> Method:
    """RT-ER: CE of the attacked whole + ``beta`` * the robustness of further experts, each under its own attack.

    ``protect``: which experts beside the one that serves the image. "second", the second-ranked at the clean image (the
    paper's); "random", one of the others, drawn anew each time; "reachable", every other one that the router could
    choose in the ball (see `robustmoe.attacks.routes.reach`); "all", every expert, as the released JTDMoE has it.
    ``loss``: of each, "kl", KL(clean || attacked), which is 0 for an expert that is wrong but steady; "ce",
    cross-entropy of the attacked image, which knows the label (not the paper's; a beta of 1 weighs all experts alike).
    Sums over experts, means over the batch. The attack on an expert climbs its cross-entropy, as released.

    ``balance``, ``balance_loss``: as in `at`. ``stability``: weight of mean max(0, 1 - route radius / eps) over the
    clean images, which widens the routers' margins until routes hold in the ball (not the paper's). Without a second
    expert this is `at`. The routing is fixed in the attack on the whole with ``objective=experts_only``.
    """
    for name, weight in (("beta", beta), ("balance", balance), ("stability", stability)):
        check_weight(name, weight)
    check_balance_loss(balance_loss)
    check_objective("rt_er", attack)
    phase = RTER(attack, beta, protect, loss, balance, balance_loss, stability)
    return Method((Phase("all", ALL, phase),), attack)


def check_objective(method: str, attack: Attack) -> None:
    """Raises ValueError where the attack cannot be turned on one expert."""
    try:
        changed(attack, objective=Joint())
    except TypeError:
        raise ValueError(
            f"{method} turns its attack on single experts; expected one with an objective, such as "
            f"pgd(linf(8/255), steps=10), got a {type(attack).__name__}"
        ) from None


@dataclass(frozen=True)
class RTER:
    """The loss of `rt_er`, a `LossFunction`."""

    attack: Attack
    beta: float
    protect: Protect = "second"
    loss: Label = "kl"
    balance: float = 0.0
    balance_loss: BalanceLoss = "switch"
    stability: float = 0.0

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        """Returns the loss that `rt_er` describes."""
        x_adv = self.attack(model, x, y, noise)
        attacked = model.run(x_adv, noise=router_noise(noise))
        value = F.cross_entropy(attacked.logits, y) + auxiliary(attacked.trace, self.balance, self.balance_loss)
        if self.stability:
            value = value + self.stability * unstable(model, x, self.attack)
        if self.beta:
            with evaluating(model), torch.no_grad():
                trace = detach(model.route(x))
            for number, (rows, forced) in enumerate(self._experts(model, x, trace, noise)):
                value = value + self.beta * self._of_expert(model, x, y, rows, forced, noise.fold(1, number))
        return Loss(value, (attacked.logits.argmax(1) == y).sum(), Pair(x, x_adv))

    def _experts(self, model: RoutedModel, x: Tensor, trace: Trace, noise: Noise) -> list[tuple[Tensor, Trace]]:
        """Returns which images (rows of the batch) go to which expert, to be protected there. On several processes all
        have the same number of entries, be they empty.
        """
        every = torch.arange(len(x), device=x.device)
        experts = min((routing.num_experts for routing in trace.values()), default=1)
        if experts < 2:
            return []
        if self.protect == "second":
            return [(every, to_rank(trace, 1))]
        if self.protect == "random":
            rank = 1 + (noise.fold(2).uniform() * (experts - 1)).long().clamp(max=experts - 2)
            return [(every, to_rank(trace, rank))]
        forced = [to_expert(trace, k) for k in range(experts)]
        if self.protect == "all":
            return [(every, route) for route in forced]
        within = reachable(model, x, self.attack.threat)
        turned = []
        for k, route in enumerate(forced):
            near = [within[name][:, k] & (routing.index[:, 0] != k).all(1) for name, routing in trace.items()]
            rows = torch.nonzero(torch.stack(near).any(0))[:, 0]
            turned.append((rows, {name: routing[rows] for name, routing in route.items()}))
        return turned

    def _of_expert(self, model: RoutedModel, x: Tensor, y: Tensor, rows: Tensor, forced: Trace, noise: Noise) -> Tensor:
        """Returns the sum over the images ``rows`` of the loss on the route ``forced``, over the size of the batch.
        Every router's decision is given, so that none has training noise.
        """
        images, labels = x[rows], y[rows]
        attack = changed(self.attack, objective=Held(forced))
        x_adv = attack(model, images, labels, noise[rows])
        if self.loss == "ce":
            logits = model.run(x_adv, forced=forced).logits
            return F.cross_entropy(logits, labels, reduction="sum") / len(x)
        clean = model.run(images, forced=forced).logits
        return kl(clean, model.run(x_adv, forced=forced).logits).sum() / len(x)


def unstable(model: RoutedModel, x: Tensor, attack: Attack) -> Tensor:
    """Mean over images and routers of max(0, 1 - route radius / eps): 0 where no route can leave its region (to first
    order; exact for a linear router), or no router leaves an expert out.
    """
    radii = route_radius(model, x, attack.threat.norm).values()
    each = [F.relu(1 - radius / attack.threat.eps).mean() for radius in radii]
    return torch.stack(each).mean() if each else x.new_zeros(())
