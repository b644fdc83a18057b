"""What drills do with a running devcluster."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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


@contextlib.contextmanager
def started(nodes: int, gpus: int) -> Iterator[tuple[Cluster, Path]]:
    """A cluster of its own, and a folder that lives as long; SLURM_CONF points to it. It is stopped, whatever ends the block."""
    folder = Path(tempfile.mkdtemp(prefix="mtdc-", dir="/tmp"))
    start = [str(DEVCLUSTER / "start"), "--nodes", str(nodes), "--gpus", str(gpus), "--dir", str(folder / "slurm")]
    before = os.environ.get("SLURM_CONF")
    try:
        done = subprocess.run(start, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        configuration = done.stdout.strip().removeprefix("export SLURM_CONF=")
        os.environ["SLURM_CONF"] = configuration
        yield Cluster(folder / "slurm", configuration), folder
    finally:
        with _undisturbed():
            subprocess.run([str(DEVCLUSTER / "stop"), "--dir", str(folder / "slurm")], capture_output=True, check=False)
            shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No signal ends what is in the block: a cluster half stopped would run on."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


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

    def until(
        self, condition: Callable[[], object], what: str, seconds: float = 60, pause: float = 0.1
    ) -> dict[str, str]:
        """Wait until the condition holds; returns what it gave."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if held := condition():
                return held  # type: ignore[return-value]
            time.sleep(pause)
        raise AssertionError(f"not within {seconds:g} s: {what}\n{self.run('squeue', '--all')}")

    def evict(self, nodes: int = 16, seconds: int = 1) -> str:
        """A job in `high` that needs so many whole nodes that one in `low` has to go; returns its id."""
        command = ["sbatch", "--parsable", "--partition=high", "--exclusive", f"--nodes={nodes}"]
        return self.run(*command, "--output=/dev/null", f"--wrap=sleep {seconds}").strip()

    def preempt(self, job: str, pids: Iterable[int]) -> None:
        """Take the job's nodes away, while the processes stand still until the controller does.

        Its SIGCONT wakes them, so that the job may be back in the queue, where it has no PreemptTime, at the next look.
        """

        def begun() -> bool:
            info = self.job(job)
            return info.get("PreemptTime", "None") != "None" or info.get("Restarts") == "1"

        with frozen(pids):
            self.evict()
            self.until(begun, "the preemption")
        self.until(lambda: self.job(job).get("Restarts") == "1", "the requeue")

    def start_now(self, job: str) -> None:
        """Start a requeued job at once; SLURM lets it wait for two minutes.

        Only when nothing is left of the start before: its batch script's exit, coming late, would count as the new one's.
        """
        self.wait(job, "PENDING")
        self.until(lambda: not _steps(job), f"the end of the steps of {job}")
        time.sleep(2)  # slurmd needs a moment to forget a job; one that comes back before fails at once
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")

    def on_node(self, node: str) -> list[int]:
        """Every process of a virtual node: its slurmd, the steps, then the tasks and all they started."""
        table = _processes()
        ours = {p for p, found in table.items() if f"SLURM_CONF={self.configuration}" in found.environment}
        tasks = [p for p in ours if f"SLURMD_NODENAME={node}" in table[p].environment]
        parents = {table[p].parent for p in tasks} - set(tasks)
        steps = [p for p in parents if p in table and table[p].title.startswith("slurmstepd")]
        daemon = [p for p in ours if table[p].title.startswith("slurmd ") and table[p].title.endswith(f"-N {node}")]
        return [*daemon, *steps, *tasks]

    def start_slurmd(self, node: str) -> None:
        """Start the daemon of a virtual node again."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        environment |= {"SLURM_CONF": self.configuration, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        command = ["slurmd", "-f", self.configuration, "-N", node]
        with open(self.folder / "start.log", "a") as log:  # a daemon keeps what it inherits open
            subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)

    def clear(self) -> None:
        """Cancel all jobs and wait until the nodes are idle."""
        self.run("scancel", "--quiet", "--user=root")
        self.until(lambda: not self.run("squeue", "--noheader", "--all").strip(), "an empty queue")


@dataclass(frozen=True)
class Process:
    """A process as /proc shows it; `title` is its command line with blanks."""

    state: str
    parent: int
    title: str
    environment: frozenset[str]


def _processes() -> dict[int, Process]:
    """All living processes of this machine by id."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            title, environment = (
                (entry / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ")
            )
            if state != "Z":
                words = frozenset(environment.split("\0"))
                found[int(entry.name)] = Process(state, int(parent), title.replace("\0", " ").strip(), words)
    return found


def _steps(job: str) -> list[str]:
    """Steps of the job that have processes on this machine, the batch script among them; frozen ones left out."""
    living = (p for p in _processes().values() if p.state != "T")
    return [p.title for p in living if p.title.startswith(f"slurmstepd: [{job}.")]


def ranks(run: Path) -> dict[int, int]:
    """Process ids of the ranks of a run, by rank."""
    numbers = {
        pid: next(w[5:] for w in found.environment if w.startswith("RANK=")) for pid, found in _ranks(run).items()
    }
    return {int(number): pid for pid, number in sorted(numbers.items(), key=lambda pair: int(pair[1]))}


