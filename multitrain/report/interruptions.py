"""List a run's interruptions with their reasons, times and costs, read from its events. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

STARTS = ("start", "resume")

CAUSES = {"end": "status", "requeue": "status", "error": "reason"}
"""Events that give the reason for the end of a start, and the field with the reason. The first of several counts: after an error
on one rank the others report that they lost their peer."""

LOST_PEER = re.compile(
    r"closed by (the )?(remote )?peer|reset by peer|Broken pipe|remote process exited|NCCL.*(unhandled system|remote) error",
    re.I,
)
"""Errors of a rank whose peers have ended."""

PEER_LOST = "a rank was killed without warning"
"""Reported when the only messages come from ranks that lost a peer."""

NO_MESSAGE = "killed without warning"
"""Reported for a start that ended without any message: SIGKILL, a lost node, out of memory."""


def interruptions(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per restart of a run, oldest first.

    Args:
        history: the events of a run in the order written.

    Returns:
        For each: ``time`` (ISO, of the start that followed), ``update`` (completed updates from which it resumed), ``reason``,
        ``job``, ``away_seconds`` (from the last event before it; None when a time is missing), ``redone`` (updates that had to be
        repeated; None in runs of versions that did not count them), ``world_size``.
    """
    found: list[dict[str, Any]] = []
    reason: str | None = None
    last: Mapping[str, Any] | None = None
    started = False
    for event in history:
        name = event.get("event")
        if name in STARTS:
            if started:
                found.append(
                    {
                        "time": event.get("time"),
                        "update": event.get("update"),
                        "reason": reason or NO_MESSAGE,
                        "job": event.get("job"),
                        "away_seconds": _seconds(last, event),
                        "redone": event.get("redone"),
                        "world_size": event.get("world_size"),
                    }
                )
            started, reason = True, None
        elif started and reason in (None, PEER_LOST) and name in CAUSES:
            reason = reason_of(event)
        if name != "submit":
            last = event
    return found


def reason_of(event: Mapping[str, Any]) -> str:
    """The reason for the end of a start, in one line."""
    text = " ".join(str(event.get(CAUSES[str(event["event"])]) or event["event"]).split())
    if event["event"] == "error" and LOST_PEER.search(text):
        return PEER_LOST
    return "was finished, then extended" if text == "finished" else text


def _seconds(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> float | None:
    try:
        between = datetime.fromisoformat(after["time"]) - datetime.fromisoformat((before or {})["time"])
    except (KeyError, OverflowError, TypeError, ValueError):
        return None
    return round(between.total_seconds(), 3)
