"""After a hard death the job comes back, boundedly; what no restart mends, and what was cancelled, does not."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from launch import requeue
from multitrain import lease
from multitrain.cluster import restarts, slurm
from multitrain.cluster.exit_status import Exit
from multitrain.cluster.requeue import Action, Decision, Ended, decide, requeue_job
from multitrain.config import compose, dump
from multitrain.records.events import Events, read


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

    def ended(self, status: int = 1, *, signals: str = "", early: bool = False, **record: str) -> bool:
        """The batch script asks; whether the job comes back."""
        self.monkeypatch.setattr("shutil.which", lambda _: None)  # as in a container: it does with what the script says
        back = self.asked(status, signals=signals, early=early, **record) == requeue.NO_SCONTROL
        self.restart += back
        return back

    def asked(self, status: int, *, signals: str = "", early: bool = False, **record: str) -> int:
        """The exit status that the batch script gets as an answer."""
        self.monkeypatch.setenv("SLURM_JOB_ID", "1")
        self.monkeypatch.setenv("SLURM_RESTART_COUNT", str(self.restart))
        shown = {
            "JobState": "RUNNING",
            "Restarts": str(self.restart),
            "PreemptTime": "None",
            "BatchFlag": "1",
            **record,
        }
        text = " ".join(f"{key}={value}" for key, value in shown.items())
        asked = [str(self.folder), str(status), "--signals", signals, "--record", text, *(["--early"] if early else [])]
        return requeue.main(asked)

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
    assert restarts.count_crashes(history) == 3
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
        assert job.ended(143, PreemptTime="2026-11-22T10:18:45")


def test_restarts_in_place_are_no_deaths_of_the_job_but_must_get_on(job: Job) -> None:
    job.begin()
    for number in range(2):
        job.begin(in_place=number + 1)
    history = restarts.starts(read(job.folder / "events.jsonl"))
    assert restarts.count_crashes(history, in_place=3) == 0
    assert restarts.count_crashes(history) == 1
    assert "brought no new checkpoint" in (restarts.refusal(history, 9, 2, in_place=3) or "")


@pytest.mark.parametrize("status", [Exit.FINISHED, Exit.MISTAKE, Exit.GAVE_UP, Exit.HELD])
def test_an_end_in_order_or_a_mistake_is_not_requeued(job: Job, status: int) -> None:
    job.begin()
    if status == Exit.FINISHED:
        job.write("end", status="finished")
    assert not job.ended(status)


def test_exit_status_0_of_srun_alone_is_no_end_of_a_run(job: Job) -> None:
    """srun ends with 0 when it gives up waiting for ranks that were killed at the time limit."""
    job.begin()
    assert job.ended(0, JobState="COMPLETING", Reason="TimeLimit")
    assert job.last["status"] == "time limit"
    job.begin()
    assert job.ended(0)
    assert job.last["status"] == "failed"


def test_a_stopped_run_is_not_requeued(job: Job) -> None:
    job.begin()
    job.write("end", status="stopped on request")
    assert not job.ended(Exit.INTERRUPTED)


@pytest.mark.parametrize("status", ["stopped on request", "finished"])
@pytest.mark.parametrize("cancels", [True, False])
def test_a_run_that_ended_while_slurm_put_its_job_back_is_withdrawn(job: Job, status: str, cancels: bool) -> None:
    """An eviction's grace time was over after the ranks had ended, and before the batch script had."""
    job.begin()
    job.write("end", status=status)
    job.monkeypatch.setattr(slurm, "cancel", (asked := []).append)
    job.monkeypatch.setattr("shutil.which", lambda name: name if cancels and name == "scancel" else None)
    code = Exit.FINISHED if status == "finished" else Exit.INTERRUPTED
    assert job.asked(code, JobState="PENDING", Restarts="1") == (requeue.DONE if cancels else requeue.NO_SCANCEL)
    assert asked == (["1"] if cancels else [])
    assert (job.last["event"], job.last["status"]) == ("end", status)


def test_what_looks_like_a_mistake_is_tried_again_elsewhere_in_a_run_that_went_well(job: Job) -> None:
    """Its configuration works: a folder is missing on the node, not in the configuration. Bounded all the same."""
    job.begin()
    job.write("checkpoint", update=5)
    assert job.ended(137)
    for _ in range(2):
        job.begin()
        job.write("error", rank=1, reason="/data: no such folder", final=True, exit_status=2)
        job.write("rank_failed", rank=1, node="n7", exit_status=2)
        assert job.ended(Exit.MISTAKE)
        assert job.last["event"] == "requeue"
    job.begin()
    job.write("error", rank=1, reason="/data: no such folder", final=True, exit_status=2)
    assert not job.ended(Exit.MISTAKE)
    assert "/data: no such folder" in job.last["reason"]


