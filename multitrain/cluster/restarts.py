"""Restart accounting: how often a run has been restarted and whether it may again, read from its events.

Rank 0 first writes an event `begin`. A start that ended cleanly has an event `requeue` or `end` after that. A start without one
has crashed, no matter whether the rank, the batch script or the node failed.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multitrain.cluster.exit_status import Exit
from multitrain.cluster.slurm import BATCH_ENDED, OPERATOR, PREEMPTED, STEP_ENDED
from multitrain.config import ConfigError

IN_PLACE = "MULTITRAIN_RESTARTS_IN_PLACE"
"""Environment variable of a rank: restarts of the ranks within this start of the job."""

END_EVENTS = ("ended", "requeue", "end")
"""Events that record the end of a start. Those of the batch script may precede the ranks' `begin`."""

STOPPED = "stopped on request"
"""Status of an `end` after the file STOP."""

FAILED = "failed"
"""Status of a `requeue` after the ranks died. Other statuses are SLURM's reasons for stopping the job."""


@dataclass
class Start:
    """One start of a run.

    `restart`: earlier starts of the job by SLURM. `in_place`: earlier restarts of the ranks within the allocation. `ended`:
    the status of its end; None: it crashed. `progress`: whether it wrote a newer checkpoint than any before. `final`: an error
    that a restart does not fix. `mistake`: the same, unless the run has made progress before. `trained`: whether it reached its
    first update. `failed_nodes`: nodes of the ranks that failed first. `bad_nodes`: bad nodes that preflight found. `excluded`:
    nodes that the next start was to leave out. `wanted`: the reason for a requeue that SLURM refused. `job`: the SLURM job.
    `began`: whether rank 0 wrote `begin`.
    """

    restart: int = 0
    in_place: int = 0
    ended: str | None = None
    progress: bool = False
    final: str | None = None
    mistake: str | None = None
    trained: bool = False
    failed_nodes: list[str] = field(default_factory=list)
    bad_nodes: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    wanted: str | None = None
    job: str | None = None
    began: bool = True

    def is_of(self, job: str | None, restart: int) -> bool:
        """Whether it is this start of this job; a successor job counts its restarts from 0."""
        return (self.job, self.restart) == (job, restart)


def starts(events: Sequence[Mapping[str, Any]]) -> list[Start]:
    """The starts since the run was last submitted, oldest first. All have ended, except the one that runs now.

    Events of rank 0 belong to its own start, even after the next one has begun (its node may have been unreachable). Events
    of other processes (batch script, supervisors, preflight) are assigned by the job's restart count.
    """
    found: list[Start] = []
    newest = 0
    by_process: dict[tuple[Any, Any], Start] = {}
    for event in events:
        name, update, restart = event["event"], event.get("update"), int(event.get("restart") or 0)
        job, process = event.get("job"), (event.get("host"), event.get("pid"))
        own = by_process.get(process) or (found[-1] if found else None)
        if name == "submit":
            found, by_process = [], {}
        elif name == "begin":
            if found and found[-1].is_of(job, restart) and not found[-1].began:
                found[-1].began = True  # preflight, or a batch script at the time limit, wrote its event first
            else:
                found.append(Start(restart, int(event.get("in_place", 0)), job=job))
            by_process[process] = found[-1]
        elif name == "checkpoint" and isinstance(update, int):
            if own is not None and update > newest:
                own.progress = True
            newest = max(newest, update)
        elif name == "preflight" and event.get("nodes"):
            found.append(Start(restart, bad_nodes=[str(node) for node in event["nodes"]], job=job, began=False))
        elif name in END_EVENTS and process not in by_process and _is_of_no_start(own, job, restart):
            ended = None if name == "ended" else str(event.get("status"))  # it crashed before `begin`
            found.append(Start(restart, ended=ended, job=job, began=False))
            _note(found[-1], event)
        elif own is not None:
            _note(own, event)
    return found


def _is_of_no_start(own: Start | None, job: str | None, restart: int) -> bool:
    return own is None or restart > own.restart or job != own.job


