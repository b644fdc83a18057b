"""What a real controller, or worse, does to a job: the kinds of interruption of `controller.py`."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tests.slurm.drill import Runs, batch_script, ranks, ranks_of_all_starts, send

EVERY = 8
"""Updates between two checkpoints."""
WAYS = ("submit.py", "train.sh")
"""How a run is submitted: `launch/submit.py`, or `sbatch slurm/train.sh`."""
NODES = 4
"""Nodes of the cluster; the run takes two of them, so that it can come back while both are missing."""


class Stage:
    """A run on the cluster, and its job."""

    LIMIT = "00:20:00"
    """Time limit of a start, as SLURM prints it."""

    def __init__(self, runs: Runs, name: str, *, way: str = WAYS[0]) -> None:
        self.runs, self.cluster, self.name = runs, runs.cluster, name
        self.way = way
        self.folder = runs.runs / name
        self.job = ""
        self.node = ""
        """The node that was struck."""
        self.options: tuple[str, ...] = ()

    def submit(self, *options: str) -> None:
        """Submit the run, or submit it again with other options: those of before count no more."""
        usual = (
            "cluster.restarts_in_place=3",
            f"checkpoint.every={EVERY}",
            "updates=20000",
            "monitor.tensorboard=false",
        )
        usual += ("cluster.time_limit=20", "cluster.max_restarts=1000", "cluster.max_stalled_restarts=1000")
        self.options = options
        submit = self.runs.submit_script if self.way == "train.sh" else self.runs.submit
        self.folder, self.job = submit(self.name, *usual, *options)

    def stop(self) -> int:
        """Let the run save and stop by the file STOP; its updates then."""
        self.runs.reach(self.folder, self.job, self.position() + 1)
        (self.folder / "STOP").touch()
        self.cluster.wait(self.job, "COMPLETED", "FAILED")
        assert self.runs.events(self.folder)[-1]["status"] == "stopped on request", self.last_words()
        return self.position()

    def position(self) -> int:
        """Updates recorded."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def resumed(self, after: int) -> int | None:
        """The update at which the newest start began, of those that the events after number `after` tell of."""
        events = self.runs.events(self.folder)[after:]
        found = [int(e["update"]) for e in events if e["event"] in ("start", "resume")]
        return found[-1] if found else None

    def nodes(self) -> list[str]:
        """The nodes of the job; the batch script and rank 0 are on the first."""
        listed = self.cluster.job(self.job)["NodeList"]
        return self.cluster.run("scontrol", "show", "hostnames", listed).split()

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.folder / "checkpoints").glob(".update-*"))

    def processes(self) -> list[int]:
        """The ranks that live, frozen ones left out: nothing ends those but their node."""
        return [pid for pid in ranks_of_all_starts(self.folder) if not _frozen(pid)]

    def seconds_until(self, moment: str | None) -> float:
        """From now to a moment as SLURM writes it; 0 for none."""
        try:
            return max(0.0, (datetime.fromisoformat(moment or "") - datetime.now()).total_seconds())
        except ValueError:
            return 0.0

    def last_words(self) -> str:
        """The ends of the logs and the last events, for whoever has to find out what went wrong."""
        events = "\n".join(map(str, self.runs.events(self.folder)[-12:]))
        job = self.cluster.run("scontrol", "show", "job", self.job) if self.job else ""
        return f"{self.runs.log(self.folder)}\n--- events\n{events}\n--- job\n{job}"


@dataclass(frozen=True)
class Blow:
    """What happens to a job.

    `may_lose`: completed updates that it may cost, and `EVERY` more when it struck while a checkpoint was being written.
    `ways`: how the job may come back, or, for one that must not, how it may end. `options`: what the run is submitted with.
    `undo`, once the run is further, takes back what outlasts the strike.
    """

    name: str
    strike: Callable[[Stage, random.Random], None]
    may_lose: int
    ways: tuple[str, ...] = ("requeued",)
    options: tuple[str, ...] = ()
    undo: Callable[[Stage], None] = lambda stage: None


def _evict(stage: Stage, chance: random.Random) -> None:
    stage.cluster.evict(nodes=NODES)


def _warn(stage: Stage, chance: random.Random) -> None:
    stage.cluster.run("scancel", "--signal=USR2", stage.job)


def _cancel(stage: Stage, chance: random.Random) -> None:
    stage.cluster.run("scancel", stage.job)


def _end_the_step(stage: Stage, chance: random.Random) -> None:
    """SIGTERM to the ranks alone, as from a node that shuts down; the job itself goes on."""
    stage.cluster.run("scancel", "--signal=TERM", f"{stage.job}.0")


