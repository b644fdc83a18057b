"""Multi-view test: all views of a video from one decode, against one decode a view as published.

python -m benchmarks.views [--full] [--videos DIR]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks import footage
from benchmarks.baseline import loader as baseline
from benchmarks.measure import take_turns
from benchmarks.results import row, save
from multitrain.config import DataConfig, DatasetConfig, ModelConfig
from multitrain.data.views import load_views

MODEL = ModelConfig(frames=32, crop=224)
PROTOCOLS = {(1, 5): (">= 7×", "K400"), (3, 2): (">= 14×", "MiT"), (3, 1): (">= 9×", "SSv2")}
"""Spatial × temporal views, what has to be reached, and the dataset tested so."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.views", description=__doc__)
    parser.add_argument("--full", action="store_true", help="8 videos instead of 3")
    parser.add_argument("--videos", metavar="DIR", help="measure on these files instead of made ones")
    given = parser.parse_args(arguments)
    if importlib.util.find_spec("decord") is None:
        raise SystemExit("the baseline reads videos with decord: pip install 'multitrain[decord]' (x86-64 only)")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    videos = footage.real(given.videos) if given.videos else footage.made(8 if given.full else 3)
    rows = []
    for (spatial, temporal), (target, name) in PROTOCOLS.items():
        dataset = DatasetConfig(annotations="", videos="", classes=2, temporal_views=temporal, spatial_views=spatial)

        def ours(number: int, decoder: str, dataset: DatasetConfig = dataset) -> np.ndarray:
            data = DataConfig(datasets={"k": dataset}, decoder=decoder)
            return load_views(videos[number % len(videos)], dataset, data, MODEL)

        def plain(number: int, temporal: int = temporal, spatial: int = spatial) -> torch.Tensor:
            return baseline.views(videos[number % len(videos)], 32, 3, 224, temporal, spatial)

        variants = {
            "published": plain,
            "decord": lambda number, ours=ours: ours(number, "decord"),
            "pyav": lambda number, ours=ours: ours(number, "pyav"),
        }
        found = {n: statistics.mean(t) * 1e3 for n, t in take_turns(variants, len(videos)).items()}
        difference = float(np.abs(ours(0, "decord") - plain(0).numpy()).mean()) * 0.225 * 255
        note = f"float32 out on both sides; mean difference {difference:.2g} grey levels on {_name(videos[0])}"
        for decoder in ("pyav", "decord"):
            rows.append(
                row(
                    f"all views of a video, {spatial}×{temporal} ({name}), {decoder}",
                    ours=found[decoder],
                    baseline=found["published"],
                    unit="CPU ms",
                    target=target if decoder == "pyav" else "",
                    note=note if decoder == "pyav" else "",
                )
            )
    save("views", rows, size="full" if given.full else "small")


def _name(path: Path) -> str:
    return path.name if path.parent != footage.CACHE else "made footage"


if __name__ == "__main__":
    main()
