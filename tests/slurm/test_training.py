"""Real training on a real controller: preempted, warned, cancelled. The loss curve shows nothing of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from multitrain.engine import checkpoint as ck
from tests.slurm.drill import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]


class Runs:
    """Submits tiny runs as a user does, and reads what they leave."""

    def __init__(self, cluster: Cluster, runs: Path, data: Path) -> None:
        self.cluster, self.runs, self.data = cluster, runs, data

    def submit(self, name: str, *overrides: str) -> tuple[Path, str]:
        """The run's folder and job id."""
        command = [sys.executable, "launch/submit.py", "--config-dir", "tests/configs", "experiment=tiny"]
        command += [f"name={name}", f"runs={self.runs}", "cluster.partition=low", "nodes=2", "gpus=1", *overrides]
        environment = os.environ | {"TINY_DATA": str(self.data)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        job = self.cluster.run("squeue", "--noheader", "--format=%i", f"--name={name}").split()[0]
        return self.runs / name, job

    def metrics(self, run: Path) -> list[dict[str, Any]]:
        path = run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def events(self, run: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]

    def log(self, run: Path) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(run.glob("logs/*.log")))

    def reach(self, run: Path, job: str, update: int) -> None:
        """Wait until `update` updates are recorded."""

        def reached() -> bool:
            state = self.cluster.job(job)["JobState"]
            assert state in ("PENDING", "RUNNING", "CONFIGURING"), f"{state}\n{self.log(run)}"
            return len(self.metrics(run)) >= update

        self.cluster.until(reached, f"update {update} of {run.name}", seconds=180)

    def finish(self, run: Path, job: str) -> None:
        info = self.cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=240)
        assert info["JobState"] == "COMPLETED", f"{info}\n{self.log(run)}"

    def assert_same(self, run: Path, reference: Path) -> None:
        ours, theirs = (ck.read(ck.listed(r / "checkpoints")[0]) for r in (run, reference))
        assert ours.update == theirs.update
        for name, tensor in {**theirs.weights, **theirs.moments}.items():
            assert torch.equal({**ours.weights, **ours.moments}[name], tensor), f"{name} differs"
        for key in ("update", "loss", "grad_norm", "tickets"):
            assert [m[key] for m in self.metrics(run)] == [m[key] for m in self.metrics(reference)], key


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path, tiny_data: Path) -> Runs:
    return Runs(cluster, tmp_path / "runs", tiny_data)


@pytest.fixture(scope="module")
def reference(devcluster: Cluster, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run, placed by SLURM over two nodes."""
    runs = Runs(devcluster, tmp_path_factory.mktemp("reference"), tiny_data)
    run, job = runs.submit("undisturbed")
    runs.finish(run, job)
    assert len(runs.metrics(run)) == 12
    assert {m["world_size"] for m in runs.metrics(run)} == {2}
    return run


def test_a_preempted_run_comes_back_by_itself_and_ends_with_the_same_bits(runs: Runs, reference: Path) -> None:
    run, job = runs.submit("preempted")
    runs.reach(run, job, 3)
    runs.cluster.evict()
    runs.cluster.until(lambda: runs.cluster.job(job).get("Restarts") == "1", "the requeue")
    assert runs.events(run)[-1]["event"] == "requeue"
    assert runs.events(run)[-1]["status"] == "preempted"
    stopped = len(runs.metrics(run))
    assert 3 <= stopped < 12
    assert ck.read(ck.newest_verified(run / "checkpoints")[0] or run).update == stopped, "work was lost"
    runs.cluster.start_now(job)
    runs.finish(run, job)
    runs.assert_same(run, reference)


def test_a_run_warned_of_its_time_limit_comes_back_and_ends_with_the_same_bits(runs: Runs, reference: Path) -> None:
    """The warning itself is SLURM's `--signal`; here it is sent by hand, to the same processes."""
    run, job = runs.submit("warned")
    runs.reach(run, job, 2)
    runs.cluster.run("scancel", "--signal=USR2", job)
    runs.cluster.until(lambda: runs.cluster.job(job).get("Restarts") == "1", "the requeue")
    assert runs.events(run)[-1]["status"] == "time limit"
    runs.cluster.start_now(job)
    runs.finish(run, job)
    runs.assert_same(run, reference)


def test_a_cancelled_run_stays_cancelled_and_can_be_resumed(runs: Runs, reference: Path) -> None:
    run, job = runs.submit("cancelled")
    runs.reach(run, job, 2)
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
    runs.cluster.until(lambda: runs.cluster.job(job).get("Restarts") == "1", "the requeue", seconds=150)
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
