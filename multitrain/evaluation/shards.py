"""Scores on disk during an evaluation: append-only files that survive interruptions and changes of the world size.

A folder holds, for every start of every rank, ``rank-….scores`` (binary records) and, if videos could not be read,
``rank-….unreadable.jsonl``. Each rank writes only its own files, so that ranks need not communicate; the union
of all files is the state of the evaluation. A record is ``length u32, CRC-32 u32, payload``; a record cut short by a crash is ignored.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multitrain.config import ConfigError
from multitrain.config.reading import parse_json
from multitrain.records import jsonl

_FRAME = struct.Struct("<II")
_INDEX = struct.Struct("<q")
_HEADER_INDEX = -1
SYNC_RECORDS, SYNC_SECONDS = 64, 10.0
"""Records, or seconds, between two syncs to disk."""

Scores = npt.NDArray[np.float32]


class ShardWriter:
    """Writes the files of one start of one rank; each is created with its first record.

    Args:
        folder: shared by all ranks.
        header: the settings of the evaluation; the same in all files of a folder.
        rank: of this process.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], rank: int) -> None:
        self._stem = folder / f"rank-{rank:04d}-{socket.gethostname()[:32]}-{uuid.uuid4().hex[:8]}"
        self._header = dict(header)
        self._scores: int | None = None
        self._failures: int | None = None
        self._pending = bytearray()
        self._records = 0
        self._synced = time.monotonic()

    def scored(self, index: int, scores: Scores) -> None:
        """Append the scores of video `index`, float32 [K]; :meth:`sync` writes them to disk."""
        if self._scores is None:
            self._scores = self._create(".scores")
            self._pending += _record(_HEADER_INDEX, json.dumps(self._header).encode())
        self._pending += _record(index, np.ascontiguousarray(scores, dtype="<f4").tobytes())
        self._records += 1
        if self._records >= SYNC_RECORDS or time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def unreadable(self, index: int, path: str, reason: str) -> None:
        """Record that video `index` cannot be read."""
        if self._failures is None:
            self._failures = self._create(".unreadable.jsonl")
        jsonl.write(self._failures, jsonl.encode({"index": index, "path": path, "reason": reason}))
        os.fsync(self._failures)

    def sync(self) -> None:
        """Sync everything appended so far."""
        if self._scores is not None and self._pending:
            jsonl.write(self._scores, bytes(self._pending))
            os.fsync(self._scores)
            self._pending.clear()
        self._records, self._synced = 0, time.monotonic()

    def close(self) -> None:
        """Sync and close. Idempotent."""
        self.sync()
        for descriptor in (self._scores, self._failures):
            if descriptor is not None:
                os.close(descriptor)
        self._scores = self._failures = None

    def _create(self, ending: str) -> int:
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        return os.open(f"{self._stem}{ending}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)


class ShardReader:
    """Reader of all files of a folder; :meth:`poll` reads only new records.

    Args:
        folder: need not exist yet.
        header: the settings of the evaluation.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self._folder = folder
        self._header = json.loads(json.dumps(header))
        self._offsets: dict[Path, int] = {}
        self.scores: dict[int, Scores] = {}
        """Scores float32 [K] by video."""
        self.unreadable: dict[int, dict[str, Any]] = {}
        """``index``, ``path`` and ``reason`` by video, for those that have no scores."""

    def poll(self) -> int:
        """Read the records appended since the last call; return the number of new videos.

        Raises:
            ConfigError: a file belongs to another evaluation; the message names the difference.
        """
        before = len(self.scores) + len(self.unreadable)
        if self._folder.is_dir():
            for file in sorted(self._folder.iterdir()):
                if file.suffix == ".scores":
                    self._read_scores(file)
                elif file.name.endswith(".unreadable.jsonl"):
                    self._read_failures(file)
        for index in self.scores.keys() & self.unreadable.keys():
            del self.unreadable[index]
        return len(self.scores) + len(self.unreadable) - before

    def __contains__(self, index: int) -> bool:
        return index in self.scores or index in self.unreadable

    def _new(self, file: Path) -> tuple[int, bytes]:
        start = self._offsets.get(file, 0)
        with file.open("rb") as handle:
            handle.seek(start)
            return start, handle.read()

    def _read_scores(self, file: Path) -> None:
        start, content = self._new(file)
        at = 0
        while at + _FRAME.size <= len(content):
            length, checksum = _FRAME.unpack_from(content, at)
            payload = content[at + _FRAME.size : at + _FRAME.size + length]
            if len(payload) < length or length < _INDEX.size or zlib.crc32(payload) != checksum:
                break
            (index,) = _INDEX.unpack_from(payload)
            if index == _HEADER_INDEX:
                self._check(file, parse_json(payload[_INDEX.size :], file))
            elif (length - _INDEX.size) % 4:
                raise ConfigError(
                    f"{file}: holds something else than scores; delete that folder, or choose another --out"
                )
            else:
                self.scores.setdefault(
                    index, np.frombuffer(payload, dtype="<f4", offset=_INDEX.size).astype(np.float32)
                )
            at += _FRAME.size + length
        self._offsets[file] = start + at

    def _read_failures(self, file: Path) -> None:
        start, content = self._new(file)
        whole = content[: content.rfind(b"\n") + 1]
        for failure in map(jsonl.decode, whole.splitlines()):
            if failure is not None and isinstance(failure.get("index"), int):  # else torn: the video is tried again
                self.unreadable[failure["index"]] = failure
        self._offsets[file] = start + len(whole)

    def _check(self, file: Path, header: Any) -> None:
        header = header if isinstance(header, dict) else {}
        other = [k for k in sorted(header.keys() | self._header.keys()) if header.get(k) != self._header.get(k)]
        if other:
            said = "; ".join(f"{k} {_short(header.get(k))} there, {_short(self._header.get(k))} now" for k in other[:3])
            raise ConfigError(
                f"{file.parent}: holds scores of another evaluation ({said}); choose another --out, or delete that folder"
            )


def _record(index: int, content: bytes) -> bytes:
    payload = _INDEX.pack(index) + content
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"
