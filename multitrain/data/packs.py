"""Packed videos: plain tar shards and one index, read as if the videos were files.

A folder with a file `INDEX` is a pack. For the path of a video below such a folder (``PACK/class/v1.mp4``), `find_packed`
returns the shard, offset, size and checksum of its bytes. ``SHARD.tar::class/v1.mp4`` names a video
in a single shard, also in a tar of another program. Paths outside packs are files.

The index is memory-mapped, so that all processes of a node share its pages. Imports neither torch nor a decoder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from multitrain.data import remote
from multitrain.data.index import aligned_parts, read_index
from multitrain.data.staged import Stage
from multitrain.errors import ConfigError
from multitrain.text import printable

INDEX = "pack.index"
"""The file that makes a folder a pack."""
MEMBER = ".tar::"
"""Separates a shard from the path of a video in it."""
FORMAT = 1
"""Version of the index; later releases must keep reading it."""
BLOCK = 512
_OPEN = 16  # number of shards that a process keeps open
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class DamagedError(Exception):
    """The bytes of a packed video are damaged. The message is one line, without the video's path."""


class Stored(NamedTuple):
    """The location of a packed video's bytes."""

    shard: Path
    offset: int
    size: int
    crc: int | None
    """CRC-32 of the video's bytes; None for a tar without index."""
    name: str
    """Name of the tar member."""


