"""Supervisor of one rank: restarts it within the allocation after a rank has died while its node still works.

python -m launch.supervisor RUN RESTARTS ARGUMENTS-OF-PYTHON …

Each rank has one light supervisor (standard library only). The supervisor of rank 0, the hub, listens on the rendezvous port; the
others keep an authenticated connection to it (:mod:`launch.channel`). The ranks start once all supervisors are connected. When a
rank dies, the supervisors end all ranks and start them again, with a new port, from the newest verified checkpoint. They do so at
most RESTARTS times, and not after a stop signal, an error in the configuration, or the loss of a supervisor (its node is lost).
Then all end, and the job is requeued. The hub writes the failed rank and its node to the run's events.

After a warning of the time limit the ranks have two thirds of the lead time to save and exit. A rank that still runs then (it
hangs, is stopped, or still imports) is killed, so that the step ends before the limit. The lead time in seconds comes from
MULTITRAIN_LEAD_TIME, else from the run's configuration.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch import channel
from launch.channel import Channel, ChannelError, Server
from launch.child import AwakeClock, Child
from launch.hub import Hub
from multitrain import lease
from multitrain.cluster import slurm
from multitrain.cluster.exit_status import Exit
from multitrain.cluster.slurm import DIST_ENV_VARS, STOP_SIGNALS, job_id, rank_environment, restart_count
from multitrain.cluster.supervised import STORE_FD, STORE_KEY, listen

JOIN_TIMEOUT = 300.0
"""Seconds within which all supervisors must be connected."""
JOIN_TIMEOUT_VARIABLE = "MULTITRAIN_JOIN"
"""Environment variable: overrides JOIN_TIMEOUT."""
HUB_STATUS_VARIABLE = "MULTITRAIN_HUB_STATUS"
"""Environment variable: if it is set, every supervisor exits with the status for which the hub ended all ranks, so that all machines
decide alike whether to start again."""
WAIT_NOTICE_SECONDS = 30.0
"""Seconds after which a rank logs that it still waits for rank 0."""
POLL_SECONDS = 0.1
EXIT_SIGNALS = (*STOP_SIGNALS, signal.SIGINT)
"""Signals that stop a run with a checkpoint. They reach the rank as well."""
BLOCKED_SIGNALS = (*EXIT_SIGNALS, signal.SIGHUP)
"""Signals that do not end a supervisor."""
SAVE_FRACTION = 2 / 3
"""Fraction of the lead time that ranks have to save and exit."""
KILL_MARGIN_SECONDS = 10
"""Seconds before the end of a grace period at which a rank that still runs is killed."""
MAX_FAILURE_EVENTS = 8
"""Limit of ranks of one start whose failure is written to the events."""


class Supervisor:
    """The supervisor of one rank.

    Args:
        run: the run's folder.
        rank_env: RANK, WORLD_SIZE, … of the rank (:func:`multitrain.cluster.slurm.rank_environment`).
        restarts: limit of restarts within the allocation.
        child: the rank's process.
        clock: time that this process was awake, in seconds.
        key: with which the supervisors authenticate each other.
    """

    def __init__(
        self, run: Path, rank_env: Mapping[str, str], restarts: int, child: Child, clock: AwakeClock, key: bytes
    ) -> None:
        self.rank, self.size = int(rank_env["RANK"]), int(rank_env["WORLD_SIZE"])
        self._run = run
        self._rank_env = rank_env
        self._child = child
        self._clock = clock
        self._key = key
        self._single_machine = rank_env.get("LOCAL_WORLD_SIZE") == rank_env["WORLD_SIZE"]
        self._hub = Hub(self.size, restarts, clock) if self.rank == 0 else None
        self._server: Server | None = None
        self._link: Channel | None = None
        self._nodes = {self.rank: _node()}
        self._code: int | None = None
        self._status: int | None = None  # exit status for which the hub ended all ranks
        self._ending = False
        self._stopping = False  # at the hub: whether any rank received a stop signal
        self._failures = 0
        self._notified = False
        self._grace: list[int] = []

    def supervise(self) -> int:
        """Supervise the rank until it ends for good, and return its exit code.

        Raises:
            ChannelError: not all supervisors connected in time.
        """
        if not self._rendezvous():
            return Exit.INTERRUPTED
        if self._hub is not None:
            self._broadcast({"action": "start", "attempt": 0})
        while not self._finished():
            self._clock()
            self._handle_signals()
            for rank, message in self._messages():
                self._on_message(rank, message)
            code = self._child.ended()
            if code is not None:
                self._on_own_rank_ended(code)
            if self._hub is not None:
                self._broadcast(self._hub.check_timeout())
                if self._grace:
                    self._broadcast({"action": "exit_within", "seconds": self._grace.pop()})
        return _shell_code(self._code if self._status is None else self._status)

    def _finished(self) -> bool:
        if self._hub is not None:
            return self._hub.done and not self._child.running
        ended = self._code is not None and (self._ending or Exit.is_clean(self._code))
        return not self._child.running and ended

    # ------------------------------------------------------------------------------------------------------- messages

    def _on_own_rank_ended(self, code: int) -> None:
        self._code = code
        report = {"code": code, "stopping": self._child.stop is not None, "text": self._child.text(code)}
        report["own"] = not self._child.ended_by_us
        if self._hub is not None:
            self._on_rank_ended(0, report)
        elif self._link is not None:  # otherwise the hub is lost, and this supervisor ends as well
            self._link.send(**report)

    def _on_message(self, rank: int, message: channel.Message | None) -> None:
        """Handle a message of the supervisor of rank `rank`; None: its connection is closed."""
        if message is None and self._hub is None:
            self._link = None
            if not self._ending:
                self._execute({"action": "shut_down", "reason": "the supervisor of rank 0 is gone"})
        elif message is None:
            self._on_disconnect(rank)
        elif self._hub is None:
            try:
                self._execute(message)
            except ValueError as error:
                self._execute({"action": "shut_down", "reason": f"rank 0 sent an invalid message: {error}"})
        else:
            self._on_rank_ended(rank, message)

    def _on_disconnect(self, rank: int) -> None:
        assert self._hub is not None
        if not self._hub.finished(rank):
            self._record(rank, None, f"the supervisor of rank {rank} is gone")
        self._broadcast(self._hub.supervisor_lost(rank))

    def _on_rank_ended(self, rank: int, report: channel.Message) -> None:
        assert self._hub is not None
        self._stopping = self._stopping or report.get("stopping") is True or self._child.stop is not None
        if report.get("action") == "interrupted":  # its rank gets the signal as soon as it runs
            return
        try:
            code = channel.integer(report, "code", -128, 255)
            text = channel.text(report, "text")
        except ValueError as error:
            print(f"multitrain: rank {rank} sent an invalid message: {error}", file=sys.stderr, flush=True)
            return
        if not Exit.is_clean(code) and report.get("own") is True:
            self._record(rank, code, text)
        self._broadcast(self._hub.rank_ended(rank, code, self._stopping, text))

    def _broadcast(self, message: dict[str, Any] | None) -> None:
        """Send a message of the hub to all supervisors, and execute it here."""
        if message is None:
            return
        listening = None
        if message["action"] == "start":
            self._failures = 0
            listening = listen(self._single_machine, 0)
            message |= {"port": listening.getsockname()[1], "salt": secrets.token_hex(16), "start": self._start_name()}
        if self._server is not None:
            for link in list(self._server.channels.values()):
                link.send(**message)
        self._execute(message, listening)
        if listening is not None:
            listening.close()

    def _execute(self, message: channel.Message, listening: socket.socket | None = None) -> None:
        """Execute a message of the hub.

        Args:
            listening: at rank 0, the socket on which it serves torch's store.

        Raises:
            ValueError: the message is not valid.
        """
        action = message.get("action")
        if action == "exit_within":
            self._child.exit_within(
                max(0, channel.integer(message, "seconds", 0, 1 << 20) - KILL_MARGIN_SECONDS), "SIGTERM"
            )
        elif action == "interrupted":
            self._ending, self._code = True, int(Exit.INTERRUPTED)
        elif action == channel.RANK_TAKEN:
            self._log(f"another process already is rank {self.rank} of this start: was the same command typed twice?")
            self._ending, self._code = True, int(Exit.FAILED)
        elif action == "start" and not self._child.running:
            self._code = None
            attempt = channel.integer(message, "attempt", 0, 1 << 20)
            self._child.start(attempt, self._environment(message, listening), _fds(listening))
        elif action in ("stop_ranks", "shut_down"):
            reason = channel.text(message, "reason")
            if self.rank == 0 or "gone" in reason:
                print(f"multitrain: rank {self.rank}: {reason}", file=sys.stderr, flush=True)
            self._child.end()
            if action == "shut_down":
                self._ending = True
                self._code = int(Exit.FAILED) if self._code is None else self._code
                if os.environ.get(HUB_STATUS_VARIABLE):
                    self._status = channel.integer(message, "status", -128, 255) if "status" in message else Exit.FAILED

    def _environment(self, message: channel.Message, listening: socket.socket | None) -> dict[str, str]:
        found = {
            "MASTER_PORT": str(channel.integer(message, "port", 1, 65535)),
            STORE_KEY: channel.derived(self._key, "store", channel.text(message, "salt")).hex(),
            lease.START: channel.text(message, "start"),
        }
        if self._single_machine:
            found["MASTER_ADDR"] = "127.0.0.1"
        if listening is not None:
            found[STORE_FD] = str(listening.fileno())
        return found

    def _start_name(self) -> str:
        """The name of this start, for all ranks and for the events that this process writes."""
        name = lease.start_name(job_id(), restart_count())
        os.environ[lease.START] = name
        return name

    # --------------------------------------------------------------------------------------------------------- signals

    def _handle_signals(self) -> None:
        """Handle pending stop signals, which are blocked. Without SLURM they are passed on to the rank. SLURM sends them to the rank
        itself, where a second one would end its wait for the end of the job.
        """
        for number in _pending_signals():
            if job_id() is None:
                self._child.pass_on(number)
            if self._child.stop is None and not self._child.running and self._link is not None:
                self._link.send(action="interrupted", stopping=True)  # rank 0 may still wait for others
            self._child.stop = self._child.stop or number
            if number in (signal.SIGUSR1, signal.SIGUSR2):
                self._child.exit_within(
                    SAVE_FRACTION * lead_time(self._run), f"the warning of the time limit ({_name(number)})"
                )
            elif number == signal.SIGTERM and self._hub is not None and job_id() is not None:
                threading.Thread(target=self._query_grace, args=(time.monotonic(),), daemon=True).start()

    def _query_grace(self, since: float) -> None:
        """Ask SLURM how long it waits between SIGTERM and SIGKILL; unknown for a partition whose jobs are not preempted."""
        seconds = slurm.grace()
        if seconds is not None:
            self._grace.append(max(0, int(seconds - (time.monotonic() - since))))

    def _record(self, rank: int, code: int | None, text: str) -> None:
        """Write the failure of a rank, with its node, to the run's events."""
        self._failures += 1
        if self._failures > MAX_FAILURE_EVENTS:
            return
        from launch.events import record  # reading events needs the schema of configurations; most starts need none

        record(
            self._run,
            "rank_failed",
            rank=rank,
            node=self._nodes.get(rank),
            exit_status=code,
            text=text,
            first=self._failures == 1,
        )

    # ------------------------------------------------------------------------------------------------------- connections

    def _messages(self) -> Iterator[tuple[int, channel.Message | None]]:
        if self._server is not None and self._server.channels:
            yield from self._server.poll(POLL_SECONDS)
        elif self._link is not None:
            messages = self._link.read(POLL_SECONDS)
            yield from ((0, message) for message in ([None] if messages is None else messages))
        else:
            time.sleep(POLL_SECONDS)

    def _rendezvous(self) -> bool:
        """Connect all supervisors; False if a stop signal arrived meanwhile.

        Raises:
            ChannelError: not all supervisors connected in time.
        """
        if self.size == 1:
            return True
        seconds = float(os.environ.get(JOIN_TIMEOUT_VARIABLE) or JOIN_TIMEOUT)
        try:
            if self._hub is not None:
                return self._gather(seconds)
            address = "127.0.0.1" if self._single_machine else self._rank_env["MASTER_ADDR"]
            hello = {"rank": self.rank, "node": _node()}
            port, deadline = int(self._rank_env["MASTER_PORT"]), time.monotonic() + seconds
            begun = time.monotonic()
            self._link = channel.connect(
                self._key, address, port, deadline, hello, pause=lambda: self._pause(begun, f"{address}:{port}")
            )
        except _StopRequested:
            return False
        return True

    def _pause(self, begun: float, where: str) -> None:
        self._handle_signals()
        if self._child.stop is not None:
            raise _StopRequested
        if not self._notified and time.monotonic() - begun > WAIT_NOTICE_SECONDS:
            self._notified = True
            held = lease.newest(self._run)
            holder = f"; the run is trained by {held.holder}" if held and held.holder and not held.over else ""
            self._log(f"still waiting for rank 0 at {where}{holder}")
        time.sleep(0.05)

    def _log(self, text: str) -> None:
        print(f"multitrain: rank {self.rank}: {text}", file=sys.stderr, flush=True)

    def _gather(self, seconds: float) -> bool:
        """At the hub: wait until all other supervisors are connected; False if a stop signal arrived meanwhile."""
        self._server = Server(self._key, self.size, int(self._rank_env["MASTER_PORT"]), loopback=self._single_machine)
        begun = self._clock()
        while len(self._server.channels) < self.size - 1:
            for rank, message in self._server.poll(POLL_SECONDS):
                if message is not None and "node" in message:
                    self._nodes[rank] = channel.text(message, "node", 80)
                elif message is not None and message.get("stopping") is True:
                    self._child.stop = self._child.stop or int(signal.SIGTERM)
            self._handle_signals()
            if self._child.stop is not None:
                self._broadcast({"action": "interrupted"})
                return False
            if self._clock() - begun >= seconds:
                missing = sorted(set(range(1, self.size)) - set(self._server.channels))
                raise ChannelError(
                    f"rank {missing[0]} and {len(missing) - 1} others did not connect within {seconds:.0f} s"
                )
        self._server.stop_listening()
        return True


