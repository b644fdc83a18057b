"""Frame indices are those of the published code, and always inside the video."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multitrain.config import DataConfig, DatasetConfig
from multitrain.data.frames import (
    _linspace,
    training_indices,
    training_segments,
    training_window,
    view_indices,
    view_segments,
    view_windows,
)

K32 = {"sampling_rate": 3, "target_fps": 30.0}
K16 = {"sampling_rate": 4, "target_fps": 30.0}


def published_window(count: int, fps: float, frames: int, rate: int, target: float, start: float) -> list[int]:
    """The published rule step by step, with torch; `start` is the window's first frame, not rounded."""
    length = rate * frames / target * fps
    first = min(int(start), count - 2)
    last = min(int(start + length - 1), count - 1)
    decoded = list(range(first, last + 1))
    again = float(np.floor(max(len(decoded) - length, 0) / 2))
    index = torch.linspace(again, again + length - 1, frames).clamp(0, len(decoded) - 1).long()
    return [decoded[i] for i in index.tolist()]


def test_32x3_takes_0_3_up_to_45_then_49_up_to_91_and_95() -> None:
    got = training_window(300, 30.0, 32, uniform=0.0, **K32).tolist()
    assert got == [*range(0, 46, 3), *range(49, 92, 3), 95]


def test_16x4_centre_of_300_frames_is_the_published_one() -> None:
    got = view_windows(300, 30.0, 16, views=1, **K16)[0].tolist()
    assert got[:2] == [118, 122]
    assert got[4:6] == [134, 139]
    assert got[-1] == 181


def test_short_videos_repeat_their_last_frame() -> None:
    got = training_window(50, 30.0, 32, uniform=0.9, **K32).tolist()
    assert got[16:] == [49] * 16
    assert got[15] < 49
    assert training_window(90, 30.0, 32, uniform=0.5, **K32).tolist()[-4:] == [85, 88, 89, 89]


def test_five_views_start_evenly_from_the_first_window_to_the_last() -> None:
    views = view_windows(300, 30.0, 32, views=5, **K32)
    assert views[:, 0].tolist() == [0, 51, 102, 153, 204]
    assert views[-1, -1] == 299


def test_the_rate_changes_the_length_of_the_window_only() -> None:
    assert training_window(300, 25.0, 32, uniform=0.0, **K32)[-1] == 79
    assert training_window(300, 12.0, 32, uniform=0.0, **K32)[-1] == 37


@given(
    st.integers(2, 2000), st.sampled_from([5.5, 12.0, 23.976, 25.0, 29.97, 30.0, 59.94]), st.sampled_from([8, 16, 32]),
    st.integers(1, 8), st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_training_windows_are_the_published_rule(
    count: int, fps: float, frames: int, rate: int, uniform: float
) -> None:
    play = max(count - rate * frames / 30.0 * fps, 0)
    expected = published_window(count, fps, frames, rate, 30.0, uniform * play)
    assert (
        training_window(count, fps, frames, sampling_rate=rate, target_fps=30.0, uniform=uniform).tolist() == expected
    )


@given(st.integers(2, 2000), st.sampled_from([12.0, 25.0, 29.97, 30.0]), st.integers(1, 10))
def test_view_windows_are_the_published_rule(count: int, fps: float, views: int) -> None:
    play = max(count - 3 * 32 / 30.0 * fps, 0)
    starts = (
        [float(np.floor(play / 2))] if views == 1 else [v * float(np.floor(play / (views - 1))) for v in range(views)]
    )
    expected = [published_window(count, fps, 32, 3, 30.0, start) for start in starts]
    assert view_windows(count, fps, 32, views=views, **K32).tolist() == expected


@given(st.integers(0, 3), st.floats(0.5, 5000), st.sampled_from([1, 2, 4, 8, 16, 31, 32, 64]))
def test_linspace_has_the_bits_of_torch(start: int, span: float, count: int) -> None:
    end = start + span
    assert _linspace(start, end, count).tolist() == torch.linspace(start, end, count).tolist()


@given(st.integers(1, 5), st.sampled_from([1.0, 30.0]), st.floats(0, 1, exclude_max=True), st.integers(1, 40))
def test_videos_of_few_frames_work(count: int, fps: float, uniform: float, frames: int) -> None:
    drawn = [
        training_window(count, fps, frames, uniform=uniform, **K32),
        training_segments(count, frames, [uniform] * frames),
        view_segments(count, frames),
        *view_windows(count, fps, frames, views=3, **K32),
    ]
    for indices in drawn:
        assert indices.dtype == np.int64
        assert len(indices) == frames
        assert indices.min() >= 0
        assert indices.max() < count
        assert (np.diff(indices) >= 0).all()


def test_one_frame_gives_frame_0_not_the_published_minus_1() -> None:
    assert training_window(1, 30.0, 4, uniform=0.99, **K32).tolist() == [0, 0, 0, 0]


@given(st.integers(1, 3000), st.sampled_from([8, 16, 32]))
def test_segments_are_bounded_by_halves_rounded_to_even(count: int, frames: int) -> None:
    size = (count - 1) / frames
    low = [int(np.round(size * i)) for i in range(frames)]
    high = [int(np.round(size * (i + 1))) for i in range(frames)]
    assert training_segments(count, frames, [0.0] * frames).tolist() == low
    assert training_segments(count, frames, [1 - 2**-53] * frames).tolist() == high
    assert view_segments(count, frames).tolist() == [(a + b) // 2 for a, b in zip(low, high)]


def test_every_frame_of_a_segment_is_as_likely_both_ends_included() -> None:
    drawn = [training_segments(13, 4, [u] * 4).tolist() for u in np.linspace(0, 1, 4000, endpoint=False)]
    assert np.unique([d[1] for d in drawn], return_counts=True)[1].tolist() == [1000] * 4
    assert {d[1] for d in drawn} == {3, 4, 5, 6}


@pytest.mark.parametrize("sampling", ["stride", "segment"])
def test_the_dataset_says_which_rule(sampling: str) -> None:
    dataset = DatasetConfig(annotations="a", videos="v", classes=2, sampling=sampling, temporal_views=2)
    data = DataConfig(datasets={"d": dataset})
    drawn = training_indices(dataset, data, 300, 30.0, 8, [0.25] * 8).tolist()
    views = view_indices(dataset, data, 300, 30.0, 8)
    assert views.shape == (2, 8)
    if sampling == "segment":
        assert drawn == training_segments(300, 8, [0.25] * 8).tolist()
        assert views.tolist() == [view_segments(300, 8).tolist()] * 2
    else:
        assert drawn == training_window(300, 30.0, 8, uniform=0.25, **K32).tolist()
        assert views.tolist() == view_windows(300, 30.0, 8, views=2, **K32).tolist()
