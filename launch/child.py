"""Start, watch and end the process of one rank. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from multitrain.cluster.exit_status import describe_exit, killed_for_memory
from multitrain.cluster.restarts import IN_PLACE
from multitrain.cluster.slurm import STOP_SIGNALS, block_stop_signals
from multitrain.cluster.supervised import PULSE_FD, STACKS

EXIT_TIMEOUT = 5.0
"""Seconds that ranks have to exit by themselves, and to log their stacks, after another rank has died."""
SUSPEND_GAP_SECONDS = 5.0
"""A longer gap between two readings of the clock, in seconds, means that this process was suspended: by SLURM, or with its laptop."""
HEARTBEAT_GRACE_SECONDS = 35.0
"""Seconds added to the limit that a rank announces for its silence, so that its own watchdog acts first."""

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class AwakeClock:
    """Seconds that this process was awake, without the time during which it was suspended (SIGSTOP, `scontrol suspend`).

    Args:
        now: the underlying clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._last = now()
        self._awake = 0.0

    def __call__(self) -> float:
        """The seconds so far. Call it often: a gap of more than SUSPEND_GAP_SECONDS between two calls does not count."""
        now = self._now()
        if now - self._last <= SUSPEND_GAP_SECONDS:
            self._awake += now - self._last
        self._last = now
        return self._awake


class Heartbeat:
    """The pipe through which a rank shows that its interpreter runs: once per second it writes the seconds that it may be silent.

    A rank that has not written yet, or that has no limit, is not checked.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        os.set_blocking(self.write_end, False)
        self._allowed: float | None = None
        self._last = clock()
        self._stacks_requested_at: float | None = None

    def started(self) -> None:
        """Close the write end here, once the rank has inherited it."""
        os.close(self.write_end)

    def check(self, process: subprocess.Popen[bytes]) -> str | None:
        """Read the pipe. Signal a rank that is silent for too long to log its stacks, then kill it; the reason, if this call killed it."""
        self._read()
        silent = self._clock() - self._last
        if self._allowed is None or silent < self._allowed + HEARTBEAT_GRACE_SECONDS:
            return None
        if self._stacks_requested_at is None:
            self._stacks_requested_at = self._clock()
            process.send_signal(STACKS)
        if self._clock() - self._stacks_requested_at < EXIT_TIMEOUT:
            return None
        process.kill()
        return f"did not respond for {silent:.0f} s (engine.hang_limit) and was killed; its log has its stacks"

    def close(self) -> None:
        """Close the read end, after the rank has ended."""
        os.close(self.read_end)

    def _read(self) -> None:
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.read_end, 1 << 16)
        lines = data.split(b"\n")
        if len(lines) < 2:
            return
        self._last, self._stacks_requested_at = self._clock(), None
        with contextlib.suppress(ValueError):
            self._allowed = float(lines[-2])


class Child:
    """The process of a rank; there is at most one at a time.

    Args:
        command: command of the rank.
        environment: environment of the rank, without the variables that :meth:`start` adds.
        clock: clock of its timeouts, in seconds.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], clock: Callable[[], float]) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._heartbeat: Heartbeat | None = None
        self._kill_at: float | None = None
        self._exit_by: tuple[float, str] | None = None
        self._killed_before: int | None = None
        self._reason: str | None = None
        self.ended_by_us = False
        """Whether the last process was killed because another rank had ended."""
        self.stop: int | None = None
        """The first stop signal that arrived; a rank that is started later gets it at once."""

    def start(self, attempt: int, environment: Mapping[str, str], inherit: Sequence[int] = ()) -> None:
        """Start the rank.

        Args:
            attempt: number of restarts within the allocation before this start.
            environment: additional variables of this start.
            inherit: file descriptors that the rank inherits.
        """
        self._kill_at, self._reason, self.ended_by_us = None, None, False
        self._killed_before = killed_for_memory()
        heartbeat = Heartbeat(self._clock)
        whole = {**self._environment, **environment, IN_PLACE: str(attempt), PULSE_FD: str(heartbeat.write_end)}
        self._process = subprocess.Popen(
            self._command, env=whole, preexec_fn=prepare_process, pass_fds=(heartbeat.write_end, *inherit)
        )
        heartbeat.started()
        self._heartbeat = heartbeat
        if self.stop is not None:
            self._process.send_signal(self.stop)

    def end(self, timeout: float = EXIT_TIMEOUT) -> None:
        """Kill the rank after `timeout` seconds, unless it ends before."""
        if self._kill_at is None:
            self._kill_at = self._clock() + timeout

    def pass_on(self, number: int) -> None:
        """Send the rank, if it runs, a signal that only its supervisor received."""
        if self._process is not None:
            self._process.send_signal(number)

    def exit_within(self, seconds: float, warning: str) -> None:
        """Kill the rank if it has not saved and exited after `seconds`; the earliest such limit counts."""
        at = self._clock() + seconds
        if self._exit_by is None or at < self._exit_by[0]:
            self._exit_by = at, f"had not exited {seconds:.0f} s after {warning} and was killed"

    def ended(self) -> int | None:
        """Check the rank; its exit code, returned once, when it has ended."""
        if self._process is None:
            return None
        self._check(self._process)
        code = self._process.poll()
        if code is not None:
            self._process = None
            if self._heartbeat is not None:
                self._heartbeat.close()
        return code

    def text(self, code: int) -> str:
        """Description of its exit code, with what is known on its own node, as the predicate of ``rank 3 ``."""
        return f"{self._reason} (exit code {code})" if self._reason else describe_exit(code, self._killed_before)

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self._process is not None

    def _check(self, process: subprocess.Popen[bytes]) -> None:
        now = self._clock()
        if process.poll() is not None:
            return
        if self._kill_at is not None and now >= self._kill_at:
            self.ended_by_us = True
            process.kill()
        elif self._exit_by is not None and now >= self._exit_by[0]:
            self._reason = self._reason or self._exit_by[1]
            process.kill()
        elif self._heartbeat is not None and self._kill_at is None:
            self._reason = self._heartbeat.check(process) or self._reason


def die_with_parent() -> None:
    """In a new process: end it with its parent, however that ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def prepare_process() -> None:
    """In a new process: end with the parent; block stop signals until the rank has installed its handlers."""
    die_with_parent()
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    block_stop_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
