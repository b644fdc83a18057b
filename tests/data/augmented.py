"""A whole clip augmented at once; the product augments frame by frame, as they are decoded."""

from __future__ import annotations

import numpy as np

from multitrain.config import AugmentConfig
from multitrain.data.augment import Augmenter
from multitrain.data.random import KeyedRNG


def augment_clip(
    frames: np.ndarray, config: AugmentConfig, size: int, draws: KeyedRNG, flip_allowed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(clip, uint8 [T, size, size, 3]; box to erase, as `Augmenter.box`) of frames, uint8 [T, H, W, 3]."""
    augmenter = Augmenter(frames.shape[1], frames.shape[2], config, size, draws, flip_allowed)
    out = np.empty((len(frames), size, size, 3), np.uint8)
    for frame, target in zip(frames, out):
        augmenter(frame, target)
    return out, augmenter.box
