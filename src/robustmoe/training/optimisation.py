"""Optimisers and schedules as values: what a recipe writes down, and what it becomes for a phase's parameters."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustmoe.distributed import is_spread, own_part
from robustmoe.errors import UserError


class OptimizerSpec(ABC):
    """A frozen description; ``lr`` is the largest learning rate, which a schedule scales."""

    lr: float

    @abstractmethod
    def make(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Returns a fresh optimiser over ``parameters``. A gradient that is put into ``grad`` by hand has to lie in
        memory as its parameter does: on CPUs torch's fused optimisers (as of 2.13) take both for lists of numbers.
        """

    def over(self, named: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """Returns a fresh optimiser over the parameters ``named``; override it where their names matter."""
        return self.make(named.values())


def _check(lr: float, weight_decay: float, **shares: float) -> None:
    if not 0 < lr < math.inf or not 0 <= weight_decay < math.inf:
        raise ValueError(f"lr must be above 0, weight_decay 0 or more, both finite; got {lr} and {weight_decay}")
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be at least 0 and below 1; got {share}")


def _fused(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether torch updates these in one pass over each: where all are whole, on a CPU or a CUDA device. Of a model of
    many experts, each of which sees few images, the update is much of a step.
    """
    return all(not is_spread(each) and each.device.type in ("cpu", "cuda") for each in parameters)


@dataclass(frozen=True)
class SGD(OptimizerSpec):
    """Stochastic gradient descent. ``momentum``: the share of the last step that a step keeps; ``nesterov``: momentum
    in Nesterov's form. ``undecayed``: parameters whose names begin with this regular expression have no weight decay;
    the others all have.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    undecayed: str = ""

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, momentum=self.momentum)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        try:
            re.compile(self.undecayed)
        except re.error as error:
            raise ValueError(f"undecayed must be a regular expression; got {self.undecayed!r} ({error})") from None

    def make(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        every = list(parameters)
        decay, fused = self.weight_decay, _fused(every)
        return torch.optim.SGD(every, self.lr, self.momentum, weight_decay=decay, nesterov=self.nesterov, fused=fused)

    def over(self, named: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """Raises UserError where ``undecayed`` names no parameter."""
        if not self.undecayed:
            return self.make(named.values())
        free = [name for name in named if re.match(self.undecayed, name)]
        if not free:
            raise UserError(f"undecayed={self.undecayed!r} names no parameter; expected names such as {min(named)!r}")
        optimiser = self.make(parameter for name, parameter in named.items() if name not in free)
        optimiser.add_param_group({"params": [named[name] for name in free], "weight_decay": 0.0})
        return optimiser


@dataclass(frozen=True)
class AdamW(OptimizerSpec):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019). ``beta1``, ``beta2``: how slowly the means of the
    gradient and of its square forget."""

    lr: float = 1e-3
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, beta1=self.beta1, beta2=self.beta2)

    def make(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        every = list(parameters)
        betas, fused = (self.beta1, self.beta2), _fused(every)
        return torch.optim.AdamW(every, self.lr, betas, weight_decay=self.weight_decay, fused=fused)


Schedule = Callable[[float], float]
"""Progress of the run in [0, 1] -> multiplier of the learning rate."""


def constant() -> Schedule:
    """1 throughout."""
    return lambda progress: 1.0


def cosine(warmup: float = 0.0) -> Schedule:
    """Linear from 0 during the first ``warmup`` share of the run, then half a cosine to 0."""
    _check_share("warmup", warmup)

    def multiplier(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))

    return multiplier


def one_cycle(rise: float = 0.4) -> Schedule:
    """Linear from 0 to 1 during the first ``rise`` share, then linear to 0 (Smith and Topin 2018, as fast adversarial
    training uses it).
    """
    _check_share("rise", rise)

    def multiplier(progress: float) -> float:
        return progress / rise if progress < rise else (1 - progress) / (1 - rise)

    return multiplier


def poly(power: float = 0.9) -> Schedule:
    """(1 - progress)^``power``, as in Robust Experts' code (arXiv 2509.05086)."""
    if not 0 < power < math.inf:
        raise ValueError(f"power must be above 0; got {power}")
    return lambda progress: (1 - progress) ** power


def step(milestones: tuple[float, ...] = (0.5, 0.75), factor: float = 0.1) -> Schedule:
    """Times ``factor`` at each of ``milestones``, given as shares of the run."""
    for milestone in milestones:
        _check_share("milestones", milestone)
    return lambda progress: factor ** sum(progress >= milestone for milestone in milestones)


def cyclic(cycles: float = 1.0, low: float = 0.5) -> Schedule:
    """Triangles between ``low`` and 1, ``cycles`` of them in the run, each rising first (Smith 2017)."""
    _check_share("low", low)
    if not cycles > 0:
        raise ValueError(f"cycles must be above 0; got {cycles}")

    def multiplier(progress: float) -> float:
        place = progress * cycles % 1
        return low + (1 - low) * (1 - abs(2 * place - 1))

    return multiplier


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), a share of the run; got {value}")


OPTIMIZERS: dict[str, Callable[..., OptimizerSpec]] = {"sgd": SGD, "adamw": AdamW}
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "cyclic": cyclic,
    "one_cycle": one_cycle,
    "poly": poly,
    "step": step,
}


class Average:
    """Exponential moving average of a model's parameters and floating buffers; ``decay`` is warmed up as min(decay,
    (1 + t) / (10 + t)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in model.state_dict().items():
            mean, now = own_part(self.state[name]), own_part(value)
            if value.is_floating_point():
                mean.lerp_(now, weight)
            else:
                mean.copy_(now)

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        return {"steps": self.steps, "state": self.state}

    def load_state_dict(self, saved: dict) -> None:
        self.steps = saved["steps"]
        self.state = {name: value.clone() for name, value in saved["state"].items()}
