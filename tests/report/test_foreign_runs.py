"""Folders of runs that other people made: private ones, damaged ones, and ones that a stranger has prepared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from multitrain.cli import main
from multitrain.report.status import FIELDS, status
from tests import support, users

START = {"event": "start", "time": "2026-01-01T00:00:00+00:00", "job": "7", "total_updates": 6, "world_size": 1}
UPDATE = {"update": 1, "loss": 1.0, "lr": 0.1, "seconds": 1.0, "clips_per_second": 4.0, "data_wait_fraction": 0.1}
RESULTS = {"stride": {"top1": 50.0, "top5": 100.0}}
ODD: list[Any] = [
    *(None, True, -1, 10**30, 1e300, "text", "", [], [1], {}, {"a": 1}, {"a": "b"}, [[[]]]),
    *({"stride": 3}, {"stride": {"top1": "high"}}, {"stride": None}, {"stride": {"top1": []}}, "2026-99-99", "²"),
]
"""Values that a field may have in a stranger's file."""
ESCAPE = "\x1b[2J\x1b]0;title\x07\u202e\x9b31m"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder, _ = support.write_run(tmp_path / "runs", support.settings(tmp_path / "data"))
    (folder / "checkpoints/update-00000002").mkdir(parents=True, exist_ok=True)
    return folder


def write(run: Path, history: list[dict[str, Any]], records: list[dict[str, Any]], skipped: Any = None) -> None:
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in history))
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run / "skipped.jsonl").write_text(json.dumps(skipped) + "\n")


def histories() -> Iterator[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    events = {
        "start": START,
        "validation": {"event": "validation", "update": 2, "results": RESULTS},
        "error": {"event": "error", "reason": "lost"},
        "resume": START | {"event": "resume", "update": 1, "redone": 1, "pid": 5, "host": "h"},
        "end": {"event": "end", "status": "stopped"},
    }
    numbers = (*UPDATE, "loss_per_dataset", "world_size")
    for value in ODD:
        for name, event in events.items():
            changed = events | {name: dict.fromkeys(event, value) | {"event": event["event"]}}
            yield f"{name}: {value!r:.40}", list(changed.values()), [UPDATE]
        yield f"metrics: {value!r:.40}", list(events.values()), [UPDATE, dict.fromkeys(numbers, value) | {"update": 2}]
        yield f"update: {value!r:.40}", list(events.values()), [UPDATE, UPDATE | {"update": value}]


def test_values_of_other_kinds_in_events_and_metrics_are_left_out(run: Path) -> None:
    from multitrain.report.status_text import card, table

    for what, history, records in histories():
        write(run, history, records, {"dataset": ["x"], "path": 3})
        try:
            found = status(run)
            assert card(found)
            assert table([found])
            json.dumps(found, allow_nan=False)
        except Exception as error:
            raise AssertionError(what) from error


def test_files_that_no_run_writes_are_shown_as_far_as_they_go(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = "[" * 100_000
    for content in ("", "{", deep, '{"a":' * 50_000, "null", "[1]\n", '{"update": ' + "9" * 5000 + "}", "\0\xff"):
        for name in ("events.jsonl", "metrics.jsonl", "skipped.jsonl"):
            (run / name).write_text(content)
        assert main(["status", str(run)]) == 0
        assert main(["compare", str(run), str(run)]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "results",
    [
        *(
            None,
            [],
            5,
            {},
            {"datasets": None},
            {"datasets": []},
            {"datasets": {"a": 1}},
            {"datasets": {"a": {"top1": "x"}}},
        ),
        *({"datasets": {"a": {"top1": []}}}, {"datasets": {"a": {"top1": 1.0, "views": 3}}}),
        {"datasets": {"a": {"top1": 1.0, "confusion": [[1]]}}},
    ],
)
def test_figures_of_other_kinds_are_no_figures(run: Path, results: Any, capsys: pytest.CaptureFixture[str]) -> None:
    test = run / "evaluation/update-00000002/test"
    test.mkdir(parents=True)
    (test / "metrics.json").write_text(json.dumps(results))
    assert main(["compare", str(run)]) == 0
    assert main(["report", str(run), "--clips", "0"]) in (0, 2)
    said = capsys.readouterr().err
    assert said.count("\n") <= 1


def test_texts_of_strangers_do_not_reach_the_terminal_or_the_page(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"<script>alert(1)</script>{ESCAPE}"
    error = {"event": "error", "reason": text, "time": START["time"]}
    validation = {"event": "validation", "update": 2, "results": {text: {"top1": 50.0}}}
    write(run, [START | {"job": text}, validation, error, START | {"event": "resume", "update": 1}, error], [UPDATE])
    (run / "skipped.jsonl").write_text(json.dumps({"dataset": text, "path": text, "reason": text}) + "\n")
    for command in (["status", str(run)], ["status", "--runs", str(run.parent)], ["compare", str(run)]):
        assert main(command) == 0
    assert main(["report", str(run), "--clips", "0"]) == 0
    printed = capsys.readouterr().out
    pages = (run / "report/report.html").read_text() + (run / "report/report.md").read_text()
    for character in ("\x1b", "\x07", "\u202e", "\x9b"):
        assert character not in printed
        assert character not in pages
    assert "<script>alert" not in pages


def test_a_private_run_is_named_and_the_others_are_shown() -> None:
    with users.meeting_place() as place:
        run, _ = support.write_run(place / "runs", support.settings(place / "data"))
        write(run, [START], [UPDATE])
        private = place / "runs/private"
        private.mkdir()
        (private / "config.yaml").write_text("name: private\n")
        private.chmod(0o700)
        done = users.run_as(users.ALICE, [["status", "--runs", str(place / "runs"), "--json"]], place)
        assert done.returncode == 0, done.stderr
        found = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
        assert found["tiny"]["update"] == 2
        assert set(FIELDS) <= set(found["private"])
        assert found["private"]["state"] == "unreadable"
        assert found["private"]["last_error"] == "Permission denied; it belongs to root"
        for words in (["status", str(private)], ["status", "--runs", str(private)], ["compare", str(private)]):
            done = users.run_as(users.ALICE, [words], place)
            assert (done.stdout + done.stderr).count("Permission denied") == 1, done.stderr
