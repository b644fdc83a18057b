"""Timing: CPU seconds of the whole process, variants taking turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU time that one call takes, over all threads of this process."""
    began = time.process_time()
    function()
    return time.process_time() - began


def take_turns(variants: Mapping[str, Callable[[int], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """CPU seconds of each call of every variant, called with the round's number.

    The order is reversed every other round, so that none is always the one that finds warm caches.
    """
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-warm_up, rounds):
        names = list(variants)[:: 1 if number % 2 else -1]
        for name in names:
            gc.collect()
            spent = cpu_seconds(partial(variants[name], max(number, 0)))
            if number >= 0:
                found[name].append(spent)
    return found
