"""The demo's datasets: real files, the same for the same seed, nothing in them that gives the label away."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from multitrain.data.demo import CLASSES, CLIPS, PAIRS, RATE, SIZE, Clip, draw, generate, main

FEW = {name: {"train": 3, "val": 1, "test": 2} for name in CLASSES}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert generate(folder, clips=FEW, processes=1)
    return folder


def test_files_are_h264_in_mp4_with_b_frames_and_as_many_frames_as_drawn(made: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(made / "scenes/videos/train/00000.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", SIZE, SIZE)
        assert stream.average_rate == RATE
        frames = list(container.decode(stream))
    drawn = draw(Clip("", "scenes", "train", 0, 0))
    assert len(frames) == len(drawn)
    assert {int(f.pict_type) for f in frames} >= {1, 2, 3}  # I, P, B
    decoded = np.stack([f.to_ndarray(format="rgb24") for f in frames]).astype(float)
    assert np.abs(decoded - drawn).mean() < 12


def test_annotations_are_lines_of_path_and_label_and_every_path_exists(made: Path) -> None:
    for name, splits in FEW.items():
        folder = made / name / "annotations"
        assert folder.joinpath("classes.txt").read_text().splitlines() == list(CLASSES[name])
        for split, count in splits.items():
            lines = folder.joinpath(f"{split}.csv").read_text().splitlines()
            assert len(lines) == count
            for line in lines:
                path, label = line.split(" ")
                assert (made / name / "videos" / path).is_file()
                assert 0 <= int(label) < len(CLASSES[name])


def test_the_same_seed_makes_the_same_bytes_however_many_processes_and_another_seed_others(
    made: Path, tmp_path: Path
) -> None:
    generate(tmp_path / "again", clips=FEW, processes=2)
    assert digests(tmp_path / "again") == digests(made)
    generate(tmp_path / "other", clips={"shapes": {"train": 2}}, seed=1, processes=1)
    assert (
        digests(tmp_path / "other")["shapes/videos/train/00000.mp4"] != digests(made)["shapes/videos/train/00000.mp4"]
    )


def test_what_is_there_is_not_made_again_and_what_was_cut_short_is(made: Path, tmp_path: Path) -> None:
    few = {"motions": {"train": 2}}
    assert generate(tmp_path, clips=few, processes=1)
    assert not generate(tmp_path, clips=few, processes=1)
    (tmp_path / "demo.json").unlink()  # written last
    (tmp_path / "motions/videos/train/00001.mp4").unlink()
    assert generate(tmp_path, clips=few, processes=1)
    assert (tmp_path / "motions/videos/train/00001.mp4").read_bytes() == (
        made / "motions/videos/train/00001.mp4"
    ).read_bytes()


def test_no_two_videos_of_any_splits_are_alike() -> None:
    firsts = [draw(Clip("", d, s, i, 0))[0] for d in CLASSES for s in ("train", "val", "test") for i in range(3)]
    for i, a in enumerate(firsts):
        for b in firsts[:i]:
            assert np.abs(a.astype(int) - b).mean() > 3


def test_no_shape_is_at_the_same_place_in_two_splits() -> None:
    """With the same number in two splits, the background alone being another would not do."""
    for dataset in CLASSES:
        for i in range(4):
            first, second = (draw(Clip("", dataset, s, i, 0)) for s in ("train", "test"))
            shapes = [v[len(v) // 2].max(-1) == 255 for v in (first, second)]
            assert (shapes[0] != shapes[1]).mean() > 0.02


def test_label_spaces_overlap_in_part() -> None:
    assert {shape for shape, _ in PAIRS} < set(CLASSES["shapes"])
    assert {f"moving {motion}" for _, motion in PAIRS} < set(CLASSES["motions"])
    assert len(set(PAIRS)) == len(CLASSES["scenes"]) == 12


def test_classes_are_balanced_in_every_split() -> None:
    for name, splits in CLIPS.items():
        for count in splits.values():
            labels = [Clip("", name, "x", i, 0).label for i in range(count)]
            assert set(np.bincount(labels)) == {count // len(CLASSES[name])}


def test_one_frame_does_not_tell_a_motion_from_its_opposite() -> None:
    """Shapes that move left and right are, half way, at the same places."""
    middles: dict[str, list[float]] = {"moving left": [], "moving right": []}
    for i in range(360):
        clip = Clip("", "motions", "train", i, 0)
        name = CLASSES["motions"][clip.label]
        if name in middles:
            frames = draw(clip)
            bright = frames[len(frames) // 2].max(-1) > 250
            middles[name].append(np.nonzero(bright)[1].mean())
    left, right = (np.array(v) for v in middles.values())
    error = np.sqrt(left.var() / len(left) + right.var() / len(right))
    assert abs(left.mean() - right.mean()) < 4 * error


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--fraction", "0.001", "--processes", "1"]) == 0
    assert "made 72 videos" in capsys.readouterr().out
    assert main(["--out", str(tmp_path), "--fraction", "0.001"]) == 0
    assert "are there already" in capsys.readouterr().out
