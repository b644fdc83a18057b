"""Whether the videos of an annotation file are on the disk."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from multitrain.data.packs import DamagedError, find_packed


class PresenceCheck(NamedTuple):
    """What looking for videos on the disk found."""

    videos: int
    """Videos of the catalog."""
    looked: int
    """Those that were looked for."""
    missing: int
    """Those that are not there."""
    example: int
    """The first missing video."""
    reason: str
    """What is wrong with it: ``missing``, ``folder`` or ``unreadable``."""

    def more_than(self, cap: float) -> bool:
        """Whether more are missing, beyond doubt, than the share `cap` of all, of which training lets at least one pass."""
        allowed = max(1, int(cap * self.videos)) if cap else 0
        if self.looked == self.videos:
            return self.missing > allowed
        surely = (self.missing - 3 * self.missing**0.5) / self.looked
        return surely > cap and self.missing > allowed * self.looked / self.videos


def absent(path: Path) -> str | None:
    """Why there is no video at `path`, neither a file nor packed, or None."""
    try:
        if find_packed(path) is not None:
            return None
        return "folder" if stat.S_ISDIR(os.stat(path).st_mode) else None
    except PermissionError:
        return "unreadable"
    except (OSError, ValueError, DamagedError):
        return "missing"


def frames_column(path: str, videos: Path) -> Path | None:
    """What is there without the number at the end of a path: lines are ``path frames label`` then."""
    found = re.fullmatch(r"(.+?)[ \t,;]+[0-9]+", path)
    place = videos / found[1] if found else None
    return place if place is not None and absent(place) != "missing" else None


__all__ = ["PresenceCheck", "absent", "frames_column"]
