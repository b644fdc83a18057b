"""Check the nodes before a run depends on them: one light process per GPU, a table, and the name of each bad node.

multitrain preflight [--dir DIR]                 this machine, one process per GPU
srun multitrain preflight --dir DIR              every rank of an allocation
python launch/submit.py … preflight=true         before the run starts, in the same job

Each rank checks its own GPU, cores, shared memory, disks and libraries, and reports to rank 0 over an authenticated connection.
Rank 0 also compares the clocks. With --collective, one more process per rank then joins an all-reduce through NCCL (gloo
without GPUs). Exit status: 0 no problem, or only slow parts; 5 a node cannot work, and others can; 1 another problem; 2 a wrong
option; 75 a stop signal arrived. If DIR is the folder of a run, fatal problems are also recorded in the run's events.
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
from launch.child_error import child_error
from launch.events import record
from multitrain.cluster import quota
from multitrain.cluster.exit_status import Exit
from multitrain.cluster.slurm import STOP_SIGNALS, free_port, in_step, job_id, rank_environment, restart_count
from multitrain.cluster.supervised import STORE_KEY

TIMEOUT = 120.0
"""Seconds that each step of the preflight may take."""
CLOCK_PROBES = 5
"""Clock requests to each rank; the one with the shortest round trip counts."""
Row = dict[str, Any]


class Interrupted(BaseException):
    """A stop signal arrived. A BaseException, so that no error handler catches it."""


def main(arguments: list[str] | None = None) -> int:
    """Run the preflight, print the table on rank 0, and return the exit status (see the module's docstring)."""
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
            return _run_locally(ranks, arguments)
    rank_env = rank_environment()
    with _key(given.dir, rank_env) as key:
        if rank_env["RANK"] != "0":
            return follow(rank_env, key, given.timeout)
        request = _request(given)
        result = lead(rank_env, key, request, given.timeout)
    print(json.dumps(result.as_json(), indent=1) if given.json else assess.table(result.rows), flush=True)
    for line in quota.lines([request.folder, *request.videos]):
        print(f"preflight: {line}", file=sys.stderr)
    for finding in result.findings:
        print(f"preflight: {'' if finding.fatal else 'warning: '}{finding.text}", file=sys.stderr)
    if (bad := assess.nodes_to_exclude(result.findings, result.rows)) and in_step():
        print(f"preflight: exclude it with cluster.exclude={bad} (sbatch --exclude={bad})", file=sys.stderr)
    fatal = [f for f in result.findings if f.fatal]
    if not fatal:
        return Exit.FINISHED
    nodes = bad.split(",") if bad else []
    if (given.dir / "config.yaml").is_file():
        record(given.dir.absolute(), "preflight", nodes=nodes, reasons=[f.text for f in fatal])
    return Exit.BAD_NODE if nodes else Exit.FAILED


def _stop_at_once() -> None:
    """Let a stop signal end the preflight at any moment, and unblock the signals that the launcher has blocked until now."""

    def stop(number: int, _: FrameType | None) -> None:
        for again in stops:
            signal.signal(again, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    stops = (*STOP_SIGNALS, signal.SIGINT)
    for number in stops:
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)


@contextlib.contextmanager
def _key(folder: Path, rank_env: dict[str, str]) -> Iterator[bytes]:
    """The key with which the ranks of this preflight authenticate each other.

    It is derived from the run's secret. Where `folder` is not a run's, rank 0 keeps a secret there until the preflight ends.

    Raises:
        ChannelError: there is no secret, or it cannot be read.
    """
    start = job_id() or "", str(restart_count()), os.environ.get("SLURM_STEP_ID", "")
    if rank_env["WORLD_SIZE"] == "1":
        yield secrets.token_bytes(32)
    elif channel.SECRET_VARIABLE in os.environ or (folder / "config.yaml").is_file():
        yield channel.derived(channel.secret(folder), "preflight", *start)
    else:
        path = folder / f".preflight-{'.'.join(start)}.{rank_env['MASTER_PORT']}"
        try:
            yield channel.derived(channel.secret_of(path), "preflight", *start)
        finally:
            if rank_env["RANK"] == "0":
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
        help="folder in which a write is timed; if it is a run's, its configuration sets what is checked (default: this one)",
    )
    parser.add_argument(
        "--videos", action="append", default=[], metavar="DIR", help="folder of video files to read from"
    )
    parser.add_argument(
        "--collective",
        nargs="?",
        const="always",
        choices=("always", "gpu", "never"),
        help="run an all-reduce with torch as well; gpu: only where `nvidia-smi` shows GPUs (default for a run)",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes on this machine, outside a job (default: its GPUs)"
    )
    parser.add_argument(
        "--timeout",
        "--patience",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help=f"seconds that a step may take (default {TIMEOUT:g}); --patience is the older name",
    )
    parser.add_argument("--json", action="store_true", help="rows and findings as one JSON object")
    return parser


