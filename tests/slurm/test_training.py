"""Real training on a real controller: preempted, warned, cancelled. The loss curve shows nothing of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from multitrain.engine import checkpoint as ck
from tests.slurm.drill import UPDATES, Runs, frozen, ranks

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def preempt(runs: Runs, run: Path, job: str) -> None:
    """A job of a higher priority takes its nodes in the middle: it has saved all, and waits to come back."""
    runs.reach(run, job, 3)
    runs.cluster.preempt(job, ranks(run).values())
    assert runs.events(run)[-1]["event"] == "requeue"
    assert runs.events(run)[-1]["status"] == "preempted"
    stopped = len(runs.metrics(run))
    assert 3 <= stopped < UPDATES
    assert ck.read(ck.newest_verified(run / "checkpoints")[0] or run).update == stopped, "work was lost"


def test_a_preempted_run_comes_back_by_itself_and_ends_with_the_same_bits(runs: Runs, reference: Path) -> None:
    run, job = runs.submit("preempted")
    preempt(runs, run, job)
    runs.cluster.start_now(job)
    runs.finish(run, job)
    runs.assert_same(run, reference)


def test_a_run_warned_of_its_time_limit_comes_back_and_ends_with_the_same_bits(runs: Runs, reference: Path) -> None:
    """The warning itself is SLURM's `--signal`; here it is sent by hand, to the same processes."""
    run, job = runs.submit("warned")
    runs.reach(run, job, 2)
    with frozen(ranks(run).values()):
        runs.cluster.run("scancel", "--signal=USR2", job)
    runs.cluster.until(lambda: runs.cluster.job(job).get("Restarts") == "1", "the requeue")
    assert runs.events(run)[-1]["status"] == "time limit"
    runs.cluster.start_now(job)
    runs.finish(run, job)
    runs.assert_same(run, reference)


def test_a_preempted_run_of_train_sh_goes_on_with_launch_submit(runs: Runs, reference: Path) -> None:
    run, job = runs.submit_script("script")
    preempt(runs, run, job)
    _, second = runs.submit_script("script")
    runs.cluster.wait(second, "FAILED")
    said = (runs.runs / f"{second}.out").read_text()
    assert f"job {job} (pending)" in said, "the job in the queue and this one would write to one run"
    runs.cluster.run("scancel", job)
    runs.cluster.until(lambda: not runs.cluster.run("squeue", "--noheader", f"--name={run.name}").strip(), "its end")
    run, job = runs.submit("script")
    runs.finish(run, job)
    runs.assert_same(run, reference)


def test_a_cancelled_run_stays_cancelled_and_can_be_resumed(runs: Runs, reference: Path) -> None:
    run, job = runs.submit("cancelled")
    runs.reach(run, job, 2)
    with frozen(ranks(run).values()):
        runs.cluster.run("scancel", job)
    runs.cluster.wait(job, "CANCELLED")
    time.sleep(5)
    info = runs.cluster.job(job)
    assert (info["JobState"], info.get("Restarts", "0")) == ("CANCELLED", "0")
    run, again = runs.submit("cancelled")
    assert again != job
    runs.finish(run, again)
    runs.assert_same(run, reference)


@pytest.mark.slow
def test_the_real_time_limit(runs: Runs) -> None:
    """SLURM's own warning: the updates do not fit into its two minutes; the run comes back by itself, to the last bit."""
    limits = ("cluster.time_limit=2", "cluster.lead_time=45", "updates=2000")
    run, job = runs.submit("limited", *limits)
    runs.cluster.until(lambda: runs.cluster.job(job).get("Restarts") == "1", "the requeue")
    assert runs.events(run)[-1]["status"] == "time limit"
    before = len(runs.metrics(run))
    runs.cluster.start_now(job)
    runs.reach(run, job, before + 5)
    runs.cluster.run("scancel", job)
    other, undisturbed = runs.submit("unlimited", "updates=2000")
    runs.reach(other, undisturbed, before + 5)
    for key in ("update", "loss", "grad_norm", "tickets"):
        ours, theirs = ([m[key] for m in runs.metrics(r)[: before + 5]] for r in (run, other))
        assert ours == theirs, key
