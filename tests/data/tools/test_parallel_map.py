"""Work over many files: every item once, whatever happens to the workers; what is done stays done."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from multitrain.config import ConfigError
from multitrain.data.tools.parallel_map import FINAL, Journal, Shard, map_resumable


def unruly(item: str) -> dict[str, Any]:
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "hang":
        time.sleep(60)
    if item == "raise":
        raise ValueError("no\nway")
    return {"value": item.upper()}


def test_a_worker_that_crashes_hangs_or_raises_costs_its_item_only() -> None:
    items = ["a", "crash", "b", "hang", "c", "raise", "d"]
    got = dict(map_resumable(items, unruly, workers=2, timeout=8.0))
    assert got == {
        **{i: {"value": i.upper()} for i in "abcd"},
        "crash": {"error": "the reader crashed (SIGSEGV)"},
        "hang": {"error": "took longer than 8 s"},
        "raise": {"error": "ValueError: no way", FINAL: False},
    }


def test_shards_are_a_partition() -> None:
    items = list(range(11))
    parts = [list(Shard.parse(f"{i}/3").of(items)) for i in range(3)]
    assert sorted(x for p in parts for x in p) == items
    for wrong in ("3/3", "1", "a/2", "-1/2"):
        with pytest.raises(ConfigError, match="--shard"):
            Shard.parse(wrong)


def test_a_journal_forgets_a_torn_line_and_a_changed_file_only(tmp_path: Path) -> None:
    first = Journal(tmp_path, "check", Shard(0, 2))
    first.add("a", [1, 2], {"error": "x"})
    first.add("b", [1, 2], {"error": "y"})
    file = tmp_path / "check-0-of-2.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    other = Journal(tmp_path, "check", Shard(0, 1))  # cut in another way
    assert other.get("a", [1, 2]) is not None
    assert other.get("b", [1, 2]) is None
    assert other.get("a", [9, 2]) is None


@pytest.mark.parametrize(
    "line",
    [
        '{"item": "a", "version": [1, 2]}',
        '{"item": "a", "version": [1, 2], "frames": "many", "fps": 1, "width": 1, "height": 1}',
        '{"item": "a", "version": [1, 2], "frames": 1, "fps": 0, "width": 1, "height": 1}',
        '{"item": "a", "version": [1, 2], "error": {"deep": 1}}',
        '{"item": {"a": 1}, "version": [1, 2], "error": "x"}',
        '{"item": null}',
        "[1, 2]",
        '{"item": ',
    ],
)
def test_a_line_that_no_command_wrote_is_not_believed(tmp_path: Path, line: str) -> None:
    (tmp_path / "check-0-of-1.jsonl").write_text('{"item": "b", "version": 1, "error": "x"}\n' + line + "\n")
    journal = Journal(tmp_path, "check", Shard())
    assert journal.get("a", [1, 2]) is None
    assert not journal.settled("a", [1, 2])


def test_a_failure_that_is_no_fault_of_the_item_or_of_an_earlier_version_is_tried_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "check", Shard())
    journal.add("earlier", 1, {"error": "cut off"})
    journal.add("disk", 1, {"error": "no space left", FINAL: False})
    journal.add("broken", 1, {"error": "cut off", FINAL: True})
    assert [journal.settled(item, 1) for item in ("earlier", "disk", "broken")] == [False, False, True]
    journal.add("disk", 2, {"error": "gone", FINAL: True})
    assert journal.get("disk", 1) is not None, "an older version comes back with its record"


def test_names_that_are_no_utf8_come_back_as_they_were(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    Journal(tmp_path, "check", Shard()).add(name, 1, {"error": "x", FINAL: True})
    assert Journal(tmp_path, "check", Shard(1, 2)).settled(name, 1)