@dataclass
class Request:
    """What each rank has to check; rank 0 sends it to the others.

    `gpus`: GPUs per node, `cpus`: cores per rank that the run asks for; None: not checked.
    """

    folder: str
    videos: list[str]
    collective: str
    gpus: int | None = None
    cpus: int | None = None


@dataclass
class Result:
    """The rows of all ranks, in the order of ranks, and the problems found."""

    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        return {
            "ok": not any(f.fatal for f in self.findings),
            "rows": self.rows,
            "findings": [asdict(f) for f in self.findings],
            "exclude": assess.nodes_to_exclude(self.findings, self.rows),
        }


def _request(given: argparse.Namespace) -> Request:
    """The request that follows from the command line and from the configuration of the run in `--dir`, if there is one."""
    videos = [str(Path(v).absolute()) for v in given.videos]
    request = Request(str(given.dir.absolute()), videos, given.collective or "never")
    if (given.dir / "config.yaml").is_file():
        from multitrain.config import load
        from multitrain.config.paths import is_remote

        config = load(given.dir)
        request.videos += sorted({d.videos for d in config.data.datasets.values() if not is_remote(d.videos)})
        request.cpus = config.cluster.cpus_per_gpu
        request.gpus = config.gpus if config.cluster.kind == "local" or config.cluster.gpu_request != "none" else None
        request.collective = given.collective or "gpu"
    return request


# ------------------------------------------------------------------------------------------------------- rank 0 and the rest


def lead(rank_env: dict[str, str], key: bytes, request: Request, timeout: float = TIMEOUT) -> Result:
    """Run the preflight on rank 0: connect all ranks, compare clocks, collect the rows, and run the all-reduce.

    Raises:
        ChannelError: no port is free.
    """
    world = int(rank_env["WORLD_SIZE"])
    links, nodes = _gather(rank_env, key, world, time.monotonic() + timeout)
    offsets = {rank: _clock_offset(link, timeout) for rank, link in links.items()}
    for link in links.values():
        link.send(action="check_node", folder=request.folder, videos=request.videos)
    rows = {0: node.collect(rank_env, Path(request.folder), request.videos) | {"skew_ms": 0.0}}
    rows |= {r: row for r, answer in _replies(links, time.monotonic() + timeout).items() if (row := _row(answer, r))}
    for rank, offset in offsets.items():
        if rank in rows and offset is not None:
            rows[rank]["skew_ms"] = offset
    ordered = [rows[rank] for rank in sorted(rows)]
    unanswered = assess.missing_ranks(world, ordered, {**_planned_nodes(world), **nodes}, timeout)
    findings = unanswered + assess.find_problems(ordered, gpus=request.gpus, cpus=request.cpus)
    real = all(row["driver"] for row in ordered)
    if request.collective == "always" or (request.collective == "gpu" and real):
        if any(f.fatal for f in findings):
            findings.append(Finding("the all-reduce was skipped because of this"))
        else:
            findings += _collective(links, rank_env, key, rows, timeout)
            findings += [f for f in assess.find_problems(ordered) if f not in findings]
    for link in links.values():
        link.send(action="done")
    return Result(ordered, findings)


def follow(rank_env: dict[str, str], key: bytes, timeout: float = TIMEOUT) -> int:
    """Run the preflight on another rank: answer the requests of rank 0 until it sends `done`.

    Raises:
        ChannelError: rank 0 cannot be reached.
    """
    rank = int(rank_env["RANK"])
    link = channel.connect(
        key,
        rank_env["MASTER_ADDR"],
        int(rank_env["MASTER_PORT"]),
        time.monotonic() + timeout,
        {"rank": rank, "node": node.name()},
        pause=lambda: time.sleep(random.uniform(0.02, 0.1)),
    )
    while (message := link.wait(time.monotonic() + 4 * timeout)) is not None and message.get("action") != "done":
        if message.get("action") == "clock":
            link.send(time=time.time())
        elif message.get("action") == "check_node":
            videos = [v for v in message.get("videos") or [] if isinstance(v, str)]
            link.send(**node.collect(rank_env, Path(str(message.get("folder"))), videos))
        elif message.get("action") == "collective":
            salt, port = str(message.get("salt")), channel.integer(message, "port", 1, 65535)
            link.send(**_all_reduce(rank_env, channel.derived(key, "store", salt), port, timeout))
    if message is None:
        print(f"preflight: rank {rank} on {node.name()}: the connection to rank 0 was closed", file=sys.stderr)
        return Exit.FAILED
    return Exit.FINISHED


