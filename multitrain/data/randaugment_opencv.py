"""RandAugment with OpenCV, evaluated lazily: computes only the pixels of the crop, and one look-up for a sequence of tables.

There are three kinds of operations. A *table* maps each grey level (Invert, Posterize …). A *statistic* computes such a
table from the full frame at that step (AutoContrast, Equalize, Contrast). A *filter* combines pixels or
channels (Color, Sharpness and the geometric ones). Consecutive tables are composed into one pending table, which is applied when a
filter needs the pixels; a statistic takes the histogram of the stored pixels and maps it through the pending table. Up to the last
statistic, filters compute full frames; after it, each filter computes only the part that the next one reads, and the last one the crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import cv2
import numpy as np

from multitrain.data.decode import LARGE
from multitrain.data.randaugment import FILL, Operation, affine
from multitrain.data.spatial import Box

_LUMA = (0.299, 0.587, 0.114)
_STATISTICS = ("AutoContrast", "Equalize", "Contrast")
_TRUNCATE = 0.499
"""Subtracted because Pillow truncates where OpenCV rounds; just under 1/2, so that whole numbers do not change."""
_SHARPER = (-0.02, 1.04, -0.02)
"""Brings a rotated image closest to Pillow's: the mean difference falls from 0.61 to 0.49 grey levels, the 99th percentile from 3 to 2."""
_WIDE_ROWS = 64
"""Rows processed at a time where each pixel needs values wider than uint8."""
_ROWS_PER_BAND = 512
"""Rows of a large frame processed at a time."""
_REACH = 2
"""Pixels that a cubic kernel reads beyond the frame for a point inside."""


class Filter(Protocol):
    """An operation that reads more than one pixel and channel for each output value."""

    def source(self, target: Box) -> Box:
        """The part of the input from which the part `target` of the output is computed."""

    def __call__(self, patch: np.ndarray, source: Box, target: Box) -> np.ndarray:
        """Compute the part `target` of the output from `patch`, the part `source` of the input: uint8 [h, w, 3]."""


Step = Operation | np.ndarray | Filter
"""A statistic, a table (uint8 [256, 1] for all channels or [256, 3] for each) or a filter."""


class FrameCropper:
    """Computes the crop of augmented frames of one size."""

    def __init__(self, height: int, width: int, operations: Sequence[Operation], crop: Box) -> None:
        self.frame, self.crop = Box(0, 0, height, width), crop
        steps = [_step(op, width, height) for op in operations]
        whole = 1 + max((i for i, step in enumerate(steps) if isinstance(step, Operation)), default=-1)
        self._whole, self._partly = steps[:whole], steps[whole:]
        # Shifts, blends and sharpening give the same rows for any part processed; the rounding of a warp depends on the part.
        large = crop.height * crop.width > LARGE and not any(isinstance(step, Warp) for step in self._partly)
        rows = _ROWS_PER_BAND if large else crop.height
        self._bands = [
            crop._replace(top=at, height=min(rows, crop.top + crop.height - at))
            for at in range(crop.top, crop.top + crop.height, rows)
        ]

    def steps(self) -> list[tuple[Step, Box, Box]]:
        """All steps, each with the part of the frame it reads and the part it computes."""
        regions = regions_of(self._partly, self.crop)
        whole = [(step, self.frame, self.frame) for step in self._whole]
        return whole + list(zip(self._partly, regions, regions[1:]))

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """The crop of `frame`, uint8 [H, W, 3]: uint8 [crop.height, crop.width, 3], read-only, because it may be a view of `frame`."""
        image = LazyImage(frame)
        for step in self._whole:
            image.take(step, self.frame, self.frame)
        if len(self._bands) == 1:
            return self._part(image, self.crop)
        out = np.empty((self.crop.height, self.crop.width, 3), np.uint8)
        for band in self._bands:
            out[band.top - self.crop.top :][: band.height] = self._part(image.copy(), band)
        return out

    def _part(self, image: LazyImage, target: Box) -> np.ndarray:
        """The part `target` of the frame after the last step, given the full frame before the first step that computes parts."""
        regions = regions_of(self._partly, target)
        image.cut(regions[0])
        for step, source, wanted in zip(self._partly, regions, regions[1:]):
            image.take(step, source, wanted)
        return image.pixels()


def regions_of(steps: Sequence[Step], crop: Box) -> list[Box]:
    """The part of the frame that exists before each step, and the crop after the last one."""
    regions = [crop]
    for step in reversed(steps):
        regions.append(regions[-1] if isinstance(step, np.ndarray | Operation) else step.source(regions[-1]))
    return regions[::-1]


