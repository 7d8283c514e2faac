"""A training method is a list of phases: who moves, on which loss. `train_step` runs them on one batch."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustmoe import distributed
from robustmoe.attacks import Attack, NotFiniteError, Threat
from robustmoe.attacks.base import remembering
from robustmoe.errors import UserError
from robustmoe.models.base import RoutedModel
from robustmoe.models.norm import BatchNorm2d
from robustmoe.models.plain import sharded
from robustmoe.noise import Noise
from robustmoe.training.scaling import LossScale
from robustmoe.training.uphill import moved, statistics_kept, steps_uphill


class Pair(NamedTuple):
    """Images x (n, ch, h, w) in [0, 1] and the same attacked."""

    x: Tensor
    x_adv: Tensor


class Loss(NamedTuple):
    """What a phase's loss gives: ``value``, the scalar to be minimised (a mean over the batch), ``correct``, how many
    images of the batch the model got right on the input it was trained on (None: it was not asked), and the ``pair``
    that it attacked (None: it attacked nothing).
    """

    value: Tensor
    correct: Tensor | None
    pair: Pair | None = None


LossFunction = Callable[[RoutedModel, Tensor, Tensor, Noise], Loss]
"""(model, x (n ch h w) in [0,1], y (n), one random stream an image) -> Loss. The model is in train mode."""


def router_noise(noise: Noise) -> Noise:
    """Returns the streams of the routers' training noise in a phase with the streams ``noise``, apart from its
    attack's. Every pass in train mode has them, the clean and the attacked one the same: what differs is the attack.
    Passes of an attack, and others in eval mode, have none.
    """
    return noise.fold(ROUTER_NOISE)


ROUTER_NOISE = zlib.crc32(b"routers")


@dataclass(frozen=True)
class Phase:
    """``params``: a regular expression; the parameters whose name it matches from the start (re.match) move, on
    ``loss``, and no others. ``own_batch``: on the step's second mini-batch. ``lr``: times the run's learning rate.
    ``needs``: the model that has such parameters, in words. ``awp``: above 0, the gamma of adversarial weight
    perturbation, of these parameters (see `robustmoe.training.uphill`).
    """

    name: str
    params: str
    loss: LossFunction
    own_batch: bool = False
    lr: float = 1.0
    needs: str = ""
    awp: float = 0.0

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Returns the parameters that move, by name. Raises UserError where there are none."""
        moving = {name: p for name, p in model.named_parameters() if p.requires_grad and re.match(self.params, name)}
        if not moving:
            expected = f"; expected {self.needs}" if self.needs else ""
            raise UserError(
                f"phase {self.name!r} moves the parameters that match {self.params!r}; this model has none{expected}"
            )
        return moving


@dataclass(frozen=True)
class Method:
    """Phases, run in this order on each batch, with one optimiser each. ``attack``: what the method trains against,
    if anything; ``threat``: the ball it trains for (by default the attack's). ``ramp``: of a method that changes while
    it trains, the phases at each moment, given as a share of the training; the same phases but for their losses.
    """

    phases: tuple[Phase, ...]
    attack: Attack | None = None
    threat: Threat | None = None
    ramp: Callable[[float], tuple[Phase, ...]] | None = None

    def at(self, progress: float) -> Method:
        """Returns the method at this share of the training, from 0 to 1."""
        return self if self.ramp is None else replace(self, phases=self.ramp(progress), ramp=None)

    @property
    def two_batches(self) -> bool:
        """Whether a step needs a second mini-batch."""
        return any(phase.own_batch for phase in self.phases)


class MiniBatch(NamedTuple):
    """Images x (n, ch, h, w) in [0, 1], labels y (n), one random stream an image."""

    x: Tensor
    y: Tensor
    noise: Noise


class StepResult(NamedTuple):
    """What one batch gave, by phase name: the loss and the gradient norm; images right and seen in the last phase that
    says, on this process; by router, the sum over phases of its gradient norms. All norms are before clipping, and all
    numbers on the host.
    """

    loss: dict[str, Tensor]
    grad_norm: dict[str, Tensor]
    correct: Tensor
    seen: int
    router_grad: dict[str, Tensor]


class TrainingStopped(UserError):
    """A loss or gradient that is not finite; the message says in which phase, step and parameter."""


