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
    done = submit("purged", "updates=3")
    assert done.returncode == 2, done.stdout + done.stderr
    said = done.stdout + done.stderr + "".join(p.read_text() for p in (run / "logs").iterdir() if p.is_file())
    assert "the run has written some, up to update 2" in said
    assert "from_scratch=true" in said
    assert "Traceback" not in said
    assert (run / "metrics.jsonl").read_bytes() == before
    done = submit("purged", "updates=3", "from_scratch=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [m["update"] for m in metrics(run)] == [0, 1, 2]
