"""Test views of a video: clips spread over its length, each with one or three spatial crops.

Pixels agree with the published tests to about 1e-6 of the range. They are resized and returned in float32, because rounding to whole
grey levels would change the scores. A video is opened once; each frame is decoded and resized once, however many views
contain it, and written directly to its positions in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from multitrain.config import ConfigError, DataConfig, DatasetConfig, ModelConfig
from multitrain.data.call_timeout import WriteLease
from multitrain.data.corruptions import Corruption
from multitrain.data.decode import Frame, open_video
from multitrain.data.frames import view_indices
from multitrain.data.spatial import MEAN, STD, Box, network_pixels, resize_crop, short_side_size, uniform_crop, union

_PLANES = [0, 0, 1, 1, 2, 2]
"""Argument of OpenCV's mixChannels: channel 0 to plane 0, 1 to 1, 2 to 2."""


@dataclass(frozen=True)
class CropPlan:
    """Resize and crops of a video's frames."""

    size: tuple[int, int]
    """(height, width) to which frames are resized."""
    crops: tuple[Box, ...]
    """Square boxes in the resized frame."""


def crop_plan(height: int, width: int, dataset: DatasetConfig, model: ModelConfig) -> CropPlan:
    """The test crops of frames of height × width pixels. Raises ConfigError if a crop is larger than the resized frame."""
    side = short_side(dataset, model)
    if side < model.crop:
        raise ConfigError(f"test_short_side={side} is smaller than model.crop={model.crop}; use at least {model.crop}")
    size = short_side_size(height, width, side)
    positions = (1,) if dataset.spatial_views == 1 else (0, 1, 2)
    return CropPlan(size, tuple(uniform_crop(*size, model.crop, position) for position in positions))


def short_side(dataset: DatasetConfig, model: ModelConfig) -> int:
    """Short side in pixels to which test frames are resized: `test_short_side`, else that of the published code.

    The published code uses 256 for a crop of 224 (and in proportion) with one crop of a `stride` dataset, else the crop size.
    """
    return dataset.short_side(model.crop)


def views_shape(dataset: DatasetConfig, model: ModelConfig) -> tuple[int, ...]:
    """The shape [V, 3, T, S, S] of all views of a video."""
    return dataset.temporal_views * dataset.spatial_views, 3, model.frames, model.crop, model.crop


def load_views(
    path: Path | str,
    dataset: DatasetConfig,
    data: DataConfig,
    model: ModelConfig,
    out: np.ndarray | None = None,
    lease: WriteLease | None = None,
    corruption: Corruption | None = None,
) -> np.ndarray:
    """All views of a video, normalised: float32 [V, 3, T, S, S], view = temporal view × spatial_views + crop.

    Args:
        out: where to write them, C-contiguous (default: new memory).
        lease: permission to write to `out`, checked before each frame.
        corruption: of this video, see :meth:`Corruption.of`; None to show it as it is.

    Raises:
        VideoError: the video cannot be read; `out` may hold some of its frames.
        CallTimeout: the lease has ended.
    """
    lease = lease or WriteLease()
    with open_video(path, data.decoder, data.decode_timeout) as video:
        fps = video.fps

        def choose(frames: int) -> np.ndarray:
            return view_indices(dataset, data, frames, fps, model.frames)

        count = video.frame_count
        shown = corruption.indices(choose, count) if corruption else choose(count)
        if out is None:
            out = np.empty(views_shape(dataset, model), np.float32)
        plan = None
        for number, frame in video.pictures(shown.ravel()):
            plan = plan or crop_plan(frame.shape[0], frame.shape[1], dataset, model)
            change = partial(corruption.picture, frame=number) if corruption else None
            with lease:
                show(frame, np.argwhere(shown == number), plan, out, change)
            del frame  # free its memory before the next one is decoded
    if (wanted := network_pixels(model)) is not None:
        scale, shift = (np.array(values, np.float32).reshape(3, 1, 1, 1) for values in wanted[:2])
        with lease:
            out *= scale
            out += shift
            if wanted[2]:
                out[:] = out[:, ::-1].copy()
    return out


def show(
    frame: Frame,
    places: np.ndarray,
    plan: CropPlan,
    out: np.ndarray,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """Write one decoded frame, uint8 [H, W, 3] or a large frame, to all its positions (temporal view, t), int64 [P, 2], in `out`.

    `change` is applied to the resized frame, float32 [H, W, 3].
    """
    around = union(plan.crops)
    image = resize_crop(frame, plan.size, around)
    if change is not None:
        image = change(image)
    for crop, box in enumerate(plan.crops):
        top, left = box.top - around.top, box.left - around.left
        first, *others = [out[view * len(plan.crops) + crop, :, t] for view, t in places]
        cv2.mixChannels([image[top : top + box.height, left : left + box.width]], list(first), _PLANES)
        first *= np.float32(1.0 / (255.0 * STD))
        first -= np.float32(MEAN / STD)
        for other in others:
            other[:] = first
