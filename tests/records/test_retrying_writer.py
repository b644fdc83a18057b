"""A disk that refuses costs neither a line nor the run: what it refused is written when it takes it again."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from multitrain.records import jsonl, metrics
from multitrain.records.recorder import Recorder
from multitrain.records.tensorboard import TensorBoard


class Disk:
    """A disk under `folder` that can be full: a write is then cut short after `room` bytes, and fails when there is none."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self._folder = str(folder)
        self._write, self._open = os.write, os.open
        monkeypatch.setattr(os, "write", self.write)

    def write(self, file: int, data: Any) -> int:
        path = os.readlink(f"/proc/self/fd/{file}")
        if self.room is None or not path.startswith(self._folder):
            return self._write(file, data)
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data, self.room = data[: self.room], max(0, self.room - len(data))
        return self._write(file, data)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


@pytest.mark.parametrize("room", [0, 1, 10])
def test_every_line_is_there_once_and_in_order_when_the_disk_takes_them_again(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str], room: int
) -> None:
    with Recorder(tmp_path, total_updates=9, tensorboard=False) as recorder:
        recorder.update({"update": 0})
        disk.room = room  # the first line is torn
        for update in range(1, 5):
            recorder.update({"update": update})
            recorder.event("checkpoint_failed", update=update)
            recorder.skipped([{"update": update, "path": "x"}])
        for name in ("metrics.jsonl", "events.jsonl", "skipped.jsonl"):
            assert all(json.loads(line) for line in (tmp_path / name).read_text().splitlines()), "no torn lines"
        disk.room = None
        recorder.update({"update": 5})
        recorder.event("checkpoint", update=5)
    assert [r["update"] for r in metrics.read(tmp_path / "metrics.jsonl")] == list(range(6))
    assert [e["update"] for e in jsonl.read(tmp_path / "events.jsonl")] == [1, 2, 3, 4, 5]
    assert [e["update"] for e in jsonl.read(tmp_path / "skipped.jsonl")] == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert said.count("metrics.jsonl can be written again") == 1


def test_held_events_keep_the_time_at_which_they_happened(tmp_path: Path, disk: Disk) -> None:
    with Recorder(tmp_path, total_updates=9, tensorboard=False) as recorder:
        disk.room = 0
        recorder.event("checkpoint_failed")
        disk.room = None
        recorder.event("checkpoint", update=1)
    first, second = jsonl.read(tmp_path / "events.jsonl")
    assert (first["event"], second["event"]) == ("checkpoint_failed", "checkpoint")
    assert first["time"] <= second["time"]


def test_lines_that_were_never_taken_are_counted_at_the_end(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    with Recorder(tmp_path, total_updates=9, tensorboard=False) as recorder:
        disk.room = 0
        for update in range(3):
            recorder.update({"update": update})
    assert "metrics.jsonl: the last 3 lines could not be written" in capsys.readouterr().err


def test_an_event_that_cannot_be_written_is_an_error_for_those_who_must_not_go_on_without(
    tmp_path: Path, disk: Disk
) -> None:
    jsonl.append(tmp_path / "e", {"a": 1})
    disk.room = 4
    with pytest.raises(OSError, match="No space left"):
        jsonl.append(tmp_path / "e", {"b": 2})
    assert (tmp_path / "e").read_bytes() == b'{"a": 1}\n', "nothing of it is left"


def test_tensorboard_has_a_gap_and_goes_on(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    said: list[str] = []
    board = TensorBoard(tmp_path / "tensorboard", say=said.append)
    board.scalar("train/loss", 1.0, 1)
    board.flush()

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    writer = board._writer
    assert writer is not None
    writer._get_file_writer().event_writer._async_writer._writer.flush = refuse  # type: ignore[union-attr,no-untyped-call]
    board.flush()
    board.scalar("train/loss", 2.0, 2)
    assert [s.partition(" cannot")[2] for s in said] == [
        " be written (Read-only file system); its curves will have a gap here"
    ]
    board.flush()
    board.scalar("train/loss", 3.0, 3)
    board.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(1, 1.0), (3, 3.0)]


def test_a_full_disk_under_tensorboard_is_a_line_and_no_traceback(tmp_path: Path) -> None:
    """In a process of its own, with a limit on the size of a file as a real refusal."""
    program = f"""
import resource, signal, time
from multitrain.records.tensorboard import TensorBoard
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
board = TensorBoard({str(tmp_path / "tensorboard")!r}, say=print)
resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
for update in range(100):
    board.scalar("train/loss", 1.0, update)
board.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
board.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.count("cannot be written (File too large)") == 1, done
    assert done.stderr == ""
