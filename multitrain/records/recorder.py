"""The one writer of a run's metrics, events, TensorBoard scalars and log lines."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from multitrain.records import jsonl
from multitrain.records.diagnosis import WINDOW, Finding, Records
from multitrain.records.events import Events
from multitrain.records.metrics import Metrics
from multitrain.records.progress import Progress
from multitrain.records.retrying_writer import RetryingWriter
from multitrain.records.tensorboard import TensorBoard, scalars
from multitrain.records.wandb import Wandb
from multitrain.text import printable

MEASURES = ("top1", "top5", "map")
"""Validation metrics to plot and print, in percent."""

LAST_PLOTS_SECONDS = 30.0
"""Seconds that a finished run waits for its last plots; an interrupted run does not wait."""


class Recorder:
    """Metrics, events, TensorBoard and progress of one start of a run. Only rank 0 writes, except for unreadable videos.

    Opening it at a resume drops the metrics lines and hides the TensorBoard points of updates that will be done again, so
    that every update appears once. After that, write errors (full, read-only, quota) never stop the run: records are buffered
    and retried.

    Args:
        run_dir: the run's folder.
        total_updates: length of the run.
        start_update: updates completed when this start begins; 0 for a fresh run.
        rank: rank of this process; ranks other than 0 write nothing.
        job: the scheduler's job id; default: from the environment.
        log_every: updates between two lines in the log.
        tensorboard: whether to write TensorBoard scalars.
        wandb: project of Weights & Biases; default: none.
        settings: the run's settings by dotted name, for the comparison of runs in both.
        measures: names of the validation metrics for that comparison, e.g. ``val/kinetics/top1``.
        diagnose: findings in the newest records and the last validation; each kind is logged once.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_updates: int,
        start_update: int = 0,
        rank: int = 0,
        job: str | None = None,
        log_every: int = 1,
        tensorboard: bool = True,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
        measures: Sequence[str] = (),
        diagnose: Callable[[Records, Mapping[str, Mapping[str, float]]], list[Finding]] | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.total_updates = total_updates
        self.start_update = start_update
        self.rank = rank
        self._closed = rank != 0
        skipped = self.run_dir / "skipped.jsonl"
        self._skipped = RetryingWriter(skipped, lambda record: jsonl.append(skipped, record), self.write)
        self._plots_enabled = True
        self._drawing: threading.Thread | None = None
        self._interrupted = False
        self._diagnose = diagnose
        self._newest: deque[Mapping[str, Any]] = deque(maxlen=3 * WINDOW)
        self._known: set[str] = set()
        if self._closed:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.events = Events(self.run_dir / "events.jsonl", job=job)
        self.metrics = Metrics(self.run_dir / "metrics.jsonl", start_update=start_update)
        jsonl.drop_from(skipped, start_update)
        self.progress = Progress(total_updates, start_update, log_every=log_every)
        self._events = RetryingWriter(
            self.events.path, lambda record: jsonl.append(self.events.path, record), self.write
        )
        self._metrics = RetryingWriter(self.metrics.path, self.metrics.write, self.write)
        folder = self.run_dir / "tensorboard"
        self.tensorboard = TensorBoard(folder, start_update=start_update, say=self.write) if tensorboard else None
        if self.tensorboard and settings:
            self.tensorboard.settings(settings, measures)
        self.wandb = Wandb(wandb, self.run_dir, settings or {}, self.progress.write) if wandb else None

    def update(self, record: Mapping[str, Any]) -> None:
        """Record one completed update.

        Args:
            record: ``update`` (from 0), ``loss``, ``loss_classification``, ``loss_projection``, ``loss_informative``,
                ``loss_per_dataset`` {name: value}, ``lr``, ``grad_norm`` (before clipping), ``loss_scale``, ``tickets``
                (digest), ``world_size``, ``device`` (model of the GPU, or cpu), ``backend``, ``seconds``,
                ``data_wait_fraction`` (0–1), ``clips_per_second``, ``max_memory_gb``, ``skipped`` {name: bad
                videos so far}. Other keys are kept; any key may be absent.
        """
        if self._closed:
            return
        self._metrics.write(record)
        if self.tensorboard:
            self.tensorboard.update(record)
        if self.wandb:
            self.wandb.scalars(dict(scalars(record)), int(record["update"]) + 1)
        self.progress.update(record)
        self._newest.append(record)
        if (int(record["update"]) + 1) % WINDOW == 0:
            self._log_findings({})

    def event(self, name: str, **fields: Any) -> None:
        """Record an event: `start`, `resume`, `signal`, `checkpoint` (`update`, `seconds`), `requeue`, `end` …"""
        if self._closed:
            return
        self._sync()
        self._interrupted |= name in ("signal", "error")
        if name in ("start", "resume"):
            fields = {"update": self.start_update, "total_updates": self.total_updates, **fields}
            if self.metrics.dropped:
                fields = {"redone": self.metrics.dropped, **fields}
        self._events.write(self.events.record(name, **fields))
        if self.tensorboard:
            if name == "checkpoint" and fields.get("seconds") is not None:
                completed = int(fields.get("update", self.start_update))
                self.tensorboard.scalar("checkpoint/save_seconds", float(fields["seconds"]), completed)
            self.tensorboard.flush()

    def validation(self, update: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Validation after `update` completed updates: ``{dataset: {"top1": percent, "top5": percent, …}}``.

        A validation repeated after a resume replaces the earlier one in TensorBoard.
        """
        if self._closed:
            return
        self.event("validation", update=update, results=results)
        for dataset, values in results.items():
            for measure, value in values.items():
                if self.tensorboard and measure in MEASURES:
                    self.tensorboard.scalar(f"val/{dataset}/{measure}", float(value), update)
                if self.wandb and measure in MEASURES:
                    self.wandb.scalars({f"val/{dataset}/{measure}": float(value)}, update)
        self.progress.write(f"validation after update {update}:  " + "   ".join(_summaries(results)))
        self._log_findings(results)

    def _log_findings(self, results: Mapping[str, Mapping[str, float]]) -> None:
        """Log what is unusual in the newest updates; of every kind the first finding of this start."""
        for finding in self._diagnose(list(self._newest), results) if self._diagnose else ():
            if finding.kind not in self._known:
                self._known.add(finding.kind)
                self.progress.write(printable(f"note: {finding}"))

    def pictures(self, update: int, draw: Callable[[], Mapping[str, bytes]]) -> None:
        """Draw PNG plots after `update` completed updates in a separate thread, while training continues.

        A failure is logged in one line and disables plots for this start. Plots are skipped while earlier ones are being
        drawn.
        """
        if (
            self._closed
            or not self.tensorboard
            or not self._plots_enabled
            or (self._drawing and self._drawing.is_alive())
        ):
            return
        self._drawing = threading.Thread(target=self._draw, args=(update, draw, self.tensorboard), daemon=True)
        self._drawing.start()

    def _draw(self, update: int, draw: Callable[[], Mapping[str, bytes]], tensorboard: TensorBoard) -> None:
        try:
            for tag, png in draw().items():
                tensorboard.picture(tag, png, update)
        except Exception as error:  # matplotlib or a font is missing, a video was deleted: no reason to stop the run
            self._plots_enabled = False
            if not self._closed:
                self.progress.write(f"no pictures for TensorBoard from here on: {' '.join(str(error).split())[:200]}")

    def skipped(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Record unreadable videos and their fallback samples in `skipped.jsonl`, one line each; any rank may call this."""
        for record in records:
            self._skipped.write(record)

    def _sync(self) -> None:
        """Sync the metrics before an event is written, so that a checkpoint's updates are never missing in the metrics."""
        if self._metrics.retry():
            try:
                self.metrics.sync()
            except OSError as error:
                self.write(f"{self.metrics.path} could not be forced to disk ({error.strerror or error})")

    def write(self, text: str) -> None:
        """Print a line of the log."""
        if not self._closed:
            self.progress.write(text)

    def close(self) -> None:
        """Write everything to disk. Idempotent."""
        if self._closed:
            return
        if self._drawing and not self._interrupted:
            self._drawing.join(LAST_PLOTS_SECONDS)
        for held in (self._metrics, self._events, self._skipped):
            held.close()
        self._closed = True
        with contextlib.suppress(OSError):  # a line was logged when writing began to fail
            self.metrics.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.close()
        self.progress.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _summaries(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [
        f"{dataset} "
        + " ".join(f"{m} {values[m]:.2f}" for m in MEASURES if m in values)
        + (f" ({values['videos']:.0f} videos)" if "videos" in values else "")
        for dataset, values in results.items()
    ]
