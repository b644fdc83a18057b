"""Index files of annotations: parsed once, named after their content, then memory-mapped by everyone.

Beside the indexes lies a small note per csv with that file's size and time of change, so that a csv of a million lines that
has not changed is opened in milliseconds, without being read.
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
"""Version of the index file; another one is built anew."""

_DIGEST = 1
"""Version of the digest of a file's content, which runs are compared by when they resume: it outlives index formats."""

_MAGIC = b"MTINDEX\n"
_MTIME_SETTLED_SECONDS = (
    2.0  # seconds after which an unchanged time of change proves an unchanged file (two writes can share a tick)
)


def ensure_index(csv: Path, syntax: Syntax, folder: Path, videos: Path | None = None) -> Path:
    """The index file of `csv` as it is now, in `folder`, built if need be; safe when many processes do it at once.

    Args:
        videos: the folder that paths start from; a list of which some are absolute or lead out of it has an index for each.

    Raises:
        CatalogError: the csv cannot be read or has a wrong line, or the index cannot be written.
    """
    with _naming(csv, folder):
        index = _indexed(csv, syntax, folder)
        if videos is None or not read_header(index)["depends_on_folder"]:
            return index
        return _with_folder(index, csv, syntax, videos)


@contextlib.contextmanager
def _naming(csv: Path, folder: Path) -> Iterator[None]:
    """Raises CatalogError for what the operating system refuses within the block."""
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
    """The index by the text of the csv alone."""
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
    """The index of a csv whose videos are told apart by the folder that paths start from; `plain` is the one by its text."""
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


def _how(syntax: Syntax) -> tuple[bytes, bytes]:
    return syntax.separator, bytes([syntax.multi_label])


def _name(*parts: bytes) -> str:
    """File name of what `parts` say: 32 hex digits."""
    digest = hashlib.blake2b(b"%d" % FORMAT, digest_size=16)
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()


def _cached_index_name(note: Path, csv: Path) -> str | None:
    """Name of the index of `csv`, if the note about it is of the file as it is now."""
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
    """The header of an index file, unchecked. Raises OSError, ValueError: missing, or no index file."""
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
    """Header and arrays of an index file of a version, mapped; of annotations: paths, starts, labels, label_starts.

    paths: all paths, one behind the other, uint8; starts: where each begins, and the end [N + 1]; labels and
    label_starts as in `Annotations`. Of all, the narrowest unsigned integers that hold them.

    Raises:
        OSError, ValueError: missing or incomplete.
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
    """Write under a temporary name, then rename: readers see nothing or all of it.

    The name is a digest of what is indexed, so whatever has it is an index or the torn beginning of one; but no link is
    replaced.

    Raises:
        OSError: it cannot be written, or a link stands in its place.
    """
    if file.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(file))
    with replacing(file) as temporary, open(temporary, "wb") as out:
        for part in parts:
            out.write(part)
        out.flush()
        os.fsync(out.fileno())


def _build(content: bytes, csv: Path, syntax: Syntax) -> list[Any]:
    """The parts of the index file of `content`. Raises CatalogError."""
    parsed = parse(content, csv, syntax)
    paths = parsed.paths(content)
    duplicates = count_repeated(paths, content, csv, syntax)
    digest = hashlib.blake2b(b"%d:%d:" % (_DIGEST, len(paths)), digest_size=16)
    digest.update(b"\n".join(paths))
    digest.update(parsed.labels.tobytes() + parsed.label_starts.tobytes())
    starts = np.concatenate([[0], np.cumsum(parsed.stops - parsed.starts)])
    arrays = [
        np.frombuffer(b"".join(paths), np.uint8),
        starts.astype(np.min_scalar_type(int(starts[-1]))),
        parsed.labels.astype(np.min_scalar_type(int(parsed.labels.max()))),
        parsed.label_starts,
    ]
    header: dict[str, Any] = {
        "format": FORMAT,
        "digest": digest.hexdigest(),
        "multi_label": syntax.multi_label,
        "duplicates": duplicates,
        "depends_on_folder": depends_on_folder(paths, content),
        "largest_label": int(parsed.labels.max()),
    }
    return aligned_parts(header, arrays)


def aligned_parts(header: dict[str, Any], arrays: list[np.ndarray]) -> list[Any]:
    """The parts of an index file with this header and these arrays, each at a multiple of 64 bytes."""
    room = -(-(len(json.dumps(header)) + 1024) // 2048) * 2048  # for magic, length and the header itself
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


__all__ = ["FORMAT", "aligned_parts", "ensure_index", "read_index"]
