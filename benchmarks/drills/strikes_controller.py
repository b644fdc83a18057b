"""Faults that are injected into a SLURM job on a real controller, for the kinds of :mod:`benchmarks.drills.kinds`."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from tests.slurm.drill import (
    Runs,
    batch_script,
    copied_checkout,
    frozen,
    looking,
    ranks,
    ranks_of_all_starts,
    send,
    supervisors,
)

EVERY = 8
"""Updates between two checkpoints."""
WAYS = ("submit.py", "train.sh")
"""How a run is submitted: `launch/submit.py`, or `sbatch slurm/train.sh`."""
HANG_LIMIT = 40
"""Seconds without progress after which a rank counts as hung."""
NODES = 4
"""Nodes of the cluster; a run on two of them can restart while both are down."""


class JobUnderTest:
    """A run on the cluster and its job."""

    LIMIT = "00:20:00"
    """Time limit of a start, as SLURM prints it."""

    def __init__(self, runs: Runs, name: str, *, way: str = WAYS[0], shape: tuple[int, int] = (2, 1)) -> None:
        self.runs, self.cluster, self.name = runs, runs.cluster, name
        self.way = way
        self.shape = shape
        """Nodes, and ranks per node."""
        self.checkout = runs.runs.parent / "checkout"
        """The checkout from which the run is submitted; some faults edit it."""
        self.folder = runs.runs / name
        self.job = ""
        self.node = ""
        """The node on which the fault was injected."""
        self.options: tuple[str, ...] = ()

    def submit(self, *options: str) -> None:
        """Submit the run, or submit it again with other options, which replace the earlier ones."""
        usual = (
            "cluster.restarts_in_place=3",
            f"checkpoint.every={EVERY}",
            "updates=20000",
            "monitor.tensorboard=false",
        )
        usual += ("cluster.time_limit=20", "cluster.max_restarts=1000", "cluster.max_stalled_restarts=1000")
        usual += (f"engine.hang_limit={HANG_LIMIT}",)
        nodes, ranks = self.shape
        usual += ("micro_batch=1",) if nodes * ranks > 4 else ()
        self.options = options
        if not self.checkout.exists():
            copied_checkout(self.checkout)
        submit = self.runs.submit_script if self.way == "train.sh" else self.runs.submit
        self.folder, self.job = submit(self.name, *usual, *options, checkout=self.checkout, nodes=nodes, gpus=ranks)

    def stop(self) -> int:
        """Stop the run with the file STOP; return its number of updates."""
        self.runs.reach(self.folder, self.job, self.position() + 1)
        (self.folder / "STOP").touch()
        self.cluster.wait(self.job, "COMPLETED", "FAILED")
        assert self.runs.events(self.folder)[-1]["status"] == "stopped on request", self.last_words()
        return self.position()

    def position(self) -> int:
        """Number of updates in metrics.jsonl."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def resumed(self, after: int) -> int | None:
        """The update at which the newest start began, according to the events after the first `after`; None if there is none."""
        events = self.runs.events(self.folder)[after:]
        found = [int(e["update"]) for e in events if e["event"] in ("start", "resume")]
        return found[-1] if found else None

    def nodes(self) -> list[str]:
        """Nodes of the job; the batch script and rank 0 run on the first."""
        listed = self.cluster.job(self.job)["NodeList"]
        return self.cluster.run("scontrol", "show", "hostnames", listed).split()

    def step(self) -> str:
        """The job's newest step, which runs the ranks; a preflight has its own step before it."""
        steps = self.cluster.run("squeue", "--steps", "--noheader", "--format=%i", f"--jobs={self.job}").split()
        return max((s for s in steps if s.rpartition(".")[2].isdigit()), key=lambda s: int(s.rpartition(".")[2]))

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.folder / "checkpoints").glob(".update-*"))

    def processes(self) -> list[int]:
        """Process ids of the running ranks, without frozen ones, which only their node ends."""
        return [pid for pid in ranks_of_all_starts(self.folder) if not is_frozen(pid)]

    def seconds_until(self, moment: str | None) -> float:
        """Seconds from now to a time in SLURM's format; 0 if there is none."""
        try:
            return max(0.0, (datetime.fromisoformat(moment or "") - datetime.now()).total_seconds())
        except ValueError:
            return 0.0

    def last_words(self) -> str:
        """The ends of the logs, the last events and the job, for diagnosis."""
        events = "\n".join(map(str, self.runs.events(self.folder)[-12:]))
        job = self.cluster.run("scontrol", "show", "job", self.job) if self.job else ""
        return f"{self.runs.log(self.folder)}\n--- events\n{events}\n--- job\n{job}"


def evict(target: JobUnderTest, chance: random.Random) -> None:
    target.cluster.evict(nodes=NODES)


def warn(target: JobUnderTest, chance: random.Random) -> None:
    target.cluster.run("scancel", "--signal=USR2", target.job)


