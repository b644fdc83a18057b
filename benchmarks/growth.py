"""How cost grows: with frames and crop of a clip, with the number of datasets, ranks and videos.

python -m benchmarks.growth [--full]

Ranks are simulated: what each of 1 … 128 ranks computes about the order and its share of an update is computed here, for all
of them, and checked to be the update, no video missing or twice.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import footage
from benchmarks.measure import cpu_seconds
from benchmarks.results import plot, save
from launch.forecast import parameters
from multitrain.config import AugmentConfig, DatasetConfig, ModelConfig
from multitrain.data.augment import augment_clip
from multitrain.data.catalog import Catalog
from multitrain.data.decode import open_video
from multitrain.data.frames import training_window
from multitrain.data.random import Draws
from multitrain.order import Plan, Source, solve

Points = list[tuple[float, float]]


def clip_cost(frames: int, crop: int, clips: int) -> float:
    """CPU milliseconds of a clip, two copies a decode."""
    video, size = footage.made(1)[0], crop

    def make(number: int) -> None:
        with open_video(video) as opened:
            draws = Draws("growth", number)
            wanted = training_window(
                opened.frame_count, opened.fps, frames, sampling_rate=3, target_fps=30, uniform=draws.uniform()
            )
            decoded = opened.frames(wanted)
        for copy in range(2):
            augment_clip(decoded, AugmentConfig(), size, Draws("growth", number, copy), True)

    make(0)
    return statistics.mean(cpu_seconds(lambda n=n: make(n)) for n in range(clips)) / 2 * 1e3  # type: ignore[misc]


def order_cost(plan: Plan, updates: int) -> float:
    """CPU milliseconds of an update's tickets."""
    batch = plan.effective_batch

    def all_tickets() -> None:
        for update in range(1000, 1000 + updates):
            plan.tickets(update * batch, (update + 1) * batch)

    all_tickets()
    return statistics.median(cpu_seconds(all_tickets) for _ in range(5)) / updates * 1e3


def rank_cost(world: int, updates: int) -> float:
    """CPU milliseconds of one rank's share of the order of an update; checks that all shares make the update."""
    plan = Plan([Source("a", 900_000), Source("b", 300_000)], seed=0, effective_batch=512, group=2)
    shape = solve(512, nodes=1, gpus=world, group=2)

    def share(rank: int, update: int) -> np.ndarray:
        parts = [plan.tickets(*shape.slice(update, step, rank)) for step in range(shape.accumulation)]
        return np.concatenate(parts)

    whole = np.concatenate([share(rank, 7) for rank in range(world)])
    if not np.array_equal(whole, plan.tickets(7 * 512, 8 * 512)):
        raise AssertionError(f"the shares of {world} ranks are not the update")
    return statistics.median(
        cpu_seconds(lambda: [share(world - 1, update) for update in range(updates)]) for _ in range(5)
    ) / updates * 1e3  # fmt: skip


def index_cost(videos: int) -> tuple[float, float]:
    """CPU seconds to build the index of so many videos, and to open it again."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "a").mkdir()
        (folder / "a" / "00000000.mp4").touch()
        with open(folder / "train.csv", "w") as out:
            out.writelines(f"a/{n:08d}.mp4 {n % 400}\n" for n in range(videos))
        stamp = (folder / "train.csv").stat().st_mtime - 60
        os.utime(folder / "train.csv", (stamp, stamp))
        dataset = DatasetConfig(annotations=scratch, videos=scratch, classes=400)

        def open_it() -> Any:
            return Catalog.open(dataset, "a", "train", folder / "index")

        return cpu_seconds(open_it), cpu_seconds(open_it)


def line(values: list[int], cost: Callable[[int], float]) -> Points:
    """A point for each value."""
    return [(float(v), cost(v)) for v in values]


def main(arguments: list[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="more clips and updates, and ten million videos in the index"
    )
    given = parser.parse_args(arguments)
    clips, updates = (24, 200) if given.full else (6, 40)
    frames, crops = [8, 16, 32, 64], [160, 224, 312]
    names = "abcdefgh"

    def mixture(datasets: int) -> Plan:
        sources = [Source(n, 100_003 * (i + 1)) for i, n in enumerate(names[:datasets])]
        return Plan(sources, seed=0, effective_batch=512, group=2)

    sizes = [10**n for n in range(4, 8)]
    indexed = [(n, *index_cost(n)) for n in (sizes if given.full else sizes[:3])]
    model = ModelConfig()
    plots = [
        plot("Loader: cost of a clip by its frames (×3, 224 pixels)", "frames", "CPU ms a clip",
             {"two copies a decode, uint8": line(frames, lambda t: clip_cost(t, 224, clips))}),
        plot("Loader: cost of a clip by its crop (32×3)", "pixels", "CPU ms a clip",
             {"two copies a decode, uint8": line(crops, lambda s: clip_cost(32, s, clips))},
             note="The crop is resized last, so what is decoded and changed does not depend on it."),
        plot("Order: an update of 512 videos by the number of datasets", "datasets", "CPU ms per update",
             {"interleave": line(list(range(1, 9)), lambda n: order_cost(mixture(n), updates))}),
        plot("Model: parameters by the number of datasets of 400 classes", "datasets", "millions",
             {"with projections": line(list(range(1, 9)), lambda n: parameters(model, [400] * n) / 1e6),
              "without": line(list(range(1, 9)), lambda n: parameters(model.model_copy(update={"projections": False}), [400] * n) / 1e6)},
             note="Computed, not measured; a test holds the formula to the model. Projections grow with the square."),
        plot("Order: one rank's share of an update of 512 videos", "ranks (simulated)", "CPU ms per update and rank",
             {"ours": line([1, 2, 4, 8, 16, 32, 64, 128], lambda n: rank_cost(n, updates))}, log="x",
             note="Each rank computes its own micro-batches only; all shares together were checked to be the update."),
        plot("Order: an update of 512 videos by the number of videos", "videos", "CPU ms per update",
             {"ours": line(sizes, lambda n: order_cost(Plan([Source("a", n)], seed=0, effective_batch=512, group=2), updates))}, log="x"),
        plot("Index: by the number of videos", "videos", "CPU s",
             {"built once": [(float(n), b) for n, b, _ in indexed], "opened": [(float(n), o) for n, _, o in indexed]}, log="xy"),
    ]  # fmt: skip
    save("growth", [], size="full" if given.full else "small", plots=plots)


if __name__ == "__main__":
    main()
