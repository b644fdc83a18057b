"""Around one rank: starts it again inside the allocation when a rank has died and its node lives.

python -m launch.supervisor RUN RESTARTS ARGUMENTS-OF-PYTHON …

One supervisor a rank, light (standard library only), started in the place of the rank. That of rank 0, the hub, listens on
the rendezvous port; the others keep a connection to it. Ranks are started when all supervisors have met. When one rank
dies, all are ended, and all start again with a new port, from the newest verified checkpoint; at most RESTARTS times, and
not after a stop signal, a mistake in the configuration, or the loss of a supervisor (its node is gone): then all end, and
the job goes back into the queue.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from multitrain.monitor.exits import explained, killed_for_memory
from multitrain.monitor.restarts import IN_PLACE
from multitrain.monitor.slurm import PLACE, STOP_SIGNALS, block_stop_signals, free_port, job_id, rank_environment

IN_ORDER = (0, 75)
"""Exit codes of a rank that has finished, or saved and left."""
FINAL = (2, 3)
"""Exit codes that no restart mends: a mistake in the configuration, a run that gave up."""
PATIENCE = 5.0
"""Seconds that ranks have to end by themselves, with their stacks in their logs, after another has died."""
REJOIN = 60.0
"""Seconds within which all ranks must have ended, to be started again."""
JOIN = 300.0
"""Seconds within which all supervisors must have met."""
TICK = 0.1

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def restartable(code: int) -> bool:
    """Whether a rank that ended with `code` (negative: by a signal) may be started again at once."""
    return code not in IN_ORDER and code not in FINAL


class Link:
    """A connection that carries one JSON object a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._buffer = b""

    def send(self, **message: Any) -> None:
        """Send, unless the other side is gone: that is found when receiving."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has arrived; None when the other side is gone."""
        try:
            data = self.connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            return None
        *whole, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in whole]


class Child:
    """The rank's process, of which there is at most one."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._kill_at: float | None = None
        self._killed_before: int | None = None
        self.stop: int | None = None
        """The first stop signal that came, which ranks started later are told."""

    def start(self, attempt: int, port: int) -> None:
        """Start the rank; it rendezvous at `port`."""
        environment = self._environment | {"MASTER_PORT": str(port), IN_PLACE: str(attempt)}
        self._kill_at = None
        self._killed_before = killed_for_memory()
        self._process = subprocess.Popen(self._command, env=environment, preexec_fn=_die_with_parent)
        if self.stop is not None:
            self._process.send_signal(self.stop)

    def end(self, patience: float = PATIENCE) -> None:
        """Kill the rank in `patience` seconds, unless it ends before."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + patience

    def ended(self) -> int | None:
        """Its exit code, once, when it has ended."""
        if self._process is None:
            return None
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._process.kill()
        code = self._process.poll()
        if code is not None:
            self._process = None
        return code

    def fate(self, code: int) -> str:
        """What its exit code means, as its own node knows it."""
        return explained(code, self._killed_before)

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None


class Hub:
    """Decides for all ranks; lives in rank 0's supervisor."""

    def __init__(self, size: int, restarts: int) -> None:
        self._size = size
        self._restarts = restarts
        self.attempt = 0
        self._ended: set[int] = set()
        self._in_order: set[int] = set()
        self._deadline: float | None = None
        self._over = False

    def heard(self, rank: int, code: int, stopping: bool, fate: str) -> dict[str, Any] | None:
        """The rank has ended with `code`, in words `fate`; what all are to be told."""
        self._ended.add(rank)
        if code in IN_ORDER:
            self._in_order.add(rank)
        died, ending = code not in IN_ORDER, self._deadline is not None
        last = self.attempt >= self._restarts or stopping or bool(self._in_order) or not restartable(code)
        if last if died else ending:
            return self.give_up(f"rank {rank} {fate}")
        if len(self._ended) == self._size and not self._in_order and not self._over:
            self.attempt += 1
            self._ended, self._deadline = set(), None
            return {"do": "start", "attempt": self.attempt, "port": free_port()}
        if died and not ending:
            self._deadline = time.monotonic() + REJOIN
            again = f"restart {self.attempt + 1} of {self._restarts} inside the allocation"
            return {"do": "stop", "why": f"rank {rank} {fate}; {again}"}
        return None

    def lost(self, rank: int) -> dict[str, Any] | None:
        """The rank's supervisor is gone."""
        if rank in self._in_order or (self._over and rank in self._ended):
            return None
        self._ended.add(rank)
        return self.give_up(f"the supervisor of rank {rank} is gone")

    def overdue(self) -> dict[str, Any] | None:
        """What to tell when the ranks have not ended in time."""
        if self._deadline is None or time.monotonic() < self._deadline:
            return None
        return self.give_up(f"not all ranks ended within {REJOIN:.0f} s")

    def give_up(self, why: str) -> dict[str, Any] | None:
        """End all, once."""
        self._deadline = None
        if self._over:
            return None
        self._over = True
        return {"do": "end", "why": why}

    @property
    def done(self) -> bool:
        """Whether all ranks have ended, for good."""
        return len(self._ended) == self._size and (self._over or len(self._in_order) == self._size)


