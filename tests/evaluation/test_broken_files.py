"""Each broken file in training, testing and prediction: replaced and recorded, listed and not scored, one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from material import NO_VIDEO, PLAYABLE, kind, names
from support import settings, start_ranks, train, wait, write_dataset, write_run

from multitrain.config import validate
from multitrain.data.decode import VideoError
from multitrain.evaluation.evaluator import evaluate
from multitrain.evaluation.predictor import load

pytestmark = pytest.mark.timeout(600)
PARTLY = {f"truncated_faststart_{n}.mp4" for n in (50, 95)} | {"decord_corrupted.mp4", "zeroed_middle.mp4"}
"""Files of which a part is whole: they are answered where all frames that are asked for lie in it."""


@pytest.fixture(scope="module")
def data(broken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`odd`: every broken file once, and eight good ones."""
    folder = tmp_path_factory.mktemp("broken") / "odd"
    write_dataset(folder, 8, 2, seed=3)
    for file in sorted(broken.iterdir()):
        (folder / file.name).symlink_to(file)
    lines = (folder / "test.csv").read_text() + "".join(f"{f.name} 0\n" for f in sorted(broken.iterdir()))
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text(lines)
    return folder


def configured(data: Path, **changes: Any) -> dict[str, Any]:
    entry = {"annotations": str(data), "videos": str(data), "classes": 2, "temporal_views": 2}
    mapping = settings(data, updates=6, effective_batch=8, micro_batch=4, **changes)
    mapping["data"] |= {"datasets": {"odd": entry}, "workers": 2}
    mapping["loss"] = {"projection_weight": 0}
    return mapping


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that saw every file at least once, to its end."""
    run, _ = write_run(tmp_path_factory.mktemp("runs"), configured(data, name="trained", data__skip_cap=1.0))
    train(run, 1)
    return run


def test_training_replaces_what_cannot_be_read_and_writes_it_down(trained: Path, broken: Path) -> None:
    skipped = [json.loads(line) for line in (trained / "skipped.jsonl").read_text().splitlines()]
    unreadable = {record["path"] for record in skipped}
    assert unreadable >= names(broken, *NO_VIDEO)
    assert not unreadable & names(broken, *PLAYABLE)
    assert all(r["reason"] and r["stand_in"] != r["path"] for r in skipped)
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 6


def test_training_stops_at_the_cap_and_says_why(data: Path, tmp_path: Path) -> None:
    run, _ = write_run(tmp_path, configured(data, name="capped"))
    (code,) = wait(start_ranks(["-m", "multitrain.train", str(run)], 1, log=run / "log.txt"))
    assert code not in (0, 75)
    assert "skip_cap" in (run / "log.txt").read_text()


def test_testing_lists_what_cannot_be_read_and_scores_the_rest(
    data: Path, broken: Path, trained: Path, tmp_path: Path
) -> None:
    model = load(trained)
    done = evaluate(model, validate(configured(data)), ["odd"], out_dir=tmp_path)
    result = done.results["odd"]
    scores = np.load(tmp_path / "odd" / "scores.npz")
    scored, lost = set(scores["paths"].tolist()), {Path(u["path"]).name for u in result["unreadable"]}
    listed = {line.rpartition(" ")[0] for line in (data / "test.csv").read_text().splitlines()}
    assert scored | lost == listed
    assert not scored & lost
    assert scored >= names(broken, *PLAYABLE)
    good = {f"v {i}.mp4" for i in range(8)}
    assert scored <= good | names(broken, *PLAYABLE, *PARTLY)
    assert lost >= names(broken, *NO_VIDEO, "bitflips_mdat.mp4")
    assert all(u["reason"] for u in result["unreadable"])
    assert result["coverage"] == len(scored) / len(listed)
    assert f"({len(scored)}/{len(listed)})" in done.table
    for path, row in zip(scores["paths"], scores["scores"]):  # what is scored is what the file shows
        if str(path).endswith(("one_frame.mp4", "as.avi", "_95.mp4")):
            expected = model.probabilities_of(data / str(path), views="test")["odd"] * 2
            torch.testing.assert_close(torch.from_numpy(row), expected, atol=1e-5, rtol=0)


def test_prediction_gives_an_answer_or_one_clear_error(broken: Path, trained: Path) -> None:
    model = load(trained)
    for file in sorted(broken.iterdir()):
        answer, error = None, ""
        try:
            answer = model.predict(file)
        except VideoError as raised:
            error = str(raised)
        if answer is None:
            assert kind(file.name) not in PLAYABLE
            assert error.startswith(f"{file}: ")
            assert "\n" not in error
        else:
            assert sum(p for _, p in answer["odd"]) == pytest.approx(1, abs=1e-5)
            assert kind(file.name) in {*PLAYABLE, *PARTLY}, file.name
