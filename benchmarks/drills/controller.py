"""The same drills on a real SLURM controller, which `slurm/devcluster` starts: what SLURM does to jobs, and worse.

python benchmarks/drills/controller.py [--seed S] [--only WORDS]

One run over two virtual nodes is taken away again and again: evicted by a job of a higher priority, warned of its time
limit, cancelled, its node lost (slurmd, its steps and its tasks killed), its batch script killed, a rank killed. It must come back by
itself where the table says so, stay away where it was cancelled, and end with the undisturbed run's weights, every bit.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[:1] = [str(Path(__file__).resolve().parents[2])]

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import results
from benchmarks.drills.run import write_data
from multitrain.engine import checkpoint as ck
from tests.slurm.drill import DEVCLUSTER, Cluster, Runs, reason_to_skip

RESULTS = Path(__file__).resolve().parents[1] / "results" / "drills_controller.json"
EVERY = 8
"""Updates between two checkpoints."""


@dataclass(frozen=True)
class Blow:
    """What happens to a job. `returns`: whether it must come back without anybody submitting it again."""

    name: str
    strike: Callable[[Stage], None]
    may_lose: int
    returns: bool


class Stage:
    """The cluster, the run on it, and its job."""

    def __init__(self, cluster: Cluster, runs: Runs, name: str, updates: int) -> None:
        self.cluster, self.runs, self.name = cluster, runs, name
        self.options = (f"updates={updates}", f"checkpoint.every={EVERY}", "monitor.tensorboard=false")
        self.folder = runs.runs / name
        self.job = ""

    def submit(self) -> None:
        """Submit the run (again)."""
        self.folder, self.job = self.runs.submit(self.name, *self.options)

    def newest(self) -> int:
        """Updates of the newest whole checkpoint; 0 without one."""
        folder, _ = ck.newest_verified(self.folder / "checkpoints")
        return int(folder.name.split("-")[1]) if folder else 0

    def processes(self, *words: str, node: str | None = None) -> list[int]:
        """Processes of this cluster whose command line has all `words`, and that belong to `node`."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (entry / "environ").read_bytes().split(b"\0")
                if all(w in title for w in words) and (
                    node is None or f"SLURMD_NODENAME={node}".encode() in environment or f"-N {node}" in title + " "
                ):
                    found.append(int(entry.name))
        return found

    def kill(self, *words: str, node: str | None = None) -> int:
        """SIGKILL to these processes; how many there were."""
        pids = self.processes(*words, node=node)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)


def _evict(stage: Stage) -> None:
    stage.cluster.evict(nodes=16)


def _warn(stage: Stage) -> None:
    stage.cluster.run("scancel", "--signal=USR2", stage.job)


def _cancel(stage: Stage) -> None:
    stage.cluster.run("scancel", stage.job)


def _limit(stage: Stage) -> None:
    """The controller is given another limit for the job that runs; the warning and the rest are SLURM's own."""
    elapsed = stage.cluster.run("squeue", "--noheader", "--format=%M", f"--jobs={stage.job}").strip().split(":")
    minutes = int(elapsed[-2]) + 60 * (int(elapsed[-3]) if len(elapsed) > 2 else 0)
    stage.cluster.run("scontrol", "update", f"jobid={stage.job}", f"TimeLimit={minutes + 1}")
    seen = len(stage.runs.events(stage.folder))
    stage.cluster.until(
        lambda: any(e["event"] == "signal" for e in stage.runs.events(stage.folder)[seen:]), "the warning", 150
    )


