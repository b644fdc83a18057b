"""What the disk refuses now is kept in memory and written when it can be: a full disk costs neither a line nor the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class RetryingWriter:
    """Lines of a file, written in order, and held back while the disk refuses them.

    Args:
        path: the file, for what is said.
        write: appends one record to it, whole or not at all. Raises OSError: the disk refuses.
        say: takes a line about a refusal, and one when it is over.
    """

    def __init__(self, path: Path, write: Callable[[Mapping[str, Any]], None], say: Callable[[str], None]) -> None:
        self._path = path
        self._write = write
        self._say = say
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._refused = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Write what waits, then this record; or keep it."""
        self._waiting.append(record)
        self.retry()

    def retry(self) -> bool:
        """Write what waits, oldest first; True if nothing is left."""
        refusal: OSError | None = None
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            refusal = error
        if (refusal is not None) != self._refused:
            self._refused = refusal is not None
            self._say(
                f"{self._path} can be written again"
                if refusal is None
                else f"{self._path} cannot be written ({refusal.strerror or refusal}); "
                "the run goes on, and its lines wait in memory until it can"
            )
        return refusal is None

    def close(self) -> None:
        """The last try; what the disk still refuses is lost, and that is said."""
        if not self.retry():
            self._say(f"{self._path}: the last {len(self._waiting)} lines could not be written")
