"""Counted bytes and kernels of a training step of the model: python -m benchmarks.memory [--full]

Needs no data and measures no time, see benchmarks/counting.py. Both sizes are the same, 32×3 at 224²; it takes half a minute.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from benchmarks.counting import counts_of_baseline, counts_of_ours, per_clip
from benchmarks.network import DATASETS
from benchmarks.results import row, save
from multitrain.config import ModelConfig

NOTE = "32 frames of 224², bf16, CUDA's autocast policy and routes, fake tensors"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the same")
    full = parser.parse_args(arguments).full
    config = ModelConfig()
    plain, plain_slope = per_clip(partial(counts_of_baseline, config, DATASETS))
    rows: list[dict[str, Any]] = []
    for mode in ("none", "mlp", "selective", "full"):
        one, slope = per_clip(partial(counts_of_ours, config, DATASETS, mode))
        saved = {"none": ("<= 1.05 GB", "0.66 GB"), "mlp": ("", "0.66 GB")}.get(mode, ("", ""))
        peak = ("<= 0.30 GB", "") if mode == "selective" else ("", "")
        values = [
            ("saved activations a clip", slope.saved / 1e9, plain_slope.saved / 1e9, "GB", *saved, "a second clip's"),
            ("peak a clip", slope.peak / 1e9, plain_slope.peak / 1e9, "GB", *peak, "a second clip's"),
        ]
        if mode == "none":
            values += [
                (
                    "bytes moved by all kernels of a step",
                    one.moved / 1e9,
                    plain.moved / 1e9,
                    "GB",
                    ">= 2.2×",
                    "3×",
                    "batch 1",
                ),
                (
                    "the same, a second clip's",
                    slope.moved / 1e9,
                    plain_slope.moved / 1e9,
                    "GB",
                    "",
                    "",
                    "without weights",
                ),
                ("kernels of a step", one.kernels, plain.kernels, "", "<= 3158", "1579", "batch 1, no optimizer"),
                ("kernels of a forward pass", one.forward_kernels, plain.forward_kernels, "", "", "", "batch 1"),
            ]
        for figure, ours, theirs, unit, target, aim, how in values:
            name = f"{figure}, activation_checkpointing={mode}"
            rows.append(row(name, ours=ours, baseline=theirs, unit=unit, target=target, aim=aim, note=f"{how}; {NOTE}"))
    save("memory", rows, size="full" if full else "small")
    return 0


if __name__ == "__main__":
    sys.exit(main())
