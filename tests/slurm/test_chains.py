"""What follows a run on a real controller: tests after training, sweeps, data preparation as an array."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import write_video

from tests.slurm.drill import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]


def call(data: Path, *command: str, expect: int = 0) -> str:
    environment = os.environ | {"TINY_DATA": str(data), "MULTITRAIN_PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


def queue(cluster: Cluster, form: str = "%i %j %E") -> list[str]:
    return cluster.run("squeue", "--noheader", f"--format={form}").splitlines()


def test_tests_wait_for_the_last_end_of_training_and_go_when_it_is_cancelled(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    submit = [
        sys.executable,
        "launch/submit.py",
        "--config-dir",
        "tests/configs",
        "experiment=tiny",
        f"runs={tmp_path}",
    ]
    said = call(tiny_data, *submit, "name=chain", "cluster.partition=low", "gpus=1", "updates=5000", "then=eval")
    job = next(line.split()[1] for line in said.splitlines() if line.startswith("job "))
    assert said.count("tests ") == 3
    cluster.until(lambda: (tmp_path / "chain" / "metrics.jsonl").exists(), "the first update")
    cluster.evict()
    cluster.until(lambda: cluster.job(job).get("Restarts") == "1", "the requeue")
    waiting = [line for line in queue(cluster) if "-test-" in line]
    assert len(waiting) == 3
    assert all(f"afterok:{job}(unfulfilled)" in line for line in waiting)
    cluster.run("scancel", job)
    cluster.until(lambda: not [line for line in queue(cluster) if "-test-" in line], "tests that go with the training")


def test_tests_do_not_need_the_nodes_of_the_training_and_refused_ones_leave_it_in_the_queue(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    submit = [
        sys.executable,
        "launch/submit.py",
        "--config-dir",
        "tests/configs",
        "experiment=tiny",
        f"runs={tmp_path}",
    ]
    submit += ["cluster.partition=low", "nodes=2", "gpus=1", "updates=5000", "then=eval"]
    said = call(tiny_data, *submit, "name=named", "cluster.nodelist='node[1-2]'")
    assert said.count("tests ") == 3
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    refused = "sbatch: error: Batch job submission failed: Requested node configuration is not available"
    (bin_ / "sbatch").write_text(
        f'#!/bin/sh\nfor last; do :; done\ngrep -q afterok "$last" && {{ echo "{refused}" >&2; exit 1; }}\n'
        f'exec {shutil.which("sbatch")} "$@"\n'
    )
    (bin_ / "sbatch").chmod(0o755)
    environment = os.environ | {"TINY_DATA": str(tiny_data), "PATH": f"{bin_}:{os.environ['PATH']}"}
    command = [*submit, "name=untested"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    job = done.stdout.split()[1]
    assert f"training is job {job}; its tests were refused: " in done.stderr
    assert "Requested node configuration is not available" in done.stderr
    assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "CONFIGURING")


def test_a_sweep_is_one_array_and_each_dataset_is_tested(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    sweep = [sys.executable, "launch/sweep.py", "--config-dir", "tests/configs", "experiment=tiny", f"runs={tmp_path}"]
    broken = tmp_path / "no.pyth"
    broken.write_text("no weights")
    options = [
        "name=s",
        "cluster.partition=low",
        "gpus=1",
        "updates=2",
        f"init_from=null,{broken}",
        "cluster.check_data=false",
        "--wait",
        "--json",
    ]
    said = call(tiny_data, *sweep, *options, expect=1)
    found = json.loads(said.splitlines()[-1])
    assert [r["state"] for r in found["runs"]] == ["finished", "failed"]


def test_prepare_shares_the_files_among_an_arrays_tasks(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    videos = tmp_path / "v"
    videos.mkdir()
    for i in range(5):
        write_video(videos / f"{i}.mp4", i)
    (videos / "bad.mp4").write_text("no video")
    out = tmp_path / "out"
    command = ["sbatch", "--parsable", "--array=3-4", "--cpus-per-task=1", "--mem=1000", f"--output={tmp_path}/%a.log"]
    job = call(tiny_data, *command, "slurm/prepare.sh", "check", str(videos), "--out", str(out)).strip()
    for task in (3, 4):
        cluster.wait(f"{job}_{task}", "COMPLETED")
    assert [line.split(",")[4] for line in (out / "check.csv").read_text().splitlines()[1:]] == ["bad.mp4"]
    assert {p.name for p in out.glob("check-*.jsonl")} == {"check-0-of-2.jsonl", "check-1-of-2.jsonl"}