class Pack:
    """The memory-mapped index of a pack.

    Attributes:
        folder: the folder of shards and index.
        header: ``shard_videos`` (maximum videos per shard), ``rows`` (lines of each csv by split), ``shards`` (their names).

    Raises:
        ConfigError: the file is not an index, or is incomplete.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.header, arrays = read_index(folder / INDEX, FORMAT)
            self._hashes, self._shard, self._offset, self._size, self._crc, self._starts, self._names = arrays
            columns = (self._hashes, self._shard, self._offset, self._size, self._crc, self._starts[1:])
            if len({len(column) for column in columns}) > 1 or any(array.dtype.kind != "u" for array in arrays):
                raise ValueError("its columns do not fit together")
            self._shards: list[str] = self.header["shards"]
            if any(os.path.basename(shard) != shard for shard in self._shards):
                raise ValueError("a shard lies elsewhere")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder / INDEX}: is damaged ({error}); the same `multitrain data pack` command writes it again"
            ) from None

    def __len__(self) -> int:
        return len(self._hashes)

    @cached_property
    def identity(self) -> str:
        """32 hex digits that stand for the content: equal for copies of a pack, other after it was packed from other files."""
        digest = hashlib.blake2b(json.dumps(self.header, sort_keys=True).encode(), digest_size=16)
        digest.update(self._offset.tobytes() + self._crc.tobytes())
        return digest.hexdigest()

    def shards(self) -> dict[str, int]:
        """The bytes of each shard, by name. Raises ConfigError: the index is damaged."""
        if int(self._shard.max(initial=0)) >= max(1, len(self._shards)):
            raise ConfigError(f"{self.folder / INDEX}: is damaged (no shard {int(self._shard.max())}); pack again")
        ends = np.zeros(len(self._shards), np.int64)
        end = self._offset.astype(np.int64) + self._size.astype(np.int64)
        np.maximum.at(ends, self._shard, end)
        return {shard: int(-(-end // BLOCK) + 2) * BLOCK for shard, end in zip(self._shards, ends)}

    def videos_of_shards(self) -> list[int]:
        """The number of videos in each of `shards`."""
        return np.bincount(self._shard, minlength=len(self._shards)).tolist()

    def find(self, name: str) -> Stored | None:
        """The location of a video, by its normalised path below the folder, or None."""
        at = self._place(name)
        return None if at is None else self._stored(at)

    def shard_number(self, name: str) -> int | None:
        """The position in `shards` of the shard that holds a video, or None."""
        at = self._place(name)
        return None if at is None else int(self._shard[at])

    def _place(self, name: str) -> int | None:
        wanted = os.fsencode(name)
        hashed = np.uint64(_hash(wanted))
        at = int(np.searchsorted(self._hashes, hashed))
        while at < len(self._hashes) and self._hashes[at] == hashed:
            if self._name(at) == wanted:
                return at
            at += 1
        return None

    def __iter__(self) -> Iterator[Stored]:
        """All videos, in the order of the shards and their content."""
        for at in np.lexsort((self._offset, self._shard)):
            yield self._stored(int(at))

    def _name(self, at: int) -> bytes:
        return self._names[self._starts[at] : self._starts[at + 1]].tobytes()

    def _stored(self, at: int) -> Stored:
        number = int(self._shard[at])
        if number >= len(self._shards):
            raise ConfigError(f"{self.folder / INDEX}: is damaged (no shard {number}); pack again")
        shard = self.folder / self._shards[number]
        return Stored(
            shard, int(self._offset[at]), int(self._size[at]), int(self._crc[at]), os.fsdecode(self._name(at))
        )


def index_parts(videos: Sequence[Stored], shards: Sequence[str], header: dict[str, Any]) -> list[Any]:
    """The parts of the index file for `videos` in `shards`, whose names are relative to the pack."""
    names = [os.fsencode(v.name) for v in videos]
    hashes = np.array([_hash(n) for n in names], np.uint64)
    order = np.argsort(hashes, kind="stable")
    number = {shard: i for i, shard in enumerate(shards)}

    def column(values: list[int]) -> np.ndarray:
        plain = np.array(values, np.uint64)[order]
        return plain.astype(np.min_scalar_type(int(plain.max(initial=0))))

    sorted_names = [names[i] for i in order]
    starts = np.concatenate([[0], np.cumsum([len(n) for n in sorted_names])]).astype(np.uint64)
    arrays = [
        hashes[order],
        column([number[v.shard.name] for v in videos]),
        column([v.offset for v in videos]),
        column([v.size for v in videos]),
        column([v.crc or 0 for v in videos]),
        starts.astype(np.min_scalar_type(int(starts[-1]))),
        np.frombuffer(b"".join(sorted_names), np.uint8),
    ]
    return aligned_parts({"format": FORMAT, "shards": list(shards), **header}, arrays)


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


# ------------------------------------------------------------------------------------------------------------ reading


def open_pack(folder: Path) -> Pack | None:
    """The pack in a folder, or None if it is not a pack. Raises as `Pack` does."""
    return _pack_in(os.path.abspath(folder))


def pack_of(path: Path | str) -> Pack | None:
    """The pack that `path` is below, whether or not it holds a video of this name. Raises as `Pack` does."""
    return _pack_above(os.path.dirname(os.path.abspath(path)))


def find_packed(path: Path | str) -> Stored | None:
    """The location of a packed video, or None if the path is not in a pack.

    Raises:
        ConfigError, OSError: see `Pack`.
    """
    text = os.path.abspath(path)
    if MEMBER in text:
        shard, _, name = text.partition(MEMBER)
        found = _member(f"{shard}.tar", name)
        if found is not None or not os.path.lexists(text):
            return found
    pack = _pack_above(os.path.dirname(text))
    return None if pack is None else pack.find(os.path.relpath(text, pack.folder))


def read(path: Path | str) -> bytes | None:
    """Read the bytes of a packed video with one range read; None if the path is a file.

    Raises:
        DamagedError: the shard is truncated, or the checksum does not match.
        ConfigError, OSError: the index or the shard cannot be read.
    """
    stored = find_packed(path)
    return None if stored is None else read_stored(stored)


def read_stored(stored: Stored) -> bytes:
    """`read` for a known location; an OSError names the shard."""
    staged = _from_stage(stored)
    if staged is not None:
        return staged
    try:
        content = _range(stored)
        if not _is_intact(stored, content):
            content = _range(stored)  # read again: the error may be the file server's, not the disk's
    except OSError as error:
        _opened.cache_clear()  # e.g. a stale handle: the next attempt reopens the shard
        raise OSError(error.errno, error.strerror or str(error), error.filename or str(stored.shard)) from error
    if len(content) < stored.size:
        raise DamagedError(f"{printable(stored.shard.name)} is cut off: it ends within this video; pack it again")
    if not _is_intact(stored, content):
        raise DamagedError(
            f"its bytes in {printable(stored.shard.name)} are damaged (another checksum); pack it again from its file"
        )
    return content


def read_part(stored: Stored, begin: int, size: int) -> bytes:
    """Bytes `begin` to `begin` + `size` of a packed video, fewer at its end. The checksum, which is that of the whole, is not compared.

    Raises:
        OSError, ConfigError: the shard cannot be read; an OSError names it.
    """
    size = max(0, min(size, stored.size - begin))
    part = stored._replace(offset=stored.offset + begin, size=size, crc=None)
    staged = _staged_bytes(part)
    if staged is not None and len(staged) == size:
        return staged
    try:
        return _range(part)
    except OSError as error:
        _opened.cache_clear()
        raise OSError(error.errno, error.strerror or str(error), error.filename or str(stored.shard)) from error


def is_far(stored: Stored) -> bool:
    """Whether a shard is read over a network, where few long reads are cheaper than many short ones."""
    return str(stored.shard.parent) in _addresses


def is_cut_off(stored: Stored) -> bool:
    """Whether a shard on a disk ends before the end of this video; False if that cannot be determined."""
    try:
        return not is_far(stored) and os.stat(stored.shard).st_size < stored.offset + stored.size
    except OSError:
        return False


def os_error_text(error: OSError) -> str:
    """The message of an OSError with the file it concerns, which for a packed video is the shard."""
    said = error.strerror or str(error)
    return f"{printable(os.fsdecode(error.filename))}: {said}" if error.filename else said


def framing_error(stored: Stored) -> str:
    """The damage around a video in its shard (its tar header, the padding after it), or an empty string."""
    head, filling = header(stored.name, stored.size), -stored.size % BLOCK
    before = _range(stored._replace(offset=stored.offset - len(head), size=len(head)))
    behind = _range(stored._replace(offset=stored.offset + stored.size, size=filling))
    if before != head:
        return f"its header in {printable(stored.shard.name)} is damaged; pack it again from its file"
    return "" if behind == bytes(filling) else f"the padding after it in {printable(stored.shard.name)} is damaged"


def forget() -> None:
    """Clear the cache of packs, after this process wrote one."""
    for cache in (_pack_in, _pack_above, _opened, _members):
        cache.cache_clear()


def header(name: str, size: int) -> bytes:
    """The tar header of a video in its shard: USTAR, or pax for a name or size that USTAR cannot hold."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    except ValueError:
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


