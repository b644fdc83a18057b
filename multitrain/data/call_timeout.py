"""A time limit for calls that cannot be interrupted: a decoder that never returns, a read from a server that is gone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class WriteLease:
    """The right of a call to write to memory that is not its own, until its caller wants the memory back.

    A context manager around each write, brief ones: `end` waits for the one in progress.
    """

    def __init__(self) -> None:
        self._lock, self._ended = threading.Lock(), False

    def end(self) -> None:
        """Nothing is written from now on."""
        with self._lock:
            self._ended = True

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._ended:
            self._lock.release()
            raise CallTimeout("the memory belongs to another task by now")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class CallTimeout(Exception):
    """The call has not returned in time; its thread has been left behind."""


class TimeoutRunner:
    """Runs calls in a thread of its own and stops waiting for one that takes too long.

    A thread stuck in a library cannot be ended, so it is left behind (a daemon: it does not keep the process alive), and the
    next call gets a new one. A thread that is not stuck ends with its guard.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] | None = None

    def __del__(self) -> None:
        self._dismiss()

    def _dismiss(self) -> None:
        """Let the thread end after what it is doing."""
        if self._calls is not None:
            self._calls.put(None)
        self._calls = None

    def run(self, function: Callable[[], T], seconds: float | None) -> T:
        """What `function` returns or raises. Raises CallTimeout after `seconds`."""
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._calls,), name="decode", daemon=True).start()
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def call() -> None:
            try:
                answers.put((function(), None))
            except BaseException as error:  # handed over to the caller
                answers.put((None, error))

        self._calls.put(call)
        try:
            result, error = answers.get(timeout=seconds)
        except queue.Empty:
            self._dismiss()
            raise CallTimeout(f"no answer within {seconds} s") from None
        if error is not None:
            raise error
        return result


def _serve(calls: queue.SimpleQueue[Callable[[], Any] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # and with it what it holds, while the next one is waited for


__all__ = ["CallTimeout", "TimeoutRunner", "WriteLease"]
