"""docs/own-videos.md: its three commands, run as they stand there, take a folder of videos to a tested model and its report."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from multitrain.data.demo import main as make_demo

ROOT = Path(__file__).resolve().parents[2]
SHORT = (
    "cluster=local",
    "updates=6",
    "eval.every=3",
    "checkpoint.every=3",
    "model.depth=2",
    "model.stages=[1]",
    "model.frames=4",
)
"""The page's run takes minutes; six updates of a smaller network show that its commands fit together."""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with videos in class folders, as a user has it."""
    place = tmp_path_factory.mktemp("own")
    assert make_demo(["--out", str(place / "demo"), "--fraction", "0.02"]) == 0
    names = (place / "demo/shapes/annotations/classes.txt").read_text().split()
    for split in ("train", "val", "test"):
        for line in (place / f"demo/shapes/annotations/{split}.csv").read_text().splitlines():
            path, _, label = line.rpartition(" ")
            target = place / "clips" / names[int(label)] / f"{split} {Path(path).name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(place / "demo/shapes/videos" / path, target)
    (place / "clips/notes.txt").write_text("about these videos")
    return place


def test_the_three_commands_of_the_page(clips: Path) -> None:
    page = (ROOT / "docs/own-videos.md").read_text()
    first = re.search(r"```bash\n(.*?)```", page, re.DOTALL)
    assert first is not None
    commands = [shlex.split(line, comments=True) for line in first[1].splitlines()]
    assert len(commands) == 3
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    said = []
    for command in commands:
        assert command[0] == "multitrain"
        words = [*command[1:], *(SHORT if command[1] == "submit" else ())]
        done = subprocess.run(
            [sys.executable, "-m", "multitrain", *words],
            cwd=clips,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout + done.stderr)
    imported, trained, reported = said
    assert "passed over 1 file without a video's suffix (1 .txt; first: 'notes.txt')" in imported
    assert shlex.join(commands[1][1:]) in imported, "the import prints the page's second command"
    assert "auto    " in trained
    assert "no GPU on this machine" in trained
    assert f"report {clips}/runs/mine" in trained
    assert (clips / "runs/mine/report/report.html").is_file(), reported
    assert list((clips / "runs/mine/evaluation").rglob("metrics.json")), "the best checkpoint is tested"