def cancel(target: JobUnderTest, chance: random.Random) -> None:
    target.cluster.run("scancel", target.job)


def end_the_step(target: JobUnderTest, chance: random.Random) -> None:
    """Send SIGTERM to the ranks only, like a node that shuts down; the job itself continues."""
    target.cluster.run("scancel", "--signal=TERM", target.step())


def limit(target: JobUnderTest, chance: random.Random) -> None:
    """Shorten the running job's time limit, so that SLURM warns and ends it."""
    target.cluster.run("scontrol", "update", f"jobid={target.job}", f"TimeLimit={minutes(target) + 2}")


def minutes(target: JobUnderTest) -> int:
    """Full minutes for which this start of the job has run."""
    elapsed = target.cluster.run("squeue", "--noheader", "--format=%M", f"--jobs={target.job}").strip().split(":")
    return int(elapsed[-2]) + 60 * (int(elapsed[-3]) if len(elapsed) > 2 else 0)


def limit_that_is_past(target: JobUnderTest, chance: random.Random) -> None:
    """Set a time limit that has passed: SLURM sends the warning and SIGTERM at once, and SIGKILL after KillWait."""
    target.cluster.until(lambda: minutes(target) >= 1, "a minute of running", seconds=90)
    target.cluster.run("scontrol", "update", f"jobid={target.job}", f"TimeLimit={minutes(target)}")


def lose_a_node(target: JobUnderTest, chance: random.Random) -> None:
    """Kill slurmd, its steps and all tasks of a node at once; the controller only notices by its time-outs."""
    target.node = chance.choice(target.nodes())
    send(target.cluster.on_node(target.node), signal.SIGKILL)


def silence_a_node(target: JobUnderTest, chance: random.Random) -> None:
    """Freeze all processes of a node: nothing answers and no connection closes, as if its network had failed."""
    target.node = chance.choice(target.nodes())
    send(target.cluster.on_node(target.node), signal.SIGSTOP)


def start_slurmd(target: JobUnderTest) -> None:
    target.cluster.start_slurmd(target.node)
    wait_for_the_node(target)


def thaw(target: JobUnderTest) -> None:
    """Thaw the node: the ranks of the earlier start continue while the next start already runs."""
    left = target.cluster.on_node(target.node)
    send(left, signal.SIGCONT)
    wait_for_the_node(target)
    tasks = set(left) & set(ranks_of_all_starts(target.folder))
    gone = "the end of the start of before"
    target.cluster.until(lambda: not tasks & set(ranks_of_all_starts(target.folder)), gone, seconds=90)
    # Its `srun` may end the step of the next start, which has the same name: that one must then come back once more.
    with contextlib.suppress(AssertionError):
        target.cluster.until(
            lambda: target.cluster.job(target.job)["JobState"] == "PENDING", "another requeue", seconds=20
        )
        target.cluster.start_now(target.job)


def wait_for_the_node(target: JobUnderTest) -> None:
    """Wait until SLURM uses the node again, and resume it if SLURM drained it (a step waited too long for its dead `srun`).

    SLURM itself may take minutes before it contacts a node again that it has marked as down.
    """
    drained = target.cluster.run(
        "sinfo", "--noheader", "--partition=low", "--Node", "--states=drain", "--format=%N"
    ).split()
    for node in set(drained) - {target.node}:
        target.cluster.run("scontrol", "update", f"nodename={node}", "state=resume")

    def there() -> bool:
        state = target.cluster.run("sinfo", "--noheader", "--partition=low", f"--nodes={target.node}", "--format=%T")
        if state.startswith("down"):
            target.cluster.run("scontrol", "update", f"nodename={target.node}", "state=resume")
        return state.strip() in ("idle", "mixed", "allocated")

    target.cluster.until(there, f"{target.node} to come back", seconds=120)


def kill_the_batch_script(target: JobUnderTest, chance: random.Random) -> None:
    script = batch_script(target.job)
    assert script is not None, "no batch script was found"
    send([script], signal.SIGKILL)


def kill_a_rank(target: JobUnderTest, chance: random.Random) -> None:
    send([chance.choice(list(ranks(target.folder).values()))], signal.SIGKILL)


