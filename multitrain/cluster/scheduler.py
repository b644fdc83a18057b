"""Query the states of jobs from SLURM. Every query may fail: without SLURM or accounting, a run's status shows less."""

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
"""Seconds to wait for an answer of the controller."""


def jobs(ids: Iterable[str]) -> dict[str, dict[str, str]]:
    """SLURM's records of jobs, by id; jobs that SLURM does not know (any more) are missing.

    One call of `squeue` queries all jobs; `sacct` queries those that have left the queue, if there is accounting.

    Returns:
        For each job ``job_state`` (of SLURM), ``state`` (of the run; absent for COMPLETED, since the run's own files say more),
        ``reason`` (why it waits), ``start`` (expected or actual start, in SLURM's local time) and ``nodes``.
    """
    listed = list(dict.fromkeys(str(i) for i in ids if i))
    found = _squeue(listed)
    left = [i for i in listed if i not in found]
    return found | _sacct(left)


def _squeue(ids: list[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    text = _query("squeue", "--noheader", "--states=all", "--format=%i|%T|%r|%S|%N", f"--jobs={','.join(ids)}", ids=ids)
    for line in text.splitlines():
        job, state, reason, start, nodes = [*line.strip().split("|"), "", "", "", ""][:5]
        if job in ids:
            found[job] = _described(state, reason, start, nodes)
    return found


def _sacct(ids: list[str]) -> dict[str, dict[str, str]]:
    """The state of each job's last start; empty without accounting."""
    found: dict[str, dict[str, str]] = {}
    text = _query(
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


def _query(*command: str, ids: list[str]) -> str:
    """The output of a SLURM command; empty if it is missing, fails or hangs."""
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