def _limit(stage: Stage, chance: random.Random) -> None:
    """The controller is given another limit for the job that runs; the warning and the rest are SLURM's own."""
    stage.cluster.run("scontrol", "update", f"jobid={stage.job}", f"TimeLimit={_minutes(stage) + 2}")


def _minutes(stage: Stage) -> int:
    """Whole minutes that this start of the job has run."""
    elapsed = stage.cluster.run("squeue", "--noheader", "--format=%M", f"--jobs={stage.job}").strip().split(":")
    return int(elapsed[-2]) + 60 * (int(elapsed[-3]) if len(elapsed) > 2 else 0)


def _limit_that_is_past(stage: Stage, chance: random.Random) -> None:
    """A limit that is over already: SLURM sends its warning and SIGTERM at once, and SIGKILL comes after KillWait."""
    stage.cluster.until(lambda: _minutes(stage) >= 1, "a minute of running", seconds=90)
    stage.cluster.run("scontrol", "update", f"jobid={stage.job}", f"TimeLimit={_minutes(stage)}")


def _lose_a_node(stage: Stage, chance: random.Random) -> None:
    """slurmd, its steps and all tasks die at one blow; the controller has to find out."""
    stage.node = chance.choice(stage.nodes())
    send(stage.cluster.on_node(stage.node), signal.SIGKILL)


def _silence_a_node(stage: Stage, chance: random.Random) -> None:
    """Nothing on the node answers, and no connection closes, as when its network is gone."""
    stage.node = chance.choice(stage.nodes())
    send(stage.cluster.on_node(stage.node), signal.SIGSTOP)


def _start_slurmd(stage: Stage) -> None:
    stage.cluster.start_slurmd(stage.node)
    _wait_for_the_node(stage)


def _thaw(stage: Stage) -> None:
    """The network is there again, and with it the ranks of a start that is long over; the next start runs already."""
    left = stage.cluster.on_node(stage.node)
    send(left, signal.SIGCONT)
    _wait_for_the_node(stage)
    tasks = set(left) & set(ranks_of_all_starts(stage.folder))
    gone = "the end of the start of before"
    stage.cluster.until(lambda: not tasks & set(ranks_of_all_starts(stage.folder)), gone, seconds=90)
    # Its `srun` may end the step of the next start, which has the same name: that one must then come back once more.
    with contextlib.suppress(AssertionError):
        stage.cluster.until(
            lambda: stage.cluster.job(stage.job)["JobState"] == "PENDING", "another requeue", seconds=20
        )
        stage.cluster.start_now(stage.job)


def _wait_for_the_node(stage: Stage) -> None:
    """Until SLURM uses the node again; also one that it has drained, since a step there waited too long for its dead `srun`.

    Like an administrator, who does not wait until SLURM asks a node again that it has given up: that can take minutes.
    """
    drained = stage.cluster.run(
        "sinfo", "--noheader", "--partition=low", "--Node", "--states=drain", "--format=%N"
    ).split()
    for node in set(drained) - {stage.node}:
        stage.cluster.run("scontrol", "update", f"nodename={node}", "state=resume")

    def there() -> bool:
        state = stage.cluster.run("sinfo", "--noheader", "--partition=low", f"--nodes={stage.node}", "--format=%T")
        if state.startswith("down"):
            stage.cluster.run("scontrol", "update", f"nodename={stage.node}", "state=resume")
        return state.strip() in ("idle", "mixed", "allocated")

    stage.cluster.until(there, f"{stage.node} to come back", seconds=120)


def _kill_the_batch_script(stage: Stage, chance: random.Random) -> None:
    script = batch_script(stage.job)
    assert script is not None, "no batch script was found"
    send([script], signal.SIGKILL)


def _kill_a_rank(stage: Stage, chance: random.Random) -> None:
    send([chance.choice(list(ranks(stage.folder).values()))], signal.SIGKILL)


def _frozen(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


BLOWS = {
    blow.name: blow
    for blow in (
        Blow("time limit", _limit, 0),
        Blow("time limit that is past", _limit_that_is_past, 0),
        Blow("step ended from outside", _end_the_step, 0),
        Blow("node lost", _lose_a_node, EVERY, undo=_start_slurmd),
        Blow("node silent", _silence_a_node, EVERY, undo=_thaw),
        Blow("rank killed", _kill_a_rank, EVERY, ("in place",)),
        Blow("evicted by a higher priority", _evict, 0),
        Blow("warned (SIGUSR2)", _warn, 0),
        Blow("cancelled", _cancel, 0, ("CANCELLED",)),
        Blow("batch script killed", _kill_the_batch_script, 0),
        Blow("rank killed, no restarts in place", _kill_a_rank, EVERY, options=("cluster.restarts_in_place=0",)),
    )
}
"""All kinds by name."""