def _lose_a_node(stage: Stage) -> None:
    """slurmd, its steps and its tasks die at one blow; slurmd comes back when the controller has seen it."""
    node = "node2"
    configuration = stage.cluster.configuration
    stage.kill("slurmd", configuration, node=node)
    for title in ("multitrain.train", "launch.supervisor", "multitrain.data.pool"):
        stage.kill(title, node=node)
    stage.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=drill")
    environment = {**os.environ, "SLURM_CONF": configuration, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    subprocess.run(["slurmd", "-f", configuration, "-N", node], env=environment, check=False, capture_output=True)
    stage.cluster.run("scontrol", "update", f"nodename={node}", "state=idle")


def _kill_the_batch_script(stage: Stage) -> None:
    if not stage.kill(f"job{int(stage.job):05d}/slurm_script"):
        raise AssertionError("no batch script was found")


def _kill_a_rank(stage: Stage) -> None:
    pids = stage.processes("multitrain.train", str(stage.folder), node="node2")
    os.kill(pids[0], signal.SIGKILL)


BLOWS = {
    blow.name: blow
    for blow in (
        Blow("evicted by a higher priority", _evict, 0, returns=True),
        Blow("warned (SIGUSR2)", _warn, 0, returns=True),
        Blow("time limit", _limit, 0, returns=True),
        Blow("cancelled", _cancel, 0, returns=False),
        Blow("node lost", _lose_a_node, EVERY, returns=True),
        Blow("batch script killed", _kill_the_batch_script, EVERY, returns=True),
        Blow("rank killed", _kill_a_rank, EVERY, returns=True),
    )
}


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 when the run ended with the undisturbed run's bits and came back as it must."""
    parser = argparse.ArgumentParser(
        prog="controller.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10, metavar="N", help="blows (default 10)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of kinds and moments (default 0)")
    parser.add_argument("--only", metavar="WORDS", help="only kinds whose name holds these words")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help=f"results (default {RESULTS})")
    given = parser.parse_args(arguments)
    if reason := reason_to_skip():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    chance = random.Random(given.seed)
    kinds = [b for b in BLOWS.values() if given.only is None or given.only.lower() in b.name.lower()]
    blows = (kinds * given.count)[: given.count]
    chance.shuffle(blows)
    with _cluster() as (cluster, folder):
        data = write_data(folder / "data")
        runs = Runs(cluster, folder / "runs", data)
        updates = 6 * given.count + 4
        undisturbed = Stage(cluster, runs, "undisturbed", updates)
        undisturbed.submit()
        runs.finish(undisturbed.folder, undisturbed.job)
        stage = Stage(cluster, runs, "drilled", updates)
        stage.submit()
        records = []
        for i, blow in enumerate(blows):
            records.append(strike(stage, blow, chance, 2 + 6 * i + chance.randrange(4)))
            print(_line(records[-1]), flush=True)
        runs.finish(stage.folder, stage.job)
        equal = _same(runs, stage.folder, undisturbed.folder)
    kept = all(r["kept"] for r in records)
    print(f"{len(records)} blows; the run {'ended with the undisturbed bits' if equal else 'DIFFERS'}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "name": "drills_controller",
        "command": f"python benchmarks/drills/controller.py --count {given.count} --seed {given.seed}",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": results.hardware(),
        "versions": results.versions(),
        "size": "small",
        "rows": [],
        "plots": [],
        "equal": equal,
        "interruptions": records,
    }
    given.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if equal and kept else 1


def strike(stage: Stage, blow: Blow, chance: random.Random, at: int) -> dict[str, Any]:
    """One blow at update `at` or later, and the way back; the job is submitted again where it does not come by itself."""
    stage.runs.reach(stage.folder, stage.job, at)
    time.sleep(chance.uniform(0, 0.5))
    events = len(stage.runs.events(stage.folder))
    before = len(stage.runs.metrics(stage.folder))
    restarts = int(stage.cluster.job(stage.job).get("Restarts", "0"))
    begin = time.monotonic()
    blow.strike(stage)
    furthest = before

    def over() -> str:
        nonlocal furthest
        furthest = max(furthest, len(stage.runs.metrics(stage.folder)))
        info = stage.cluster.job(stage.job)
        if int(info.get("Restarts", "0")) > restarts and info["JobState"] == "PENDING":
            return "requeued"
        resumed = [e for e in stage.runs.events(stage.folder)[events:] if e["event"] == "resume"]
        if resumed and info["JobState"] == "RUNNING":
            return "in place"
        return (
            info["JobState"] if info["JobState"] in ("CANCELLED", "FAILED", "COMPLETED", "NODE_FAIL", "TIMEOUT") else ""
        )

    how = str(stage.cluster.until(over, f"the end of '{blow.name}'", seconds=150))
    gone = time.monotonic()
    newest = stage.newest()
    if how == "requeued":
        stage.cluster.run("scontrol", "update", f"jobid={stage.job}", "TimeLimit=10")
        stage.cluster.start_now(stage.job)
    elif how != "in place":
        time.sleep(3)
        how = how if stage.cluster.job(stage.job)["JobState"] == how else "back from the dead"
        stage.submit()
    stage.runs.reach(stage.folder, stage.job, furthest + 1)
    came_back = how in ("requeued", "in place")
    lost = furthest - newest
    return {
        "kind": blow.name,
        "update": before,
        "how": how,
        "stop_seconds": round(gone - begin, 1),
        "back_seconds": round(time.monotonic() - begin, 1),
        "lost": max(0, lost) if how != "in place" else None,
        "returned": came_back,
        "kept": came_back == blow.returns and (how == "in place" or lost <= blow.may_lose),
    }


def _line(r: dict[str, Any]) -> str:
    return (
        f"update {r['update']:3}  {r['kind']:30}  {r['how']:10}  over in {r['stop_seconds']:5.1f} s, lost {r['lost']}, "
        f"further in {r['back_seconds']:5.1f} s{'' if r['kept'] else '  BROKEN PROMISE'}"
    )


def _same(runs: Runs, run: Path, reference: Path) -> bool:
    try:
        runs.assert_same(run, reference)
    except AssertionError as error:
        print(error)
        return False
    return True


@contextlib.contextmanager
def _cluster() -> Iterator[tuple[Cluster, Path]]:
    """A cluster of two nodes of its own, stopped at the end."""
    folder = Path(tempfile.mkdtemp(prefix="drill-", dir="/tmp"))
    start = [str(DEVCLUSTER / "start"), "--nodes", "2", "--gpus", "1", "--dir", str(folder / "slurm")]
    done = subprocess.run(start, capture_output=True, text=True, check=True)
    configuration = done.stdout.strip().removeprefix("export SLURM_CONF=")
    os.environ["SLURM_CONF"] = configuration
    try:
        yield Cluster(folder / "slurm", configuration), folder
    finally:
        subprocess.run([str(DEVCLUSTER / "stop"), "--dir", str(folder / "slurm")], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
