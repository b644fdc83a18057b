"""TensorBoard: scalars, settings, images. The horizontal axis counts completed updates."""

from __future__ import annotations

import contextlib
import math
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SCALARS = {
    "loss": "train/loss",
    "loss_classification": "train/loss_classification",
    "loss_projection": "train/loss_projection",
    "loss_informative": "train/loss_informative",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "loss_scale": "train/loss_scale",
    "clips_per_second": "perf/clips_per_second",
    "data_wait_fraction": "perf/data_wait_fraction",
    "seconds": "perf/update_seconds",
    "max_memory_gb": "perf/max_memory_gb",
}
"""Keys of a record in `metrics.jsonl` and their TensorBoard names."""

PER_DATASET = {"loss_per_dataset": "train/loss_", "skipped": "data/skipped_"}
"""Keys with one number per dataset, and the prefix of their TensorBoard names."""


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The TensorBoard names and values of one update's record; absent and null values are left out."""
    for key, tag in SCALARS.items():
        if record.get(key) is not None:
            yield tag, float(record[key])
    for key, prefix in PER_DATASET.items():
        for name, value in (record.get(key) or {}).items():
            if value is not None:
                yield prefix + name, float(value)


RGB_COLORSPACE = 3
"""TensorBoard's code for the RGB colour space."""


def _hide_write_errors() -> None:
    """Print no traceback of the library's writing thread: it raises its error again at the next call, where it is caught."""
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    before = threading.excepthook
    if getattr(before, "hides_write_errors", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.thread, _AsyncWriterThread) and isinstance(args.exc_value, OSError)):
            before(args)

    hook.hides_write_errors = True  # type: ignore[attr-defined]
    threading.excepthook = hook


class TensorBoard:
    """Writes scalars to a folder; points of updates that a resumed run repeats are hidden (`purge_step`).

    Points that cannot be written are left out (`metrics.jsonl` has them all), and every :meth:`flush` tries again.

    Args:
        folder: e.g. ``RUN/tensorboard``.
        start_update: updates completed when the run (re)starts.
        say: called with one line when points are left out.
    """

    def __init__(
        self, folder: str | Path, *, start_update: int = 0, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self._folder = folder
        self._say = say
        self._writer: SummaryWriter | None = self._open(start_update + 1)

    def _open(self, purge_step: int | None) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        _hide_write_errors()
        return SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=30)

    def _guarded(self, action: Callable[[SummaryWriter], Any]) -> None:
        """Run `action`; write errors are caught (the library's thread keeps an error and raises it at a later call)."""
        if self._writer is None:
            return
        try:
            action(self._writer)
        except OSError as error:
            self._writer = None
            self._say(f"{self._folder} cannot be written ({error.strerror or error}); its curves will have a gap here")

    def update(self, record: Mapping[str, Any]) -> None:
        """Write the scalars of one update."""
        for tag, value in scalars(record):
            self.scalar(tag, value, int(record["update"]) + 1)

    def scalar(self, tag: str, value: float, completed: int) -> None:
        """Write one scalar after `completed` updates."""
        value = value if math.isfinite(value) else math.nan
        self._guarded(lambda writer: writer.add_scalar(tag, value, completed))

    def picture(self, tag: str, png: bytes, completed: int) -> None:
        """Write a PNG image after `completed` updates; its bytes are stored unchanged."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(width=width, height=height, colorspace=RGB_COLORSPACE, encoded_image_string=png)
        stored = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._guarded(lambda writer: writer._get_file_writer().add_summary(stored, completed))  # type: ignore[no-untyped-call]

    def settings(self, values: Mapping[str, Any], measures: Sequence[str]) -> None:
        """Write the HPARAMS tab: the settings, and the names of the scalars to compare."""
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()}
        first = hparams(plain, dict.fromkeys(measures, 0.0))[:2]  # the third summary would end the session
        self._guarded(lambda writer: [writer._get_file_writer().add_summary(s) for s in first])  # type: ignore[no-untyped-call]

    def flush(self) -> None:
        """Write the buffered points."""
        if self._writer is None:
            with contextlib.suppress(OSError):
                self._writer = self._open(None)
        self._guarded(lambda writer: writer.flush())

    def close(self) -> None:
        """Write the buffered points and close. Idempotent."""
        self._guarded(lambda writer: writer.close())
