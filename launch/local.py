"""Run the ranks as processes of this machine, as SLURM and `srun` do on a cluster."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from launch.child import EXIT_TIMEOUT, AwakeClock, Heartbeat, prepare_process
from launch.rank import python_path, training
from multitrain import lease
from multitrain.cluster.exit_status import Exit, describe_exit, killed_for_memory
from multitrain.cluster.restarts import IN_PLACE
from multitrain.cluster.slurm import STOP_SIGNALS, free_port
from multitrain.cluster.supervised import PULSE_FD, STORE_KEY
from multitrain.config import ConfigError, RunConfig

INTERRUPTED = Exit.INTERRUPTED
"""Exit code of a rank, or of a run, that has saved and can be resumed."""

TAIL_LINES = 20
"""Lines of a failed rank's log that are shown."""


def report(text: str) -> None:
    """Print a line on standard error; a failure to write is ignored."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def run(
    folder: Path,
    config: RunConfig,
    arguments: tuple[str, ...] | None = None,
    *,
    report: Callable[[str], None] = report,
) -> int:
    """Run all ranks of the run in `folder` until they end, and show the output of rank 0.

    The first SIGINT or SIGTERM is passed on as SIGTERM, so that the ranks save and exit; a second one kills them. When a rank
    fails, the others are ended too, and all start again, at most `cluster.restarts_in_place` times.

    Args:
        arguments: arguments of Python for each rank; default: those that train the run.
        report: called with each line for the user.

    Returns:
        0 when finished; 75 when interrupted and resumable; else the exit code of the rank that failed first.

    Raises:
        ConfigError: fewer GPUs than ranks.
    """
    visible = devices(config.gpus)
    python = shlex.split(config.cluster.python) if config.cluster.python else [sys.executable]
    command = [*python, "-u", *(arguments or training(folder))]
    common = {
        "WORLD_SIZE": str(config.gpus),
        "LOCAL_WORLD_SIZE": str(config.gpus),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": str(config.cluster.cpus_per_gpu),
        "PYTHONFAULTHANDLER": "1",
        lease.START: f"process {os.getpid()} on {socket.gethostname()} at {time.time():.3f}",
        "PYTHONPATH": python_path(folder / "code"),
        **visible,
    }
    restarts = config.cluster.restarts_in_place
    with stop_requests() as requests:
        for attempt in range(restarts + 1):
            place = {**common, "MASTER_PORT": str(free_port()), IN_PLACE: str(attempt)}
            place[STORE_KEY] = secrets.token_hex(32)
            with _Ranks(command, folder, place, config.gpus) as ranks:
                code = _watch(ranks, requests, report)
            if requests or not Exit.restartable(code) or attempt == restarts:
                return code
            if not (folder / "code").is_dir():
                report(f"{folder} does not exist any more: move it back, or resume the run from its new path")
                return code
            report(f"restart {attempt + 1} of {restarts}, from the newest checkpoint")
    raise AssertionError("unreachable")


def rank_log(folder: Path, rank: int = 0) -> Path:
    """The log of one rank, appended to by every start."""
    return folder / "logs" / f"local-rank{rank}.log"


class _Ranks:
    """The processes of a run; they end with the context at the latest."""

    def __init__(self, command: Sequence[str], folder: Path, common: dict[str, str], count: int) -> None:
        self.logs = [rank_log(folder, rank) for rank in range(count)]
        self.logs[0].parent.mkdir(exist_ok=True)
        shown = self.logs[0].stat().st_size if self.logs[0].exists() else 0
        self._log_files: list[BinaryIO] = []  # the logs, open for reading: the run's folder may be moved away
        self.processes: list[subprocess.Popen[bytes]] = []
        self.reasons: dict[int, str] = {}
        """Why a rank was killed here, by rank: it did not respond."""
        self._clock = AwakeClock()
        self._heartbeats = [Heartbeat(self._clock) for _ in range(count)]
        self.killed_before = killed_for_memory()
        for rank, log in enumerate(self.logs):
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            heartbeat = self._heartbeats[rank]
            environment[PULSE_FD] = str(heartbeat.write_end)
            with open(log, "ab") as output:
                self._log_files.append(log.open("rb"))
                process = subprocess.Popen(
                    command,
                    cwd=folder / "code",
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches the launcher only, which passes it on once
                    preexec_fn=prepare_process,
                    pass_fds=(heartbeat.write_end,),
                )
            heartbeat.started()
            self.processes.append(process)
        self._log_files[0].seek(shown)

    def __enter__(self) -> _Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for heartbeat in self._heartbeats:
            heartbeat.close()
        for log in self._log_files:
            log.close()

    def check(self) -> None:
        """Kill a rank that does not respond. Call it often."""
        self._clock()
        for rank, (process, heartbeat) in enumerate(zip(self.processes, self._heartbeats)):
            if process.poll() is None and (reason := heartbeat.check(process)) is not None:
                self.reasons.setdefault(rank, reason)

    def codes(self) -> list[int | None]:
        """Exit codes as a shell would show them (128 + signal); None for a rank that runs."""
        codes = [p.poll() for p in self.processes]
        return [128 - c if c is not None and c < 0 else c for c in codes]

    def terminate(self) -> None:
        """Send SIGTERM to the ranks, not to their workers."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the ranks and all their child processes."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def show(self) -> None:
        """Copy what rank 0 wrote since the last call to the terminal."""
        if new := self._log_files[0].read():
            with contextlib.suppress(OSError):  # standard output may be a file on a full disk
                sys.stdout.buffer.write(new)
                sys.stdout.flush()

    def tail(self, rank: int) -> str:
        """The last lines of a rank's log."""
        log = self._log_files[rank]
        log.seek(max(0, log.seek(0, os.SEEK_END) - 20_000))
        lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:])


