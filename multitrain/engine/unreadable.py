"""The count of unreadable videos, and the cap that ends a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from multitrain.records import jsonl


class UnreadableTracker:
    """Distinct unreadable videos per dataset, over all starts of the run.

    Args:
        sizes: videos in each dataset.
        cap: share of a dataset that may be unreadable, 0 to 1.
    """

    def __init__(self, sizes: Mapping[str, int], cap: float) -> None:
        self._sizes = dict(sizes)
        self._cap = cap
        self._paths: dict[str, set[str]] = {name: set() for name in sizes}

    @property
    def counts(self) -> dict[str, int]:
        """Unreadable videos found so far, for the datasets that have any."""
        return {name: len(paths) for name, paths in self._paths.items() if paths}

    def add(self, records: Iterable[Mapping[str, Any]]) -> str | None:
        """Count `records` (with `dataset` and `path`); the one-line reason to stop when a dataset passes its cap."""
        for record in records:
            self._paths.setdefault(str(record["dataset"]), set()).add(str(record["path"]))
        for name, paths in self._paths.items():
            most = max(1, int(self._cap * self._sizes.get(name, 0))) if self._cap else 0
            if len(paths) > most:
                return (
                    f"{len(paths)} of {self._sizes.get(name, 0)} videos of dataset {name!r} cannot be read, more than "
                    f"data.skip_cap={self._cap:g} allows; see skipped.jsonl for their names and reasons, mend them, or raise the cap"
                )
        return None

    def add_file(self, path: Path) -> None:
        """Count what earlier starts of the run have recorded in `skipped.jsonl`."""
        self.add(record for record in jsonl.read(path) if {"dataset", "path"} <= record.keys())
