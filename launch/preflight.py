"""Look at the nodes before a run depends on them: one light process a GPU, a table, and the bad node by name.

multitrain preflight [--dir DIR]                 this machine, one process a GPU
srun multitrain preflight --dir DIR              every rank of an allocation
python launch/submit.py … preflight=true         before the run starts, in the same job

Each rank looks at its own GPU, cores, shared memory, disks and libraries, and tells rank 0 through an authenticated connection,
which compares their clocks as well. With --collective, processes beside them then all-reduce through NCCL (gloo without GPUs).
Exit status: 0 all is well (or only slower than it could be); 5 a node cannot work, and others can; 1 something else is wrong;
2 a wrong option; 75 a stop signal came. For the folder of a run, what ends it is in the run's events as well.
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
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

from launch import assess, channel, node
from launch.assess import Finding
from launch.channel import Channel, ChannelError, Server
from launch.complaint import complaint
from launch.events import record
from multitrain.cluster.exit_status import Exit
from multitrain.cluster.slurm import STOP_SIGNALS, free_port, in_step, job_id, rank_environment, restart_count
from multitrain.cluster.supervised import STORE_KEY

PATIENCE = 120.0
"""Seconds that every step of it may take."""
PINGS = 5
"""Questions after the time, of which the one answered fastest counts."""
Row = dict[str, Any]


class Interrupted(BaseException):
    """A stop signal has come; nothing that handles errors goes on."""


def main(arguments: list[str] | None = None) -> int:
    """Print the table on rank 0; the exit status, see above."""
    given = _parser().parse_args(arguments)
    try:
        _stop_at_once()
        return _main(given, sys.argv[1:] if arguments is None else arguments)
    except Interrupted as stop:
        print(f"preflight: stopped by {stop}", file=sys.stderr, flush=True)
        return Exit.INTERRUPTED
    except ChannelError as error:
        print(f"preflight: rank {os.environ.get('RANK', '0')} on {node.name()}: {error}", file=sys.stderr, flush=True)
        return Exit.FAILED


def _main(given: argparse.Namespace, arguments: Sequence[str]) -> int:
    if "RANK" not in os.environ and not in_step():
        ranks = given.ranks or node.gpus_here() or 1
        if ranks > 1:
            return _here(ranks, arguments)
    place = rank_environment()
    with _key(given.dir, place) as key:
        if place["RANK"] != "0":
            return follow(place, key, given.patience)
        result = lead(place, key, _wanted(given), given.patience)
    print(json.dumps(result.as_json(), indent=1) if given.json else assess.table(result.rows), flush=True)
    for finding in result.findings:
        print(f"preflight: {'' if finding.fatal else 'warning: '}{finding.text}", file=sys.stderr)
    if (bad := assess.advice(result.findings, result.rows)) and in_step():
        print(f"preflight: leave it out with cluster.exclude={bad} (sbatch --exclude={bad})", file=sys.stderr)
    fatal = [f for f in result.findings if f.fatal]
    if not fatal:
        return Exit.FINISHED
    nodes = bad.split(",") if bad else []
    if (given.dir / "config.yaml").is_file():
        record(given.dir.absolute(), "preflight", nodes=nodes, reasons=[f.text for f in fatal])
    return Exit.BAD_NODE if nodes else Exit.FAILED


def _stop_at_once() -> None:
    """Whatever it is doing, a stop signal ends a preflight; the launcher has held back those that came until now."""

    def stop(number: int, _: FrameType | None) -> None:
        for again in stops:
            signal.signal(again, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    stops = (*STOP_SIGNALS, signal.SIGINT)
    for number in stops:
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)


@contextlib.contextmanager
def _key(folder: Path, place: dict[str, str]) -> Iterator[bytes]:
    """By which the ranks of this preflight know each other: from the run's secret, or from one in `folder` for as long as it
    lasts.

    Raises:
        ChannelError: there is none.
    """
    start = job_id() or "", str(restart_count()), os.environ.get("SLURM_STEP_ID", "")
    if place["WORLD_SIZE"] == "1":
        yield secrets.token_bytes(32)
    elif channel.SECRET in os.environ or (folder / "config.yaml").is_file():
        yield channel.derived(channel.secret(folder), "preflight", *start)
    else:
        path = folder / f".preflight-{'.'.join(start)}.{place['MASTER_PORT']}"
        try:
            yield channel.derived(channel.secret_of(path), "preflight", *start)
        finally:
            if place["RANK"] == "0":
                path.unlink(missing_ok=True)


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
            "exclude": assess.advice(self.findings, self.rows),
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


def lead(place: dict[str, str], key: bytes, wanted: Wanted, patience: float = PATIENCE) -> Result:
    """Rank 0: gather all ranks, their clocks, their rows, and the result of the all-reduce.

    Raises:
        ChannelError: no port can be had.
    """
    world = int(place["WORLD_SIZE"])
    links, nodes = _gather(place, key, world, time.monotonic() + patience)
    skews = {rank: _skew(link, patience) for rank, link in links.items()}
    for link in links.values():
        link.send(do="look", folder=wanted.folder, videos=wanted.videos)
    rows = {0: node.look(place, Path(wanted.folder), wanted.videos) | {"skew_ms": 0.0}}
    rows |= {r: row for r, answer in _answers(links, time.monotonic() + patience).items() if (row := _row(answer, r))}
    for rank, skew in skews.items():
        if rank in rows and skew is not None:
            rows[rank]["skew_ms"] = skew
    ordered = [rows[rank] for rank in sorted(rows)]
    silent = assess.absent(world, ordered, {**_planned(world), **nodes}, patience)
    findings = silent + assess.judge(ordered, gpus=wanted.gpus, cpus=wanted.cpus)
    real = all(row["driver"] for row in ordered)
    if wanted.collective == "always" or (wanted.collective == "gpu" and real):
        if any(f.fatal for f in findings):
            findings.append(Finding("the all-reduce was left out because of this"))
        else:
            findings += _collective(links, place, key, rows, patience)
            findings += [f for f in assess.judge(ordered) if f not in findings]
    for link in links.values():
        link.send(do="end")
    return Result(ordered, findings)


def follow(place: dict[str, str], key: bytes, patience: float = PATIENCE) -> int:
    """Every other rank: do what rank 0 says until it says that this was all.

    Raises:
        ChannelError: rank 0 is not to be reached.
    """
    rank = int(place["RANK"])
    link = channel.connect(
        key,
        place["MASTER_ADDR"],
        int(place["MASTER_PORT"]),
        time.monotonic() + patience,
        {"rank": rank, "node": node.name()},
        pause=lambda: time.sleep(random.uniform(0.02, 0.1)),
    )
    while (message := link.wait(time.monotonic() + 4 * patience)) is not None and message.get("do") != "end":
        if message.get("do") == "time":
            link.send(time=time.time())
        elif message.get("do") == "look":
            videos = [v for v in message.get("videos") or [] if isinstance(v, str)]
            link.send(**node.look(place, Path(str(message.get("folder"))), videos))
        elif message.get("do") == "collective":
            salt, port = str(message.get("salt")), channel.integer(message, "port", 1, 65535)
            link.send(**_all_reduce(place, channel.derived(key, "store", salt), port, patience))
    if message is None:
        print(f"preflight: rank {rank} on {node.name()}: rank 0 has left", file=sys.stderr)
        return Exit.FAILED
    return Exit.FINISHED


def _gather(
    place: dict[str, str], key: bytes, world: int, deadline: float
) -> tuple[dict[int, Channel], dict[int, str]]:
    """Connections to the other ranks, those that come in time, and their nodes."""
    nodes: dict[int, str] = {}
    if world == 1:
        return {}, nodes
    server = Server(key, world, int(place["MASTER_PORT"]), loopback=place.get("LOCAL_WORLD_SIZE") == str(world))
    while len(server.channels) < world - 1 and time.monotonic() < deadline:
        for rank, message in server.poll(min(1.0, max(0.01, deadline - time.monotonic()))):
            if message is not None and isinstance(message.get("node"), str):
                nodes[rank] = channel.text(message, "node", 80)
    server.stop_listening()
    return dict(sorted(server.channels.items())), nodes


TEXTS = ("node", "gpu", "affinity", "model", "driver")
NUMBERS = ("gpus", "cpus", "cores", "shm_free_GB", "used_GB", "read_MB_s", "write_MB_s", "rename_ms")
LISTS = ("missing", "problems")


def _row(answer: channel.Message, rank: int) -> Row | None:
    """The row that rank `rank` has sent; None when it is none."""
    versions = answer.get("versions")
    lists = [answer.get(name) for name in LISTS]
    if not isinstance(versions, dict) or any(not isinstance(found, list) for found in lists):
        return None
    row: Row = {
        "rank": rank,
        "versions": {channel.printable(k): channel.printable(str(v)) for k, v in versions.items()},
    }
    row |= {name: [channel.printable(str(text)) for text in answer[name][:100]] for name in LISTS}
    try:
        row |= {name: channel.text(answer, name) for name in TEXTS}
    except ValueError:
        return None
    for name in NUMBERS:
        value = answer.get(name)
        if value is not None and type(value) not in (int, float):
            return None
        row[name] = value
    return row


def _skew(link: Channel, patience: float) -> float | None:
    """Milliseconds that the rank's clock is ahead of ours, to half the time that the fastest of some questions took."""
    best: tuple[float, float] | None = None
    told: Any
    for _ in range(PINGS):
        begin, asked = time.perf_counter(), time.time()
        link.send(do="time")
        told = (link.wait(time.monotonic() + patience) or {}).get("time")
        taken = time.perf_counter() - begin
        if type(told) not in (int, float):
            break
        if best is None or taken < best[0]:
            best = taken, told - asked - taken / 2
    return None if best is None else round(1e3 * best[1], 2)