def test_a_run_that_gave_up_is_not_tried_again_however_well_it_went(job: Job) -> None:
    job.begin()
    job.write("checkpoint", update=5)
    job.write("error", rank=0, reason="it diverged", final=True, exit_status=3)
    assert not job.ended(Exit.FAILED)


def test_the_node_that_failed_before_training_began_is_left_out(job: Job) -> None:
    job.begin()
    job.write("checkpoint", update=5)
    job.write("requeue", status="preempted")
    job.restart = 1
    job.begin()
    job.write("rank_failed", rank=1, node="n7", exit_status=2)
    decision = decided(job, Exit.MISTAKE)
    assert decision.exclude == ("n7",)
    job.write("resume", update=5)
    assert decided(job, Exit.FAILED).exclude == (), "one that fails while it trains may do so anywhere"


def test_a_node_is_allowed_again_once_the_run_has_trained_without_it(job: Job) -> None:
    """Else the failures of weeks would leave a small cluster without nodes, and the job in the queue for ever."""
    job.begin()
    job.write("checkpoint", update=5)
    job.write("rank_failed", rank=1, node="n7", exit_status=2)
    job.write("requeue", status="failed", exclude=["n7"])
    job.restart = 1
    job.begin()
    job.write("rank_failed", rank=0, node="n2", exit_status=2)
    decision = decided(job, Exit.MISTAKE)
    assert (decision.exclude, decision.readmit) == (("n7", "n2"), ()), "it has not trained since"
    job.write("requeue", status="failed", exclude=["n7", "n2"])
    job.restart = 2
    job.begin()
    job.write("resume", update=5)
    decision = decided(job, Exit.FAILED)
    assert (decision.exclude, decision.readmit) == ((), ("n7", "n2"))


SCONTROL = """#!/bin/sh
# Lines recorded from a controller (22.05.8), shortened.
case "$*" in
"show job"*) echo "JobId=1 JobName=a Partition=gpu NumNodes=2 ExcNodeList=n[8-9] JobState=RUNNING" ;;
"show partition"*) echo "PartitionName=gpu Nodes=n[5-9] State=UP" ;;
"show hostnames n[8-9]") printf 'n8\nn9\n' ;;
"show hostnames n[5-9]") printf 'n5\nn6\nn7\nn8\nn9\n' ;;
*) echo "$@" >> "$(dirname "$0")/asked" ;;
esac
"""


@pytest.mark.parametrize(
    ("exclude", "readmit", "listed"),
    [
        (["n7"], [], "n8,n9,n7"),
        (["n7"], ["n9"], "n8,n7"),
        (["n7"], ["n8", "n9"], "n7"),
        ([], ["n8", "n9"], ""),
        (["n6", "n7"], [], "n8,n9"),
    ],
)
def test_the_users_exclusions_stay_and_enough_nodes_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exclude: list[str], readmit: list[str], listed: str
) -> None:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cluster = compose(["experiment=k400"]).cluster
    assert requeue_job(tmp_path, "1", cluster, exclude, readmit) == "requeued"
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 1", f"update jobid=1 ExcNodeList={listed}"]


def test_a_bad_node_of_preflight_is_left_out_and_that_is_bounded(job: Job) -> None:
    for count, node in enumerate(("n1", "n2"), 1):
        job.write("preflight", nodes=[node], reasons=["its clock is wrong"])
        assert decided(job, Exit.BAD_NODE).exclude == ("n1", "n2")[:count]
        assert job.ended(Exit.BAD_NODE)
        assert (job.last["event"], job.last["status"]) == ("requeue", "bad node")
    job.write("preflight", nodes=["n3"], reasons=["its clock is wrong"])
    assert not job.ended(Exit.BAD_NODE)
    assert "3 starts in a row" in job.last["reason"]


def decided(job: Job, status: int) -> Decision:
    told = read(job.folder / "events.jsonl")
    record = {"JobState": "RUNNING", "Restarts": str(job.restart), "PreemptTime": "None"}
    ended = Ended(record, exit_status=status, restart=job.restart)
    limits = compose(["experiment=k400", "cluster.max_stalled_restarts=2"]).cluster
    return decide(ended, restarts.starts(told), limits, went_well=restarts.progressed(told))


def test_a_limit_shorter_than_the_start_up_gives_up_and_says_why(job: Job) -> None:
    soon = (datetime.now() + timedelta(seconds=20)).isoformat(timespec="seconds")
    for _ in range(2):
        job.begin()
        assert job.ended(137, EndTime=soon)
        assert job.last["status"] == "time limit"
    job.begin()
    assert not job.ended(137, EndTime=soon)
    assert "3 starts in a row, 2 of them restarts, brought no new checkpoint" in job.last["reason"]


