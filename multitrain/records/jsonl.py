"""JSON lines files, written so that a crash loses at most the line being written."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from multitrain import lease
from multitrain.config.reading import parse_json
from multitrain.files import replacing

_MAX_VALUE = 1e18
"""No count of updates, seconds or bytes is larger."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MAX_VALUE


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_VALUE


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(v is None or _is_number(v) for v in value.values())


FIELD_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("update", "total_updates", "world_size", "redone", "restart"), _is_count),
    **dict.fromkeys(("loss", "loss_classification", "loss_projection", "loss_informative", "lr"), _is_number),
    **dict.fromkeys(
        ("grad_norm", "value", "seconds", "clips_per_second", "data_wait_fraction", "max_memory_gb"), _is_amount
    ),
    **dict.fromkeys(("event", "time", "host", "status", "reason", "dataset", "path", "device", "backend"), _is_text),
    "job": lambda value: _is_text(value) or _is_count(value),
    "pid": lambda value: _is_count(value) and 0 < value < 1 << 31,
    "loss_per_dataset": _are_numbers,
    "skipped": _are_numbers,
    "results": lambda value: isinstance(value, dict) and all(map(_are_numbers, value.values())),
}
"""Checks of the values of fields of events and of updates' records, since a run's folder may be untrusted."""


def valid_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` without the fields whose values fail their check in :data:`FIELD_CHECKS`."""
    return {k: v for k, v in record.items() if v is None or k not in FIELD_CHECKS or FIELD_CHECKS[k](v)}


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON, see :func:`dumps`."""
    return dumps(record).encode() + b"\n"


def dumps(value: Mapping[str, Any], indent: int | None = None) -> str:
    """Strict JSON, which UTF-8 can encode. Floats keep every bit; NaN and infinities, which JSON lacks, become null.

    Bytes of file names that are not UTF-8 (surrogates) are written as escapes, which :func:`decode` reads back.
    """
    plain = _jsonable(value)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=indent)
    return text if _is_utf8(text) else json.dumps(plain, allow_nan=False, indent=indent)


def _is_utf8(text: str) -> bool:
    """Whether UTF-8 can encode `text`: it holds no bytes of file names (surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line and wait until it is on disk. Several processes may append; no line is split.

    A torn line at the end, left by a crash, is removed. On a file system without locks it is terminated instead, since another
    process might still be writing it.

    Raises:
        OSError: the line cannot be written; no part of it is left in the file.
        LeaseLost: `path` lies in the run of this process, and another start has taken the run over.
    """
    lease.verify(path)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        start = b""
        if locked := _locked(file):
            os.ftruncate(file, _complete_bytes(file))
        elif _complete_bytes(file) < os.fstat(file).st_size:
            start = b"\n"
        write(file, start + encode(record), alone=locked)
        os.fsync(file)
    finally:
        os.close(file)


def write(file: int, line: bytes, *, alone: bool = True) -> None:
    """Write `line` at the end of an open file; if only its beginning can be written, remove that again.

    Args:
        alone: whether no other process writes to the file now; otherwise the beginning stays as a torn line.

    Raises:
        OSError: the line cannot be written.
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
    """The records of a file; none when it does not exist. Torn lines, left by a crash, and values that fail their check in
    :data:`FIELD_CHECKS` are left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    for line in data.split(b"\n"):
        record = decode(line)
        if record is not None:
            yield valid_fields(record)


def drop_from(path: Path, update: int) -> int:
    """Keep only complete lines with ``"update" < update``; the file is replaced atomically. Returns the number of dropped lines.

    Raises:
        LeaseLost: as :func:`append`.
    """
    lease.verify(path)
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
    """The object on a line; None when the line is empty or torn."""
    try:
        record = parse_json(line, "a line")
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _precedes(line: bytes, update: int) -> bool:
    record = decode(line)
    return record is not None and isinstance(record.get("update"), int) and record["update"] < update


def _locked(file: int) -> bool:
    """Wait for the file's lock, which closing the file releases; False where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _complete_bytes(file: int, block: int = 4096) -> int:
    """Number of bytes up to the end of the last complete line."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _jsonable(value: Any) -> Any:
    """The value with JSON's types only; scalars of numpy and torch are converted with `item()`."""
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "item"):
        return _jsonable(value.item())
    return str(value)
