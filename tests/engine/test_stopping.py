"""Signals in every phase of a run, more than once, and deaths of all kinds: real processes of two ranks."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine.test_resume import events, metrics
from support import Rank, settings, start_ranks, train, wait, write_run

from multitrain.engine import checkpoint as ck
from multitrain.engine.interruption import Interruption, Request

UPDATES = 6
LIMIT = 8


@pytest.fixture
def run(tiny_data: Path, tmp_path: Path) -> Path:
    changes = {"checkpoint__every": 2, "eval__every": 3, "eval__val_stride": 1, "engine__hang_limit": 60}
    return write_run(tmp_path, settings(tiny_data, gpus=2, updates=UPDATES, **changes))[0]


def start(run: Path, phase: str) -> list[Rank]:
    program = str(Path(__file__).with_name("phases.py"))
    return start_ranks([program, str(run), phase], 2, log=run / "ranks.log")


def until(run: Path, phase: str, processes: list[Rank]) -> None:
    deadline = time.monotonic() + 600
    while not list(run.glob(f"in-{phase}-*")):
        assert time.monotonic() < deadline, log(run)
        assert all(p.poll() is None for p in processes), log(run)
        time.sleep(0.01)


def log(run: Path) -> str:
    return (run / "ranks.log").read_text()[-5000:]


def children(pid: int) -> Iterator[int]:
    """All descendants of a process."""
    for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(text)
        yield from children(int(text))


@pytest.mark.parametrize("phase", ["start", "stall", "collective", "save", "evaluation"])
def test_signals_in_every_phase_leave_a_verified_checkpoint_of_all_completed_updates(run: Path, phase: str) -> None:
    processes = start(run, phase)
    until(run, phase, processes)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1):
        for process in processes:
            os.kill(process.pid, number)
        time.sleep(0.05)
    assert wait(processes, 300) == [75, 75], log(run)
    folder, refused = ck.newest_verified(run / "checkpoints")
    assert folder is not None
    assert not refused
    done = metrics(run) if (run / "metrics.jsonl").exists() else []
    assert ck.read(folder).update == len(done), "work was lost"
    assert len(done) < UPDATES
    assert not events(run, "validation"), "one that is cut off is done again"
    assert not list((run / "checkpoints").glob(".*"))


def test_a_rank_that_hangs_ends_all_with_their_stacks_in_the_log(run: Path) -> None:
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("hang_limit: 60", f"hang_limit: {LIMIT}")
    )
    codes = wait(start(run, "hang"), 300)
    assert all(code not in (0, 75) for code in codes), log(run)
    text = (run / "ranks.log").read_text()
    assert text.count("where its threads are") == 2
    at = r"^multitrain: rank %d:   \S+/%s:\d+ in %s$"
    assert re.search(at % (0, "interruption.py", "agreed"), text, re.MULTILINE), "rank 0 waits in a collective"
    assert re.search(at % (1, "phases.py", "pause"), text, re.MULTILINE), "rank 1 sleeps here"
    assert text.count(": thread MainThread, most recent call first") == 2
    assert {e["rank"] for e in events(run, "hung")} == {0, 1}


@pytest.mark.parametrize("phase", ["error", "memory"])
def test_an_error_on_one_rank_ends_both_at_once(run: Path, phase: str) -> None:
    processes = start(run, phase)
    until(run, phase, processes)
    begin = time.monotonic()
    assert wait(processes, 300) == [1, 1], log(run)
    print(f"both ended {time.monotonic() - begin:.1f} s after it")
    reasons = {e["rank"]: e["reason"] for e in events(run, "error")}
    assert ("a bug" if phase == "error" else "no memory left") in reasons[1]
    assert not any(e["final"] for e in events(run, "error")), "a restart may help"


def test_a_killed_loader_worker_ends_the_run_or_is_replaced_and_nothing_hangs(tiny_data: Path, tmp_path: Path) -> None:
    run, _ = write_run(tmp_path, settings(tiny_data, gpus=2, updates=400, data__workers=1))
    processes = start_ranks(["-m", "multitrain.train", str(run)], 2, log=run / "ranks.log")
    deadline = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 2:
        assert time.monotonic() < deadline, log(run)
        time.sleep(0.02)
    os.kill(list(children(processes[1].pid))[-1], signal.SIGKILL)
    assert wait(processes, 300) == [1, 1], log(run)
    assert "was killed by SIGKILL" in log(run)


def test_a_disk_that_refuses_is_reported_and_tried_again_at_the_next_interval(run: Path) -> None:
    """A file where the folder of checkpoints should be: all that writing needs fails, whoever runs the test."""
    (run / "checkpoints").write_text("in the way")
    processes = start(run, "none")
    deadline = time.monotonic() + 600
    while not (run / "events.jsonl").exists() or not events(run, "checkpoint_failed"):
        assert time.monotonic() < deadline, log(run)
        time.sleep(0.01)
    (run / "checkpoints").unlink()
    assert wait(processes, 300) == [0, 0], log(run)
    assert events(run, "checkpoint")[-1]["update"] == UPDATES
    assert [m["update"] for m in metrics(run)] == list(range(UPDATES)), "the training went on"
    assert "could NOT be written" in log(run)


def test_a_finished_run_whose_last_checkpoint_is_refused_is_not_called_finished(run: Path) -> None:
    (run / "checkpoints").write_text("in the way")
    assert wait(start(run, "none"), 300) == [1, 1], log(run)
    assert not events(run, "end")
    assert "make room" in log(run)
    (run / "checkpoints").unlink()
    train(run, 2)
    assert ck.newest_verified(run / "checkpoints")[0] == ck.folder_of(run / "checkpoints", UPDATES)


def test_the_disk_gets_the_whole_limit_for_hung_ranks_whenever_the_training_waits_for_it(run: Path) -> None:
    """Seen: a rank that had waited for its videos was ended as hung while it wrote its last checkpoint."""
    assert wait(start(run, "beats"), 300) == [0, 0], log(run)
    for rank in range(2):
        told = re.findall(rf"^(beat|end|finish) {rank}$", (run / "ranks.log").read_text(), re.MULTILINE)
        waits = [at for at, what in enumerate(told) if what == "finish"]
        assert len(waits) == UPDATES // 2
        assert {tuple(told[at - 2 : at]) for at in waits} == {("end", "beat")}, "a sign of life just before each wait"


def test_an_update_is_held_up_only_for_the_copy(run: Path) -> None:
    """Writing takes two seconds here, and updates go on meanwhile; what is written is the state of the moment of the copy."""
    assert wait(start(run, "save"), 300) == [0, 0], log(run)
    first = events(run, "checkpoint")[0]
    assert first["seconds"] > 2.0
    assert first["held_up"] < first["seconds"]
    assert ck.newest_verified(run / "checkpoints")[0] == ck.folder_of(run / "checkpoints", UPDATES)


def test_a_stop_that_comes_while_slurm_takes_the_nodes_away_is_for_the_next_start(tmp_path: Path) -> None:
    start = Interruption(tmp_path, lambda value: value, watches_files=True, file_interval=0)
    start.signals.append(signal.SIGTERM)
    assert start.agreed() == Request.LEAVE
    (tmp_path / "STOP").touch()
    start.stopped(Request.LEAVE)
    again = Interruption(tmp_path, lambda value: value, watches_files=True, file_interval=0)
    assert again.agreed() == Request.STOP
    again.stopped(Request.STOP)
    assert not (tmp_path / "STOP").exists()
