"""Files of one JSON object a line, written so that a crash costs at most the line being written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON. Floats keep every bit; NaN and infinities, which JSON lacks, become null."""
    return (json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n").encode()


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line in a single write (whole even when several processes append) and wait until it is on disk."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(file, (b"" if _ends_whole(file) else b"\n") + encode(record))
        os.fsync(file)
    finally:
        os.close(file)


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(b"".join(line + b"\n" for line in kept))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return len(lines) - len(kept)


def decode(line: bytes) -> dict[str, Any] | None:
    """The object on a line, None when the line is empty or torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _precedes(line: bytes, update: int) -> bool:
    record = decode(line)
    return record is not None and isinstance(record.get("update"), int) and record["update"] < update


def _ends_whole(file: int) -> bool:
    size = os.fstat(file).st_size
    return size == 0 or os.pread(file, 1, size - 1) == b"\n"


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
