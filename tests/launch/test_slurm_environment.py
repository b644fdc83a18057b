"""What a rank reads from SLURM: its place, the rendezvous, and whether its job must come back."""

from __future__ import annotations

import signal
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from multitrain.cluster import slurm
from multitrain.cluster.requeue import Action, Ended, decide
from multitrain.config import ClusterConfig

STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "13",
    "SLURM_LOCALID": "5",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "20",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}

JOB = (
    "JobId=7 JobName=a run UserId=me(1) JobState={state} Reason=None Requeue=1 Restarts=0 RunTime=00:00:05 "
    "EndTime={end} PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime={preempt} Partition=low "
    "Command=/x/train.sh name=first JobState=FAKE WorkDir=/x"
)


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that holds what `scontrol` says, in lines recorded from a controller."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\nread line < {tmp_path}/answer && echo "$line"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "answer"


def test_a_rank_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    place = slurm.rank_environment(STEP)
    assert place.pop("MASTER_PORT") == str(slurm.master_port(STEP))
    assert place == {
        "RANK": "13",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "5",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "10.0.0.7",  # no scontrol in reach, as in a container
    }


def test_the_first_node_is_asked_for_its_address(answer: Path) -> None:
    answer.write_text("NodeName=gpu07 Arch=x86_64 NodeAddr=192.168.1.7 NodeHostName=gpu07 Version=22.05.8\n")
    assert slurm.master_address(STEP) == "192.168.1.7"
    assert slurm.master_address({**STEP, "SLURM_STEP_NODELIST": "gpu07"}) == "127.0.0.1"


def test_a_gpu_bound_to_the_task_has_index_0() -> None:
    place = slurm.rank_environment({**STEP, "CUDA_VISIBLE_DEVICES": "5", "SLURM_STEP_NODELIST": "gpu07"})
    assert place["LOCAL_RANK"] == "0"


def test_the_batch_script_is_not_a_rank() -> None:
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}
    assert not slurm.in_step(batch)
    assert slurm.rank_environment(batch)["WORLD_SIZE"] == "1"


def test_a_launcher_inside_an_allocation_has_the_last_word() -> None:
    place = slurm.rank_environment({**STEP, "RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "5"})
    assert (place["RANK"], place["WORLD_SIZE"], place["MASTER_PORT"]) == ("1", "2", "5")


def test_ports_agree_within_a_start_and_differ_between_starts() -> None:
    ports = {slurm.master_port({**STEP, "SLURM_RESTART_COUNT": str(n), "SLURM_PROCID": "3"}) for n in range(5)}
    assert len(ports) == 5
    assert slurm.master_port({**STEP, "SLURM_PROCID": "0"}) == slurm.master_port(STEP)
    assert all(20000 <= slurm.master_port({"SLURM_JOB_ID": str(j)}) < 32000 for j in range(0, 10**7, 99_991))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-4]", "node1"),
        ("gpu[07-09,12],fat1", "gpu07"),
        ("a,b[1-2]", "a"),
        ("rack[3-4]n[05,7]", "rack3n05"),
    ],
)
def test_the_first_of_a_node_list(nodes: str, first: str) -> None:
    assert slurm.first_node(nodes) == first


SOON, LATER = timedelta(seconds=30), timedelta(hours=5)


