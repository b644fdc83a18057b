"""A long run does not grow: what an update, a validation and a checkpoint took is there for the next one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests import support

UPDATES, EVERY, FIRST = 140, 20, 60
"""Length of the run, updates between two validations, and updates after which everything was used once."""
MOST = 8.0
"""MB that the memory may grow in the rest of the run, by the slope of a straight line. Seen: ±1, and 40 with a leak."""


def test_memory_does_not_grow_with_updates_validations_pictures_and_checkpoints(
    tiny_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    run, _ = support.write_run(
        tmp_path,
        support.settings(
            tiny_data,
            updates=UPDATES,
            effective_batch=2,
            model__crop=32,
            augment__copies=1,
            eval__every=EVERY,
            checkpoint__every=EVERY // 2,
            monitor__tensorboard=True,
        ),
    )
    log = tmp_path / "log"
    codes = support.wait(support.start_ranks(["-m", "engine.long_run", str(run)], 1, log=log), timeout=300)
    assert codes == [0], log.read_text()
    assert "no pictures" not in log.read_text()
    seen = json.loads((run / "memory.json").read_text())[FIRST:]
    slope = np.polyfit(range(len(seen)), seen, 1)[0]
    assert slope * len(seen) < MOST, f"{slope * 100:.1f} MB per 100 updates: {[round(s) for s in seen]}"