class LazyImage:
    """Pixels, and a pending table that is not yet applied to them."""

    def __init__(self, frame: np.ndarray) -> None:
        self._image = frame
        self._table: np.ndarray | None = None
        self._histogram: np.ndarray | None = None

    def copy(self) -> LazyImage:
        """A copy that shares pixels and table."""
        other = LazyImage(self._image)
        other._table = self._table
        return other

    def take(self, step: Step, source: Box, target: Box) -> None:
        """Apply one step, from one part of the frame to another."""
        if isinstance(step, Operation):
            step = self._statistic(step)
        if isinstance(step, np.ndarray):
            self._table = step if self._table is None else _compose(step, self._table)
        else:
            self._replace(step(self.pixels(), source, target))

    def cut(self, box: Box) -> None:
        """Keep only a part of the pixels."""
        self._image, self._histogram = box.cut(self._image), None

    def pixels(self) -> np.ndarray:
        """The pixels, with the pending table applied."""
        if self._table is not None:
            self._replace(cv2.LUT(self._image, self._table[None]) if self._image.size else self._image)
        return self._image

    def _replace(self, image: np.ndarray) -> None:
        self._image, self._table, self._histogram = image, None, None

    def _statistic(self, op: Operation) -> np.ndarray:
        pixels = self._image.shape[0] * self._image.shape[1]
        return self.table(op, self.measure(op), pixels)

    def measure(self, op: Operation) -> np.ndarray:
        """The input of a statistic, which is additive over the parts of a frame. For Contrast: the sum of the luma of all pixels. Else: the
        histogram of the pixels before the pending table, [3, 256], float32 or float64, whole numbers."""
        if op.name == "Contrast":
            return np.array(self._luma())
        if self._histogram is None:
            counts = [cv2.calcHist([self._image], [c], None, [256], [0, 256]).ravel() for c in range(3)]
            self._histogram = np.stack(counts)
        return self._histogram

    def table(self, op: Operation, measured: np.ndarray, pixels: int) -> np.ndarray:
        """The table of a statistic of `pixels` pixels, given the sum of `measure`."""
        if op.name == "Contrast":
            return _enhance(op.argument, int(float(measured) * (1.0 / pixels) + 0.5))[:, None]
        make = _autocontrast if op.name == "AutoContrast" else _equalize
        return np.stack([make(h) for h in self._map_histogram(measured.astype(np.float32))], axis=1)

    def _luma(self) -> float:
        """The sum of the pixels' luma."""
        total = 0.0
        for first in range(0, len(self._image), _ROWS_PER_BAND):
            rows = self._image[first : first + _ROWS_PER_BAND]
            rows = rows if self._table is None else cv2.LUT(rows, self._table[None])
            total += cv2.sumElems(cv2.cvtColor(rows, cv2.COLOR_RGB2GRAY))[0]
        return total

    def _map_histogram(self, histogram: np.ndarray) -> np.ndarray:
        """The histogram after the pending table: int64 [3, 256]."""
        if self._table is None:
            return histogram.astype(np.int64)
        tables = np.broadcast_to(self._table, (256, 3))
        pushed = [np.bincount(tables[:, c], histogram[c], minlength=256) for c in range(3)]
        return np.stack(pushed).astype(np.int64)


def _step(op: Operation, width: int, height: int) -> Step:
    if op.name in _STATISTICS:
        return op
    if op.name == "Color":
        return _Colour(op.argument)
    if op.name == "Sharpness":
        return _Sharpness(op.argument, width, height)
    if op.name == "TranslateX":
        return _Shift(op.argument * width, width, axis=1)
    if op.name == "TranslateY":
        return _Shift(op.argument * height, height, axis=0)
    matrix = affine(op, width, height)
    return _table(op).astype(np.uint8)[:, None] if matrix is None else Warp(matrix, width, height)


