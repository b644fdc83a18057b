"""Whether the warning that the cluster gives is long enough to stop in."""

from __future__ import annotations

import math
from collections import deque

ENOUGH = 5
"""Updates before the first judgement: the first ones are slower than the rest."""


class LeadTime:
    """Compares the seconds of warning with what stopping takes: the update in progress, then a checkpoint.

    Args:
        warnings: seconds between a warning and the end, by the name of the setting that they come from.
    """

    def __init__(self, warnings: dict[str, float]) -> None:
        self._warnings = warnings
        self._updates: deque[float] = deque(maxlen=1000)
        self._saves: deque[float] = deque(maxlen=100)
        self._said = 0.0

    def update(self, seconds: float) -> None:
        """An update took so long."""
        self._updates.append(seconds)

    def save(self, seconds: float) -> None:
        """A checkpoint took so long, from the copy to the verified folder."""
        self._saves.append(seconds)

    @property
    def needed(self) -> float | None:
        """The 95th percentile of an update and of a save, in seconds together; None before there are any of both."""
        if len(self._updates) < ENOUGH or not self._saves:
            return None
        return percentile(self._updates, 0.95) + percentile(self._saves, 0.95)

    def short(self) -> dict[str, float]:
        """The warnings that are too short, once, and again when what is needed has grown by a quarter."""
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
