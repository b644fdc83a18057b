"""The training loop: updates in order, checkpoints in between, and stopping cleanly on request.

The number of completed updates is the whole position of a run. Prefetched batches and the gradient of an interrupted update
are discarded and computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multitrain.config import RunConfig, dump
from multitrain.data.loader import Batch, TrainLoader
from multitrain.engine import checkpoint as checkpoints
from multitrain.engine.best import Best
from multitrain.engine.checkpoint import Checkpoint
from multitrain.engine.checkpoint_policy import CheckpointPolicy
from multitrain.engine.deepspeed import Engine
from multitrain.engine.distributed import World
from multitrain.engine.interruption import Interruption, Request
from multitrain.engine.leadtime import LeadTime
from multitrain.engine.profile import Profiler, phase
from multitrain.engine.saver import Saver
from multitrain.engine.schedule import Schedule
from multitrain.engine.step_metrics import StepMetrics, UpdateTimer
from multitrain.engine.unreadable import UnreadableTracker
from multitrain.engine.update import Gradient
from multitrain.engine.watchdog import Watchdog
from multitrain.evaluation.validation import Validation
from multitrain.model.multitrain import MultiTrain
from multitrain.order import BatchShape, Plan
from multitrain.records.recorder import Recorder

MOST_NONFINITE = 100
"""Consecutive updates with a non-finite gradient after which the run stops: it has diverged."""


class TrainingError(RuntimeError):
    """The run cannot continue, and a restart does not help; the message gives the reason and the remedy."""


class SaveError(RuntimeError):
    """The run is complete, and its last checkpoint could not be written."""


class _Stopped(Exception):
    """All ranks have agreed to stop before the next micro-batch."""


@dataclass(frozen=True)
class Parts:
    """What a trainer works with; :func:`multitrain.engine.build.build` makes it from a configuration."""

    model: MultiTrain
    """The network; its initial weights count only when the run has no checkpoint."""
    plan: Plan
    """The order of the samples."""
    shape: BatchShape
    """Effective batch = micro-batch × accumulation × ranks."""
    updates: int
    """Length of the run."""
    open_loader: Callable[[int, int], TrainLoader]
    """``(start, stop)`` → this rank's batches of updates ``start`` to ``stop - 1``."""
    open_recorder: Callable[[int], Recorder]
    """``start`` → writer of metrics and events from update ``start`` on."""
    lead_time: LeadTime
    """Gets the durations of updates and saves."""
    skips: UnreadableTracker
    """Counts unreadable videos; ends the run above `data.skip_cap`."""
    validation: Validation | None
    """None for a run without validation."""


