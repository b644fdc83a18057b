"""Features are those of the model, and classes that a projection ties together are found."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support import settings, write_run

from multitrain.cli import main
from multitrain.commands.embed import _lines
from multitrain.config import ConfigError, RunConfig
from multitrain.data.views import load_views
from multitrain.evaluation.embed import Embeddings, Item, embed, feature_map, principal_components, write
from multitrain.evaluation.nearest import affinity, heat_map, matches
from multitrain.evaluation.predictor import Predictor
from multitrain.files import OutputFolder


@pytest.fixture
def model(tiny_data: Path, tmp_path: Path) -> Predictor:
    _, config = write_run(tmp_path / "runs", settings(tiny_data))
    return predictor(config)


def predictor(config: RunConfig) -> Predictor:
    return Predictor(config.model, {"stride": 5, "segment": 3, "with.dot": 4}, run=config).eval()


def test_features_are_the_models_and_unreadable_videos_are_named(
    model: Predictor, tiny_data: Path, tmp_path: Path
) -> None:
    good = tiny_data / "stride" / "v 0.mp4"
    found = embed(model, [Item(str(good), "stride", "a"), Item(str(tmp_path / "gone.mp4"))])
    settings_ = model.run.data.datasets["stride"]
    clips = torch.from_numpy(load_views(good, settings_, model.run.data, model.config))
    with torch.inference_mode():
        expected = model.features(clips).mean(0).numpy()
    assert np.allclose(found.features, expected[None], atol=1e-6)
    assert list(found.unreadable) == [str(tmp_path / "gone.mp4")]
    write(found, tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as file:
        assert file["path"].tolist() == [str(good)]
        assert file["label"].tolist() == ["a"]
        assert np.array_equal(file["features"], found.features)
    with pytest.raises(ConfigError, match=r"\.npz or \.parquet"):
        write(found, tmp_path / "f.csv")


def test_lists_of_videos_that_hold_no_names_are_refused_in_a_line(tmp_path: Path) -> None:
    for content, said in {
        b"a.mp4\nb\0.mp4\n": ":2: a NUL byte",
        "clip.mp4\n".encode("utf-16"): "UTF-16",
    }.items():
        (tmp_path / "list").write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            _lines(tmp_path / "list")
    (tmp_path / "list").write_bytes("\ufeffa\u2028b.mp4\r\n\n  c d.mp4 \n".encode() + b"caf\xe9.mp4")
    assert _lines(tmp_path / "list") == ["a\u2028b.mp4", "c d.mp4", os.fsdecode(b"caf\xe9.mp4")]
    OutputFolder(tmp_path, "embed", ["a\0b.mp4"]).check("new")  # a source that can be no file


def test_the_map_shows_the_directions_of_largest_spread() -> None:
    rng = np.random.default_rng(0)
    features = np.zeros((40, 6), np.float32)
    features[:, 3], features[:, 1] = rng.normal(0, 10, 40), rng.normal(0, 3, 40)
    axes = principal_components(features)
    assert abs(np.corrcoef(axes[:, 0], features[:, 3])[0, 1]) > 0.99
    assert abs(np.corrcoef(axes[:, 1], features[:, 1])[0, 1]) > 0.99
    items = [Item(str(i), "ab"[i % 2], str(i % 3)) for i in range(40)]
    assert feature_map(Embeddings(items, features)).startswith(b"\x89PNG")


def test_nearest_finds_the_pair_that_the_projection_ties(model: Predictor) -> None:
    assert model.projections is not None
    with torch.no_grad():
        weight = model.projections.of("stride").of("segment").weight  # [3, 5]
        weight.zero_()
        weight[2, 4], weight[0, 1] = 3.0, 1.0
    best = matches(model, "stride", "segment", 1)
    assert {(m.source_class, m.target_class) for m in best if m.weight > 0} == {(4, 2), (1, 0)}
    assert affinity(model, "stride", "segment")[0].shape == (3, 5)
    names = {d: [str(i) for i in range(k)] for d, k in model.datasets.items()}
    assert heat_map(model, [("stride", "segment")], names).startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="did you mean 'stride'"):
        affinity(model, "strid", "segment")


def test_both_commands_on_a_stored_model(
    model: Predictor, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from support import train

    run, _ = write_run(tmp_path / "runs", settings(tiny_data, updates=1))
    train(run, 1)
    out, plot = tmp_path / "f.npz", tmp_path / "map.png"
    command = ["embed", "--checkpoint", str(run), "--dataset", "stride", "segment", "--per-dataset", "3"]
    assert (
        main([*command, "--out", str(out), "--plot", str(plot), "--index", str(tmp_path / "i"), "--device", "cpu"]) == 0
    )
    with np.load(out) as file:
        assert file["dataset"].tolist() == ["stride"] * 3 + ["segment"] * 3
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["nearest", str(run), "--pair", "segment=stride", "--plot", str(plot)]) == 0
    assert "segment" in capsys.readouterr().out
