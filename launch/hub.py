"""Restart decisions of rank 0's supervisor for all ranks: events in, messages to all supervisors out. No processes, no sockets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from multitrain.cluster.exit_status import Exit

REJOIN_SECONDS = 60.0
"""Seconds within which all ranks must have ended to be started again."""


class Hub:
    """Decides when all ranks start, restart and end.

    Args:
        size: number of ranks.
        restarts: limit of restarts within this start of the job.
        clock: returns seconds.
    """

    def __init__(self, size: int, restarts: int, clock: Callable[[], float]) -> None:
        self._size = size
        self._restarts = restarts
        self._clock = clock
        self.attempt = 0
        self._ended: set[int] = set()
        self._clean: set[int] = set()
        self._deadline: float | None = None
        self._final = False

    def rank_ended(self, rank: int, code: int, stopping: bool, text: str) -> dict[str, Any] | None:
        """Record the exit of a rank; the message to all supervisors, or None.

        Args:
            code: exit code of the rank; negative for a signal.
            stopping: whether a stop signal has arrived.
            text: description of the exit, as the predicate of ``rank 3 ``.
        """
        self._ended.add(rank)
        if Exit.is_clean(code):
            self._clean.add(rank)
        died, ending = not Exit.is_clean(code), self._deadline is not None
        last = self.attempt >= self._restarts or stopping or bool(self._clean) or not Exit.restartable(code)
        if last if died else ending:
            return self.give_up(f"rank {rank} {text}", code)
        if len(self._ended) == self._size and not self._clean and not self._final:
            self.attempt += 1
            self._ended, self._deadline = set(), None
            return {"action": "start", "attempt": self.attempt}
        if died and not ending:
            self._deadline = self._clock() + REJOIN_SECONDS
            again = f"restart {self.attempt + 1} of {self._restarts} inside the allocation"
            return {"action": "stop_ranks", "reason": f"rank {rank} {text}; {again}"}
        return None

    def supervisor_lost(self, rank: int) -> dict[str, Any] | None:
        """Record that the connection to a rank's supervisor was lost; the message to all supervisors, or None."""
        if self.finished(rank):
            return None
        self._ended.add(rank)
        return self.give_up(f"the supervisor of rank {rank} is gone")

    def finished(self, rank: int) -> bool:
        """Whether the rank will not be started again, so that its supervisor may exit."""
        return rank in self._clean or (self._final and rank in self._ended)

    def check_timeout(self) -> dict[str, Any] | None:
        """The message to all supervisors when not all ranks ended in time; otherwise None."""
        if self._deadline is None or self._clock() < self._deadline:
            return None
        return self.give_up(f"not all ranks ended within {REJOIN_SECONDS:.0f} s")

    def give_up(self, reason: str, status: int = Exit.FAILED) -> dict[str, Any] | None:
        """The message that ends all ranks for good, once, and then None; `status`: exit status of the rank that is the cause."""
        self._deadline = None
        if self._final:
            return None
        self._final = True
        return {"action": "shut_down", "reason": reason, "status": int(status)}

    @property
    def done(self) -> bool:
        """Whether all ranks have ended and will not be started again."""
        return len(self._ended) == self._size and (self._final or len(self._clean) == self._size)
