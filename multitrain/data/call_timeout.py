"""A time limit for calls that cannot be interrupted, e.g. a decoder that hangs or a read from a dead file server."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class WriteLease:
    """Permission to write to the caller's memory, until the caller revokes it with `end`.

    A context manager around each short write; `end` waits for the write in progress.
    """

    def __init__(self) -> None:
        self._lock, self._ended = threading.Lock(), False

    def end(self) -> None:
        """Revoke the permission; no write happens after this returns."""
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
    """The call did not return in time; its thread was abandoned."""


class TimeoutRunner:
    """Runs calls in a separate thread and stops waiting for a call that takes too long.

    A thread that hangs in a library cannot be stopped. It is abandoned (as a daemon, it does not keep the process alive), and the
    next call gets a new thread. An idle thread ends with its runner.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] | None = None

    def __del__(self) -> None:
        self._dismiss()

    def _dismiss(self) -> None:
        """End the thread after its current call."""
        if self._calls is not None:
            self._calls.put(None)
        self._calls = None

    def run(self, function: Callable[[], T], seconds: float | None) -> T:
        """Call `function` and return its result or raise its exception. Raises CallTimeout after `seconds`."""
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._calls,), name="decode", daemon=True).start()
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def call() -> None:
            try:
                answers.put((function(), None))
            except BaseException as error:  # passed to the caller
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
        del call  # free the objects it references while waiting for the next call
