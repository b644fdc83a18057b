"""Unreadable videos in training: replaced, counted once each, and too many of them end the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import settings, train, write_run

from multitrain.engine.unreadable import UnreadableTracker


def record(path: str, dataset: str = "a") -> dict[str, str]:
    return {"dataset": dataset, "path": path, "reason": "r"}


def test_a_video_counts_once_however_often_it_is_met() -> None:
    skips = UnreadableTracker({"a": 1000, "b": 10}, cap=0.002)
    assert skips.add([record("x"), record("x"), record("y")]) is None
    assert skips.counts == {"a": 2}
    assert "3 of 1000 videos of dataset 'a' cannot be read" in (skips.add([record("z")]) or "")


def test_one_bad_video_of_a_small_dataset_is_allowed_and_none_with_a_cap_of_zero() -> None:
    assert UnreadableTracker({"b": 10}, cap=0.01).add([record("x", "b")]) is None
    assert UnreadableTracker({"b": 10}, cap=0.0).add([record("x", "b")]) is not None


def test_earlier_starts_of_the_run_count(tmp_path: Path) -> None:
    file = tmp_path / "skipped.jsonl"
    file.write_text(json.dumps(record("x")) + "\n" + json.dumps(record("y")) + "\n" + '{"dataset": "a", "pa')
    skips = UnreadableTracker({"a": 1000}, cap=1.0)
    skips.add_file(file)
    assert skips.counts == {"a": 2}


@pytest.fixture
def damaged(tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny datasets with one of the ten videos of `segment` cut off."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    (folder / "segment" / "v 3.mp4").write_bytes((folder / "segment" / "v 3.mp4").read_bytes()[:300])
    return folder


def test_training_goes_on_beside_a_broken_video_and_says_which(damaged: Path, tmp_path: Path) -> None:
    run, _ = write_run(tmp_path, settings(damaged, gpus=2, updates=4))
    train(run, 2)
    lines = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert {(r["dataset"], r["path"]) for r in lines} == {("segment", "v 3.mp4")}
    assert all(r["reason"] and r["stand_in"] != r["path"] for r in lines)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["skipped"] == {"segment": 1}


def test_more_broken_videos_than_allowed_end_the_run_with_the_reason(damaged: Path, tmp_path: Path) -> None:
    run, _ = write_run(tmp_path, settings(damaged, gpus=2, updates=4, data__skip_cap=0.0))
    train(run, 2, expect=3)
    log = (run / "ranks.log").read_text()
    assert "1 of 10 videos of dataset 'segment' cannot be read, more than data.skip_cap=0 allows" in log
    assert "Traceback" not in log
    assert json.loads((run / "events.jsonl").read_text().splitlines()[-1])["event"] == "error"