def train_step(
    model: RoutedModel,
    method: Method,
    optimisers: Sequence[torch.optim.Optimizer],
    batch: MiniBatch,
    *,
    second: MiniBatch | None = None,
    autocast: torch.dtype | None = None,
    clip: float = 0.0,
    routers: Sequence[str] = (),
) -> StepResult:
    """Runs every phase of ``method`` once, on the ``batch``, or on the ``second`` where a phase wants one of its own.

    ``autocast``: the network's compute dtype; images, perturbations and parameters stay float32. ``clip``: largest
    gradient norm of a phase (0: none). On several processes each holds its share of the batch, and a phase's
    gradients are averaged. A parameter that got no gradient counts as having gradient zero.
    """
    model.train()
    losses, norms, router_grad = (dict[str, Tensor]() for _ in range(3))
    correct, seen = torch.zeros(()), 0
    for position, (phase, optimiser) in enumerate(zip(method.phases, optimisers)):
        named = phase.parameters(model)
        given = _given(phase, second if phase.own_batch else batch, position)
        scale = LossScale(optimiser) if autocast == torch.float16 else None
        loss, gradients = _gradients_of(model, phase, given, autocast, named, scale.value if scale else 1.0)
        norm = _norm(gradients.values())
        own = _router_norms(gradients, routers)
        told = _told(loss, norm, *own.values())
        if bool(torch.isfinite(told[0])):
            _move(optimiser, named, gradients, norm, clip, scale)
        elif scale is None or not scale.overflowed(told):
            raise TrainingStopped(_not_finite(phase, loss.value, gradients))
        for router, its_norm in zip(own, told[4:]):
            router_grad[router] = router_grad.get(router, torch.zeros_like(its_norm)) + its_norm
        losses[phase.name], norms[phase.name] = told[1], told[2]
        if loss.correct is not None:
            correct, seen = told[3], len(given.x)
    return StepResult(losses, norms, correct, seen, router_grad)


def _given(phase: Phase, batch: MiniBatch | None, position: int) -> MiniBatch:
    """The mini-batch of a phase, with random streams of its own."""
    if batch is None:
        raise ValueError(f"phase {phase.name!r} trains on a mini-batch of its own; give train_step second=")
    return batch._replace(noise=batch.noise.fold(position))


def _router_norms(gradients: dict[str, Tensor], routers: Sequence[str]) -> dict[str, Tensor]:
    """Returns the norm of the gradients of each of the routers that has some."""
    own = {router: [g for name, g in gradients.items() if name.startswith(f"{router}.")] for router in routers}
    return {router: _norm(some) for router, some in own.items() if some}


def _told(loss: Loss, norm: Tensor, *more: Tensor) -> Tensor:
    """Returns on the host, by one question to the device: the sum of loss and norm, which is finite where both are, the
    loss, the norm, how many images are right (0: not known), and ``more``.
    """
    value = loss.value.detach()
    right = norm.new_zeros(()) if loss.correct is None else loss.correct
    every = [norm + value, value, norm, right, *more]
    dtype = functools.reduce(torch.promote_types, (each.dtype for each in every[:3]))
    return torch.stack([each.to(dtype) for each in every]).cpu()


def _gradients_of(
    model: RoutedModel,
    phase: Phase,
    batch: MiniBatch,
    autocast: torch.dtype | None,
    named: dict[str, nn.Parameter],
    scale: float,
) -> tuple[Loss, dict[str, Tensor]]:
    """Returns the phase's loss and its gradients, at the weights or, with ``awp``, at those that it moves to. The loss
    is multiplied by ``scale``, and the gradients are divided.
    """
    if not phase.awp:
        loss = _loss(model, phase, batch, autocast)
        return loss, _gradients(model, loss.value, named, scale)
    made: list[Tensor] = []
    with remembering(made), statistics_kept(model):
        first = _gradients(model, _loss(model, phase, batch, autocast).value, named, scale)
    with remembering(made, again=True), moved(steps_uphill(named, first, phase.awp)):
        loss = _loss(model, phase, batch, autocast)
        return loss, _gradients(model, loss.value, named, scale)


