"""Ranks as processes of this machine: what SLURM and `srun` do on a cluster, for one machine."""

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

from launch.child import PATIENCE, AwakeClock, Pulse, prepare
from launch.rank import python_path, training
from multitrain import lease
from multitrain.cluster.exit_status import Exit, explained, killed_for_memory
from multitrain.cluster.restarts import IN_PLACE
from multitrain.cluster.slurm import free_port
from multitrain.cluster.supervised import PULSE_FD, STORE_KEY
from multitrain.config import ConfigError, RunConfig

INTERRUPTED = Exit.INTERRUPTED
"""Exit code of a rank, and of a run, that saved and can be resumed."""

TAIL = 20
"""Lines of a failed rank's log that are shown."""


def say(text: str) -> None:
    """A line on standard error, as far as that takes one."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def run(
    folder: Path,
    config: RunConfig,
    arguments: tuple[str, ...] | None = None,
    *,
    say: Callable[[str], None] = say,
) -> int:
    """Run all ranks of the run in `folder` to their end, rank 0's output on the terminal.

    SIGINT or SIGTERM is passed on once, as SIGTERM, so that the ranks save and leave; a second one ends them hard. When a
    rank fails, the others are ended too, and all start again, `cluster.restarts_in_place` times at most.

    Args:
        arguments: of the Python that each rank becomes; training when not given.

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
                code = _watch(ranks, requests, say)
            if requests or not Exit.restartable(code) or attempt == restarts:
                return code
            if not (folder / "code").is_dir():
                say(f"{folder} is not there any more: bring it back, or resume the run from where it lies now")
                return code
            say(f"restart {attempt + 1} of {restarts}, from the newest checkpoint")
    raise AssertionError("unreachable")


def rank_log(folder: Path, rank: int = 0) -> Path:
    """The log of one rank, appended to by every start."""
    return folder / "logs" / f"local-rank{rank}.log"


class _Ranks:
    """The processes of a run; as a context manager, none of them outlives it."""

    def __init__(self, command: Sequence[str], folder: Path, common: dict[str, str], count: int) -> None:
        self.logs = [rank_log(folder, rank) for rank in range(count)]
        self.logs[0].parent.mkdir(exist_ok=True)
        shown = self.logs[0].stat().st_size if self.logs[0].exists() else 0
        self._written: list[BinaryIO] = []  # the logs, open for reading: the run's folder may be moved away
        self.processes: list[subprocess.Popen[bytes]] = []
        self.reasons: dict[int, str] = {}
        """Ranks that were killed here because they gave no sign of life."""
        self._clock = AwakeClock()
        self._pulses = [Pulse(self._clock) for _ in range(count)]
        self.killed_before = killed_for_memory()
        for rank, log in enumerate(self.logs):
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            pulse = self._pulses[rank]
            environment[PULSE_FD] = str(pulse.write_end)
            with open(log, "ab") as output:
                self._written.append(log.open("rb"))
                process = subprocess.Popen(
                    command,
                    cwd=folder / "code",
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches the launcher only, which passes it on once
                    preexec_fn=prepare,
                    pass_fds=(pulse.write_end,),
                )
            pulse.started()
            self.processes.append(process)
        self._written[0].seek(shown)

    def __enter__(self) -> _Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pulse in self._pulses:
            pulse.close()
        for log in self._written:
            log.close()

    def watch(self) -> None:
        """Kill a rank that gives no sign of life. To be called often."""
        self._clock()
        for rank, (process, pulse) in enumerate(zip(self.processes, self._pulses)):
            if process.poll() is None and (reason := pulse.watch(process)) is not None:
                self.reasons.setdefault(rank, reason)

    def codes(self) -> list[int | None]:
        """Exit codes as a shell would show them (128 + signal); None for a rank that runs."""
        codes = [p.poll() for p in self.processes]
        return [128 - c if c is not None and c < 0 else c for c in codes]

    def terminate(self) -> None:
        """SIGTERM to the ranks, not to their workers."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the ranks and everything they started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def show(self) -> None:
        """Copy what rank 0 wrote since the last call to the terminal."""
        if new := self._written[0].read():
            with contextlib.suppress(OSError):  # it may go to a file on a disk that is full
                sys.stdout.buffer.write(new)
                sys.stdout.flush()

    def tail(self, rank: int) -> str:
        """The last lines of a rank's log."""
        log = self._written[rank]
        log.seek(max(0, log.seek(0, os.SEEK_END) - 20_000))
        lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-TAIL:])


def _watch(ranks: _Ranks, requests: list[int], say: Callable[[str], None]) -> int:
    """Wait for the ranks; returns the exit code of the run."""
    passed_on = 0
    while None in (codes := ranks.codes()):
        ranks.show()
        ranks.watch()
        failed = [rank for rank, code in enumerate(codes) if code is not None and not Exit.in_order(code)]
        if failed:
            return _end_after_failure(ranks, failed[0], say)
        if len(requests) > passed_on:
            passed_on = len(requests)
            if passed_on > 1:
                say("ending all ranks now; the update in progress is lost, the last checkpoint stays")
                ranks.kill()
            else:
                say("asked to stop: the ranks save and leave (once more to end them hard)")
                ranks.terminate()
        time.sleep(0.05)
    ranks.show()
    failed = [rank for rank, code in enumerate(codes) if code is not None and not Exit.in_order(code)]
    if failed and passed_on > 1:
        return 128 + requests[0]
    if failed:
        return _end_after_failure(ranks, failed[0], say)
    return Exit.INTERRUPTED if Exit.INTERRUPTED in codes else Exit.FINISHED


def _end_after_failure(ranks: _Ranks, rank: int, say: Callable[[str], None]) -> int:
    code = ranks.codes()[rank] or 1
    deadline = time.monotonic() + PATIENCE
    ranks.terminate()
    while None in ranks.codes() and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks.kill()
    ranks.show()
    if rank != 0:  # rank 0's log is on the terminal already
        say(f"last lines of rank {rank}:\n{ranks.tail(rank)}")
    text = ranks.reasons.get(rank) or explained(code, ranks.killed_before)
    say(f"rank {rank} {text}; its log: {ranks.logs[rank]}")
    return code


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that grows by every SIGINT, SIGTERM or SIGHUP while the context lasts."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {name: signal.signal(name, note) for name in names}
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def devices(ranks: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES with one GPU a rank, the rank's own being number LOCAL_RANK; nothing on a machine without GPUs.

    Raises:
        ConfigError: some GPUs, but fewer than ranks.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [g for g in visible.split(",") if g] if visible is not None else _installed()
    if not gpus:
        return {}
    if len(gpus) < ranks:
        raise ConfigError(
            f"gpus={ranks}, but there are {len(gpus)} here; use gpus={len(gpus)}, or set CUDA_VISIBLE_DEVICES= for CPU"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[:ranks])}


def _installed() -> list[str]:
    """The numbers of this machine's GPUs, as `nvidia-smi` lists them; none without it."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    count = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    return [str(i) for i in range(count)]
