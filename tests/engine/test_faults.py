"""Every system call of a save fails, or is the last one of the process, or of the node: a verified checkpoint is found.

The save runs in a forked child whose `os` functions count. A child that dies leaves without cleaning up; a node that dies
takes with it what no fsync has brought to the disk.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.test_checkpoint import content, save

from multitrain.engine import checkpoint as ck

CALLS = ("open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir")
KEEP = 2
OLD = (5, 10)
NEW = 15


class Faults:
    """Counts the system calls of this process, and makes the one number `at` go wrong."""

    def __init__(self, kind: str, at: int) -> None:
        self.kind, self.at, self.count = kind, at, 0
        self.unsynced: dict[int, str] = {}
        self.real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, self._wrapped(name))

    def _wrapped(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            number, self.count = self.count, self.count + 1
            if number == self.at and self.kind in ("EIO", "ENOSPC"):
                if name == "close":
                    self.real[name](*arguments)
                raise OSError(getattr(errno, self.kind), os.strerror(getattr(errno, self.kind)))
            if number == self.at and self.kind == "half" and name == "write":
                arguments = (arguments[0], arguments[1][: (len(arguments[1]) + 1) // 2])
            try:
                result = self.real[name](*arguments, **named)
                self._note(name, arguments, result)
                return result
            finally:
                if number == self.at and self.kind in ("process", "node"):
                    self._die()

        return call

    def _note(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """What is written and not yet on disk: descriptor → path, under whatever name it goes."""
        if name == "open" and arguments[1] & os.O_WRONLY:
            self.unsynced[result] = os.readlink(f"/proc/self/fd/{result}")
        elif name == "fsync":
            self.unsynced.pop(arguments[0], None)
        elif name == "close" and arguments[0] in self.unsynced:
            self.unsynced[-len(self.unsynced) - 1] = self.unsynced.pop(arguments[0])
        elif name in ("rename", "replace"):
            old, new = (os.path.abspath(os.fspath(a)) for a in arguments[:2])
            self.unsynced = {k: new + p[len(old) :] if p.startswith(old) else p for k, p in self.unsynced.items()}

    def _die(self) -> None:
        if self.kind == "node":
            for path in self.unsynced.values():
                if os.path.exists(path):
                    os.truncate(path, 0)
        os._exit(9)


def in_child(folder: Path, kind: str, at: int) -> tuple[int, int]:
    """Save update 15 and prune in a child; its exit status (0 well, 1 an OSError, 9 died) and how many calls it made."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, faults = 4, None
        try:
            faults = Faults(kind, at)
            try:
                save(folder, NEW)
                ck.prune(folder, KEEP, None)
                code = 0
            except OSError:
                code = 1
            faults.real["write"](writer, str(faults.count).encode())
        finally:
            os._exit(code)
    os.close(writer)
    told = os.read(reader, 100)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(told or 0)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints; the next one makes retention delete the older."""
    folder = tmp_path_factory.mktemp("before")
    save(folder, *OLD)
    return folder


def folders(before: Path, tmp_path: Path) -> Iterator[Path]:
    number = 0
    while True:
        folder = tmp_path / str(number)
        shutil.copytree(before, folder)
        yield folder
        number += 1


def assert_good(folder: Path) -> None:
    """What the next start relies on."""
    found, _ = ck.newest_verified(folder)
    assert found is not None
    assert all(ck.verify(f) is None for f in ck.listed(folder) if (f / "manifest.json").exists()), (
        "looks whole and is not"
    )
    update = ck.read(found).update
    assert update in (OLD[-1], NEW)
    for name, tensor in content(update).weights.items():
        assert ck.read(found).weights[name].equal(tensor)
    ck.clear_temporary(folder)
    assert not list(folder.glob(".*")), "leftovers"
    save(folder, NEW, NEW + 5)
    found, refused = ck.newest_verified(folder)
    assert (found, refused) == (ck.folder_of(folder, NEW + 5), {})


@pytest.mark.parametrize("kind", ["process", "node", "EIO", "ENOSPC", "half"])
def test_a_fault_at_any_system_call_of_a_save(before: Path, tmp_path: Path, kind: str) -> None:
    places = folders(before, tmp_path)
    code, calls = in_child(next(places), "none", -1)
    assert code == 0
    assert calls > 40
    outcomes = []
    for at in range(calls):
        folder = next(places)
        code, _ = in_child(folder, kind, at)
        outcomes.append(code)
        assert code in {"process": {9}, "node": {9}, "half": {0}}.get(kind, {0, 1}), f"call {at}"
        try:
            if code != 0 and kind not in ("process", "node"):
                assert not list(folder.glob(".update-*")), "a failed save leaves nothing behind"
            assert_good(folder)
        except Exception as error:
            raise AssertionError(f"{kind} at call {at} of {calls}: {error}") from error
        shutil.rmtree(folder)
    print(f"{kind}: {calls} system calls, {outcomes.count(1)} reported, {outcomes.count(0)} without consequence")


def test_retention_reads_what_it_keeps_before_it_deletes(tmp_path: Path) -> None:
    """The two newest look whole, with all their manifests, and are not: the third is all the run has."""
    third, *newest = save(tmp_path, 5, 10, 15)
    for folder in newest:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert ck.prune(tmp_path, KEEP, None) == []
    assert ck.newest_verified(tmp_path)[0] == third
