"""An exported folder is the model, and its card tells the truth about it."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import sys
import threading
import types
from functools import partial
from pathlib import Path

import pytest
import torch

import multitrain
from multitrain.config import ConfigError, dump
from multitrain.engine import checkpoint as checkpoints
from multitrain.interop.export import export, main, upload
from multitrain.model import MultiTrain
from tests import support

DATASETS = {"stride": 5, "segment": 3, "with.dot": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, names of one dataset's classes, and a test of the newer checkpoint."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "data/segment").mkdir(parents=True)
    (folder / "data/segment/classes.txt").write_text("walk\nrun\nstand\n")
    run, config = support.write_run(folder / "runs", support.settings(folder / "data"))
    for update in (5, 9):
        torch.manual_seed(update)
        model = MultiTrain(config.model, DATASETS)
        state = {
            "update": update,
            "datasets": DATASETS,
            "multi_label": [],
            "model": config.model.model_dump(mode="json"),
        }
        weights = {k: v.detach() for k, v in model.state_dict().items()}
        checkpoints.write(run / "checkpoints", checkpoints.Checkpoint(weights, {}, state), dump(config))
    (run / "overrides.yaml").write_text(
        "- overrides: [nodes=2, 'data.root=/a b', updates=10]\n- overrides: [nodes=4]\n"
    )
    test = run / "evaluation/update-00000009/test"
    test.mkdir(parents=True)
    figures = {
        "dataset": "stride",
        "head": "stride",
        "split": "test",
        "videos": 9,
        "scored": 8,
        "views": [5, 1],
        "top1": 62.5,
        "top5": 100.0,
    }
    other = figures | {"head": "segment", "top1": 1.0}
    (test / "metrics.json").write_text(json.dumps({"datasets": {"stride": figures, "stride.by.segment": other}}))
    return run


def test_the_exported_model_is_the_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out")
    assert sorted(p.name for p in done.folder.iterdir()) == [
        "README.md",
        "class_names.json",
        "config.json",
        "model.safetensors",
    ]
    model, original = multitrain.load(done.folder / "model.safetensors"), multitrain.load(run)
    clips = torch.randn(2, 3, model.config.frames, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(clips).values(), original(clips).values()))
    assert model.datasets == DATASETS
    assert json.loads((done.folder / "class_names.json").read_text()) == {"segment": ["walk", "run", "stand"]}
    assert model.class_names["segment"] == ["walk", "run", "stand"]


def test_the_card_has_the_results_of_that_checkpoint_the_command_and_the_checksum(run: Path, tmp_path: Path) -> None:
    card = (export(run, tmp_path / "out").folder / "README.md").read_text()
    assert "| stride | test | 5 × 1 | 8 of 9 | 62.50 | 100.00 |" in card
    assert "by.segment" not in card
    assert "python launch/submit.py name=tiny nodes=4 'data.root=/a b' updates=10" in card
    digest = hashlib.sha256((tmp_path / "out/model.safetensors").read_bytes()).hexdigest()
    assert digest in card
    parameters = sum(p.numel() for p in multitrain.load(run).parameters())
    assert f"{parameters:,} parameters" in card
    assert "not known for stride, with.dot" in card
    older = (export(run / "checkpoints/update-00000005", tmp_path / "old").folder / "README.md").read_text()
    assert "62.50" not in older  # the test was of the other checkpoint
    assert "Not tested yet" in older


def test_a_folder_in_use_and_an_evaluation_that_is_not_there_are_refused(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path)
    with pytest.raises(ConfigError, match="--force"):
        export(run, tmp_path)
    export(run, tmp_path, force=True)
    with pytest.raises(ConfigError, match="no finished evaluation"):
        export(run, tmp_path / "b", evaluation=tmp_path / "nowhere")
    assert not (tmp_path / "b").exists()


def test_the_command_prints_json_for_scripts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["datasets"] == DATASETS


def test_uploading_needs_the_extra_and_a_refusal_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a stand-in: there is none to talk to here."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"multitrain\[hub\]"):
        upload(tmp_path, "lab/model")

    class Refusing:
        def create_repo(self, *_: object, **__: object) -> None:
            raise RuntimeError("401\nUnauthorized")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Refusing))
    with pytest.raises(ConfigError, match="401 Unauthorized"):
        upload(tmp_path, "lab/model")


def test_torch_hub_loads_it_from_a_checkout_and_by_address(
    run: Path, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(run, tmp_path / "out").folder
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    model = torch.hub.load(
        str(root),
        "multitrain",
        str(folder / "model.safetensors"),
        source="local",
        class_names={"stride": list("abcde")},
    )
    assert model.class_names["stride"] == list("abcde")
    assert model.datasets == DATASETS
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/model.safetensors?download=true"
        model = torch.hub.load(str(root), "multitrain", address, source="local", trust_repo=True)
        server.shutdown()
    assert model.datasets == DATASETS
    assert [re.sub("^.{8}-", "", p.name) for p in tmp_path.glob("cache/hub/checkpoints/*")] == ["model.safetensors"]