@pytest.mark.parametrize("status", ["preempted", "ended from outside", "time limit"])
def test_a_job_that_has_put_itself_back_was_not_put_back_by_an_operator(job: Job, status: str) -> None:
    job.begin()
    job.write("requeue", status=status)
    assert not job.ended(75, JobState="PENDING", Restarts="1")
    assert [e["status"] for e in read(job.folder / "events.jsonl") if e["event"] == "requeue"] == [status]


def test_at_the_time_limit_the_batch_script_says_why_the_job_does_not_come_back(job: Job) -> None:
    """It asks before its ranks have ended; SIGKILL may be all that comes after that."""
    at_the_limit = {"JobState": "COMPLETING", "Reason": "TimeLimit"}
    for _ in range(2):
        job.begin()
        assert job.ended(143, early=True, **at_the_limit)
    job.begin()
    assert not job.ended(143, early=True, **at_the_limit)
    assert (job.last["event"], job.last["status"]) == ("end", "gave up")
    assert not job.ended(143, **at_the_limit)
    assert [e["event"] for e in read(job.folder / "events.jsonl")].count("end") == 1


def test_ranks_that_come_to_themselves_after_the_batch_script_put_the_job_back_are_no_second_start(job: Job) -> None:
    """SLURM wakes ranks that were frozen before they could say that they begin, when the job is requeued."""
    at_the_limit = {"JobState": "RUNNING", "Reason": "TimeLimit"}
    soon = (datetime.now() + timedelta(seconds=20)).isoformat(timespec="seconds")
    assert job.ended(143, early=True, EndTime=soon, **at_the_limit)
    job.restart -= 1
    job.begin()
    job.write("start")
    job.write("requeue", status="time limit", update=0)
    (start,) = restarts.starts(read(job.folder / "events.jsonl"))
    assert (start.restart, start.ended, start.trained) == (0, "time limit", True)
    put_back = Ended({"JobState": "PENDING", "Restarts": "1"}, [], restart=0)
    said = decide(put_back, [start], compose(["experiment=k400"]).cluster, went_well=True)
    assert (said.action, said.status) == (Action.ALREADY_REQUEUED, "time limit")
    job.restart += 1
    job.write("end", status="gave up", pid=99)
    job.begin()
    _, last = restarts.starts(read(job.folder / "events.jsonl"))
    soon = {"JobState": "COMPLETING", "Reason": "TimeLimit"}
    said = decide(Ended(soon, [], restart=1), [last], compose(["experiment=k400"]).cluster, went_well=True)
    assert (said.action, said.status) == (Action.END, "gave up")


def test_a_cancelled_job_ends_and_a_job_that_an_operator_put_back_is_left_alone(job: Job) -> None:
    job.begin()
    assert not job.ended(137, JobState="PENDING", Restarts="1")
    assert (job.last["event"], job.last["status"]) == ("requeue", "requeued by an operator")
    job.restart = 1
    job.begin()
    assert not job.ended(137, JobState="CANCELLED")
    assert (job.last["event"], job.last["status"]) == ("end", "cancelled")


def test_a_signal_to_the_processes_of_a_job_is_told_from_a_failure(job: Job) -> None:
    job.begin()
    assert job.ended(137, signals="TERM")
    assert job.last["status"] == "ended from outside"


def test_a_batch_script_whose_job_runs_elsewhere_meanwhile_writes_nothing(job: Job) -> None:
    job.begin()
    before = (job.folder / "events.jsonl").read_bytes()
    with lease.acquire(job.folder, job="1", restart=1):
        assert not job.ended(137)
    assert (job.folder / "events.jsonl").read_bytes() == before


def test_a_mistake_on_one_rank_counts_even_when_the_others_were_killed(job: Job) -> None:
    job.begin()
    job.write("error", rank=3, reason="no such file", final=True)
    job.write("error", rank=0, reason="Connection closed by peer", final=False)
    assert not job.ended(137)
    assert "no such file" in job.last["reason"]


def test_a_run_that_could_not_requeue_itself_is_requeued(job: Job) -> None:
    job.begin()
    job.write("requeue_failed", status="preempted", reason="no scontrol here")
    assert job.ended(1)
    assert (job.last["event"], job.last["status"]) == ("requeue", "preempted")


def test_a_run_of_the_version_before_that_could_not_requeue_itself_is_requeued(job: Job) -> None:
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

    monkeypatch.setattr("multitrain.records.jsonl.append", full)
    assert not job.ended(1)
    assert "events.jsonl cannot be written (No space left on device); make room" in capsys.readouterr().out
    assert job.ended(143, PreemptTime="2026-11-22T10:18:45")


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
