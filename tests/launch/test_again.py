"""After a hard death the job comes back, boundedly; what no restart mends, and what was cancelled, does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch import again
from multitrain.config import compose, dump
from multitrain.monitor import restarts
from multitrain.monitor.events import Events, read


class Job:
    """A run whose starts are told event by event."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch, self.restart = folder, monkeypatch, 0
        limits = ["cluster.max_restarts=4", "cluster.max_stalled_restarts=2"]
        (folder / "config.yaml").write_text(dump(compose(["experiment=k400", *limits])))
        self.write("submit")

    def write(self, event: str, **fields: Any) -> None:
        Events(self.folder / "events.jsonl", job="1", restart=self.restart).write(event, **fields)

    def begin(self, in_place: int = 0) -> None:
        self.write("begin", in_place=in_place)

    def ended(self, status: int = 1, *why: str) -> bool:
        """The batch script asks; whether the job comes back."""
        self.monkeypatch.setenv("SLURM_JOB_ID", "1")
        if self.restart:
            self.monkeypatch.setenv("SLURM_RESTART_COUNT", str(self.restart))
        back = again.main([str(self.folder), str(status), *why]) == 0
        self.restart += back
        return back

    @property
    def last(self) -> dict[str, Any]:
        return read(self.folder / "events.jsonl")[-1]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


def test_a_job_that_gets_on_comes_back_max_restarts_times(job: Job) -> None:
    for update in range(4):
        job.begin()
        job.write("checkpoint", update=update + 1)
        assert job.ended(137)
        assert (job.last["event"], job.last["status"]) == ("requeue", "failed")
    job.begin()
    job.write("checkpoint", update=9)
    assert not job.ended(137)
    assert "cluster.max_restarts=4" in job.last["reason"]
    job.write("submit")
    job.begin()
    assert job.ended(1), "submitted again, it counts anew"


def test_a_job_without_a_new_checkpoint_stops_and_says_why(job: Job) -> None:
    job.begin()
    job.write("checkpoint", update=5)
    assert job.ended()
    for _ in range(2):
        job.begin()
        job.write("checkpoint", update=5)  # the same again is no progress
        assert job.ended()
    job.begin()
    assert not job.ended()
    assert "3 starts in a row, 2 of them restarts" in job.last["reason"]


def test_deaths_count_where_nobody_could_say_anything(job: Job) -> None:
    """The batch script died with its node and SLURM requeued the job: there is only the next `begin`."""
    for _ in range(3):
        job.begin()
    history = restarts.starts(read(job.folder / "events.jsonl"))
    assert restarts.refusal(history, 4, 2) is not None
    assert restarts.deaths(history) == 3
    for _ in range(3):
        assert restarts.refusal(history[:2], 4, 2) is None


def test_a_job_that_dies_before_it_begins_is_bounded_too(job: Job) -> None:
    assert [job.ended() for _ in range(3)] == [True, True, False]


def test_preemptions_are_not_deaths(job: Job) -> None:
    for _ in range(9):
        job.begin()
        job.write("requeue", status="preempted", update=0)
        job.restart += 1
    job.begin()
    assert job.ended()


def test_killed_while_preempted_it_comes_back(job: Job) -> None:
    for _ in range(6):
        job.begin()
        assert job.ended(143, "preempted")


def test_restarts_in_place_are_no_deaths_of_the_job_but_must_get_on(job: Job) -> None:
    job.begin()
    for number in range(2):
        job.begin(in_place=number + 1)
    history = restarts.starts(read(job.folder / "events.jsonl"))
    assert restarts.deaths(history, in_place=3) == 0
    assert restarts.deaths(history) == 1
    assert "brought no new checkpoint" in (restarts.refusal(history, 9, 2, in_place=3) or "")


@pytest.mark.parametrize("status", [0, 75, 2, 3])
def test_an_end_in_order_or_a_mistake_is_not_requeued(job: Job, status: int) -> None:
    job.begin()
    assert not job.ended(status)


def test_a_mistake_on_one_rank_counts_even_when_the_others_were_killed(job: Job) -> None:
    job.begin()
    job.write("error", rank=3, reason="no such file", final=True)
    job.write("error", rank=0, reason="Connection closed by peer", final=False)
    assert not job.ended(137)
    assert "no such file" in job.last["reason"]


def test_a_run_that_could_not_requeue_itself_is_requeued(job: Job) -> None:
    job.begin()
    job.write("requeue", status="preempted")
    job.write("requeue_failed", reason="no scontrol here")
    assert job.ended(1)


def test_restarts_that_cannot_be_counted_end_unless_slurm_took_the_job(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's disk is full. What dies on it would come back for ever; what was preempted is not to blame."""
    job.begin()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multitrain.monitor.lines.append", full)
    assert not job.ended(1)
    assert "events.jsonl cannot be written (No space left on device); make room" in capsys.readouterr().out
    assert job.ended(143, "preempted")


def test_a_cancelled_run_stays_away(job: Job) -> None:
    job.begin()
    job.write("end", status="cancelled")
    assert not job.ended(137)


def test_a_start_on_a_node_that_was_silent_does_not_end_the_one_after_it(job: Job) -> None:
    """Told to leave when its node is back, it takes that for a cancellation; the job runs elsewhere meanwhile."""
    job.write("begin", in_place=0, pid=1)
    job.restart = 1
    job.write("begin", in_place=0, pid=2)
    job.write("end", status="cancelled", pid=1)
    assert job.ended(137)
