"""Frame indices of clips, as pure functions of the video's length and uniform draws.

The rules are those of the published code (Liang et al., NeurIPS 2022; PySlowFast's decoder and SSv2 dataset), including its
truncations and its float32 `linspace`, so that test clips are equal. One bug is fixed: for a video of one
frame, the index is 0, not -1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from multitrain.config import DataConfig, DatasetConfig


def training_indices(
    dataset: DatasetConfig, data: DataConfig, frame_count: int, fps: float, frames: int, uniforms: Sequence[float]
) -> np.ndarray:
    """Frame indices of one training clip by the dataset's `sampling`: int64 [frames], non-decreasing, in range(frame_count).

    Args:
        uniforms: draws in [0, 1), one per frame; `stride` sampling uses the first only.
    """
    if dataset.sampling == "segment":
        return training_segments(frame_count, frames, uniforms)
    rate, target_fps = data.sampling_rate, data.target_fps
    return training_window(frame_count, fps, frames, sampling_rate=rate, target_fps=target_fps, uniform=uniforms[0])


def view_indices(dataset: DatasetConfig, data: DataConfig, frame_count: int, fps: float, frames: int) -> np.ndarray:
    """Frame indices of all temporal test views: int64 [dataset.temporal_views, frames].

    With `segment` sampling, all views are the same clip, as in the published code.
    """
    views = dataset.temporal_views
    if dataset.sampling == "segment":
        return np.tile(view_segments(frame_count, frames), (views, 1))
    return view_windows(
        frame_count, fps, frames, sampling_rate=data.sampling_rate, target_fps=data.target_fps, views=views
    )


def window_length(fps: float, frames: int, *, sampling_rate: int, target_fps: float) -> float:
    """Length of a clip's window in frames of the video, not rounded: 32×3 at 30 frames per second is 96.0."""
    return sampling_rate * frames / target_fps * fps


def training_window(
    frame_count: int, fps: float, frames: int, *, sampling_rate: int, target_fps: float, uniform: float
) -> np.ndarray:
    """Indices of a window whose start is `uniform` (in [0, 1)) of the possible range: int64 [frames].

    For a video shorter than the window: all its frames, with the last one repeated.
    """
    length = window_length(fps, frames, sampling_rate=sampling_rate, target_fps=target_fps)
    return _window(frame_count, frames, length, uniform * max(frame_count - length, 0.0))


def view_windows(
    frame_count: int, fps: float, frames: int, *, sampling_rate: int, target_fps: float, views: int
) -> np.ndarray:
    """Indices of `views` windows spread evenly over the video (a single one is centred): int64 [views, frames]."""
    length = window_length(fps, frames, sampling_rate=sampling_rate, target_fps=target_fps)
    play = max(frame_count - length, 0.0)
    starts = [play // 2] if views == 1 else [view * (play // (views - 1)) for view in range(views)]
    return np.stack([_window(frame_count, frames, length, start) for start in starts])


def training_segments(frame_count: int, frames: int, uniforms: Sequence[float]) -> np.ndarray:
    """One index from each of `frames` equal segments, both ends included, with one draw in [0, 1) per segment: int64 [frames]."""
    low, high = _segments(frame_count, frames)
    drawn = np.floor(np.asarray(uniforms, dtype=np.float64) * (high - low + 1)).astype(np.int64)
    return low + np.minimum(drawn, high - low)


def view_segments(frame_count: int, frames: int) -> np.ndarray:
    """The middle index of each of `frames` equal segments: int64 [frames]."""
    low, high = _segments(frame_count, frames)
    return (low + high) // 2


def _segments(frame_count: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last index of each segment, halves rounded to even."""
    size = float(frame_count - 1) / frames
    bounds = np.round(size * np.arange(frames + 1)).astype(np.int64)
    return bounds[:-1], bounds[1:]


def _window(frame_count: int, frames: int, length: float, start: float) -> np.ndarray:
    """Indices inside the window [start, start + length - 1]: `linspace` between its truncated ends."""
    first = max(min(int(start), frame_count - 2), 0)
    last = max(min(int(start + length - 1), frame_count - 1), first)
    taken = last - first + 1
    offset = max(taken - length, 0.0) // 2
    steps = np.clip(_linspace(offset, offset + length - 1, frames), 0, taken - 1)
    return first + steps.astype(np.int64)


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    """torch.linspace in float32, with the rounding of its CPU kernel: from both ends, one fused multiply-add per value."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(count - 1)) if count > 1 else np.float64(0)
    at = np.arange(count)
    rising = (np.float64(first) + step * at).astype(np.float32)
    falling = (np.float64(last) - step * (count - 1 - at)).astype(np.float32)
    return np.where(at < count // 2, rising, falling) if count > 1 else rising
