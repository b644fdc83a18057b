"""Segments: parts of a video, named ``VIDEO#t=START,END``, in seconds of the time that a player shows.

The name (a media fragment, as in addresses of the web) stands for the video wherever one is opened or listed: the frames shown from START
on and before END, as if they were a file. A file whose own name ends so is that file.
"""

from __future__ import annotations

import math
import os
import re
from typing import NamedTuple

import numpy as np

MARK = "#t="
_NUMBER = rb"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?(?:nan|inf)"
_FRAGMENT = re.compile(rb"(?s:(.+))#t=(%s),(%s)" % (_NUMBER, _NUMBER))
_IS_NUMBER = re.compile(_NUMBER, re.IGNORECASE)


class Segment(NamedTuple):
    """A part of a video."""

    start: float
    """In seconds from the start of the file's time line."""
    end: float
    """In seconds; a frame at this time does not belong to the segment."""

    def columns(self) -> tuple[str, str]:
        """Start and end as texts."""
        return _text(self.start), _text(self.end)

    def __str__(self) -> str:
        return ",".join(self.columns())

    def problem(self) -> str:
        """Why this cannot be a part of a video; empty if it can."""
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            return "its times are no numbers of seconds"
        if self.start < 0:
            return "it starts before the video"
        return "it ends before it starts, or has no length" if self.end <= self.start else ""


def _text(seconds: float) -> str:
    return np.format_float_positional(seconds, trim="-")


def named(path: str, segment: Segment | None) -> str:
    """The name of a segment of the video `path`; the path for a complete video."""
    return path if segment is None else f"{path}{MARK}{segment}"


def split_name(name: str) -> tuple[str, Segment | None]:
    """(the video, its segment) that a name stands for, if no file has that name."""
    found = _FRAGMENT.fullmatch(os.fsencode(name)) if MARK in name else None
    return (name, None) if found is None else (os.fsdecode(found[1]), Segment(float(found[2]), float(found[3])))


def split_columns(text: bytes, separator: bytes) -> tuple[bytes, Segment | None]:
    """(path, segment) of ``path start end``, the part of a line before its label; a line without two numbers has no segment."""
    rest, _, end = text.rpartition(separator)
    path, _, start = rest.rstrip().rpartition(separator)
    path = path.rstrip()
    start, end = start.strip(), end.strip()
    if not path or not _IS_NUMBER.fullmatch(start) or not _IS_NUMBER.fullmatch(end):
        return text, None
    return path, Segment(float(start), float(end))