def _compose(second: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The composition of two tables."""
    return second[first[:, 0]] if first.shape[1] == 1 else second[first, np.arange(second.shape[1])]


def _table(op: Operation) -> np.ndarray:
    """The table of an operation that does not depend on the frame: integers [256]."""
    levels, argument = np.arange(256), op.argument
    if op.name == "Invert":
        return 255 - levels
    if op.name == "Posterize":
        return levels & ~((1 << (8 - int(argument))) - 1)
    if op.name == "Solarize":
        return np.where(levels < argument, levels, 255 - levels)
    if op.name == "SolarizeAdd":
        return np.where(levels < 128, np.minimum(levels + int(argument), 255), levels)
    if op.name == "Brightness":
        return _enhance(argument, 0)
    raise ValueError(f"unknown operation {op.name!r}")


def _enhance(factor: float, grey: int) -> np.ndarray:
    """Pillow's blend of a grey level with each level, in float32, truncated."""
    levels = np.float32(grey) + np.float32(factor) * (np.arange(256, dtype=np.float32) - np.float32(grey))
    return np.clip(levels, 0, 255).astype(np.uint8)


def _autocontrast(counts: np.ndarray) -> np.ndarray:
    """The table that stretches the occurring levels to 0 … 255."""
    present = np.flatnonzero(counts)
    low, high = int(present[0]), int(present[-1])
    if high <= low:
        return np.arange(256, dtype=np.uint8)
    scale = 255.0 / (high - low)
    return np.clip(np.arange(256) * scale - low * scale, 0, 255).astype(np.uint8)


def _equalize(counts: np.ndarray) -> np.ndarray:
    """The table of histogram equalisation, in Pillow's integer arithmetic."""
    present = np.flatnonzero(counts)
    step = int(counts.sum() - counts[present[-1]]) // 255
    if len(present) <= 1 or step == 0:
        return np.arange(256, dtype=np.uint8)
    before = np.cumsum(counts) - counts
    return np.minimum((step // 2 + before) // step, 255).astype(np.uint8)


class _Colour:
    """Blends each pixel with its luma."""

    def __init__(self, factor: float) -> None:
        matrix = factor * np.eye(3) + (1.0 - factor) * np.array([_LUMA] * 3)
        self._matrix = np.hstack([matrix, np.full((3, 1), -_TRUNCATE)]).astype(np.float32)

    def source(self, target: Box) -> Box:
        return target

    def __call__(self, patch: np.ndarray, source: Box, target: Box) -> np.ndarray:
        return cv2.transform(patch, self._matrix) if patch.size else patch


class _Sharpness:
    """Blends each pixel with its smoothed neighbourhood; the outermost pixels of the frame do not change."""

    def __init__(self, factor: float, width: int, height: int) -> None:
        kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) * ((1.0 - factor) / 13.0)
        kernel[1, 1] += factor
        self._kernel = kernel.astype(np.float32)
        self._width, self._height = width, height

    def source(self, target: Box) -> Box:
        return _clip(target.top - 1, target.left - 1, target.height + 2, target.width + 2, self._height, self._width)

    def __call__(self, patch: np.ndarray, source: Box, target: Box) -> np.ndarray:
        if not patch.size:
            return patch
        out = cv2.filter2D(patch, -1, self._kernel, delta=-_TRUNCATE, borderType=cv2.BORDER_REPLICATE)
        if source.top == 0:
            out[0] = patch[0]
        if source.left == 0:
            out[:, 0] = patch[:, 0]
        if source.top + source.height == self._height:
            out[-1] = patch[-1]
        if source.left + source.width == self._width:
            out[:, -1] = patch[:, -1]
        return _inside(target, source).cut(out)


class _Shift:
    """Shifts the image along one axis by a fractional number of pixels, with Pillow's cubic kernel (a = -1) of five taps."""

    def __init__(self, offset: float, length: int, axis: int) -> None:
        self._offset, self._length, self._axis = offset, length, axis
        self._whole = math.floor(offset + 0.5)
        distances = np.abs(np.arange(-2, 3) - (offset - self._whole))
        kernel = np.where(distances < 1, _near(distances), np.where(distances < 2, _far(distances), 0.0))
        self._kernel = kernel.astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))

    def _covered(self, target: Box) -> tuple[int, int]:
        """The output positions in `target` along the axis whose input is inside the frame."""
        start = max(target[self._axis], math.ceil(-0.5 - self._offset))
        stop = min(target[self._axis] + target[2 + self._axis], math.ceil(self._length - 0.5 - self._offset))
        return start, max(start, stop)

    def source(self, target: Box) -> Box:
        start, stop = self._covered(target)
        first = max(0, start + self._whole - 2)
        last = min(self._length, stop + self._whole + 2)
        return _along(target, self._axis, first, last - first if stop > start else 0)

    def __call__(self, patch: np.ndarray, source: Box, target: Box) -> np.ndarray:
        out = np.full((target.height, target.width, 3), FILL, np.uint8)
        start, stop = self._covered(target)
        if stop > start and patch.size:
            moved = cv2.filter2D(patch, -1, self._kernel, delta=-_TRUNCATE, borderType=cv2.BORDER_REPLICATE)
            read = _along(target, self._axis, start + self._whole, stop - start)
            written = _along(target, self._axis, start, stop - start)
            _inside(written, target).cut(out)[:] = _inside(read, source).cut(moved)
        return out


def _near(d: np.ndarray) -> np.ndarray:
    return (d - 2.0) * d * d + 1.0


