"""The overlaid video is shown as the source is: upright, every frame at its own time, the classes drawn in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from multitrain.data.decode import VideoError, open_video
from multitrain.evaluation import overlay
from multitrain.evaluation.overlay import caption, write_overlay
from tests import material, support

FOUND = {"kinetics": [("arm wrestling", 0.75), ("yoga", 0.125)], "ssv2": [("pushing something", 0.5)]}


def test_size_times_and_picture_stay_and_the_corner_holds_the_classes(tmp_path: Path) -> None:
    support.write_video(tmp_path / "a.mp4", seed=1, frames=7, size=(160, 128))
    assert write_overlay(tmp_path / "a.mp4", tmp_path / "b.mp4", FOUND, "pyav") == 7
    with open_video(tmp_path / "a.mp4") as a, open_video(tmp_path / "b.mp4") as b:
        assert (a.frame_count, a.fps) == (b.frame_count, pytest.approx(b.fps, rel=1e-3))
        assert a.times() == pytest.approx(b.times(), abs=1e-4)
        before, after = (v.frames(range(7)).astype(int) for v in (a, b))
    assert before.shape == after.shape
    height, width = caption(FOUND, 128, 160).shape[:2]
    assert np.abs(before - after)[:, : 128 - height - 16].mean() < 6  # what encoding again costs
    assert np.abs(before - after)[:, -height:, :width].mean() > 20


def test_turned_and_uneven_videos_are_written_upright_at_their_own_times(odd: Path, tmp_path: Path) -> None:
    for name in sorted(material.names(odd, "rot90.mov", "d_vfr_yoga.mp4")):
        source = odd / name
        write_overlay(source, tmp_path / "b.mp4", FOUND, "pyav")
        with open_video(source) as a, open_video(tmp_path / "b.mp4") as b:
            height, width = b.frames([0]).shape[1:3]
            assert (height > width) == (material.kind(name) == "rot90.mov")
            assert a.frames([0]).shape[1:3] == (height, width)
            assert a.times() == pytest.approx(b.times(), abs=1e-3)


def test_nothing_is_left_when_the_video_is_broken(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"a\.mp4"):
        write_overlay(tmp_path / "a.mp4", tmp_path / "b.mp4", FOUND, "pyav")
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(("height", "width"), [(360, 640), (264, 412), (1080, 1920), (64, 64), (9, 5)])
def test_the_text_leaves_the_frame_to_the_video_and_names_the_best_class_of_every_dataset(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {name: [(f"class {i} of a long name", 0.5 / i) for i in range(1, 6)] for name in ("a", "b", "c")}
    drawn: list[str] = []
    text = overlay.ImageDraw.ImageDraw.text
    monkeypatch.setattr(overlay.ImageDraw.ImageDraw, "text", lambda *a, **k: (drawn.append(a[2]), text(*a, **k))[1])
    shape = caption(found, height, width).shape
    assert shape[0] <= max(height * overlay.COVERED, min(height, 3 * 10 + 4))
    assert shape[1] <= width
    if width > 400:
        assert [line[: len("a: class 1")] for line in drawn if "class 1" in line] == [
            f"{name}: class 1" for name in found
        ]
