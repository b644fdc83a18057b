"""However two starts of one run come about, one trains, and the other says why it does not. On a real controller."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.slurm.drill import Runs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400), pytest.mark.slow]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def begun(runs: Runs, run: Path) -> set[str]:
    """The jobs that have begun to train."""
    return {e["job"] for e in runs.events(run) if e["event"] == "begin"}


def test_of_two_jobs_of_train_sh_one_trains_and_the_other_says_why_not(
    runs: Runs, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the controller takes its time to rename and comment a job."""
    slow = tmp_path / "bin"
    slow.mkdir()
    real = shutil.which("scontrol")
    (slow / "scontrol").write_text(f'#!/bin/sh\n[ "$1" = update ] && sleep 4\nexec {real} "$@"\n')
    (slow / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow}:{os.environ['PATH']}")
    run, first = runs.submit_script("twins")
    _, second = runs.submit_script("twins")
    states = {job: runs.cluster.wait(job, *OVER)["JobState"] for job in (first, second)}
    assert sorted(states.values()) == ["COMPLETED", "FAILED"], f"{states}\n{runs.log(run)}"
    refused = next(job for job, state in states.items() if state == "FAILED")
    (trained,) = begun(runs, run)
    assert trained != refused
    said = (runs.runs / f"{refused}.out").read_text()
    assert f"job {trained}" in said or "another submission was faster" in said, said
    runs.assert_same(run, reference)


def test_a_run_that_goes_on_is_not_submitted_again_under_whatever_name_its_job_has(runs: Runs) -> None:
    run, job = runs.submit("busy", "updates=5000")
    runs.reach(run, job, 2)
    runs.cluster.run("scontrol", "update", f"jobid={job}", "name=another", "comment=mine")
    events = (run / "events.jsonl").read_bytes()
    for hidden in (False, True):
        if hidden:
            (run / "events.jsonl").rename(run / "hidden")
        for here in ((), ("cluster=local", "nodes=1")):
            done = runs.ask("busy", *here)
            assert (done.returncode, f"job {job}" in done.stderr) == (2, True), done.stdout + done.stderr
        _, script = runs.submit_script("busy", "updates=5000")
        runs.cluster.wait(script, "FAILED")
        assert f"job {job}" in (runs.runs / f"{script}.out").read_text()
        if hidden:
            assert not (run / "events.jsonl").exists() or begun(runs, run) <= {job}
    assert events.startswith((run / "hidden").read_bytes()[: len(events)])
    before = len(runs.metrics(run))
    runs.reach(run, job, before + 2)
    assert [m["update"] for m in runs.metrics(run)] == list(range(len(runs.metrics(run))))


def test_of_submissions_in_the_same_second_one_is_taken(runs: Runs) -> None:
    command = runs.command("at-once", "cluster.partition=low", "nodes=2", "gpus=1", "updates=3")
    processes = [runs.start(command) for _ in range(3)]
    said = [process.communicate()[0] for process in processes]
    taken = [text for process, text in zip(processes, said) if process.returncode == 0]
    assert len(taken) == 1, said
    assert sorted(process.returncode for process in processes) == [0, 2, 2], said
    assert not any("Traceback" in text for text in said), said
    run = runs.runs / "at-once"
    job = taken[0].split()[1]
    runs.finish(run, job)
    assert begun(runs, run) == {job}
