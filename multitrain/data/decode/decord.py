"""The decord backend, the library of the published code. No other module imports decord."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from multitrain.config import ConfigError
from multitrain.data.decode.container import Bytes, open_container, opened
from multitrain.data.decode.rate import average_rate, start_of_file
from multitrain.data.decode.video import Video, VideoError, check_deadline, is_transient

_TOGETHER = 16
"""Frames per call of decord; more do not make it faster."""
_BYTES = 32 << 20
"""Maximum bytes of the frames of one call, unless a single frame has more."""


class DecordVideo(Video):
    """An open video; `deadline` is a time of the monotonic clock.

    libavformat opens the container first, as for every backend: it determines whether the file is a video, and the average rate.

    Attributes:
        begins_inside: whether there are frames before the first key frame, in which case decord numbers frames wrongly.
    """

    def __init__(self, path: Path, deadline: float) -> None:
        decord = _library()
        self.path, self._deadline, self._handle = path, deadline, -1
        container, stream = open_container(path)
        with container:
            size = stream.codec_context.width * stream.codec_context.height * 3
            self._together = max(1, min(_TOGETHER, _BYTES // max(size, 1)))
            try:
                self._reader = decord.VideoReader(self._source(), ctx=decord.cpu(0), num_threads=1)
                self.frame_count, keys = len(self._reader), self._reader.get_key_indices()
                self.begins_inside = len(keys) > 0 and keys[0] > 0
                self._times = self._seconds()
                self.fps = average_rate(container, stream, self.frame_count, self._times)
                if stream.start_time is not None and stream.time_base:
                    self.begin = float(stream.start_time * stream.time_base) - start_of_file(container)
            except Exception as error:
                self.close()
                reason = f"decord cannot read it ({_reason(error, path)}); data.decoder=pyav may"
                raise VideoError(path, reason, transient=is_transient(error)) from error
        if self.frame_count < 1:
            self.close()
            raise VideoError(path, f"{self.frame_count} frames")

    def shown_at(self) -> np.ndarray:
        return super().shown_at() if self._times is None else self.begin + self._times

    def close(self) -> None:
        self._reader = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _source(self) -> str | Bytes:
        """The bytes of a packed video, or a file name. decord accepts UTF-8 names only; another file is passed as a descriptor."""
        name = opened(self.path)
        if isinstance(name, Bytes):
            return name
        try:
            name.encode()
        except UnicodeEncodeError:
            self._handle = os.open(self.path, os.O_RDONLY)
            return f"/proc/self/fd/{self._handle}"
        return name

    def _seconds(self) -> np.ndarray | None:
        """Time of each frame in seconds from the first; None where decord's times do not increase."""
        starts = self._reader.get_frame_timestamp(range(self.frame_count))[:, 0].astype(np.float64)
        seconds: np.ndarray = starts - starts[0]
        return seconds if np.isfinite(seconds).all() and (np.diff(seconds) > 0).all() else None

    def _each(self, numbers: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(numbers), self._together):
            some = numbers[start : start + self._together]
            check_deadline(self.path, self._deadline)
            try:
                frames = self._reader.get_batch(some).asnumpy()
            except Exception as error:
                raise VideoError(self.path, _reason(error, self.path), transient=is_transient(error)) from error
            yield from zip(some, np.asarray(frames, dtype=np.uint8))
            del frames


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
    """The useful part of decord's message, which starts with a C++ source position, names the file and ends with a stack trace."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = text.split("Check failed: ")[-1] if "Check failed" in text else text.split("] ", 1)[-1]
    return text.replace(f"file:{path.absolute()}", "the file").replace(str(path), "the file").rstrip(".")
