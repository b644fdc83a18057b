"""`make demo` from data to report, with few videos and updates; a second time it uses what is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def demo(root: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    few = ("updates=3", "checkpoint.every=2", "eval.every=3")
    where = ("--runs", str(folder / "runs"), "--data", str(folder / "data"), "--fraction", "0.001")
    command = [sys.executable, str(root / "launch/demo.py"), *where, *few, *more]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.timeout(600)
def test_the_demo_goes_from_nothing_to_a_report_and_starts_over_only_when_told(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    pytest.importorskip("matplotlib")
    first = demo(root, tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    for name in ("shapes", "motions", "scenes", "chance %"):
        assert name in first.stdout
    run = tmp_path / "runs/demo"
    assert (run / "report/report.html").is_file()
    lines = (run / "metrics.jsonl").read_bytes()
    assert lines.count(b"\n") == 3
    second = demo(root, tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"To start over: rm -r {run}" in second.stdout
    assert (run / "metrics.jsonl").read_bytes() == lines


def test_a_wrong_option_is_refused_before_anything_is_trained(root: Path, tmp_path: Path) -> None:
    done = demo(root, tmp_path, "optim.lrr=1")
    assert done.returncode == 2
    assert "lrr" in done.stderr
    assert not (tmp_path / "runs/demo").exists()


@pytest.mark.timeout(600)
def test_an_interrupted_demo_saves_before_it_leaves(root: Path, tmp_path: Path) -> None:
    """SIGINT to the whole group, as a terminal sends it."""
    pytest.importorskip("deepspeed")
    where = ("--runs", str(tmp_path / "runs"), "--data", str(tmp_path / "data"), "--fraction", "0.001")
    command = [sys.executable, str(root / "launch/demo.py"), *where, "updates=100000", "checkpoint.every=100000"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    metrics = tmp_path / "runs/demo/metrics.jsonl"
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 600
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 75, (tmp_path / "log").read_text()
    assert list((tmp_path / "runs/demo/checkpoints").glob("update-*/manifest.json"))
    assert "run the demo again" in (tmp_path / "log").read_text()
