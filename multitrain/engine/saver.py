"""Asynchronous checkpointing: training blocks only while the state is copied to host memory.

Each rank copies its part of the optimizer's moments to host memory, rank 0 the weights as well. A thread of each rank then
gathers the parts on rank 0 over a separate process group, and rank 0's thread writes the checkpoint. The threads broadcast the
result, and the trainer reads it before the next save: all ranks get it at the same point without a collective in the training
loop. The threads start with the trainer: when memory has run out, starting one can hang (seen with Python 3.11: `Thread.start`
waits for a thread that could not begin).
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from multitrain.config import CheckpointConfig
from multitrain.engine import checkpoint as checkpoints
from multitrain.engine.checkpoint import Checkpoint
from multitrain.engine.deepspeed import Engine, Sharded, ShardFragment
from multitrain.engine.distributed import World
from multitrain.lease import LeaseLost


@dataclass(frozen=True)
class SaveResult:
    """Result of a save; equal on all ranks except for `held_up`.

    `failure`: why there is no checkpoint, None when it is on disk, verified. `retention`: why an old checkpoint could
    not be deleted. `seconds`: from the copy to the verified checkpoint. `held_up`: seconds of these that blocked the
    training on this rank.
    """

    update: int
    failure: str | None
    retention: str | None
    seconds: float
    held_up: float


class Saver:
    """Writes checkpoints of `engine`, one at a time. All ranks make the same calls in the same order.

    Args:
        folder: the run's folder of checkpoints.
        config_text: the configuration as it is stored in each checkpoint.
    """

    def __init__(self, folder: Path, world: World, engine: Engine, config: CheckpointConfig, config_text: str) -> None:
        self._folder = folder
        self._world = world
        self._engine = engine
        self._config = config
        self._config_text = config_text
        self._layouts: list[list[ShardFragment]] | None = None
        self._moments: Tensor | None = None
        self._weights: dict[str, Tensor] = {}
        self._jobs: queue.SimpleQueue[tuple[dict[str, Any], float]] = queue.SimpleQueue()
        self._in_flight = False
        self._over = threading.Event()
        self._result: SaveResult | BaseException | None = None
        self._held_up = self._copied = 0.0
        self._told = False

    @property
    def in_flight(self) -> bool:
        """Whether a save was started and :meth:`finish` has not been called for it."""
        return self._in_flight

    @property
    def done(self) -> bool:
        """Whether the save in flight has ended on this rank, so that :meth:`finish` does not wait."""
        return self._in_flight and self._over.is_set()

    @property
    def copied(self) -> float:
        """Seconds that the copy of the last save took; it blocks the training."""
        return self._copied

    def poll_result(self) -> SaveResult | None:
        """Result of the last save, returned once, as soon as this rank has it. Non-blocking, no collective."""
        if self._told or not isinstance(self._result, SaveResult):
            return None
        self._told = True
        return replace(self._result, held_up=self._held_up)

    def preallocate(self) -> None:
        """Allocate the host buffers and start the thread, so that the first save blocks no longer than the others."""
        self._layouts = self._world.gather(self._engine.pieces())
        self._copy()
        threading.Thread(target=self._serve, name="checkpoint", daemon=True).start()

    def _copy(self) -> None:
        self._moments = self._engine.copy_moments(self._moments)
        if self._world.is_main:
            self._weights = self._engine.copy_weights(self._weights)

    def start(self, state: dict[str, Any]) -> None:
        """Copy weights and moments, and begin to write them with `state`. The previous save must be finished."""
        assert not self._in_flight, "the previous save is not finished"
        began = time.perf_counter()
        if self._layouts is None:
            self.preallocate()
        else:
            self._copy()
        self._held_up = self._copied = time.perf_counter() - began
        self._result, self._told = None, False
        self._in_flight = True
        self._over.clear()
        self._jobs.put((state, began))

    def finish(self) -> bool:
        """Wait for the save in flight; True if the checkpoint is on disk. The same on all ranks.

        Raises:
            Exception: the connection to another rank is lost.
        """
        assert self._in_flight, "no save was started"
        began = time.perf_counter()
        self._over.wait()
        self._held_up += time.perf_counter() - began
        self._in_flight = False
        if isinstance(self._result, BaseException):
            raise self._result
        assert self._result is not None
        return self._result.failure is None

    def _serve(self) -> None:
        """Thread body: saves one after the other."""
        while True:
            state, began = self._jobs.get()
            try:
                self._work(state, began)
            finally:
                self._over.set()

    def _work(self, state: dict[str, Any], began: float) -> None:
        """In the thread: gather, write, broadcast the result."""
        try:
            failure, retention = None, None
            parts = self._gather()
            if parts is not None:
                failure, retention = self._write(parts, state)
            outcome = SaveResult(int(state["update"]), failure, retention, time.perf_counter() - began, 0.0)
            box = [outcome]
            dist.broadcast_object_list(box, src=0, group=self._world.background)
            self._result = box[0]
        except (Exception, LeaseLost) as error:  # handed over to the training
            self._result = error

    def _gather(self) -> list[Tensor] | None:
        """The moments of all ranks, on rank 0; None on the others."""
        assert self._moments is not None
        if self._world.size == 1:
            return [self._moments]
        parts = [torch.empty_like(self._moments) for _ in range(self._world.size)] if self._world.is_main else None
        dist.gather(self._moments, parts, dst=0, group=self._world.background)
        return parts

    def _write(self, parts: list[Tensor], state: dict[str, Any]) -> tuple[str | None, str | None]:
        assert self._layouts is not None
        moments = Sharded(self._engine.shapes, self._layouts, parts, self._engine.sharded)
        try:
            content = Checkpoint(self._weights, moments, state, moments.average(self._weights))
            checkpoints.write(self._folder, content, self._config_text)
        except OSError as error:
            return f"{self._folder}: {error.strerror or error}", None
        except Exception as error:
            return f"{self._folder}: {type(error).__name__}: {error}", None
        try:
            checkpoints.point_to_best(self._folder, state.get("best", {}).get("update"))
            checkpoints.prune(self._folder, self._config.keep, self._config.keep_every)
        except OSError as error:
            return None, f"{error.filename or self._folder}: {error.strerror or error}"
        return None, None
