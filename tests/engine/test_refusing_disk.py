"""A disk that refuses, or is slow: reported, the training goes on, the next interval tries again. Real ranks, real refusals."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from engine.test_resume import events, metrics
from support import settings, start_ranks, wait, write_run

from multitrain.engine import checkpoint as ck

UPDATES = 12
EVERY = 2


class Rank:
    """A run of one rank whose log is a pipe, which no file system can refuse."""

    def __init__(self, run: Path, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        (self.process,) = start_ranks(arguments, 1, log=None, environment=environment)
        self.said = ""

    def until(self, text: str) -> None:
        """Read its log up to a line with `text`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line.decode()
            if text in line.decode():
                return
        raise AssertionError(f"it never said {text!r}:\n{self.said[-4000:]}")

    def end(self) -> int:
        """Read to the end; its exit status."""
        assert self.process.stdout is not None
        self.said += self.process.stdout.read().decode()
        return wait([self.process])[0]


@contextlib.contextmanager
def quota(run: Path, pid: int) -> Iterator[None]:
    """No file of this process may grow by another byte (EFBIG), as with a quota; SIGXFSZ comes with it."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextlib.contextmanager
def read_only(run: Path, pid: int) -> Iterator[None]:
    """The run's folder is mounted read-only (EROFS): for root, `chmod` forbids nothing."""
    command = ["mount", "-o", "bind,ro", str(run), str(run)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(OSError, match="Read-only"):
            (run / "probe").touch()
        yield
    finally:
        subprocess.run(["umount", str(run)], check=True)


Refusal = Callable[[Path, int], AbstractContextManager[None]]


@pytest.mark.parametrize("refusal", [quota, read_only], ids=["quota", "read-only"])
def test_a_run_folder_that_refuses_in_the_middle_costs_neither_the_run_nor_a_line(
    tiny_data: Path, tmp_path: Path, refusal: Refusal
) -> None:
    changes = {"checkpoint__every": EVERY, "monitor__tensorboard": refusal is quota}
    run, _ = write_run(tmp_path, settings(tiny_data, updates=UPDATES, **changes))
    rank = Rank(run, ["-m", "multitrain.train", str(run)])
    try:
        rank.until("update  1/")
        with refusal(run, rank.process.pid):
            rank.until("could NOT be written")
        assert rank.end() == 0, rank.said[-4000:]
    finally:
        rank.process.kill()
    assert [m["update"] for m in metrics(run)] == list(range(UPDATES)), "each update once, in order"
    failed, written = events(run, "checkpoint_failed"), events(run, "checkpoint")
    assert {"quota": "File too large", "read_only": "Read-only"}[refusal.__name__] in failed[0]["reason"]
    assert written[-1]["update"] == UPDATES
    assert written[-1]["time"] > failed[0]["time"]
    assert ck.newest_verified(run / "checkpoints") == (ck.folder_of(run / "checkpoints", UPDATES), {})
    assert not list((run / "checkpoints").glob(".*"))
    assert "can be written again" in rank.said


def test_a_disk_that_refuses_at_the_start_is_one_line_with_the_remedy(tiny_data: Path, tmp_path: Path) -> None:
    run, _ = write_run(tmp_path, settings(tiny_data, updates=2))
    with read_only(run, 0):
        rank = Rank(run, ["-m", "multitrain.train", str(run)])
        assert rank.end() == 1, rank.said
    assert "Traceback" not in rank.said
    assert "Read-only file system; make room" in rank.said


SCONTROL = """#!/bin/sh
# What a controller says of a partition without any grace time, in lines recorded from one (22.05.8).
case "$2" in
partition) echo "PartitionName=low PriorityTier=1 GraceTime=0 Hidden=NO PreemptMode=REQUEUE State=UP" ;;
config) printf 'KillWait                = 0 sec\\nPreemptType             = preempt/partition_prio\\n' ;;
esac
"""


def test_a_disk_slower_than_the_interval_holds_the_training_up_is_named_and_compared_with_the_grace_time(
    tiny_data: Path, tmp_path: Path
) -> None:
    """No write ends before the next one is due; the cluster gives no time to stop in at all."""
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    run, _ = write_run(tmp_path, settings(tiny_data, updates=9, checkpoint__every=3))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_PARTITION": "low", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    program = str(Path(__file__).with_name("phases.py"))
    rank = Rank(run, [program, str(run), "slow-disk"], slurm)
    assert rank.end() == 0, rank.said[-4000:]
    saves = events(run, "checkpoint")
    assert [e["update"] for e in saves] == [3, 6, 9], "none left out, none at the same time"
    slow = events(run, "checkpoint_slow")
    assert [e["update"] for e in slow] == [6, 9]
    assert all(e["waited"] >= 0.2 for e in slow)
    assert saves[0]["held_up"] >= 0.2, "the wait is part of what the save held up"
    assert "takes longer than checkpoint.every=3 updates" in rank.said
    short, *grown = events(run, "lead_time_short")
    needed = [short["needed"], *(e["needed"] for e in grown)]
    assert all(b > 1.2 * a for a, b in itertools.pairwise(needed)), (
        "again only when it has grown by a quarter (rounded)"
    )
    assert short["setting"] == "the partition's GraceTime with KillWait"
    assert short["needed"] > short["seconds"] == 0.0
    assert "WARNING: stopping takes" in rank.said
