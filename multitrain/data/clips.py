"""Work functions of the loader's workers: from a sample to training clips, from a test video to its views. No torch.

Both are pure functions: the same task gives the same result in any process, at any time, if the same files can be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from multitrain.config import DataConfig, DatasetConfig, RunConfig
from multitrain.data import remote
from multitrain.data.augment import Augmenter
from multitrain.data.call_timeout import CallTimeout, TimeoutRunner, WriteLease
from multitrain.data.catalog import Catalog
from multitrain.data.corruptions import Corruption
from multitrain.data.decode import Frame, Picture, VideoError, open_video, preload
from multitrain.data.frames import training_indices
from multitrain.data.packs import stage_trouble, use_stage
from multitrain.data.random import KeyedRNG
from multitrain.data.views import load_views, views_shape
from multitrain.order import Plan, key

MAX_FALLBACKS = 8
"""Number of videos that replace an unreadable one, in turn, before the run fails."""

_GUARD_MARGIN_SECONDS = 1.0  # seconds added to the decoder's own time limit
_RETRY_DELAY_SECONDS = 0.5  # seconds before another try after an OS error


AUGMENT_BATCH_BYTES = 32 << 20
"""Bytes of decoded frames that are augmented together. A clip of usual size is decoded completely, then augmented, which uses
the CPU's caches well; frames of 4K and more are augmented one by one, tile by tile."""


class UnreadableError(RuntimeError):
    """A video and all its fallbacks cannot be read."""


@dataclass(frozen=True)
class Task:
    """One video of one update."""

    update: int
    sample: np.void
    """`multitrain.order.SAMPLE_DTYPE`."""


@dataclass
class Clips:
    """The augmented copies of one video, without their pixels, which are in the task's slot of the shared memory."""

    dataset: int
    labels: tuple[int, ...]
    boxes: np.ndarray
    """Boxes to erase on the device, int32 [copies, 4]: top, left, height, width; zeros for none."""
    keys: np.ndarray
    """int64 [copies]."""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Records of unreadable videos: dataset, path, reason, update, stand_in (path of the fallback video)."""
    seconds: float = 0.0
    trouble: str = ""
    """Why the worker does not read the node's copies of shards, if it met an error; see `multitrain.data.staged`."""


class Clip:
    """The random values that all copies of a training clip share: a function of its identity.

    identity: seed, dataset, index and epoch of the sample, also when a fallback video replaces the sample's.
    uniforms: draws in [0, 1), one per frame.
    """

    def __init__(self, dataset: DatasetConfig, identity: tuple[int | str, ...], frames: int) -> None:
        self.dataset, self.identity = dataset, identity
        draws = KeyedRNG("window", *identity)
        self.uniforms = [draws.uniform() for _ in range(frames)]


