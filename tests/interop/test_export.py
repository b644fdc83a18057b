"""An exported folder is the model, and its card tells the truth about it."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import sys
import threading
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import multitrain
from multitrain import cli
from multitrain.config import ConfigError, ModelConfig, dump
from multitrain.engine import checkpoint as checkpoints
from multitrain.interop.convert import convert
from multitrain.interop.export import FILES, export, main, upload
from multitrain.interop.layout import layout
from multitrain.interop.weights import HEADER
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
        "- overrides: [nodes=2, 'data.root=/a b', updates=10, cluster.account=p_secret, +cluster.partition=boost]\n"
        "  config_dirs: [/home/somebody/my-groups]\n"
        "- overrides: [nodes=4, 'init_from=/scratch/somebody/a.pyth', runs=/work/somebody]\n"
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
    assert "python launch/submit.py name=tiny nodes=4 updates=10 --config-dir my-groups\n" in card
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


def everything_in(folder: Path) -> str:
    """All texts of an export, the description in the header of its weights included."""
    weights = folder / "model.safetensors"
    with safe_open(weights, framework="pt") as file:
        header = json.dumps(file.metadata())
    texts = [p.read_text() for p in folder.iterdir() if p != weights]
    return "\n".join([header, *texts])


def test_an_export_holds_no_optimizer_and_names_no_place_account_user_or_machine(tmp_path: Path) -> None:
    values = support.settings(tmp_path / "data")
    values["cluster"] |= {"account": "p_secret", "partition": "boost", "setup": ["source /home/somebody/env"]}
    values["cluster"] |= {"sbatch": {"mail-user": "somebody@lab.org"}, "python": "/home/somebody/bin/python"}
    values |= {"init_from": "/scratch/somebody/a.pyth"}
    values["monitor"] = {"wandb": "secret-project"}
    run, config = support.write_run(tmp_path / "runs", values)
    model = MultiTrain(config.model, DATASETS)
    weights = {k: v.detach() for k, v in model.state_dict().items()}
    moments = {f"{m}.{k}": v for k, v in weights.items() for m in ("exp_avg", "exp_avg_sq")}
    state = {"update": 1, "datasets": DATASETS, "multi_label": [], "model": config.model.model_dump(mode="json")}
    checkpoints.write(run / "checkpoints", checkpoints.Checkpoint(weights, moments, state), dump(config))
    (run / "overrides.yaml").write_text(
        "- overrides: [cluster.account=p_secret, 'data.root=/home/somebody/d', updates=3]\n"
    )
    folder = export(run, tmp_path / "out").folder
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    text = everything_in(folder)
    leaked = ["p_secret", "boost", "somebody", "secret-project", "/home", "/scratch", str(tmp_path), "update-0000"]
    assert [word for word in leaked if word in text] == []
    found = multitrain.load(folder / "model.safetensors").run
    assert (found.updates, found.effective_batch, found.model) == (config.updates, config.effective_batch, config.model)
    published = tmp_path / "a.pyth"
    convert(run, published)
    again = everything_in(export(published, tmp_path / "again").folder)
    assert str(tmp_path) not in again


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_files_of_an_export_and_a_conversion_have_the_mode_that_the_umask_says(
    run: Path, tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        export(run, tmp_path / "out")
        convert(run, tmp_path / "a.pyth")
        convert(run, tmp_path / "b.safetensors")
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) >= 7
    assert {oct(p.stat().st_mode & 0o777) for p in files} == {oct(0o666 & ~umask)}


class Hub:
    """A stand-in for the hub: it keeps what it is given."""

    given: dict[str, Any] = {}  # noqa: RUF012

    def create_repo(self, repository: str, **options: Any) -> None:
        Hub.given["create"] = options

    def upload_folder(self, **options: Any) -> str:
        Hub.given["upload"] = options
        return "address"


def test_only_the_listed_files_are_uploaded_and_only_to_a_private_place(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Hub))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/secret.txt").write_text("mine")
    (tmp_path / "out/optimizer.safetensors").write_text("mine")
    assert main([str(run), str(tmp_path / "out"), "--upload", "lab/model"]) == 0
    assert "not uploaded: optimizer.safetensors, secret.txt" in capsys.readouterr().out
    assert Hub.given["create"]["private"] is True
    assert Hub.given["upload"]["allow_patterns"] == list(FILES)
    assert (tmp_path / "out/secret.txt").read_text() == "mine"
    assert main([str(run), str(tmp_path / "out"), "--force", "--upload", "lab/model", "--public"]) == 0
    assert Hub.given["create"]["private"] is False


def test_whatever_lies_where_an_export_or_a_conversion_goes_stays_as_it_is(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints/update-00000009"
    before = {p: (p.is_symlink(), p.read_bytes()) for p in run.rglob("*") if p.is_file()}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "README.md").write_text("mine")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "README.md").symlink_to(foreign / "README.md")
    full = tmp_path / "full"
    (full / "config.json").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    for target in (run, checkpoint, run / "checkpoints", foreign, linked, full, tmp_path / "file"):
        for force in (False, True):
            if (target, force) == (foreign, True) or (target, force) == (run / "checkpoints", True):
                continue
            with pytest.raises(ConfigError):
                export(run, target, force=force)
    own = export(run, tmp_path / "own").folder
    with pytest.raises(ConfigError, match="another folder"):
        export(own / "model.safetensors", own, force=True)
    (tmp_path / "link.pyth").symlink_to(foreign / "README.md")
    (tmp_path / "dir.pyth").mkdir()
    (tmp_path / "there.pyth").write_text("mine")
    for target in (run, checkpoint, checkpoint / "model.safetensors", tmp_path / "link.pyth", tmp_path / "dir.pyth"):
        for force in (False, True):
            with pytest.raises(ConfigError):
                convert(checkpoint / "model.safetensors", target, force=force)
    with pytest.raises(ConfigError, match="--force"):
        convert(run, tmp_path / "there.pyth")
    assert (foreign / "README.md").read_text() == "mine"
    assert before == {p: (p.is_symlink(), p.read_bytes()) for p in run.rglob("*") if p.is_file()}


@pytest.mark.parametrize("verb", ["export", "convert"])
def test_a_place_that_cannot_be_written_is_one_line(run: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert cli.main([verb, str(run), "/sys/zz" if verb == "export" else "/sys/zz.pyth"]) == 2
    said = capsys.readouterr().err
    assert "/sys" in said
    assert said.count("\n") == 1


def test_names_of_strangers_are_no_markup_in_the_card(tmp_path: Path) -> None:
    name = "<script>alert(1)<|`x`\x1b[2J"
    config = ModelConfig.model_validate(support.MODEL).model_copy(update={"projections": False, "expander": False})
    state = {n: torch.zeros(shape) for n, shape in layout(config, {name: 2}).items()}
    description = {"model": config.model_dump(mode="json"), "datasets": {name: 2}}
    save_file(state, tmp_path / "a.safetensors", {HEADER: json.dumps(description)})
    card = (export(tmp_path / "a.safetensors", tmp_path / "out").folder / "README.md").read_text()
    assert "<script>" not in card
    assert "\x1b" not in card


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
