"""What the watchdog does when even its log does not take a word."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from multitrain.engine import watchdog


def test_a_log_on_a_full_disk_does_not_keep_a_rank_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PEER_GRACE_SECONDS", 0.0)
    ended = threading.Event()
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        watchdog.Watchdog(tmp_path, 0, 0.1, end=lambda status: ended.set())
        assert ended.wait(30)
    assert '"hung"' in (tmp_path / "events.jsonl").read_text()
