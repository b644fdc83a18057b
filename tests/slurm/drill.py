"""What drills do with a running devcluster."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multitrain.engine import checkpoint as ck

ROOT = Path(__file__).resolve().parents[2]
DEVCLUSTER = ROOT / "slurm" / "devcluster"


def reason_to_skip() -> str | None:
    """Why no cluster can run on this machine; None when one can."""
    spec = importlib.util.spec_from_file_location("devcluster", DEVCLUSTER / "devcluster.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reason: str | None = module.missing()
    return reason


class Cluster:
    """A running devcluster and what drills do with it."""

    def __init__(self, folder: Path, configuration: str) -> None:
        self.folder = folder
        self.configuration = configuration

    def run(self, *command: str) -> str:
        """The output of a SLURM command; a failed one fails the test."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol` says of a job."""
        fields = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, *states: str, seconds: float = 60) -> dict[str, str]:
        """Wait until the job is in one of the states."""
        return self.until(lambda: (info := self.job(job))["JobState"] in states and info, f"{job} {states}", seconds)

    def until(self, condition: Callable[[], object], what: str, seconds: float = 60) -> dict[str, str]:
        """Wait until the condition holds; returns what it gave."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if held := condition():
                return held  # type: ignore[return-value]
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds:g} s: {what}\n{self.run('squeue', '--all')}")

    def evict(self, nodes: int = 16, seconds: int = 1) -> str:
        """A job in `high` that needs so many whole nodes that one in `low` has to go; returns its id."""
        command = ["sbatch", "--parsable", "--partition=high", "--exclusive", f"--nodes={nodes}"]
        return self.run(*command, "--output=/dev/null", f"--wrap=sleep {seconds}").strip()

    def start_now(self, job: str) -> None:
        """Start a requeued job at once; SLURM lets it wait for two minutes.

        Only when nothing is left of the start before: its batch script's exit, coming late, would count as the new one's.
        """
        self.wait(job, "PENDING")
        self.until(lambda: not _steps(job), f"the end of the steps of {job}")
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")

    def clear(self) -> None:
        """Cancel all jobs and wait until the nodes are idle."""
        self.run("scancel", "--quiet", "--user=root")
        self.until(lambda: not self.run("squeue", "--noheader", "--all").strip(), "an empty queue")


def _steps(job: str) -> list[str]:
    """Steps of the job that have processes on this machine, the batch script among them."""
    titles = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            titles.append(entry.read_bytes().decode(errors="replace"))
    return [title for title in titles if title.startswith(f"slurmstepd: [{job}.")]


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
            assert state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), f"{state}\n{self.log(run)}"
            return len(self.metrics(run)) >= update

        self.cluster.until(reached, f"update {update} of {run.name}", seconds=180)

    def finish(self, run: Path, job: str) -> None:
        info = self.cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=240)
        assert info["JobState"] == "COMPLETED", f"{info}\n{self.log(run)}"

    def assert_same(self, run: Path, reference: Path) -> None:
        ours, theirs = (ck.read(ck.listed(r / "checkpoints")[0]) for r in (run, reference))
        assert ours.update == theirs.update
        for name, tensor in {**theirs.weights, **theirs.moments}.items():
            assert tensor.equal({**ours.weights, **ours.moments}[name]), f"{name} differs"
        for key in ("update", "loss", "grad_norm", "tickets"):
            assert [m[key] for m in self.metrics(run)] == [m[key] for m in self.metrics(reference)], key
