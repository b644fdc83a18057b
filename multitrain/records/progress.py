"""Progress: a bar with the remaining time on a terminal, one line per update in logs."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, TextIO


class Progress:
    """Shows the progress of a run on a stream.

    Args:
        total: updates of the whole run.
        start: updates completed when this start began.
        log_every: updates between two lines, if the stream is not a terminal.
        stream: output stream; default: standard error.
        clock: monotonic clock, in seconds.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        log_every: int = 1,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.stream = stream or sys.stderr
        self._log_every = log_every
        self._clock = clock
        self._times: deque[float] = deque([clock()], maxlen=101)
        self._bar: Any = None
        if self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=start, unit="update", file=self.stream, dynamic_ncols=True, smoothing=0.1
            )

    @property
    def seconds_per_update(self) -> float | None:
        """Mean wall time per update over the last hundred updates, including pauses between them; None before the first."""
        n = len(self._times) - 1
        return (self._times[-1] - self._times[0]) / n if n else None

    def update(self, record: Mapping[str, Any]) -> None:
        """Show that one more update is completed; `record` as in `metrics.jsonl`."""
        self._times.append(self._clock())
        done = int(record["update"]) + 1
        if self._bar is not None:
            self._bar.set_postfix_str(_short(record), refresh=False)
            self._bar.update(done - self._bar.n)
        elif done % self._log_every == 0 or done == self.total:
            self.write(self._line(done, record))

    def write(self, text: str) -> None:
        """Print a line of text without breaking the bar."""
        with contextlib.suppress(OSError):  # the log may lie on a disk that is full, and that must not end a run
            if self._bar is not None:
                self._bar.write(text, file=self.stream)
            else:
                print(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}", file=self.stream, flush=True)

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, done: int, record: Mapping[str, Any]) -> str:
        pace = self.seconds_per_update
        left = f"  ETA {duration(pace * (self.total - done))}" if pace is not None and done < self.total else ""
        width = len(str(self.total))
        return f"update {done:>{width}}/{self.total}  {_long(record)}{left}"


def duration(seconds: float) -> str:
    """Seconds in readable units: ``42 s``, ``3 min 05 s``, ``7 h 12 min``, ``2 d 03 h``."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600:02d} h"


def _short(record: Mapping[str, Any]) -> str:
    return ", ".join(_parts(record, {"loss": "loss {:.4f}", "lr": "lr {:.1e}", "clips_per_second": "{:.1f} clips/s"}))


def _long(record: Mapping[str, Any]) -> str:
    formats = {
        "loss": "loss {:.4f}",
        "loss_classification": "cls {:.4f}",
        "loss_projection": "proj {:.4f}",
        "loss_informative": "inf {:.4f}",
    }
    parts = _parts(record, formats)
    parts += [
        f"{name} {value:.3f}" for name, value in (record.get("loss_per_dataset") or {}).items() if value is not None
    ]
    formats = {
        "lr": "lr {:.2e}",
        "grad_norm": "grad {:.3f}",
        "seconds": "{:.2f} s",
        "clips_per_second": "{:.1f} clips/s",
        "data_wait_fraction": "data {:.0%}",
        "max_memory_gb": "{:.1f} GB",
    }
    return "  ".join(parts + _parts(record, formats))


def _parts(record: Mapping[str, Any], formats: Mapping[str, str]) -> list[str]:
    return [form.format(float(record[key])) for key, form in formats.items() if record.get(key) is not None]
