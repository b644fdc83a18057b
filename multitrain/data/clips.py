"""What a loader worker does with one task: a ticket becomes training clips, a test video its views. No torch.

Both jobs are pure: the same task gives the same result in any process, at any time, as long as the same files can be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from multitrain.config import DatasetConfig, RunConfig
from multitrain.data.augment import Augmenter
from multitrain.data.call_timeout import CallTimeout, TimeoutRunner, WriteLease
from multitrain.data.catalog import Catalog
from multitrain.data.decode import Frame, Picture, VideoError, open_video, preload
from multitrain.data.frames import training_indices
from multitrain.data.random import KeyedRNG
from multitrain.data.views import load_views, views_shape
from multitrain.order import Plan, key

MAX_FALLBACKS = 8
"""Videos that are tried in place of an unreadable one before the run gives up."""

_GUARD_MARGIN_SECONDS = 1.0  # seconds by which the guard waits longer than the decoder's own time limit
_RETRY_DELAY_SECONDS = 0.5  # seconds before a file is tried again after an error of the operating system


AUGMENT_BATCH_BYTES = 32 << 20
"""Bytes of decoded frames that are augmented together. A clip of usual size is decoded first and augmented then, which keeps
the processor's caches warm; frames of 4K and more are augmented one by one, part by part."""


class UnreadableError(RuntimeError):
    """A video and all its stand-ins cannot be read."""


@dataclass(frozen=True)
class Task:
    """One video of one update."""

    update: int
    sample: np.void
    """`multitrain.order.TICKET`."""


