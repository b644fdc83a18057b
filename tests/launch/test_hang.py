"""Stopped time is not a hang, and a rank whose interpreter is held is one; real processes, stopped and held."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launch.child import SUSPEND_GAP_SECONDS, AwakeClock

HASTY = (
    "import sys, launch.child as c; c.HEARTBEAT_GRACE_SECONDS, c.EXIT_TIMEOUT = 1.0, 3.0; "
    "from launch.supervisor import main; sys.exit(main())"
)
RANK = """
    import os, re, signal, sys, time
    from pathlib import Path
    from multitrain.engine.watchdog import Watchdog
    from multitrain.cluster.slurm import unblock_stop_signals
    run = Path(sys.argv[1])
    watchdog = Watchdog(run, 0, float(sys.argv[2]))
    watchdog.first_update_done()
    with open(run / "started", "a") as file:
        file.write(f"{os.getpid()}\\n")
"""


def supervised(root: Path, run: Path, body: str, limit: float) -> subprocess.Popen[str]:
    program = run / "rank.py"
    program.write_text(textwrap.dedent(RANK) + textwrap.dedent(body))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return subprocess.Popen(
        [sys.executable, "-c", HASTY, str(run), "0", str(program), str(run), str(limit)],
        env={**clean, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
    )


def rank_of(run: Path, supervisor: subprocess.Popen[str]) -> int:
    """The rank's process id, once its watchdog is on."""
    deadline = time.monotonic() + 600
    while not (run / "started").exists() or not (run / "started").read_text().endswith("\n"):
        assert supervisor.poll() is None, supervisor.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int((run / "started").read_text().split()[-1])


def events(run: Path) -> list[dict[str, object]]:
    file = run / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_suspended_job_goes_on_where_it_was(root: Path, tmp_path: Path) -> None:
    """As `scontrol suspend` does, to every process of the step."""
    body = """
        for _ in range(5):
            time.sleep(2.0)
            watchdog.heartbeat()
    """
    process = supervised(root, tmp_path, body, 5.0)
    pids = [rank_of(tmp_path, process), process.pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5.0 + SUSPEND_GAP_SECONDS + 3.0)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert events(tmp_path) == []
    assert len((tmp_path / "started").read_text().split()) == 1


def test_a_rank_whose_interpreter_is_held_ends_with_its_stacks(root: Path, tmp_path: Path) -> None:
    body = """
        def held():
            re.match("(a+)+$", "a" * 64 + "b")  # for years, without a break for other threads
        time.sleep(1.5)  # signs of life
        held()
    """
    process = supervised(root, tmp_path, body, 2.0)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGKILL, errors
    assert "in held" in errors, errors
    assert "did not respond" in str(events(tmp_path)[0]["text"])


def test_a_rank_that_alone_stands_still_hangs(root: Path, tmp_path: Path) -> None:
    process = supervised(root, tmp_path, "while True:\n        time.sleep(0.2)\n        watchdog.heartbeat()", 2.0)
    pid = rank_of(tmp_path, process)
    time.sleep(1.5)
    os.kill(pid, signal.SIGSTOP)
    assert process.wait(60) == 128 + signal.SIGKILL
    failed = events(tmp_path)[0]
    assert (failed["event"], failed["rank"]) == ("rank_failed", 0)
    assert "did not respond" in str(failed["text"])


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGUSR1])
@pytest.mark.parametrize("state", ["frozen", "importing"])
def test_what_has_not_left_long_after_the_warning_is_killed(
    root: Path, tmp_path: Path, number: int, state: str
) -> None:
    """So that the step ends before the time limit, and the job can be put back into the queue."""
    (tmp_path / "config.yaml").write_text("cluster:\n  kind: slurm\n  lead_time: 3\n")
    process = supervised(root, tmp_path, "time.sleep(120)", 600.0)
    pid = rank_of(tmp_path, process)
    if state == "frozen":
        os.kill(pid, signal.SIGSTOP)
    for target in (pid, process.pid):
        os.kill(target, number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGKILL
    assert "had not exited 2 s after the warning of the time limit" in str(events(tmp_path)[0]["text"]), errors


def test_time_in_which_a_supervisor_stood_still_does_not_count() -> None:
    now = [100.0]
    clock = AwakeClock(lambda: now[0])
    for step in (1.0, 4.0, 3600.0, 1.0):
        now[0] += step
        clock()
    assert clock() == 6.0
