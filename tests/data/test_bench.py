"""`multitrain data bench` measures the loader's own job on the run's own videos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import settings, write_run

from multitrain.config import ConfigError
from multitrain.data import bench


@pytest.fixture
def run(tiny_data: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path, settings(tiny_data))[0]


def test_the_stages_make_up_the_job(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--run", str(run), "--videos", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["videos"], found["copies"]) == (6, 2)
    assert found["unreadable"] == 0
    stages = [found[s] for s in ("decode", "randaugment", "crop", "copy")]
    assert min(stages) > 0
    assert sum(stages) + found["other"] == pytest.approx(found["total"])
    assert found["clips_per_second"] == pytest.approx(2e3 / found["total"])
    assert found["cores_per_gpu"] == pytest.approx(bench.GPU_CLIPS_PER_SECOND / found["clips_per_second"])


def test_the_table_says_when_cores_are_too_few(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--run", str(run), "--videos", "2", "--gpu", "1e6"]) == 0
    said = capsys.readouterr().out
    assert "clips per CPU-second" in said
    assert "is too few: use" in said


def test_a_gpu_is_what_the_command_line_says_then_the_configuration(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping = settings(tiny_data)
    mapping["cluster"] = {**mapping.get("cluster", {}), "gpu_clips": 12.5}
    told = write_run(tmp_path, mapping)[0]
    for options, clips in ((["--gpu", "7"], 7.0), ([], 12.5)):
        assert bench.main(["--run", str(told), "--videos", "1", "--json", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["gpu_clips"] == clips
        assert found["cores_per_gpu"] == pytest.approx(clips / found["clips_per_second"])


@pytest.mark.parametrize("wrong", ["0", "-1", "nan", "inf", "many"])
def test_a_gpu_that_cannot_be_is_refused(run: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--run", str(run), f"--gpu={wrong}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "--gpu" in said
    assert said.count("\n") == 1


def test_an_unreadable_video_is_said_and_left_out(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    good = next(tiny_data.rglob("*.mp4"))
    for n in range(3):
        (folder / f"{n}.mp4").write_bytes(good.read_bytes() if n else b"no video")
    (folder / "train.csv").write_text("0.mp4 0\n1.mp4 0\n2.mp4 0\n")
    mapping = settings(tiny_data, name="some")
    mapping["data"]["datasets"] = {"some": {"annotations": str(folder), "videos": str(folder), "classes": 1}}
    other = write_run(tmp_path, mapping)[0]
    assert bench.main(["--run", str(other), "--videos", "3"]) == 0
    said = capsys.readouterr().out
    assert "2 videos)" in said
    assert "videos that cannot be read: 1;" in said


def test_videos_that_cannot_be_read_are_one_line(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for n in range(3):
        (broken / f"{n}.mp4").write_bytes(b"no video")
    (broken / "train.csv").write_text("0.mp4 0\n1.mp4 0\n2.mp4 0\n")
    only = {"bad": {"annotations": str(broken), "videos": str(broken), "classes": 1}}
    mapping = settings(tiny_data, name="bad")
    mapping["data"]["datasets"] = only
    other = write_run(tmp_path, mapping)[0]
    with pytest.raises(ConfigError, match="fallback videos"):
        bench.main(["--run", str(other), "--videos", "2"])