def _loss(model: RoutedModel, phase: Phase, batch: MiniBatch, autocast: torch.dtype | None) -> Loss:
    """Returns the phase's loss on the batch. Raises TrainingStopped where it cannot be attacked."""
    try:
        with torch.autocast(batch.x.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            return phase.loss(model, *batch)
    except NotFiniteError as error:
        raise TrainingStopped(_not_attackable(phase, error, model)) from error


def _move(
    optimiser: torch.optim.Optimizer,
    named: dict[str, nn.Parameter],
    gradients: dict[str, Tensor],
    norm: Tensor,
    clip: float,
    scale: LossScale | None,
) -> None:
    """Takes one step along the gradients, which together have this norm and are clipped to ``clip``."""
    if scale is not None:
        scale.stepped()
    if clip > 0:
        factor = (clip / norm.clamp(min=1e-12)).clamp(max=1.0)
        for gradient in gradients.values():
            distributed.own_part(gradient).mul_(factor)
    for name, parameter in named.items():
        parameter.grad = _laid_out_as(parameter, gradients[name])
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the parameter's order of memory: a fused optimiser takes both for lists of numbers (as of torch
    2.13, on CPUs), and a convolution on channels-last images gives its gradient in theirs.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _gradients(model: nn.Module, loss: Tensor, named: dict[str, nn.Parameter], scale: float = 1.0) -> dict[str, Tensor]:
    """Returns the loss's gradients by name, averaged over the processes; zero where a parameter took no part. Backward
    the loss is ``scale`` times as large.
    """
    if not loss.requires_grad:
        raise UserError("the loss has no gradient: nothing that torch follows leads from it to the weights")
    if sharded(model):
        return _of_shards(model, loss, named)
    scaled = loss if scale == 1 else loss * scale
    if distributed.active() and not _collective(model):
        with distributed.Averaging(list(named.values())) as averaging:
            torch.autograd.grad(scaled, list(named.values()), allow_unused=True)
        averaged = averaging.means()
    else:
        raw = torch.autograd.grad(scaled, list(named.values()), allow_unused=True)
        # Copies: autograd may give two parameters one tensor, or an expanded one, and these change in place.
        gradients = [torch.zeros_like(p) if g is None else g.clone() for p, g in zip(named.values(), raw)]
        averaged = distributed.average_gradients(gradients)
    for gradient in averaged if scale != 1 else ():
        gradient.div_(scale)
    return dict(zip(named, averaged))


def _collective(model: nn.Module) -> bool:
    """Returns whether a backward pass asks the other processes: BatchNorms do, and tokens that travel to experts which
    are spread. Gradients are averaged behind such a pass, not while it runs.
    """
    normed = any(isinstance(module, BatchNorm2d | nn.SyncBatchNorm) for module in model.modules())
    return normed or any(map(distributed.is_spread, model.parameters()))


def _of_shards(model: nn.Module, loss: Tensor, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """As `_gradients`: FSDP averages, and leaves each process its part in ``grad``."""
    loss.backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    model.zero_grad(set_to_none=True)
    return gradients


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    tensors = list(tensors)
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors if not distributed.is_spread(tensor)]
    spread = [tensor for tensor in tensors if distributed.is_spread(tensor)]
    if spread:
        of_spread: Any = torch.nn.utils.get_total_norm(spread)
        norms.append(of_spread.full_tensor())
    return torch.linalg.vector_norm(torch.stack(norms))


def _not_finite(phase: Phase, loss: Tensor, gradients: dict[str, Tensor]) -> str:
    bad = _not_finite_names(gradients)
    if bad:
        where = f"the gradient of {bad[0]!r} ({len(bad)} of {len(gradients)} parameters)"
    else:
        where = "the norm of the gradient" if torch.isfinite(loss) else "the loss"
    return f"in phase {phase.name!r} {where} is not finite (loss {loss.item():g}); {_ADVICE}"


def _not_attackable(phase: Phase, error: NotFiniteError, model: nn.Module) -> str:
    bad = _not_finite_names(dict(model.named_parameters()))
    where = f" (the weights of {bad[0]!r} are not finite)" if bad else ""
    return f"in phase {phase.name!r} {error}{where}; {_ADVICE}"


def _not_finite_names(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not torch.isfinite(distributed.own_part(tensor)).all()]


_ADVICE = (
    "expected finite numbers. The last checkpoint and the best weights are kept; start anew in another --out with a "
    "smaller learning rate, clip=1, or precision=fp32"
)
