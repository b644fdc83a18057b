"""Run the ranks on several machines without SLURM: `cluster=hosts`.

The user types the same command on every machine, each with its own `cluster.node`; or once, with `cluster.hosts`. In that case
`ssh` starts, on each of these machines,

python -m launch.hosts RUN NODE ADDRESS:PORT

Each machine runs one supervisor per rank (:mod:`launch.supervisor`). Ranks that die are restarted in place. When a machine is
lost, the others wait until it is back. A stop request on any machine saves and stops the run on all of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from launch import channel
from launch.child import die_with_parent
from launch.local import devices, report, stop_requests
from launch.rank import python_path, supervised, training
from launch.supervisor import BLOCKED_SIGNALS, HUB_STATUS_VARIABLE, JOIN_TIMEOUT_VARIABLE
from multitrain import lease
from multitrain.cluster.exit_status import Exit
from multitrain.config import ConfigError, RunConfig, load

RENDEZVOUS_TIMEOUT = 86400.0
"""Seconds that a machine waits for the others."""
RETRY_SECONDS = 10.0
"""Seconds until `ssh` is tried again for a machine that it cannot reach; also the least time between two starts of the ranks."""
SSH_FAILED = 255
"""Exit status of `ssh` when the connection failed or was lost."""
FIRST_PORT, PORTS = 20000, 12000


def run(folder: Path, config: RunConfig) -> int:
    """Run the ranks of this machine, or with `cluster.hosts` those of all machines, until the run in `folder` ends.

    The first SIGINT, SIGTERM or SIGHUP makes the ranks of all machines save and exit; a second one kills those of this machine.

    Returns:
        0 when finished; 75 when interrupted and resumable; else the exit status of the rank that failed.

    Raises:
        ConfigError: fewer GPUs than ranks, or a secret that other users can read.
    """
    with stop_requests() as requests:
        if config.cluster.hosts and config.cluster.node is None:
            return _run_all_nodes(folder, config, requests)
        return _run_node(folder, config, config.cluster.node or 0, rendezvous(folder, config), requests)


def rendezvous(folder: Path, config: RunConfig) -> str:
    """The ADDRESS:PORT of rank 0: `cluster.rendezvous`, else the first host and a port derived from the run's path."""
    if config.cluster.rendezvous is not None:
        return config.cluster.rendezvous
    port = FIRST_PORT + int.from_bytes(channel.derived(b"", "port", str(folder))[:4], "big") % PORTS
    return f"{config.cluster.hosts[0].rpartition('@')[2]}:{port}"


def rank_log(folder: Path, rank: int) -> Path:
    """The log of one rank, appended to by every start."""
    return folder / "logs" / f"hosts-rank{rank}.log"


# --------------------------------------------------------------------------------------------------------- this machine


def _run_node(folder: Path, config: RunConfig, node: int, where: str, requests: list[int]) -> int:
    """Run the ranks of machine `node`, restarting them up to `cluster.max_restarts` times; the exit status."""
    try:
        channel.secret(folder)  # report an error once here, instead of in every supervisor
    except channel.ChannelError as error:
        raise ConfigError(str(error)) from None
    for attempt in range(config.cluster.max_restarts + 1):
        if config.nodes > 1:
            report(f"machine {node} of {config.nodes}: waiting for all ranks to connect at {where} (Ctrl-C stops)")
        begun = time.monotonic()
        with _Supervisors(folder, config, node, where) as ranks:
            status = _watch(ranks, requests)
        while Exit.restartable(status) and not requests and time.monotonic() - begun < RETRY_SECONDS:
            time.sleep(0.1)
        if requests or not Exit.restartable(status):
            return status
        if attempt < config.cluster.max_restarts:
            report(
                f"ranks ended with status {status}; all restart from the newest checkpoint once all machines are connected"
            )
    report(
        f"this was start {config.cluster.max_restarts + 1} (cluster.max_restarts={config.cluster.max_restarts}); see {folder}/logs"
    )
    return status


