"""Index files of annotations: built once, named by a digest of their content, then memory-mapped by all processes.

The index folder also holds one cache record per csv, with the csv's size and modification time. An unchanged csv of a million lines
is therefore opened in milliseconds, without reading it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from multitrain.data.annotations import (
    CatalogError,
    Syntax,
    count_repeated,
    count_repeats,
    depends_on_folder,
    parse,
    read_annotations,
)
from multitrain.files import replacing

FORMAT = 4
"""Version of the index file; an index of another version is rebuilt."""

_DIGEST = 1
"""Version of the digest of a csv's content, which a resumed run compares; independent of `FORMAT`."""

_MAGIC = b"MTINDEX\n"
_MTIME_SETTLED_SECONDS = (
    2.0  # seconds after which an unchanged modification time proves an unchanged file (two writes may share a tick)
)


def ensure_index(csv: Path, syntax: Syntax, folder: Path, videos: Path | None = None) -> Path:
    """The index file of the current content of `csv`, in `folder`; builds it if it is missing. Safe for concurrent processes.

    Args:
        videos: the folder from which paths start. A csv with absolute paths, or paths that leave the folder, has one index per folder.

    Raises:
        CatalogError: the csv cannot be read or has an invalid line, or the index cannot be written.
    """
    with _naming(csv, folder):
        index = _indexed(csv, syntax, folder)
        if videos is None or not read_header(index)["needs_folder"]:
            return index
        return _with_folder(index, csv, syntax, videos)


@contextlib.contextmanager
def _naming(csv: Path, folder: Path) -> Iterator[None]:
    """A context that converts OSError to CatalogError."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        if Path(os.fsdecode(where)) == csv:
            raise CatalogError(
                f"{csv}: cannot be read ({error.strerror}); check the path and its permissions"
            ) from error
        raise CatalogError(
            f"{where}: index of {csv} cannot be written ({error.strerror}); set data.index to a folder that can be"
        ) from error


def _indexed(csv: Path, syntax: Syntax, folder: Path) -> Path:
    """The index for the text of the csv alone."""
    how = _how(syntax)
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f"{_name(os.fsencode(csv), *how)}.json"
    known = _cached_index_name(note, csv)
    if known is not None and _is_complete(folder / known):
        return folder / known
    before = csv.stat()
    content = read_annotations(csv)
    index = folder / f"{_name(content, *how)}.index"
    if not _is_complete(index):
        _write(index, _build(content, csv, syntax))
    stamp = {
        "csv": str(csv),
        "size": before.st_size,
        "mtime_ns": before.st_mtime_ns,
        "index": index.name,
    }
    if len(content) == before.st_size and time.time() - before.st_mtime > _MTIME_SETTLED_SECONDS:
        with contextlib.suppress(PermissionError):  # another user's folder: only saves time
            _write(note, [json.dumps(stamp).encode()])
    return index


def _with_folder(plain: Path, csv: Path, syntax: Syntax, videos: Path) -> Path:
    """The index of a csv whose paths need the folder `videos` for comparison; `plain` is the index for its text alone."""
    places = os.fsencode(os.path.abspath(videos)), os.fsencode(os.path.realpath(videos))
    index = plain.with_name(f"{plain.stem}-{_name(*places)}.index")
    if not _is_complete(index):
        content = read_annotations(csv)
        if f"{_name(content, *_how(syntax))}.index" != plain.name:
            raise CatalogError(f"{csv}: changed while it was read; try again")
        header, arrays = read_index(plain)
        header["duplicates"] = count_repeats(content, csv, syntax, videos)
        _write(index, aligned_parts({k: v for k, v in header.items() if k not in ("arrays", "bytes")}, arrays))
    return index


def _how(syntax: Syntax) -> tuple[bytes, ...]:
    return syntax.separator, bytes([syntax.multi_label]), *([b"segments"] if syntax.segments else [])


def _name(*parts: bytes) -> str:
    """File name for `parts`: 32 hex digits of their digest."""
    digest = hashlib.blake2b(b"%d" % FORMAT, digest_size=16)
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()


def _cached_index_name(note: Path, csv: Path) -> str | None:
    """Name of the index of `csv`, if the cache record `note` matches the current file; else None."""
    try:
        stamp = json.loads(note.read_bytes())
        now = csv.stat()
        fresh = (stamp["size"], stamp["mtime_ns"]) == (now.st_size, now.st_mtime_ns)
        return str(stamp["index"]) if fresh else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_complete(index: Path) -> bool:
    try:
        header = read_header(index)
        return index.stat().st_size == header["bytes"] and header["format"] == FORMAT
    except (OSError, ValueError, KeyError):
        return False


def read_header(index: Path) -> dict[str, Any]:
    """Read the header of an index file, without checks. Raises OSError or ValueError: the file is missing, or not an index."""
    with open(index, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("not an index file")
        size = int.from_bytes(file.read(8), "little")
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError("its header is cut off")
        try:
            return dict(json.loads(file.read(size)))
        except (TypeError, RecursionError):
            raise ValueError("not an index file") from None


def read_index(index: Path, version: int = FORMAT) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Header and memory-mapped arrays of an index file; for annotations: paths, starts, labels, label_starts,
    and in a csv with segments: start and end of each [2 N], float64, NaN for complete videos.

    paths: all paths concatenated, uint8; starts: the start of each, and the end [N + 1]; labels and
    label_starts: as in `Annotations`. All but segments are the narrowest unsigned integers that hold the values.

    Raises:
        OSError, ValueError: the file is missing, incomplete, or of another version.
    """
    header = read_header(index)
    if not {"bytes", "format", "arrays"} <= header.keys():
        raise ValueError("its header is incomplete")
    whole = np.memmap(index, dtype=np.uint8, mode="r")
    if len(whole) != header["bytes"] or header["format"] != version:
        raise ValueError(f"{len(whole)} bytes, not {header['bytes']}")
    plain = whole.view(np.ndarray)
    try:
        return header, [plain[at : at + size].view(dtype) for dtype, at, size in header["arrays"]]
    except (KeyError, TypeError, SyntaxError):
        raise ValueError("its header describes no arrays") from None


