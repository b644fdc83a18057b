"""A rank that dies is started again inside the allocation, with all others, boundedly; real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from multitrain.cluster.slurm import free_port

RANK = """
    import os, signal, sys, time
    from pathlib import Path
    from multitrain.cluster.slurm import STOP_SIGNALS, unblock_stop_signals
    rank, attempt = int(os.environ["RANK"]), int(os.environ["MULTITRAIN_RESTARTS_IN_PLACE"])
    got = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda n, _: got.append(n))
    unblock_stop_signals()
    with open(Path(sys.argv[1]) / f"{rank}", "a") as file:
        file.write(f"{attempt} {os.environ['MASTER_PORT']} {os.getpid()}\\n")
    def wait(seconds=600):
        end = time.time() + seconds
        while time.time() < end and not got:
            time.sleep(0.02)
        os._exit(75 if got else 0)  # as ranks end: while Python shuts down, another SIGTERM would kill it
"""


class Ranks:
    """Supervised ranks of one job."""

    def __init__(self, root: Path, folder: Path, size: int, restarts: int, body: str) -> None:
        self.folder = folder
        program = folder / "rank.py"
        program.write_text(textwrap.dedent(RANK) + textwrap.dedent(body))
        place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "launch.supervisor", str(folder), str(restarts), str(program), str(folder)],
                env={**clean, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(root)},
            )
            for rank in range(size)
        ]

    def codes(self) -> list[int]:
        return [p.wait(240) for p in self.processes]

    def starts(self, rank: int) -> list[list[str]]:
        file = self.folder / str(rank)
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def until(self, attempt: int) -> None:
        """Wait until all ranks have started so often."""
        deadline = time.monotonic() + 600
        while any(len(self.starts(r)) <= attempt for r in range(len(self.processes))):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def ranks(root: Path, tmp_path: Path) -> Callable[..., Ranks]:
    return lambda size, restarts, body: Ranks(root, tmp_path, size, restarts, body)


def signal_rank(job: Ranks, rank: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # its supervisor has passed the signal on
        os.kill(int(job.starts(rank)[0][2]), signal.SIGTERM)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_rank_starts_again_with_all_others_at_another_port(ranks: Callable[..., Ranks]) -> None:
    """The survivors hang, as in a collective of a library that does not notice."""
    job = ranks(3, 2, "wait(0.2 if attempt else 60)")
    job.until(0)
    os.kill(int(job.starts(1)[0][2]), signal.SIGKILL)
    assert job.codes() == [0, 0, 0]
    for rank in range(3):
        assert [line[0] for line in job.starts(rank)] == ["0", "1"]
    ports = [{job.starts(rank)[attempt][1] for rank in range(3)} for attempt in range(2)]
    assert [len(p) for p in ports] == [1, 1]
    assert ports[0] != ports[1]


def test_restarts_in_place_are_bounded_and_the_failure_is_told(ranks: Callable[..., Ranks]) -> None:
    job = ranks(2, 2, "sys.exit(7) if rank == 1 else sys.exit(1)")
    assert job.codes() == [1, 7]
    assert [len(job.starts(rank)) for rank in range(2)] == [3, 3]


@pytest.mark.parametrize("code", [2, 3])
def test_what_no_restart_mends_is_not_tried_again(ranks: Callable[..., Ranks], code: int) -> None:
    job = ranks(2, 5, f"sys.exit({code})")
    assert job.codes() == [code, code]
    assert [len(job.starts(rank)) for rank in range(2)] == [1, 1]


@pytest.mark.parametrize("every", [True, False], ids=["every process", "supervisors alone"])
def test_a_stop_is_no_death_and_after_one_nothing_starts_again(ranks: Callable[..., Ranks], every: bool) -> None:
    """SLURM sends a stop to every process of a step; a person may send it to the supervisors alone."""
    job = ranks(2, 5, "wait() if rank else (time.sleep(0) or wait())")
    job.until(0)
    for rank, process in enumerate(job.processes):
        process.send_signal(signal.SIGTERM)
        if every:
            signal_rank(job, rank)
    assert job.codes() == [75, 75]
    assert [len(job.starts(rank)) for rank in range(2)] == [1, 1]


def test_a_rank_that_dies_after_a_stop_signal_is_not_started_again(ranks: Callable[..., Ranks]) -> None:
    job = ranks(2, 5, "signal.signal(signal.SIGTERM, lambda *_: os._exit(9)); wait()")
    job.until(0)
    for rank, process in enumerate(job.processes):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        signal_rank(job, rank)
    assert all(code not in (0, 75) for code in job.codes())
    assert [len(job.starts(rank)) for rank in range(2)] == [1, 1]


@pytest.mark.parametrize("lost", [0, 1])
def test_the_loss_of_a_supervisor_ends_all(ranks: Callable[..., Ranks], lost: int) -> None:
    """Its node is gone: the job must go back into the queue. Ranks die with their supervisor."""
    job = ranks(2, 5, "wait()")
    job.until(0)
    job.processes[lost].kill()
    codes = job.codes()
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 128 + signal.SIGKILL, "the code of the rank, which had to be killed"
    pids = [int(job.starts(rank)[0][2]) for rank in range(2)]
    deadline = time.monotonic() + 600
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_without_restarts_there_is_a_supervisor_as_well(ranks: Callable[..., Ranks]) -> None:
    job = ranks(1, 0, "sys.exit(5)")
    assert job.codes() == [5]
    assert [line[0] for line in job.starts(0)] == ["0"]
