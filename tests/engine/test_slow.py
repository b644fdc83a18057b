"""Hung or slow parts are named: a slow rank, slow videos of one rank, a video whose decoding never ends. Nothing is replaced."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine.test_resume import metrics
from engine.test_stopping import children
from support import settings, start_ranks, train, wait, write_run

from multitrain.config import load
from multitrain.data.catalog import open_catalogs, plan_of
from tests.slurm.drill import frozen

_F_SETLEASE = 1024


def frozen_now_and_then(pids: list[int], until: Callable[[], bool]) -> None:
    """Freeze processes for a fifth of a second, again and again, with a pause between."""
    while not until():
        with frozen(pids):
            time.sleep(0.2)
        time.sleep(0.08)


def test_a_slow_rank_and_one_that_waits_for_its_videos_are_named_in_the_metrics(
    tiny_data: Path, tmp_path: Path
) -> None:
    run, _ = write_run(tmp_path, settings(tiny_data, gpus=2, updates=400, data__workers=1, data__prefetch=1))
    program = str(Path(__file__).with_name("phases.py"))
    processes = start_ranks([program, str(run), "slow"], 2, log=run / "ranks.log")
    path = run / "metrics.jsonl"
    deadline = time.monotonic() + 600

    def done() -> int:
        assert time.monotonic() < deadline, (run / "ranks.log").read_text()[-4000:]
        return len(metrics(run)) if path.exists() else 0

    while done() < 9:
        time.sleep(0.02)
    waits = done() + 2
    frozen_now_and_then(list(children(processes[0].pid)), lambda: done() >= waits + 6)
    waits_end = done()
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert wait(processes) == [75, 75], (run / "ranks.log").read_text()[-4000:]
    found = metrics(run)
    for record in found:
        own, data = record["own_seconds_per_rank"], record["data_wait_per_rank"]
        assert len(own) == len(data) == 2
        assert own[record["slowest_rank"]] == max(own)
        assert data[record["data_wait_rank"]] == max(data)
        assert record["own_seconds_max"] == max(own)
        assert record["data_wait_max"] == max(data)
    assert sum(m["own_seconds_per_rank"][1] for m in found[2:8]) > 1.5 * sum(
        m["own_seconds_per_rank"][0] for m in found[2:8]
    ), "the slow rank, and not the one that waits for it"
    while_waiting = found[waits:waits_end]
    assert sum(m["data_wait_per_rank"][0] for m in while_waiting) > 1.5 * sum(
        m["data_wait_per_rank"][1] for m in while_waiting
    ), "the rank whose videos are late, and not the one that waits for it"


@pytest.fixture
def stuck(tiny_data: Path) -> Iterator[str]:
    """One of the ten videos of `segment`, whose opening does not return: somebody holds a lease on the file.

    As with a server that has gone: the kernel lets nobody open it until the holder lets go (45 seconds by default).
    """
    path = tiny_data / "segment" / "v 3.mp4"
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # how the kernel asks for it back
    file = os.open(path, os.O_RDWR)
    try:
        try:
            fcntl.fcntl(file, _F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            pytest.skip(f"this file system has no leases ({error})")
        yield path.name
    finally:
        with contextlib.suppress(OSError):
            fcntl.fcntl(file, _F_SETLEASE, fcntl.F_UNLCK)
        os.close(file)
        signal.signal(signal.SIGIO, before)


def test_a_video_whose_decoding_never_ends_is_cut_off_told_of_and_replaced(
    tiny_data: Path, tmp_path: Path, stuck: str
) -> None:
    run, config = write_run(tmp_path, settings(tiny_data, updates=2, data__decode_timeout=4.0, data__workers=1))
    train(run, 1, anew=True)  # its name is looked for below
    records = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    catalogs = open_catalogs(config.data, "train", tmp_path / "index")
    plan = plan_of(load(run), catalogs)
    segment = [s.name for s in plan.sources].index("segment")
    number = next(i for i in range(10) if catalogs["segment"].relative_path(i) == stuck)
    tickets = plan.samples(0, 2 * config.effective_batch)
    shown = [
        (at // config.effective_batch, catalogs["segment"].relative_path(plan.stand_in(t, 0)))
        for at, t in enumerate(tickets)
        if (t["dataset"], t["index"]) == (segment, number)
    ]
    assert shown, "the plan has it in these updates"
    assert [(r["update"], r["stand_in"]) for r in records] == shown, "the stand-in that the plan names"
    assert {(r["dataset"], r["path"]) for r in records} == {("segment", stuck)}
    assert {r["reason"] for r in records} == {"decoding took longer than data.decode_timeout"}
    assert metrics(run)[-1]["skipped"] == {"segment": 1}
    assert subprocess.run(["pgrep", "-f", str(run)], capture_output=True, check=False).returncode != 0, (
        "nothing is left"
    )
