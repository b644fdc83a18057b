"""Back into the queue: the very last act, of a run that is not finished, when SLURM took it. Real ranks and signals.

The controller is a script that says what a real one (22.05.8) was recorded to say, and notes what is asked of it; the same
with a real one is in tests/slurm.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from engine.test_resume import events
from engine.test_stopping import until
from support import Rank, settings, start_ranks, wait, write_run

from multitrain.engine import checkpoint as ck

JOB = "JobId=7 JobName=tiny JobState={state} Reason=None Restarts=0 EndTime=2036-01-01T00:00:00 PreemptTime={preempt}"
TAKEN, CANCELLED = ("RUNNING", "2026-11-22T10:18:45"), ("COMPLETING", "None")
SCONTROL = """#!/bin/sh
case "$1 $2" in
"show job") echo "{job}" ;;
"requeue 7")
    echo asked >> {folder}/asked
    ls {run}/checkpoints > {folder}/checkpoints-$(wc -l < {folder}/asked)
    cp {run}/events.jsonl {folder}/events-$(wc -l < {folder}/asked)
    touch {folder}/requeued ;;
*) exit 1 ;;
esac
"""


class Job:
    """A run in a job that a controller answers for."""

    def __init__(self, data: Path, folder: Path, ranks: int, state: tuple[str, str], phase: str) -> None:
        self.folder = folder
        self.run, _ = write_run(folder, settings(data, gpus=ranks, updates=3))
        bin_ = folder / "bin"
        bin_.mkdir()
        job = JOB.format(state=state[0], preempt=state[1])
        (bin_ / "scontrol").write_text(SCONTROL.format(job=job, run=self.run, folder=folder))
        (bin_ / "scontrol").chmod(0o755)
        environment = {"SLURM_JOB_ID": "7", "PATH": f"{bin_}:{os.environ['PATH']}"}
        program = str(Path(__file__).with_name("phases.py"))
        self.processes = start_ranks(
            [program, str(self.run), phase], ranks, log=self.run / "ranks.log", environment=environment
        )
        until(self.run, phase, self.processes)

    @property
    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()

    def log(self) -> str:
        return (self.run / "ranks.log").read_text()[-4000:]


def newest_of(job: Job) -> Path:
    newest = ck.newest_verified(job.run / "checkpoints")[0]
    assert newest is not None
    return newest


def send(processes: list[Rank], number: int) -> None:
    for process in processes:
        process.send_signal(number)


def test_a_preempted_run_requeues_itself_when_all_is_saved_and_waits_to_be_ended(
    tiny_data: Path, tmp_path: Path
) -> None:
    """A rank that left by itself would make SLURM count the job as completed."""
    job = Job(tiny_data, tmp_path, 2, TAKEN, "collective")
    send(job.processes, signal.SIGTERM)
    deadline = time.monotonic() + 600
    while not job.requeued:
        assert time.monotonic() < deadline, job.log()
        time.sleep(0.02)
    time.sleep(0.5)
    assert [p.poll() for p in job.processes] == [None, None], "they wait"
    then = [json.loads(line)["event"] for line in (tmp_path / "events-1").read_text().splitlines()]
    assert "checkpoint" in then
    assert "requeue" not in then, "it says so when SLURM has taken it"
    assert [(e["status"], e["update"]) for e in events(job.run, "requeue")] == [
        ("preempted", ck.read(newest_of(job)).update)
    ]
    assert sorted((tmp_path / "checkpoints-1").read_text().split()) == ["latest", newest_of(job).name]
    send(job.processes, signal.SIGTERM)
    assert wait(job.processes, 300) == [75, 75], job.log()
    assert (tmp_path / "asked").read_text().split() == ["asked"], "once"


@pytest.mark.parametrize(
    ("state", "phase", "code"), [(CANCELLED, "stall", 75), (TAKEN, "last-save", 0)], ids=["cancelled", "finished"]
)
def test_a_cancelled_run_and_a_finished_one_stay_away(
    tiny_data: Path, tmp_path: Path, state: tuple[str, str], phase: str, code: int
) -> None:
    """The finished one is signalled while its last checkpoint is being written."""
    job = Job(tiny_data, tmp_path, 1, state, phase)
    send(job.processes, signal.SIGTERM)
    assert wait(job.processes, 300) == [code], job.log()
    assert not job.requeued
    assert len(ck.listed(job.run / "checkpoints")) == 1, "it left when its checkpoint was on disk"
    assert ck.newest_verified(job.run / "checkpoints")[0] is not None
    assert not events(job.run, "requeue")
    assert events(job.run, "end")[-1]["status"] == ("finished" if code == 0 else "cancelled")
