"""Cost as a function of frames and crop of a clip, and of the number of datasets, ranks and videos.

python -m benchmarks.growth [--full]

Ranks are simulated: this process computes the order and the share of an update for each of 1 … 128 ranks, and checks that the shares
together are the update, without missing or repeated videos.
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
from benchmarks.counting import counts_of_ours
from benchmarks.measure import cpu_seconds, take_turns_apart
from benchmarks.network import DATASETS, loss_of, trained_outputs
from benchmarks.results import plot, save
from launch.memory_estimate import parameters
from multitrain.config import AugmentConfig, DatasetConfig, ModelConfig
from multitrain.data.augment import Augmenter
from multitrain.data.catalog import Catalog
from multitrain.data.decode import open_video
from multitrain.data.frames import training_window
from multitrain.data.pool import configure_worker
from multitrain.data.random import KeyedRNG
from multitrain.model import MultiTrain
from multitrain.order import Plan, Source, solve

Points = list[tuple[float, float]]

FRAMES, CROP = 32, 224
"""Size of a clip while the other is varied."""


def clip_cost(frames: int, crop: int, clips: int) -> float:
    """CPU milliseconds per clip, with two copies per decode, in a process set up as a loader worker."""
    video, size = footage.made(1)[0], crop
    out = np.zeros((2, frames, crop, crop, 3), np.uint8)
    configure_worker()

    def make(number: int) -> None:
        with open_video(video) as opened:
            draws = KeyedRNG("growth", number)
            wanted = training_window(
                opened.frame_count, opened.fps, frames, sampling_rate=3, target_fps=30, uniform=draws.uniform()
            )
            decoded = opened.frames(wanted)
        for copy in range(2):
            draws = KeyedRNG("growth", number, copy)
            augmenter = Augmenter(*decoded.shape[1:3], AugmentConfig(), size, draws, True)
            for frame, target in zip(decoded, out[copy]):
                augmenter(frame, target)

    make(0)
    return statistics.mean(cpu_seconds(lambda n=n: make(n)) for n in range(clips)) / 2 * 1e3  # type: ignore[misc]


class ModelTime:
    """CPU seconds of the network at a size, reduced to one block per stage (4 blocks instead of 24) at full width."""

    def __init__(self, frames: int, crop: int) -> None:
        import torch

        torch.set_num_threads(1)
        config = ModelConfig(frames=frames, crop=crop, depth=4, stages=(1, 2, 3))
        self._model = MultiTrain(config, DATASETS)
        self._clip = torch.randn(1, 3, frames, crop, crop, generator=torch.Generator().manual_seed(0))
        self._key = torch.tensor([0])

    def inference(self, _: int) -> None:
        """Scores of a clip."""
        import torch

        with torch.no_grad():
            self._model.eval().outputs(self._clip)

    def training(self, _: int) -> None:
        """Forward and backward pass of a clip."""
        loss_of(trained_outputs(self._model.train(), self._clip, self._key)).backward()
        self._model.zero_grad()


def model_times(frames: list[int], crops: list[int], rounds: int) -> tuple[dict[str, Points], dict[str, Points]]:
    """CPU seconds of a training step and of inference by frames and by crop: the minimum of `rounds`, in separate processes.

    Separate, because networks share tables by shape, and those of a measured network differ from those of a counted one.
    """

    def both(size: tuple[int, int]) -> tuple[float, float]:
        made = ModelTime(*size)
        steps = {"training": (made.training, None), "inference": (made.inference, None)}
        took = take_turns_apart(steps, rounds, warm_up=0)
        return min(took["training"]), min(took["inference"])

    sizes = [(t, CROP) for t in frames] + [(FRAMES, s) for s in crops]
    found = {size: both(size) for size in dict.fromkeys(sizes)}
    names = ("training step", "inference")
    by_frames = {n: [(float(t), found[t, CROP][i]) for t in frames] for i, n in enumerate(names)}
    by_crop = {n: [(float(s), found[FRAMES, s][i]) for s in crops] for i, n in enumerate(names)}
    return by_frames, by_crop


def saved_memory(frames: list[int], crops: list[int], mode: str) -> tuple[Points, Points]:
    """Counted gigabytes of activations that a clip adds to a training step of the complete network, by frames and by crop.

    The constant part of a step, the weights in bf16, is subtracted.
    """

    def saved(size: tuple[int, int], clips: int) -> int:
        return counts_of_ours(ModelConfig(frames=size[0], crop=size[1]), DATASETS, mode, clips).saved

    sizes = dict.fromkeys([(t, CROP) for t in frames] + [(FRAMES, s) for s in crops])
    one = {size: saved(size, 1) for size in sizes}
    fixed = 2 * one[frames[0], CROP] - saved((frames[0], CROP), 2)
    clip = {size: (value - fixed) / 1e9 for size, value in one.items()}
    return [(float(t), clip[t, CROP]) for t in frames], [(float(s), clip[FRAMES, s]) for s in crops]


def order_cost(plan: Plan, updates: int) -> float:
    """CPU milliseconds to compute the samples of an update."""
    batch = plan.effective_batch

    def all_tickets() -> None:
        for update in range(1000, 1000 + updates):
            plan.samples(update * batch, (update + 1) * batch)

    all_tickets()
    return statistics.median(cpu_seconds(all_tickets) for _ in range(5)) / updates * 1e3


def rank_cost(world: int, updates: int) -> float:
    """CPU milliseconds to compute one rank's share of an update; checks that all shares together are the update."""
    plan = Plan([Source("a", 900_000), Source("b", 300_000)], seed=0, effective_batch=512, group=2)
    shape = solve(512, nodes=1, gpus=world, group=2)

    def share(rank: int, update: int) -> np.ndarray:
        parts = [plan.samples(*shape.slice(update, step, rank)) for step in range(shape.accumulation)]
        return np.concatenate(parts)

    whole = np.concatenate([share(rank, 7) for rank in range(world)])
    if not np.array_equal(whole, plan.samples(7 * 512, 8 * 512)):
        raise AssertionError(f"the shares of {world} ranks are not the update")
    return statistics.median(
        cpu_seconds(lambda: [share(world - 1, update) for update in range(updates)]) for _ in range(5)
    ) / updates * 1e3  # fmt: skip


