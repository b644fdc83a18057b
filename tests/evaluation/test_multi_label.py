"""Several labels a video, mixed with single-label datasets: trained, validated and tested end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import settings, train, write_run

from multitrain.config import load as load_config
from multitrain.evaluation.evaluator import evaluate
from multitrain.evaluation.predictor import load


@pytest.mark.timeout(200)
def test_several_labels_a_video_train_with_single_ones_and_are_measured_by_map(tiny_data: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    labels = ("0", "0,2", "1", "1,2", "2", "0,1,2", "1", "0")
    lines = "".join(f"v {i}.mp4 {label}\n" for i, label in enumerate(labels))
    for split in ("train", "val", "test"):
        (many / f"{split}.csv").write_text(lines)
    mapping = settings(tiny_data, updates=3, effective_batch=8, eval__every=3, augment__label_smoothing=0.1)
    entry = {"annotations": str(many), "videos": str(tiny_data / "stride"), "classes": 3, "multi_label": True}
    mapping["data"]["datasets"] = {"single": mapping["data"]["datasets"]["stride"], "many": entry}
    run, _ = write_run(tmp_path / "runs", mapping)
    train(run, 1)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0.3 < metrics[0]["loss_per_dataset"]["many"] < 1.5  # binary cross-entropy, ln 2 at the start
    assert metrics[0]["loss_per_dataset"]["single"] > 1.2  # cross-entropy of five classes, ln 5
    validated = [
        e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["event"] == "validation"
    ]
    assert '"map"' in json.dumps(validated) or "map" in (run / "metrics.jsonl").read_text()
    model = load(run)
    assert model.multi_label == frozenset({"many"}) or set(model.multi_label) == {"many"}
    done = evaluate(model, load_config(run), ["single", "many"], out_dir=tmp_path / "out")
    assert 0 < done.results["many"]["map"] <= 100
    assert "map" not in done.results["single"]
    assert "many mAP" in done.table
    assert "(8/8)" in done.table