class _StopRequested(Exception):
    """A stop signal arrived while the supervisors were connecting."""


def lead_time(run: Path, environment: Mapping[str, str] = os.environ) -> float:
    """Seconds between the warning and the time limit: MULTITRAIN_LEAD_TIME, else `cluster.lead_time` of the run, else 120."""
    given = environment.get("MULTITRAIN_LEAD_TIME", "")
    if re.fullmatch(r"\d+", given):
        return float(given)
    try:
        found = re.search(r"^  lead_time: (\d+)$", (run / "config.yaml").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return float(found.group(1)) if found else 120.0


def _pending_signals() -> Iterator[int]:
    while (found := signal.sigtimedwait(BLOCKED_SIGNALS, 0)) is not None:
        if found.si_signo in EXIT_SIGNALS:
            yield found.si_signo


def _name(number: int) -> str:
    return signal.Signals(number).name


def _node() -> str:
    """The name of this node in SLURM, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _fds(listening: socket.socket | None) -> tuple[int, ...]:
    return () if listening is None else (listening.fileno(),)


def _shell_code(code: int | None) -> int:
    return int(Exit.FAILED) if code is None else 128 - code if code < 0 else code


def _key(run: Path, size: int) -> bytes:
    """The key with which the supervisors authenticate each other; another start of the job has another key."""
    if size == 1:
        return secrets.token_bytes(32)
    return channel.derived(channel.secret(run), "supervisor", job_id() or "", str(restart_count()))


def main(arguments: list[str] | None = None) -> int:
    """Supervise the rank that the environment names (RANK, WORLD_SIZE, …), and return its exit code."""
    folder, restarts, *rest = sys.argv[1:] if arguments is None else arguments
    run = Path(folder)
    rank_env = rank_environment()
    inherited = {k: v for k, v in os.environ.items() if k not in DIST_ENV_VARS and k != channel.SECRET_VARIABLE}
    signal.pthread_sigmask(
        signal.SIG_BLOCK, BLOCKED_SIGNALS
    )  # the rank inherits this and unblocks them after its imports
    clock = AwakeClock()
    child = Child([sys.executable, "-u", *rest], {**inherited, **rank_env}, clock)
    try:
        return Supervisor(
            run, rank_env, int(restarts), child, clock, _key(run, int(rank_env["WORLD_SIZE"]))
        ).supervise()
    except ChannelError as error:
        print(f"multitrain: rank {rank_env['RANK']}: {error}", file=sys.stderr, flush=True)
        return Exit.FAILED


if __name__ == "__main__":
    sys.exit(main())
