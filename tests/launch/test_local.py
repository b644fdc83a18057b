"""`cluster=local`: real processes, real signals, none left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import local
from multitrain.cluster import exit_status
from multitrain.config import ConfigError, RunConfig, compose

RANK = """
    import json, os, signal, sys, time
    from multitrain.cluster.slurm import unblock_stop_signals
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    print(json.dumps({n: os.environ[n] for n in names} | {"pid": os.getpid(), "cwd": os.getcwd()}), flush=True)
    rank = int(os.environ["RANK"])
"""


@pytest.fixture
def folder(tmp_path: Path, root: Path) -> Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "multitrain").symlink_to(root / "multitrain")
    return tmp_path


def config(ranks: int, restarts: int = 0) -> RunConfig:
    words = ["cluster.cpus_per_gpu=3", f"cluster.restarts_in_place={restarts}"]
    return compose(["cluster=local", f"gpus={ranks}", "experiment=k400", *words])


def rank_program(folder: Path, body: str) -> tuple[str, ...]:
    file = folder / "rank.py"
    file.write_text(textwrap.dedent(RANK) + textwrap.dedent(body))
    return (str(file),)


def started(folder: Path, ranks: int) -> list[dict[str, str]]:
    """The first line of every rank, once all have written it."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        logs = [local.rank_log(folder, r) for r in range(ranks)]
        if all(log.exists() and "\n" in log.read_text() for log in logs):
            return [json.loads(log.read_text().split("\n")[0]) for log in logs]
        time.sleep(0.05)
    raise AssertionError("the ranks did not start")