def _far(d: np.ndarray) -> np.ndarray:
    return ((5.0 - d) * d - 8.0) * d + 4.0


class Warp:
    """Rotation and shear with cubic interpolation. OpenCV's kernel has a = -0.75 and steps of 1/32 pixel; Pillow's has a = -1.

    Sharpening the interpolated axes before the warp partly compensates the softer kernel.
    """

    def __init__(self, matrix: tuple[float, ...], width: int, height: int) -> None:
        self._matrix = np.array(matrix).reshape(2, 3)
        moves = (self._matrix != np.eye(2, 3)).any(axis=1)
        self._along_x, self._along_y = (np.array(_SHARPER if m else (0, 1, 0), np.float32) for m in moves)
        self._width, self._height = width, height
        self._outside: dict[Box, np.ndarray | None] = {}

    def source(self, target: Box) -> Box:
        corners = [(target.left + x, target.top + y, 1) for x in (0, target.width) for y in (0, target.height)]
        x, y = self._matrix @ np.array(corners).T
        left, top = math.floor(x.min()) - 3, math.floor(y.min()) - 3
        return _clip(top, left, math.ceil(y.max()) + 3 - top, math.ceil(x.max()) + 3 - left, self._height, self._width)

    def __call__(self, patch: np.ndarray, source: Box, target: Box) -> np.ndarray:
        if not patch.size:
            return np.full((target.height, target.width, 3), FILL, np.uint8)
        warped = cv2.warpAffine(
            self.sharpened(patch),
            self.index_map(source, target),
            (target.width, target.height),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
        )
        if target not in self._outside:
            self._outside[target] = self.outside(target)
        return self.finished(warped, self._outside[target])

    def sharpened(self, patch: np.ndarray) -> np.ndarray:
        """The padded and sharpened input of the interpolation: float32 [h + 2 _REACH, w + 2 _REACH, 3]."""
        # Float32 with a constant border is the fastest path of OpenCV's cubic warp (0.6 of uint8's time) and leaves
        # the rounding to this code. The frame's border is replicated here, as far as the kernel reads from inside.
        padded = cv2.copyMakeBorder(patch, _REACH, _REACH, _REACH, _REACH, cv2.BORDER_REPLICATE)
        return cv2.sepFilter2D(padded, cv2.CV_32F, self._along_x, self._along_y, borderType=cv2.BORDER_REPLICATE)

    def finished(self, warped: np.ndarray, outside: np.ndarray | None) -> np.ndarray:
        """Round the interpolated pixels to uint8, with grey where `outside` is not 0."""
        out = cv2.subtract(warped, np.full(4, _TRUNCATE), dtype=cv2.CV_8U)
        return out if outside is None else cv2.copyTo(np.full_like(out, FILL), outside, out)

    def index_map(self, source: Box, target: Box) -> np.ndarray:
        """The affine map between pixel indices of the padded patches, given the map between corner coordinates of the frame."""
        start = self._matrix @ np.array([target.left + 0.5, target.top + 0.5, 1.0])
        return np.column_stack([self._matrix[:, :2], start - 0.5 + _REACH - np.array([source.left, source.top])])

    def outside(self, target: Box) -> np.ndarray | None:
        """255 where the map leaves the frame; None if nowhere."""
        x = np.arange(target.left, target.left + target.width)[None, :] + 0.5
        (a, b, c), (d, e, f) = self._matrix
        mask = np.empty((target.height, target.width), np.uint8)
        for first in range(
            0, target.height, _WIDE_ROWS
        ):  # float64 coordinates of a full large frame need too much memory
            rows = mask[first : first + _WIDE_ROWS]
            y = np.arange(target.top + first, target.top + first + len(rows))[:, None] + 0.5
            u, v = a * x + b * y + c, d * x + e * y + f
            outside = (u < 0) | (u >= self._width) | (v < 0) | (v >= self._height)
            np.multiply(outside, np.uint8(255), out=rows)
        return mask if mask.any() else None


def _clip(top: int, left: int, height: int, width: int, frame_height: int, frame_width: int) -> Box:
    bottom, right = min(top + height, frame_height), min(left + width, frame_width)
    top, left = max(top, 0), max(left, 0)
    return Box(top, left, max(0, bottom - top), max(0, right - left))


def _along(box: Box, axis: int, start: int, length: int) -> Box:
    """The box with another start and length along one axis."""
    return Box(start, box.left, length, box.width) if axis == 0 else Box(box.top, start, box.height, length)


def _inside(box: Box, outer: Box) -> Box:
    """The box in coordinates of the enclosing box `outer`."""
    return Box(box.top - outer.top, box.left - outer.left, box.height, box.width)
