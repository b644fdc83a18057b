"""A segment of a video, as a video of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from multitrain.data.decode.picture import Frame
from multitrain.data.decode.rate import segment_rate
from multitrain.data.decode.video import Video, VideoError, located
from multitrain.data.segment import Segment, named, split_name

_MICROSECOND = 1e-6


def whole_and_segment(path: Path) -> tuple[Path, Segment | None]:
    """(the video, its segment) that a path stands for: a file or packed video of that name, else a segment. Raises VideoError."""
    name, segment = split_name(path.name)
    if segment is None or os.path.lexists(path) or located(path) is not None:
        return path, None
    return path.with_name(name), segment


class PartOfVideo(Video):
    """The frames of `whole` shown from the start of a segment on and before its end; closing it closes `whole`.

    Times are compared to a microsecond, as in ffmpeg. Their zero is the start of the file, which may be that of its sound.

    Attributes:
        first: number of the first frame in `whole`.

    Raises:
        VideoError: no frame is shown in the segment; `whole` is left open.
    """

    def __init__(self, whole: Video, segment: Segment) -> None:
        self.whole, self.segment = whole, segment
        self.path = whole.path.with_name(named(whole.path.name, segment))
        if problem := segment.problem():
            raise VideoError(self.path, f"no segment: {problem}")
        shown = whole.shown_at()
        limits = np.array([segment.start, segment.end]) - _MICROSECOND / 2
        self.first, stop = (int(n) for n in np.searchsorted(shown, limits))
        self.frame_count = stop - self.first
        if self.frame_count < 1:
            raise VideoError(self.path, f"no frame in the segment; {_extent(shown)}")
        self._shown = shown[self.first : stop]
        self.fps = segment_rate(whole.fps, self._shown)

    def times(self) -> list[float]:
        return (self._shown - self._shown[0]).tolist()

    def shown_at(self) -> np.ndarray:
        return self._shown

    def close(self) -> None:
        self.whole.close()

    def _each(self, numbers: list[int]) -> Iterator[tuple[int, Frame]]:
        for number, frame in self.whole._each([self.first + n for n in numbers]):
            yield number - self.first, frame
            del frame


def _extent(shown: np.ndarray) -> str:
    return f"the video's frames are shown at {shown[0]:.2f} to {shown[-1]:.2f} s"