def _note(own: Start, event: Mapping[str, Any]) -> None:
    """Add an event to its start."""
    name = event["event"]
    if name == "error" and event.get("final"):
        if event.get("exit_status") == Exit.MISTAKE:
            own.mistake = str(event.get("reason"))
        else:
            own.final = str(event.get("reason"))
    elif name in ("start", "resume"):
        own.trained = True
    elif name == "rank_failed" and not own.failed_nodes and event.get("node"):
        own.failed_nodes.append(str(event["node"]))
    elif name == "requeue_failed":
        own.wanted = str(event.get("status") or own.ended or "")
    elif name in ("requeue", "end") and own.ended is None:
        own.ended = str(event.get("status"))
    if name == "requeue":
        own.excluded += [str(node) for node in event.get("exclude") or ()]


def nodes_to_exclude(history: Sequence[Start], *, went_well: bool) -> tuple[str, ...]:
    """Nodes on which the last starts failed before they trained: since the last start that trained, in the order of the failures.

    Args:
        went_well: whether the run has ever made progress; else a failure is more likely the configuration's fault than the node's.
    """
    found: list[str] = []
    for start in reversed(history):
        if start.trained:
            break
        found = [*start.bad_nodes, *(start.failed_nodes if went_well else ()), *found]
    return tuple(dict.fromkeys(found))


def dependents(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """The jobs that were submitted to start after the success of the run's job (`then=eval`)."""
    return list(dict.fromkeys(str(e["test_job"]) for e in events if e["event"] == "then" and "test_job" in e))


def progressed(events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the run has ever written a checkpoint of at least one update: its configuration is known to work."""
    return any(e["event"] == "checkpoint" and isinstance(e.get("update"), int) and e["update"] > 0 for e in events)


def count_crashes(history: Sequence[Start], in_place: int = 0) -> int:
    """Number of starts that crashed and caused a restart of the whole job. The last one does not count if `in_place` > 0, that is,
    if its ranks are now restarted within the allocation.
    """
    following = [*(start.in_place for start in history[1:]), in_place]
    return sum(_crashed(start) and not again for start, again in zip(history, following))


def _crashed(start: Start) -> bool:
    return start.ended in (None, FAILED, BATCH_ENDED) or (start.ended == STEP_ENDED and not start.progress)


def count_stalled(history: Sequence[Start]) -> int:
    """Number of consecutive starts, up to the last one, without a new checkpoint; preempted starts do not count."""
    count = 0
    for start in reversed(history):
        if start.progress:
            break
        count += start.ended not in (PREEMPTED, OPERATOR)
    return count


def refusal(
    history: Sequence[Start], max_crashes: int, most_stalled: int, in_place: int = 0, *, went_well: bool = False
) -> str | None:
    """The reason why the run must not be restarted, or None.

    Args:
        history: all starts that have ended.
        max_crashes: limit of restarts after crashes (``cluster.max_restarts``).
        most_stalled: limit of consecutive restarts without a new checkpoint (``cluster.max_stalled_restarts``).
        in_place: restarts within the allocation before the coming start.
        went_well: whether the run has ever made progress. Its configuration is then correct, and an apparent mistake is a disk, a
            file or a library that is missing on a node: the run is restarted, on other nodes, within the limits.
    """
    last = history[-1] if history else None
    final = last and (last.final or (None if went_well else last.mistake))
    if final:
        return f"it ended with an error that a restart does not fix: {final}"
    count = count_stalled(history)
    if count > most_stalled:
        why = last.mistake if last and last.mistake else None
        return (
            f"{count} starts in a row, {count - 1} of them restarts, brought no new checkpoint "
            f"(cluster.max_stalled_restarts={most_stalled}){f'; the last one: {why}' if why else ''}"
        )
    crashes = count_crashes(history, in_place)
    if crashes > max_crashes:
        return f"it died {crashes} times since it was submitted (cluster.max_restarts={max_crashes})"
    return None


def refuse_lost_checkpoints(run: Path, told: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to train from the beginning when the checkpoints are missing (a purge, a file system that is not mounted).

    Args:
        told: the run's events.

    Raises:
        ConfigError: the events record checkpoints, and the folder has none.
    """
    folder = run / "checkpoints"
    if folder.is_dir() and any(folder.glob("update-*")):
        return
    again = [i for i, event in enumerate(told) if event["event"] == "submit" and event.get("from_scratch")]
    written = [e["update"] for e in told[again[-1] if again else 0 :] if e["event"] == "checkpoint" and e.get("update")]
    if written:
        raise ConfigError(
            f"{folder} has no checkpoint, and the run has written some, up to update {max(written)}: bring the folder back "
            f"(a purge? a file system that is not mounted here?), or start over on purpose with "
            f"python launch/submit.py {shlex.quote(str(run))} from_scratch=true"
        )
