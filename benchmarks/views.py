"""Multi-view test: all views of a video from one decode, against one decode a view as published.

python -m benchmarks.views [--full] [--videos DIR]

Each side works in a process of its own, as its workers do. Ours is the job of the evaluator's workers, whole: views go into
the slot that they are handed over in, float32 and normalised, as the evaluator takes them. With `segment` sampling the
published code fetches only the frames it keeps, else the whole window of every view.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch

from benchmarks import footage
from benchmarks.baseline import loader as baseline
from benchmarks.measure import take_turns_apart
from benchmarks.results import row, save
from multitrain.config import ModelConfig, RunConfig, validate
from multitrain.config.arguments import whole_number
from multitrain.data.catalog import Catalog
from multitrain.data.clips import EvalViewsFn
from multitrain.data.decode import open_video
from multitrain.data.frames import view_indices
from multitrain.data.pool import configure_worker
from multitrain.data.spatial import STD

MODEL = ModelConfig(frames=32, crop=224)
RATE = 3
NAME = "videos"


@dataclass(frozen=True)
class Protocol:
    """How a dataset is tested."""

    spatial: int
    temporal: int
    sampling: Literal["stride", "segment"]
    name: str
    target: str
    short: bool = False
    """Made videos are 4 s of 12 frames a second and 240 lines, as SSv2's are, instead of 10 s, 30 and 320."""


PROTOCOLS = (
    Protocol(1, 5, "stride", "1×5 (K400)", ">= 7×"),
    Protocol(3, 2, "stride", "3×2 (MiT)", ">= 14×"),
    Protocol(3, 1, "stride", "3×1 (sampled as K400)", ">= 9×"),
    Protocol(3, 1, "segment", "3×1 (SSv2: only the frames kept are fetched)", "", short=True),
)


class Bench:
    """The videos of a folder under one protocol."""

    def __init__(self, videos: list[Path], protocol: Protocol, folder: Path) -> None:
        self.videos, self.protocol = videos, protocol
        folder.mkdir()
        (folder / "test.csv").write_text("".join(f"{p.resolve()} 0\n" for p in videos))
        self._folder = folder
        self.dataset = self._config("pyav").data.datasets[NAME]
        self._catalog = Catalog.open(self.dataset, NAME, "test", folder / "index")
        self._jobs = {d: EvalViewsFn(self._catalog, self.dataset, self._config(d)) for d in ("pyav", "decord")}
        self._slot = np.zeros(self._jobs["pyav"].shape, np.float32)  # as in the pool, where slots are used again

    def _config(self, decoder: str) -> RunConfig:
        p = self.protocol
        dataset = {"annotations": str(self._folder), "videos": "/", "classes": 1, "sampling": p.sampling}
        views = {"temporal_views": p.temporal, "spatial_views": p.spatial}
        return validate(
            {
                "data": {"datasets": {NAME: dataset | views}, "decoder": decoder, "sampling_rate": RATE},
                "model": {"frames": MODEL.frames, "crop": MODEL.crop},
                **{g: {} for g in ("augment", "cluster", "loss", "optim", "engine", "eval", "checkpoint", "monitor")},
            }
        )

    def ours(self, decoder: str, number: int) -> np.ndarray:
        """All views of a video, by the worker's job."""
        reason = self._jobs[decoder].run(number % len(self.videos), self._slot)
        if reason:
            raise SystemExit(f"{self.videos[number % len(self.videos)]}: {reason}")
        return self._slot

    def decoded(self, number: int) -> None:
        """Only the frames that ours needs, decoded and converted, and nothing done with them."""
        with open_video(self.videos[number % len(self.videos)]) as video:
            data = self._jobs["pyav"].config.data
            shown = view_indices(self.dataset, data, video.frame_count, video.fps, MODEL.frames)
            for _ in video.each(shown.ravel()):
                pass

    def published(self, number: int) -> torch.Tensor:
        """The same views by the baseline."""
        p, path = self.protocol, self.videos[number % len(self.videos)]
        return baseline.views(path, MODEL.frames, RATE, MODEL.crop, p.temporal, p.spatial, sampling=p.sampling)


def main(arguments: list[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.views", description=__doc__)
    parser.add_argument("--full", action="store_true", help="8 videos instead of 3")
    parser.add_argument("--videos", metavar="DIR", help="measure on these files instead of made ones")
    parser.add_argument("--count", type=whole_number, help="how many videos")
    given = parser.parse_args(arguments)
    if importlib.util.find_spec("decord") is None:
        raise SystemExit("the baseline reads videos with decord: pip install 'multitrain[decord]' (x86-64 only)")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    count = given.count or (8 if given.full else 3)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, protocol in enumerate(PROTOCOLS):
            if given.videos:
                videos = footage.real(given.videos, count)
            else:
                videos = footage.made(count, (426, 240), 48, rate=12) if protocol.short else footage.made(count)
            rows += measured(Bench(videos, protocol, Path(folder, str(number))), len(videos))
    if given.videos:
        rows[0]["note"] = f"{footage.described(videos)}; {rows[0]['note']}"
        save("views-videos", rows, typed="python -m benchmarks.views --videos DIR")
    else:
        save("views", rows, size="full" if given.full else "small")


def measured(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """The rows of one protocol."""
    variants: dict[str, tuple[Callable[[int], Any], Callable[[], None] | None]] = {
        "published": (bench.published, None),
        "decord": (partial(bench.ours, "decord"), configure_worker),
        "pyav": (partial(bench.ours, "pyav"), configure_worker),
        "decoding": (bench.decoded, configure_worker),
    }
    found = {n: statistics.mean(t) * 1e3 for n, t in take_turns_apart(variants, rounds).items()}
    difference = float(np.abs(bench.ours("decord", 0) - bench.published(0).numpy()).mean()) * STD * 255
    protocol = bench.protocol
    share = found["decoding"] / found["pyav"]
    note = (
        f"mean difference {difference:.2g} grey levels; {share:.0%} of ours with PyAV is decoding and colour conversion"
    )
    return [
        row(
            f"all views of a video, {protocol.name}, {decoder}",
            ours=found[decoder],
            baseline=found["published"],
            unit="CPU ms",
            target=protocol.target if decoder == "pyav" else "",
            note=note if decoder == "pyav" else "",
        )
        for decoder in ("pyav", "decord")
    ]


if __name__ == "__main__":
    main()
