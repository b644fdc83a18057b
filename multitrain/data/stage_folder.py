"""The folder of staged copies on a node's disk: reserves space, and deletes what nobody needs.

Files in ``FOLDER/multitrain-stage-UID`` (mode 0700), which all runs of a user on a node share:

IDENTITY/SHARD.staged        a finished copy of a shard; renamed to this name when it is complete
IDENTITY/SHARD.part-TOKEN    a copy in the making
wanted-TOKEN                 the copies that a living process needs; locked by it, so that others recognise it as alive
lock                         held while a process counts bytes, reserves them or deletes

Files of other names are neither counted nor deleted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from multitrain.data.staged import SUFFIX, check_private

KEEP_FREE = 0.05
"""Fraction of the disk that stays free."""
TOKEN = r"\d+-[0-9a-f]{8}"
"""Pattern of the name of a staging process."""


class Busy(Exception):
    """Another process copies this shard now."""


class Full(Exception):
    """There is no space for another copy: every copy is needed."""


class StageFolder:
    """The folder of copies: reserves space, and deletes what nobody needs.

    Raises:
        StageError: the folder belongs to another user, or others may enter it.
        OSError: it cannot be created or locked.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit
        self.token = f"{os.getpid()}-{os.urandom(4).hex()}"
        self._claim = -1
        self._own: set[str] = set()
        self.ensure()

    def ensure(self) -> None:
        """Create the folder and this process's file of wanted copies, unless they are there."""
        with contextlib.suppress(OSError):
            if self._claim >= 0 and os.path.samestat(os.fstat(self._claim), os.lstat(self._claim_path)):
                return
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.root, 0o700)
        check_private(os.lstat(self.root), self.root)
        with self._locked():
            if self._claim >= 0:
                os.close(self._claim)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._claim = os.open(self._claim_path, flags, 0o600)
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._own = set()

    @property
    def _claim_path(self) -> Path:
        return self.root / f"wanted-{self.token}"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def want(self, names: Collection[str]) -> None:
        """Announce the copies that this process needs, which other processes then keep."""
        self.ensure()
        if self._own == set(names):
            return
        content = "\n".join(names).encode()
        with self._locked():
            os.ftruncate(self._claim, 0)
            os.pwrite(self._claim, content, 0)
        self._own = set(names)

    def copies(self) -> dict[str, os.stat_result]:
        """All finished copies, by name."""
        return {name[: -len(SUFFIX)]: found for name, found in self._files() if name.endswith(SUFFIX)}

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """The files that staging processes made, relative to the folder."""
        for folder in os.scandir(self.root):
            if not re.fullmatch(r"[0-9a-f]{32}", folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            for file in os.scandir(folder.path):
                made = re.fullmatch(rf".+({re.escape(SUFFIX)}|\.part-{TOKEN})", file.name, re.DOTALL)
                if made and file.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        yield f"{folder.name}/{file.name}", file.stat(follow_symlinks=False)

    @contextmanager
    def reserve(self, copy: str, size: int) -> Iterator[int]:
        """An open file of `size` bytes, which becomes this copy unless the block raises.

        Raises:
            Busy, Full: see there.
            OSError: the disk fails or is full.
        """
        part = self.root / f"{copy}.part-{self.token}"
        with self._locked():
            self._make_space(copy, size)
            part.parent.mkdir(mode=0o700, exist_ok=True)
            file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                _allocate(file, size)
            except BaseException:
                os.close(file)
                os.unlink(part)
                raise
        try:
            yield file
            os.rename(part, self.root / f"{copy}{SUFFIX}")
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        finally:
            os.close(file)

    def _make_space(self, copy: str, size: int) -> None:
        """Delete what nobody needs until the copy fits."""
        wanted = self._living()
        files = dict(self._files())
        if any(name.startswith(f"{copy}.part-") for name in files):
            raise Busy
        used = sum(found.st_size for found in files.values())
        idle = [n for n in files if n.endswith(SUFFIX) and n[: -len(SUFFIX)] not in wanted]
        idle.sort(key=lambda name: files[name].st_mtime)
        while used + size > self.limit or size > self._free():
            if not idle:
                raise Full
            name = idle.pop(0)
            os.unlink(self.root / name)
            used -= files[name].st_size

    def _free(self) -> int:
        """Bytes that copies may still take on this disk."""
        disk = os.statvfs(self.root)
        return int((disk.f_bavail - KEEP_FREE * disk.f_blocks) * disk.f_frsize)

    def space(self) -> int:
        """Bytes that the copies of this process may take, those that exist included."""
        with self._locked():
            others = self._living() - self._own
            files = dict(self._files())
            taken = sum(found.st_size for name, found in files.items() if name.removesuffix(SUFFIX) in others)
            return min(self.limit, self._free() + sum(found.st_size for found in files.values())) - taken

    def _living(self) -> set[str]:
        """The copies that living processes need; removes what processes that ended have left in the making."""
        wanted, tokens = set(self._own), {self.token}
        for claim in self.root.glob("wanted-*"):
            token = claim.name.removeprefix("wanted-")
            if token == self.token or not re.fullmatch(TOKEN, token):
                continue
            if (content := _read_if_locked(claim)) is None:
                claim.unlink()
            else:
                tokens.add(token)
                wanted.update(content.split("\n"))
        for name, _ in list(self._files()):
            if ".part-" in name and name.rpartition(".part-")[2] not in tokens:
                os.unlink(self.root / name)
        return wanted

    def drop(self, name: str) -> None:
        """Delete a copy."""
        with self._locked():
            os.unlink(self.root / f"{name}{SUFFIX}")

    def clear(self, identities: Collection[str]) -> None:
        """Delete the copies of these packs that no other process needs, and this process's own files."""
        self._own = set()
        with self._locked():
            wanted = self._living()
            for name in self.copies():
                if name not in wanted and name.partition("/")[0] in identities:
                    os.unlink(self.root / f"{name}{SUFFIX}")
                    with contextlib.suppress(OSError):  # another copy is in it
                        os.rmdir((self.root / name).parent)
            self._claim_path.unlink(missing_ok=True)


def _allocate(file: int, size: int) -> None:
    """Reserve the bytes on the disk; where the file system cannot, only the size of the file."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.truncate(file, size)


def _read_if_locked(claim: Path) -> str | None:
    """The content of a file that a living process has locked; None if its process ended."""
    try:
        file = os.open(claim, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return os.pread(file, os.fstat(file).st_size, 0).decode()
    finally:
        os.close(file)


__all__ = ["Busy", "Full", "StageFolder"]
