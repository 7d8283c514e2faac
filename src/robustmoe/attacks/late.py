"""Which images are broken, asked for together with another question: an attack goes on meanwhile as if none were, and
takes the step back, or lets them leave behind the next pass, where some are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from robustmoe import asking
from robustmoe.attacks.objectives import Inner, Score
from robustmoe.attacks.surrogate import Unconfirmed, unconfirmed


class Pending:
    """Of a pass, the images that are broken, or, by a close surrogate's word alone, may be: ``fooled`` (n,). ``asked``:
    the places among these n of the images that the surrogate was asked about (None: all).
    """

    def __init__(self, fooled: Bool[Tensor, " n"], claims: Unconfirmed, asked: Int[Tensor, " m"] | None = None) -> None:
        self.fooled = fooled
        self._claims = claims
        self._rows: Tensor | None = None
        if asked is not None:
            self._rows = torch.zeros(len(fooled), dtype=torch.long, device=fooled.device)
            self._rows[asked] = torch.arange(len(asked), device=fooled.device)

    @property
    def sure(self) -> Bool[Tensor, " n"]:
        """Which images are broken, as far as that is known: none of those that are only claimed."""
        return self.fooled if self._claims.confirming is None else torch.zeros_like(self.fooled)

    @property
    def claims(self) -> Int[Tensor, ""]:
        """How many images are only claimed."""
        return self.fooled.sum() if self._claims.confirming is not None else self.fooled.new_zeros((), dtype=torch.long)

    def of(self, stay: Int[Tensor, " m"]) -> Pending:
        """Returns the same of the images ``stay``."""
        some = Pending(self.fooled[stay], self._claims)
        some._rows = stay if self._rows is None else self._rows[stay]
        return some

    def settled(self, count: int | None = None) -> Bool[Tensor, " n"]:
        """Returns which images are broken: the exact model is asked about what was only claimed. ``count``: how many
        images ``fooled`` has, where that was asked already.
        """
        if (self._claims.confirming is None and count != 0) or asking.is_nowhere(self.fooled):
            return self.fooled
        [rows] = asking.places(self.fooled) if count is None else [asking.taken(self.fooled, count)]
        if self._claims.confirming is None or len(rows) == 0:
            return asking.nowhere(self.fooled)
        wrong = torch.zeros_like(self.fooled)
        wrong[rows] = self._claims.confirming(rows if self._rows is None else self._rows[rows])
        return wrong


class Fallen(NamedTuple):
    """Who fell in a step, of the images ``rows``, which is asked with a later ``question``; those at ``stay`` (None:
    all) went on meanwhile.
    """

    rows: Int[Tensor, " n"]
    stay: Int[Tensor, " m"] | None
    here: Pending
    question: asking.Later

    def settled(self, fooled: Bool[Tensor, " b"]) -> Int[Tensor, " k"] | None:
        """Notes who fell; the places of the others among those that went on, None where nobody fell."""
        hit = self.here.settled(self.question.count())
        if asking.is_nowhere(hit):
            return None
        fooled[self.rows] = hit
        return asking.places(~(hit if self.stay is None else hit[self.stay]))[0]


class Late:
    """An objective's inner function whose claims are confirmed later, where asking waits for the device: ``last`` is of
    the last pass. One that does not give what `missed` says as it is, is asked as ever.
    """

    def __init__(self, inner: Inner) -> None:
        self.inner = inner
        self.last = Pending(torch.zeros(0, dtype=torch.bool), Unconfirmed())
        self._waits = True

    def __call__(self, x_adv: Tensor, rows: Tensor | None = None) -> Score:
        claims = Unconfirmed()
        if self._waits:
            with unconfirmed() as claims:
                score = self._asked(x_adv, rows)
            self._waits = claims.confirming is None or score.fooled is claims.claim
        if not self._waits:
            score, claims = self._asked(x_adv, rows), Unconfirmed()
        self.last = Pending(score.fooled, claims)
        return score

    def _asked(self, x_adv: Tensor, rows: Tensor | None) -> Score:
        return self.inner(x_adv) if rows is None else self.inner(x_adv, rows)