_stage: Stage | None = None


def use_stage(expression: str | None) -> None:
    """From now on, this process reads the copies that this node has of a shard (`data.stage`), where it has one."""
    global _stage
    _stage = None if expression is None else Stage(expression)


def stage_trouble() -> str:
    """Why this process does not read the node's copies, for a message; empty if it does, or there are none."""
    return "" if _stage is None else _stage.trouble


def _from_stage(stored: Stored) -> bytes | None:
    """The bytes of a video from this node's copy of its shard; None if there is no copy, or it is damaged."""
    if stored.crc is None:
        return None
    content = _staged_bytes(stored)
    if content is None or _is_intact(stored, content):
        return content
    if _stage is not None and (pack := _pack_in(str(stored.shard.parent))) is not None:
        _stage.discard(pack.identity, stored.shard.name)
    return None


def _staged_bytes(stored: Stored) -> bytes | None:
    """Bytes of this node's copy of a shard, not checked; None if there is no copy."""
    if _stage is None or (pack := _pack_in(str(stored.shard.parent))) is None:
        return None
    return _stage.read(pack.identity, stored.shard.name, stored.offset, stored.size)


def read_chunk(shard: Path, offset: int, size: int) -> bytes:
    """Bytes of a shard, fewer at its end. Raises OSError."""
    return _range(Stored(shard, offset, size, None, ""))


def _is_intact(stored: Stored, content: bytes) -> bool:
    return len(content) == stored.size and (stored.crc is None or zlib.crc32(content) == stored.crc)


_addresses: dict[str, str] = {}


def at_address(folder: Path, address: str) -> None:
    """From now on, this process reads the shards of the pack in `folder` at an address (see `multitrain.data.remote`)."""
    _addresses[str(folder)] = address


def _range(stored: Stored) -> bytes:
    if (address := _addresses.get(str(stored.shard.parent))) is not None:
        return remote.read(f"{address}/{stored.shard.name}", stored.offset, stored.size)
    file = _opened(str(stored.shard)).fileno()
    size = max(0, min(stored.size, os.fstat(file).st_size - stored.offset))  # allocate no more than the file holds
    content = os.pread(file, size, stored.offset)
    while len(content) < size:  # one read returns at most 2 GiB
        more = os.pread(file, size - len(content), stored.offset + len(content))
        if not more:
            break
        content += more
    return content


@lru_cache(maxsize=_OPEN)
def _opened(shard: str) -> IO[bytes]:
    """An open shard, closed when no reader references it any more."""
    return open(shard, "rb", buffering=0)


@lru_cache(maxsize=1 << 14)
def _pack_above(folder: str) -> Pack | None:
    """The pack that a folder is, or is in; cached for the lifetime of the process."""
    found = _pack_in(folder)
    parent = os.path.dirname(folder)
    return found if found is not None or parent == folder else _pack_above(parent)


@lru_cache(maxsize=256)
def _pack_in(folder: str) -> Pack | None:
    index = os.path.join(folder, INDEX)
    try:
        os.stat(index)
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError):
        return None
    except OSError as error:
        if error.errno in _NO_NAME:
            return None
        raise
    return Pack(Path(folder))


@lru_cache(maxsize=8)
def _members(tar: str) -> dict[str, Stored]:
    """The members of a tar without index, by name."""
    with tarfile.open(tar, "r:", encoding="utf-8", errors="surrogateescape") as file:
        return {
            os.path.normpath(m.name): Stored(Path(tar), m.offset_data, m.size, None, m.name) for m in file if m.isfile()
        }


def _member(tar: str, name: str) -> Stored | None:
    pack = _pack_in(os.path.dirname(tar))
    found = None if pack is None else pack.find(name)
    if found is not None and str(found.shard) == tar:
        return found
    try:
        return _members(tar).get(name)
    except FileNotFoundError:
        return None
    except (tarfile.TarError, EOFError) as error:
        raise DamagedError(f"{printable(os.path.basename(tar))} is no plain tar file ({error})") from None


__all__ = [
    "BLOCK",
    "INDEX",
    "DamagedError",
    "Pack",
    "Stored",
    "at_address",
    "find_packed",
    "forget",
    "framing_error",
    "header",
    "index_parts",
    "is_cut_off",
    "is_far",
    "open_pack",
    "os_error_text",
    "pack_of",
    "read",
    "read_chunk",
    "read_part",
    "read_stored",
    "stage_trouble",
    "use_stage",
]
