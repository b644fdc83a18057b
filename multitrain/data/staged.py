"""Copies of shards on the node's own disk (`data.stage`), as readers see them.

The copies are in ``FOLDER/multitrain-stage-UID/IDENTITY/SHARD.staged``; the identity of a pack is a digest of its index, so that all runs
of a user on a node share them. `multitrain.data.staging` makes them. A reader opens a copy for each video anew. If there is none, or it
cannot be read, it returns nothing and the caller reads the shared shard: no result depends on the copies.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
import time
from pathlib import Path

from multitrain.data.call_timeout import CallTimeout, TimeoutRunner

SUFFIX = ".staged"
"""Ends the names of finished copies."""
READ_SECONDS = 5.0
"""Maximum seconds that a reader waits for the node's disk."""
PAUSE_SECONDS = 300.0
"""Seconds without reading copies after that."""


class StageError(Exception):
    """This node has no folder for copies. The message is the reason, one clause."""


def locate(expression: str) -> Path:
    """The folder of this user's copies on this node, which need not exist.

    Args:
        expression: `data.stage`; variables and ``~`` are those of this process.

    Raises:
        StageError: a variable is not set, or the folder above does not exist.
    """
    for variable in re.findall(r"\$\{?(\w+)", expression):
        if not os.environ.get(variable):
            raise StageError(f"{variable} is not set on this node")
    folder = os.path.expanduser(os.path.expandvars(expression))
    if not os.path.isabs(folder):
        raise StageError(f"{folder!r} is no absolute path")
    if not os.path.isdir(folder):
        raise StageError(f"{folder} is no folder on this node")
    return Path(folder) / f"multitrain-stage-{os.getuid()}"


def check_private(found: os.stat_result, path: Path) -> None:
    """Raise StageError unless this is a folder of this user that nobody else may enter."""
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise StageError(f"{path} is not a folder of this user with mode 0700")


class Stage:
    """Reads copies; never raises. A disk that hangs costs a process `READ_SECONDS` every `PAUSE_SECONDS`.

    Args:
        expression: `data.stage`.
    """

    def __init__(self, expression: str) -> None:
        self._expression = expression
        self.trouble = ""
        """Why this process does not read copies at present, or has not for a while; empty if it always has."""
        self._local = threading.local()
        self._resume = 0.0

    def read(self, identity: str, shard: str, offset: int, size: int) -> bytes | None:
        """Bytes of a staged shard; None if there is no copy, or if it does not answer within `READ_SECONDS`."""
        if time.monotonic() < self._resume:
            return None
        try:
            return self._guard().run(lambda: self._read(identity, shard, offset, size), READ_SECONDS)
        except FileNotFoundError:
            return None
        except (OSError, StageError, CallTimeout) as error:
            self._resume = time.monotonic() + PAUSE_SECONDS
            if isinstance(error, OSError):
                self.trouble = f"{error.filename or self._expression}: {error.strerror or error}"
            elif isinstance(error, CallTimeout):
                self.trouble = f"{self._expression}: the disk has not answered for {READ_SECONDS:g} s"
            return None  # the staging process reports a StageError

    def discard(self, identity: str, shard: str) -> None:
        """Delete a damaged copy, which the staging process then reports and makes again."""
        with contextlib.suppress(OSError, StageError, CallTimeout):
            self._guard().run(lambda: self._discard(identity, shard), READ_SECONDS)

    def _guard(self) -> TimeoutRunner:
        """The runner of this thread: one whose caller was abandoned may still be in use."""
        if not hasattr(self._local, "guard"):
            self._local.guard = TimeoutRunner()
        guard: TimeoutRunner = self._local.guard
        return guard

    def _read(self, identity: str, shard: str, offset: int, size: int) -> bytes:
        folder = self._folder()
        try:
            file = os.open(f"{identity}/{shard}{SUFFIX}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                parts = []
                while size > 0 and (part := os.pread(file, size, offset)):  # one read returns at most 2 GiB
                    parts.append(part)
                    offset, size = offset + len(part), size - len(part)
                return parts[0] if len(parts) == 1 else b"".join(parts)
            finally:
                os.close(file)
        finally:
            os.close(folder)

    def _discard(self, identity: str, shard: str) -> None:
        folder = self._folder()
        try:
            os.unlink(f"{identity}/{shard}{SUFFIX}", dir_fd=folder)
        finally:
            os.close(folder)

    def _folder(self) -> int:
        """The open folder of the copies. Another user cannot replace it afterwards."""
        root = locate(self._expression)
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            check_private(os.fstat(folder), root)
        except StageError:
            os.close(folder)
            raise
        return folder


__all__ = ["SUFFIX", "Stage", "StageError", "check_private", "locate"]
