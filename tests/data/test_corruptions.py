"""Corruptions depend on the video, the frame and the strength only, grow with the strength, and reach what is scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from multitrain.config import validate
from multitrain.data.corruptions import NAMES, STRENGTHS, Corruption
from multitrain.data.random import normals
from multitrain.data.views import load_views
from tests import support

PICTURES = ("noise", "blur", "compression", "brightness")
IMAGE = np.random.default_rng(0).uniform(0, 255, (48, 64, 3)).astype(np.float32)
FRAMES = 90


def of(name: str, strength: int, path: str = "a/b.mp4") -> Corruption:
    return Corruption(name, strength).of("kinetics", path)


def shown(count: int) -> np.ndarray:
    """Two views of eight frames, spread over `count` frames."""
    return np.linspace(0, count - 1, 16).round().astype(np.int64).reshape(2, 8)


@pytest.mark.parametrize("name", PICTURES)
def test_a_frame_is_changed_more_by_a_higher_strength_and_always_in_the_same_way(name: str) -> None:
    smooth = np.add.outer(np.arange(48.0), np.arange(64.0))[..., None].repeat(3, 2).astype(np.float32) + 60
    image = IMAGE if name == "blur" else smooth
    errors = [float(np.abs(of(name, s).picture(image, 7) - image).mean()) for s in STRENGTHS]
    assert errors == sorted(errors)
    assert errors[0] > 0.02
    changed = of(name, 3).picture(image, 7)
    assert changed.dtype == np.float32
    assert (changed.min() >= 0, changed.max() <= 255) == (True, True)
    assert np.array_equal(of(name, 3).picture(image.copy(), 7), changed)
    assert np.array_equal(of("speed", 3).picture(image, 7), image)


def test_noise_differs_between_frames_and_videos_and_brightness_only_between_videos() -> None:
    grey = np.full((8, 8, 3), 128, np.float32)
    assert not np.array_equal(of("noise", 1).picture(grey, 0), of("noise", 1).picture(grey, 1))
    assert not np.array_equal(of("noise", 1).picture(grey, 0), of("noise", 1, "c.mp4").picture(grey, 0))
    assert np.array_equal(of("brightness", 1).picture(grey, 0), of("brightness", 1).picture(grey, 1))
    means = {float(of("brightness", 2, f"{i}.mp4").picture(grey, 0).mean()) for i in range(40)}
    assert means == {78.0, 178.0}


@pytest.mark.parametrize("name", ["drop", "jitter", "speed"])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_times_stay_in_the_video_and_depend_on_the_frame_not_on_the_view(name: str, strength: int) -> None:
    for frames in (1, 2, 7, FRAMES):
        found = of(name, strength).indices(shown, frames)
        assert found.shape == (2, 8)
        assert found.min() >= 0
        assert found.max() < frames
    if name != "speed":
        both = of(name, strength).indices(lambda n: np.stack([np.arange(n), np.arange(n)[::-1]]), FRAMES)
        assert np.array_equal(both[0], both[1][::-1])


def test_dropped_frames_show_the_one_before_in_the_stated_share() -> None:
    every = np.arange(2000)[None]
    for strength, share in zip(STRENGTHS, (0.1, 0.25, 0.4, 0.6, 0.8)):
        found = of("drop", strength).indices(lambda _: every, 2000)
        assert (found <= every).all()
        assert (np.diff(found[0]) >= 0).all()
        assert (found != every).mean() == pytest.approx(share, abs=0.04)


def test_a_faster_video_shows_later_frames() -> None:
    def window(frames: int) -> np.ndarray:
        return np.arange(8)[None] + (frames - 8) // 2

    assert np.diff(of("speed", 3).indices(window, FRAMES)[0]).tolist() == [2] * 7
    assert np.diff(of("speed", 5).indices(window, FRAMES)[0]).tolist() == [4] * 7


def test_normals_are_normal_and_repeat() -> None:
    values = normals(100_001, "x", 1)
    assert values.shape == (100_001,)
    assert np.array_equal(values, normals(100_001, "x", 1))
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
    assert np.isfinite(values).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_views_that_are_scored_are_corrupted(name: str, tmp_path: Path) -> None:
    support.write_video(tmp_path / "a.mp4", seed=1, frames=40)
    config = validate(support.settings(tmp_path))
    dataset = config.data.datasets["stride"].model_copy(update={"temporal_views": 2, "spatial_views": 3})
    plain = load_views(tmp_path / "a.mp4", dataset, config.data, config.model)
    changed, again = (
        load_views(tmp_path / "a.mp4", dataset, config.data, config.model, corruption=of(name, 5)) for _ in range(2)
    )
    assert np.array_equal(changed, again)
    assert changed.shape == plain.shape
    assert not np.array_equal(changed, plain)