def launcher(root: Path, folder: Path, ranks: int, body: str) -> subprocess.Popen[str]:
    program = (
        "import sys; from pathlib import Path; from launch import local; from multitrain.config import compose; "
        f"config = compose(['cluster=local', 'gpus={ranks}', 'experiment=k400']); "
        f"sys.exit(local.run(Path({str(folder)!r}), config, {rank_program(folder, body)!r}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 600
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_every_rank_knows_its_place(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = rank_program(folder, "print('rank', rank, 'of', os.environ['WORLD_SIZE'])")
    assert local.run(folder, config(3), program) == 0
    places = started(folder, 3)
    assert [p["RANK"] for p in places] == [p["LOCAL_RANK"] for p in places] == ["0", "1", "2"]
    assert {(p["WORLD_SIZE"], p["LOCAL_WORLD_SIZE"], p["MASTER_ADDR"]) for p in places} == {("3", "3", "127.0.0.1")}
    assert len({p["MASTER_PORT"] for p in places}) == 1
    assert {p["OMP_NUM_THREADS"] for p in places} == {"3"}
    assert {p["cwd"] for p in places} == {str(folder / "code")}
    out = capfd.readouterr().out
    assert "rank 0 of 3" in out
    assert "rank 1 of 3" not in out


def test_a_run_folder_that_is_moved_away_ends_in_words(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = folder / "run"
    run.mkdir()
    (folder / "code").rename(run / "code")
    body = f"""
        if rank == 1:
            open({str(folder / "up")!r}, "w").close()
        while not os.path.exists({str(folder / "up")!r}):  # rank 1 imports from the folder
            time.sleep(0.05)
        if rank == 0:
            os.rename({str(run)!r}, {str(folder / "moved")!r})
            print("the last words", flush=True)
            sys.exit(1)
        time.sleep(600)
    """
    said: list[str] = []
    assert local.run(run, config(2, restarts=1), rank_program(folder, body), report=said.append) == 1
    assert "the last words" in capfd.readouterr().out
    assert "rank 0 failed with exit code 1" in said[0]
    assert f"{run} does not exist any more" in said[1]
    assert not run.exists()


def test_a_failing_rank_ends_the_others_and_is_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "EXIT_TIMEOUT", 0.3)
    body = """
        if rank == 1:
            print("the reason why")
            sys.exit(7)
        time.sleep(600)
    """
    said: list[str] = []
    begin = time.monotonic()
    assert local.run(folder, config(3), rank_program(folder, body), report=said.append) == 7
    assert time.monotonic() - begin < 300
    assert gone([int(p["pid"]) for p in started(folder, 3)])
    assert "the reason why" in said[0]
    assert "rank 1 failed with exit code 7" in said[1]


def test_a_rank_that_dies_starts_again_with_all_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "EXIT_TIMEOUT", 0.3)
    body = """
        if rank == 1 and os.environ["MULTITRAIN_RESTARTS_IN_PLACE"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60 if os.environ["MULTITRAIN_RESTARTS_IN_PLACE"] == "0" else 0)
    """
    said: list[str] = []
    assert local.run(folder, config(2, restarts=2), rank_program(folder, body), report=said.append) == 0
    assert "restart 1 of 2" in said[-1]
    for rank in range(2):
        lines = [json.loads(line) for line in local.rank_log(folder, rank).read_text().splitlines()]
        assert len({line["MASTER_PORT"] for line in lines}) == len(lines) == 2


@pytest.mark.parametrize("code", [2, 3])
def test_what_no_restart_mends_is_not_tried_again(folder: Path, code: int) -> None:
    assert local.run(folder, config(1, restarts=3), rank_program(folder, f"sys.exit({code})")) == code
    assert len(local.rank_log(folder).read_text().splitlines()) == 1


SAVES = """
    signals = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    unblock_stop_signals()
    while not signals: time.sleep(0.01)
    time.sleep(0.3)
    print("saved after", len(signals), flush=True)
    sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_stop_is_passed_on_once_and_the_run_is_resumable(root: Path, folder: Path, number: int) -> None:
    process = launcher(root, folder, 2, SAVES)
    pids = [int(p["pid"]) for p in started(folder, 2)]
    process.send_signal(number)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 75
    assert "saved after 1" in out
    assert "saved after 1" in local.rank_log(folder, 1).read_text()
    assert gone(pids)


def test_a_second_stop_ends_ranks_that_do_not_leave(root: Path, folder: Path) -> None:
    process = launcher(root, folder, 2, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)")
    pids = [int(p["pid"]) for p in started(folder, 2)]
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert all(map(alive, pids))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT
    assert gone(pids)


def test_no_rank_outlives_a_killed_launcher(root: Path, folder: Path) -> None:
    process = launcher(root, folder, 2, "time.sleep(600)")
    pids = [int(p["pid"]) for p in started(folder, 2)]
    process.kill()
    process.communicate(timeout=300)
    assert gone(pids)


def test_a_stop_that_comes_during_imports_is_not_lost(root: Path, folder: Path) -> None:
    process = launcher(root, folder, 1, "    time.sleep(1.5)" + SAVES)
    started(folder, 1)
    process.send_signal(signal.SIGTERM)  # the rank is 'importing': its handler comes later
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 75
    assert "saved after 1" in out


def test_logs_of_earlier_starts_stay(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = rank_program(folder, "print('hello', sys.argv[1])")
    local.run(folder, config(1), (*program, "first"))
    capfd.readouterr()
    local.run(folder, config(1), (*program, "second"))
    assert "first" not in capfd.readouterr().out
    log = local.rank_log(folder).read_text()
    assert "hello first" in log
    assert "hello second" in log


def test_each_rank_has_its_gpu_or_the_run_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    program = rank_program(folder, "print(os.environ['CUDA_VISIBLE_DEVICES'])")
    assert local.run(folder, config(2), program) == 0
    assert "\n4,5\n" in local.rank_log(folder, 1).read_text()
    with pytest.raises(ConfigError, match="gpus=4, but there are 3 here; use gpus=3"):
        local.run(folder, config(4), program)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.run(folder, config(4), program) == 0


def test_the_same_table_for_every_machine(folder: Path, root: Path) -> None:
    (folder / "code" / "launch").symlink_to(root / "launch")
    assert local.run(folder, config(2), ("-m", "launch.preflight", "--dir", str(folder))) == 0
    lines = local.rank_log(folder).read_text().splitlines()
    assert lines[0].split()[:5] == ["rank", "node", "gpu", "cpus", "affinity"]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"]


LIMIT = 64 << 20
"""Bytes of memory that a rank may have below."""
EAT = """
    if rank == 1:
        open({procs!r}, "w").write(str(os.getpid()))
        eaten = bytearray({bytes})
        eaten[::4096] = b"x" * len(eaten[::4096])
    time.sleep(600)
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory control group of 64 MiB, of version 1 or 2; the test is skipped where none can be made."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        made = Path(root) / f"multitrain-test-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            if (made / limit).exists():
                (made / limit).write_text(str(LIMIT))
                yield made
                return
        except OSError:
            continue
        finally:
            made.rmdir()
    pytest.skip("no control group can be made here: needs root, and the memory controller")


def test_memory_that_runs_out_in_a_rank_is_named_as_the_reason(
    folder: Path, group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exit_status.killed_for_memory() is None:
        pytest.skip("this kernel does not count what it kills")
    monkeypatch.setattr(local, "EXIT_TIMEOUT", 0.2)
    said: list[str] = []
    body = EAT.format(procs=str(group / "cgroup.procs"), bytes=4 * LIMIT)
    assert local.run(folder, config(2), rank_program(folder, body), report=said.append) == 137
    assert "rank 1 was killed by SIGKILL (exit code 137): memory ran out" in said[-1]
    assert "lower data.workers" in said[-1]
