"""Job states from SLURM. Every query may fail: without SLURM or accounting the status shows less."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable

from multitrain.cluster import slurm

QUEUE_STATES = {
    "RUNNING": "running",
    "COMPLETING": "running",
    "SUSPENDED": "suspended",
    "PENDING": "pending",
    "CONFIGURING": "pending",
    "REQUEUED": "pending",
}
"""SLURM's job states and what they mean for a run; any other is shown in lower case."""

TIMEOUT = 20.0
"""Seconds that a controller may take to answer."""


def jobs(ids: Iterable[str]) -> dict[str, dict[str, str]]:
    """What SLURM says of jobs, by id; those it does not know (any more) are left out.

    `squeue` is asked once for all; of those that have left the queue, `sacct`, where accounting answers.

    Returns:
        Of each job ``job_state`` (SLURM's word), ``state`` (ours; absent for COMPLETED, of which the run itself knows
        more), ``reason`` (why it waits), ``start`` (expected or actual start, SLURM's local time) and ``nodes``.
    """
    wanted = list(dict.fromkeys(str(i) for i in ids if i))
    found = _squeue(wanted)
    left = [i for i in wanted if i not in found]
    return found | _sacct(left)


def _squeue(ids: list[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    text = _asked("squeue", "--noheader", "--states=all", "--format=%i|%T|%r|%S|%N", f"--jobs={','.join(ids)}", ids=ids)
    for line in text.splitlines():
        job, state, reason, start, nodes = [*line.strip().split("|"), "", "", "", ""][:5]
        if job in ids:
            found[job] = _described(state, reason, start, nodes)
    return found


def _sacct(ids: list[str]) -> dict[str, dict[str, str]]:
    """Of each job the state of its last start; nothing where there is no accounting."""
    found: dict[str, dict[str, str]] = {}
    text = _asked(
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        "--format=JobID,State,Start",
        f"--jobs={','.join(ids)}",
        ids=ids,
    )
    for line in text.splitlines():
        job, state, start = [*line.strip().split("|"), "", ""][:3]
        if job in ids and state:
            found[job] = _described(state.split()[0].rstrip("+"), "", start, "")
    return found


def _described(state: str, reason: str, start: str, nodes: str) -> dict[str, str]:
    found = {"job_state": state}
    if state != "COMPLETED":
        found["state"] = QUEUE_STATES.get(state, state.lower())
    for key, value in {"reason": reason, "start": start, "nodes": nodes}.items():
        if value and value not in ("None", "N/A", "Unknown"):
            found[key] = value
    return found


def _asked(*command: str, ids: list[str]) -> str:
    """The output of a command of SLURM; empty when it is not there, refuses or hangs."""
    program = shutil.which(command[0])
    if program is None or not ids:
        return ""
    try:
        done = subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            env=slurm.command_environment(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
