"""A rank that the kernel kills for want of memory leaves no word; the launcher says it for the rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import local
from multitrain.monitor import exits
from tests.launch.test_local import config, folder, rank_program  # noqa: F401 (a fixture)

LIMIT = 64 << 20
EAT = """
    if rank == 1:
        open({procs!r}, "w").write(str(os.getpid()))
        eaten = bytearray({bytes})
        eaten[::4096] = b"x" * len(eaten[::4096])
    time.sleep(60)
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
    folder: Path,
    group: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if exits.killed_for_memory() is None:
        pytest.skip("this kernel does not count what it kills")
    monkeypatch.setattr(local, "PATIENCE", 0.2)
    said: list[str] = []
    body = EAT.format(procs=str(group / "cgroup.procs"), bytes=4 * LIMIT)
    assert local.run(folder, config(2), rank_program(folder, body), say=said.append) == 137
    assert "rank 1 was killed by SIGKILL (exit code 137): memory ran out" in said[-1]
    assert "lower data.workers" in said[-1]
