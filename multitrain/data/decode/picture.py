"""A large decoded frame that becomes RGB part by part: no whole picture is held but the one that the decoder holds itself.

A part has the same bits as the whole frame converted at once. Where that is not known to hold (a size that chroma does not
divide), there is no `Picture`, and the frame is converted whole.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import av

LARGE = 1 << 22
"""Pixels from which on a frame is converted and worked on in parts, to save memory."""

_GRID = 32
"""Parts that are converted begin at multiples of this many pixels, so that chroma and vector instructions fall alike."""
_MARGIN = 16
"""Pixels around a part that are converted with it, for filters of chroma reach beyond it."""

Turn = Callable[[np.ndarray], np.ndarray]
"""From an image as stored, [h, w, ...], to the upright one."""


class Picture:
    """One frame, upright.

    It refers to the decoder's own memory: to be let go of before the next frame is decoded.

    Attributes:
        shape: (height, width, 3), as of the array that `whole` gives.
    """

    def __init__(self, frame: av.VideoFrame, cutter: Cutter) -> None:
        self._frame, self._cutter = frame, cutter
        self.shape: tuple[int, int, int] = (*cutter.upright, 3)

    def cut(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The pixels inside a box of the frame: uint8 [height, width, 3], RGB, not to be written to."""
        return self._cutter.cut(self._frame, top, left, height, width)

    def whole(self) -> np.ndarray:
        """All pixels: uint8 [H, W, 3], RGB."""
        return self._cutter.whole(self._frame)


Frame = np.ndarray | Picture
"""What decoders give: uint8 [H, W, 3], RGB, or a large frame whose parts can be asked for."""


def pixels(frame: Frame) -> np.ndarray:
    """All pixels of a frame: uint8 [H, W, 3], RGB."""
    return frame.whole() if isinstance(frame, Picture) else frame


def part(frame: Frame, top: int, left: int, height: int, width: int) -> np.ndarray:
    """The pixels inside a box of a frame: uint8 [height, width, 3], RGB, not to be written to."""
    if isinstance(frame, Picture):
        return frame.cut(top, left, height, width)
    return frame[top : top + height, left : left + width]


def can_be_cut(frame: av.VideoFrame) -> bool:
    """Whether a part of the frame has the bits of the whole: planes of chroma, if fewer, are half as fine and end with it."""
    step, kind = 4 if frame.interlaced_frame else 2, frame.format
    across, down = kind.chroma_width(4), kind.chroma_height(4)
    fits = min(across, down) >= 2 and frame.width % step == frame.height % step == 0
    return fits and (kind.is_planar or across == 4)


class Cutter:
    """Makes upright RGB of the frames of one video.

    Args:
        width, height: of the frames as stored; frames of other sizes are resized to it.
        turn: to the upright image.
    """

    def __init__(self, width: int, height: int, turn: Turn) -> None:
        self.width, self.height = width, height
        self._turn, self._orders = turn, _orders(turn)
        self._whole = _Converter()
        self._windows: dict[tuple[int, int, str], _Window] = {}
        self.upright = (width, height) if self._orders[0] else (height, width)

    def whole(self, frame: av.VideoFrame) -> np.ndarray:
        """All pixels of a frame; the memory is theirs."""
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
    """Frames of one size as RGB: uint8 [H, W, 3], whose memory is the frame's own."""

    def __init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()  # one for all frames: setting it up costs as much as a frame

    def __call__(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        rgb = self._reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1)
        plane = rgb.planes[0]
        return np.ndarray((height, width, 3), np.uint8, memoryview(plane), strides=(plane.line_size, 3, 1))


class _Window:
    """Converts parts of one size: libavfilter's `crop` refers to the frame's memory, and keeps all that is said of it."""

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
    """Where what is converted begins, and its length: of few lengths, since each costs its own set-up."""
    first = max(start - _MARGIN, 0) // _GRID * _GRID
    long = -(-(length + 2 * _MARGIN + _GRID - 1) // (2 * _GRID)) * 2 * _GRID
    return first, min(long, size - first)


def _orders(turn: Turn) -> tuple[bool, bool, bool]:
    """Whether `turn` swaps rows and columns, and then turns the order of rows, of columns."""
    corners = turn(np.array([[0, 1, 2], [3, 4, 5]]))
    swapped = corners.shape == (3, 2)
    first = int(corners[0, 0])
    last_row, last_column = first >= 3, first % 3 == 2
    return (swapped, last_column, last_row) if swapped else (False, last_row, last_column)


__all__ = ["LARGE", "Cutter", "Frame", "Picture", "can_be_cut", "part", "pixels"]