def _gather(
    rank_env: dict[str, str], key: bytes, world: int, deadline: float
) -> tuple[dict[int, Channel], dict[int, str]]:
    """The connections to the ranks that arrive before `deadline`, and the names of their nodes."""
    nodes: dict[int, str] = {}
    if world == 1:
        return {}, nodes
    server = Server(key, world, int(rank_env["MASTER_PORT"]), loopback=rank_env.get("LOCAL_WORLD_SIZE") == str(world))
    while len(server.channels) < world - 1 and time.monotonic() < deadline:
        for rank, message in server.poll(min(1.0, max(0.01, deadline - time.monotonic()))):
            if message is not None and isinstance(message.get("node"), str):
                nodes[rank] = channel.text(message, "node", 80)
    server.stop_listening()
    return dict(sorted(server.channels.items())), nodes


TEXT_FIELDS = ("node", "gpu", "affinity", "model", "driver")
NUMBER_FIELDS = ("gpus", "cpus", "cores", "shm_free_GB", "used_GB", "read_MB_s", "write_MB_s", "rename_ms")
LIST_FIELDS = ("missing", "problems")


def _row(answer: channel.Message, rank: int) -> Row | None:
    """The row in the reply of rank `rank`, checked; None when it is not a valid row."""
    versions = answer.get("versions")
    lists = [answer.get(name) for name in LIST_FIELDS]
    if not isinstance(versions, dict) or any(not isinstance(found, list) for found in lists):
        return None
    row: Row = {
        "rank": rank,
        "versions": {channel.printable(k): channel.printable(str(v)) for k, v in versions.items()},
    }
    row |= {name: [channel.printable(str(text)) for text in answer[name][:100]] for name in LIST_FIELDS}
    try:
        row |= {name: channel.text(answer, name) for name in TEXT_FIELDS}
    except ValueError:
        return None
    for name in NUMBER_FIELDS:
        value = answer.get(name)
        if value is not None and type(value) not in (int, float):
            return None
        row[name] = value
    return row


def _clock_offset(link: Channel, timeout: float) -> float | None:
    """Milliseconds by which the rank's clock is ahead of this one, exact to half the shortest round trip of a few requests."""
    best: tuple[float, float] | None = None
    remote: Any
    for _ in range(CLOCK_PROBES):
        begin, sent = time.perf_counter(), time.time()
        link.send(action="clock")
        remote = (link.wait(time.monotonic() + timeout) or {}).get("time")
        taken = time.perf_counter() - begin
        if type(remote) not in (int, float):
            break
        if best is None or taken < best[0]:
            best = taken, remote - sent - taken / 2
    return None if best is None else round(1e3 * best[1], 2)


def _replies(links: dict[int, Channel], deadline: float) -> dict[int, Row]:
    """The replies of the ranks; ranks that do not reply are missing."""
    answers = {rank: link.wait(deadline) for rank, link in links.items()}
    return {rank: answer for rank, answer in answers.items() if answer is not None}


def _planned_nodes(world: int) -> dict[int, str]:
    """The node of each rank, if `srun` placed the ranks in blocks (its default); empty where the nodes are unknown."""
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
    links: dict[int, Channel], rank_env: dict[str, str], key: bytes, rows: dict[int, Row], timeout: float
) -> list[Finding]:
    """Run the all-reduce on all ranks, and add their speeds to their rows."""
    port, salt = free_port(), secrets.token_hex(16)
    for link in links.values():
        link.send(action="collective", port=port, salt=salt)
    answers = {0: _all_reduce(rank_env, channel.derived(key, "store", salt), port, timeout)}
    answers |= _replies(links, time.monotonic() + timeout + 30.0)
    findings = []
    for rank, row in rows.items():
        answer = answers.get(rank, {"error": "no answer"})
        row |= {name: answer[name] for name in SPEED_FIELDS if type(answer.get(name)) in (int, float)}
        if isinstance(answer.get("backend"), str):
            row["backend"] = channel.printable(answer["backend"])
        if "error" in answer:
            said = channel.printable(str(answer["error"]))
            text = f"the all-reduce failed on rank {rank} on {row['node']}: {said}"
            findings.append(Finding(text, row["node"] if len(answers) < len(rows) else None))
    return findings


SPEED_FIELDS = ("allreduce_GB_s", "link_GB_s")


def _all_reduce(rank_env: dict[str, str], key: bytes, port: int, timeout: float) -> dict[str, Any]:
    """The output of `multitrain.engine.bandwidth`, run in a separate process: this one needs no torch, and survives a hang."""
    arguments = [rank_env[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
    command = [sys.executable, "-m", "multitrain.engine.bandwidth", *arguments, str(port), str(timeout)]
    environment = {**os.environ, **rank_env, "MASTER_PORT": str(port), STORE_KEY: key.hex()}
    environment.pop(channel.SECRET_VARIABLE, None)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout + 30.0, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it did not end within {timeout + 30.0:g} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": child_error("its process", done.returncode, done.stderr, "see its log, and dmesg there")}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


# --------------------------------------------------------------------------------------------------------- this machine


def _run_locally(ranks: int, arguments: Sequence[str]) -> int:
    """Outside a job: run one process per GPU of this machine, and return the exit code of rank 0."""
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), channel.SECRET_VARIABLE: secrets.token_hex(32)}
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
