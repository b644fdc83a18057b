"""Scan one file for the journal of `data check`: its properties, or its damage."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from multitrain.data.decode import VideoError, scan_video
from multitrain.data.decode.video import located
from multitrain.data.packs import framing_error
from multitrain.data.tools.parallel_map import FINAL


class ScanFile:
    """`scan_video` as a function for `map_resumable` whose item is a path.

    Returns:
        The fields of `multitrain.data.decode.VideoScan`, or ``kind`` and ``error`` of the finding.
    """

    def __call__(self, path: str) -> dict[str, Any]:
        try:
            if (stored := located(Path(path))) is None and not os.path.exists(path):
                return {"kind": "missing", "error": "no such file", FINAL: True}
            whole = asdict(scan_video(path))
            if stored is not None and stored.crc is not None and (wrong := framing_error(stored)):
                return {"kind": "broken", "error": wrong, FINAL: True}
            return whole
        except VideoError as error:
            return {"kind": "broken", "error": error.reason, FINAL: not is_of_system(error)}


def is_of_system(error: VideoError) -> bool:
    """Whether the operating system caused the error, so that the file itself may be intact."""
    return error.transient or isinstance(error.__cause__, OSError)
