"""A rank process for test_elastic: resumes a run without an update, and stores what its engine then holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from multitrain.config import load
from multitrain.engine.build import build
from multitrain.engine.deepspeed import Sharded
from multitrain.engine.distributed import join
from multitrain.engine.interruption import Interruption


def main(run: Path) -> None:
    config = load(run)
    world = join(config.world_size, 60, 1)
    trainer = build(config, run, world, Interruption(run, world.max, watches_files=False))
    trainer.resume()
    engine = trainer.engine
    moments = Sharded(
        engine.shapes, world.gather(engine.pieces()), world.gather(engine.copy_moments(None)), engine.sharded
    )
    inner = engine._engine.optimizer.optimizer
    steps = {float(inner.state[flat]["step"]) for group in inner.param_groups for flat in group["params"]}
    if world.is_main:
        held = {"weights": engine.copy_weights({}), "moments": dict(moments), "steps": steps}
        held |= {"scale": engine.loss_scale, "applied": engine.steps_applied, "completed": trainer.completed}
        torch.save(held, run / "restored.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # the threads of process groups need no farewell, and may abort in theirs
