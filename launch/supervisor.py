"""Around one rank: starts it again inside the allocation when a rank has died and its node lives.

python -m launch.supervisor RUN RESTARTS ARGUMENTS-OF-PYTHON …

One supervisor a rank, light (standard library only). That of rank 0, the hub, listens on the rendezvous port; the others
keep an authenticated connection to it (:mod:`launch.channel`). Ranks are started when all supervisors have met. When one rank
dies, all are ended, and all start again with a new port, from the newest verified checkpoint; at most RESTARTS times, and
not after a stop signal, a mistake in the configuration, or the loss of a supervisor (its node is gone): then all end, and
the job goes back into the queue. Which rank failed, and on which node, is written to the run's events.

After a warning of the time limit ranks have two thirds of the lead time to save and leave; what is left then (it hangs, it is
frozen, it still imports) is killed, so that the step ends before the limit. MULTITRAIN_LEAD_TIME has the lead time in seconds, else
the run's configuration has.
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

JOIN = 300.0
"""Seconds within which all supervisors must have met."""
JOIN_SECONDS = "MULTITRAIN_JOIN"
"""Environment variable: another number."""
HUB_STATUS = "MULTITRAIN_HUB_STATUS"
"""Environment variable: when it is set, a supervisor ends with the status for which rank 0's supervisor has ended all, so that all
machines decide alike whether to go on."""
PATIENT = 30.0
"""Seconds after which a rank that waits for rank 0 says so."""
TICK = 0.1
STOPS = (*STOP_SIGNALS, signal.SIGINT)
"""Signals that end a run in order. They reach the rank as well."""
HELD_BACK = (*STOPS, signal.SIGHUP)
"""Signals that do not end a supervisor."""
SHARE = 2 / 3
"""Of the time between the warning and the end: what ranks have to leave."""
MARGIN = 10
"""Seconds before the end of a grace period at which a rank that has not left is killed."""
TOLD = 8
"""Ranks of one start whose failure is written to the events, at most."""


class Supervisor:
    """One rank's supervisor.

    Args:
        run: the run's folder.
        place: of the rank, as :func:`multitrain.cluster.slurm.rank_environment` gives it.
        key: by which supervisors know each other.
    """

    def __init__(
        self, run: Path, place: Mapping[str, str], restarts: int, child: Child, clock: AwakeClock, key: bytes
    ) -> None:
        self.rank, self.size = int(place["RANK"]), int(place["WORLD_SIZE"])
        self._run = run
        self._place = place
        self._child = child
        self._clock = clock
        self._key = key
        self._here = place.get("LOCAL_WORLD_SIZE") == place["WORLD_SIZE"]
        self._hub = Hub(self.size, restarts, clock) if self.rank == 0 else None
        self._server: Server | None = None
        self._link: Channel | None = None
        self._nodes = {self.rank: _node()}
        self._code: int | None = None
        self._status: int | None = None  # for which rank 0's supervisor has ended all
        self._ending = False
        self._stopping = False  # the hub: of any rank
        self._told = 0
        self._waits = False
        self._grace: list[int] = []

    def supervise(self) -> int:
        """Supervise to the end; the exit code of the rank.

        Raises:
            ChannelError: not all supervisors have met in time.
        """
        if not self._meet():
            return Exit.INTERRUPTED
        if self._hub is not None:
            self._tell({"do": "start", "attempt": 0})
        while not self._finished():
            self._clock()
            self._note_signals()
            for rank, message in self._arrived():
                self._take(rank, message)
            code = self._child.ended()
            if code is not None:
                self._own_ended(code)
            if self._hub is not None:
                self._tell(self._hub.overdue())
                if self._grace:
                    self._tell({"do": "leave", "seconds": self._grace.pop()})
        return _shell_code(self._code if self._status is None else self._status)

    def _finished(self) -> bool:
        if self._hub is not None:
            return self._hub.done and not self._child.running
        ended = self._code is not None and (self._ending or Exit.in_order(self._code))
        return not self._child.running and ended

    # ------------------------------------------------------------------------------------------------------- messages

    def _own_ended(self, code: int) -> None:
        self._code = code
        report = {"code": code, "stopping": self._child.stop is not None, "text": self._child.text(code)}
        report["own"] = not self._child.ended_by_us
        if self._hub is not None:
            self._rank_ended(0, report)
        elif self._link is not None:  # else rank 0's supervisor is gone, and this one ends as well
            self._link.send(**report)

    def _take(self, rank: int, message: channel.Message | None) -> None:
        """What rank `rank` has sent; None: its supervisor is gone."""
        if message is None and self._hub is None:
            self._link = None
            if not self._ending:
                self._follow({"do": "end", "why": "the supervisor of rank 0 is gone"})
        elif message is None:
            self._lost(rank)
        elif self._hub is None:
            try:
                self._follow(message)
            except ValueError as error:
                self._follow({"do": "end", "why": f"rank 0 sent what it must not: {error}"})
        else:
            self._rank_ended(rank, message)

    def _lost(self, rank: int) -> None:
        assert self._hub is not None
        if not self._hub.finished(rank):
            self._record(rank, None, f"the supervisor of rank {rank} is gone")
        self._tell(self._hub.supervisor_lost(rank))

    def _rank_ended(self, rank: int, report: channel.Message) -> None:
        assert self._hub is not None
        self._stopping = self._stopping or report.get("stopping") is True or self._child.stop is not None
        if report.get("do") == "stopped":  # its rank is told as soon as it runs
            return
        try:
            code = channel.integer(report, "code", -128, 255)
            text = channel.text(report, "text")
        except ValueError as error:
            print(f"multitrain: rank {rank} sent what it must not: {error}", file=sys.stderr, flush=True)
            return
        if not Exit.in_order(code) and report.get("own") is True:
            self._record(rank, code, text)
        self._tell(self._hub.rank_ended(rank, code, self._stopping, text))

    def _tell(self, message: dict[str, Any] | None) -> None:
        """From the hub to all, itself included."""
        if message is None:
            return
        listening = None
        if message["do"] == "start":
            self._told = 0
            listening = listen(self._here, 0)
            message |= {"port": listening.getsockname()[1], "salt": secrets.token_hex(16), "start": self._start_name()}
        if self._server is not None:
            for link in list(self._server.channels.values()):
                link.send(**message)
        self._follow(message, listening)
        if listening is not None:
            listening.close()

    def _follow(self, message: channel.Message, listening: socket.socket | None = None) -> None:
        """What the hub has told.

        Args:
            listening: at rank 0, the socket at which it serves torch's store.
        """
        do = message.get("do")
        if do == "leave":
            self._child.leave_within(max(0, channel.integer(message, "seconds", 0, 1 << 20) - MARGIN), "SIGTERM")
        elif do == "stopped":
            self._ending, self._code = True, int(Exit.INTERRUPTED)
        elif do == channel.TAKEN:
            self._say(f"another process is rank {self.rank} of this start already: was the same command typed twice?")
            self._ending, self._code = True, int(Exit.FAILED)
        elif do == "start" and not self._child.running:
            self._code = None
            attempt = channel.integer(message, "attempt", 0, 1 << 20)
            self._child.start(attempt, self._environment(message, listening), _fds(listening))
        elif do in ("stop", "end"):
            why = channel.text(message, "why")
            if self.rank == 0 or "gone" in why:
                print(f"multitrain: rank {self.rank}: {why}", file=sys.stderr, flush=True)
            self._child.end()
            if do == "end":
                self._ending = True
                self._code = int(Exit.FAILED) if self._code is None else self._code
                if os.environ.get(HUB_STATUS):
                    self._status = channel.integer(message, "status", -128, 255) if "status" in message else Exit.FAILED

    def _environment(self, message: channel.Message, listening: socket.socket | None) -> dict[str, str]:
        found = {
            "MASTER_PORT": str(channel.integer(message, "port", 1, 65535)),
            STORE_KEY: channel.derived(self._key, "store", channel.text(message, "salt")).hex(),
            lease.START: channel.text(message, "start"),
        }
        if self._here:
            found["MASTER_ADDR"] = "127.0.0.1"
        if listening is not None:
            found[STORE_FD] = str(listening.fileno())
        return found

    def _start_name(self) -> str:
        """The same for all ranks, and for what this process writes itself."""
        name = lease.start_name(job_id(), restart_count())
        os.environ[lease.START] = name
        return name

    # --------------------------------------------------------------------------------------------------------- signals

    def _note_signals(self) -> None:
        """Stop signals are blocked. SLURM sends them to the rank as well, where a second one would end its wait for the end
        of the job; without SLURM they are passed on.
        """
        for number in _waiting_signals():
            if job_id() is None:
                self._child.pass_on(number)
            if self._child.stop is None and not self._child.running and self._link is not None:
                self._link.send(do="stopped", stopping=True)  # rank 0 may be waiting for others still
            self._child.stop = self._child.stop or number
            if number in (signal.SIGUSR1, signal.SIGUSR2):
                self._child.leave_within(
                    SHARE * lead_time(self._run), f"the warning of the time limit ({_name(number)})"
                )
            elif number == signal.SIGTERM and self._hub is not None and job_id() is not None:
                threading.Thread(target=self._ask_for_grace, args=(time.monotonic(),), daemon=True).start()

    def _ask_for_grace(self, since: float) -> None:
        """How long SLURM waits after SIGTERM; not at all known for a partition whose jobs are not preempted."""
        seconds = slurm.grace()
        if seconds is not None:
            self._grace.append(max(0, int(seconds - (time.monotonic() - since))))

    def _record(self, rank: int, code: int | None, text: str) -> None:
        """Which rank failed, on which node, in the run's events."""
        self._told += 1
        if self._told > TOLD:
            return
        from launch.events import record  # reading events needs the schema of configurations; most starts need none

        record(
            self._run,
            "rank_failed",
            rank=rank,
            node=self._nodes.get(rank),
            exit_status=code,
            text=text,
            first=self._told == 1,
        )

    # ------------------------------------------------------------------------------------------------------- connections

    def _arrived(self) -> Iterator[tuple[int, channel.Message | None]]:
        if self._server is not None and self._server.channels:
            yield from self._server.poll(TICK)
        elif self._link is not None:
            messages = self._link.read(TICK)
            yield from ((0, message) for message in ([None] if messages is None else messages))
        else:
            time.sleep(TICK)

    def _meet(self) -> bool:
        """Connect all supervisors; False: the run was stopped meanwhile.

        Raises:
            ChannelError: not all have come in time.
        """
        if self.size == 1:
            return True
        seconds = float(os.environ.get(JOIN_SECONDS) or JOIN)
        try:
            if self._hub is not None:
                return self._gather(seconds)
            address = "127.0.0.1" if self._here else self._place["MASTER_ADDR"]
            hello = {"rank": self.rank, "node": _node()}
            port, deadline = int(self._place["MASTER_PORT"]), time.monotonic() + seconds
            begun = time.monotonic()
            self._link = channel.connect(
                self._key, address, port, deadline, hello, pause=lambda: self._pause(begun, f"{address}:{port}")
            )
        except _Stopped:
            return False
        return True

    def _pause(self, begun: float, where: str) -> None:
        self._note_signals()
        if self._child.stop is not None:
            raise _Stopped
        if not self._waits and time.monotonic() - begun > PATIENT:
            self._waits = True
            held = lease.newest(self._run)
            holder = f"; the run is trained by {held.holder}" if held and held.holder and not held.over else ""
            self._say(f"still waiting for rank 0 at {where}{holder}")
        time.sleep(0.05)

    def _say(self, text: str) -> None:
        print(f"multitrain: rank {self.rank}: {text}", file=sys.stderr, flush=True)

    def _gather(self, seconds: float) -> bool:
        """The hub: wait for all others."""
        self._server = Server(self._key, self.size, int(self._place["MASTER_PORT"]), loopback=self._here)
        begun = self._clock()
        while len(self._server.channels) < self.size - 1:
            for rank, message in self._server.poll(TICK):
                if message is not None and "node" in message:
                    self._nodes[rank] = channel.text(message, "node", 80)
                elif message is not None and message.get("stopping") is True:
                    self._child.stop = self._child.stop or int(signal.SIGTERM)
            self._note_signals()
            if self._child.stop is not None:
                self._tell({"do": "stopped"})
                return False
            if self._clock() - begun >= seconds:
                missing = sorted(set(range(1, self.size)) - set(self._server.channels))
                raise ChannelError(
                    f"rank {missing[0]} and {len(missing) - 1} others did not come within {seconds:.0f} s"
                )
        self._server.stop_listening()
        return True