def _write(file: Path, parts: list[Any]) -> None:
    """Write under a temporary name, then rename, so that readers see the complete file or none.

    The name is a digest of the indexed content, so that an existing file of this name is an index, or an incomplete one; a symbolic
    link is not replaced.

    Raises:
        OSError: the file cannot be written, or its path is a symbolic link.
    """
    if file.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(file))
    with replacing(file) as temporary, open(temporary, "wb") as out:
        for part in parts:
            out.write(part)
        out.flush()
        os.fsync(out.fileno())


def _build(content: bytes, csv: Path, syntax: Syntax) -> list[Any]:
    """The parts of the index file for `content`. Raises CatalogError."""
    parsed = parse(content, csv, syntax)
    paths = parsed.paths(content)
    duplicates = count_repeated(paths, content, csv, syntax)
    digest = hashlib.blake2b(b"%d:%d:" % (_DIGEST, len(paths)), digest_size=16)
    digest.update(b"\n".join(paths))
    digest.update(parsed.labels.tobytes() + parsed.label_starts.tobytes())
    if parsed.segments is not None:
        digest.update(parsed.segments.astype("<f8").tobytes())
    starts = np.concatenate([[0], np.cumsum(parsed.stops - parsed.starts)])
    arrays = [
        np.frombuffer(b"".join(paths), np.uint8),
        starts.astype(np.min_scalar_type(int(starts[-1]))),
        parsed.labels.astype(np.min_scalar_type(int(parsed.labels.max()))),
        parsed.label_starts,
        *([] if parsed.segments is None else [parsed.segments.ravel()]),
    ]
    header: dict[str, Any] = {
        "format": FORMAT,
        "digest": digest.hexdigest(),
        "multi_label": syntax.multi_label,
        "duplicates": duplicates,
        "needs_folder": depends_on_folder(paths, content),
        "largest_label": int(parsed.labels.max()),
    }
    return aligned_parts(header, arrays)


def aligned_parts(header: dict[str, Any], arrays: list[np.ndarray]) -> list[Any]:
    """The parts of an index file with this header and these arrays, each at a multiple of 64 bytes."""
    room = -(-(len(json.dumps(header)) + 1024) // 2048) * 2048  # bytes for magic, length and header
    at = room
    places: list[list[Any]] = []
    parts: list[Any] = []
    for array in arrays:
        places.append([array.dtype.str, at, array.nbytes])
        padding = -array.nbytes % 64
        parts += [array, b"\0" * padding]
        at += array.nbytes + padding
    text = json.dumps(header | {"arrays": places, "bytes": at}).encode()
    head = _MAGIC + len(text).to_bytes(8, "little") + text
    return [head.ljust(room, b"\0"), *parts]
