"""``multitrain data bench``: CPU cost of training clips on this machine, by stage, and the number of cores per GPU.

Measures the work of a loader worker on the first videos of the run. Times are CPU seconds of one worker.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from multitrain.config import ConfigError, RunConfig, compose, load
from multitrain.config.arguments import Arguments, Parser, whole_number
from multitrain.data import augment
from multitrain.data.catalog import open_catalogs, plan_of
from multitrain.data.clips import Clip, Task, TrainClipFn, UnreadableError
from multitrain.data.pool import configure_worker

GPU_CLIPS_PER_SECOND = 30.0
"""Default clips per second and GPU: about the estimate for an A100 at 32×3."""


@dataclass(frozen=True)
class Cost:
    """CPU milliseconds per video, for all its copies.

    `total` is the complete work of a worker. A second pass over the same videos times the four stages; `other` is the
    rest: random draws, and the thread with the decoder's time limit.
    """

    videos: int
    unreadable: int
    """Unreadable videos, which are not measured; a run replaces them by fallback videos."""
    copies: int
    total: float
    decode: float
    randaugment: float
    crop: float
    copy: float

    @property
    def other(self) -> float:
        """Time outside the four stages; negative if the second pass was slower."""
        return self.total - self.decode - self.randaugment - self.crop - self.copy

    @property
    def clips_per_second(self) -> float:
        """Clips per second of one core."""
        return self.copies / self.total * 1e3

    def cores(self, clips_per_second: float) -> float:
        """Number of cores that a GPU needs for `clips_per_second`."""
        return clips_per_second / self.clips_per_second


class _Clock:
    """CPU seconds of this process, by stage."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._last = 0.0

    def start(self) -> None:
        self._last = time.process_time()

    def stop(self, stage: str) -> None:
        now = time.process_time()
        self.spent[stage] = self.spent.get(stage, 0.0) + now - self._last
        self._last = now


def measure(job: TrainClipFn, tasks: Sequence[Task]) -> Cost:
    """Measure the cost of the clips of `tasks`, after one warm-up run of the first task.

    Raises:
        UnreadableError: no video of the tasks, and none of their fallbacks, can be read.
    """
    configure_worker()
    out = np.empty(job.shape, job.dtype)
    job.run(tasks[0], out)
    clock, videos = _Clock(), 0
    for task in tasks:
        clock.start()
        made = job.run(task, out)
        if made.skipped:
            continue
        clock.stop("total")
        videos += 1
        _stages(job, task, out, clock)
    if not videos:
        raise UnreadableError("none of the videos can be read; multitrain data check says what is wrong with them")
    each = {stage: spent / videos * 1e3 for stage, spent in clock.spent.items()}
    return Cost(videos=videos, unreadable=len(tasks) - videos, copies=len(out), **each)


def _stages(job: TrainClipFn, task: Task, out: np.ndarray, clock: _Clock) -> None:
    """Time the stages of one task separately, frame by frame as in the worker."""
    config, sample = job.config, task.sample
    name = job.plan.sources[int(sample["dataset"])].name
    dataset = config.data.datasets[name]
    identity = (config.seed, name, int(sample["index"]), int(sample["pass"]))
    clip = Clip(dataset, identity, config.model.frames)
    made: list[augment.Augmenter] = []
    size, backend = config.model.crop, config.augment.backend
    clock.start()
    for frame, places in job.decoded(job.catalogs[name].path(int(sample["index"])), clip):
        clock.stop("decode")
        made = made or [job.augmenter(frame.shape[0], frame.shape[1], clip, copy) for copy in range(len(out))]
        clock.start()
        for augmenter, target in zip(made, out):
            changed = augmenter.change(frame)
            clock.stop("randaugment")
            image = augment.resized(changed, size, backend)
            clock.stop("crop")
            augment.place(image, target[places[0]], augmenter.drawn.flip)
            target[places[1:]] = target[places[0]]
            clock.stop("copy")
    clock.stop("decode")