class Trainer:
    """Runs the updates of a run, starting at its newest checkpoint.

    Args:
        config: the run's configuration.
        run: the run's folder.
        world: this process among the ranks.
        parts: model, order, loader and writers.
        interruption: requests to stop or save.
        watchdog: gets a heartbeat per micro-batch.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        world: World,
        parts: Parts,
        *,
        interruption: Interruption,
        watchdog: Watchdog,
    ) -> None:
        model, plan, shape, updates = parts.model, parts.plan, parts.shape, parts.updates
        self.config = config
        self.world = world
        self.model = model
        self.plan = plan
        self.shape = shape
        self.updates = updates
        self.completed = 0
        self.engine = Engine(model, config.optim, config.engine, config.precision, world.device, config.ema.decay)
        self.gradient = Gradient(config, model, self.engine, shape, world)
        self.schedule = Schedule.of(config.optim, updates, plan.epoch_size / config.effective_batch)
        self._checkpoints = run / "checkpoints"
        self._open_loader = parts.open_loader
        self._open_recorder = parts.open_recorder
        self._interruption = interruption
        self._watchdog = watchdog
        self._lead_time = parts.lead_time
        self._skips = parts.skips
        self._validation = parts.validation
        self._saving = CheckpointPolicy(
            self._checkpoints,
            config.checkpoint.every,
            Saver(self._checkpoints, world, self.engine, config.checkpoint, dump(config)),
            self._state,
            interruption=interruption,
            watchdog=watchdog,
            lead_time=parts.lead_time,
            reports=world.is_main,
        )
        self._step_metrics = StepMetrics(config, list(model.datasets), shape.accumulation, world)
        self._timer = UpdateTimer()
        self._profiler = Profiler(run, world.device, lambda text: self.recorder.write(text), active=world.is_main)
        self._validated = -1
        self._best = Best(config)
        self._nonfinite = 0
        self._fp16_scale: dict[str, Any] | None = None  # of earlier starts, kept while this one is not in fp16

    def resume(self) -> dict[Path, str]:
        """Load the newest valid checkpoint, chosen by rank 0, and open the recorder at its update.

        Returns:
            The reasons why newer checkpoints were not used, by folder.
        """
        choice: tuple[Path | None, dict[Path, str]] | Exception | None = None
        if self.world.is_main:
            checkpoints.clear_temporary(self._checkpoints)
            try:
                choice = checkpoints.newest_verified(self._checkpoints)
            except checkpoints.CheckpointError as error:
                choice = error
        choice = self.world.broadcast(choice)
        if isinstance(choice, Exception):
            raise choice
        assert choice is not None
        folder, refused = choice
        if folder is not None:
            self._load(checkpoints.read(folder))
        self.recorder = self._open_recorder(self.completed)
        self._saving.begin(self.recorder, self.completed if folder is not None else None)
        return refused

    def train(self) -> Request:
        """Run the remaining updates after :meth:`resume`.

        Returns:
            ``Request.NONE`` when the run is complete, else the request that stopped it. In both cases a checkpoint is on
            disk, or the events tell why it could not be written.

        Raises:
            TrainingError: the run cannot continue.
            SaveError: the run is complete and its last checkpoint could not be written.
        """
        self._loader = self._open_loader(self.completed, self.updates)
        self.model.train()
        request = Request.NONE
        try:
            self._validate_if_due()  # one that was interrupted
            if self._best.patience_is_over and self.completed < self.updates:
                self.recorder.write(
                    f"the run ended early after update {self.completed} (eval.patience): to go on, resume it with eval.patience=null"
                )
            while self.completed < self.updates and not self._best.patience_is_over:
                with self._profiler.update(self.completed):
                    self._one_update()
                self._validate_if_due()
                self._saving.save_if_due(self.completed, is_best=self._best.update == self.completed)
        except _Stopped:
            request = self._interruption.agreed()
            self.recorder.event("signal", request=request.name.lower(), signals=self._interruption.signals)
        finally:
            self._loader.close()
        if not self._saving.save_last(self.completed) and request == Request.NONE:
            raise SaveError(
                f"the last checkpoint could not be written to {self._checkpoints}; make room, and resume the run"
            )
        return request

    def _one_update(self) -> None:
        """One update: the gradient of the effective batch, one AdamW step, one line in metrics.jsonl."""
        self._timer.restart()
        losses = self.gradient.accumulate(self._micro_batches())
        lr = self.schedule(self.completed)
        scale = self.engine.loss_scale.scale
        with phase("optimizer"):
            grad_norm = self.engine.update(lr)
        self._check_finite(grad_norm)
        with phase("metrics"):
            figures, skipped = self._step_metrics.reduce(losses, self._timer)
        if skipped:
            self._count_skipped(losses.skipped)
        start = self.completed * self.config.effective_batch
        record = {
            "update": self.completed,
            **figures,
            "lr": lr,
            "grad_norm": grad_norm,
            "loss_scale": scale,
            "tickets": self.plan.digest(start, start + self.config.effective_batch),
            "world_size": self.world.size,
            "micro_batch": self.shape.micro_batch,
            **self.world.hardware,
            "skipped": self._skips.counts,
        }
        self.completed += 1
        self._watchdog.first_update_done()
        self._lead_time.update(record["seconds"])
        self.recorder.update(record)

    def _validate_if_due(self) -> None:
        """Validate at `eval.every` and after the last update."""
        every = self.config.eval.every
        if self._validation is None or every is None or self._validated == self.completed or not self.completed:
            return
        if self.completed % every and self.completed != self.updates:
            return
        with self.engine.averaged():
            results = self._validation(self.model)
        if not results:  # interrupted on all ranks; the next start validates first
            raise _Stopped
        self._validated = self.completed
        self.recorder.validation(self.completed, results)
        if self._best.add(self.completed, results):
            self.recorder.event("best", update=self.completed, measure=self._best.measure, value=self._best.value)
        if self._best.patience_is_over:
            self._say_early_end()
        if self._validation.draws:
            self.recorder.pictures(self.completed, self._validation.pictures)

    def _say_early_end(self) -> None:
        best = self._best
        self.recorder.event("early_end", update=self.completed, best=best.update, value=best.value)
        self.recorder.write(
            f"ends early after update {self.completed}: {best.measure} was best after update {best.update} ({best.value:.2f}), "
            f"{best.since} validations ago (eval.patience={best.since})"
        )

    def _micro_batches(self) -> Iterator[Batch]:
        """This rank's micro-batches of the current update; raises _Stopped on all ranks before the same one."""
        for _ in range(self.shape.accumulation):
            with phase("data"):
                started = time.perf_counter()
                batch = None
                while batch is None and self._interruption.pending < Request.STOP:
                    batch = self._loader.next_batch(timeout=0.5)
                self._timer.data += time.perf_counter() - started
                if self._interruption.agreed() >= Request.STOP:
                    raise _Stopped
                self._watchdog.heartbeat()
            assert batch is not None  # a rank that stops waiting makes all ranks stop
            yield batch

    def _count_skipped(self, own: list[dict[str, Any]]) -> None:
        records = [r for rank in self.world.gather(own) for r in rank]
        if self.world.is_main:
            self.recorder.skipped(records)
        over = self._skips.add(records)
        if over is not None:
            raise TrainingError(over)

    def _check_finite(self, grad_norm: float) -> None:
        finite = grad_norm != float("inf")
        self._nonfinite = 0 if finite else self._nonfinite + 1
        if finite:
            return
        self.recorder.event("nonfinite_gradient", update=self.completed, loss_scale=self.engine.loss_scale.scale)
        if self._nonfinite >= MOST_NONFINITE:
            raise TrainingError(
                f"the gradient was not finite for {MOST_NONFINITE} updates in a row (up to update {self.completed}): "
                f"the run has diverged; start from an older checkpoint with a smaller optim.lr, or use precision=bf16"
            )

    def _state(self) -> dict[str, Any]:
        return {
            "update": self.completed,
            "updates": self.updates,
            "validated": self._validated,
            **({"best": self._best.state()} if self._best.measure else {}),
            "plan": self.plan.describe(),
            "fingerprint": self.plan.fingerprint,
            "steps_applied": self.engine.steps_applied,
            "loss_scale": self._fp16_scale or self._scale(),
            "datasets": dict(self.model.datasets),
            "multi_label": [n for n, d in self.config.data.datasets.items() if d.multi_label],
            "model": self.config.model.model_dump(mode="json"),
            "precision": self.config.precision,
            "world_size": self.world.size,
            "versions": {"torch": torch.__version__},
        }

    def _scale(self) -> dict[str, Any]:
        return {"scale": self.engine.loss_scale.scale, "good_updates": self.engine.loss_scale.good_updates}

    def _restore_scale(self, state: Mapping[str, Any]) -> None:
        """Restore the last fp16 loss scale, also after starts in another precision."""
        saved = state["loss_scale"]
        if state["precision"] != "fp16" and "kept" not in saved:
            return
        if self.engine.loss_scale.dynamic:
            self.engine.loss_scale.scale = float(saved["scale"])
            self.engine.loss_scale.good_updates = int(saved["good_updates"])
        else:
            self._fp16_scale = {**saved, "kept": True}

    def _load(self, content: Checkpoint) -> None:
        if content.state["fingerprint"] != self.plan.fingerprint:
            lines = self.plan.differences(content.state["plan"])
            raise TrainingError(
                f"{self._checkpoints}: the checkpoint belongs to another plan ({'; '.join(lines)}); "
                "undo the change, or start a new run with init_from="
            )
        self.engine.restore(content.weights, content.moments, int(content.state["steps_applied"]), content.average)
        self._restore_scale(content.state)
        self.completed = content.update
        self._validated = int(content.state["validated"])
        best = content.state.get("best") or {}
        there = best.get("update") is not None and checkpoints.folder_of(self._checkpoints, best["update"]).is_dir()
        if self.world.broadcast(there):  # not in a branch whose origin had deleted it
            self._best.restore(best)
