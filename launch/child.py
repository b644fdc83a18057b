"""The process of one rank, as its supervisor or launcher sees it: started, watched, ended. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from multitrain.cluster.exit_status import explained, killed_for_memory
from multitrain.cluster.restarts import IN_PLACE
from multitrain.cluster.slurm import STOP_SIGNALS, block_stop_signals
from multitrain.cluster.supervised import PULSE_FD, STACKS

PATIENCE = 5.0
"""Seconds that ranks have to end by themselves, with their stacks in their logs, after another has died."""
GAP = 5.0
"""Seconds between two looks from which on this process was stopped itself: suspended with the job, or a laptop closed."""
SILENT = 35.0
"""Seconds that a rank may be silent beyond what it said itself: its own watchdog comes first."""

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class AwakeClock:
    """Seconds that this process was awake: the time that it stood still (SIGSTOP, `scontrol suspend`) is left out.

    Args:
        now: the clock that runs on.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._last = now()
        self._awake = 0.0

    def __call__(self) -> float:
        """To be asked often: a gap of more than GAP seconds between two calls does not count."""
        now = self._now()
        if now - self._last <= GAP:
            self._awake += now - self._last
        self._last = now
        return self._awake


class Pulse:
    """The pipe in which a rank shows that its interpreter runs: once a second the seconds that it may be silent.

    Nothing is asked of a rank that has not written yet, or that has no limit.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        os.set_blocking(self.write_end, False)
        self._allowed: float | None = None
        self._last = clock()
        self._asked_at: float | None = None

    def started(self) -> None:
        """The rank has its end of the pipe."""
        os.close(self.write_end)

    def watch(self, process: subprocess.Popen[bytes]) -> str | None:
        """Look; a rank that is silent for too long is asked for its stacks, then killed. Why, when it was killed now."""
        self._read()
        silent = self._clock() - self._last
        if self._allowed is None or silent < self._allowed + SILENT:
            return None
        if self._asked_at is None:
            self._asked_at = self._clock()
            process.send_signal(STACKS)
        if self._clock() - self._asked_at < PATIENCE:
            return None
        process.kill()
        return f"gave no sign of life for {silent:.0f} s (engine.hang_limit), and was killed; its log has its stacks"

    def close(self) -> None:
        """The rank is gone."""
        os.close(self.read_end)

    def _read(self) -> None:
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.read_end, 1 << 16)
        lines = data.split(b"\n")
        if len(lines) < 2:
            return
        self._last, self._asked_at = self._clock(), None
        with contextlib.suppress(ValueError):
            self._allowed = float(lines[-2])


class Child:
    """The rank's process, of which there is at most one.

    Args:
        command: of the rank.
        environment: of the rank, beside what each start adds.
        clock: by which it is watched.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], clock: Callable[[], float]) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._pulse: Pulse | None = None
        self._kill_at: float | None = None
        self._leave_by: tuple[float, str] | None = None
        self._killed_before: int | None = None
        self._reason: str | None = None
        self.ended_by_us = False
        """Whether the last process was killed because another rank had ended."""
        self.stop: int | None = None
        """The first stop signal that came, which ranks started later are told."""

    def start(self, attempt: int, environment: Mapping[str, str], inherit: Sequence[int] = ()) -> None:
        """Start the rank.

        Args:
            environment: of this start.
            inherit: file descriptors that it takes over.
        """
        self._kill_at, self._reason, self.ended_by_us = None, None, False
        self._killed_before = killed_for_memory()
        pulse = Pulse(self._clock)
        whole = {**self._environment, **environment, IN_PLACE: str(attempt), PULSE_FD: str(pulse.write_end)}
        self._process = subprocess.Popen(
            self._command, env=whole, preexec_fn=prepare, pass_fds=(pulse.write_end, *inherit)
        )
        pulse.started()
        self._pulse = pulse
        if self.stop is not None:
            self._process.send_signal(self.stop)

    def end(self, patience: float = PATIENCE) -> None:
        """Kill the rank in `patience` seconds, unless it ends before."""
        if self._kill_at is None:
            self._kill_at = self._clock() + patience

    def pass_on(self, number: int) -> None:
        """Send the rank, if it runs, a signal that came to its supervisor alone."""
        if self._process is not None:
            self._process.send_signal(number)

    def leave_within(self, seconds: float, warning: str) -> None:
        """From now on the rank has so many seconds to save and leave; the earliest such limit counts."""
        at = self._clock() + seconds
        if self._leave_by is None or at < self._leave_by[0]:
            self._leave_by = at, f"had not left {seconds:.0f} s after {warning}, and was killed"

    def ended(self) -> int | None:
        """Its exit code, once, when it has ended."""
        if self._process is None:
            return None
        self._watch(self._process)
        code = self._process.poll()
        if code is not None:
            self._process = None
            if self._pulse is not None:
                self._pulse.close()
        return code

    def text(self, code: int) -> str:
        """What its exit code means, as its own node knows it."""
        return f"{self._reason} (exit code {code})" if self._reason else explained(code, self._killed_before)

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        now = self._clock()
        if process.poll() is not None:
            return
        if self._kill_at is not None and now >= self._kill_at:
            self.ended_by_us = True
            process.kill()
        elif self._leave_by is not None and now >= self._leave_by[0]:
            self._reason = self._reason or self._leave_by[1]
            process.kill()
        elif self._pulse is not None and self._kill_at is None:
            self._reason = self._pulse.watch(process) or self._reason


def die_with_parent() -> None:
    """In a new process: whatever ends the one that started it ends it as well."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def prepare() -> None:
    """In the new process: die with the parent; hold back stop signals until the rank's handlers stand."""
    die_with_parent()
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    block_stop_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
