"""Compares the warning time before a job is ended with the time that stopping takes."""

from __future__ import annotations

import math
from collections import deque

MIN_UPDATES = 5
"""Updates before the first comparison, because the first updates are slower."""


class LeadTime:
    """Compares the seconds of warning with the duration of a stop: the update in progress, then a checkpoint.

    Args:
        warnings: seconds between a warning and the end, by the name of the setting.
    """

    def __init__(self, warnings: dict[str, float]) -> None:
        self._warnings = warnings
        self._updates: deque[float] = deque(maxlen=1000)
        self._saves: deque[float] = deque(maxlen=100)
        self._said = 0.0

    def update(self, seconds: float) -> None:
        """Add the duration of an update."""
        self._updates.append(seconds)

    def save(self, seconds: float) -> None:
        """Add the duration of a save, from the copy to the verified folder."""
        self._saves.append(seconds)

    @property
    def needed(self) -> float | None:
        """Sum of the 95th percentiles of an update and of a save, in seconds; None before both are known."""
        if len(self._updates) < MIN_UPDATES or not self._saves:
            return None
        return percentile(self._updates, 0.95) + percentile(self._saves, 0.95)

    def short(self) -> dict[str, float]:
        """Warnings that are too short; returned once, and again when the needed time has grown by a quarter."""
        needed = self.needed
        if needed is None or needed <= 1.25 * self._said:
            return {}
        found = {name: seconds for name, seconds in self._warnings.items() if seconds < needed}
        if found:
            self._said = needed
        return found


def percentile(values: deque[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
