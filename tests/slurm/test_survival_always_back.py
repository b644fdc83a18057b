"""Whatever takes a job away, it comes back when it should, a bounded number of times, and says why. On a real controller."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.drill import Runs, frozen, looking, ranks, send, supervisors

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400), pytest.mark.slow]
NVIDIA_SMI = """#!/bin/sh
# A GPU a node, which node1 has lost. A mock: there are no GPUs here.
[ "$SLURMD_NODENAME" = node1 ] || echo "0, GPU-$SLURMD_NODENAME, H100, , 0"
"""


def test_a_time_limit_that_arrives_while_a_rank_a_node_or_all_of_them_stand_still_brings_the_job_back(
    runs: Runs, reference: Path
) -> None:
    run, job = runs.submit("still", "checkpoint.every=2", "cluster.lead_time=15")
    runs.reach(run, job, 3)
    send([ranks(run)[1]], signal.SIGSTOP)
    runs.cluster.ends_in(job, 5)
    assert runs.back_in_queue(run, job, starts=1)["status"] == "time limit"
    runs.cluster.start_now(job)
    runs.reach(run, job, len(runs.metrics(run)) + 1)
    still = [ranks(run)[1], supervisors(run)[1]]
    send(still, signal.SIGSTOP)
    runs.cluster.ends_in(job, 5)
    assert runs.back_in_queue(run, job, starts=2)["status"] == "time limit"
    send(still, signal.SIGKILL)
    runs.cluster.start_now(job)
    runs.reach(run, job, len(runs.metrics(run)) + 1)
    still = [*ranks(run).values(), *supervisors(run).values()]  # nobody is left who could end the step
    send(still, signal.SIGSTOP)
    runs.cluster.ends_in(job, 5)
    assert runs.back_in_queue(run, job, starts=3)["status"] == "time limit"
    send(still, signal.SIGKILL)
    runs.cluster.start_now(job)
    runs.finish(run, job)
    runs.assert_same(run, reference)


def test_a_limit_that_is_shorter_than_starting_up_ends_the_run_after_some_starts_with_the_reason(runs: Runs) -> None:
    run, job = runs.submit("short", "cluster.max_stalled_restarts=1", "cluster.lead_time=15")
    for starts in (1, 2):
        runs.cluster.until(lambda: len(ranks(run)) == 2, "ranks that start", pause=0.02)
        send(ranks(run).values(), signal.SIGSTOP)
        runs.cluster.ends_in(job, 5)
        if starts == 1:
            assert runs.back_in_queue(run, job, starts=1)["status"] == "time limit"
            runs.cluster.start_now(job)
    runs.cluster.wait(job, "FAILED", "TIMEOUT")
    end = next(e for e in runs.events(run) if e["event"] == "end")  # ranks that SLURM wakes up may repeat it
    assert end["status"] == "gave up", runs.log(run)
    assert "2 starts in a row" in end["reason"]
    assert "cluster.max_stalled_restarts=1" in end["reason"]


def two(pids: list[int]) -> list[int]:
    """Both ranks' processes, once both are there."""
    return pids if len(pids) == 2 else []


