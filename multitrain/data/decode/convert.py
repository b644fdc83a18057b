"""Decoded frames to upright RGB."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from multitrain.data.decode.container import check_size
from multitrain.data.decode.picture import LARGE, Cutter, Frame, Picture, can_be_cut
from multitrain.data.decode.video import VideoError

if TYPE_CHECKING:
    import av


class Converter:
    """Converts decoded frames of one video to upright RGB, all with the size and orientation of the first."""

    def __init__(self, path: Path, frame_count: int) -> None:
        self._path, self._count = path, frame_count
        self._cutter: Cutter | None = None
        self._hanging = False

    def __call__(self, frame: av.VideoFrame, number: int) -> Frame:
        """Convert a frame to uint8 [H, W, 3], in memory of its own, or to a `Picture` if it is large."""
        if frame.is_corrupt:
            raise VideoError(self._path, f"frame {number} of {self._count} is damaged")
        if (
            self._cutter is None
        ):  # read once: a frame and its side data reference each other, so that reading it from every frame would leak them
            check_size(self._path, frame.width, frame.height)
            self._cutter = Cutter(frame.width, frame.height, partial(_upright, matrix=_display_matrix(frame)))
            self._hanging = frame.width * frame.height > LARGE
        cutter = self._cutter
        large = frame.width * frame.height > LARGE and (frame.width, frame.height) == (cutter.width, cutter.height)
        return Picture(frame, cutter) if large and can_be_cut(frame) else cutter.whole(frame)

    def let_go(self) -> None:
        """Free the first frame if it is large; called when no other reference to it exists."""
        if self._hanging:
            self._hanging = False
            gc.collect()


def upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    """(height, width) in which a frame is shown."""
    matrix = _display_matrix(frame)
    turned = matrix is not None and _is_turned(matrix)
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int] | None:
    """The linear part (a, b, c, d) of the frame's display matrix, (x, y) → (a·x + c·y, b·x + d·y); None for upright."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    matrix = np.frombuffer(bytes(data), np.int32)
    return int(matrix[0]), int(matrix[1]), int(matrix[3]), int(matrix[4])


def _is_turned(matrix: tuple[int, int, int, int]) -> bool:
    """Whether a display matrix, rounded to quarter turns, rotates by 90° or 270°."""
    a, b, c, d = matrix
    return abs(a) + abs(d) < abs(b) + abs(c)


def _upright(image: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """`image` [H, W, 3] rotated and mirrored by its display matrix, rounded to quarter turns."""
    if matrix is None:
        return image
    a, b, c, d = matrix
    if _is_turned(matrix):
        image, across, down = image.swapaxes(0, 1), c < 0, b < 0
    else:
        across, down = a < 0, d < 0
    return image[:: -1 if down else 1, :: -1 if across else 1]
