"""Crop boxes of clips, and bilinear resizing as in the published tests.

Bilinear resizing is that of `torch.nn.functional.interpolate` with align_corners=False and no antialiasing: two taps
per axis at any scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from multitrain.config import ModelConfig
from multitrain.data.decode import LARGE, Frame, part
from multitrain.data.random import KeyedRNG

MEAN = 0.45
"""Mean of the pixel values, from 0 to 1, for normalising every channel."""
STD = 0.225
"""Their standard deviation."""


def network_pixels(model: ModelConfig) -> tuple[list[float], list[float], bool] | None:
    """From values normalised by `MEAN` and `STD` to those of a network: factor and summand for red, green and blue, and whether the
    order of the channels is then reversed; None if nothing changes."""
    reverse = model.channels == "bgr"
    if not reverse and set(model.mean) == {MEAN} and set(model.std) == {STD}:
        return None
    pairs = list(zip(model.mean, model.std))
    return [STD / std for _, std in pairs], [(MEAN - mean) / std for mean, std in pairs], reverse


_BAND = 64
"""Rows of a large frame that are resized at a time."""

_CROP_TRIES = 10
_ERASE_TRIES = 100
_ERASE_AREA = (0.02, 1.0 / 3.0)
_ERASE_ASPECT = (0.3, 1.0 / 0.3)


class Box(NamedTuple):
    """A rectangle of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: np.ndarray) -> np.ndarray:
        """The view of [H, W, ...] inside the box."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


def random_resized_crop(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], draws: KeyedRNG
) -> Box:
    """The box of a random resized crop (Szegedy et al., 2015) of a frame of height × width pixels.

    area: fraction of the frame, uniform; aspect: width ÷ height, log-uniform. After ten boxes that do not fit: the largest
    centred box whose aspect ratio is in range.
    """
    for _ in range(_CROP_TRIES):
        pixels = draws.uniform(*area) * height * width
        ratio = math.exp(draws.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(draws.integer(0, height - h), draws.integer(0, width - w), h, w)
    h, w = height, width
    if width / height < aspect[0]:
        h = max(1, round(width / aspect[0]))
    elif width / height > aspect[1]:
        w = max(1, round(height * aspect[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def erase_box(height: int, width: int, probability: float, draws: KeyedRNG) -> Box:
    """The box that random erasing (Zhong et al., 2020) fills with noise; all zeros for none.

    One box for all frames: 2 % to 33 % of the area, height ÷ width log-uniform from 0.3 to 3.33, inside the frame.
    """
    if draws.coin(probability):
        for _ in range(_ERASE_TRIES):
            pixels = draws.uniform(*_ERASE_AREA) * height * width
            ratio = math.exp(draws.uniform(math.log(_ERASE_ASPECT[0]), math.log(_ERASE_ASPECT[1])))
            h, w = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if h < height and w < width:
                return Box(draws.integer(0, height - h), draws.integer(0, width - w), h, w)
    return Box(0, 0, 0, 0)


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) after resizing the shorter side to `short_side` pixels; the longer side is rounded down."""
    if width < height:
        return math.floor(height / width * short_side), short_side
    return short_side, math.floor(width / height * short_side)


def uniform_crop(height: int, width: int, size: int, position: int) -> Box:
    """A square crop at the start (`position` 0), centre (1) or end (2) of the longer side, centred on the shorter side.

    Raises:
        ValueError: the frame is smaller than the crop, or the position is invalid.
    """
    if size > min(height, width):
        raise ValueError(f"a crop of {size} pixels does not fit into {height} × {width}")
    if position not in (0, 1, 2):
        raise ValueError(f"crop position is 0, 1 or 2, not {position}")
    top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
    if position != 1:
        if height > width:
            top = 0 if position == 0 else height - size
        else:
            left = 0 if position == 0 else width - size
    return Box(top, left, size, size)


def resize_crop(image: Frame, size: tuple[int, int], crop: Box) -> np.ndarray:
    """The box `crop` of an image resized to `size` (height, width).

    image: uint8 or float32 [H, W, C], C up to 4, or a large frame. Returns float32 [crop.height, crop.width, C], equal to the box of
    ``interpolate(image, size, mode="bilinear", align_corners=False)`` up to 2e-7 of the range, or
    4e-6 where a position is halfway between two float32 numbers.
    """
    height, width = (
        _Axis(image.shape[0], size[0], crop.top + crop.height),
        _Axis(image.shape[1], size[1], crop.left + crop.width),
    )
    # Intel IPP, which OpenCV prefers, rounds positions differently. The setting is per thread.
    faster = cv2.ipp.useIPP()
    cv2.ipp.setUseIPP(False)
    try:
        halved = (height.scale, width.scale) == (2, 2)  # OpenCV halves with other sums
        if height.read * width.read > LARGE and not halved:
            out = _linear(_across(image, height.read, width), 1, 1 / height.scale)
        else:
            out = _linear(part(image, 0, 0, height.read, width.read), 1 / width.scale, 1 / height.scale)
    finally:
        cv2.ipp.setUseIPP(faster)
    return crop.cut(out.reshape(*out.shape[:2], -1))


def _across(image: Frame, rows: int, width: _Axis) -> np.ndarray:
    """The first rows of a large image, resized horizontally in bands: the same sums as for the full image, with less float32 memory."""
    out = np.empty(0, np.float32)
    for at in range(0, rows, _BAND):
        band = _linear(part(image, at, 0, min(_BAND, rows - at), width.read), 1 / width.scale, 1)
        if not at:
            out = np.empty((rows, *band.shape[1:]), np.float32)
        out[at : at + len(band)] = band
    return out


def _linear(image: np.ndarray, across: float, down: float) -> np.ndarray:
    """A bilinear resize by factors, in float32."""
    image = image.astype(np.float32, copy=False)
    return cv2.resize(image, None, fx=across, fy=down, interpolation=cv2.INTER_LINEAR)


class _Axis:
    """One axis of a resize, of which output pixels 0 to `stop` are computed.

    scale: input pixels per output pixel, rounded to float32 as in torch. OpenCV then finds the same positions: it
    computes scale × (x + 1/2) − 1/2 in float64 and rounds once, as torch's fused multiply-add does. Without the rounded scale, positions
    would differ by up to 3e-5 of a pixel.
    read: number of input pixels on which the output depends.
    """

    def __init__(self, size_in: int, size_out: int, stop: int) -> None:
        self.scale = float(np.float32(size_in) / np.float32(size_out))
        self.read = min(size_in, math.floor(self.scale * (stop - 0.5) - 0.5) + 2)


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box that contains all boxes."""
    top, left = min(b.top for b in boxes), min(b.left for b in boxes)
    bottom, right = max(b.top + b.height for b in boxes), max(b.left + b.width for b in boxes)
    return Box(top, left, bottom - top, right - left)