def index_cost(videos: int) -> tuple[float, float]:
    """CPU seconds to build the index of this many videos, and to open it."""
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
    time_by_frames, time_by_crop = model_times(frames, crops, 3 if given.full else 1)
    memory = {mode: saved_memory(frames, crops, mode) for mode in ("none", "selective")}
    names = "abcdefgh"

    def mixture(datasets: int) -> Plan:
        sources = [Source(n, 100_003 * (i + 1)) for i, n in enumerate(names[:datasets])]
        return Plan(sources, seed=0, effective_batch=512, group=2)

    sizes = [10**n for n in range(4, 8)]
    ensure_index = [(n, *index_cost(n)) for n in (sizes if given.full else sizes[:3])]
    model = ModelConfig()
    plots = [
        plot("Loader: cost of a clip by its frames (×3, 224 pixels)", "frames", "CPU ms a clip",
             {"two copies a decode, uint8": line(frames, lambda t: clip_cost(t, 224, clips))}),
        plot("Loader: cost of a clip by its crop (32×3)", "pixels", "CPU ms a clip",
             {"two copies a decode, uint8": line(crops, lambda s: clip_cost(32, s, clips))},
             note="The crop is resized last, so what is decoded and changed does not depend on it."),
        plot("Model: time of a clip by its frames (224 pixels)", "frames", "CPU s", time_by_frames,
             note="Own width, one block a stage (4 blocks of 24), fp32, one thread. Attention looks from every frame at every frame."),
        plot("Model: time of a clip by its crop (32 frames)", "pixels", "CPU s", time_by_crop,
             note="The same."),
        plot("Model: saved activations of a clip by its frames (224 pixels)", "frames", "GB",
             {f"activation_checkpointing={mode}": m[0] for mode, m in memory.items()},
             note="Counted with stand-ins for tensors, as `benchmarks.memory` counts: the whole network, bf16, CUDA's routes."),
        plot("Model: saved activations of a clip by its crop (32 frames)", "pixels", "GB",
             {f"activation_checkpointing={mode}": m[1] for mode, m in memory.items()}),
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
             {"built once": [(float(n), b) for n, b, _ in ensure_index], "opened": [(float(n), o) for n, _, o in ensure_index]}, log="xy"),
    ]  # fmt: skip
    save("growth", [], size="full" if given.full else "small", plots=plots)


if __name__ == "__main__":
    main()
