"""Files that appear complete or not at all, and output folders in which no foreign file is touched.

Guarantee 9: no command deletes or overwrites a file that it did not create itself. Every command that writes to a path of the
user's goes through :class:`OutputFolder` (or :func:`output_file`, for a single file). A record in the folder,
``.multitrain-files.jsonl``, lists the files that the command made: one line per file, with its size and a digest. The line is
written before the file appears, so that a command killed at any instant recognises its own files afterwards. A file that is not in
the record, or was changed since, is in the way: an error names it.

`replacing` is for files that belong to the caller by construction (in a run's folder, under the name of a digest).

New files get the mode and the group that the system gives to a new file there (umask, setgid, default ACL), whatever the library
that wrote them has set. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from multitrain.errors import ConfigError
from multitrain.text import printable, quoted

RECORD = ".multitrain-files"
"""Beginning of the names of records: ``.multitrain-files.jsonl``, and one per user where that file belongs to another user."""

TEMPORARY = ".multitrain-"
"""Beginning of the names of temporary files."""

_FULL_DIGEST_BYTES = (
    8 << 20
)  # bytes up to which the digest covers the whole file; for a longer one it covers three parts
_PART_BYTES = 1 << 20

Stamp = dict[str, Any]
"""Identifies a file: ``bytes`` and ``digest``; an earlier version recorded the size alone."""


class InTheWayError(ConfigError):
    """A file that the command did not create is where it has to write. The message names the file."""


# ------------------------------------------------------------------------------------------------------ single files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; the file that the block writes there replaces `path`, unless the block raises.

    Readers see the old file or the new one. Any file at `path` is replaced: for paths that a user names, use `output_file` or
    `OutputFolder`. The file is not synced: see `engine/checkpoint.py` for files that must survive a crash.
    """
    with _temporary_file(path.parent) as new:
        yield new.path
        new.restore_mode()
        os.replace(new.path, path)


def replace_text(path: Path, text: str) -> None:
    """Replace the file's content by `text` in UTF-8; bytes of names that are not UTF-8 stay as they are (surrogateescape)."""
    with replacing(path) as temporary:
        temporary.write_bytes(_encoded(text))


