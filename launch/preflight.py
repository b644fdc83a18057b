"""Look at the nodes before a run depends on them: one light process a GPU, a table, and the bad node by name.

multitrain preflight [--dir DIR]                 this machine, one process a GPU
srun multitrain preflight --dir DIR              every rank of an allocation
python launch/submit.py … preflight=true         before the run starts, in the same job

Each rank looks at its own GPU, cores, shared memory, disks and libraries, and tells rank 0 through a plain socket, which
compares their clocks as well. With --collective, processes beside them then all-reduce through NCCL (gloo without GPUs).
Exit status: 0 all is well (or only slower than it could be), 1 a rank is missing or cannot work, 2 a wrong option.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch import node, verdict
from launch.verdict import Finding
from multitrain.monitor.slurm import free_port, in_step, rank_environment

PATIENCE = 120.0
"""Seconds that every step of it may take."""
PINGS = 5
"""Questions after the time, of which the one answered fastest counts."""
Row = dict[str, Any]


class Silence(Exception):
    """The other side is gone, or says nothing in time."""


def main(arguments: list[str] | None = None) -> int:
    """Print the table on rank 0; 1 when a rank is missing or cannot work."""
    given = _parser().parse_args(arguments)
    if "RANK" not in os.environ and not in_step():
        ranks = given.ranks or node.gpus_here() or 1
        if ranks > 1:
            return _here(ranks, sys.argv[1:] if arguments is None else arguments)
    place = rank_environment()
    if place["RANK"] != "0":
        return follow(place, given.patience)
    result = lead(place, _wanted(given), given.patience)
    print(json.dumps(result.as_json(), indent=1) if given.json else verdict.table(result.rows), flush=True)
    for finding in result.findings:
        print(f"preflight: {'' if finding.fatal else 'warning: '}{finding.text}", file=sys.stderr)
    if (bad := verdict.advice(result.findings, result.rows)) and in_step():
        print(f"preflight: leave it out with cluster.exclude={bad} (sbatch --exclude={bad})", file=sys.stderr)
    return 1 if any(f.fatal for f in result.findings) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path.cwd(),
        metavar="DIR",
        help="folder whose writing is timed; of a run: its configuration says what it needs (default: this one)",
    )
    parser.add_argument(
        "--videos", action="append", default=[], metavar="DIR", help="folder of video files to read from"
    )
    parser.add_argument(
        "--collective",
        nargs="?",
        const="always",
        choices=("always", "gpu", "never"),
        help="all-reduce with torch as well; gpu: only where `nvidia-smi` shows GPUs (default for a run)",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes on this machine, outside a job (default: its GPUs)"
    )
    parser.add_argument(
        "--patience", type=float, default=PATIENCE, metavar="S", help=f"seconds a step (default {PATIENCE:g})"
    )
    parser.add_argument("--json", action="store_true", help="rows and findings as one JSON object")
    return parser


@dataclass
class Wanted:
    """What rank 0 tells the others to look at."""

    folder: str
    videos: list[str]
    collective: str
    gpus: int | None = None
    cpus: int | None = None


@dataclass
class Result:
    """All rows, in the order of ranks, and what is wrong."""

    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "ok": not any(f.fatal for f in self.findings),
            "rows": self.rows,
            "findings": [asdict(f) for f in self.findings],
            "exclude": verdict.advice(self.findings, self.rows),
        }


def _wanted(given: argparse.Namespace) -> Wanted:
    """From the command line, and from the configuration of the run whose folder it names."""
    videos = [str(Path(v).absolute()) for v in given.videos]
    wanted = Wanted(str(given.dir.absolute()), videos, given.collective or "never")
    if (given.dir / "config.yaml").is_file():
        from multitrain.config import load

        config = load(given.dir)
        wanted.videos += sorted({d.videos for d in config.data.datasets.values()})
        wanted.cpus = config.cluster.cpus_per_gpu
        wanted.gpus = config.gpus if config.cluster.kind == "local" or config.cluster.gpu_request != "none" else None
        wanted.collective = given.collective or "gpu"
    return wanted


# ------------------------------------------------------------------------------------------------------- rank 0 and the rest


class Link:
    """One JSON object a line over a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("r", encoding="utf-8")

    def send(self, **message: Any) -> None:
        """Send one message; a peer that is gone is noticed when it should answer."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message.

        Raises:
            Silence: none came before `deadline` (``time.monotonic()``), or the other side is gone.
        """
        try:
            self._connection.settimeout(max(0.01, deadline - time.monotonic()))
            line = self._file.readline()
            if line:
                message: dict[str, Any] = json.loads(line)
                return message
        except (OSError, ValueError):
            pass
        raise Silence


def lead(place: dict[str, str], wanted: Wanted, patience: float = PATIENCE) -> Result:
    """Rank 0: gather all ranks, their clocks, their rows, and the result of the all-reduce."""
    world = int(place["WORLD_SIZE"])
    links, nodes = _gather(place, world, time.monotonic() + patience)
    skews = {rank: _skew(link, patience) for rank, link in links.items()}
    for link in links.values():
        link.send(do="look", folder=wanted.folder, videos=wanted.videos)
    rows = {0: node.look(place, Path(wanted.folder), wanted.videos) | {"skew_ms": 0.0}}
    rows |= _answers(links, time.monotonic() + patience)
    for rank, skew in skews.items():
        if rank in rows and skew is not None:
            rows[rank]["skew_ms"] = skew
    ordered = [rows[rank] for rank in sorted(rows)]
    silent = verdict.absent(world, ordered, {**_planned(world), **nodes}, patience)
    findings = silent + verdict.judge(ordered, gpus=wanted.gpus, cpus=wanted.cpus)
    real = all(row["driver"] for row in ordered)
    if wanted.collective == "always" or (wanted.collective == "gpu" and real):
        if any(f.fatal for f in findings):
            findings.append(Finding("the all-reduce was left out because of this"))
        else:
            findings += _collective(links, place, rows, patience)
            findings += [f for f in verdict.judge(ordered) if f not in findings]
    for link in links.values():
        link.send(do="end")
    return Result(ordered, findings)


