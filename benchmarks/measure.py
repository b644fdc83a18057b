"""Timing: CPU seconds of the whole process, with alternating variants."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from typing import Any


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU time that one call takes, over all threads of this process."""
    began = time.process_time()
    function()
    return time.process_time() - began


def take_turns(
    variants: Mapping[str, Callable[[int], Any]],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[Callable[[], Any]], float] = cpu_seconds,
) -> dict[str, list[float]]:
    """CPU seconds of each call of every variant, called with the round's number; `clock` makes the call and measures it.

    The order is reversed every other round, so that no variant always profits from warm caches.
    """
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-warm_up, rounds):
        names = list(variants)[:: 1 if number % 2 else -1]
        for name in names:
            gc.collect()
            spent = clock(partial(variants[name], max(number, 0)))
            if number >= 0:
                found[name].append(spent)
    return found


class Apart:
    """Calls a function in a forked process; each call returns its CPU seconds.

    For variants that need different process settings: our loader workers set up memory and threads, the published ones do not.
    `prepare` is called in the process first.
    """

    def __init__(self, function: Callable[[int], Any], prepare: Callable[[], Any] | None = None) -> None:
        context = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function, prepare), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, number: int) -> float:
        self._ours.send(number)
        try:
            return float(self._ours.recv())
        except EOFError:
            raise SystemExit("a measured process has ended; what it said is above") from None

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._ours.send(None)
        self._process.join()


def _serve(connection: Connection, function: Callable[[int], Any], prepare: Callable[[], Any] | None) -> None:
    if prepare is not None:
        prepare()
    while (number := connection.recv()) is not None:
        gc.collect()
        connection.send(cpu_seconds(partial(function, number)))


def take_turns_apart(
    variants: Mapping[str, tuple[Callable[[int], Any], Callable[[], Any] | None]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Like `take_turns`, with each variant (function, `prepare`) in a separate process."""
    processes = {name: Apart(*variant) for name, variant in variants.items()}
    try:
        return take_turns(processes, rounds, warm_up, clock=lambda call: call())
    finally:
        for process in processes.values():
            process.close()


__all__ = ["cpu_seconds", "take_turns", "take_turns_apart"]