def is_frozen(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def signal_job(*arguments: str) -> Callable[[JobUnderTest, random.Random], None]:
    """A fault that runs ``scancel`` with these arguments on the job."""
    return lambda target, chance: target.cluster.run("scancel", *arguments, target.job) and None


def cancel_the_step(target: JobUnderTest, chance: random.Random) -> None:
    """`scancel JOB.STEP`: the ranks are killed, the job continues."""
    target.cluster.run("scancel", target.step())


def evict_without_grace(target: JobUnderTest, chance: random.Random) -> None:
    """Preempt the job in a partition with GraceTime=0."""
    target.cluster.run("scontrol", "update", "partitionname=low", "GraceTime=0")
    target.cluster.evict(nodes=NODES)


def grace_again(target: JobUnderTest) -> None:
    """Restore the partition's grace time."""
    target.cluster.run("scontrol", "update", "partitionname=low", "GraceTime=15")


def edit_the_checkout(target: JobUnderTest, chance: random.Random) -> None:
    """Edit, damage or delete the checkout while the job waits in the queue."""
    _evict_and_wait(target)
    yaml = target.checkout / "tests" / "configs" / "experiment" / "tiny.yaml"
    way = chance.choice(("edited", "half", "deleted"))
    if way == "edited":
        yaml.write_text(yaml.read_text().replace("1.0e-3", "9.0e-3"))
    elif way == "half":
        for name in ("launch/submit.py", "launch/__init__.py", "multitrain/cluster/slurm.py", "slurm/train.sh"):
            (target.checkout / name).write_text("<<<<<<< a merge that is not finished\n")
    else:
        shutil.rmtree(target.checkout)


def restore_the_checkout(target: JobUnderTest) -> None:
    """Restore the checkout for the next submission."""
    copied_checkout(target.checkout)


def start_a_twin(target: JobUnderTest, chance: random.Random) -> None:
    """Submit the run once more while it runs, which must be refused."""
    done = target.runs.ask(target.name, *chance.choice(((), ("cluster=local", "nodes=1"))))
    assert done.returncode == 2, f"a second start was not refused: {done.stdout}{done.stderr}"
    assert f"job {target.job}" in done.stderr, done.stderr


def take_the_controller_away(target: JobUnderTest, chance: random.Random) -> None:
    """Stop slurmctld for a while, as for an upgrade, and kill a supervisor meanwhile."""
    victim = chance.choice(list(supervisors(target.folder).values()))
    with target.cluster.controller_away():
        send([victim], signal.SIGKILL)
        time.sleep(chance.uniform(5, 25))


def freeze_until_the_limit(target: JobUnderTest, chance: random.Random) -> None:
    """Freeze a rank, or all processes of its node, when the time limit is reached."""
    number, rank = chance.choice(list(ranks(target.folder).items()))
    send([rank, *([supervisors(target.folder)[number]] if chance.random() < 0.5 else [])], signal.SIGSTOP)
    target.cluster.ends_in(target.job, chance.uniform(1, 20))


def end_what_stands_still(target: JobUnderTest) -> None:
    """Kill the frozen processes, which no other signal ends."""
    send([pid for pid in ranks_of_all_starts(target.folder) if is_frozen(pid)], signal.SIGKILL)


def suspend(target: JobUnderTest, chance: random.Random) -> None:
    """`scontrol suspend` for longer than the hang limit."""
    target.cluster.run("scontrol", "suspend", target.job)
    time.sleep(HANG_LIMIT + 5)
    target.cluster.run("scontrol", "resume", target.job)


def purge(target: JobUnderTest, chance: random.Random) -> None:
    """Remove the checkpoints for one start, which must not train, and restore them for the next."""
    _one_start_without(target, target.folder / "checkpoints")


def lose_the_mount(target: JobUnderTest, chance: random.Random) -> None:
    """Remove the videos for one start."""
    _one_start_without(target, target.runs.data)


def _one_start_without(target: JobUnderTest, path: Path) -> None:
    restarts = _evict_and_wait(target)
    away = path.rename(path.with_name("away"))
    before = target.position()
    target.cluster.start_now(target.job)
    target.cluster.until(lambda: _restarts(target) > restarts, f"the end of a start without {path}", seconds=180)
    assert target.position() == before, f"it has trained without {path}"
    away.rename(path)


def preempt_preflight(target: JobUnderTest, chance: random.Random) -> None:
    """Preempt the job twice: while it trains, and during the preflight of the next start."""
    restarts = _evict_and_wait(target)
    target.cluster.start_now(target.job)
    found: list[int] = []

    def looks() -> bool:
        found[:] = looking(target.folder)
        return bool(found)

    target.cluster.until(looks, "preflight", pause=0.01)
    with frozen(found):
        target.cluster.evict(nodes=NODES)
        target.cluster.until(
            lambda: target.cluster.job(target.job).get("PreemptTime", "None") != "None" or _restarts(target) > restarts,
            "the preemption of preflight",
        )
    target.cluster.until(
        lambda: _restarts(target) > restarts, "the requeue"
    )  # it may train until its grace time is over


def _restarts(target: JobUnderTest) -> int:
    return int(target.cluster.job(target.job).get("Restarts", "0"))


def _evict_and_wait(target: JobUnderTest) -> int:
    """Preempt the job until it is requeued; return its number of restarts."""
    before = _restarts(target)
    job = target.cluster.job
    target.cluster.evict(nodes=NODES)
    target.cluster.until(
        lambda: job(target.job)["JobState"] == "PENDING" and _restarts(target) > before, "the requeue", seconds=120
    )
    return _restarts(target)
