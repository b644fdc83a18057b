"""Files of one JSON object a line, written so that a crash costs at most the line being written."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from multitrain.config.reading import parse_json
from multitrain.files import replacing


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON. Floats keep every bit; NaN and infinities, which JSON lacks, become null."""
    return (json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n").encode()


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line, whole even when several processes append, and wait until it is on disk.

    A torn line at the end, which a crash has left, is removed; where the file system has no locks it is ended instead,
    since another process might be writing it.

    Raises:
        OSError: the disk refuses the line; nothing of it is left in the file.
    """
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        start = b""
        if locked := _locked(file):
            os.ftruncate(file, _whole(file))
        elif _whole(file) < os.fstat(file).st_size:
            start = b"\n"
        write(file, start + encode(record), alone=locked)
        os.fsync(file)
    finally:
        os.close(file)


def write(file: int, line: bytes, *, alone: bool = True) -> None:
    """Write `line` at the end of an open file; when the disk takes only the beginning of it, take that away again.

    Args:
        alone: whether nobody else writes to the file now; else the beginning stays, as a torn line.

    Raises:
        OSError: the disk refuses the line.
    """
    end = os.fstat(file).st_size
    try:
        while line:
            line = line[os.write(file, line) :]
    except OSError:
        if alone:
            os.ftruncate(file, end)
        raise


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, nothing when it does not exist. Torn lines, which a crash leaves behind, are left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    for line in data.split(b"\n"):
        record = decode(line)
        if record is not None:
            yield record


def drop_from(path: Path, update: int) -> int:
    """Keep only whole lines with ``"update" < update``; the file is replaced in one step. Returns the lines dropped."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return 0
    lines = [line for line in data.split(b"\n") if line.strip()]
    kept = [line for line in lines if _precedes(line, update)]
    if len(kept) == len(lines) and data.endswith(b"\n"):
        return 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(b"".join(line + b"\n" for line in kept))
        file.flush()
        os.fsync(file.fileno())
    return len(lines) - len(kept)


def decode(line: bytes) -> dict[str, Any] | None:
    """The object on a line, None when the line is empty or torn."""
    try:
        record = parse_json(line, "a line")
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _precedes(line: bytes, update: int) -> bool:
    record = decode(line)
    return record is not None and isinstance(record.get("update"), int) and record["update"] < update


def _locked(file: int) -> bool:
    """Wait for the file's lock, which closing it gives back; False where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _whole(file: int, block: int = 4096) -> int:
    """Bytes up to the end of the last whole line."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _plain(value: Any) -> Any:
    """Values that JSON knows; scalars of numpy and torch by their `item()`."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)
