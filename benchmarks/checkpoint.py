"""Time that a checkpoint blocks training, and time until it is on disk, for the state of the recommended model.

python -m benchmarks.checkpoint [--full] [--model mvit_b24_32x3] [--saves 5] [--dir DIR]

One process with gloo builds the real model and its AdamW moments, saves to a temporary folder, and computes meanwhile as training
would. `held_up`: seconds that the copy blocks training. `seconds`: from the copy to the verified checkpoint. The ratio must stay
below 0.1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.network import DATASETS
from benchmarks.results import row, save
from multitrain.config import compose
from multitrain.engine import checkpoint
from multitrain.engine.deepspeed import Engine
from multitrain.engine.distributed import join
from multitrain.engine.saver import Saver
from multitrain.model.multitrain import MultiTrain


def measure(model_name: str, saves: int, folder: Path, busy: bool) -> dict[str, Any]:
    """Save this many times; return medians and all values in seconds."""
    config = compose([f"model={model_name}", "cluster=local", "gpus=1", "name=benchmark", "precision=fp32"])
    world = join(1, 600, 1)
    model = MultiTrain(config.model, DATASETS)
    model.initialise(0)
    engine = Engine(model, config.optim, config.engine, config.precision, world.device)
    saver = Saver(folder, world, engine, config.checkpoint, "")
    saver.preallocate()
    found = []
    for number in range(saves):
        saver.start({"update": number + 1})
        while busy and not saver.done:
            torch.randn(256, 256) @ torch.randn(256, 256)
        assert saver.finish()
        outcome = saver.poll_result()
        assert outcome is not None
        found.append({"held_up": saver.copied, "seconds": outcome.seconds})
    newest, _ = checkpoint.newest_verified(folder)
    assert newest is not None
    began = time.perf_counter()
    content = checkpoint.read(newest)
    engine.restore(content.weights, content.moments, 0)
    restored = time.perf_counter() - began
    held, seconds = (statistics.median(f[k] for f in found[1:] or found) for k in ("held_up", "seconds"))
    return {
        "model": model_name,
        "parameters": sum(t.numel() for t in content.weights.values()),
        "bytes": sum(f.stat().st_size for f in newest.iterdir()),
        "computing_meanwhile": busy,
        "first_held_up": round(found[0]["held_up"], 3),
        "held_up": round(held, 3),
        "seconds": round(seconds, 3),
        "share": round(held / seconds, 4),
        "verify_read_and_restore_seconds": round(restored, 3),
        "saves": found,
    }


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more saves; the model is the real one in both sizes")
    parser.add_argument("--model", default="mvit_b24_32x3")
    parser.add_argument("--saves", type=int, help="how many (default 3, with --full 10)")
    parser.add_argument("--dir", type=Path, help="folder of the run directories' disk; a temporary one when not given")
    parser.add_argument("--idle", action="store_true", help="do not compute while the checkpoint is written")
    options = parser.parse_args()
    saves = options.saves or (10 if options.full else 3)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        found = measure(options.model, saves, Path(folder), not options.idle)
    what = f"{found['parameters'] / 1e6:.1f} M parameters with moments, {found['bytes'] / 1e6:.0f} MB; median of {saves} saves"
    rows = [
        row("from the copy to the verified checkpoint", ours=found["seconds"], unit="s", note=what),
        row("an update held up", ours=found["held_up"], unit="s"),
        row("an update held up by the first save", ours=found["first_held_up"], unit="s"),
        row("share of the time of writing it", ours=100 * found["share"], unit="%", target="<= 10 %"),
        row("verify, read and restore", ours=found["verify_read_and_restore_seconds"], unit="s"),
    ]
    save("checkpoint", rows, size="full" if options.full else "small")


if __name__ == "__main__":
    main()
