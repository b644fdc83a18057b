"""A rank process for test_counts: counts what the third update asks of the network and of the device; rank 0 stores it."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from multitrain.config import load
from multitrain.engine.build import build
from multitrain.engine.distributed import join
from multitrain.engine.interruption import Interruption
from multitrain.engine.trainer import Trainer


def counted(action: Callable[[], None]) -> dict[str, int]:
    """How often `action` calls each collective, and reads a number out of a tensor."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        action()
    names = Counter(event.name for event in seen.events())
    return {n: c for n, c in names.items() if n.startswith("c10d::") or n == "aten::_local_scalar_dense"}


def main(run: Path) -> None:
    config = load(run)
    world = join(config.world_size, 60, 1)
    trainer = build(config, run, world, Interruption(run, world.max, watches_files=False))
    trainer.resume()
    found: dict[str, int] = {}
    one_update = Trainer._one_update

    def watched() -> None:
        if trainer.completed == 2:
            found.update({name: name in sys.modules for name in ("torch._dynamo", "torch._inductor", "sympy")})
            found.update(counted(lambda: one_update(trainer)))
        else:
            one_update(trainer)

    trainer._one_update = watched  # type: ignore[method-assign]
    trainer.updates = 3
    trainer.train()
    if world.is_main:
        (run / "counts.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # the threads of process groups need no farewell, and may abort in theirs