def _answers(links: dict[int, Channel], deadline: float) -> dict[int, Row]:
    """What the ranks answer; those that do not are left out."""
    answers = {rank: link.wait(deadline) for rank, link in links.items()}
    return {rank: answer for rank, answer in answers.items() if answer is not None}


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


def _collective(
    links: dict[int, Channel], place: dict[str, str], key: bytes, rows: dict[int, Row], patience: float
) -> list[Finding]:
    """All ranks all-reduce; their speeds go into their rows."""
    port, salt = free_port(), secrets.token_hex(16)
    for link in links.values():
        link.send(do="collective", port=port, salt=salt)
    answers = {0: _all_reduce(place, channel.derived(key, "store", salt), port, patience)}
    answers |= _answers(links, time.monotonic() + patience + 30.0)
    findings = []
    for rank, row in rows.items():
        answer = answers.get(rank, {"error": "no answer"})
        row |= {name: answer[name] for name in SPEEDS if type(answer.get(name)) in (int, float)}
        if "error" in answer:
            said = channel.printable(str(answer["error"]))
            text = f"the all-reduce failed on rank {rank} on {row['node']}: {said}"
            findings.append(Finding(text, row["node"] if len(answers) < len(rows) else None))
    return findings


SPEEDS = ("allreduce_GB_s", "link_GB_s")


def _all_reduce(place: dict[str, str], key: bytes, port: int, patience: float) -> dict[str, Any]:
    """What `multitrain.engine.bandwidth` says, in a process of its own: this one does without torch, and outlives a hang."""
    arguments = [place[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
    command = [sys.executable, "-m", "multitrain.engine.bandwidth", *arguments, str(port), str(patience)]
    environment = {**os.environ, **place, "MASTER_PORT": str(port), STORE_KEY: key.hex()}
    environment.pop(channel.SECRET, None)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=patience + 30.0, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no end within {patience + 30.0:g} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": complaint("its process", done.returncode, done.stderr, "see its log, and dmesg there")}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


# --------------------------------------------------------------------------------------------------------- this machine


def _here(ranks: int, arguments: Sequence[str]) -> int:
    """Outside a job: one process a GPU of this machine; the exit code of rank 0."""
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), channel.SECRET: secrets.token_hex(32)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.preflight", *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait() for process in processes]
    except Interrupted:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        raise
    return codes[0]


if __name__ == "__main__":
    sys.exit(main())
