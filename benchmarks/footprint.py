"""Count the bytes from which `dry_run=true` estimates memory, and write them to launch/footprint.json.

python -m benchmarks.footprint

The published networks, 32×3 and 16×4, are counted; for each mode, two coefficients make the formula of launch/memory_estimate.py
reproduce the counts.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.counting import counts_of_ours, per_clip
from benchmarks.network import DATASETS
from launch.memory_estimate import sizes
from multitrain.config import ModelConfig

FILE = Path(__file__).resolve().parents[1] / "launch" / "footprint.json"
NETWORKS = ModelConfig(), ModelConfig(frames=16, depth=16, stages=(1, 3, 14))


def main() -> None:
    """Count and write; the measured speeds of loader and GPU in the file are kept."""
    facts = json.loads(FILE.read_text(encoding="utf-8"))
    facts["bytes"] = {mode: coefficients(mode) for mode in ("none", "mlp", "selective", "full")}
    loader = json.loads((Path(__file__).parent / "results" / "loader.json").read_text(encoding="utf-8"))
    (made,) = [r["ours"] for r in loader["rows"] if r["figure"].startswith("clips per CPU-second")]
    facts["loader_clips_per_core"] = round(made, 1)
    FILE.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(FILE.read_text(encoding="utf-8"))


def coefficients(mode: str) -> list[float]:
    """Bytes per element of the blocks' outputs, and of the largest block, for which the formula reproduces both counts."""
    known = [sizes(network) for network in NETWORKS]
    counted = [peak(network, mode) - size.inputs for network, size in zip(NETWORKS, known)]
    found = np.linalg.solve([[size.outputs, size.largest] for size in known], counted)
    return [round(float(x), 2) for x in found]


def peak(network: ModelConfig, mode: str) -> int:
    """Bytes alive at the peak of a training step, what a second clip adds, counted without data."""
    return per_clip(partial(counts_of_ours, network, DATASETS, mode))[1].peak


if __name__ == "__main__":
    main()
