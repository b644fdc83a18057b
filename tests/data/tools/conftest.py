"""What the tests of the data tools share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No workers: starting them takes most of the time of a small task, and another user may not run this interpreter."""
    from multitrain.data.tools import parallel_map

    def map_resumable(
        items: Iterable[Any], work: parallel_map.Work, **_: object
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        for item in items:
            yield item, work(item)

    monkeypatch.setattr(parallel_map, "map_resumable", map_resumable)
