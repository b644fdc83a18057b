"""Other backbones train as the published one does: the page's own example and MViTv2, interrupted, resumed, equal bit for bit."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, settings, start_ranks, wait, write_run

from tests.engine.test_resume import assert_same_bits, metrics

SIZE = {"frames": 4, "crop": 64, "head_hidden": 24, "head_dropout": 0.5, "expander_hidden": 32}
NETWORKS: dict[str, dict[str, Any]] = {
    "own": SIZE | {"backbone": "mynet:build", "backbone_args": {"width": 16, "dropout": 0.3}},
    "mvitv2": SIZE
    | {
        "backbone": "mvitv2",
        "depth": 3,
        "width": 16,
        "stages": [1],
        "kv_stride": 4,
        "drop_path": 0.3,
        "channels": "bgr",
    },
}


def page_example() -> str:
    """The Python code of docs/backbones.md."""
    page = (ROOT / "docs" / "backbones.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    return str(code)


def train(run: Path, folder: Path, stop_after: int | None = None) -> list[int]:
    """Two ranks; with `stop_after`, a SIGTERM once so many updates are recorded."""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests:{folder}"}
    log = run / "ranks.log"
    processes = start_ranks(["-m", "multitrain.train", str(run)], 2, log=log, environment=environment, anew=True)
    deadline = time.monotonic() + 600
    while stop_after is not None and not ((run / "metrics.jsonl").exists() and len(metrics(run)) >= stop_after):
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        assert all(p.poll() is None for p in processes), log.read_text()[-4000:]
        time.sleep(0.005)
    if stop_after is not None:
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)
    codes = wait(processes)
    assert stop_after is not None or codes == [0, 0], log.read_text()[-4000:]
    return codes


@pytest.mark.parametrize("name", NETWORKS)
def test_an_interrupted_run_ends_in_the_bits_of_an_undisturbed_one(name: str, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "mynet.py").write_text(page_example())
    changes = {"model": NETWORKS[name], "loss__informative_weight": 0.1, "activation_checkpointing": "selective"}
    runs = []
    for kind in ("whole", "stopped"):
        run, _ = write_run(tmp_path / kind, settings(tiny_data, updates=5, gpus=2, **changes))
        runs.append(run)
    train(runs[0], tmp_path)
    train(runs[1], tmp_path, stop_after=2)
    assert len(metrics(runs[1])) < 5
    train(runs[1], tmp_path)
    assert_same_bits(runs[1], runs[0])
