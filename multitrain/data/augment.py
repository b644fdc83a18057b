"""From decoded frames to one augmented training clip: RandAugment, random resized crop, flip, and the box to erase.

All random numbers of a clip are drawn before its first pixel is touched, in one fixed order, so both backends make the
same clip from the same draws. Clips leave as uint8; the published code keeps float32 from the crop on, so rounding to
whole grey levels is the one difference between its clips and those of `backend=pil`.
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
    """Everything random about one clip."""

    operations: list[Operation]
    crop: Box
    flip: bool
    erase: Box


class Augmenter:
    """Augments the frames of one clip, one by one.

    Args:
        height, width: of the frames.
        size: side of the square clip in pixels.
        draws: of this clip; all that is random is drawn here.
    """

    def __init__(
        self, height: int, width: int, config: AugmentConfig, size: int, draws: KeyedRNG, flip_allowed: bool
    ) -> None:
        self.drawn = draw_augmentation(height, width, config, size, draws, flip_allowed)
        self.change = changer(height, width, self.drawn, config.backend, size)
        self._size, self._backend = size, config.backend

    @property
    def box(self) -> np.ndarray:
        """What is to be erased on the device: int32 [4] = (top, left, height, width), in pixels of the clip, zeros for none."""
        return np.array(self.drawn.erase, np.int32)

    def __call__(self, frame: Frame, target: np.ndarray) -> None:
        """frame: uint8 [H, W, 3] or a large one, not changed; target: its place in the clip, uint8 [size, size, 3]."""
        place(resized(self.change(frame), self._size, self._backend), target, self.drawn.flip)


def augment_clip(
    frames: np.ndarray,
    config: AugmentConfig,
    size: int,
    draws: KeyedRNG,
    flip_allowed: bool,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Augments one clip; the frames are not changed.

    frames: uint8 [T, H, W, 3]. Returns the clip, uint8 [T, size, size, 3] (C-contiguous; `out` where given), and the box to
    erase on the device, as `Augmenter.box`.
    """
    augmenter = Augmenter(frames.shape[1], frames.shape[2], config, size, draws, flip_allowed)
    out = np.empty((len(frames), size, size, 3), np.uint8) if out is None else out
    for frame, target in zip(frames, out):
        augmenter(frame, target)
    return out, augmenter.box


def draw_augmentation(
    height: int, width: int, config: AugmentConfig, size: int, draws: KeyedRNG, flip_allowed: bool
) -> Augmentation:
    """Draws what is done to a clip of height × width that becomes size × size."""
    operations = draw_operations(parse_policy(config.randaugment), draws) if config.randaugment else []
    crop = random_resized_crop(height, width, config.crop_area, config.crop_aspect, draws)
    flip = draws.coin(config.flip_probability) and flip_allowed
    return Augmentation(operations, crop, flip, erase_box(size, size, config.erase_probability, draws))


def changer(
    height: int, width: int, drawn: Augmentation, backend: str, size: int | None = None
) -> Callable[[Frame], np.ndarray]:
    """From a frame, uint8 [H, W, 3], to its crop behind RandAugment, uint8 [crop.height, crop.width, 3].

    `opencv` is within about one grey level of `pil`, which works on the whole frame with Pillow's operations. Of a large
    frame's crop, it makes the rows that `resized` to `size` reads; all without a size.
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
