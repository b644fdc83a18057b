"""Augment the decoded frames of a training clip: RandAugment, random resized crop, flip, and the box to erase.

All random numbers of a clip are drawn before its first pixel is processed, in one fixed order, so that both backends make the
same clip from the same draws. Clips are uint8; the published code keeps float32 after the crop. Rounding to
whole grey levels is therefore the only difference between its clips and those of `backend=pil`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from multitrain.config import AugmentConfig
from multitrain.data import randaugment_opencv, randaugment_pil
from multitrain.data.decode import Frame, Picture, pixels
from multitrain.data.randaugment import Operation, draw_operations, parse_policy
from multitrain.data.randaugment_tiles import TileCropper
from multitrain.data.random import KeyedRNG
from multitrain.data.spatial import Box, erase_box, random_resized_crop, resize_crop


class Augmentation(NamedTuple):
    """All random values of one clip's augmentation."""

    operations: list[Operation]
    crop: Box
    flip: bool
    erase: Box


class Augmenter:
    """Augments the frames of one clip, one by one.

    Args:
        height, width: size of the frames in pixels.
        size: side of the square clip in pixels.
        draws: this clip's random numbers; the constructor draws all of them.
    """

    def __init__(
        self, height: int, width: int, config: AugmentConfig, size: int, draws: KeyedRNG, flip_allowed: bool
    ) -> None:
        self.drawn = draw_augmentation(height, width, config, size, draws, flip_allowed)
        self.change = changer(height, width, self.drawn, config.backend, size)
        self._size, self._backend = size, config.backend

    @property
    def box(self) -> np.ndarray:
        """The box to erase on the device: int32 [4] = (top, left, height, width), in pixels of the clip; zeros for none."""
        return np.array(self.drawn.erase, np.int32)

    def __call__(self, frame: Frame, target: np.ndarray) -> None:
        """Augment `frame`, uint8 [H, W, 3] or a large frame, which is not changed, into `target`, uint8 [size, size, 3]."""
        place(resized(self.change(frame), self._size, self._backend), target, self.drawn.flip)


def draw_augmentation(
    height: int, width: int, config: AugmentConfig, size: int, draws: KeyedRNG, flip_allowed: bool
) -> Augmentation:
    """Draw the augmentation of a clip of height × width pixels that becomes size × size."""
    operations = draw_operations(parse_policy(config.randaugment), draws) if config.randaugment else []
    crop = random_resized_crop(height, width, config.crop_area, config.crop_aspect, draws)
    flip = draws.coin(config.flip_probability) and flip_allowed
    return Augmentation(operations, crop, flip, erase_box(size, size, config.erase_probability, draws))


def changer(
    height: int, width: int, drawn: Augmentation, backend: str, size: int | None = None
) -> Callable[[Frame], np.ndarray]:
    """A function from a frame, uint8 [H, W, 3], to its crop after RandAugment, uint8 [crop.height, crop.width, 3].

    `opencv` is within about one grey level of `pil`, which processes the whole frame with Pillow's operations. Of a large
    frame's crop, `opencv` computes only the rows that `resized` to `size` reads, if `size` is given.
    """
    if backend != "opencv":
        return lambda frame: drawn.crop.cut(randaugment_pil.apply_all(pixels(frame), drawn.operations))
    whole = randaugment_opencv.FrameCropper(height, width, drawn.operations, drawn.crop)
    parts: list[TileCropper] = []

    def change(frame: Frame) -> np.ndarray:
        if not isinstance(frame, Picture):
            return whole(frame)
        if not parts:
            parts.append(TileCropper(whole, size))
        return parts[0](frame)

    return change


def resized(image: np.ndarray, size: int, backend: str) -> np.ndarray:
    """Resize a crop, uint8 [h, w, 3], to uint8 [size, size, 3]; `pil` computes in float32 and then rounds."""
    if backend == "opencv":
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    exact = resize_crop(image, (size, size), Box(0, 0, size, size))
    return np.rint(exact).astype(np.uint8)


def place(image: np.ndarray, target: np.ndarray, flip: bool) -> None:
    """Write an image [S, S, 3] to `target` in the clip, mirrored with `flip`."""
    if flip:
        cv2.flip(image, 1, target)
    else:
        target[:] = image
