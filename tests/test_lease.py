"""One writer a run: who gets the lease, who waits, who must not write any more."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import settings, start_ranks, write_run

from multitrain import lease
from multitrain.lease import Guard, LeaseHeld, LeaseLost, acquire
from multitrain.records import jsonl

HOLD = """
import sys, time
from pathlib import Path
from multitrain import lease
lease.HEARTBEAT = 0.05
with lease.acquire(Path(sys.argv[1]), job=sys.argv[2] or None, restart=int(sys.argv[3])) as held:
    print(held.generation, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


class Other:
    """A process that holds the lease of a run until it is told to end."""

    def __init__(self, run: Path, job: str = "", restart: int = 0) -> None:
        command = [sys.executable, "-c", HOLD, str(run), job, str(restart)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.generation = int(self.process.stdout.readline())

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def elsewhere(run: Path, generation: int = 1, **changes: object) -> None:
    """Make the holder one of another machine, of which nothing can be known here but its counter."""
    path = run / "lease" / f"{generation:08d}.json"
    first, _, rest = path.read_text().partition("\n")
    text = json.dumps(json.loads(first) | {"machine": "elsewhere"} | changes)
    path.write_text(f"{text}\n{rest}")


def test_generations_grow_and_a_released_lease_is_free(run: Path) -> None:
    for generation in (1, 2, 3, 4, 5, 6):
        with acquire(run, patience=0) as held:
            assert held.generation == generation
    assert len(list((run / "lease").iterdir())) <= 2 * 4, "old generations are deleted"


def test_a_living_holder_is_not_replaced_and_the_refusal_names_it(run: Path) -> None:
    with Other(run, job="12", restart=3) as other, pytest.raises(LeaseHeld) as refused:
        acquire(run, patience=0)
    assert all(part in str(refused.value) for part in ("job 12 (restart 3)", f"process {other.process.pid}", "since"))


def test_a_holder_that_ends_in_time_is_waited_for(run: Path) -> None:
    said: list[str] = []
    with Other(run) as other:
        os.kill(other.process.pid, signal.SIGSTOP)

        def say(text: str) -> None:
            said.append(text)
            os.kill(other.process.pid, signal.SIGCONT)
            other.end()

        with acquire(run, patience=60, say=say) as held:
            assert held.generation == 2
    assert len(said) == 1


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_a_holder_whose_process_is_gone_is_replaced_at_once(run: Path, how: str) -> None:
    with Other(run) as other:
        if how == "killed":
            other.process.kill()
            other.process.wait()
        else:
            other.end()
        began = time.monotonic()
        with acquire(run, patience=0, silent=3600) as held:
            assert held.generation == 2
    assert time.monotonic() - began < 30


def test_a_later_restart_of_the_same_job_takes_over_and_the_earlier_one_may_not_write(run: Path) -> None:
    with acquire(run, job="7", restart=0) as first:
        first.on_lost = lambda _: None
        elsewhere(run)
        with acquire(run, job="7", restart=1, patience=0) as second:
            second.check()
            with pytest.raises(LeaseLost, match="taken over by job 7"):
                first.check()


@pytest.mark.parametrize(("slurm_says", "taken"), [(False, True), (True, False), (None, False)])
def test_what_slurm_says_of_the_holders_job_counts(run: Path, slurm_says: bool | None, taken: bool) -> None:
    with Other(run, job="9"):
        elsewhere(run)
        if taken:
            acquire(run, job="10", alive=lambda _: slurm_says, patience=0).release()
        else:
            with pytest.raises(LeaseHeld, match="job 9"):
                acquire(run, job="10", alive=lambda _: slurm_says, patience=0, silent=30)


def test_a_holder_of_another_machine_is_replaced_when_its_counter_stands_still(run: Path) -> None:
    with Other(run) as other:
        elsewhere(run)
        os.kill(other.process.pid, signal.SIGSTOP)
        with acquire(run, patience=0, silent=1.0) as held:
            assert held.generation == 2


def test_a_start_that_wakes_up_after_it_was_replaced_ends_without_writing(run: Path) -> None:
    with Other(run) as other:
        elsewhere(run)
        os.kill(other.process.pid, signal.SIGSTOP)
        with acquire(run, patience=0, silent=0.5):
            os.kill(other.process.pid, signal.SIGCONT)
            assert other.process.wait(60) == lease.LOST


def test_many_starts_at_once_one_gets_it(run: Path) -> None:
    code = """
import sys
from pathlib import Path
from multitrain import lease
sys.stdin.readline()
try:
    held = lease.acquire(Path(sys.argv[1]), patience=0.5)
except lease.LeaseHeld as error:
    print("held by" in str(error))
else:
    print("mine", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(run)]
    starts = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    for start in starts:
        assert start.stdin is not None
        start.stdin.write("\n")
        start.stdin.flush()
    heard = [start.stdout.readline().strip() for start in starts if start.stdout]
    for start in starts:
        start.communicate()
    assert sorted(heard) == ["True"] * 7 + ["mine"]


def test_a_lease_that_somebody_removed_lets_nothing_be_written(run: Path) -> None:
    with acquire(run) as held:
        for file in (run / "lease").iterdir():
            file.unlink()
        with pytest.raises(LeaseLost, match="removed"):
            held.check()


def test_a_half_written_lease_is_waited_for_and_then_replaced(run: Path) -> None:
    (run / "lease").mkdir()
    (run / "lease" / "00000004.json").write_text('{"start": "jo')
    with acquire(run, patience=0, silent=0.5) as held:
        assert held.generation == 5


def test_lines_are_refused_once_the_lease_is_lost(run: Path) -> None:
    jsonl.append(run / "events.jsonl", {"event": "before"})
    with acquire(run, job="1") as first:
        first.on_lost = lambda _: None
        lease.guarded(first)
        try:
            jsonl.append(run / "events.jsonl", {"event": "mine"})
            elsewhere(run)
            with acquire(run, job="1", restart=1):
                for write in (jsonl.append, jsonl.drop_from):
                    with pytest.raises(LeaseLost):
                        write(run / "events.jsonl", {"event": "late"} if write is jsonl.append else 0)  # type: ignore[operator]
                jsonl.append(run.parent / "other.jsonl", {"event": "elsewhere"})
        finally:
            lease.guarded(None)
    assert [r["event"] for r in jsonl.read(run / "events.jsonl")] == ["before", "mine"]


def test_processes_of_the_holders_start_may_write_and_others_may_not(run: Path) -> None:
    same, other = Guard(run, lease.start_name("5", 1)), Guard(run, lease.start_name("5", 0))
    same.check()
    with acquire(run, job="5", restart=1):
        same.check()
        with pytest.raises(LeaseLost):
            other.check()
    other.check()


def test_a_holder_whose_folder_was_deleted_does_not_share_a_generation_with_the_next(run: Path) -> None:
    with acquire(run) as old:
        for file in (run / "lease").iterdir():
            file.unlink()
        with Other(run) as new:
            assert new.generation == old.generation, "counted from 1 again"
            with pytest.raises(LeaseLost, match=f"process {new.process.pid}"):
                old.check()
            old.release()
            assert (run / "lease" / "00000001.over").read_text() == "", "and the next one keeps it"


def test_a_later_start_of_a_job_is_not_held_up_by_an_earlier_one_that_could_not_say_that_it_is_over(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    held = lease.acquire(run, job="5", restart=1)
    Guard(run, lease.start_name("5", 2)).check()
    for start in (lease.start_name("5", 0), lease.start_name("6", 2), "process 5.2"):
        with pytest.raises(LeaseLost):
            Guard(run, start).check()
    held.release()


def test_a_copy_of_a_run_that_trains_is_not_taken_for_it(run: Path, tmp_path: Path) -> None:
    """The remedy for the copy is its own: ending the holder would end the original."""
    copy = tmp_path / "copy"
    with Other(run, job="12"):
        shutil.copytree(run, copy)
        with pytest.raises(LeaseHeld, match=re.escape(f"{copy} is a copy of {run}")) as refused:
            acquire(copy, patience=0)
        assert f"delete {copy / 'lease'}" in str(refused.value)
        shutil.rmtree(copy / "lease")
        with acquire(copy, patience=0) as held:
            assert held.generation == 1


def test_the_same_folder_under_another_path_is_no_copy(run: Path, tmp_path: Path) -> None:
    """Machines may have the run at different paths; a run may be moved while it trains."""
    with Other(run) as other:
        run.rename(tmp_path / "moved")
        with pytest.raises(LeaseHeld, match=f"held by process {other.process.pid}"):
            acquire(tmp_path / "moved", patience=0)


@pytest.mark.parametrize("what", ["a file", "a link"])
def test_what_is_no_folder_of_leases_is_named_with_the_remedy(run: Path, tmp_path: Path, what: str) -> None:
    place = run / "lease"
    place.write_text("mine") if what == "a file" else place.symlink_to(tmp_path)
    with pytest.raises(
        lease.LeaseUnusable, match=f"{place} is (not a folder; move|a link, which is not followed; remove)"
    ):
        acquire(run, patience=0)
    assert lease.newest(run) is None
    assert list(tmp_path.iterdir()) == [run], "nothing was written behind the link"


def test_a_signal_ends_the_wait_for_the_lease(run: Path, tmp_path: Path, tiny_data: Path) -> None:
    """With the status of an interrupted run: a job that SLURM takes away while it waits comes back."""
    waiting, _ = write_run(tmp_path / "runs", settings(tiny_data, updates=2))
    (waiting / "lease").mkdir()
    with Other(waiting):
        (process,) = start_ranks(["-m", "multitrain.train", str(waiting)], 1, log=None)
        assert process.stdout is not None
        said = b""
        while b"waiting for the run's lease" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGTERM)
        said += process.stdout.read()
        assert process.wait(600) == 75, said
    assert b"SIGTERM came while it waited for the lease" in said
