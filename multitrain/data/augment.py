"""From decoded frames to one augmented training clip: RandAugment, random resized crop, flip, and the box to erase.

All random numbers of a clip are drawn before its first pixel is touched, in one fixed order, so both backends make the
same clip from the same draws. Clips leave as uint8; the published code keeps float32 from the crop on, so rounding to
whole grey levels is the one difference between its clips and those of `backend=pil`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import cv2
import numpy as np

from multitrain.config import AugmentConfig
from multitrain.data import randaugment_opencv, randaugment_pil
from multitrain.data.randaugment import Operation, draw_operations, parse_policy
from multitrain.data.random import Draws
from multitrain.data.spatial import Box, erase_box, random_resized_crop, resize_crop


class Augmentation(NamedTuple):
    """Everything random about one clip."""

    operations: list[Operation]
    crop: Box
    flip: bool
    erase: Box


def augment_clip(
    frames: np.ndarray,
    config: AugmentConfig,
    size: int,
    draws: Draws,
    flip_allowed: bool,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Augments one clip; the frames are not changed.

    frames: uint8 [T, H, W, 3]. Returns the clip, uint8 [T, size, size, 3] (C-contiguous; `out` where given), and the box to
    erase on the device, int32 [4] = (top, left, height, width) in pixels of the clip, zeros for none.
    """
    height, width = frames.shape[1:3]
    drawn = draw_augmentation(height, width, config, size, draws, flip_allowed)
    out = np.empty((len(frames), size, size, 3), np.uint8) if out is None else out
    carry_out = _with_pil if config.backend == "pil" else _with_opencv
    for image, target in zip(carry_out(frames, drawn, size), out):
        place(image, target, drawn.flip)
    return out, np.array(drawn.erase, np.int32)


def draw_augmentation(
    height: int, width: int, config: AugmentConfig, size: int, draws: Draws, flip_allowed: bool
) -> Augmentation:
    """Draws what is done to a clip of height × width that becomes size × size."""
    operations = draw_operations(parse_policy(config.randaugment), draws) if config.randaugment else []
    crop = random_resized_crop(height, width, config.crop_area, config.crop_aspect, draws)
    flip = draws.coin(config.flip_probability) and flip_allowed
    return Augmentation(operations, crop, flip, erase_box(size, size, config.erase_probability, draws))


def _with_opencv(frames: np.ndarray, drawn: Augmentation, size: int) -> Iterable[np.ndarray]:
    """[size, size, 3] uint8 of each frame, within about one grey level of `_with_pil`."""
    for image in randaugment_opencv.crops(frames, drawn.operations, drawn.crop):
        yield resized(image, size, "opencv")


def _with_pil(frames: np.ndarray, drawn: Augmentation, size: int) -> Iterable[np.ndarray]:
    """[size, size, 3] uint8 of each frame: Pillow's operations, and the crop resized in float32, then rounded."""
    for image in randaugment_pil.apply(frames, drawn.operations):
        yield resized(drawn.crop.cut(image), size, "pil")


def resized(image: np.ndarray, size: int, backend: str) -> np.ndarray:
    """A crop [h, w, 3] uint8 as [size, size, 3] uint8; with `pil` computed in float32 and then rounded."""
    if backend == "opencv":
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    exact = resize_crop(image, (size, size), Box(0, 0, size, size))
    return np.rint(exact).astype(np.uint8)


def place(image: np.ndarray, target: np.ndarray, flip: bool) -> None:
    """Writes an image [S, S, 3] to its place in the clip, mirrored with `flip`."""
    if flip:
        cv2.flip(image, 1, target)
    else:
        target[:] = image
