"""What another user of the node writes to torch's store is refused, and what he sends to its port harms no rank."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from stranger import as_another_user, attack
from support import free_port, settings, start_ranks, train, wait, write_run

from multitrain.engine import checkpoint as ck
from multitrain.engine.store import AuthenticatedStore, StoreError

pytestmark = pytest.mark.timeout(1200)  # starts of training beside other work

KEY = b"k" * 32


def test_values_that_no_rank_has_written_are_refused() -> None:
    raw = dist.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=2))
    store = AuthenticatedStore(raw, KEY)
    store.set("address", b"\0\xff10.0.0.1")
    assert store.get("address") == b"\0\xff10.0.0.1"
    assert AuthenticatedStore(raw, KEY).get("address") == b"\0\xff10.0.0.1"
    assert not raw.check(["address"])
    assert not AuthenticatedStore(raw, b"o" * 32).check(["address"])
    full = store._prefix + "address"
    sealed = raw.get(full)
    for forged in (b"10.6.6.6", b"", sealed[:-1] + b"2", b"x" * 40):
        raw.set(full, forged)  # type: ignore[arg-type]
        with pytest.raises(StoreError, match="no rank of this run has written 'address'"):
            store.get("address")
    raw.set(store._prefix + "other", sealed)  # a value of another key  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        store.get("other")
    assert store.add("count", 2) == 2
    assert store.compare_set("chosen", "", "a") == b"a"
    assert store.compare_set("chosen", "a", "b") == b"b"
    assert store.compare_set("chosen", "a", "c") == b"b"


RANK = """
import os, sys, time
from pathlib import Path
from multitrain.engine.distributed import join
if os.environ["RANK"] == "1":
    while not Path(sys.argv[1], "attacked").exists():
        time.sleep(0.05)
world = join(2, 60, 1)
assert world.gather(world.rank) == [0, 1]
Path(sys.argv[1], "joined").touch()
while not Path(sys.argv[1], "attacked again").exists():
    world.max(1)
    time.sleep(0.05)
assert world.max(world.rank) == 1
os._exit(0)
"""


def test_what_strangers_send_to_its_port_changes_nothing(root: Path, tmp_path: Path) -> None:
    """While rank 0 waits for rank 1, and while both run."""
    port = free_port()
    common = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {
        "MASTER_PORT": str(port),
        "MULTITRAIN_STORE_KEY": KEY.hex(),
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
    }
    ranks = []
    for rank in (0, 1):
        with open(tmp_path / f"{rank}.log", "w") as log:  # a pipe would fill: torch warns of each message
            command = [sys.executable, "-c", RANK, str(tmp_path)]
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env={**common, **place}, stderr=log))
    deadline = time.monotonic() + 600
    while not _listens(port):
        assert time.monotonic() < deadline
        assert ranks[0].poll() is None
        time.sleep(0.1)
    as_another_user(lambda: attack([port], 5_000, seed=3))
    assert not (tmp_path / "joined").exists()
    (tmp_path / "attacked").touch()
    while not (tmp_path / "joined").exists():
        assert time.monotonic() < deadline
        assert ranks[0].poll() is None
        time.sleep(0.1)
    as_another_user(lambda: attack([port], 5_000, seed=4))
    (tmp_path / "attacked again").touch()
    for number, rank in enumerate(ranks):
        assert rank.wait(timeout=300) == 0, (tmp_path / f"{number}.log").read_text()[-4000:]


def _listens(port: int) -> bool:
    wanted = f"0100007F:{port:04X}"
    return any(line.split()[1] == wanted and line.split()[3] == "0A" for line in open("/proc/net/tcp").readlines()[1:])


def test_training_has_the_same_bits_through_it(tiny_data: Path, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, settings(tiny_data, gpus=2, updates=2))[0] for name in ("plain", "kept")]
    train(runs[0], 2, timeout=600)
    environment = {"MULTITRAIN_STORE_KEY": KEY.hex(), "LOCAL_WORLD_SIZE": "2"}
    log = runs[1] / "ranks.log"
    assert wait(start_ranks(["-m", "multitrain.train", str(runs[1])], 2, log=log, environment=environment), 600) == [
        0,
        0,
    ], log.read_text()[-4000:]
    plain, kept = (ck.read(ck.folder_of(run / "checkpoints", 2)) for run in runs)
    for name, tensor in {**plain.weights, **plain.moments}.items():
        assert tensor.equal({**kept.weights, **kept.moments}[name]), name
