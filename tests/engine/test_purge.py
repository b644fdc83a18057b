"""Checkpoints that should be there and are not: a purge of the disk, another file system in their place. The user's own commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from engine.test_resume import metrics


def test_a_run_whose_checkpoints_are_gone_starts_over_only_on_purpose(
    tiny_data: Path, tmp_path: Path, root: Path
) -> None:
    def submit(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch/submit.py", *words, f"runs={tmp_path}", "cluster=local", "gpus=1"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {
            "TINY_DATA": str(tiny_data)
        }
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)

    first = ("--config-dir", "tests/configs", "experiment=tiny", "name=purged", "updates=2", "checkpoint.every=1")
    done = submit(*first)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "purged"
    before = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    told = "the run has written some, up to update 2"
    for words in (["dry_run=true"], []):
        done = submit("purged", "updates=3", *words)
        assert done.returncode == 2, done.stdout + done.stderr
        assert told in done.stderr
        assert "from_scratch=true" in done.stderr
        assert "Traceback" not in done.stderr
    command = [sys.executable, "-m", "multitrain.train", str(run)]  # as a requeued job
    done = subprocess.run(command, cwd=run / "code", capture_output=True, text=True, check=False)
    assert (done.returncode, told in done.stderr) == (2, True), done.stderr
    assert (run / "metrics.jsonl").read_bytes() == before
    done = submit("purged", "updates=3", "from_scratch=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [m["update"] for m in metrics(run)] == [0, 1, 2]
