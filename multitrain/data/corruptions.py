"""Corruptions of test videos in five strengths, to measure robustness. What a frame becomes depends on the video and the frame only.

Pictures are corrupted at the network's resolution, so that a strength means the same for sources of every size; the kinds and their
five strengths follow Hendrycks and Dietterich (ICLR 2019), as Yi et al. (NeurIPS 2021) use them for video. Times are corrupted before
frames are chosen.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from multitrain.data.random import KeyedRNG, normals
from multitrain.order.permutation import key

Image = npt.NDArray[np.float32]
"""[H, W, 3], grey levels 0–255."""
STRENGTHS = (1, 2, 3, 4, 5)


def _noise(image: Image, strength: int, *where: int) -> Image:
    """Gaussian noise of 8 to 50 grey levels."""
    return image + (8, 16, 24, 36, 50)[strength - 1] * normals(image.size, "noise", *where).reshape(image.shape)


def _blur(image: Image, strength: int, *_: int) -> Image:
    """A Gaussian blur of 0.5 to 3 % of the short side."""
    sigma = (0.005, 0.01, 0.015, 0.02, 0.03)[strength - 1] * min(image.shape[:2])
    return cv2.GaussianBlur(image, (0, 0), sigma).astype(np.float32, copy=False)


def _compression(image: Image, strength: int, *_: int) -> Image:
    """JPEG of quality 25 to 4."""
    quality = (25, 18, 12, 8, 4)[strength - 1]
    levels = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    data = cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_UNCHANGED), np.float32)


def _brightness(image: Image, strength: int, *where: int) -> Image:
    """25 to 125 grey levels brighter or darker, the same for the whole video."""
    sign = 1 if KeyedRNG("brightness", where[0]).coin(0.5) else -1
    return image + np.float32(sign * 25 * strength)


def _drop(indices: np.ndarray, frames: int, strength: int, video: int) -> np.ndarray:
    """10 to 80 % of the video's frames are lost; the frame before is shown in their place."""
    share = (0.1, 0.25, 0.4, 0.6, 0.8)[strength - 1]
    kept = np.array([not KeyedRNG("drop", video, i).coin(share) for i in range(int(indices.max()) + 1)])
    kept[0] = True
    return np.maximum.accumulate(np.where(kept, np.arange(len(kept)), 0))[indices]


def _jitter(indices: np.ndarray, frames: int, strength: int, video: int) -> np.ndarray:
    """Every frame is replaced by one up to 1 to 12 frames before or after it."""
    most = (1, 2, 4, 8, 12)[strength - 1]
    moved = {int(i): int(i) + KeyedRNG("jitter", video, int(i)).integer(-most, most) for i in np.unique(indices)}
    return np.clip(np.vectorize(moved.__getitem__, otypes=[np.int64])(indices), 0, frames - 1)


_PICTURES: dict[str, Callable[..., Image]] = {
    "noise": _noise,
    "blur": _blur,
    "compression": _compression,
    "brightness": _brightness,
}
_TIMES: dict[str, Callable[[np.ndarray, int, int, int], np.ndarray]] = {"drop": _drop, "jitter": _jitter}
_SPEEDS = (1.25, 1.5, 2.0, 3.0, 4.0)

NAMES = (*_PICTURES, *_TIMES, "speed")


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption of a video in one strength."""

    name: str
    """One of :data:`NAMES`."""
    strength: int
    """1 (weak) to 5."""
    video: int = 0
    """Key of the video, see :meth:`of`."""

    def of(self, dataset: str, path: str) -> Corruption:
        """The corruption of one video, which depends on its dataset and its path below the dataset's folder only."""
        return Corruption(
            self.name, self.strength, key("corruption", self.name, self.strength, dataset, os.fsencode(path))
        )

    def indices(self, choose: Callable[[int], np.ndarray], frames: int) -> np.ndarray:
        """The frames of all views of a video of `frames` frames.

        Args:
            choose: from a number of frames to the indices, int64 [V, T], of an undisturbed video of that many.
        """
        if self.name == "speed":
            factor = _SPEEDS[self.strength - 1]
            shown = choose(max(1, round(frames / factor)))
            return np.minimum(np.rint(shown * factor).astype(np.int64), frames - 1)
        shown = choose(frames)
        return _TIMES[self.name](shown, frames, self.strength, self.video) if self.name in _TIMES else shown

    def picture(self, image: Image, frame: int) -> Image:
        """A resized frame, changed; `frame`: its number in the video."""
        if self.name not in _PICTURES:
            return image
        changed = _PICTURES[self.name](image, self.strength, self.video, frame)
        return np.clip(changed, 0, 255).astype(np.float32, copy=False)
