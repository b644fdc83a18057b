"""Counts the bytes that `dry_run=true` predicts memory from, and writes them to launch/footprint.json.

python -m benchmarks.footprint
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.counting import counts_of_ours, per_clip
from multitrain.config import ModelConfig

FILE = Path(__file__).resolve().parents[1] / "launch" / "footprint.json"
DATASETS = {"kinetics": 400, "mit": 305, "ssv2": 174}


def main() -> None:
    """Count and write; what the loader and a GPU can do is kept."""
    facts = json.loads(FILE.read_text(encoding="utf-8"))
    geometry = ModelConfig(**facts["geometry"])
    for mode in facts["bytes_per_clip"]:
        _, second = per_clip(lambda clips, mode=mode: counts_of_ours(geometry, DATASETS, mode, clips))
        facts["bytes_per_clip"][mode] = round(second.peak, -5)
    loader = json.loads((Path(__file__).parent / "results" / "loader.json").read_text(encoding="utf-8"))
    (made,) = [r["ours"] for r in loader["rows"] if r["figure"].startswith("clips per CPU-second")]
    facts["loader_clips_per_core"] = round(made, 1)
    FILE.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