class TrainClipFn:
    """Makes the augmented copies of a sample's video: uint8 [copies, T, S, S, 3]."""

    def __init__(self, catalogs: Mapping[str, Catalog], plan: Plan, config: RunConfig) -> None:
        self.catalogs, self.plan, self.config = dict(catalogs), plan, config
        self.shape: tuple[int, ...] = (
            config.augment.copies,
            config.model.frames,
            config.model.crop,
            config.model.crop,
            3,
        )
        self.dtype: np.dtype[Any] = np.dtype(np.uint8)
        self.answer_timeout = (MAX_FALLBACKS + 1) * 2 * (config.data.decode_timeout + _GUARD_MARGIN_SECONDS) + 60.0
        self._guard = TimeoutRunner()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_guard": TimeoutRunner()}

    def warm_up(self) -> None:
        """Import the decoder, and set up where this process reads packs."""
        preload(self.config.data.decoder)
        _set_up_reading(self.config.data, self.catalogs.values())

    def describe(self, task: Task) -> str:
        """The video of a task, for error messages."""
        source = self.plan.sources[int(task.sample["dataset"])]
        return str(self.catalogs[source.name].path(int(task.sample["index"])))

    def run(self, task: Task, out: np.ndarray) -> Clips:
        """Fill `out`, uint8 [copies, T, S, S, 3].

        Raises:
            UnreadableError: neither the video nor any of its fallbacks can be read.
        """
        began = time.perf_counter()
        sample, config = task.sample, self.config
        number = int(sample["dataset"])
        name = self.plan.sources[number].name
        dataset = config.data.datasets[name]
        identity = (config.seed, name, int(sample["index"]), int(sample["pass"]))
        boxes, index, skipped = self._readable(task, name, Clip(dataset, identity, config.model.frames), out)
        keys = np.array([key("clip", *identity, copy) for copy in range(len(out))], np.uint64).view(np.int64)
        labels = self.catalogs[name].labels(index)
        return Clips(number, labels, boxes, keys, skipped, time.perf_counter() - began, stage_trouble())

    def _readable(
        self, task: Task, name: str, clip: Clip, out: np.ndarray
    ) -> tuple[np.ndarray, int, list[dict[str, Any]]]:
        """Fill `out` from the sample's video, or the first readable fallback; return (boxes, video index, records of skipped ones)."""
        catalog, index = self.catalogs[name], int(task.sample["index"])
        failed: dict[int, VideoError] = {}
        for attempt in range(-1, MAX_FALLBACKS):
            index = index if attempt < 0 else self.plan.fallback_index(task.sample, attempt)
            if index in failed:
                continue
            try:
                boxes = self._decode(catalog.path(index), clip, out)
            except VideoError as error:
                failed[index] = error
                continue
            shown = catalog.relative_path(index)
            return boxes, index, [_record(name, catalog, bad, e, task.update, shown) for bad, e in failed.items()]
        first = next(iter(failed.values()))
        raise UnreadableError(
            f"{first.path}: {first.reason}; nor can any of {len(failed) - 1} fallback videos of dataset {name!r} be read; "
            "check that its videos exist and are not damaged"
        )

    def _decode(self, path: Path, clip: Clip, out: np.ndarray) -> np.ndarray:
        """`read`, with one retry after an error of the operating system."""
        try:
            return self._decode_once(path, clip, out)
        except VideoError as error:
            if not error.transient:
                raise
            time.sleep(_RETRY_DELAY_SECONDS)
            return self._decode_once(path, clip, out)

    def _decode_once(self, path: Path, clip: Clip, out: np.ndarray) -> np.ndarray:
        limit, lease = self.config.data.decode_timeout, WriteLease()
        try:
            return _within(self._guard, path, limit, partial(self.read, path, clip, out, lease))
        finally:
            lease.end()  # an abandoned call must not write to memory that another task uses by then

    def read(self, path: Path, clip: Clip, out: np.ndarray, lease: WriteLease | None = None) -> np.ndarray:
        """Fill `out`, uint8 [copies, T, S, S, 3], with a training clip, decoding and augmenting a few frames at a time.

        Args:
            lease: permission to write to `out`, checked before each frame.

        Returns:
            The box to erase in each copy: int32 [copies, 4].

        Raises:
            VideoError: the video cannot be read; `out` may hold some of its frames.
            CallTimeout: the lease has ended.
        """
        lease = lease or WriteLease()
        augmenters: list[Augmenter] = []
        held: list[tuple[Frame, list[int]]] = []
        stack = np.empty(0, np.uint8)
        for frame, places in self.decoded(path, clip):
            augmenters = augmenters or [
                self.augmenter(frame.shape[0], frame.shape[1], clip, copy) for copy in range(len(out))
            ]
            if isinstance(frame, Picture) or frame.nbytes > AUGMENT_BATCH_BYTES:
                _augment([(frame, places)], augmenters, out, lease)
            else:
                if len(held) == len(stack):
                    _augment(held, augmenters, out, lease)
                if not len(stack):
                    stack = np.empty(
                        (min(len(clip.uniforms), AUGMENT_BATCH_BYTES // frame.nbytes), *frame.shape), np.uint8
                    )
                stack[len(held)] = frame
                held.append((stack[len(held)], places))
            del frame  # so that decoding the next one can reuse its memory
        _augment(held, augmenters, out, lease)
        return np.stack([augmenter.box for augmenter in augmenters])

    def decoded(self, path: Path, clip: Clip) -> Iterator[tuple[Frame, list[int]]]:
        """The distinct frames of a training clip: (uint8 [H, W, 3] or a large frame, its positions among the T). Raises VideoError."""
        data = self.config.data
        with open_video(path, data.decoder, data.decode_timeout) as video:
            wanted = training_indices(
                clip.dataset, data, video.frame_count, video.fps, len(clip.uniforms), clip.uniforms
            )
            for number, frame in video.pictures(wanted):
                yield frame, np.flatnonzero(wanted == number).tolist()
                del frame

    def augmenter(self, height: int, width: int, clip: Clip, copy: int) -> Augmenter:
        """The augmenter of one copy of a clip with frames of height × width pixels."""
        config, draws = self.config, KeyedRNG("augment", *clip.identity, copy)
        return Augmenter(height, width, config.augment, config.model.crop, draws, clip.dataset.flip)


def _augment(
    held: list[tuple[Frame, list[int]]], augmenters: list[Augmenter], out: np.ndarray, lease: WriteLease
) -> None:
    """Augment the frames in `held`, and empty it."""
    for augmenter, target in zip(augmenters, out):
        for frame, places in held:
            with lease:
                augmenter(frame, target[places[0]])
                target[places[1:]] = target[places[0]]
    held.clear()


class EvalViewsFn:
    """Makes all views of a video of one dataset: float32 [V, 3, T, S, S], normalised. The task is the video's index."""

    def __init__(
        self, catalog: Catalog, dataset: DatasetConfig, config: RunConfig, corruption: Corruption | None = None
    ) -> None:
        self.catalog, self.dataset, self.config, self.corruption = catalog, dataset, config, corruption
        self.shape: tuple[int, ...] = views_shape(dataset, config.model)
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self.answer_timeout = 2 * (config.data.decode_timeout + _GUARD_MARGIN_SECONDS) + 60.0
        self._guard = TimeoutRunner()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_guard": TimeoutRunner()}

    def warm_up(self) -> None:
        """Import the decoder, and set up where this process reads packs."""
        preload(self.config.data.decoder)
        _set_up_reading(self.config.data, [self.catalog])

    def describe(self, task: int) -> str:
        """The video of a task, for error messages."""
        return str(self.catalog.path(task))

    def run(self, task: int, out: np.ndarray) -> str:
        """Fill `out`; return the reason if the video cannot be read, else ''."""
        path, data = self.catalog.path(task), self.config.data
        corruption = self.corruption and self.corruption.of(self.catalog.name, self.catalog.relative_path(task))
        for last in (False, True):
            lease = WriteLease()  # an abandoned call must not write to memory that another task uses by then
            load = partial(load_views, path, self.dataset, data, self.config.model, out, lease, corruption)
            try:
                _within(self._guard, path, data.decode_timeout, load)
                return ""
            except VideoError as error:
                if last or not error.transient:
                    return error.reason
                time.sleep(_RETRY_DELAY_SECONDS)
            finally:
                lease.end()
        raise AssertionError  # the second iteration returns


def _set_up_reading(data: DataConfig, catalogs: Iterable[Catalog]) -> None:
    use_stage(data.stage)
    remote.set_patience(data.decode_timeout)
    for catalog in catalogs:
        if catalog.address is not None:
            remote.preload(catalog.address)


def _within(guard: TimeoutRunner, path: Path, seconds: float, work: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the result of `work`. Raises VideoError after `seconds`, for a decoder that ignores its own time limit."""
    try:
        return guard.run(work, seconds + _GUARD_MARGIN_SECONDS)
    except CallTimeout:
        raise VideoError(path, "decoding took longer than data.decode_timeout") from None


def _record(name: str, catalog: Catalog, index: int, error: VideoError, update: int, stand_in: str) -> dict[str, Any]:
    path = catalog.relative_path(index)
    return {"dataset": name, "path": path, "reason": error.reason, "update": update, "stand_in": stand_in}
