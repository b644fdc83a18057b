"""``touch RUN/PROFILE``: rank 0 writes a trace of the next updates; nothing about the training changes."""

from __future__ import annotations

import contextlib
import gzip
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from multitrain.files import replace_text, replacing

REQUEST = "PROFILE"
"""File in the run's folder that asks for a trace."""
UPDATES = 3
"""Updates in a trace."""
LOOK_SECONDS = 1.0
"""Seconds between two looks for the file."""
TOP_OPERATIONS = 25

phase = record_function
"""``with phase("forward"):`` names a part of an update in the trace; without a trace it costs about a microsecond."""


class Profiler:
    """Traces updates of one rank on request.

    Args:
        run: the run's folder; traces go to ``RUN/profile``.
        device: of the model.
        say: writes a line to the log.
        active: whether this rank looks for the request.
    """

    def __init__(self, run: Path, device: torch.device, say: Callable[[str], None], *, active: bool) -> None:
        self._run = run
        self._device = device
        self._say = say
        self._active = active
        self._last_look = -LOOK_SECONDS
        self._profile: Any = None
        self._first = 0

    @contextlib.contextmanager
    def update(self, number: int) -> Iterator[None]:
        """Around one update; `number`: completed updates before it."""
        if self._active and self._profile is None and self._asked():
            self._begin(number)
        with phase(f"update {number}"):
            yield
        if self._profile is not None and number + 1 - self._first >= UPDATES:
            self._end(number)

    def _asked(self) -> bool:
        now = time.monotonic()
        if now - self._last_look < LOOK_SECONDS:
            return False
        self._last_look = now
        return (self._run / REQUEST).exists()

    def _begin(self, number: int) -> None:
        with contextlib.suppress(OSError):
            (self._run / REQUEST).unlink()
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        try:
            started = profile(activities=activities)
            started.start()
        except Exception as error:  # another profiler is attached, or the driver forbids it: no reason to stop the run
            self._say(f"no trace of the next updates: {' '.join(str(error).split())[:200]}")
            return
        self._profile, self._first = started, number

    def _end(self, number: int) -> None:
        """Write ``profile/update-FIRST.json.gz`` and the operations that took longest beside it."""
        ended, self._profile = self._profile, None
        file = self._run / "profile" / f"update-{self._first:08d}.json.gz"
        try:
            ended.stop()
            file.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder, "trace.json")
                ended.export_chrome_trace(str(trace))
                with replacing(file) as temporary:
                    temporary.write_bytes(gzip.compress(trace.read_bytes(), 4))
            of = "self_cpu_time_total" if self._device.type == "cpu" else "self_device_time_total"
            table = ended.key_averages().table(sort_by=of, row_limit=TOP_OPERATIONS)
            replace_text(file.with_name(f"update-{self._first:08d}.txt"), table + "\n")
        except Exception as error:  # a full disk, or an error of the profiler
            self._say(f"no trace of updates {self._first} to {number}: {' '.join(str(error).split())[:200]}")
            return
        self._say(f"trace of updates {self._first} to {number}: {file} (open it at https://ui.perfetto.dev)")
