"""An odd but playable file gives the answer of its plain re-encoding; a file that cannot be read is one clear error."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from material import names

from multitrain.evaluation.predictor import Predictor, load

TOLERANCE = 0.01
"""Half the summed absolute difference of two answers' probabilities (total variation), for the tiny network here; what
re-encoding itself costs at a nearly lossless quality."""

SPREAD = 4
"""What the weights of the fresh heads are multiplied by."""
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
def model(joint_pyth: Path) -> Predictor:
    """With heads that tell videos apart."""
    predictor = load(joint_pyth)
    with torch.no_grad():
        for name, parameter in predictor.named_parameters():
            if name.startswith("heads."):
                parameter.mul_(SPREAD)
    return predictor


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


@pytest.mark.parametrize("name", QUICK)
def test_an_odd_file_gives_the_answer_of_its_plain_re_encoding(
    odd: Path, model: Predictor, tmp_path: Path, name: str
) -> None:
    for file in sorted(names(odd, name)):
        assert distance(model, odd / file, tmp_path) < TOLERANCE, file


@pytest.mark.slow
def test_every_odd_file_gives_the_answer_of_its_plain_re_encoding(odd: Path, model: Predictor, tmp_path: Path) -> None:
    found = {video.name: distance(model, video, tmp_path) for video in sorted(odd.iterdir())}
    assert len(found) >= 20
    assert {name: d for name, d in found.items() if d >= TOLERANCE} == {}


def test_videos_that_differ_are_told_apart_by_more_than_the_tolerance(odd: Path, model: Predictor) -> None:
    one, other = (model.probabilities_of(odd / n) for n in ("d_vfr_yoga.mp4", "making_cake.mp4"))
    assert float((one["kinetics"] - other["kinetics"]).abs().sum()) / 2 > 3 * TOLERANCE