def main(arguments: Arguments) -> int:
    """The command; returns the exit status."""
    parser = Parser(
        "data bench",
        "CPU cost of training clips on this machine: clips per CPU-second, time by stage, cores per GPU.",
        "multitrain data bench experiment=ssv2 data.root=/shared/datasets --videos 100",
        "multitrain data bench --run runs/my_run --gpu 45",
    )
    parser.add_argument("--run", type=Path, metavar="RUN", help="take the configuration of this run")
    parser.add_argument("--videos", type=whole_number, default=32, help="how many videos to measure on (32)")
    parser.add_argument(
        "--gpu",
        type=float,
        help=f"clips that a GPU trains on per second (cluster.gpu_clips; default {GPU_CLIPS_PER_SECOND:g})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_overrides("data.decoder=decord")
    given = parser.parse_with_overrides(arguments)
    if given.gpu is not None and not 0 < given.gpu < math.inf:
        parser.error(f"--gpu {given.gpu:g}: give a finite number of clips per second above 0")
    if given.run is not None and given.overrides:
        parser.error("a run's configuration is what it is: give --run or KEY=VALUE")
    config = load(given.run) if given.run is not None else compose(given.overrides, config_dirs=given.config_dir)
    try:
        cost = measure_run(config, given.videos)
    except UnreadableError as error:
        raise ConfigError(str(error)) from error
    gpu = given.gpu or config.cluster.gpu_clips or GPU_CLIPS_PER_SECOND
    if given.json:
        more = {"clips_per_second": cost.clips_per_second, "gpu_clips": gpu, "cores_per_gpu": cost.cores(gpu)}
        print(json.dumps(asdict(cost) | {"other": cost.other} | more))
    else:
        print(table(cost, config, gpu, estimated=not (given.gpu or config.cluster.gpu_clips)))
    return 0


def measure_run(config: RunConfig, videos: int) -> Cost:
    """Measure the clips of the first `videos` samples of a run. Raises CatalogError, UnreadableError."""
    with tempfile.TemporaryDirectory() as scratch:
        catalogs = open_catalogs(config.data, "train", Path(config.data.index or scratch))
        plan = plan_of(config, catalogs)
        job = TrainClipFn(catalogs, plan, config)
        job.warm_up()
        return measure(job, [Task(0, sample) for sample in plan.samples(0, videos)])


def table(cost: Cost, config: RunConfig, gpu: float, *, estimated: bool) -> str:
    """The cost as text; `gpu` is the clips per second of a GPU, `estimated` whether that is an estimate."""
    shape = f"{config.model.frames}×{config.data.sampling_rate}, {config.model.crop} pixels"
    lines = [
        f"{cost.clips_per_second:.1f} clips per CPU-second ({shape}, {cost.copies} copies per video, "
        f"{config.data.decoder}, {config.augment.backend}; {cost.videos} videos)",
        "",
    ]
    if cost.unreadable:
        lines[1:1] = [
            f"videos that cannot be read: {cost.unreadable}; multitrain data check says what is wrong with them"
        ]
    parts = {"decode": cost.decode, "RandAugment": cost.randaugment, "crop": cost.crop, "copy": cost.copy}
    for name, ms in (parts | {"other": cost.other, "per video": cost.total}).items():
        lines.append(f"  {name:<12} {ms:8.1f} ms  {ms / cost.total:5.0%}")
    wanted, asked = cost.cores(gpu), config.cluster.cpus_per_gpu
    said = f"{gpu:g} clips per second" + (" (an estimate; set --gpu or cluster.gpu_clips)" if estimated else "")
    lines += ["", f"a GPU that trains on {said} needs {wanted:.1f} cores; cluster.cpus_per_gpu={asked}"]
    if wanted > asked:
        lines[-1] += f" is too few: use {math.ceil(wanted)}, or videos that decode faster (multitrain data resize)"
    return "\n".join(lines)
