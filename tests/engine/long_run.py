"""A rank process for test_memory: a whole run; rank 0 stores its memory and its number of threads after every update."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from multitrain.config import load
from multitrain.engine.build import build
from multitrain.engine.distributed import join
from multitrain.engine.interruption import Interruption
from multitrain.engine.trainer import Trainer


def resident() -> float:
    """Memory of this process that is in use, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main(run: Path) -> None:
    config = load(run)
    world = join(config.world_size, 60, 1)
    trainer = build(config, run, world, Interruption(run, world.max, watches_files=False))
    trainer.resume()
    seen: list[tuple[float, int]] = []
    validate_if_due = Trainer._validate_if_due

    def watched() -> None:
        validate_if_due(trainer)
        if trainer.recorder._drawing:
            trainer.recorder._drawing.join()  # so that every validation is drawn, however busy the machine is
        seen.append((resident(), threading.active_count()))

    trainer._validate_if_due = watched  # type: ignore[method-assign]
    trainer.train()
    if world.is_main:
        (run / "memory.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # the threads of process groups need no farewell, and may abort in theirs
