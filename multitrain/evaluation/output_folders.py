"""Output folders for results of a run: inside the run if it belongs to this user, else in the working folder."""

from __future__ import annotations

import os
from pathlib import Path

from multitrain.config import RunConfig


def is_ours(folder: Path) -> bool:
    """Whether this user owns `folder`, or its nearest existing parent, and may write there."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place.stat().st_uid == os.geteuid() and os.access(place, os.W_OK)


def index_folder(config: RunConfig, given: Path | None = None, here: Path = Path()) -> Path:
    """Where the index of annotation files lies: `given`, else ``data.index``, else ``RUNS/.index``; in another user's runs,
    where nothing is written, ``HERE/.index``."""
    runs = Path(config.runs)
    return given or Path(config.data.index or (runs if is_ours(runs) else here) / ".index")


def result_folder(run: Path, *parts: str) -> Path:
    """``RUN/PART/…``; of another user's run, which is never written into, ``PART/RUN/…`` in the working folder."""
    if is_ours(run):
        return run.joinpath(*parts)
    return Path(parts[0], run.resolve().name, *parts[1:])