class Supervisor:
    """One rank's supervisor."""

    def __init__(self, place: Mapping[str, str], restarts: int, child: Child) -> None:
        self.rank, self.size = int(place["RANK"]), int(place["WORLD_SIZE"])
        self._place = place
        self._child = child
        self._hub = Hub(self.size, restarts) if self.rank == 0 else None
        self._links: dict[int, Link] = {}  # rank 0: by rank; others: to rank 0 only
        self._selector = selectors.DefaultSelector()
        self._code: int | None = None
        self._ending = False

    def run(self) -> int:
        """Supervise to the end; the exit code of the rank."""
        self._meet()
        if self._hub is not None:
            self._tell({"do": "start", "attempt": 0, "port": free_port()})
        while not self._finished():
            self._note_signals()
            for rank, messages in self._arrived():
                self._heard(rank, messages)
            code = self._child.ended()
            if code is not None:
                self._own_ended(code)
            if self._hub is not None:
                self._tell(self._hub.overdue())
        return _shell_code(self._code)

    def _finished(self) -> bool:
        if self._hub is not None:
            return self._hub.done and not self._child.running
        return not self._child.running and self._code is not None and (self._ending or self._code in IN_ORDER)

    def _own_ended(self, code: int) -> None:
        self._code = code
        stopping = self._child.stop is not None
        if self._hub is not None:
            self._tell(self._hub.heard(0, code, stopping, self._child.fate(code)))
        elif 0 in self._links:  # else rank 0's supervisor is gone, and this one ends as well
            self._links[0].send(code=code, stopping=stopping, fate=self._child.fate(code))

    def _heard(self, rank: int, messages: list[dict[str, Any]] | None) -> None:
        if messages is None:
            self._selector.unregister(self._links.pop(rank).connection)
            if self._hub is not None:
                self._tell(self._hub.lost(rank))
            elif not self._ending:
                self._obey({"do": "end", "why": "the supervisor of rank 0 is gone"})
            return
        for message in messages:
            if self._hub is not None:
                stopping = message["stopping"] or self._child.stop is not None
                self._tell(self._hub.heard(rank, message["code"], stopping, message["fate"]))
            else:
                self._obey(message)

    def _tell(self, message: dict[str, Any] | None) -> None:
        """From the hub to all, itself included."""
        if message is None:
            return
        for link in self._links.values():
            link.send(**message)
        self._obey(message)

    def _obey(self, message: dict[str, Any]) -> None:
        if message["do"] == "start":
            self._code = None
            self._child.start(message["attempt"], message["port"])
            return
        if self.rank == 0 or "gone" in message["why"]:
            print(f"multitrain: rank {self.rank}: {message['why']}", file=sys.stderr, flush=True)
        self._child.end()
        if message["do"] == "end":
            self._ending = True
            self._code = 1 if self._code is None else self._code

    def _note_signals(self) -> None:
        """Stop signals are blocked; SLURM sends them to the rank as well, so there is no need to pass them on."""
        while (found := signal.sigtimedwait(STOP_SIGNALS, 0)) is not None:
            self._child.stop = self._child.stop or found.si_signo

    def _arrived(self) -> Iterator[tuple[int, list[dict[str, Any]] | None]]:
        if not self._links:
            time.sleep(TICK)
            return
        for key, _ in self._selector.select(TICK):
            yield key.data, self._links[key.data].receive()

    def _add(self, rank: int, link: Link) -> None:
        self._links[rank] = link
        self._selector.register(link.connection, selectors.EVENT_READ, rank)

    def _meet(self) -> None:
        """Connect all supervisors.

        Raises:
            SystemExit: not all have come in time.
        """
        if self.size == 1:
            return
        port = int(self._place["MASTER_PORT"])
        deadline = time.monotonic() + JOIN
        hello = {"rank": self.rank, "job": job_id()}
        if self._hub is None:
            self._add(0, Link(_connect(self._place["MASTER_ADDR"], port, deadline)))
            self._links[0].send(**hello)
            return
        with socket.create_server(("", port), backlog=self.size) as server:
            while len(self._links) < self.size - 1:
                server.settimeout(max(0.0, deadline - time.monotonic()) or 0.001)
                try:
                    connection, _ = server.accept()
                    connection.settimeout(10.0)
                    link = Link(connection)
                    message = (link.receive() or [{}])[0]
                except (TimeoutError, ValueError):
                    if time.monotonic() >= deadline:
                        sys.exit(
                            f"multitrain: only {len(self._links) + 1} of {self.size} ranks came within {JOIN:.0f} s"
                        )
                    continue
                if message.get("job") == hello["job"] and message.get("rank") not in (None, *self._links):
                    self._add(int(message["rank"]), link)


def _connect(address: str, port: int, deadline: float) -> socket.socket:
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=10.0)
            connection.settimeout(30.0)
            return connection
        except OSError as error:
            if time.monotonic() >= deadline:
                sys.exit(f"multitrain: rank 0 at {address}:{port} did not answer within {JOIN:.0f} s ({error})")
            time.sleep(0.2)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _shell_code(code: int | None) -> int:
    return 1 if code is None else 128 - code if code < 0 else code


def main(arguments: list[str] | None = None) -> int:
    """Supervise the rank that the arguments name, at the place that the environment gives; its exit code."""
    _, restarts, *rest = sys.argv[1:] if arguments is None else arguments
    command = [sys.executable, "-u", *rest]
    place = rank_environment()
    inherited = {k: v for k, v in os.environ.items() if k not in PLACE}
    if int(restarts) == 0:
        os.execve(command[0], command, {**inherited, **place})
    block_stop_signals()  # in the rank too, which unblocks them once its handlers stand
    return Supervisor(place, int(restarts), Child(command, {**inherited, **place})).run()


if __name__ == "__main__":
    sys.exit(main())
