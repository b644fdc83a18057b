"""What drills do with a running devcluster."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

DEVCLUSTER = Path(__file__).resolve().parents[2] / "slurm" / "devcluster"


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
