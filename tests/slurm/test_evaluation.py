"""`sbatch slurm/eval_k400.sh` on a real controller: preempted in the middle, the scores are those of one undisturbed rank."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from multitrain.config import dump, validate
from multitrain.engine import checkpoint as checkpoints
from multitrain.engine.checkpoint import Checkpoint
from multitrain.evaluation.shards import ShardReader
from multitrain.model import MultiTrain
from tests import support
from tests.slurm.drill import Cluster, scorers

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
BROKEN = "broken.mp4"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a checkpoint whose `kinetics` has 60 videos for tests, of which one cannot be read."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(60):
        support.write_video(folder / f"{number}.mp4", number, frames=50, size=(160, 128))
    (folder / "7.mp4").rename(folder / BROKEN)
    (folder / BROKEN).write_bytes(b"no video")
    lines = [f"{BROKEN if n == 7 else f'{n}.mp4'} {n % 2}" for n in range(60)]
    (folder / "test.csv").write_text("\n".join(lines) + "\n")
    (folder / "classes.txt").write_text("calm\nfight\n")
    settings = support.settings(tmp_path / "none")
    kinetics = {
        "annotations": str(folder),
        "videos": str(folder),
        "classes": 2,
        "temporal_views": 10,
        "spatial_views": 3,
    }
    settings["data"] |= {"datasets": {"kinetics": kinetics}, "index": str(tmp_path / "index")}
    settings |= {"loss": {"projection_weight": 0, "informative_weight": 0}}
    settings["model"] |= {"expander": False, "projections": False, "frames": 8}
    folder, config = support.write_run(tmp_path / "runs", settings)
    torch.manual_seed(0)
    model = MultiTrain(config.model, {"kinetics": 2})
    state = {"update": 1, "model": config.model.model_dump(mode="json"), "datasets": {"kinetics": 2}}
    weights = {n: t.clone() * (30 if n.startswith("heads.") else 1) for n, t in model.state_dict().items()}
    checkpoints.write(folder / "checkpoints", Checkpoint(weights, {}, state), dump(validate(settings)))
    return folder


def scored(out: Path) -> collections.Counter[int]:
    """How often each video has a record, over all shards of all ranks and starts."""
    found: collections.Counter[int] = collections.Counter()
    for file in sorted((out / "kinetics" / "shards").glob("*.scores")):
        content = file.read_bytes()
        header = json.loads(content[16 : 8 + int.from_bytes(content[:4], "little")]) if len(content) > 16 else {}
        reader = ShardReader(file.parent, header)
        reader._read_scores(file)
        found.update(reader.scores.keys())
    return found


def test_an_evaluation_of_four_ranks_that_was_preempted_has_the_bits_of_one_undisturbed_rank(
    cluster: Cluster, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sbatch = ["sbatch", "--parsable", "--partition=low", "--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2"]
    sbatch += ["--cpus-per-task=1", "--signal=USR2@30", "--time=10", f"--output={tmp_path}/job.log"]
    sbatch += ["slurm/eval_k400.sh", str(run), "data.workers=0", "eval.videos_per_batch=1", "--device=cpu"]
    environment = os.environ | {"OUT": str(out), "MULTITRAIN_PYTHON": sys.executable, "MULTITRAIN_HOME": str(ROOT)}
    submitted = subprocess.run(sbatch, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()

    def begun() -> bool:
        info = cluster.job(job)
        assert info["JobState"] in ("PENDING", "RUNNING", "CONFIGURING"), (tmp_path / "job.log").read_text()
        return len(list((out / "kinetics" / "shards").glob("*.scores"))) == 4

    cluster.until(begun, "a shard of each of four ranks")
    cluster.preempt(job, scorers(out))
    before = scored(out)
    assert 0 < len(before) < 59, "not in the middle"
    cluster.start_now(job)
    info = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    assert info["JobState"] == "COMPLETED", (tmp_path / "job.log").read_text()

    after = scored(out)
    assert sorted(after) == [i for i in range(60) if i != 7]
    assert set(after.values()) == {1}, "a video was scored twice"
    alone = tmp_path / "alone"
    command = [sys.executable, "-m", "multitrain", "evaluate", str(run), "--out", str(alone), "--device=cpu"]
    subprocess.run([*command, "data.workers=0", "eval.videos_per_batch=1"], cwd=ROOT, check=True, capture_output=True)
    ours, theirs = (np.load(folder / "kinetics" / "scores.npz") for folder in (out, alone))
    for key in theirs.files:
        assert ours[key].tobytes() == theirs[key].tobytes(), key
    assert len(np.unique(ours["scores"], axis=0)) > 30  # the videos are told apart
    assert (out / "metrics.json").read_text() == (alone / "metrics.json").read_text()
    assert "(59/60)" in (out / "table.txt").read_text()
    (lost,) = json.loads((out / "kinetics" / "metrics.json").read_text())["unreadable"]
    assert lost["path"].endswith(BROKEN)
