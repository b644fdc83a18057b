"""A long run does not grow: what an update, a validation and a checkpoint took is there for the next one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests import support

UPDATES, EVERY = 80, 20
"""Length of the run, and updates between two validations."""
SETTLED = 15
"""Updates after which updates and checkpoints have used everything once."""
MOST = 30.0
"""MB that memory may grow in the rest of the run, by the slope of a straight line. Seen: under 10, and 120 when rank 0 drew."""


def test_memory_does_not_grow_with_updates_checkpoints_and_drawn_validations(tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    dataset = {"annotations": str(tiny_data / "stride"), "videos": str(tiny_data / "stride"), "classes": 5}
    changes = {"updates": UPDATES, "effective_batch": 2, "model__crop": 32, "augment__copies": 1}
    changes |= {"eval__every": EVERY, "checkpoint__every": 5, "monitor__tensorboard": True}
    settings = support.settings(tiny_data, data__datasets={"stride": dataset}, **changes)
    run, _ = support.write_run(tmp_path, settings)
    log = tmp_path / "log"
    codes = support.wait(support.start_ranks(["-m", "engine.long_run", str(run)], 1, log=log), timeout=800)
    assert codes == [0], log.read_text()
    assert "no pictures" not in log.read_text()
    resident, threads = zip(*json.loads((run / "memory.json").read_text())[SETTLED:])
    slope = np.polyfit(range(len(resident)), resident, 1)[0]
    assert slope * len(resident) < MOST, f"{slope * 100:.1f} MB per 100 updates: {[round(s) for s in resident]}"
    assert threads[EVERY] == threads[-EVERY], f"a validation leaves threads behind: {threads}"