def test_preflight_leaves_a_bad_node_out_and_a_preemption_in_the_middle_of_it_brings_the_job_back(
    runs: Runs, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(NVIDIA_SMI)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    run, job = runs.submit("looked-at", "preflight=true")
    said = runs.back_in_queue(run, job, starts=1)
    assert (said["status"], said["exclude"]) == ("bad node", ["node1"])
    assert runs.cluster.job(job)["ExcNodeList"] == "node1"
    fake.unlink()
    runs.cluster.start_now(job)
    runs.cluster.preempt(job, runs.cluster.until(lambda: two(looking(run)), "preflight", pause=0.01))
    assert runs.back_in_queue(run, job, starts=2)["status"] == "preempted"
    runs.cluster.start_now(job)
    runs.finish(run, job)
    runs.assert_same(run, reference)


def test_a_controller_that_is_away_while_a_node_fails_costs_only_time(runs: Runs, reference: Path) -> None:
    run, job = runs.submit("alone", "checkpoint.every=2")
    runs.reach(run, job, 3)
    victim = supervisors(run)[1]
    with runs.cluster.controller_away():
        os.kill(victim, signal.SIGKILL)
        deadline = time.monotonic() + 600
        while ranks(run):
            assert time.monotonic() < deadline, runs.log(run)
            time.sleep(0.1)
        time.sleep(20)  # scontrol itself tries for a while
    assert runs.back_in_queue(run, job, starts=1)["status"] == "failed"
    runs.cluster.start_now(job)
    runs.reach(run, job, len(runs.metrics(run)) + 1)
    with runs.cluster.controller_away(), frozen(ranks(run).values()):  # and while a run that was told to leave asks it
        for pid in ranks(run).values():
            os.kill(pid, signal.SIGTERM)
    runs.back_in_queue(run, job, starts=2)
    runs.cluster.start_now(job)
    runs.finish(run, job)
    runs.assert_same(run, reference)


def test_data_that_is_not_there_at_one_start_of_a_run_that_went_well_is_waited_for(
    runs: Runs, reference: Path, tmp_path: Path
) -> None:
    runs.data = shutil.copytree(runs.data, tmp_path / "data")
    run, job = runs.submit("unmounted", "cluster.max_stalled_restarts=2", "checkpoint.every=2")
    runs.reach(run, job, 3)
    runs.cluster.preempt(job, ranks(run).values())
    away = runs.data.rename(tmp_path / "away")
    runs.cluster.start_now(job)
    said = runs.back_in_queue(run, job, starts=2)
    assert said["status"] == "failed", said
    away.rename(runs.data)
    runs.cluster.start_now(job)
    runs.finish(run, job)
    runs.assert_same(run, reference)


def test_a_python_that_is_missing_on_one_node_costs_a_run_that_went_well_only_that_node(
    runs: Runs, reference: Path, tmp_path: Path
) -> None:
    """At start 4 on the second node, at start 5 on the one where the batch script runs: more restarts than three."""
    python = tmp_path / "python"
    missing = 'case "$SLURM_RESTART_COUNT/$SLURM_NODEID" in 4/1 | 5/0) exit 127 ;; esac'
    python.write_text(f'#!/bin/sh\n{missing}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    run, job = runs.submit("missing", f"cluster.python={python}", "checkpoint.every=1", "cluster.restarts_in_place=0")
    for _ in range(4):
        runs.reach(run, job, len(runs.metrics(run)) + 1)
        runs.cluster.run("scontrol", "requeue", job)
        runs.cluster.start_now(job)

    def back_without(count: int) -> bool:
        now = runs.cluster.job(job)
        out = runs.cluster.run("scontrol", "show", "hostnames", now["ExcNodeList"]).split()
        return now["Restarts"] == str(4 + count) and now["JobState"] == "PENDING" and len(out) == count

    runs.cluster.until(lambda: back_without(1), "the second node left out")
    assert runs.said(run, "requeue")[-1] == ("requeue", "failed")
    runs.cluster.start_now(job)
    runs.cluster.until(lambda: back_without(2), "the first node left out as well")
    assert "does not run on node" in runs.log(run)
    runs.cluster.start_now(job)
    runs.finish(run, job)
    runs.assert_same(run, reference)


def test_a_node_on_which_the_runs_are_not_mounted_is_left_out(
    runs: Runs, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTITRAIN_JOIN", "15")
    run, job = runs.submit("elsewhere", "checkpoint.every=1")
    runs.reach(run, job, 3)
    runs.cluster.run("scontrol", "requeue", job)
    runs.cluster.wait(job, "PENDING")
    with runs.cluster.not_mounted("node2", runs.runs):
        runs.cluster.start_now(job)
        assert runs.back_in_queue(run, job, starts=2)["exclude"] == ["node2"]
        assert runs.cluster.job(job)["ExcNodeList"] == "node2"
        runs.cluster.start_now(job)
        runs.reach(run, job, 4)
        runs.cluster.run("scancel", "--signal=TERM", job)
        assert "exclude" not in runs.back_in_queue(run, job, starts=3)
        assert runs.cluster.job(job)["ExcNodeList"] == "(null)", "it has trained since: the node is allowed again"
        runs.cluster.run("scontrol", "update", f"jobid={job}", "ExcNodeList=node2")
        runs.cluster.start_now(job)
        runs.finish(run, job)
    runs.assert_same(run, reference)


def test_a_suspended_job_is_no_hung_one(runs: Runs, reference: Path) -> None:
    run, job = runs.submit("suspended", "engine.hang_limit=8", "checkpoint.every=1000")
    runs.reach(run, job, 3)
    runs.cluster.run("scontrol", "suspend", job)
    time.sleep(12)
    runs.cluster.run("scontrol", "resume", job)
    runs.finish(run, job)
    assert not [e for e in runs.events(run) if e["event"] in ("hung", "rank_failed")]
    assert len([e for e in runs.events(run) if e["event"] == "begin"]) == 1
    runs.assert_same(run, reference)


def test_what_an_operator_does_is_called_so(runs: Runs, reference: Path) -> None:
    run, job = runs.submit("operated", "checkpoint.every=2")
    ways = [("requeue",), ("requeuehold",), ("update", "state=down", "reason=drill")]
    for starts, way in enumerate(ways, 1):
        runs.reach(run, job, len(runs.metrics(run)) + 2)
        if way[0] == "update":
            node = runs.cluster.run("scontrol", "show", "hostnames", runs.cluster.job(job)["NodeList"]).split()[1]
            runs.cluster.run("scontrol", "update", f"nodename={node}", *way[1:])
            status = runs.back_in_queue(run, job, starts=starts)["status"]
            with contextlib.suppress(AssertionError):  # its daemon may have registered it again already
                runs.cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
        else:
            runs.cluster.run("scontrol", *way, job)
            status = runs.back_in_queue(run, job, starts=starts)["status"]
        assert status == "requeued by an operator", way
        if way[0] == "requeuehold":
            runs.cluster.run("scontrol", "release", job)
        runs.cluster.start_now(job)
    runs.finish(run, job)
    runs.assert_same(run, reference)


def test_where_requeueing_is_forbidden_the_events_say_so_and_a_successor_goes_on_where_that_is_asked_for(
    runs: Runs, reference: Path
) -> None:
    run, job = runs.submit("forbidden")
    runs.reach(run, job, 2)
    runs.cluster.run("scontrol", "update", f"jobid={job}", "Requeue=0")
    with frozen(ranks(run).values()):
        runs.cluster.run("scancel", "--signal=USR2", job)
    runs.cluster.wait(job, "FAILED")
    assert runs.said(run, "requeue", "requeue_failed", "end")[-1] == ("requeue_failed", "time limit")
    assert "disabled" in runs.events(run)[-1]["reason"]
    run, job = runs.submit("forbidden", "cluster.requeue=resubmit")
    runs.reach(run, job, len(runs.metrics(run)) + 2)
    runs.cluster.run("scontrol", "update", f"jobid={job}", "Requeue=0")
    with frozen(ranks(run).values()):
        runs.cluster.run("scancel", "--signal=USR2", job)
    runs.cluster.wait(job, "COMPLETED", "FAILED")
    last = [e for e in runs.events(run) if e["event"] == "requeue"][-1]
    assert last["status"] == "time limit"
    successor = last["by"].removeprefix("successor job ")
    runs.finish(run, successor)
    runs.assert_same(run, reference)
