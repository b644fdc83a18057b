"""`events.jsonl`: what happened to a run, and when. Never truncated: the history includes what a crash undid."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from multitrain.monitor import jsonl, slurm


class Events:
    """Appends events to a file, each on disk before :meth:`write` returns.

    Args:
        path: the file, e.g. ``RUN/events.jsonl``.
        job: scheduler's job id; of the environment when not given, null outside a job.
        restart: when not given: in a SLURM job, how often SLURM had started the job before; elsewhere how many starts of
            the run the file tells of before the one that goes on now.
        host: name of the machine; this one's when not given.
    """

    def __init__(
        self, path: str | Path, *, job: str | None = None, restart: int | None = None, host: str | None = None
    ) -> None:
        self.path = Path(path)
        self.job = job if job is not None else slurm.job_id()
        self.restart = restart if restart is not None else _restarts(self.path)
        self.host = host or socket.gethostname()

    def write(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append one event (`start`, `resume`, `signal`, `checkpoint`, `end` …); returns what was written.

        Raises:
            OSError: the disk refuses it.
        """
        record = self.record(event, **fields)
        jsonl.append(self.path, record)
        return record

    def record(self, event: str, **fields: Any) -> dict[str, Any]:
        """What :meth:`write` writes: the event with the time that it is now, and where."""
        return {
            "event": event,
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "job": self.job,
            "restart": self.restart,
            "host": self.host,
            "pid": os.getpid(),
            **fields,
        }


def read(path: str | Path) -> list[dict[str, Any]]:
    """The events of a file in the order written; empty when there is none."""
    return list(jsonl.read(Path(path)))


def starts_before(records: Iterable[Mapping[str, Any]]) -> int:
    """How many starts of the run these events tell of."""
    return sum(record.get("event") == "begin" for record in records)


def _restarts(path: Path) -> int:
    """How often the run, or its SLURM job, was started before the start that goes on now."""
    if slurm.job_id() is not None:
        return slurm.restart_count()
    return max(0, starts_before(jsonl.read(path)) - 1)