def follow(place: dict[str, str], patience: float = PATIENCE) -> int:
    """Every other rank: do what rank 0 says until it says that this was all."""
    address = (place["MASTER_ADDR"], int(place["MASTER_PORT"]))
    deadline = time.monotonic() + patience
    while True:
        try:
            link = Link(socket.create_connection(address, timeout=5.0))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                where = f"rank {place['RANK']} on {node.name()}"
                print(f"preflight: {where} cannot reach rank 0 at {address[0]}:{address[1]} ({error})", file=sys.stderr)
                return 1
            time.sleep(random.uniform(0.1, 0.5))
    link.send(rank=int(place["RANK"]), node=node.name(), job=os.environ.get("SLURM_JOB_ID"))
    try:
        while (message := link.receive(time.monotonic() + 4 * patience))["do"] != "end":
            if message["do"] == "time":
                link.send(time=time.time())
            elif message["do"] == "look":
                link.send(**node.look(place, Path(message["folder"]), message["videos"]))
            elif message["do"] == "collective":
                link.send(**_all_reduce(place, message["port"], patience))
    except Silence:
        print(f"preflight: rank {place['RANK']} on {node.name()}: rank 0 has left", file=sys.stderr)
        return 1
    return 0


def _gather(place: dict[str, str], world: int, deadline: float) -> tuple[dict[int, Link], dict[int, str]]:
    """Connections to the other ranks, those that come in time, and their nodes."""
    links: dict[int, Link] = {}
    nodes: dict[int, str] = {}
    if world == 1:
        return links, nodes
    with socket.create_server(("", int(place["MASTER_PORT"])), backlog=world) as server:
        while len(links) < world - 1 and time.monotonic() < deadline:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            with contextlib.suppress(OSError, Silence):
                link = Link(server.accept()[0])
                hello = link.receive(time.monotonic() + 10.0)
                if hello.get("job") == os.environ.get("SLURM_JOB_ID") and "rank" in hello:
                    links[hello["rank"]], nodes[hello["rank"]] = link, hello["node"]
    return dict(sorted(links.items())), nodes


def _skew(link: Link, patience: float) -> float | None:
    """Milliseconds that the rank's clock is ahead of ours, to half the time that the fastest of some questions took."""
    best: tuple[float, float] | None = None
    with contextlib.suppress(Silence):
        for _ in range(PINGS):
            begin, asked = time.perf_counter(), time.time()
            link.send(do="time")
            told = link.receive(time.monotonic() + patience)["time"]
            taken = time.perf_counter() - begin
            if best is None or taken < best[0]:
                best = taken, told - asked - taken / 2
    return None if best is None else round(1e3 * best[1], 2)


def _answers(links: dict[int, Link], deadline: float) -> dict[int, Row]:
    """What the ranks answer; those that do not are left out."""
    found = {}
    for rank, link in links.items():
        with contextlib.suppress(Silence):
            found[rank] = link.receive(deadline)
    return found


def _planned(world: int) -> dict[int, str]:
    """The node that SLURM has placed each rank on, where that can be told: ranks in blocks, as `srun` does by default."""
    if not in_step():
        return {}
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    names = done.stdout.split()
    return {rank: names[rank * len(names) // world] for rank in range(world)} if names else {}


# ---------------------------------------------------------------------------------------------------------- all-reduce


def _collective(links: dict[int, Link], place: dict[str, str], rows: dict[int, Row], patience: float) -> list[Finding]:
    """All ranks all-reduce; their speeds go into their rows."""
    port = free_port()
    for link in links.values():
        link.send(do="collective", port=port)
    answers = {0: _all_reduce(place, port, patience), **_answers(links, time.monotonic() + patience + 30.0)}
    findings = []
    for rank, row in rows.items():
        answer = answers.get(rank, {"error": "no answer"})
        row |= {key: value for key, value in answer.items() if key != "error"}
        if "error" in answer:
            text = f"the all-reduce failed on rank {rank} on {row['node']}: {answer['error']}"
            findings.append(Finding(text, row["node"] if len(answers) < len(rows) else None))
    return findings


def _all_reduce(place: dict[str, str], port: int, patience: float) -> dict[str, Any]:
    """What `multitrain.engine.bandwidth` says, in a process of its own: this one does without torch, and outlives a hang."""
    arguments = [place[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
    command = [sys.executable, "-m", "multitrain.engine.bandwidth", *arguments, str(port), str(patience)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience + 30.0, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no end within {patience + 30.0:g} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"]
        return {"error": said[-1][:300]}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


# --------------------------------------------------------------------------------------------------------- this machine


def _here(ranks: int, arguments: Sequence[str]) -> int:
    """Outside a job: one process a GPU of this machine; the exit code of rank 0."""
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.preflight", *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    codes = [process.wait() for process in processes]
    return codes[0]


if __name__ == "__main__":
    sys.exit(main())