def _watch(ranks: _Ranks, requests: list[int], report: Callable[[str], None]) -> int:
    """Wait for the ranks, and return the exit code of the run."""
    passed_on = 0
    while None in (codes := ranks.codes()):
        ranks.show()
        ranks.check()
        failed = [rank for rank, code in enumerate(codes) if code is not None and not Exit.is_clean(code)]
        if failed:
            return _end_after_failure(ranks, failed[0], report)
        if len(requests) > passed_on:
            passed_on = len(requests)
            if passed_on > 1:
                report("killing all ranks now; the update in progress is lost, the last checkpoint stays")
                ranks.kill()
            else:
                report("stop requested: the ranks save and exit (a second signal kills them)")
                ranks.terminate()
        time.sleep(0.05)
    ranks.show()
    failed = [rank for rank, code in enumerate(codes) if code is not None and not Exit.is_clean(code)]
    if failed and passed_on > 1:
        return 128 + requests[0]
    if failed:
        return _end_after_failure(ranks, failed[0], report)
    return Exit.INTERRUPTED if Exit.INTERRUPTED in codes else Exit.FINISHED


def _end_after_failure(ranks: _Ranks, rank: int, report: Callable[[str], None]) -> int:
    code = ranks.codes()[rank] or 1
    deadline = time.monotonic() + EXIT_TIMEOUT
    ranks.terminate()
    while None in ranks.codes() and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks.kill()
    ranks.show()
    if rank != 0:  # rank 0's log is on the terminal already
        report(f"last lines of rank {rank}:\n{ranks.tail(rank)}")
    text = ranks.reasons.get(rank) or describe_exit(code, ranks.killed_before)
    report(f"rank {rank} {text}; its log: {ranks.logs[rank]}")
    return code


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list to which every stop signal, SIGINT and SIGHUP is appended while the context lasts."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    names = (*STOP_SIGNALS, signal.SIGINT, signal.SIGHUP)
    before = {name: signal.signal(name, note) for name in names}
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def devices(ranks: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES with one GPU per rank, the rank's own GPU at index LOCAL_RANK; empty on a machine without GPUs.

    Raises:
        ConfigError: there are GPUs, but fewer than ranks.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [g for g in visible.split(",") if g] if visible is not None else _installed_gpus()
    if not gpus:
        return {}
    if len(gpus) < ranks:
        raise ConfigError(
            f"gpus={ranks}, but there are {len(gpus)} here; use gpus={len(gpus)}, or set CUDA_VISIBLE_DEVICES= for CPU"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[:ranks])}


def _installed_gpus() -> list[str]:
    """The numbers of this machine's GPUs, as `nvidia-smi` lists them; none without it."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    count = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    return [str(i) for i in range(count)]