@contextmanager
def output_file(path: Path, maker: str, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """`OutputFolder.writing` for one file that a user names; missing parent folders are created.

    Raises:
        ConfigError: as `OutputFolder`.
    """
    with OutputFolder(path.parent, maker, sources).writing(path.name) as temporary:
        yield temporary


def check_output(path: Path, maker: str, sources: Iterable[Path | str] = ()) -> None:
    """Refuse in advance what `output_file` would refuse after the work is done. Raises ConfigError."""
    OutputFolder(path.parent, maker, sources).check(path.name)


def refuse_run(path: Path | str, run: Path | str | None = None, *, whole: bool = True) -> None:
    """Refuse an output that is, or lies in, a run's folder, its folder of checkpoints or a checkpoint. Links are followed.

    Args:
        path: the output; it need not exist.
        run: a run whose folder may hold the output, except among the files and folders that the run itself writes.
        whole: False: every run's folder may hold the output in the same way (plots and tables beside the run's own files).

    Raises:
        InTheWayError: names the run, or the part of it.
    """
    own = None if run is None else os.path.realpath(run)
    resolved = Path(os.path.realpath(path))
    for place in (resolved, *resolved.parents):
        with contextlib.suppress(OSError):  # a folder without read permission
            what = _part_of_run(place)
            if what is not None and not (what == "run" and (str(place) == own or not whole)):
                raise InTheWayError(
                    f"{printable(str(path))} {'is' if place == resolved else 'lies in'} the {what} {printable(str(place))}, "
                    "which is never written into; choose another place"
                )


_RUN_FOLDERS = {"code", "lease", "logs", "tensorboard"}
"""Folders that a run writes, besides its checkpoints."""


def _part_of_run(place: Path) -> str | None:
    """Which part of a run a folder is, according to the files in it; None if it is none."""
    if all((place / name).exists() for name in ("manifest.json", "model.safetensors")):
        return "checkpoint"
    if place.name == "checkpoints" and (_is_run(place.parent) or next(place.glob("update-*"), None) is not None):
        return "folder of checkpoints"
    if place.name in _RUN_FOLDERS and _is_run(place.parent):
        return "part of a run"
    return "run" if _is_run(place) else None


def _is_run(place: Path) -> bool:
    marks = ("overrides.yaml", "events.jsonl", "lease")
    return (place / "config.yaml").is_file() and any((place / mark).exists() for mark in marks)


def refuse_same(outputs: Mapping[str, Path | str | None]) -> None:
    """Refuse two options of a command that name the same file, with links resolved. `outputs`: paths by option.

    Raises:
        ConfigError: names both options.
    """
    seen: dict[str, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        other = seen.setdefault(os.path.realpath(path), option)
        if other != option:
            raise ConfigError(f"{other} and {option} are one file, {printable(str(path))}; give two names")


# ---------------------------------------------------------------------------------------------------- output folders


class OutputFolder:
    """A folder that a command writes to. It replaces and deletes files that the same command made there, and no others.

    Names are relative to the folder. A name that leads out of the folder, or through a link below it, is refused; the path of the
    folder itself may contain links.

    Args:
        root: the folder; created with the first file.
        maker: the command, e.g. ``data resize``; files that another command made are foreign.
        sources: files and folders that the command reads: no output may be one of them or lie below one (unless the whole output
            folder does).
        known: returns the stamps of a name that are kept outside the record, e.g. in a journal.

    Raises:
        ConfigError: `root` is not a folder, is one of the sources, or lies in a checkpoint or among a run's own files.
    """

    def __init__(
        self,
        root: Path | str,
        maker: str,
        sources: Iterable[Path | str] = (),
        known: Callable[[str], Iterable[Stamp]] = lambda name: (),
    ) -> None:
        _refuse_nul(os.fspath(root))
        self.root, self.maker, self._known = Path(os.path.realpath(root)), maker, known
        self._sources = {os.path.realpath(s) for s in sources if "\0" not in os.fspath(s)}  # with NUL it is no file
        self._record = _Record(self.root, maker)
        refuse_run(self.root, whole=False)
        if str(self.root) in self._sources:
            raise InTheWayError(f"{root} is the input of {maker}; choose another folder for its output")
        try:
            if not stat.S_ISDIR(self.root.stat().st_mode):
                raise InTheWayError(f"{root} is not a folder; choose another place")
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _write_error(self.root, error) from None

    def target(self, name: str | Path) -> Path:
        """The path of `name`, which need not exist. Raises ConfigError for a name that leads out of the folder."""
        text = os.fspath(name)
        _refuse_nul(text)
        normal = os.path.normpath(text)
        if not text or os.path.isabs(normal) or normal == "." or normal.split(os.sep)[0] == "..":
            raise ConfigError(f"{quoted(text)} leads out of {self.root}; give a name inside it")
        path = self.root / normal
        if path.name.startswith((RECORD, TEMPORARY)):
            raise ConfigError(f"{quoted(text)}: {path.name} is a name that multitrain reserves; choose another")
        for part in (*reversed(path.parents), path):
            if _is_below(part, self.root) and part != self.root and os.path.islink(part):
                raise InTheWayError(
                    f"{printable(str(part))} is a link, which is not followed; remove it, or choose another folder"
                )
        self._refuse_source(path)
        return path

    def check(self, name: str | Path, recognise: Callable[[bytes], bool] | None = None) -> Path:
        """The path of `name`, if it may be written: there is no file, or one that this command made.

        Args:
            recognise: decides from the content of a file that is not in the record whether an earlier version made it.

        Raises:
            InTheWayError: there is another file.
        """
        path = self.target(name)
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return path
        except OSError as error:
            raise _write_error(path, error) from None
        if not stat.S_ISREG(found.st_mode):
            raise InTheWayError(
                f"{printable(str(path))} is in the way: it is not a regular file; move it away, or choose another output"
            )
        if not (self._is_own(path) or (recognise and not self._stamps(path) and recognise(path.read_bytes()))):
            raise InTheWayError(
                f"{printable(str(path))} is in the way: {self.maker} did not write it, or it was changed since; move it away, or "
                "choose another output"
            )
        return path

    def is_own(self, name: str | Path) -> bool:
        """Whether `name` is a file that this command made and that is unchanged. Raises ConfigError as `target`."""
        path = self.target(name)
        return path.is_file() and self._is_own(path)

    def folder(self, name: str | Path) -> Path:
        """The folder `name`, created if it is missing. Raises ConfigError."""
        path = self.target(name)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _write_error(path, error) from None
        return path

    @contextmanager
    def writing(self, name: str | Path) -> Iterator[Path]:
        """A temporary path; the file that the block writes there becomes `name`, unless the block raises.

        Raises:
            ConfigError: a foreign file is in the way (before the block runs), or the folder cannot be written.
        """
        path = self.check(name)
        self._make_parents(path)
        with contextlib.ExitStack() as stack:
            try:
                new = stack.enter_context(_temporary_file(path.parent))
            except OSError as error:
                raise _write_error(path, error) from None
            yield new.path
            new.restore_mode()
            self.place(new.path, name)

    def write_bytes(self, name: str | Path, content: bytes, recognise: Callable[[bytes], bool] | None = None) -> Path:
        """Write the file `name`, unless it already has this content. Returns its path.

        Args:
            recognise: decides from the content of a file that is not in the record whether an earlier version made it.

        Raises:
            ConfigError: as `writing`.
        """
        path = self.target(name)
        try:
            existing = path.read_bytes() if path.is_file() else None
        except OSError as error:
            raise _write_error(path, error) from None
        if existing == content:
            return path
        if existing is not None and recognise is not None and not self._is_own(self.check(name, recognise)):
            self.adopt(name)
        with self.writing(name) as temporary:
            temporary.write_bytes(content)
        return path

    def write_text(self, name: str | Path, text: str, recognise: Callable[[bytes], bool] | None = None) -> Path:
        """`write_bytes` with the text in UTF-8; bytes of names that are not UTF-8 stay as they are (surrogateescape)."""
        return self.write_bytes(name, _encoded(text), recognise)

    def place(self, temporary: Path, name: str | Path, note: Callable[[Stamp], None] | None = None) -> Path:
        """Record a finished file, then move it to `name`, so that a kill between the two loses nothing.

        Args:
            temporary: the finished file, on the same file system.
            note: stores the stamp instead of the record; `known` has to return it later.

        Raises:
            ConfigError: as `writing`.
        """
        path = self.check(name)
        known = os.path.lexists(path)
        self._make_parents(path)
        try:
            (note or (lambda made: self._record.add(self._name(path), made)))(stamp(temporary))
            while not _move(temporary, path, replace=known):  # another process was faster
                self.check(name)
                known = True
        except OSError as error:
            raise _write_error(path, error) from None
        return path

    def is_recorded(self, name: str | Path) -> bool:
        """Whether this command has ever made a file of this name. Raises ConfigError as `target`."""
        return bool(self._stamps(self.target(name)))

    def adopt(self, name: str | Path) -> None:
        """Record a file that an earlier version of this command made, which kept no record.

        A file that is in the record, but was changed since, stays foreign.

        Raises:
            ConfigError: as `target`, or the record cannot be written.
        """
        path = self.target(name)
        if path.is_file() and not self.is_recorded(name):
            self._record.add(self._name(path), stamp(path))

    def remove(self, name: str | Path) -> bool:
        """Delete a file that this command made; returns whether there was one. Raises InTheWayError for any other file."""
        path = self.check(name)
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _write_error(path, error) from None
        return True

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.root)

    def _stamps(self, path: Path) -> list[Stamp]:
        name = self._name(path)
        return [*self._record.of(name), *self._known(name)]

    def _is_own(self, path: Path) -> bool:
        of_size = [s for s in self._stamps(path) if s["bytes"] == path.stat().st_size]
        if any("digest" not in s for s in of_size):
            return True
        try:
            return bool(of_size) and stamp(path)["digest"] in [s["digest"] for s in of_size]
        except OSError:
            return False  # unreadable: another user's

    def _make_parents(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _write_error(path, error) from None

    def _refuse_source(self, path: Path) -> None:
        for part in (path, *path.parents):
            if str(part) in self._sources and not _is_below(self.root, part):
                raise InTheWayError(
                    f"{printable(str(path))} is in the way: it is, or lies in, what {self.maker} reads; choose another output"
                )


class _Record:
    """The stamps of the files that one maker made in a folder; each call reads what was appended since the last one."""

    def __init__(self, folder: Path, maker: str) -> None:
        self._maker = maker
        self._mine = (folder / f"{RECORD}.jsonl", folder / f"{RECORD}-{os.getuid()}.jsonl")
        self._folder = folder
        self._others: list[Path] | None = None
        self._stamps: dict[str, list[Stamp]] = {}
        self._read_to: dict[str, int] = {}

    def of(self, name: str) -> list[Stamp]:
        """The stamps of a file, one for each time that it was made."""
        if self._others is None:  # once: the folder may hold a million files
            self._others = sorted(set(self._folder.glob(f"{RECORD}-*.jsonl")) - {*self._mine})
        for file in (*self._mine, *self._others):
            self._read(file)
        return self._stamps.get(name, [])

    def _read(self, file: Path) -> None:
        try:
            with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as handle:
                handle.seek(self._read_to.get(file.name, 0))
                content = handle.read()
        except OSError:
            return  # unreadable: its files are foreign, so they are left alone
        whole = content.rfind(b"\n") + 1
        self._read_to[file.name] = self._read_to.get(file.name, 0) + whole
        for line in content[:whole].splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                if entry["by"] == self._maker and isinstance(entry["bytes"], int) and isinstance(entry["digest"], str):
                    self._stamps.setdefault(str(entry["name"]), []).append(entry)

    def add(self, name: str, made: Stamp) -> None:
        """Append a file's stamp to the record. Raises ConfigError when the record cannot be written."""
        line = (
            b"\n" + json.dumps({"name": name, "by": self._maker, **made}).encode() + b"\n"
        )  # ends a torn line, if any
        for file in self._mine:
            try:
                handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except PermissionError:
                continue  # another user's
            except OSError as error:
                raise _write_error(self._folder, error) from None
            with open(handle, "ab", buffering=0) as out:
                out.write(line)
            return
        raise _write_error(self._folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def stamp(path: Path) -> Stamp:
    """The stamp of a file: its size, and a digest of its content (of three parts of it for a file above 8 MiB)."""
    digest = hashlib.blake2b(digest_size=16)
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in (0,) if size <= _FULL_DIGEST_BYTES else (0, (size - _PART_BYTES) // 2, size - _PART_BYTES):
            file.seek(start)
            digest.update(file.read(_FULL_DIGEST_BYTES if size <= _FULL_DIGEST_BYTES else _PART_BYTES))
    return {"bytes": size, "digest": digest.hexdigest()}


# ------------------------------------------------------------------------------------------------------------- parts


class _Temporary(NamedTuple):
    """A temporary file, and the mode and group that the system gave it."""

    path: Path
    mode: int
    group: int

    def restore_mode(self) -> None:
        """Undo the mode and group that a library has given the file, where that is allowed."""
        now = self.path.lstat()
        with contextlib.suppress(PermissionError):
            if now.st_gid != self.group:
                os.chown(self.path, -1, self.group)
            if stat.S_IMODE(now.st_mode) != self.mode:
                self.path.chmod(self.mode)


@contextmanager
def _temporary_file(folder: Path) -> Iterator[_Temporary]:
    """A new, empty temporary file in `folder`; deleted after the block, unless it was moved."""
    path = folder / f"{TEMPORARY}{os.urandom(8).hex()}.tmp"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    found = os.fstat(handle)
    os.close(handle)
    try:
        yield _Temporary(path, stat.S_IMODE(found.st_mode), found.st_gid)
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _move(temporary: Path, path: Path, *, replace: bool) -> bool:
    """Move `temporary` to `path`. Without `replace`, False when `path` exists (on a disk without hard links it is replaced)."""
    if not replace:
        try:
            os.link(temporary, path)
        except FileExistsError:
            if not os.path.samefile(
                temporary, path
            ):  # the same file: the server's reply was lost, and the request repeated
                return False
        except OSError:
            replace = True
    if replace:
        os.replace(temporary, path)
    else:
        os.unlink(temporary)
    return True


def _is_below(path: Path | str, folder: Path | str) -> bool:
    """Whether `path` is `folder` or lies in it, judged by the paths alone."""
    return str(path) == str(folder) or str(path).startswith(str(folder).rstrip(os.sep) + os.sep)


def _refuse_nul(text: str) -> None:
    if "\0" in text:
        raise ConfigError(f"{quoted(text)} contains a NUL character, which no file name may contain")


def _write_error(path: Path, error: OSError) -> ConfigError:
    """The error for a file that cannot be written; `path` is named in place of a temporary file or a record."""
    named = None if error.filename is None else Path(os.fsdecode(error.filename))
    at = path if named is None or named.name.startswith(TEMPORARY) else named
    return ConfigError(f"{printable(str(at))}: cannot be written ({error.strerror or error}); choose another output")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")
