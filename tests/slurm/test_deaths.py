"""Hard deaths on a real controller: a killed rank, in place and through the queue, and a killed batch script."""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.drill import Runs, batch_script, ranks

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def after(run: Runs, path: Path, event: str, moment: float) -> dict[str, Any]:
    """The first event of a name after a moment."""
    found = [
        e for e in run.events(path) if e["event"] == event and datetime.fromisoformat(e["time"]).timestamp() > moment
    ]
    return found[0] if found else {}


def test_a_killed_rank_comes_back_inside_the_allocation(runs: Runs) -> None:
    run, job = runs.submit("in-place", "updates=40", "checkpoint.every=2")
    runs.reach(run, job, 5)
    moment = time.time()
    os.kill(ranks(run)[1], signal.SIGKILL)
    runs.cluster.until(lambda: after(runs, run, "resume", moment), "the resume")
    print(
        f"back after {datetime.fromisoformat(after(runs, run, 'resume', moment)['time']).timestamp() - moment:.1f} s in place"
    )
    assert runs.cluster.job(job).get("Restarts", "0") == "0"
    assert after(runs, run, "begin", moment)["in_place"] == 1
    runs.finish(run, job)
    assert [m["update"] for m in runs.metrics(run)] == list(range(40))


def test_a_killed_rank_sends_the_job_back_into_the_queue_a_bounded_number_of_times(runs: Runs) -> None:
    run, job = runs.submit(
        "requeued", "updates=2000", "checkpoint.every=2", "cluster.restarts_in_place=0", "cluster.max_restarts=1"
    )
    runs.reach(run, job, 5)
    moment = time.time()
    os.kill(ranks(run)[1], signal.SIGKILL)
    runs.cluster.until(lambda: runs.cluster.job(job).get("Restarts") == "1", "the requeue")
    print(f"requeued after {time.time() - moment:.1f} s")
    assert runs.events(run)[-1]["status"] == "failed"
    runs.cluster.start_now(job)
    runs.cluster.until(lambda: after(runs, run, "resume", moment), "the resume")
    print(f"back after {time.time() - moment:.1f} s through the queue, its two minutes of waiting left out")
    runs.reach(run, job, len(runs.metrics(run)) + 4)
    os.kill(ranks(run)[1], signal.SIGKILL)
    info = runs.cluster.wait(job, "FAILED")
    assert info["Restarts"] == "1"
    assert "cluster.max_restarts=1" in runs.events(run)[-1]["reason"]


def test_a_killed_batch_script_does_not_end_the_run(runs: Runs) -> None:
    run, job = runs.submit("headless", "updates=2000")
    runs.reach(run, job, 3)
    script = batch_script(job)
    assert script is not None
    os.kill(script, signal.SIGKILL)
    runs.cluster.until(lambda: runs.cluster.job(job).get("Restarts") == "1", "the requeue")
    assert runs.events(run)[-1]["status"] == "batch script ended"
    assert runs.events(run)[-1]["update"] == len(runs.metrics(run)), "work was lost"


def test_a_mistake_in_the_configuration_is_never_requeued(runs: Runs) -> None:
    run, job = runs.submit(
        "mistaken", "cluster.check_data=false", "data.root=/nowhere", "init_from=/nowhere/at/all.pyth"
    )
    info = runs.cluster.wait(job, "FAILED")
    assert info["Restarts"] == "0"
    assert runs.events(run)[-1]["event"] == "end", runs.log(run)