class _Stopped(Exception):
    """A stop signal has come while supervisors were meeting."""


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


def _waiting_signals() -> Iterator[int]:
    while (found := signal.sigtimedwait(HELD_BACK, 0)) is not None:
        if found.si_signo in STOPS:
            yield found.si_signo


def _name(number: int) -> str:
    return signal.Signals(number).name


def _node() -> str:
    """This node as SLURM names it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _fds(listening: socket.socket | None) -> tuple[int, ...]:
    return () if listening is None else (listening.fileno(),)


def _shell_code(code: int | None) -> int:
    return int(Exit.FAILED) if code is None else 128 - code if code < 0 else code


def _key(run: Path, size: int) -> bytes:
    """By which the supervisors of this start know each other: those of another start of the job do not."""
    if size == 1:
        return secrets.token_bytes(32)
    return channel.derived(channel.secret(run), "supervisor", job_id() or "", str(restart_count()))


def main(arguments: list[str] | None = None) -> int:
    """Supervise the rank that the arguments name, at the place that the environment gives; its exit code."""
    folder, restarts, *rest = sys.argv[1:] if arguments is None else arguments
    run = Path(folder)
    place = rank_environment()
    inherited = {k: v for k, v in os.environ.items() if k not in DIST_ENV_VARS and k != channel.SECRET}
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)  # in the rank too, which unblocks them once its handlers stand
    clock = AwakeClock()
    child = Child([sys.executable, "-u", *rest], {**inherited, **place}, clock)
    try:
        return Supervisor(run, place, int(restarts), child, clock, _key(run, int(place["WORLD_SIZE"]))).supervise()
    except ChannelError as error:
        print(f"multitrain: rank {place['RANK']}: {error}", file=sys.stderr, flush=True)
        return Exit.FAILED


if __name__ == "__main__":
    sys.exit(main())
