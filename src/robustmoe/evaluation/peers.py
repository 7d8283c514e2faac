"""The processes that share one evaluation."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from robustmoe import distributed
from robustmoe.errors import UserError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for the slowest batch of a round. (A peer that dies is noticed at once.)"""


class Peers:
    """The processes of one evaluation, made in each of them at the same time; alone, every call is about oneself.

    Objects travel over gloo, also beside nccl.
    """

    def __init__(self) -> None:
        self.rank, self.world = distributed.rank(), distributed.world()
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if distributed.active() else None

    def gather(self, value: T) -> list[T]:
        """Everyone's value, in the order of the processes."""
        if self._group is None:
            return [value]
        answers: list[Any] = [None] * self.world
        dist.all_gather_object(answers, value, group=self._group)
        return answers

    def agree(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` gives in each process; a `UserError` in one of them is raised in all."""
        value: T | None = None
        error: UserError | None = None
        try:
            value = work()
        except UserError as raised:
            error = raised
        answers = self.gather((value, None if error is None else str(error)))
        if error is not None:
            raise error
        for _, said in answers:
            if said is not None:
                raise UserError(said)
        return [answer for answer, _ in answers]  # type: ignore[misc]

    def first(self, work: Callable[[], T]) -> T:
        """The first process alone does it; everyone gets what came out, or its `UserError`."""
        return self.agree(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def only_first(self, work: Callable[[], T]) -> T | None:
        """The first process alone does it and keeps what came out (a file that is open); its `UserError` is raised in
        all.
        """
        kept: list[T] = []
        self.first(lambda: kept.append(work()))
        return kept[0] if kept else None
