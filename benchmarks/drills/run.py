"""A tiny run of real processes for the drills: start it with the user's own command, observe it and interrupt it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multitrain.engine import checkpoint as ck

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 40
"""Updates of a run."""
EVERY = 4
"""Updates between two checkpoints: the most that a hard kill may lose."""
VALIDATED = 10
"""Updates between two validations."""
HANG_LIMIT = 30
"""Seconds without progress after which a rank counts as hung."""
PATIENCE = 180.0
"""Seconds after which a run that neither ends nor makes progress counts as hung."""


class RunHung(RuntimeError):
    """The run did not reach the expected state in time."""


def newest_update(run: Path) -> int:
    """Updates of the newest complete checkpoint of a run; 0 without one."""
    whole = (f for f in ck.listed(run / "checkpoints") if ck.verify(f) is None)
    return next((int(f.name.split("-")[1]) for f in whole), 0)


class TinyRun:
    """A run in `runs`/`name` on this machine, through ``launch/submit.py … cluster=local``.

    Args:
        runs: folder of runs, which may be a small disk of its own.
        name: of the run.
        data: the folder that `tests.support.write_dataset` has filled.
        overrides: what is typed at the first submission.
    """

    def __init__(self, runs: Path, name: str, data: Path, overrides: dict[str, Any]) -> None:
        self.runs, self.name, self.data = runs, name, data
        self.folder = runs / name
        self.overrides = overrides
        self.world = 0
        self.launcher: subprocess.Popen[bytes] | None = None
        self.said = runs / f"{name}.terminal"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self._environment = inherited | {
            "TINY_DATA": str(data),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(Path(__file__).parent / "inside"),
        }

    # ------------------------------------------------------------------------------------------------ what it does

    def start(self, world: int, **changes: Any) -> None:
        """Submit the run, or submit it again, on `world` ranks."""
        self.world = world
        words = {"runs": self.runs, "gpus": world, **changes}
        command = [sys.executable, "launch/submit.py"]
        if (self.folder / "config.yaml").is_file():
            command.append(self.name)
        else:
            command += ["--config-dir", "tests/configs", "experiment=tiny", f"name={self.name}", "cluster=local"]
            words |= {"updates": UPDATES, "checkpoint.every": EVERY, "eval.every": VALIDATED}
            words |= {"monitor.tensorboard": "false", "cluster.check_data": "false", "engine.hang_limit": HANG_LIMIT}
            words |= {"augment.copies": 1, "model.crop": 32, "effective_batch": 8, "cluster.max_stalled_restarts": 50}
            words |= self.overrides
        command += [f"{key}={value}" for key, value in words.items()]
        self._started = time.monotonic()
        self._starts = self.count("start", "resume")
        with open(self.said, "ab") as out:
            self.launcher = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def submit_again(self, **changes: Any) -> subprocess.CompletedProcess[str]:
        """Submit the run once more, even while it runs, and wait for the end of the command."""
        words = [f"{key}={value}" for key, value in {"runs": self.runs, **changes}.items()]
        command = [sys.executable, "launch/submit.py", self.name, *words]
        return subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    def end(self) -> None:
        """Kill all its remaining processes."""
        for pid in [self.launcher.pid] if self.launcher and self.launcher.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        if self.launcher:
            self.launcher.wait()
        self.until(lambda: not self.ranks(), "the end of its ranks", 20)

    # --------------------------------------------------------------------------------------------- what is seen of it

    @property
    def running(self) -> bool:
        """Whether the launcher runs."""
        return self.launcher is not None and self.launcher.poll() is None

    def code(self) -> int | None:
        """Exit code of the launcher; None while it runs."""
        return self.launcher.poll() if self.launcher else None

    def position(self) -> int:
        """Updates recorded, each once."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def records(self, file: str) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl` or `events.jsonl`, without a torn last line."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / file).read_text().split("\n")[:-1]
            return [json.loads(line) for line in lines if line.strip()]
        return []

    def count(self, *events: str) -> int:
        """Number of these events that the run has written."""
        return sum(e["event"] in events for e in self.records("events.jsonl"))

    def resumed_at(self) -> int:
        """The update at which the newest start began."""
        starts = [e for e in self.records("events.jsonl") if e["event"] in ("start", "resume")]
        return int(starts[-1]["update"])

    def newest(self) -> int:
        """Updates of the newest complete checkpoint, found from outside; 0 without one."""
        return newest_update(self.folder)

    def failed_saves(self) -> int:
        """Number of consecutive periodic saves up to the last one that failed."""
        saves = [e["event"] for e in self.records("events.jsonl") if e["event"].startswith("checkpoint")]
        count = 0
        while saves and saves.pop() == "checkpoint_failed":
            count += 1
        return count

    @property
    def began(self) -> bool:
        """Whether the newest start has written its `begin` event."""
        return self.count("start", "resume") > self._starts

    def saving(self) -> bool:
        """Whether a checkpoint is being written right now."""
        with contextlib.suppress(FileNotFoundError):
            return any(name.startswith(".update-") for name in os.listdir(self.folder / "checkpoints"))
        return False

    def phase(self) -> str:
        """The current phase of the run: starting, saving, evaluating or updating."""
        if not self.began:
            return "starting"
        if self.saving():
            return "saving"
        last = self.records("events.jsonl")[-1]
        due = (position := self.position()) > 0 and (position % VALIDATED == 0 or position == UPDATES)
        done = any(e["event"] == "validation" and e["update"] == position for e in self.records("events.jsonl")[-4:])
        return "evaluating" if due and not done and last["event"] != "end" else "updating"

    def ranks(self) -> dict[int, int]:
        """Process ids of the running ranks, by rank."""
        found: dict[int, tuple[int, int]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"multitrain.train" in words and str(self.folder).encode() in words:
                    environment = (entry / "environ").read_bytes().split(b"\0")
                    place = [v for v in environment if v.startswith(b"RANK=")]
                    state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                    if place and state != "Z":
                        found[int(entry.name)] = int(place[0][5:]), int(parent)
        own = {
            rank: pid for pid, (rank, parent) in found.items() if parent not in found
        }  # else a child not yet its own
        return dict(sorted(own.items()))

    def workers(self, rank: int) -> list[int]:
        """Process ids of all child processes of a rank: first the fork server, then the loader's workers.

        Not of a child between fork and exec: frozen there, it would hold its parent for ever, which no stalled loader does.
        """
        parents: dict[int, int] = {}
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        found: list[int] = []
        new = [rank]
        while new := [pid for pid, parent in parents.items() if parent in new and _command(pid) != _command(rank)]:
            found += new
        return found

    # ---------------------------------------------------------------------------------------------------- waiting for it

    def until(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE, pause: float = 0.01) -> None:
        """Wait until the condition holds.

        Raises:
            Hung: it did not, in time.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise RunHung(f"{self.name}: not within {seconds:g} s: {what}")
            time.sleep(pause)

    def reach(self, update: int) -> bool:
        """Wait until `update` updates are recorded; False if the run ended before."""
        self.until(lambda: self.position() >= update or not self.running, f"update {update}")
        return self.running


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


# ------------------------------------------------------------------------------------------------------- comparing runs

EXACT = ("update", "loss", "grad_norm", "tickets", "lr", "loss_informative")
"""Fields of `metrics.jsonl` that must be bit-equal at a constant world size."""
LOSS_TOLERANCE = 1e-3
"""Largest relative difference of an update's loss from the uninterrupted run's when the world size changed."""
MIXED_TOLERANCE = 0.05
"""Like `LOSS_TOLERANCE`, if the precision changed as well."""


def differences(
    run: TinyRun, reference: TinyRun, *, exact: bool, tolerance: float = LOSS_TOLERANCE
) -> tuple[list[str], float]:
    """Differences of a finished run from the uninterrupted one, and the largest relative difference of a loss."""
    ours, theirs = run.records("metrics.jsonl"), reference.records("metrics.jsonl")
    found = []
    if [m["update"] for m in ours] != list(range(UPDATES)):
        return [f"updates recorded: {[m['update'] for m in ours]}"], float("inf")
    if [m["tickets"] for m in ours] != [m["tickets"] for m in theirs]:
        found.append("samples differ")
    worst = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs))
    if exact:
        found += [key for key in EXACT if [m[key] for m in ours] != [m[key] for m in theirs]]
        a, b = (ck.read(ck.folder_of(r.folder / "checkpoints", UPDATES)) for r in (run, reference))
        names = {**b.weights, **b.moments}
        changed = [n for n in names if not names[n].equal({**a.weights, **a.moments}[n])]
        found += [f"{len(changed)} of {len(names)} tensors differ, first {changed[0]}"] if changed else []
    elif worst > tolerance:
        found.append(f"a loss differs by {worst:.2g} relative")
    return found, worst


def write_data(folder: Path) -> Path:
    """Write three small datasets of real video files."""
    from tests.support import write_dataset

    for seed, (name, videos, classes) in enumerate([("stride", 14, 5), ("segment", 10, 3), ("with.dot", 8, 4)]):
        write_dataset(folder / name, videos, classes, seed)
    return folder


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "24m") -> Any:
    """Mount a separate file system of `size` at `folder`, if mounting is allowed; yields whether it is mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = (
        os.geteuid() == 0
        and shutil.which("mount") is not None
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "drill", str(folder)], capture_output=True, check=False
        ).returncode
        == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)
