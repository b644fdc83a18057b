"""Every way to cancel, or to signal, a job: what is saved, whether it comes back, and what the events say. On a real controller."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from multitrain.engine import checkpoint as ck
from tests.slurm.drill import Runs, frozen, ranks

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]


def saved(run: Path) -> int:
    """Updates of the newest checkpoint."""
    return ck.read(ck.newest_verified(run / "checkpoints")[0] or run).update


def test_a_signal_ends_one_start_of_a_run_and_not_the_run(runs: Runs) -> None:
    run, job = runs.submit("signalled", "updates=5000", "checkpoint.every=1000")
    ways = (
        (("--signal=INT", job), "ended from outside", True),
        (("--signal=USR1", job), "ended from outside", True),
        (("--signal=TERM", job), "ended from outside", True),
        ((f"{job}.0",), "failed", False),
        (("--signal=TERM", "--full", job), "ended from outside", False),
        (("--signal=HUP", "--full", job), "ended from outside", False),
    )
    for starts, (arguments, status, saves) in enumerate(ways, 1):
        runs.reach(run, job, len(runs.metrics(run)) + 2)
        with frozen(ranks(run).values() if saves else ()):
            runs.cluster.run("scancel", *arguments)
        said = runs.back_in_queue(run, job, starts=starts)
        assert said["status"] == status, f"{arguments}: {said}\n{runs.log(run)}"
        if saves:
            assert saved(run) == len(runs.metrics(run)), f"{arguments}: work was lost"
        runs.cluster.start_now(job)
        runs.reach(run, job, len(runs.metrics(run)) + 1)
    before = len(runs.metrics(run))
    runs.cluster.run("scancel", "--signal=TERM", "--batch", job)
    runs.cluster.until(lambda: not (run / "SAVE").exists() and saved(run) >= before, "a checkpoint")
    runs.reach(run, job, len(runs.metrics(run)) + 1)
    assert runs.cluster.job(job)["JobState"] == "RUNNING"


@pytest.mark.parametrize("option", [(), ("--full",)], ids=["plain", "full"])
def test_a_cancelled_job_has_saved_and_says_that_it_was_cancelled(runs: Runs, option: tuple[str, ...]) -> None:
    run, job = runs.submit(f"cancelled{len(option)}", "updates=5000", "checkpoint.every=1000")
    runs.reach(run, job, 2)
    with frozen(ranks(run).values()):
        runs.cluster.run("scancel", *option, job)
    runs.cluster.wait(job, "CANCELLED")
    runs.cluster.until(lambda: not ranks(run), "the end of the ranks")
    assert runs.said(run, "requeue", "requeue_failed", "end")[-1] == ("end", "cancelled"), runs.log(run)
    assert saved(run) == len(runs.metrics(run))
    assert runs.cluster.job(job).get("Restarts", "0") == "0"


def test_a_run_that_was_stopped_stays_stopped_when_its_job_is_put_back_at_that_moment(
    runs: Runs, tmp_path: Path
) -> None:
    """As by an eviction whose grace time is over when the ranks have ended and the batch script has not."""
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(
        f"#!{sys.executable}\nimport os, sys, time\n"
        "if 'launch.requeue' in sys.argv:\n"
        f"    open({str(asked)!r}, 'w')\n"
        f"    while not os.path.exists({str(asked)!r} + '.go'): time.sleep(0.1)\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
    )
    python.chmod(0o755)
    run, job = runs.submit("stopped", f"cluster.python={python}", "updates=5000", "cluster.restarts_in_place=0")
    runs.reach(run, job, 2)
    (run / "STOP").touch()
    runs.cluster.until(asked.exists, "the batch script's question")
    runs.cluster.run("scontrol", "requeue", job)
    (tmp_path / "asked.go").touch()
    assert runs.cluster.wait(job, "CANCELLED")["Restarts"] == "1"
    assert runs.said(run, "requeue", "requeue_failed", "end")[-1] == ("end", "stopped on request"), runs.log(run)
    assert "it is cancelled, because the run has ended" in (run / "logs" / f"{job}.log").read_text()
