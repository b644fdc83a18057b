"""Frames by decord, which the published code used. The only file that imports it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from multitrain.config import ConfigError
from multitrain.data.decode.video import Video, VideoError, check_time, may_pass

_TOGETHER = 16
"""Frames asked for in one call: enough to cost nothing more, few enough for any size of frame."""


class DecordVideo(Video):
    """An open video; `deadline` is a time of the monotonic clock."""

    def __init__(self, path: Path, deadline: float) -> None:
        decord = _library()
        self.path, self._deadline = path, deadline
        try:
            self._reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
            self.frame_count, self.fps = len(self._reader), float(self._reader.get_avg_fps())
        except Exception as error:
            raise VideoError(path, _reason(error, self.path), transient=may_pass(error)) from error
        if self.frame_count < 1 or not 0 < self.fps < math.inf:
            raise VideoError(path, f"{self.frame_count} frames at {self.fps} frames a second")

    def close(self) -> None:
        self._reader = None

    def _each(self, numbers: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(numbers), _TOGETHER):
            some = numbers[start : start + _TOGETHER]
            check_time(self.path, self._deadline)
            try:
                frames = self._reader.get_batch(some).asnumpy()
            except Exception as error:
                raise VideoError(self.path, _reason(error, self.path), transient=may_pass(error)) from error
            yield from zip(some, np.asarray(frames, dtype=np.uint8))


def _library() -> Any:
    try:
        import decord
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"data.decoder=decord, but decord cannot be imported ({error}); pip install 'multitrain[decord]' (x86-64 only), "
            "or use data.decoder=pyav"
        ) from error
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _reason(error: Exception, path: Path) -> str:
    """decord's messages open with a C++ position, name the file and end with a stack trace."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = text.split("Check failed: ")[-1] if "Check failed" in text else text.split("] ", 1)[-1]
    return text.replace(str(path), "the file").rstrip(".")


__all__ = ["DecordVideo"]