class _Supervisors:
    """The supervisors of this machine's ranks; they end with the context at the latest."""

    def __init__(self, folder: Path, config: RunConfig, node: int, where: str) -> None:
        address, _, port = where.rpartition(":")
        address = address.strip("[]")
        ranks = range(node * config.gpus, (node + 1) * config.gpus)
        (folder / "logs").mkdir(exist_ok=True)
        self.log = rank_log(folder, ranks[0])
        self._shown = self.log.stat().st_size if self.log.exists() else 0
        python = shlex.split(config.cluster.python) if config.cluster.python else [sys.executable]
        command = [*python, "-u", *supervised(folder, training(folder), config.cluster.restarts_in_place)]
        common = {
            **os.environ,
            "WORLD_SIZE": str(config.world_size),
            "LOCAL_WORLD_SIZE": str(config.gpus),
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": str(config.cluster.cpus_per_gpu),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": python_path(folder / "code"),
            JOIN_TIMEOUT_VARIABLE: str(RENDEZVOUS_TIMEOUT),
            HUB_STATUS_VARIABLE: "1",
            lease.START: f"hosts {where}",
            **devices(config.gpus),
        }
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if (found := interface(address)) is not None:
                common.setdefault(name, found)
        self._processes = []
        for local, rank in enumerate(ranks):
            with open(rank_log(folder, rank), "ab") as output:
                process = subprocess.Popen(
                    command,
                    cwd=folder / "code",
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(local)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_prepare_process,
                )
            self._processes.append(process)

    def __enter__(self) -> _Supervisors:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def status(self) -> int | None:
        """The joint exit status, once all have ended: the first failure, else 75 if one was interrupted, else 0."""
        codes = [process.poll() for process in self._processes]
        ended = [128 - code if code < 0 else code for code in codes if code is not None]
        if len(ended) < len(codes):
            return None
        failed = [code for code in ended if not Exit.is_clean(code)]
        return failed[0] if failed else max(ended)

    def signal(self, number: int) -> None:
        """Send a signal to the supervisors, the ranks and their child processes, as SLURM does."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)

    def show(self) -> None:
        """Copy what the first rank of this machine wrote since the last call to the terminal."""
        with open(self.log, "rb") as log:
            log.seek(self._shown)
            new = log.read()
        if new:
            self._shown += len(new)
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.buffer.write(new)
                sys.stdout.flush()


def _prepare_process() -> None:
    """In a new process: end with the parent; block the signals that must not end it while it still imports."""
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)


def _watch(ranks: _Supervisors, requests: list[int]) -> int:
    passed_on = 0
    while (status := ranks.status()) is None:
        ranks.show()
        if len(requests) > passed_on:
            passed_on = len(requests)
            if passed_on > 1:
                report(
                    "killing the ranks of this machine now; the update in progress is lost, the last checkpoint stays"
                )
            else:
                report(
                    "stop requested: the ranks of all machines save and exit (a second signal kills those of this machine)"
                )
            ranks.signal(signal.SIGKILL if passed_on > 1 else signal.SIGTERM)
        time.sleep(0.1)
    ranks.show()
    return status


def interface(address: str) -> str | None:
    """The network interface through which this machine reaches `address`; None when it cannot be determined (IPv6)."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request_buffer = struct.pack("256s", name.encode()[:15])
                if fcntl.ioctl(probe.fileno(), 0x8915, request_buffer)[20:24] == own:  # SIOCGIFADDR
                    return name
        if own[0] == 127:
            return "lo"
    return None


# ---------------------------------------------------------------------------------------------------------- by ssh