@pytest.mark.parametrize(
    ("state", "preempt", "left", "signals", "reason"),
    [
        ("RUNNING", "2026-11-22T10:18:45", SOON, [signal.SIGTERM], "preempted"),
        ("RUNNING", "2026-11-22T10:18:45", LATER, [signal.SIGUSR2, signal.SIGTERM], "preempted"),
        ("RUNNING", "None", SOON, [signal.SIGUSR2], "time limit"),
        ("RUNNING", "None", timedelta(seconds=400), [signal.SIGUSR1], "time limit"),
        ("RUNNING", "None", LATER, [signal.SIGUSR2], "time limit"),
        ("RUNNING", "None", LATER, [signal.SIGUSR1], "ended from outside"),
        ("RUNNING", "None", LATER, [], None),
        ("SUSPENDED", "None", LATER, [], None),
        ("TIMEOUT", "None", SOON, [], "time limit"),
        ("RUNNING", "None", SOON, [signal.SIGTERM], "time limit"),
        ("RUNNING", "None", LATER, [signal.SIGTERM], "ended from outside"),
        ("COMPLETING", "None", SOON, [signal.SIGTERM], "cancelled"),
        ("COMPLETING", "2026-11-22T10:18:45", SOON, [signal.SIGTERM], "cancelled"),
        ("CANCELLED", "None", LATER, [signal.SIGTERM, signal.SIGUSR2], "cancelled"),
        ("PENDING", "None", LATER, [signal.SIGTERM], "requeued by an operator"),
        ("REQUEUE_HOLD", "None", LATER, [signal.SIGTERM], "requeued by an operator"),
    ],
)
def test_a_job_comes_back_only_when_slurm_took_it(
    answer: Path, state: str, preempt: str, left: timedelta, signals: list[int], reason: str | None
) -> None:
    end = (datetime.now() + left).isoformat(timespec="seconds")
    answer.write_text(JOB.format(state=state, preempt=preempt, end=end) + "\n")
    assert slurm.show_job("7")["JobName"] == "a run"
    assert slurm.stop_reason(slurm.show_job("7"), signals) == reason


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        ("None", "cancelled"),
        ("JobLaunchFailure", "batch script ended"),
        ("TimeLimit", "time limit"),
        ("NodeDown", "cancelled"),
    ],
)
def test_a_job_whose_batch_script_was_killed_is_told_from_a_cancelled_one(
    answer: Path, reason: str, why: str | None
) -> None:
    line = JOB.format(state="COMPLETING", preempt="None", end="2026-11-22T10:18:45").replace(
        "Reason=None", f"Reason={reason}"
    )
    answer.write_text(line + "\n")
    assert slurm.stop_reason(slurm.show_job("7"), [signal.SIGTERM]) == why


@pytest.mark.parametrize(("own", "action"), [(0, Action.ALREADY_REQUEUED), (1, Action.REQUEUE)])
@pytest.mark.parametrize("preempt", ["2026-11-22T10:18:45", "None"])
def test_a_start_of_a_job_that_has_started_again_elsewhere_leaves_it_alone(
    answer: Path, own: int, action: Action, preempt: str
) -> None:
    """A node that was silent for a while is back: `scontrol requeue` there would take the nodes from the next start."""
    line = JOB.format(state="RUNNING", preempt=preempt, end="2026-11-22T10:18:45")
    assert "Restarts=0" in line
    answer.write_text(line.replace("Restarts=0", "Restarts=1") + "\n")
    ended = Ended(slurm.show_job("7"), [signal.SIGTERM], restart=own)
    assert decide(ended, [], ClusterConfig(), went_well=True).action == action


@pytest.mark.parametrize(
    ("ago", "job", "reason"),
    [(1, "7", "preempted"), (3600, "7", "requeued by an operator"), (1, "17", "requeued by an operator")],
)
def test_a_preemption_without_grace_that_only_the_log_records_is_no_operators_requeue(
    answer: Path, tmp_path: Path, ago: int, job: str, reason: str
) -> None:
    """SLURM requeues such a job at once, and forgets its PreemptTime. An earlier start's line, or another job's, does not count."""
    log, when = tmp_path / "7.log", (datetime.now() - timedelta(seconds=ago)).isoformat(timespec="seconds")
    log.write_text(f"slurmstepd-n1: error: *** JOB {job} ON n1 CANCELLED AT {when} DUE TO PREEMPTION ***\n")
    line = JOB.format(state="PENDING", preempt="None", end=LATER)
    answer.write_text(f"{line} StdOut={log} Power=\n")
    assert slurm.stop_reason(slurm.show_job("7"), [signal.SIGTERM], restart=0) == reason


def test_without_an_answer_nothing_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(slurm.SlurmError, match="scontrol"):
        slurm.stop_reason(slurm.show_job("7"), [signal.SIGTERM])


def test_one_job_of_an_array_is_named_as_such() -> None:
    array = {"SLURM_JOB_ID": "130", "SLURM_ARRAY_JOB_ID": "123", "SLURM_ARRAY_TASK_ID": "4"}
    assert slurm.job_id(array) == "123_4"
    assert slurm.job_id({"SLURM_JOB_ID": "130"}) == "130"
    assert slurm.job_id({}) is None
