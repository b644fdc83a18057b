"""A rank process for test_update: one real update through DeepSpeed; rank 0 stores losses and gradient by name.

The gradient is read from AdamW's first moment after the first step: exp_avg = (1 - beta1) · gradient.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from support import excite

from multitrain.config import load
from multitrain.engine.build import build
from multitrain.engine.deepspeed import Sharded
from multitrain.engine.distributed import join
from multitrain.engine.interruption import Interruption
from multitrain.model.multitrain import MultiTrain


def main(run: Path) -> None:
    config = load(run)
    world = join(config.world_size, 60, 1)
    initialise = MultiTrain.initialise
    MultiTrain.initialise = lambda self, seed: (initialise(self, seed), excite(self))[0]  # type: ignore[method-assign]
    trainer = build(config, run, world, Interruption(run, world.max, watches_files=False))
    trainer.resume()
    records: list[Any] = []
    trainer.recorder.update = records.append  # type: ignore[method-assign]
    trainer.updates = 1
    trainer.train()
    engine = trainer.engine
    moments = Sharded(
        engine.shapes, world.gather(engine.pieces()), world.gather(engine.copy_moments(None)), engine.sharded
    )
    if world.is_main:
        beta1 = config.optim.betas[0]
        gradient = {n.removeprefix("exp_avg."): t / (1 - beta1) for n, t in moments.items() if n.startswith("exp_avg.")}
        torch.save({"gradient": gradient, "record": records[0]}, run / "update.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # the threads of process groups need no farewell, and may abort in theirs
