"""Exit statuses, and descriptions of how a process ended: a killed process cannot write to its log."""

from __future__ import annotations

import contextlib
import enum
import signal
from pathlib import Path


class Exit(enum.IntEnum):
    """Exit statuses of ranks, launchers and preflight."""

    FINISHED = 0
    """The run is complete."""
    FAILED = 1
    """An error; a restart may succeed."""
    MISTAKE = 2
    """A setting or a file is wrong. A restart helps only a run that has already trained with this configuration."""
    GAVE_UP = 3
    """A restart would not help."""
    HELD = 4
    """Another start of the run holds its lease."""
    BAD_NODE = 5
    """Preflight found a node that cannot work."""
    INTERRUPTED = 75
    """Saved and stopped; the run can be resumed."""

    def __str__(self) -> str:
        """The number, as on Python 3.11 and later; on 3.10 it would be the name."""
        return str(int(self))

    @classmethod
    def is_clean(cls, status: int) -> bool:
        """Whether `status` means that the rank has finished, or has saved and stopped."""
        return status in (cls.FINISHED, cls.INTERRUPTED)

    @classmethod
    def restartable(cls, status: int) -> bool:
        """Whether a rank with this exit status (negative: a signal) may be restarted at once, within the allocation."""
        return status not in (cls.FINISHED, cls.INTERRUPTED, cls.MISTAKE, cls.GAVE_UP, cls.HELD, cls.BAD_NODE)


MEMORY_REMEDY = "lower data.workers, data.prefetch or micro_batch, or ask for more with cluster.memory_per_node"

_SIGNAL_CAUSES = {
    signal.SIGSEGV: "a library has failed; its log has the stack",
    signal.SIGABRT: "a library has given up; its log has the reason",
    signal.SIGBUS: "a mapped file could not be read: look at the disk, and at the free space of /dev/shm",
}


def killed_for_memory() -> int | None:
    """Number of processes that the kernel has killed since boot because memory ran out, in any control group; None if unknown."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(counts["oom_kill"]) if "oom_kill" in counts else None
    return None


def describe_exit(code: int, killed_before: int | None = None) -> str:
    """Description of an exit code, as the predicate of ``rank 3 ``.

    Args:
        code: negative for a signal, as `subprocess` has it, or 128 and the signal, as a shell has it.
        killed_before: result of :func:`killed_for_memory` when the process was started.
    """
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number)
    except ValueError:
        return f"failed with exit code {code}"
    text = f"was killed by {name.name} (exit code {code})"
    if name == signal.SIGKILL:
        killed = killed_for_memory()
        if killed is not None and killed_before is not None and killed > killed_before:
            return f"{text}: memory ran out, and the kernel has killed a process of this node since it was started; {MEMORY_REMEDY}"
        return (
            f"{text}: by a user, by SLURM, or by the kernel when memory ran out (then dmesg says so; {MEMORY_REMEDY})"
        )
    return f"{text}: {_SIGNAL_CAUSES[name]}" if name in _SIGNAL_CAUSES else text
