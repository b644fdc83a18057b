"""`events.jsonl`: the history of a run with times. Never truncated: it includes updates that a crash undid."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from multitrain.cluster import slurm
from multitrain.records import jsonl


class Events:
    """Appends events to a file, each on disk before :meth:`write` returns.

    Args:
        path: the file, e.g. ``RUN/events.jsonl``.
        job: the scheduler's job id; default: from the environment, null outside a job.
        restart: number of earlier starts; default: of the job in a SLURM job, else those recorded in the file before the
            current one.
        host: name of the machine; default: this one.
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
            OSError: it cannot be written.
        """
        record = self.record(event, **fields)
        jsonl.append(self.path, record)
        return record

    def record(self, event: str, **fields: Any) -> dict[str, Any]:
        """The record that :meth:`write` writes: the event with time, job, host and process."""
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
    """Number of starts of the run in these events."""
    return sum(record.get("event") == "begin" for record in records)


def _restarts(path: Path) -> int:
    """Number of starts of the run, or of its SLURM job, before the current one."""
    if slurm.job_id() is not None:
        return slurm.restart_count()
    return max(0, starts_before(jsonl.read(path)) - 1)
