"""Convert a large decoded frame to RGB part by part, to save memory: no full RGB frame exists.

A part has the same bits as in the converted full frame. Where this is not guaranteed (the chroma subsampling does not divide the
size), no `Picture` is made, and the frame is converted at once.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import av

LARGE = 1 << 22
"""Pixels above which a frame is converted and processed in parts."""

_GRID = 32
"""Parts start at multiples of this many pixels, so that chroma samples and vector instructions align as in the full frame."""
_MARGIN = 16
"""Pixels around a part that are converted with it, because chroma filters read beyond the part."""

Turn = Callable[[np.ndarray], np.ndarray]
"""A function from an image as stored, [h, w, ...], to the upright image."""


class Picture:
    """One upright frame.

    References the decoder's memory: release it before the next frame is decoded.

    Attributes:
        shape: (height, width, 3), the shape of the array that `whole` returns.
    """

    def __init__(self, frame: av.VideoFrame, cutter: Cutter) -> None:
        self._frame, self._cutter = frame, cutter
        self.shape: tuple[int, int, int] = (*cutter.upright, 3)

    def cut(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The pixels inside a box of the frame: uint8 [height, width, 3], RGB, read-only."""
        return self._cutter.cut(self._frame, top, left, height, width)

    def whole(self) -> np.ndarray:
        """All pixels: uint8 [H, W, 3], RGB."""
        return self._cutter.whole(self._frame)


Frame = np.ndarray | Picture
"""A decoded frame: uint8 [H, W, 3], RGB, or a `Picture` of a large frame."""


def pixels(frame: Frame) -> np.ndarray:
    """All pixels of a frame: uint8 [H, W, 3], RGB."""
    return frame.whole() if isinstance(frame, Picture) else frame


def part(frame: Frame, top: int, left: int, height: int, width: int) -> np.ndarray:
    """The pixels inside a box of a frame: uint8 [height, width, 3], RGB, read-only."""
    if isinstance(frame, Picture):
        return frame.cut(top, left, height, width)
    return frame[top : top + height, left : left + width]


def can_be_cut(frame: av.VideoFrame) -> bool:
    """Whether parts of the frame have the same bits as the full frame: chroma is not subsampled, or by 2 with even sizes."""
    step, kind = 4 if frame.interlaced_frame else 2, frame.format
    across, down = kind.chroma_width(4), kind.chroma_height(4)
    fits = min(across, down) >= 2 and frame.width % step == frame.height % step == 0
    return fits and (kind.is_planar or across == 4)


class Cutter:
    """Converts the frames of one video to upright RGB.

    Args:
        width, height: size of the frames as stored; frames of other sizes are resized to it.
        turn: function from a stored to an upright image.
    """

    def __init__(self, width: int, height: int, turn: Turn) -> None:
        self.width, self.height = width, height
        self._turn, self._orders = turn, _orders(turn)
        self._whole = _Converter()
        self._windows: dict[tuple[int, int, str], _Window] = {}
        self.upright = (width, height) if self._orders[0] else (height, width)

    def whole(self, frame: av.VideoFrame) -> np.ndarray:
        """All pixels of a frame, in new memory."""
        return self._turn(self._whole(frame, self.width, self.height))

    def cut(self, frame: av.VideoFrame, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The pixels inside a box of the upright frame."""
        swapped, down, across = self._orders
        if down:
            top = self.upright[0] - top - height
        if across:
            left = self.upright[1] - left - width
        if swapped:
            top, left, height, width = left, top, width, height
        return self._turn(self._stored(frame, top, left, height, width))

    def _stored(self, frame: av.VideoFrame, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The pixels inside a box of the frame as stored."""
        if not height or not width:
            return np.empty((height, width, 3), np.uint8)
        (y, h), (x, w) = _window(top, height, self.height), _window(left, width, self.width)
        key = h, w, frame.format.name
        if key not in self._windows:
            self._windows[key] = _Window(frame, h, w)
        return self._windows[key](frame, y, x)[top - y :, left - x :][:height, :width]


class _Converter:
    """Converts frames of one size to RGB: uint8 [H, W, 3], in the memory of the converted frame."""

    def __init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()  # one for all frames: creating it costs as much as converting a frame

    def __call__(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        rgb = self._reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1)
        plane = rgb.planes[0]
        return np.ndarray((height, width, 3), np.uint8, memoryview(plane), strides=(plane.line_size, 3, 1))


class _Window:
    """Converts parts of one size. libavfilter's `crop` references the frame's memory and keeps its properties."""

    def __init__(self, frame: av.VideoFrame, height: int, width: int) -> None:
        from av.filter import Graph

        self._height, self._width = height, width
        self._convert, self._graph = _Converter(), Graph()
        self._in = self._graph.add_buffer(None, frame.width, frame.height, frame.format, None, Fraction(1, 1000))
        self._crop = self._graph.add("crop", f"w={width}:h={height}:x=0:y=0:exact=1")
        self._out = self._graph.add("buffersink")
        self._graph.link_nodes(self._in, self._crop, self._out)
        self._graph.configure()

    def __call__(self, frame: av.VideoFrame, top: int, left: int) -> np.ndarray:
        self._crop.process_command("x", str(left))
        self._crop.process_command("y", str(top))
        self._in.push(frame)
        cropped: Any = self._out.pull()
        return self._convert(cropped, self._width, self._height)


def _window(start: int, length: int, size: int) -> tuple[int, int]:
    """(start, length) of the pixels to convert along an axis; few distinct lengths occur, because each needs a new converter."""
    first = max(start - _MARGIN, 0) // _GRID * _GRID
    long = -(-(length + 2 * _MARGIN + _GRID - 1) // (2 * _GRID)) * 2 * _GRID
    return first, min(long, size - first)


def _orders(turn: Turn) -> tuple[bool, bool, bool]:
    """(whether `turn` transposes, whether it then reverses the rows, whether it then reverses the columns)."""
    corners = turn(np.array([[0, 1, 2], [3, 4, 5]]))
    swapped = corners.shape == (3, 2)
    first = int(corners[0, 0])
    last_row, last_column = first >= 3, first % 3 == 2
    return (swapped, last_column, last_row) if swapped else (False, last_row, last_column)
