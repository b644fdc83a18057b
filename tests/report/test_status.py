"""What `multitrain status` says of a run."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from multitrain.config import ConfigError
from multitrain.lease import acquire
from multitrain.records import events
from multitrain.records.recorder import Recorder
from multitrain.report.interruptions import NO_MESSAGE, PEER_LOST, interruptions
from multitrain.report.status import SILENCE_SECONDS, main, status, statuses
from multitrain.report.status_text import card, table


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty PATH folder, so that a test decides whether there is a `squeue`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin")
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return folder


def a_run(folder: Path, *last: str, updates: int = 4, job: str | None = None, **start: str) -> Path:
    with Recorder(folder, total_updates=8, job=job, tensorboard=False) as recorder:
        recorder.event("start", **start)
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
    program(folder / "squeue", f"echo '{answer}'")


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


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
    squeue(no_scheduler, "17|PENDING|BeginTime|2026-11-25T07:02:00|")
    found = status(a_run(tmp_path / "demo", job="17"))
    assert (found["state"], found["reason"], found["job"]) == ("pending", "BeginTime", "17")
    assert "waiting: BeginTime, expected to start 2026-11-25 07:02:00" in table([found])
    squeue(no_scheduler, "17|CANCELLED|None|N/A|")
    assert status(tmp_path / "demo")["state"] == "cancelled"


def test_a_folder_with_nothing_in_it_is_empty_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert status(tmp_path / "new")["state"] == "empty"
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        status(tmp_path / "absent")


def test_the_scheduler_is_asked_once_for_all_runs(tmp_path: Path, no_scheduler: Path) -> None:
    program(
        no_scheduler / "squeue",
        f'echo "$@" >> {tmp_path}/asked; echo "17|RUNNING|None||n1"; echo "18|PENDING|Priority||"',
    )
    runs = [a_run(tmp_path / name, job=job, host="n1") for name, job in (("a", "17"), ("b", "18"), ("c", "19"))]
    found = statuses(runs)
    assert [f["state"] for f in found] == ["running", "pending", "interrupted"]
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert "--jobs=17,18,19" in asked


def test_a_job_that_left_the_queue_is_told_by_accounting_where_there_is_some(
    tmp_path: Path, no_scheduler: Path
) -> None:
    run = a_run(tmp_path / "demo", job="17", host="n1")
    squeue(no_scheduler, "")
    program(no_scheduler / "sacct", "echo 'slurm_load: accounting is disabled' >&2; exit 1")
    assert status(run)["state"] == "interrupted"
    program(no_scheduler / "sacct", "echo '17|OUT_OF_MEMORY|2026-11-25T07:02:00'")
    assert (status(run)["state"], status(run)["job_state"]) == ("out_of_memory", "OUT_OF_MEMORY")
    program(no_scheduler / "sacct", "echo '17|CANCELLED by 1000|2026-11-25T07:02:00'")
    assert status(run)["state"] == "cancelled"


def test_restarts_are_told_with_their_reasons(tmp_path: Path) -> None:
    run = a_run(tmp_path / "demo")
    for last, fields in (("requeue", {"status": "preempted"}), ("error", {"reason": "no disk"}), (None, {})):
        with Recorder(run, total_updates=8, start_update=2, tensorboard=False) as recorder:
            recorder.event("resume", world_size=4)
            recorder.update({"update": 2, "seconds": 3.0})
            recorder.update({"update": 3, "seconds": 3.0})
            if last:
                recorder.event(last, **fields)
    with Recorder(run, total_updates=8, start_update=3, tensorboard=False) as recorder:
        recorder.event("resume")
    found = status(run)
    told = [(i["update"], i["reason"], i["redone"]) for i in found["interruptions"]]
    assert told == [(2, NO_MESSAGE, 2), (2, "preempted", 2), (2, "no disk", 2), (3, NO_MESSAGE, 1)]
    assert found["restarts"] == 4
    assert all(i["away_seconds"] >= 0 for i in found["interruptions"])
    text = card(found)
    for part in ("restarted 4 times", "preempted", "no disk", NO_MESSAGE, "2 updates repeated"):
        assert part in text
    assert f"4, last: {NO_MESSAGE}" in table([found])


def test_ranks_that_lost_another_do_not_hide_why_it_went() -> None:
    lost = {
        "event": "error",
        "rank": 1,
        "reason": "RuntimeError: [tcp/pair.cc:537] Read error: Connection reset by peer.",
    }
    cause = {"event": "error", "rank": 0, "reason": "OutOfMemoryError: 80 GB"}
    begin, again = {"event": "start"}, {"event": "resume", "update": 3}
    assert [i["reason"] for i in interruptions([begin, lost, lost, again])] == [PEER_LOST]
    assert [i["reason"] for i in interruptions([begin, lost, cause, lost, again])] == ["OutOfMemoryError: 80 GB"]
    assert [i["reason"] for i in interruptions([begin, cause, lost, again])] == ["OutOfMemoryError: 80 GB"]


def test_the_newest_checkpoint_has_an_age(tmp_path: Path) -> None:
    run = a_run(tmp_path / "demo")
    os.utime(run / "checkpoints/update-00000004/manifest.json", (time.time() - 7200, time.time() - 7200))
    found = status(run)
    assert 7199 < found["checkpoint_age_seconds"] < 7300
    assert "4 (2 h 00 min ago)" in table([found])


def test_a_running_run_that_is_silent_for_long_is_pointed_out(tmp_path: Path) -> None:
    run = a_run(tmp_path / "demo")
    assert status(run)["silent_seconds"] is None
    past = time.time() - 3 * SILENCE_SECONDS
    history = [e | {"time": "2020-01-01T00:00:00+00:00"} for e in events.read(run / "events.jsonl")]
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in history))
    for name in ("metrics.jsonl", "events.jsonl"):
        os.utime(run / name, (past, past))
    assert "silent: no update for 30 min" in table([status(run)])


def test_speed_and_data_wait_are_those_of_the_last_hundred_updates(tmp_path: Path) -> None:
    with Recorder(tmp_path / "demo", total_updates=500, tensorboard=False) as recorder:
        for update in range(200):
            fast = {"seconds": 1.0, "clips_per_second": 90.0, "data_wait_fraction": 0.0}
            slow = {"seconds": 9.0, "clips_per_second": 10.0, "data_wait_fraction": 0.5}
            recorder.update({"update": update} | (fast if update < 100 or update % 2 else slow))
    found = status(tmp_path / "demo")
    assert (found["clips_per_second"], found["data_wait_fraction"]) == (18.0, 0.25)  # 90 clips in 1 s, 90 in 9 s


def test_all_runs_of_a_folder_are_shown_and_a_name_is_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        a_run(tmp_path / "runs" / name, "end:finished")
    (tmp_path / "runs/.index").mkdir()
    (tmp_path / "runs/notes").mkdir()
    runs = ["--runs", str(tmp_path / "runs")]
    assert main(runs) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["first", "second"]
    assert "\033[" not in shown
    assert main(["second", *runs]) == 0
    assert capsys.readouterr().out.startswith("second\n")
    with pytest.raises(ConfigError, match="did you mean 'second'"):
        main(["secondd", *runs])
    with pytest.raises(ConfigError, match="holds no runs"):
        main(["--runs", str(tmp_path / "nowhere")])


def test_watching_shows_it_again_until_interrupted(tmp_path: Path) -> None:
    run = a_run(tmp_path / "demo", "end:finished")
    command = [sys.executable, "-c", "from multitrain.report.status import main; main()", str(run), "--watch", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            seen += line == "demo\n"
            if seen == 3:
                break
        process.terminate()
    assert seen == 3


def test_the_command_prints_json_that_scripts_can_read(tmp_path: Path) -> None:
    run = a_run(tmp_path / "demo", "end:finished")
    command = [sys.executable, "-m", "multitrain.report.status", str(run), "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["state"] == "finished"


def test_a_copy_of_a_run_that_trains_does_not_train(tmp_path: Path) -> None:
    run = a_run(tmp_path / "first")
    with acquire(run, patience=0):
        shutil.copytree(run, tmp_path / "copy")
        first, copy = statuses([run, tmp_path / "copy"])
    assert (first["state"], first["last_error"]) == ("running", None)
    assert (copy["state"], copy["eta_seconds"]) == ("interrupted", None)
    assert f"a copy of {run}, made while it trained" in card(copy)
