"""Training clips: two augmented copies of 32×3 from 320p files, compared with whole-frame Pillow and float32 as published.

python -m benchmarks.loader [--full] [--videos DIR]

Ours is the complete function of a loader worker. Each side runs in a separate process, set up like its loader workers. Both get the
same random numbers: window, operations, crop, flip, erased box.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks import footage
from benchmarks.baseline import loader as baseline
from benchmarks.measure import take_turns_apart
from benchmarks.results import row, save
from multitrain.config import RunConfig, validate
from multitrain.config.arguments import whole_number
from multitrain.data import mix
from multitrain.data.augment import draw_augmentation
from multitrain.data.bench import measure
from multitrain.data.catalog import open_catalogs, sources
from multitrain.data.clips import Task, TrainClipFn
from multitrain.data.decode import open_video
from multitrain.data.pool import configure_worker
from multitrain.data.random import KeyedRNG
from multitrain.order import Plan

FRAMES, RATE, CROP, COPIES = 32, 3, 224, 2
DEVICE = "Normalising and erasing are left to the device; the baseline's are in its time."
NAME = "clips"


class Bench:
    """One dataset of the given videos, with both ways to make its training clips."""

    def __init__(self, videos: list[Path], folder: Path) -> None:
        self.videos = videos
        (folder / "train.csv").write_text("".join(f"{p.resolve()} 0\n" for p in videos))
        self._folder = folder
        config = self.config("pyav")
        self._catalogs = open_catalogs(config.data, "train", folder / "index")
        self._plan = Plan(sources(config.data, self._catalogs), seed=0, effective_batch=2, group=2)
        self._sizes = []
        for path in videos:
            with open_video(path) as video:
                self._sizes.append(video.frames([0]).shape[1:3])
        self.jobs = {(d, "opencv"): self._job(d, "opencv") for d in footage.decoders()}
        self.jobs["pyav", "pil"] = self._job("pyav", "pil")
        self._slot = np.zeros(self.jobs["pyav", "pil"].shape, np.uint8)  # as in the pool, where slots are used again

    def config(self, decoder: str, backend: str = "opencv") -> RunConfig:
        dataset = {"annotations": str(self._folder), "videos": "/", "classes": 1}
        return validate(
            {
                "data": {"datasets": {NAME: dataset}, "decoder": decoder, "sampling_rate": RATE},
                "model": {"frames": FRAMES, "crop": CROP},
                "augment": {"backend": backend, "copies": COPIES},
                **{group: {} for group in ("cluster", "loss", "optim", "engine", "eval", "checkpoint", "monitor")},
            }
        )

    def _job(self, decoder: str, backend: str) -> TrainClipFn:
        return TrainClipFn(self._catalogs, self._plan, self.config(decoder, backend))

    def ours(self, decoder: str, backend: str, device: bool, number: int) -> Any:
        """The copies of one video; with `device`, including the device's part: float32, normalised, erased."""
        job = self.jobs[decoder, backend]
        sample = self._plan.samples(number, number + 1)[0]
        made = job.run(Task(0, sample), self._slot)
        if not device:
            return self._slot
        clips = mix.normalise(torch.from_numpy(self._slot))
        mix.erase(clips, torch.from_numpy(made.boxes), torch.from_numpy(made.keys))
        return clips

    def samples(self, start: int, stop: int) -> Any:
        """The videos of these samples."""
        return self._plan.samples(start, stop)

    def published(self, number: int) -> Any:
        """The same clips by the baseline."""
        sample = self._plan.samples(number, number + 1)[0]
        index, config = int(sample["index"]), self.jobs["pyav", "opencv"].config
        identity = (config.seed, NAME, index, int(sample["pass"]))
        drawn = [
            draw_augmentation(*self._sizes[index], config.augment, CROP, KeyedRNG("augment", *identity, copy), True)
            for copy in range(COPIES)
        ]
        start = KeyedRNG("window", *identity).uniform()
        return torch.stack(baseline.training_clips(self.videos[index], FRAMES, RATE, start, drawn, CROP))


def main(arguments: list[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--full", action="store_true", help="48 clips instead of 16")
    parser.add_argument("--videos", metavar="DIR", help="measure on these files instead of made ones")
    parser.add_argument("--clips", type=whole_number, help="how many clips")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    rounds = given.clips or (48 if given.full else 16)
    videos = footage.real(given.videos, rounds) if given.videos else footage.made(8 if given.full else 4)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(videos, Path(folder))
        variants: dict[str, tuple[Callable[[int], Any], Callable[[], None] | None]] = {}
        if ("decord", "opencv") in bench.jobs:
            variants["published"] = bench.published, None
        for decoder, backend in bench.jobs:
            for device in (True, False):
                name = f"{decoder} {backend} {'float32' if device else 'uint8'}"
                variants[name] = partial(bench.ours, decoder, backend, device), configure_worker
        found = {name: statistics.mean(times) * 1e3 for name, times in take_turns_apart(variants, rounds).items()}
        cost = measure(bench.jobs["pyav", "opencv"], [Task(0, t) for t in bench.samples(0, rounds)])
    plain = found.get("published")
    shown = footage.described(videos) if given.videos else "made 320p footage"
    where = f"{rounds} clips of {shown}; 32×3, 224 pixels, 2 copies; both sides with the same draws"
    rows = [
        row(
            "two copies of a video, float32 out, decord",
            ours=found.get("decord opencv float32"),
            baseline=plain,
            unit="CPU ms",
            target=">= 4.1×",
            aim=">= 6×",
            note=where,
        ),
        row(
            "two copies of a video, float32 out, PyAV",
            ours=found["pyav opencv float32"],
            baseline=plain,
            unit="CPU ms",
            target=">= 4.1×",
            aim=">= 6×",
        ),
        row(
            "two copies of a video, uint8 out, decord",
            ours=found.get("decord opencv uint8"),
            baseline=plain,
            unit="CPU ms",
            target=">= 5×",
            aim=">= 6×",
            note=DEVICE,
        ),
        row(
            "two copies of a video, uint8 out, PyAV (the default)",
            ours=found["pyav opencv uint8"],
            baseline=plain,
            unit="CPU ms",
            target=">= 5×",
            aim=">= 6×",
            note=DEVICE,
        ),
        row(
            "two copies of a video, Pillow's operations, uint8 out",
            ours=found["pyav pil uint8"],
            baseline=plain,
            unit="CPU ms",
            note="The oracle, bit-exact with the published operations.",
        ),
        row(
            "clips per CPU-second, PyAV, uint8 out",
            ours=cost.clips_per_second,
            baseline=None if plain is None else COPIES / plain * 1e3,
            ratio=None if plain is None else cost.clips_per_second * plain / COPIES / 1e3,
            unit="clips/s",
        ),
        row(
            "cores that a GPU of 30 clips a second needs",
            ours=cost.cores(30.0),
            baseline=None if plain is None else 30.0 * plain / COPIES / 1e3,
            unit="cores",
        ),
    ]
    parts = {
        "decode": cost.decode,
        "RandAugment": cost.randaugment,
        "crop": cost.crop,
        "copy": cost.copy,
        "other": cost.other,
    }
    rows += [row(f"of the default's time: {n}", ours=ms, unit="CPU ms") for n, ms in parts.items()]
    rows = [r for r in rows if r["ours"] is not None]
    if given.videos:
        save("loader-videos", rows, typed="python -m benchmarks.loader --videos DIR")
    else:
        save("loader", rows, size="full" if given.full else "small")


if __name__ == "__main__":
    main()
