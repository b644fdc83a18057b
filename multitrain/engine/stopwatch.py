"""Device time of a part of the work, without a synchronisation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """Sums the seconds spent within :meth:`running`: on a GPU between two CUDA events, else wall time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time this context."""
        if self._device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((first, last))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def seconds(self) -> float:
        """Sum so far. On a GPU, call it after the device has passed the last event, for example after reading a result."""
        return self._seconds + sum(first.elapsed_time(last) for first, last in self._events) / 1e3
