"""A job that is suspended for longer than a collective may take goes on: stopped time is no hang. Real ranks, real signals."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from support import start_ranks, wait

from multitrain.config.engine import EngineConfig

WAITS = """
import sys, time
from pathlib import Path
from multitrain.engine.distributed import join
world = join(2, 600, 1, int(sys.argv[2]))
world.gather(0)
(Path(sys.argv[1]) / str(world.rank)).touch()
if world.rank == 1:
    while not (Path(sys.argv[1]) / "go").exists():
        time.sleep(0.05)
print(world.gather(world.rank))
"""


@pytest.mark.parametrize(("hang_limit", "goes_on"), [(10, True), (None, False)])
def test_a_collective_that_was_begun_before_a_suspension_ends_after_it(
    tmp_path: Path, hang_limit: int | None, goes_on: bool
) -> None:
    engine = EngineConfig(collective_timeout=10, hang_limit=hang_limit)
    log = tmp_path / "log"
    ranks = start_ranks(["-c", WAITS, str(tmp_path), str(engine.collective_limit)], 2, log=log)
    deadline = time.monotonic() + 600
    while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    time.sleep(1)  # rank 0 waits in its collective
    for rank in ranks:
        os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(12)
    (tmp_path / "go").touch()
    for rank in ranks:
        os.kill(rank.pid, signal.SIGCONT)
    assert (wait(ranks) == [0, 0]) == goes_on, log.read_text()[-3000:]


def test_without_a_watchdog_or_below_its_limit_a_collective_has_its_own() -> None:
    assert EngineConfig(collective_timeout=60, hang_limit=None).collective_limit == 60
    assert EngineConfig(collective_timeout=60, hang_limit=61).collective_limit == 60
    assert EngineConfig(collective_timeout=60, hang_limit=60).collective_limit > 24 * 3600
