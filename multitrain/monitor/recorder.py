"""One object that a training loop tells what happened, and that writes it everywhere a person looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from multitrain.monitor import lines
from multitrain.monitor.events import Events
from multitrain.monitor.metrics import Metrics
from multitrain.monitor.progress import Progress
from multitrain.monitor.tensorboard import TensorBoard

MEASURES = ("top1", "top5", "map")
"""What of a validation's results is drawn and printed, in percent."""


class Recorder:
    """Metrics, events, TensorBoard and progress of one start of a run. Only rank 0 writes (bad videos excepted).

    Opening it at a resume drops the lines and hides the TensorBoard points of updates that the run is about to do
    again, so that no curve ever goes back and forth.

    Args:
        run_dir: the run's folder.
        total_updates: length of the run.
        start_update: updates completed when this start begins; 0 for a fresh run.
        rank: rank of this process; others than 0 accept every call and write nothing.
        job: scheduler's job id, from the environment when not given.
        restart: times that the run was started before, from the environment or the events when not given.
        log_every: updates between two lines in the log.
        tensorboard: whether to write TensorBoard scalars.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_updates: int,
        start_update: int = 0,
        rank: int = 0,
        job: str | None = None,
        restart: int | None = None,
        log_every: int = 1,
        tensorboard: bool = True,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.total_updates = total_updates
        self.start_update = start_update
        self.rank = rank
        self._closed = rank != 0
        if self._closed:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.events = Events(self.run_dir / "events.jsonl", job=job, restart=restart)
        self.metrics = Metrics(self.run_dir / "metrics.jsonl", start_update=start_update)
        lines.drop_from(self.run_dir / "skipped.jsonl", start_update)
        self.tensorboard = TensorBoard(self.run_dir / "tensorboard", start_update=start_update) if tensorboard else None
        self.progress = Progress(total_updates, start_update, log_every=log_every)

    def update(self, record: Mapping[str, Any]) -> None:
        """One completed update.

        Args:
            record: ``update`` (from 0), ``loss``, ``loss_classification``, ``loss_projection``, ``loss_informative``,
                ``loss_per_dataset`` {name: value}, ``lr``, ``grad_norm`` (before clipping), ``loss_scale``, ``tickets``
                (digest), ``world_size``, ``seconds``, ``data_wait_fraction`` (0–1), ``clips_per_second``,
                ``max_memory_gb``, ``skipped`` {name: bad videos so far}. More keys are kept; absent ones are fine.
        """
        if self._closed:
            return
        self.metrics.write(record)
        if self.tensorboard:
            self.tensorboard.update(record)
        self.progress.update(record)

    def event(self, name: str, **fields: Any) -> None:
        """Something happened: `start`, `resume`, `signal`, `checkpoint` (`update`, `seconds`), `requeue`, `end` …"""
        if self._closed:
            return
        self.metrics.sync()
        if name in ("start", "resume"):
            fields = {"update": self.start_update, "total_updates": self.total_updates, **fields}
            if self.metrics.dropped:
                fields = {"redone": self.metrics.dropped, **fields}
        self.events.write(name, **fields)
        if self.tensorboard:
            if name == "checkpoint" and fields.get("seconds") is not None:
                completed = int(fields.get("update", self.start_update))
                self.tensorboard.scalar("checkpoint/save_seconds", float(fields["seconds"]), completed)
            self.tensorboard.flush()

    def validation(self, update: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Validation after `update` completed updates: ``{dataset: {"top1": percent, "top5": percent, …}}``.

        A validation done again after a resume replaces the earlier one in the curves.
        """
        if self._closed:
            return
        self.event("validation", update=update, results=results)
        for dataset, values in results.items():
            for measure, value in values.items():
                if self.tensorboard and measure in MEASURES:
                    self.tensorboard.scalar(f"val/{dataset}/{measure}", float(value), update)
        self.progress.write(f"validation after update {update}:  " + "   ".join(_validated(results)))

    def skipped(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Bad videos and their stand-ins, one line each in `skipped.jsonl`; any rank may call this."""
        for record in records:
            lines.append(self.run_dir / "skipped.jsonl", record)

    def write(self, text: str) -> None:
        """A line for whoever watches."""
        if not self._closed:
            self.progress.write(text)

    def close(self) -> None:
        """Everything to disk. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self.metrics.close()
        if self.tensorboard:
            self.tensorboard.close()
        self.progress.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _validated(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [
        f"{dataset} " + " ".join(f"{m} {values[m]:.2f}" for m in MEASURES if m in values)
        for dataset, values in results.items()
    ]