def _run_all_nodes(folder: Path, config: RunConfig, requests: list[int]) -> int:
    """Run the ranks of all machines through `ssh`; their output is shown after their names."""
    where = rendezvous(folder, config)
    machines = [_Remote(folder, config, node, host, where) for node, host in enumerate(config.cluster.hosts)]
    passed_on = 0
    try:
        while any(machine.status is None for machine in machines):
            if len(requests) > passed_on:
                passed_on = len(requests)
                report(
                    "stop requested: the ranks of all machines save and exit"
                    if passed_on == 1
                    else "killing all ranks now"
                )
                for machine in machines:
                    machine.send("stop" if passed_on == 1 else "kill")
            for machine in machines:
                machine.poll(retry=not requests)
            time.sleep(0.1)
    finally:
        for machine in machines:
            machine.disconnect()
    statuses = [machine.status for machine in machines if machine.status is not None]
    failed = [status for status in statuses if not Exit.is_clean(status)]
    return failed[0] if failed else max(statuses)


class _Remote:
    """One machine, reached through `ssh`. The end of its standard input also stops it."""

    def __init__(self, folder: Path, config: RunConfig, node: int, host: str, where: str) -> None:
        python = config.cluster.python or shlex.quote(sys.executable)
        code, run_ = shlex.quote(str(folder / "code")), shlex.quote(str(folder))
        missing = shlex.quote(
            f"error: there is no {folder}/code on {host}; cluster.hosts needs a folder that all machines share"
        )
        self._line = (
            f"cd {code} 2>/dev/null || {{ echo {missing} >&2; exit {int(Exit.MISTAKE)}; }}; "
            f"PYTHONPATH={code} exec {python} -u -m launch.hosts {run_} {node} {shlex.quote(where)}"
        )
        self._host = host
        self._retries_left = config.cluster.max_restarts
        self._retry_at: float | None = None
        self.status: int | None = None
        self._start()

    def _start(self) -> None:
        command = ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "--", self._host, self._line]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the launcher only, which passes it on
        )
        assert self._process.stdout is not None
        self._copy = threading.Thread(target=_copy, args=(self._process.stdout, self._host), daemon=True)
        self._copy.start()

    def send(self, word: str) -> None:
        """Send `stop` or `kill`."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(f"{word}\n".encode())
            self._process.stdin.flush()

    def poll(self, *, retry: bool) -> None:
        """Record the exit status of a machine that has ended; with `retry`, connect again to one that was lost."""
        if self.status is not None:
            return
        if self._retry_at is not None:
            if not retry:
                self.status = int(Exit.FAILED)
            elif time.monotonic() >= self._retry_at:
                self._retry_at = None
                self._start()
            return
        code = self._process.poll()
        if code == SSH_FAILED and retry and self._retries_left > 0:
            self._retries_left -= 1
            self._retry_at = time.monotonic() + RETRY_SECONDS
            report(f"{self._host} cannot be reached; trying again in {RETRY_SECONDS:.0f} s")
        elif code is not None:
            self._copy.join(5.0)
            self.status = 128 - code if code < 0 else code

    def disconnect(self) -> None:
        """End the connection."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()


def _copy(lines: IO[bytes], host: str) -> None:
    for line in lines:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(f"[{host}] {channel.printable(line.decode(errors='replace').rstrip(), 4000)}\n")
            sys.stdout.flush()


@contextlib.contextmanager
def _stop_requests_from_stdin(requests: list[int]) -> Iterator[None]:
    """While the context lasts, turn the lines that the launching machine sends on standard input into stop requests."""

    def read() -> None:
        for line in sys.stdin:
            requests.extend([signal.SIGTERM] * (2 if line.strip() == "kill" else 1))
        requests.append(signal.SIGHUP)

    threading.Thread(target=read, daemon=True).start()
    yield


def main(arguments: Sequence[str] | None = None, exit_: Callable[[int], None] = os._exit) -> None:
    """Run the ranks of one machine; `ssh` calls this there."""
    folder, node, where = sys.argv[1:] if arguments is None else arguments
    try:
        with stop_requests() as requests, _stop_requests_from_stdin(requests):
            status = _run_node(Path(folder), load(Path(folder)), int(node), where, requests)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        status = int(Exit.MISTAKE)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    exit_(status)  # a thread still reads standard input


if __name__ == "__main__":
    main()