@dataclass
class Clips:
    """The copies of one video; their pixels are in the task's slot."""

    dataset: int
    labels: tuple[int, ...]
    boxes: np.ndarray
    """int32 [copies, 4]: top, left, height, width of what is erased on the device; zeros for nothing."""
    keys: np.ndarray
    """int64 [copies]."""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Unreadable videos met on the way: dataset, path, reason, update, stand_in (path of the video shown instead)."""
    seconds: float = 0.0


class Clip:
    """Everything random about a training clip before its copies part: a function of its identity.

    identity: seed, dataset, index and pass of the ticket, whatever video is shown in the end.
    uniforms: draws in [0, 1), one a frame.
    """

    def __init__(self, dataset: DatasetConfig, identity: tuple[int | str, ...], frames: int) -> None:
        self.dataset, self.identity = dataset, identity
        draws = KeyedRNG("window", *identity)
        self.uniforms = [draws.uniform() for _ in range(frames)]


class TrainClipFn:
    """Makes the augmented copies of a ticket's video: uint8 [copies, T, S, S, 3]."""

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
        """Import the decoder."""
        preload(self.config.data.decoder)

    def describe(self, task: Task) -> str:
        """The video of a task, for error messages."""
        source = self.plan.sources[int(task.sample["dataset"])]
        return str(self.catalogs[source.name].path(int(task.sample["index"])))

    def run(self, task: Task, out: np.ndarray) -> Clips:
        """Fill `out`, uint8 [copies, T, S, S, 3].

        Raises:
            UnreadableError: neither the video nor any of its stand-ins can be read.
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
        return Clips(number, labels, boxes, keys, skipped, time.perf_counter() - began)

    def _readable(
        self, task: Task, name: str, clip: Clip, out: np.ndarray
    ) -> tuple[np.ndarray, int, list[dict[str, Any]]]:
        """Fills `out` from the ticket's video, or the first stand-in that can be read; boxes, its index, what was skipped."""
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
            f"{first.path}: {first.reason}; nor can any of {len(failed) - 1} stand-ins from dataset {name!r} be read; "
            "check that its videos are there and whole"
        )

    def _decode(self, path: Path, clip: Clip, out: np.ndarray) -> np.ndarray:
        """`read`; tried twice when the operating system, not the file, is at fault."""
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
            lease.end()  # a call left behind must not write to what by then is another video's place

    def read(self, path: Path, clip: Clip, out: np.ndarray, lease: WriteLease | None = None) -> np.ndarray:
        """Fill `out`, uint8 [copies, T, S, S, 3], with a training clip; frames are augmented while it is decoded, a few at a time.

        Args:
            lease: right to write to `out`, asked for before each frame.

        Returns:
            What is to be erased of each copy: int32 [copies, 4].

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
            del frame  # before the next one is decoded: its memory is used again
        _augment(held, augmenters, out, lease)
        return np.stack([augmenter.box for augmenter in augmenters])

    def decoded(self, path: Path, clip: Clip) -> Iterator[tuple[Frame, list[int]]]:
        """The frames of a training clip, each once: uint8 [H, W, 3], or a large one, and its places among the T. Raises VideoError."""
        data = self.config.data
        with open_video(path, data.decoder, data.decode_timeout) as video:
            wanted = training_indices(
                clip.dataset, data, video.frame_count, video.fps, len(clip.uniforms), clip.uniforms
            )
            for number, frame in video.pictures(wanted):
                yield frame, np.flatnonzero(wanted == number).tolist()
                del frame

    def augmenter(self, height: int, width: int, clip: Clip, copy: int) -> Augmenter:
        """What is done to the frames, of height × width, of one copy of a clip."""
        config, draws = self.config, KeyedRNG("augment", *clip.identity, copy)
        return Augmenter(height, width, config.augment, config.model.crop, draws, clip.dataset.flip)


def _augment(
    held: list[tuple[Frame, list[int]]], augmenters: list[Augmenter], out: np.ndarray, lease: WriteLease
) -> None:
    """Augments the frames that are held, and lets them go."""
    for augmenter, target in zip(augmenters, out):
        for frame, places in held:
            with lease:
                augmenter(frame, target[places[0]])
                target[places[1:]] = target[places[0]]
    held.clear()


class EvalViewsFn:
    """Makes all views of a video of one dataset: float32 [V, 3, T, S, S], normalised. A task is the video's index."""

    def __init__(self, catalog: Catalog, dataset: DatasetConfig, config: RunConfig) -> None:
        self.catalog, self.dataset, self.config = catalog, dataset, config
        self.shape: tuple[int, ...] = views_shape(dataset, config.model)
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self.answer_timeout = 2 * (config.data.decode_timeout + _GUARD_MARGIN_SECONDS) + 60.0
        self._guard = TimeoutRunner()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_guard": TimeoutRunner()}

    def warm_up(self) -> None:
        """Import the decoder."""
        preload(self.config.data.decoder)

    def describe(self, task: int) -> str:
        """The video of a task, for error messages."""
        return str(self.catalog.path(task))

    def run(self, task: int, out: np.ndarray) -> str:
        """Fill `out`; returns the reason when the video cannot be read, else ''."""
        path, data = self.catalog.path(task), self.config.data
        for last in (False, True):
            lease = WriteLease()  # a call left behind must not write to what by then is another video's place
            load = partial(load_views, path, self.dataset, data, self.config.model, out, lease)
            try:
                _within(self._guard, path, data.decode_timeout, load)
                return ""
            except VideoError as error:
                if last or not error.transient:
                    return error.reason
                time.sleep(_RETRY_DELAY_SECONDS)
            finally:
                lease.end()
        raise AssertionError  # the second turn returns


def _within(guard: TimeoutRunner, path: Path, seconds: float, work: Callable[[], np.ndarray]) -> np.ndarray:
    """What `work` returns; VideoError when it takes longer than `seconds`, and the decoder has not noticed by itself."""
    try:
        return guard.run(work, seconds + _GUARD_MARGIN_SECONDS)
    except CallTimeout:
        raise VideoError(path, "decoding took longer than data.decode_timeout") from None


def _record(name: str, catalog: Catalog, index: int, error: VideoError, update: int, stand_in: str) -> dict[str, Any]:
    path = catalog.relative_path(index)
    return {"dataset": name, "path": path, "reason": error.reason, "update": update, "stand_in": stand_in}


__all__ = ["MAX_FALLBACKS", "Clip", "Clips", "EvalViewsFn", "Task", "TrainClipFn", "UnreadableError"]
