"""Check whether the video files of an annotation file exist."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from multitrain.data.packs import DamagedError, find_packed


class PresenceCheck(NamedTuple):
    """Result of looking for a sample of a catalog's video files."""

    videos: int
    """Number of videos in the catalog."""
    looked: int
    """Number of videos looked for."""
    missing: int
    """Number of missing videos."""
    example: int
    """The first missing video."""
    reason: str
    """Its problem: ``missing``, ``folder`` or ``unreadable``."""

    def more_than(self, cap: float) -> bool:
        """Whether certainly more than the fraction `cap` of all videos is missing; training tolerates at least one unless `cap` is 0."""
        allowed = max(1, int(cap * self.videos)) if cap else 0
        if self.looked == self.videos:
            return self.missing > allowed
        surely = (self.missing - 3 * self.missing**0.5) / self.looked
        return surely > cap and self.missing > allowed * self.looked / self.videos


def absent(path: Path) -> str | None:
    """Why there is no video at `path`, neither a file nor packed: ``missing``, ``folder`` or ``unreadable``; None if there is one."""
    try:
        if find_packed(path) is not None:
            return None
        return "folder" if stat.S_ISDIR(os.stat(path).st_mode) else None
    except PermissionError:
        return "unreadable"
    except (OSError, ValueError, DamagedError):
        return "missing"


def segment_columns(path: str, videos: Path) -> Path | None:
    """The existing file that `path` without two trailing numbers names, if lines are ``path start end label``; else None."""
    found = re.fullmatch(r"(.+?)[ \t,;]+[0-9.]+[ \t,;]+[0-9.]+", path)
    place = videos / found[1] if found else None
    return place if place is not None and absent(place) is None else None


def frames_column(path: str, videos: Path) -> Path | None:
    """The existing file or folder that `path` without a trailing number names, if lines are ``path frames label``; else None."""
    found = re.fullmatch(r"(.+?)[ \t,;]+[0-9]+", path)
    place = videos / found[1] if found else None
    return place if place is not None and absent(place) != "missing" else None
