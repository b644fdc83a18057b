"""RandAugment of large frames, tile by tile: bit-equal to `randaugment_opencv`, without a full RGB frame in memory.

The tiles of a frame are processed once per statistic, and once for the crop. Most filters give the same bits for any part of the frame.
A warp does so only if the coordinates that OpenCV uses are known, which `warps_agree` tests.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from functools import cache

import cv2
import numpy as np

from multitrain.data.decode import Picture
from multitrain.data.randaugment import FILL, Operation
from multitrain.data.randaugment_opencv import FrameCropper, LazyImage, Step, Warp, regions_of
from multitrain.data.spatial import Box

_TILE = 384
"""Pixels along the side of a tile."""


class TileCropper:
    """Computes the crop of augmented large frames, as `cropper` does; with `size`, only the rows that a resize to `size` rows reads."""

    def __init__(self, cropper: FrameCropper, size: int | None = None) -> None:
        self._cropper, self._frame, self._crop = cropper, cropper.frame, cropper.crop
        self._rows = rows_read(self._crop.height, size or self._crop.height)
        self._steps: list[Step] = [
            _WarpPart(step, source, target) if isinstance(step, Warp) else step
            for step, source, target in cropper.steps()
        ]

    def __call__(self, picture: Picture) -> np.ndarray:
        """The crop of a large frame: uint8 [crop.height, crop.width, 3], read-only."""
        if any(isinstance(step, _WarpPart) for step in self._steps) and not warps_agree():
            return self._cropper(picture.whole())
        steps = self._resolved(picture)
        out = sparse((self._crop.height, self._crop.width, 3))
        for tile in _tiles(self._crop):
            top, left = tile.top - self._crop.top, tile.left - self._crop.left
            rows = self._rows[(self._rows >= top) & (self._rows < top + tile.height)]
            if len(rows):
                out[rows, left : left + tile.width] = _after_steps(steps, picture, tile).pixels()[rows - top]
        return out

    def _resolved(self, picture: Picture) -> list[Step]:
        """The steps, in which each statistic is replaced by its table for this frame."""
        steps, seen = list(self._steps), dict[int, np.ndarray]()
        for number, op in enumerate(steps):
            if isinstance(op, Operation):
                before = steps[:number]
                filters = sum(not isinstance(step, np.ndarray) for step in before)
                known = seen.get(filters) if op.name != "Contrast" else None
                steps[number], measured = self._statistic(op, before, picture, known)
                if op.name != "Contrast":
                    seen[filters] = measured
        return steps

    def _statistic(
        self, op: Operation, steps: Sequence[Step], picture: Picture, known: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(table of a statistic after some steps, its measurement); `known` measurements are not repeated."""
        total, image = np.float64(0), None
        for tile in _tiles(self._frame):
            image = _after_steps(steps, picture, tile)
            if known is not None:
                break
            total = total + image.measure(op)
        assert image is not None
        measured = total if known is None else known
        return image.table(op, measured, self._frame.height * self._frame.width), measured


def _after_steps(steps: Sequence[Step], picture: Picture, tile: Box) -> LazyImage:
    """A tile of the frame, after the steps."""
    regions = regions_of(steps, tile)
    image = LazyImage(picture.cut(*regions[0]))
    for step, source, target in zip(steps, regions, regions[1:]):
        image.take(step, source, target)
    return image


def _tiles(box: Box) -> Iterator[Box]:
    for top in range(box.top, box.top + box.height, _TILE):
        for left in range(box.left, box.left + box.width, _TILE):
            yield Box(top, left, min(_TILE, box.top + box.height - top), min(_TILE, box.left + box.width - left))


class _WarpPart:
    """Computes parts of the output of `warp`, bit-equal to `warp` on the full part."""

    def __init__(self, warp: Warp, source: Box, target: Box) -> None:
        self._warp, self._source, self._target = warp, source, target
        self._map = warp.index_map(source, target).astype(np.float32)

    def source(self, target: Box) -> Box:
        return self._warp.source(target)

    def __call__(self, patch: np.ndarray, source: Box, target: Box) -> np.ndarray:
        if not (patch.size and target.height and target.width):
            return np.full((target.height, target.width, 3), FILL, np.uint8)
        x, y = coordinates(self._map, target.left - self._target.left, target.top - self._target.top, target)
        x -= np.float32(source.left - self._source.left)
        y -= np.float32(source.top - self._source.top)
        warped = cv2.remap(self._warp.sharpened(patch), x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT)
        return self._warp.finished(warped, self._warp.outside(target))


def coordinates(matrix: np.ndarray, left: int, top: int, part: Box) -> tuple[np.ndarray, np.ndarray]:
    """The input coordinates (x, y) that `warpAffine` uses for a part at (left, top) of its output: float32 [part.height, part.width],
    with the rounding of OpenCV 5.

    matrix: float32 [2, 3].
    """
    x = np.arange(left, left + part.width, dtype=np.float32)
    y = np.arange(top, top + part.height, dtype=np.float32)[:, None]
    across, down = (x * row[0] + (y * row[1] + row[2]) for row in matrix)
    return across, down


@cache
def warps_agree() -> bool:
    """Whether `remap` with :func:`coordinates` is bit-equal to `warpAffine` in the installed OpenCV; not before OpenCV 5."""
    image = np.random.default_rng(0).normal(128, 60, (300, 400, 3)).astype(np.float32)
    for angle in (-0.5, 0.1, 0.37):
        matrix = np.array([[np.cos(angle), np.sin(angle), 11.3], [-np.sin(angle), np.cos(angle), 7.9]])
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        whole = cv2.warpAffine(image, matrix, (400, 300), flags=flags, borderMode=cv2.BORDER_CONSTANT)
        part = Box(90, 130, 111, 127)
        x, y = coordinates(matrix.astype(np.float32), part.left, part.top, part)
        if not np.array_equal(cv2.remap(image, x, y, cv2.INTER_CUBIC), part.cut(whole)):
            return False
    return True


def rows_read(length: int, size: int) -> np.ndarray:
    """Rows of an image of `length` rows that bilinear resizing to `size` rows reads: int64, increasing."""
    if length <= 4 * size:
        return np.arange(length)
    at = (np.arange(size) + 0.5) * (length / size) - 0.5
    near = np.floor(np.stack([at - 0.01, at + 0.01, at + 0.99, at + 1.01])).astype(np.int64)
    return np.unique(near.clip(0, length - 1))


def sparse(shape: tuple[int, ...]) -> np.ndarray:
    """A uint8 array of zeros whose pages are allocated when written."""
    size = int(np.prod(shape))
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.zeros(shape, np.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8).reshape(shape)
