"""Copies whose pictures keep the order of an encoder and get times of their own."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from multitrain.data.decode import open_video
from multitrain.data.encode import retime


@pytest.mark.parametrize("bframes", [0, 2])
def test_a_copy_with_reordered_pictures_and_a_coarse_time_base_gets_the_times_asked_for(tmp_path, bframes):
    with av.open(str(tmp_path / "made.mp4"), "w", options={"video_track_timescale": "1200"}) as out:
        stream = out.add_stream("libx264", rate=25, options={"bf": str(bframes), "b_strategy": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(30):
            picture = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    times = [number / 25 + 0.003 * (number % 3) for number in range(30)]
    retime(tmp_path / "made.mp4", tmp_path / "again.mp4", times)
    with open_video(Path(tmp_path / "again.mp4")) as video:
        assert np.abs(np.subtract(video.times(), times)).max() < 1e-3