def ranks_of_all_starts(run: Path) -> list[int]:
    """The same, where those of an earlier start may still live."""
    return sorted(_ranks(run))


def _ranks(run: Path) -> dict[int, Process]:
    """Ranks of a run; neither their supervisors, nor loader workers, which have the title of the rank they come from."""
    table = _processes()
    training = {pid for pid, found in table.items() if f"-m multitrain.train {run}" in found.title}
    ranks = {pid for pid in training if "launch.supervisor" not in table[pid].title}
    return {pid: table[pid] for pid in ranks if table[pid].parent not in ranks}


def batch_script(job: str) -> int | None:
    """Process id of the job's batch script, if it lives."""
    for pid, found in _processes().items():
        if f"/job{int(job):05d}/slurm_script" in found.title:
            return pid
    return None


def scorers(out: Path) -> list[int]:
    """Process ids of the ranks of an evaluation, by the folder of its results; the processes they fork among them."""
    return [pid for pid, found in _processes().items() if f" --out {out}" in found.title and " -m " in found.title]


@contextlib.contextmanager
def frozen(pids: Iterable[int]) -> Iterator[None]:
    """The processes stand still in the block: what SLURM takes its time for finds them where they were, on a quick machine too."""
    pids = list(pids)
    send(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        send(pids, signal.SIGCONT)


def send(pids: Iterable[int], number: int) -> None:
    """A signal to processes, as far as they live."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.Signals(number))


UPDATES = 20
"""Of a tiny run: two seconds, so that it is not over before a drill sees its first updates and freezes it."""


class Runs:
    """Submits tiny runs as a user does, and reads what they leave."""

    def __init__(self, cluster: Cluster, runs: Path, data: Path) -> None:
        self.cluster, self.runs, self.data = cluster, runs, data

    def submit(self, name: str, *overrides: str) -> tuple[Path, str]:
        """The run's folder and job id."""
        done = self.ask(name, "cluster.partition=low", "nodes=2", "gpus=1", *overrides)
        assert done.returncode == 0, done.stderr
        return self.runs / name, done.stdout.split()[1]

    def ask(self, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        """What `launch/submit.py` says to it; an existing run is named, as a user does, with what changes."""
        command = [sys.executable, "launch/submit.py"]
        if (self.runs / name / "config.yaml").is_file():
            command += [name]
        else:
            command += ["--config-dir", "tests/configs", "experiment=tiny", f"name={name}", *_long(overrides)]
        command += [f"runs={self.runs}", *overrides]
        return subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False)

    def submit_script(self, name: str, *overrides: str) -> tuple[Path, str]:
        """The same through `sbatch slurm/train.sh`, for people who say sbatch."""
        command = ["sbatch", "--parsable", "--partition=low", "--nodes=2", "--ntasks-per-node=1", "--gres=gpu:1"]
        command += ["--cpus-per-task=1", "--time=20", "--signal=USR2@30", f"--output={self.runs}/%j.out"]
        command += ["slurm/train.sh", "--config-dir", "tests/configs", "experiment=tiny", f"name={name}"]
        self.runs.mkdir(parents=True, exist_ok=True)
        command += [f"runs={self.runs}", *_long(overrides), *overrides]
        done = subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return self.runs / name, done.stdout.strip()

    @property
    def _environment(self) -> dict[str, str]:
        return os.environ | {"TINY_DATA": str(self.data), "MULTITRAIN_PYTHON": sys.executable}

    def metrics(self, run: Path) -> list[dict[str, Any]]:
        path = run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def events(self, run: Path) -> list[dict[str, Any]]:
        path = run / "events.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def log(self, run: Path) -> str:
        """The ends of all logs of a run; also what `train.sh` said."""
        files = [*sorted(run.glob("logs/*.log")), *sorted(self.runs.glob("*.out"))]
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in files)

    def reach(self, run: Path, job: str, update: int, seconds: float = 180) -> None:
        """Wait until `update` updates are recorded."""

        def reached() -> bool:
            state = self.cluster.job(job)["JobState"]
            assert state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), f"{state}\n{self.log(run)}"
            return len(self.metrics(run)) >= update

        self.cluster.until(reached, f"update {update} of {run.name}", seconds=seconds)

    def finish(self, run: Path, job: str) -> None:
        info = self.cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=240)
        assert info["JobState"] == "COMPLETED", f"{info}\n{self.log(run)}"

    def assert_same(self, run: Path, reference: Path, update: int | None = None) -> None:
        """Both runs have the same numbers, weights and moments, every bit, after `update` updates, or at their ends."""
        end = update or len(self.metrics(reference))
        ours, theirs = (ck.read(ck.folder_of(r / "checkpoints", end)) for r in (run, reference))
        for name, tensor in {**theirs.weights, **theirs.moments}.items():
            assert tensor.equal({**ours.weights, **ours.moments}[name]), f"{name} differs"
        for key in ("update", "loss", "grad_norm", "tickets"):
            a, b = ([m[key] for m in self.metrics(r)][:update] for r in (run, reference))
            assert a == b, key


def _long(overrides: tuple[str, ...]) -> list[str]:
    """The length of a run, unless it is chosen."""
    return [] if any(o.startswith(("updates=", "epochs=")) for o in overrides) else [f"updates={UPDATES}"]
