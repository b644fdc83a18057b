"""An odd but playable file gives the answer of its plain re-encoding; a file that cannot be read is one clear error."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from multitrain.evaluation.predictor import Predictor, load

TOLERANCE = 0.01
"""Half the summed absolute difference of two answers' probabilities (total variation), for the tiny network here; what
re-encoding itself costs at a nearly lossless quality."""

QUICK = [
    "d_rot90_10s.mp4",
    "rot180.mov",
    "rot270.mov",
    "d_vfr_yoga.mp4",
    "d_1frame.mp4",
    "d_2frames.mp4",
    "making_cake.mp4",
    "hevc_10bit.mp4",
    "d_odd_341x255_vp9.webm",
    "ucf_archery.avi",
    "d_editlist.mp4",
    "unordered.mov",
]


@pytest.fixture(scope="module")
def model(shared: Path) -> Predictor:
    return load(shared / "golden" / "tiny_multi.pyth")


def plain(video: Path, folder: Path) -> Path:
    """H.264, 8 bit, upright, without edit list, every shown frame once."""
    out = folder / "plain.mp4"
    command = ["ffmpeg", "-v", "error", "-y", "-i", str(video), "-map", "0:v:0", "-an", "-fps_mode", "passthrough"]
    command += ["-vf", "scale=trunc(iw/2)*2:trunc(ih/2)*2", "-c:v", "libx264", "-preset", "ultrafast", "-crf", "4"]
    subprocess.run([*command, "-pix_fmt", "yuv420p", str(out)], check=True)
    return out


def distance(model: Predictor, video: Path, folder: Path) -> float:
    """The largest total variation over the datasets."""
    odd, usual = (model.probabilities_of(path) for path in (video, plain(video, folder)))
    return max(float((odd[name] - usual[name]).abs().sum()) / 2 for name in odd)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg to re-encode with")
@pytest.mark.parametrize("name", QUICK)
def test_an_odd_file_gives_the_answer_of_its_plain_re_encoding(
    shared: Path, model: Predictor, tmp_path: Path, name: str
) -> None:
    assert distance(model, shared / "videos" / name, tmp_path) < TOLERANCE


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg to re-encode with")
def test_every_odd_file_gives_the_answer_of_its_plain_re_encoding(
    shared: Path, model: Predictor, tmp_path: Path
) -> None:
    found = {}
    for video in sorted((shared / "videos").iterdir()):
        if video.suffix in (".mp4", ".avi", ".mov", ".mkv", ".webm"):
            found[video.name] = distance(model, video, tmp_path)
            print(f"{video.name} {found[video.name]:.5f}")
    assert len(found) > 30
    assert {name: d for name, d in found.items() if d >= TOLERANCE} == {}


def test_videos_that_differ_are_told_apart_by_more_than_the_tolerance(shared: Path, model: Predictor) -> None:
    one, other = (model.probabilities_of(shared / "videos" / n) for n in ("d_vfr_yoga.mp4", "making_cake.mp4"))
    assert float((one["kinetics"] - other["kinetics"]).abs().sum()) / 2 > 3 * TOLERANCE
