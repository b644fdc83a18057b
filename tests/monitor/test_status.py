"""What `multitrain status` says of a run."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from multitrain.monitor import Recorder, status, table


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty PATH folder, so that a test decides whether there is a `squeue`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin")
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return folder


def a_run(folder: Path, *last: str, updates: int = 4, job: str | None = None) -> Path:
    with Recorder(folder, total_updates=8, job=job, tensorboard=False) as recorder:
        recorder.event("start")
        for update in range(updates):
            recorder.update({"update": update, "loss": 2.0, "lr": 0.1, "seconds": 3.0, "clips_per_second": 9.0})
        recorder.validation(4, {"shapes": {"top1": 91.5, "top5": 99.0}})
        for name in last:
            recorder.event(name.split(":")[0], status=name.partition(":")[2], reason="disk full")
    for complete in (2, 4):
        (folder / f"checkpoints/update-{complete:08d}").mkdir(parents=True)
        (folder / f"checkpoints/update-{complete:08d}/manifest.json").write_text("{}")
    (folder / "checkpoints/update-00000006.tmp").mkdir()
    return folder


def squeue(folder: Path, answer: str) -> None:
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_a_running_run_shows_position_time_to_go_accuracy_and_newest_complete_checkpoint(tmp_path: Path) -> None:
    found = status(a_run(tmp_path / "demo"))
    assert (found["state"], found["update"], found["total_updates"]) == ("running", 4, 8)
    assert found["eta_seconds"] == 12.0
    assert found["checkpoint"] == 4
    assert found["validation"] == {"shapes": {"top1": 91.5, "top5": 99.0}}
    text = table([found])
    for part in ("demo", "running", "4/8 (50%)", "2.0000", "shapes 91.5", "12 s"):
        assert part in text


@pytest.mark.parametrize(
    ("last", "state"),
    [
        (("end:finished",), "finished"),
        (("end:stopped on request",), "stopped"),
        (("end:cancelled",), "cancelled"),
        (("end:interrupted",), "interrupted"),
        (("requeue:preempted",), "requeued"),
        (("end:interrupted", "resume"), "running"),
        (("error",), "failed"),
        (("error", "resume"), "running"),
    ],
)
def test_the_newest_telling_event_decides_without_a_scheduler(
    tmp_path: Path, last: tuple[str, ...], state: str
) -> None:
    found = status(a_run(tmp_path / "demo", *last))
    assert found["state"] == state
    assert ("error: disk full" in table([found])) == (state == "failed")


def test_a_start_whose_process_is_gone_is_interrupted(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with Recorder(tmp_path / "demo", total_updates=8, tensorboard=False) as recorder:
        recorder.event("start", pid=gone.pid)
    assert status(tmp_path / "demo")["state"] == "interrupted"


def test_the_scheduler_knows_better_than_the_events(tmp_path: Path, no_scheduler: Path) -> None:
    squeue(no_scheduler, "PENDING|BeginTime")
    found = status(a_run(tmp_path / "demo", job="17"))
    assert (found["state"], found["reason"], found["job"]) == ("pending", "BeginTime", "17")
    assert "waiting: BeginTime" in table([found])
    squeue(no_scheduler, "CANCELLED|None")
    assert status(tmp_path / "demo")["state"] == "cancelled"


def test_a_folder_with_nothing_in_it_is_empty_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert status(tmp_path / "new")["state"] == "empty"
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        status(tmp_path / "absent")


def test_the_command_prints_json_that_scripts_can_read(tmp_path: Path) -> None:
    run = a_run(tmp_path / "demo", "end:finished")
    command = [sys.executable, "-m", "multitrain.monitor.status", str(run), "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["state"] == "finished"
