"""What rank 0's supervisor decides for all ranks. No processes, no sockets: events in, instructions out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from multitrain.cluster.exit_status import Exit

REJOIN = 60.0
"""Seconds within which all ranks must have ended, to be started again."""


class Hub:
    """Decides when ranks start, start again, and end.

    Args:
        size: ranks.
        restarts: starts after the first inside this start of the job, at most.
        clock: seconds.
    """

    def __init__(self, size: int, restarts: int, clock: Callable[[], float]) -> None:
        self._size = size
        self._restarts = restarts
        self._clock = clock
        self.attempt = 0
        self._ended: set[int] = set()
        self._in_order: set[int] = set()
        self._deadline: float | None = None
        self._over = False

    def rank_ended(self, rank: int, code: int, stopping: bool, text: str) -> dict[str, Any] | None:
        """The rank has ended with `code`, in words `text`; what all are to be told.

        Args:
            stopping: whether a stop signal has come.
        """
        self._ended.add(rank)
        if Exit.in_order(code):
            self._in_order.add(rank)
        died, ending = not Exit.in_order(code), self._deadline is not None
        last = self.attempt >= self._restarts or stopping or bool(self._in_order) or not Exit.restartable(code)
        if last if died else ending:
            return self.give_up(f"rank {rank} {text}", code)
        if len(self._ended) == self._size and not self._in_order and not self._over:
            self.attempt += 1
            self._ended, self._deadline = set(), None
            return {"do": "start", "attempt": self.attempt}
        if died and not ending:
            self._deadline = self._clock() + REJOIN
            again = f"restart {self.attempt + 1} of {self._restarts} inside the allocation"
            return {"do": "stop", "why": f"rank {rank} {text}; {again}"}
        return None

    def supervisor_lost(self, rank: int) -> dict[str, Any] | None:
        """The rank's supervisor is gone."""
        if self.finished(rank):
            return None
        self._ended.add(rank)
        return self.give_up(f"the supervisor of rank {rank} is gone")

    def finished(self, rank: int) -> bool:
        """Whether the rank has ended for good, so that its supervisor may leave."""
        return rank in self._in_order or (self._over and rank in self._ended)

    def overdue(self) -> dict[str, Any] | None:
        """What to tell when the ranks have not ended in time."""
        if self._deadline is None or self._clock() < self._deadline:
            return None
        return self.give_up(f"not all ranks ended within {REJOIN:.0f} s")

    def give_up(self, why: str, status: int = Exit.FAILED) -> dict[str, Any] | None:
        """End all, once; `status`: of the rank that is the reason."""
        self._deadline = None
        if self._over:
            return None
        self._over = True
        return {"do": "end", "why": why, "status": int(status)}

    @property
    def done(self) -> bool:
        """Whether all ranks have ended, for good."""
        return len(self._ended) == self._size and (self._over or len(self._in_order) == self._size)
