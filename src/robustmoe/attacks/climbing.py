"""The state of an APGD climb (Croce and Hein 2020 and 2021): where each image is, its best iterate, its step size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustmoe.attacks.l1 import onto_l1
from robustmoe.attacks.threat import Threat

L1_SHARE, L1_SHRUNK, L1_SLOWER, L1_SLOWEST = 0.2, 0.95, 1.5, 10.0
"""For l1 (2021, section 3.2): share of the coordinates a step moves at first; support ratio below which the climb goes
back to its best iterate at full speed; else the step is divided by the next, down to eps over the last."""


@dataclass
class Collected:
    """What a search has for each image: an image, its loss, whether it is fooled."""

    x_adv: Tensor
    loss: Tensor
    fooled: Tensor

    @classmethod
    def none(cls, x: Tensor) -> Collected:
        """Nothing yet: the clean images."""
        return cls(x.clone(), x.new_full((len(x),), -torch.inf), torch.zeros(len(x), dtype=torch.bool, device=x.device))

    def put(self, rows: Tensor, x_adv: Tensor, loss: Tensor, fooled: Tensor | bool) -> None:
        self.x_adv[rows], self.loss[rows], self.fooled[rows] = x_adv, loss.to(self.loss), fooled

    def split(self, n: int) -> list[Collected]:
        """The first n images, the next n, ..."""
        parts = zip(self.x_adv.split(n), self.loss.split(n), self.fooled.split(n), strict=True)
        return [Collected(*part) for part in parts]

    def __getitem__(self, rows: Tensor) -> Collected:
        return Collected(self.x_adv[rows], self.loss[rows], self.fooled[rows])

    def take(self, rows: Tensor, other: Collected) -> None:
        """What another restart found for the images ``rows``, none of them fooled before."""
        better = other.fooled | (other.loss > self.loss[rows])
        self.put(rows[better], other.x_adv[better], other.loss[better], other.fooled[better])


@dataclass
class Climbing:
    """The images that still climb, one row an image: all that the next step depends on."""

    threat: Threat
    eps: float
    original: bool
    left: bool  # whether images have left
    count: int  # l1: the largest number of coordinates that an image's step looks at
    place: Tensor  # (n,) which image of the climb it is
    x: Tensor
    x_adv: Tensor
    old: Tensor  # before the last step
    gradient: Tensor
    step_size: Tensor  # (n, 1, 1, 1)
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    loss: Tensor
    rises: Tensor  # (n,) steps since the last checkpoint that raised the loss
    halved: Tensor  # at the last checkpoint
    checked: Tensor  # best loss at the last checkpoint
    fooled: Tensor
    noted: Tensor  # the last fooled iterate
    lower: Tensor  # linf: ball and box
    upper: Tensor
    support: Tensor  # l1: (n,) coordinates that differed from x at the last checkpoint
    weakest: Tensor  # l1: (n,) rank, in the gradient, of the weakest coordinate that moves

    @classmethod
    def start(cls, threat: Threat, x: Tensor, x_adv: Tensor, eps: float, dense: bool, original: bool) -> Climbing:
        n, size = len(x), x[0].numel()
        zeros, no = x.new_zeros(n), torch.zeros(n, dtype=torch.bool, device=x.device)
        linf, l1 = threat.norm == "linf", threat.norm == "l1"
        if dense:
            support, share = zeros + size, torch.full((n,), L1_SHARE, device=x.device)
        else:
            support = _support(x_adv, x)
            share = support / size / 1.5
        weakest = _weakest(share, size) if l1 else no
        return cls(
            threat=threat,
            eps=eps,
            original=original,
            left=False,
            count=int(weakest.max()) + 1 if l1 else 0,
            place=torch.arange(n, device=x.device),
            x=x,
            x_adv=x_adv,
            old=x_adv,
            gradient=x_adv,
            step_size=x.new_full((n,) + (1,) * (x.ndim - 1), eps if l1 else 2.0 * eps),
            best=x_adv,
            best_gradient=x_adv,
            best_loss=zeros - torch.inf,
            loss=zeros,  # the original counts the first step as a rise if its loss is above 0
            rises=torch.zeros_like(no, dtype=torch.long),
            halved=~no,
            checked=zeros - torch.inf,
            fooled=no,
            noted=x_adv,
            lower=(x - eps).clamp_(0.0, 1.0) if linf else no,
            upper=(x + eps).clamp_(0.0, 1.0) if linf else no,
            support=support,
            weakest=weakest,
        )

    def narrow(self, stay: Tensor) -> None:
        """Go on with the images ``stay`` (m,) alone."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[stay])
        self.left = True

    def move(self, fresh: float) -> None:
        """One step; ``fresh`` is the weight of the gradient's move beside the last one's (linf and l2)."""
        here, last = self.x_adv, self.old
        self.old = here
        if self.threat.norm == "l1":
            self.x_adv = self._moved_l1()
            return
        if self.threat.norm == "linf":
            step = torch.addcmul(here, self.gradient.sign(), self.step_size).clamp_(self.lower, self.upper)
        else:
            if self.original:
                unit = self.gradient / (as_column(length_of(self.gradient), here) + 1e-12)
            else:
                unit = self.threat.direction(self.gradient, here)
            step = self._inside_l2(unit.mul_(self.step_size).add_(here))
        step = step.sub_(here).mul_(fresh).add_(here).add_(here - last, alpha=1.0 - fresh)
        self.x_adv = step.clamp_(self.lower, self.upper) if self.threat.norm == "linf" else self._inside_l2(step)

    def _inside_l2(self, x_adv: Tensor) -> Tensor:
        """Into the ball, then into the box; overwrites its argument."""
        delta = x_adv.sub_(self.x)
        length = as_column(length_of(delta), delta)
        return delta.div_(length + 1e-12).mul_(length.clamp(max=self.eps)).add_(self.x).clamp_(0.0, 1.0)

    def _moved_l1(self) -> Tensor:
        """The steepest coordinates by the same amount each, step_size together; then onto ball and box."""
        strength = self.gradient.abs().flatten(1)
        least = strength.topk(self.count, dim=1).values.gather(1, self.weakest[:, None])
        sign = self.gradient.sign() * (strength >= least).view_as(self.gradient)
        moving = as_column((sign != 0).flatten(1).sum(1), sign)
        delta = torch.addcmul(self.x_adv, sign, self.step_size / (moving + 1e-10)).sub_(self.x)
        return onto_l1(self.x, delta, self.x + delta, self.eps, self.original)

    def offer(self, loss: Tensor, counted: bool) -> None:
        """The loss (n,) where the images are now. ``counted``: after a step."""
        better = loss > self.best_loss
        column = as_column(better, self.x_adv)
        self.best = torch.where(column, self.x_adv, self.best)
        self.best_gradient = torch.where(column, self.gradient, self.best_gradient)
        self.best_loss = torch.where(better, loss, self.best_loss)
        if counted:
            self.rises += loss > self.loss
            self.loss = loss
        else:
            self.checked = self.best_loss

    def note(self, fooled: Tensor) -> None:
        self.fooled = self.fooled | fooled
        self.noted = torch.where(as_column(fooled, self.x_adv), self.x_adv, self.noted)

    def check(self, enough: float) -> None:
        """Halve the step and go back to the best iterate where too few steps have raised the loss (not more than
        ``enough``), or where the best loss has not risen since a checkpoint that did not halve (2020, section 3).
        """
        halve = (self.rises <= enough) | (~self.halved & (self.checked >= self.best_loss))
        self.step_size = torch.where(as_column(halve, self.x), self.step_size / 2.0, self.step_size)
        self.halved, self.checked, self.rises = halve, self.best_loss, torch.zeros_like(self.rises)
        self._back(halve)

    def check_l1(self) -> None:
        """Move as many coordinates as 2/3 of the best iterate's support; where that has shrunk, at full speed again
        and from the best iterate, else more slowly (2021, algorithm 1).
        """
        support = _support(self.best, self.x)
        shrunk = support / self.support < L1_SHRUNK
        slower = torch.where(as_column(shrunk, self.x), self.eps, self.step_size / L1_SLOWER)
        self.step_size = slower.clamp_(self.eps / L1_SLOWEST, self.eps)
        size = self.x[0].numel()
        self.support, self.weakest = support, _weakest(support / size / 1.5, size)
        self.count = int(self.weakest.max()) + 1
        self._back(shrunk)

    def _back(self, rows: Tensor) -> None:
        column = as_column(rows, self.x_adv)
        self.x_adv = torch.where(column, self.best, self.x_adv)
        self.gradient = torch.where(column, self.best_gradient, self.gradient)


def as_column(values: Tensor, like: Tensor) -> Tensor:
    """(n,) as (n, 1, 1, 1)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def length_of(delta: Tensor) -> Tensor:
    """The l2 norm (n,)."""
    return delta.flatten(1).square().sum(1).sqrt()


def _support(x_adv: Tensor, x: Tensor) -> Tensor:
    """(n,) the number of coordinates where they differ."""
    return (x_adv != x).flatten(1).sum(1)


def _weakest(share: Tensor, size: int) -> Tensor:
    """(n,) the rank, strongest first, of the last among a ``share`` (n,) of ``size`` coordinates."""
    return size - 1 - ((1.0 - share) * size).clamp(0, size - 1).long()
