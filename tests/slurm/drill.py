"""What drills do with a running devcluster."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from multitrain.engine import checkpoint as ck

ROOT = Path(__file__).resolve().parents[2]
DEVCLUSTER = ROOT / "slurm" / "devcluster"
LIMIT = 800.0  # seconds: what has not come by then never will; below the time limit of a test


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
        done = subprocess.run(start, capture_output=True, text=True, timeout=LIMIT, check=False)
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
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: exit status {done.returncode}, {done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol` says of a job; asked again where a busy controller does not answer."""
        for pause in (1, 2, 4, 8):
            with contextlib.suppress(AssertionError):
                return self._job(job)
            time.sleep(pause)
        return self._job(job)

    def _job(self, job: str) -> dict[str, str]:
        fields = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, *states: str, seconds: float = LIMIT) -> dict[str, str]:
        """Wait until the job is in one of the states."""
        return self.until(lambda: (info := self.job(job))["JobState"] in states and info, f"{job} {states}", seconds)

    def until(
        self, condition: Callable[[], object], what: str, seconds: float = LIMIT, pause: float = 0.1
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

        def restarts() -> int:
            return int(self.job(job).get("Restarts", "0"))

        before = restarts()
        with frozen(pids):
            self.evict()
            self.until(
                lambda: self.job(job).get("PreemptTime", "None") != "None" or restarts() > before, "the preemption"
            )
        self.until(lambda: restarts() > before, "the requeue")

    def start_now(self, job: str) -> None:
        """Start a requeued job at once; SLURM lets it wait for two minutes.

        Only when nothing is left of the start before: its batch script's exit, coming late, would count as the new one's.
        """
        self.wait(job, "PENDING")
        self.until(lambda: not self._steps(job), f"the end of the steps of {job}")
        time.sleep(2)  # slurmd needs a moment to forget a job; one that comes back before fails at once
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")

    def _steps(self, job: str) -> list[str]:
        """Steps of the job that have processes on this machine, the batch script among them; frozen ones left out."""
        ours = (p for p in _processes().values() if f"SLURM_CONF={self.configuration}" in p.environment)
        return [p.title for p in ours if p.title.startswith(f"slurmstepd: [{job}.") and p.state != "T"]

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
        self._start_daemon("slurmd", "-f", self.configuration, "-N", node)

    def _start_daemon(self, *command: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        environment |= {"SLURM_CONF": self.configuration, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        with open(self.folder / "start.log", "a") as log:  # a daemon keeps what it inherits open
            subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)

    def ends_in(self, job: str, seconds: float) -> None:
        """Give the job that runs so many seconds more; its warning and its end are SLURM's own (which looks every 30 s)."""
        moment = (datetime.now() + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")
        self.run("scontrol", "update", f"jobid={job}", f"EndTime={moment}")

    @contextlib.contextmanager
    def controller_away(self) -> Iterator[None]:
        """No slurmctld in the block, as while it is upgraded; it knows its jobs again after that."""
        gone = [p for p, found in _processes().items() if self._is_controller(found)]
        send(gone, signal.SIGTERM)
        self._wait_for(lambda: not any(self._is_controller(found) for found in _processes().values()), "its end")
        try:
            yield
        finally:
            self._start_daemon("slurmctld", "-f", self.configuration)
            answers = ("scontrol", "ping")
            self._wait_for(
                lambda: " UP" in subprocess.run(answers, capture_output=True, text=True, check=False).stdout,
                "an answer",
            )

    @contextlib.contextmanager
    def not_mounted(self, node: str, folder: Path) -> Iterator[None]:
        """In the block, `folder` is empty for what the node starts, as where its file system is not mounted."""
        slurmd = ["slurmd", "-f", self.configuration, "-N", node]
        mount = f"mount -t tmpfs none {shlex.quote(str(folder))} && exec {shlex.join(slurmd)}"
        self._end_slurmd(slurmd)
        try:
            self._start_daemon("unshare", "--mount", "bash", "-c", mount)
            yield
        finally:
            self._end_slurmd(slurmd)
            self._start_daemon(*slurmd)

    def _end_slurmd(self, slurmd: list[str]) -> None:
        send([p for p, found in _processes().items() if found.title == " ".join(slurmd)], signal.SIGTERM)
        self._wait_for(lambda: all(p.title != " ".join(slurmd) for p in _processes().values()), "its end")

    def _is_controller(self, found: Process) -> bool:
        return found.title.startswith("slurmctld") and f" {self.configuration}" in found.title

    def _wait_for(self, condition: Callable[[], bool], what: str, seconds: float = LIMIT) -> None:
        """As :meth:`until`, where the controller may not answer."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.1)

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


def supervisors(run: Path) -> dict[int, int]:
    """Process ids of the supervisors of the ranks of a run, by rank."""
    table = _processes()
    found = {p: f for p, f in table.items() if f" -m launch.supervisor {run} " in f.title}
    return {
        int(next(w.partition("=")[2] for w in f.environment if w.startswith("SLURM_PROCID="))): p
        for p, f in found.items()
        if table.get(f.parent) is None or f.parent not in found
    }


def looking(run: Path) -> list[int]:
    """Process ids of the ranks of preflight before a run; not of the `srun` that starts them."""
    wanted = f" -m launch.preflight --dir {run}"
    return [p for p, found in _processes().items() if wanted in found.title and not found.title.startswith("srun ")]


def batch_script(job: str) -> int | None:
    """Process id of the job's batch script, if it lives; that of `slurm/train.sh` goes on as the run's own `job.sh`."""
    for pid, found in sorted(_processes().items()):
        own = f"SLURM_JOB_ID={job}" in found.environment and found.title.endswith("/job.sh")
        if own or f"/job{int(job):05d}/slurm_script" in found.title:
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
            os.kill(pid, number)


UPDATES = 20
"""Of a tiny run: two seconds, so that it is not over before a drill sees its first updates and freezes it."""


class Runs:
    """Submits tiny runs as a user does, and reads what they leave."""

    def __init__(self, cluster: Cluster, runs: Path, data: Path) -> None:
        self.cluster, self.runs, self.data = cluster, runs, data

    def submit(
        self, name: str, *overrides: str, checkout: Path = ROOT, nodes: int = 2, gpus: int = 1
    ) -> tuple[Path, str]:
        """The run's folder and job id."""
        shape = (f"nodes={nodes}", f"gpus={gpus}")
        done = self.ask(name, "cluster.partition=low", *shape, *overrides, checkout=checkout)
        assert done.returncode == 0, done.stderr
        return self.runs / name, done.stdout.split()[1]

    def ask(self, name: str, *overrides: str, checkout: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """What `launch/submit.py` says to it; an existing run is named, as a user does, with what changes."""
        if (self.runs / name / "config.yaml").is_file():
            command = [sys.executable, "launch/submit.py", name, f"runs={self.runs}", *overrides]
        else:
            command = self.command(name, *overrides)
        return subprocess.run(command, cwd=checkout, env=self._environment, capture_output=True, text=True, check=False)

    def command(self, name: str, *overrides: str) -> list[str]:
        """The command line of a first submission."""
        command = [sys.executable, "launch/submit.py", "--config-dir", "tests/configs", "experiment=tiny"]
        return [*command, f"name={name}", f"runs={self.runs}", *_long(overrides), *overrides]

    def start(self, command: list[str], *, checkout: Path = ROOT) -> subprocess.Popen[str]:
        """A command that goes on meanwhile, as a user would type it."""
        return subprocess.Popen(
            command, cwd=checkout, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def submit_script(
        self, name: str, *overrides: str, checkout: Path = ROOT, nodes: int = 2, gpus: int = 1
    ) -> tuple[Path, str]:
        """The same through `sbatch slurm/train.sh`, for people who say sbatch."""
        command = ["sbatch", "--parsable", "--partition=low", f"--nodes={nodes}", f"--ntasks-per-node={gpus}"]
        command += [f"--gres=gpu:{gpus}"]
        command += ["--cpus-per-task=1", "--time=20", "--signal=USR2@30", f"--output={self.runs}/%j.out"]
        command += ["slurm/train.sh", "--config-dir", "tests/configs", "experiment=tiny", f"name={name}"]
        self.runs.mkdir(parents=True, exist_ok=True)
        command += [f"runs={self.runs}", *_long(overrides), *overrides]
        done = subprocess.run(command, cwd=checkout, env=self._environment, capture_output=True, text=True, check=False)
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

    def said(self, run: Path, *names: str) -> list[tuple[str, str]]:
        """Event and status, of the events of these names."""
        return [(e["event"], str(e.get("status"))) for e in self.events(run) if e["event"] in names]

    def back_in_queue(self, run: Path, job: str, *, starts: int, seconds: float = LIMIT) -> dict[str, Any]:
        """Wait until the job is in the queue after so many starts; the event `requeue` that says why."""

        def queued() -> bool:
            info = self.cluster.job(job)
            over = info["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            assert not over, f"{info['JobState']}\n{self.log(run)}\n{self.events(run)[-8:]}"
            return info["JobState"] == "PENDING" and info.get("Restarts") == str(starts)

        self.cluster.until(queued, f"{run.name} in the queue after {starts} starts", seconds=seconds)
        self.cluster.until(lambda: not self.cluster._steps(job), f"the end of the steps of {job}")
        last = [e for e in self.events(run) if e["event"] in ("requeue", "requeue_failed", "end")][-1]
        assert last["event"] == "requeue", last
        return last

    def log(self, run: Path) -> str:
        """The ends of all logs of a run; also what `train.sh` said."""
        files = [*sorted(run.glob("logs/*.log")), *sorted(self.runs.glob("*.out"))]
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in files)

    def reach(self, run: Path, job: str, update: int, seconds: float = LIMIT) -> None:
        """Wait until `update` updates are recorded."""

        def reached() -> bool:
            state = self.cluster.job(job)["JobState"]
            assert state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), f"{state}\n{self.log(run)}"
            return len(self.metrics(run)) >= update

        self.cluster.until(reached, f"update {update} of {run.name}", seconds=seconds)

    def finish(self, run: Path, job: str) -> None:
        info = self.cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
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


def copied_checkout(folder: Path) -> Path:
    """A checkout as somebody has it who clones this one: what git tracks, without its history."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def _long(overrides: tuple[str, ...]) -> list[str]:
    """The length of a run, unless it is chosen."""
    return [] if any(o.startswith(("updates=", "epochs=")) for o in overrides) else [f"updates={UPDATES}"]
