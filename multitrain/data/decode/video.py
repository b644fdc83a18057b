"""The interface of every backend: an open `Video`, or a `VideoError`."""

from __future__ import annotations

import errno
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from multitrain.data.decode.picture import Frame, pixels
from multitrain.data.packs import DamagedError, Stored, find_packed, os_error_text
from multitrain.text import printable

_PERMANENT_ERRNOS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class VideoError(Exception):
    """A video that cannot be read.

    Attributes:
        path: the file.
        reason: one line without the path.
        transient: whether the operating system failed, not the file, so that a retry may succeed.
    """

    def __init__(self, path: Path | str, reason: str, *, transient: bool = False) -> None:
        self.path, self.reason, self.transient = Path(path), " ".join(reason.split()), transient
        super().__init__(f"{printable(str(path))}: {self.reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _video_error, (str(self.path), self.reason, self.transient)


def _video_error(path: str, reason: str, transient: bool) -> VideoError:
    return VideoError(path, reason, transient=transient)


class Video(ABC):
    """An open video file; a context manager.

    Attributes:
        path: the file.
        frame_count: number of frames shown, at least 1.
        fps: average frames a second, positive.
        timed: whether frames can be found by their time in any program: there are presentation times, on a clock that is never reset.
        begin: time of the first frame in seconds from the start of the file, which is that of its earliest stream.
    """

    begin: float = 0.0
    timed: bool = True
    path: Path
    frame_count: int
    fps: float

    @property
    def duration(self) -> float:
        """Length in seconds at the average rate."""
        return self.frame_count / self.fps

    def times(self) -> list[float]:
        """Presentation time of each frame in seconds from the first; evenly spaced if the file has no times."""
        return [number / self.fps for number in range(self.frame_count)]

    def shown_at(self) -> np.ndarray:
        """Time of each frame in seconds from the start of the file, as a player shows it: float64 [frames], increasing.

        The start is that of the earliest stream; a file without times starts with its first frame.
        """
        return self.begin + np.asarray(self.times(), np.float64)

    def frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The frames at `indices` (any order, repeats allowed), upright: uint8 [len(indices), H, W, 3], RGB.

        Raises:
            VideoError: a frame is damaged or missing, or the time limit has passed.
            IndexError: an index is outside range(frame_count).
        """
        wanted = self._known(indices)
        places: dict[int, list[int]] = {}
        for place, number in enumerate(wanted):
            places.setdefault(number, []).append(place)
        out = np.empty(0, np.uint8)
        for number, frame in self._each(sorted(places)):
            image = pixels(frame)
            del frame
            if not out.size:
                out = np.empty((len(wanted), *image.shape), np.uint8)
            for place in places[number]:
                out[place] = image
            del image
        return out

    def each(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Iterate over the distinct frames at `indices` while decoding: (frame number, uint8 [H, W, 3], read-only).

        Memory does not depend on the number of frames. Frame numbers increase, except for frames that needed a second attempt, which
        come last. Raises as `frames` does, during the iteration.
        """
        for number, frame in self.pictures(indices):
            image = pixels(frame)
            del frame
            yield number, image
            del image

    def pictures(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[int, Frame]]:
        """As `each`, but yields a large frame as a `Picture`, which is valid until the next frame is requested."""
        yield from self._each(sorted(set(self._known(indices))))

    def _known(self, indices: Sequence[int] | np.ndarray) -> list[int]:
        wanted = [int(i) for i in indices]
        if not wanted or min(wanted) < 0 or max(wanted) >= self.frame_count:
            raise IndexError(f"{self.path} has frames 0 to {self.frame_count - 1}, not {wanted}")
        return wanted

    @abstractmethod
    def _each(self, numbers: list[int]) -> Iterator[tuple[int, Frame]]:
        """Yield the frames `numbers`, which increase, all of one size; a number yielded again replaces the earlier frame."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def from_pack(path: Path) -> Iterator[None]:
    """A context for reading `path` from a pack. Raises VideoError if a shard or an index cannot be read."""
    try:
        yield
    except DamagedError as error:
        raise VideoError(path, str(error)) from error
    except OSError as error:
        raise VideoError(path, os_error_text(error), transient=is_transient(error)) from error


def located(path: Path) -> Stored | None:
    """The location of a packed video, or None for a file. Raises VideoError if the pack cannot be read."""
    with from_pack(path):
        return find_packed(path)


def check_file(path: Path) -> None:
    """Raise VideoError unless `path` is a non-empty regular file; libraries report this less clearly, or block."""
    if (stored := located(path)) is not None:
        if not stored.size:
            raise VideoError(path, "empty file")
        return
    try:
        found = os.stat(path)
    except ValueError as error:
        raise VideoError(path, "no name of a file (a NUL in it)") from error
    except OSError as error:
        raise VideoError(path, error.strerror or str(error), transient=is_transient(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise VideoError(path, "not a file of bytes but a folder, pipe or device")
    if found.st_size == 0:
        raise VideoError(path, "empty file")


def is_transient(error: BaseException) -> bool:
    """Whether an error of the operating system may be temporary (EIO, ESTALE, ETIMEDOUT …)."""
    lasting = (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError)
    return isinstance(error, OSError) and not isinstance(error, lasting) and error.errno not in _PERMANENT_ERRNOS


def check_deadline(path: Path, deadline: float) -> None:
    """Raise VideoError if the monotonic clock is past `deadline`."""
    if time.monotonic() > deadline:
        raise VideoError(path, "decoding took longer than data.decode_timeout")
