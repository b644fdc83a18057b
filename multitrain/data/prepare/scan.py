"""A file's record in the journal of `data check`: what is in it, or what is wrong with it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from multitrain.data.decode import VideoError, read_whole
from multitrain.data.decode.video import located
from multitrain.data.packs import wrong_frame
from multitrain.data.prepare.parallel_map import FINAL


class ScanFile:
    """`read_whole` as work for several processes: the item is a path.

    Returns:
        The fields of `multitrain.data.decode.Whole`, or ``kind`` and ``error``: what is wrong.
    """

    def __call__(self, path: str) -> dict[str, Any]:
        try:
            if (stored := located(Path(path))) is None and not os.path.exists(path):
                return {"kind": "missing", "error": "no such file", FINAL: True}
            whole = asdict(read_whole(path))
            if stored is not None and stored.crc is not None and (wrong := wrong_frame(stored)):
                return {"kind": "broken", "error": wrong, FINAL: True}
            return whole
        except VideoError as error:
            return {"kind": "broken", "error": error.reason, FINAL: not is_of_system(error)}


def is_of_system(error: VideoError) -> bool:
    """Whether the operating system failed or refused, so that the file itself may be whole."""
    return error.transient or isinstance(error.__cause__, OSError)


__all__ = ["ScanFile", "is_of_system"]
