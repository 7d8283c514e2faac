"""The Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049): random search over square windows, forward passes
only.

The l1 form is that of Croce and Hein (2021, arXiv 2103.01208), as in the released AutoAttack.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe import asking
from robustmoe.attacks import schedule
from robustmoe.attacks.base import Attack
from robustmoe.attacks.finite import require_finite
from robustmoe.attacks.l1 import fitted, l1_excess
from robustmoe.attacks.late import Late, Pending
from robustmoe.attacks.objectives import Inner, Joint, Objective, Score
from robustmoe.attacks.square_draws import ByBatch, ByImage, Draws, Stretch
from robustmoe.attacks.threat import Norm, Threat
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise

BLOCK = 128
"""Most iterations whose random numbers are drawn at once."""

FEW, SMALL, WIDE, WASTE = 48, 784, 128, 0.1
"""Several successive proposals of each image are asked in one pass: up to ``FEW`` in all whatever becomes of them, half
as many of images of more than ``SMALL`` pixels, and up to ``WIDE`` where few would be discarded (at most ``WASTE`` kept
among an image's). Results do not depend on it, the cost of an image does: it falls up to a pass of so many."""

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Iterations (of 10,000) after which the window's share of the image halves (the paper's section 4, released code)."""

TABLE = 2.0
"""Useless linf proposals are remembered where there are at most so many different ones for each iteration on them."""


@dataclass
class Search:
    """The images not yet fooled: ``rows`` in the batch, clean ``x``, ``best`` proposals so far with their ``loss``.

    ``idle`` (linf): which windows of the side ``side`` and signs cannot help, as they would change nothing or were
    refused since the image last changed; (n, 2^c * positions). ``rate``: share of proposals kept lately.
    """

    rows: Tensor
    x: Tensor
    best: Tensor
    loss: Tensor
    idle: Tensor | None = None
    side: int = 0
    rate: float = 0.5

    def of(self, stay: Tensor) -> Search:
        """The same search with the images ``stay`` alone."""
        idle = None if self.idle is None else self.idle[stay]
        return Search(self.rows[stay], self.x[stay], self.best[stay], self.loss[stay], idle, self.side, self.rate)


class Turn(NamedTuple):
    """A pass: proposals of the images ``i`` at the places ``j`` of the stretch, their ``score``, and what was
    ``before``: where each image was, which were fooled, and the search's best, loss and idle.
    """

    i: Tensor
    j: Tensor
    proposal: Tensor
    score: Score
    pending: Pending
    at: Tensor
    fooled: Tensor
    before: tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Square(Attack):
    """Random search over square windows, by forward passes alone: no gradient is asked for.

    ``steps``: proposals an image and restart (the released code's queries; the start is one more). A proposal is kept
    where it raises the loss or fools; an image leaves as soon as it is fooled, and a not-fooled one comes back clean.
    ``restarts``: later ones attack the images not yet fooled. ``p_init``: share of the image that the first windows
    cover; it halves on the paper's schedule for 10,000 iterations, ``rescale``: on that schedule shrunk to ``steps``
    (AutoAttack does not). ``loss``: the margin, or "ce".

    ``rng``: "image" gives every image its own windows and signs, so that the result does not depend on the batch, and
    draws window positions from all there are; "autoattack" reproduces the released code's stream, where the images of a
    batch share them and the last row and column of positions is never drawn. (There a tie of the two best logits also
    counts as fooled; here the prediction decides.)

    Proposals that provably cannot help (linf: they change nothing, or were refused since the image last changed) count
    but are not asked, and where few images are left several successive proposals are asked in one pass, and those after
    the first one kept are discarded: the result is that of the sequential search, up to rounding in the model.
    """

    threat: Threat
    steps: int = 5000
    restarts: int = 1
    p_init: float = 0.8
    rescale: bool = False
    loss: Literal["margin", "ce"] = "margin"
    rng: Literal["image", "autoattack"] = "image"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1; got {self.steps} and {self.restarts}")
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init, a share of the image, must be above 0 and at most 1; got {self.p_init}")

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        """The loss of the whole model: random search needs no declared gradient, so no router hides from it."""
        return Joint(self.loss)

    @property
    def needs_gradient(self) -> bool:
        return False

    def queries(self, output: Output) -> int:
        return 1 + self.restarts * (1 + self.steps)

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        released = ByBatch(torch.Generator().manual_seed(self.seed), self.threat.norm)
        x_adv = x.clone()
        with torch.no_grad():
            inner = self.objective(model, x, y)
            rows = torch.nonzero(~inner(x).fooled)[:, 0]
            for restart in range(self.restarts):
                if len(rows) == 0:
                    break
                numbers = ByImage(noise.fold(restart)) if self.rng == "image" else released
                rows = self._restart(inner, x, rows, numbers, x_adv, restart)
        return x_adv

    def _restart(
        self, inner: Inner, x: Tensor, rows: Tensor, numbers: ByImage | ByBatch, x_adv: Tensor, restart: int
    ) -> Tensor:
        """One search of the images ``rows``: writes the fooled ones to ``x_adv``, gives the rows of the others."""
        best = self._start(x[rows], rows, numbers)
        score = _finite(inner(best, rows))
        search, fooled = Search(rows, x[rows], best, score.loss), score.fooled
        plan = list(self.stretches(*x.shape[2:]))
        each = schedule.likely(schedule.Random(s.side, s.length, self._different(x.shape[1:], s)) for s in plan)
        for stretch in schedule.followed(plan, each, restart, self.restarts):
            search = _leave(search, fooled, x_adv)
            if len(search.rows) == 0:
                return search.rows
            fooled = self._advance(inner, search, stretch, numbers.draws(search.rows, x.shape[1:], stretch))
        return _leave(search, fooled, x_adv).rows

    def stretches(self, h: int, w: int) -> Iterator[Stretch]:
        """All iterations, cut where the window's side changes and at most `BLOCK` at a time."""
        longest = 1 if self.rng == "autoattack" and self.threat.norm != "linf" else BLOCK
        for side, same in itertools.groupby(range(self.steps), lambda i: self.side_at(i, h, w)):
            iterations = list(same)
            for first in iterations[::longest]:
                length = min(longest, iterations[-1] + 1 - first)
                yield Stretch(first, length, side, len(iterations))

    def side_at(self, iteration: int, h: int, w: int) -> int:
        """The window's side in pixels; odd and at least 3 for l2 and l1, as far as the image allows."""
        at = int(iteration / self.steps * 10000) if self.rescale else iteration
        share = self.p_init / 2 ** sum(at > halving for halving in HALVINGS)
        side = round(math.sqrt(share * h * w))
        side = max(side, 1) if self.threat.norm == "linf" else max(side, 3) | 1
        return min(side, h, w)

    def _advance(self, inner: Inner, search: Search, stretch: Stretch, draws: Draws) -> Tensor:
        """All proposals of a stretch, image by image in order, several images' and several of an image in each pass.

        ``search`` is moved in place; gives which images are fooled (n,). An image's place in the stretch is its own
        (``at``): images differ in which proposals need no asking, and in how many asked at once are used.
        """
        n, b = draws.turned.shape
        device = draws.turned.device
        order = torch.arange(b, device=device)
        at, fooled = torch.zeros(n, dtype=torch.long, device=device), torch.zeros(n, dtype=torch.bool, device=device)
        key, few = self._remember(search, stretch, draws), FEW // 2 if search.x[0, 0].numel() > SMALL else FEW
        late, turn, pairs, counts = Late(inner), None, 0, at.new_zeros(2)
        while True:
            open_ = order >= at[:, None]
            if search.idle is not None:
                open_ &= ~search.idle.gather(1, key)
            *waiting, taken, claimed = asking.told(torch.cat([open_.sum(1), counts]))
            if turn is not None and claimed:
                at, fooled, counts = self._moved(search, turn, turn.pending.settled(claimed), key)
                continue
            if pairs:
                search.rate = max(1e-3, search.rate + 0.1 * (taken / pairs - search.rate))
            active = sum(map(bool, waiting))
            if active == 0:
                return fooled
            width = max(1, few // active, min(WIDE // active, int(WASTE / search.rate)))
            pairs = sum(min(each, width) for each in waiting)
            i, j = asking.pairs(open_ & (open_.cumsum(1) <= width), pairs)
            place, sign, turned = draws.place[i, j], draws.sign[i, j].to(search.x.dtype), draws.turned[i, j]
            proposal = self._propose(search.x[i], search.best[i], place, sign, turned, stretch.side)
            score = _finite(late(proposal, search.rows[i]))
            before = (search.best, search.loss, search.idle)
            turn = Turn(i, j, proposal, score, late.last, at, fooled, before)
            at, fooled, counts = self._moved(search, turn, None, key)

    def _moved(self, search: Search, turn: Turn, broken: Tensor | None, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a pass's proposals change in ``search``; gives where each image is in the stretch (n,), which are fooled
        (n,), and how many proposals were kept and how many claims are to be confirmed (2,). ``broken``: by the exact
        model's word; without it only claimed, which is taken for no as long as nobody has asked how many there are.
        """
        i, j, b = turn.i, turn.j, key.shape[1]
        search.best, search.loss, search.idle = turn.before
        claims = turn.pending.claims if broken is None else turn.at.new_zeros(())
        score = turn.score._replace(fooled=turn.pending.sure if broken is None else broken)
        better = score.fooled | (score.loss > search.loss[i])
        first = torch.full_like(turn.at, b).scatter_reduce_(0, i, torch.where(better, j, b), "amin")
        asked = turn.at.scatter_reduce(0, i, j + 1, "amax")
        at = torch.where(first < b, first + 1, asked)
        if search.idle is not None:
            search.idle[i, key[i, j]] = True
        chosen = j == first[i]
        fooled = self._take(search, turn.fooled, i, chosen, turn.proposal, score)
        return at.masked_fill_(fooled, b), fooled, torch.stack([chosen.sum(), claims])

    def _take(
        self, search: Search, fooled: Tensor, i: Tensor, chosen: Tensor, proposal: Tensor, score: Score
    ) -> Tensor:
        """The ``chosen`` proposals, at most one of each image ``i``, into ``search``; gives ``fooled`` with them. Where
        asking which these are waits for the device, every image is written, most of them with what it has.
        """
        if asking.free(chosen):
            [places] = asking.places(chosen)
            which = i[places]
            search.best[which], search.loss[which] = proposal[places], score.loss[places]
            fooled[which] = score.fooled[places]
            if search.idle is not None and len(which):
                search.idle[which] = self._idle(search.x[which], search.best[which], search.side)
            return fooled
        order = torch.where(chosen, torch.arange(len(i), device=i.device), -1)
        place = torch.full_like(search.rows, -1).scatter_reduce_(0, i, order, "amax")
        new, place = place >= 0, place.clamp(min=0)
        search.best = torch.where(new[:, None, None, None], proposal[place], search.best)
        search.loss = torch.where(new, score.loss[place], search.loss)
        if search.idle is not None:
            fresh = self._idle(search.x, search.best, search.side)
            search.idle = torch.where(new[:, None], fresh, search.idle)
        return torch.where(new, score.fooled[place], fooled)

    def _remember(self, search: Search, stretch: Stretch, draws: Draws) -> Tensor:
        """The place in the table ``search.idle`` of each proposal (n, b); makes the table where the side is new, or
        none where it would not pay.
        """
        (c, h, w), side = search.x.shape[1:], stretch.side
        if side != search.side:
            search.side, pays = side, self._different(search.x.shape[1:], stretch) is not None
            search.idle = self._idle(search.x, search.best, side) if pays else None
        if search.idle is None:
            return draws.turned
        code = ((draws.sign > 0) * 2 ** torch.arange(c, device=draws.sign.device)).sum(-1)
        return (code * (h - side + 1) + draws.place[..., 0]) * (w - side + 1) + draws.place[..., 1]

    def _different(self, shape: torch.Size, stretch: Stretch) -> int | None:
        """How many different proposals a stretch draws from; None where the useless ones are not remembered."""
        c, h, w = shape
        different = 2**c * (h - stretch.side + 1) * (w - stretch.side + 1)
        return different if self.threat.norm == "linf" and different <= TABLE * stretch.among else None

    def _idle(self, x: Tensor, best: Tensor, side: int) -> Tensor:
        """Which windows and signs would leave ``best`` as it is (n, 2^c * positions); channel 0 is the lowest bit."""
        corners = torch.stack([(x - self.threat.eps).clamp(0, 1), (x + self.threat.eps).clamp(0, 1)], 2)
        differs = (best[:, :, None] != corners).float()
        total = F.pad(differs.cumsum(-1).cumsum(-2), (1, 0, 1, 0))  # counts: exact in float32 up to 2^24 pixels
        below, above = total[..., side:, :], total[..., :-side, :]
        count = below[..., side:] - below[..., :-side] - above[..., side:] + above[..., :-side]
        same = count == 0
        table = same[:, 0]
        for channel in range(1, x.shape[1]):
            table = (same[:, channel, :, None] & table[:, None]).flatten(1, 2)
        return table.flatten(1)

    def _start(self, x: Tensor, rows: Tensor, numbers: ByImage | ByBatch) -> Tensor:
        """Vertical stripes at the corners (linf), or tiles of a bump and its negative (l2, l1)."""
        eps = self.threat.eps
        if self.threat.norm == "linf":
            return (x + eps * numbers.stripes(rows, x.shape[1:]).to(x.dtype)).clamp(0.0, 1.0)
        h, w = x.shape[2:]
        side = max(1, min(h // 5, w))  # the original has no tile for an image that is more than five times as high
        tiles = numbers.tiles(rows, x.shape[1:], side)
        i, j = torch.arange(h, device=x.device) - tiles.top, torch.arange(w, device=x.device) - tiles.left
        down, across = tiles.turned.shape[1:]
        there = ((i >= 0) & (i < down * side))[:, None] & ((j >= 0) & (j < across * side))
        tile_i, tile_j = (i // side).clamp(0, down - 1)[:, None], (j // side).clamp(0, across - 1)
        turned = tiles.turned[:, tile_i, tile_j].long()
        bump = pattern(self.threat.norm, side).to(x)[turned, (i % side)[:, None], j % side]
        delta = (bump * there)[:, None] * tiles.sign[:, :, tile_i, tile_j].to(x.dtype)
        return self._inside(x, delta)

    def _inside(self, x: Tensor, delta: Tensor) -> Tensor:
        """x + delta, with delta scaled to the sphere and clipped to the box (l2), or projected onto both (l1)."""
        if self.threat.norm == "l2":
            length = delta.square().sum((1, 2, 3), keepdim=True).sqrt()
            return (x + delta / (length + 1e-12) * self.threat.eps).clamp(0.0, 1.0)
        eps = self.threat.eps
        return fitted(x, (x + (delta - l1_excess(x, delta, eps * (1 - 1e-6), wide=False))).clamp(0.0, 1.0), eps)

    def _propose(self, x: Tensor, best: Tensor, place: Tensor, sign: Tensor, turned: Tensor, side: int) -> Tensor:
        """The proposals (m, ch, h, w): for linf a window set to a corner of the ball.

        For l2 and l1 the perturbation of the second window moves to the first, with a new bump and what the ball has
        left: algorithm 3 of the paper, and its l1 form.
        """
        first = _window(place[:, :2], side, x)
        if self.threat.norm == "linf":
            corner = (x + self.threat.eps * sign[:, :, None, None]).clamp(0.0, 1.0)
            return torch.where(first, corner, best)
        second = _window(place[:, 2:], side, x)
        bump = pattern(self.threat.norm, side).to(x)[turned.long()] * 1.0
        i, j = (
            (torch.arange(size, device=x.device) - place[:, axis, None]).clamp(0, side - 1)
            for axis, size in enumerate(x.shape[2:])
        )
        image = torch.arange(len(x), device=x.device)[:, None, None]
        bump = bump[image, i[:, :, None], j[:, None, :]][:, None] * sign[:, :, None, None]
        delta, l2, c, eps = best - x, self.threat.norm == "l2", x.shape[1], self.threat.eps

        def mass(values: Tensor) -> Tensor:  # a channel's squared l2 norm, or l1 norm
            return (values.square() if l2 else values.abs()).sum((2, 3), keepdim=True)

        def length(values: Tensor) -> Tensor:
            return mass(values).sqrt() if l2 else mass(values)

        left = ((eps * eps if l2 else eps) - mass(delta).sum(1, keepdim=True)).clamp(min=0.0)
        room = left / c + mass(delta * (first | second))
        room = room.sqrt() if l2 else room * c
        fresh = (bump + delta / (1e-12 + length(delta * first))) * first
        fresh = fresh / (1e-12 + length(fresh)) * room
        return self._inside(x, torch.where(first, fresh, delta * ~second))


def _leave(search: Search, fooled: Tensor, x_adv: Tensor) -> Search:
    """Write the fooled images to ``x_adv``; the search of the others."""
    gone, stay = asking.places(fooled, ~fooled)
    if len(gone) == 0:
        return search
    x_adv[search.rows[gone]] = search.best[gone]
    return search.of(stay)


def _finite(score: Score) -> Score:
    require_finite(score.loss)
    return score


def _window(place: Tensor, side: int, x: Tensor) -> Tensor:
    """The windows at ``place`` (m, 2), top and left, as masks (m, 1, h, w)."""
    i, j = (torch.arange(size, device=x.device) - place[:, axis, None] for axis, size in enumerate(x.shape[2:]))
    rows, columns = (i >= 0) & (i < side), (j >= 0) & (j < side)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


@functools.lru_cache(maxsize=64)
def pattern(norm: Norm, side: int) -> Tensor:
    """The bump over its negative, of unit norm (side, side), and its transpose: (2, side, side), eq. 2 of the paper."""
    half = side // 2
    pattern = torch.cat([_bump(norm, half, side), -_bump(norm, side - half, side)])
    pattern = pattern / (pattern.square().sum().sqrt() if norm == "l2" else pattern.abs().sum())
    return torch.stack([pattern, pattern.T])


def _bump(norm: Norm, h: int, w: int) -> Tensor:
    """A pyramid of squares around the middle, the k-th adding 1 / k^2 (l2) or 1 / k^4 (l1), of unit norm (h, w)."""
    distance = torch.maximum((torch.arange(h) - h // 2).abs()[:, None], (torch.arange(w) - w // 2).abs())
    bump = torch.zeros(h, w)
    for k in range(max(h, w) // 2 + 1):
        bump += (distance <= k) * (1.0 / (k + 1) ** (2 if norm == "l2" else 4))
    return bump / (bump.square().sum().sqrt() if norm == "l2" else bump.abs().sum())
