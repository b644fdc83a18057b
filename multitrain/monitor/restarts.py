"""How often a run has come back, and whether it may again: read off its events, so that it holds whoever restarts it.

Rank 0 writes an event `begin` as the first thing it does. A start that ended in order has an event `requeue` or `end`
after that; one without has died, and whether the rank, the batch script or the node did makes no difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from multitrain.monitor.slurm import BATCH_ENDED, PREEMPTED, STEP_ENDED

IN_PLACE = "MULTITRAIN_RESTARTS_IN_PLACE"
"""Environment variable of a rank: how often the ranks were started again inside this start of the job."""

FAILED = "failed"
"""Status of a `requeue` after the ranks had died; of others it is why SLURM took the job away."""


@dataclass
class Start:
    """One start of a run.

    `restart`: how often SLURM had started the job before. `in_place`: how often the ranks had been started again inside
    the allocation before. `ended`: in which order it left; None: it died. `progress`: whether it wrote a checkpoint of more
    updates than there was one of. `final`: the error that no restart mends.
    """

    restart: int = 0
    in_place: int = 0
    ended: str | None = None
    progress: bool = False
    final: str | None = None


def starts(events: Sequence[Mapping[str, Any]]) -> list[Start]:
    """The starts since the run was last submitted, oldest first. Each line of them has ended, but for one that runs now.

    What rank 0 of a start tells is of that start, even after the next has begun: its node may have been lost for a while.
    """
    found: list[Start] = []
    newest = 0
    by_process: dict[tuple[Any, Any], Start] = {}
    for event in events:
        name, update = event["event"], event.get("update")
        process = (event.get("host"), event.get("pid"))
        own = by_process.get(process) or (found[-1] if found else None)
        if name == "submit":
            found, by_process = [], {}
        elif name == "begin":
            found.append(Start(int(event.get("restart") or 0), int(event.get("in_place", 0))))
            by_process[process] = found[-1]
        elif name == "checkpoint" and isinstance(update, int):
            if own is not None and update > newest:
                own.progress = True
            newest = max(newest, update)
        elif name == "requeue" and (own is None or own.ended is not None):  # died before it could begin
            found.append(Start(int(event.get("restart") or 0), ended=str(event.get("status"))))
        elif own is None:
            continue
        elif name == "error" and event.get("final"):
            own.final = str(event.get("reason"))
        elif name in ("requeue", "end") and own.ended is None:
            own.ended = str(event.get("status"))
    return found


def deaths(history: Sequence[Start], in_place: int = 0) -> int:
    """Starts that died and that the whole job had to come back for; the last one as well, unless `in_place` > 0 of what
    comes now says that its ranks were started again inside the allocation.
    """
    following = [*(start.in_place for start in history[1:]), in_place]
    return sum(
        start.ended in (None, FAILED, BATCH_ENDED, STEP_ENDED) and not again for start, again in zip(history, following)
    )


def stalled(history: Sequence[Start]) -> int:
    """Starts in a row, up to the last, that brought no new checkpoint; those that were preempted do not count."""
    count = 0
    for start in reversed(history):
        if start.progress:
            break
        count += start.ended != PREEMPTED
    return count


def refusal(history: Sequence[Start], most: int, most_stalled: int, in_place: int = 0) -> str | None:
    """Why the run must not start another time, or None; `history` is of all starts that are over, `in_place` of the one
    that comes now.
    """
    if history and history[-1].final is not None:
        return f"it ended with an error that no restart mends: {history[-1].final}"
    count = stalled(history)
    if count > most_stalled:
        return (
            f"{count} starts in a row, {count - 1} of them restarts, brought no new checkpoint "
            f"(cluster.max_stalled_restarts={most_stalled})"
        )
    died = deaths(history, in_place)
    if died > most:
        return f"it died {died} times since it was submitted (cluster.max_restarts={most})"
    return None
