"""Official MViT and MViTv2 releases load by the text and the names in them, start runs, and are written back unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import multitrain
from benchmarks.baseline import mvitv2 as plain
from multitrain.config import ConfigError, ModelConfig
from multitrain.interop.convert import convert
from multitrain.interop.pyslowfast_config import read_cfg
from multitrain.interop.start import initialise_from
from multitrain.model import MultiTrain

CLASSES = 5
OFFICIAL: dict[str, dict[str, Any]] = {
    "DATA": {
        "NUM_FRAMES": 4,
        "TRAIN_CROP_SIZE": 32,
        "TEST_CROP_SIZE": 32,
        "INPUT_CHANNEL_NUM": [3],
        "MEAN": [0.45, 0.45, 0.45],
        "STD": [0.225, 0.225, 0.225],
        "SAMPLING_RATE": 4,
        "REVERSE_INPUT_CHANNEL": False,
        "TRAIN_JITTER_SCALES": [256, 320],
        "RANDOM_FLIP": True,
    },
    "MODEL": {"ARCH": "mvit", "MODEL_NAME": "MViT", "NUM_CLASSES": CLASSES, "HEAD_ACT": "softmax", "DROPOUT_RATE": 0.5},
    "MVIT": {
        "CLS_EMBED_ON": True,
        "DEPTH": 4,
        "DIM_MUL": [[1, 2.0], [3, 2.0]],
        "DIM_MUL_IN_ATT": True,
        "DROPPATH_RATE": 0.2,
        "EMBED_DIM": 16,
        "HEAD_MUL": [[1, 2.0], [3, 2.0]],
        "MODE": "conv",
        "NUM_HEADS": 1,
        "PATCH_KERNEL": "(3, 7, 7)",
        "POOL_KVQ_KERNEL": [3, 3, 3],
        "POOL_KV_STRIDE": [[0, 1, 4, 4], [1, 1, 2, 2], [2, 1, 2, 2], [3, 1, 1, 1]],
        "POOL_KV_STRIDE_ADAPTIVE": [1, 4, 4],
        "POOL_Q_STRIDE": [[0, 1, 1, 1], [1, 1, 2, 2], [2, 1, 1, 1], [3, 1, 2, 2]],
        "REL_POS_SPATIAL": True,
        "REL_POS_TEMPORAL": True,
        "RESIDUAL_POOLING": True,
        "SEPARATE_QKV": False,
        "SEP_POS_EMBED": False,
        "USE_ABS_POS": False,
        "USE_MEAN_POOLING": False,
    },
    "TRAIN": {"DATASET": "kinetics"},
    "TEST": {"DATASET": "kinetics", "NUM_ENSEMBLE_VIEWS": 5, "NUM_SPATIAL_CROPS": 1},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "release": {},
    "large": {"MVIT.SEPARATE_QKV": True, "DATA.MEAN": [0.485, 0.456, 0.406], "DATA.STD": [0.229, 0.224, 0.225]},
    "ssv2": {"DATA.REVERSE_INPUT_CHANNEL": True, "TRAIN.DATASET": "ssv2"},
    "no class token": {"MVIT.CLS_EMBED_ON": False},
    "mean pooling": {"MVIT.USE_MEAN_POOLING": True},
    "strides listed by block": {"MVIT.POOL_KV_STRIDE_ADAPTIVE": None},
    "mvit": {
        "MVIT.DIM_MUL_IN_ATT": False,
        "MVIT.REL_POS_SPATIAL": False,
        "MVIT.REL_POS_TEMPORAL": False,
        "MVIT.USE_ABS_POS": True,
        "MVIT.SEP_POS_EMBED": True,
        "MVIT.RESIDUAL_POOLING": False,
        "MVIT.POOL_Q_STRIDE": [[1, 1, 2, 2], [3, 1, 2, 2]],
    },
    "one absolute table": {"MVIT.USE_ABS_POS": True, "MVIT.REL_POS_TEMPORAL": False},
}


def text_of(variant: str) -> str:
    cfg = {section: dict(options) for section, options in OFFICIAL.items()}
    for dotted, value in VARIANTS[variant].items():
        section, option = dotted.split(".")
        cfg[section][option] = value
    return yaml.safe_dump(cfg)


def release(folder: Path, variant: str = "release", **changes: Any) -> Path:
    """A file as the official code writes it, with random weights of the names and shapes of the plain transcription."""
    config, *_ = read_cfg(text_of(variant))
    generator = torch.Generator().manual_seed(1)
    shapes = plain.shapes(config) | {"head.projection.weight": (CLASSES, 64), "head.projection.bias": (CLASSES,)}
    state = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    file = folder / "MViTv2.pyth"
    content = {"epoch": 7, "model_state": state, "optimizer_state": {}, "cfg": text_of(variant)}
    torch.save(content | changes, file)
    return file


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_release_computes_what_the_plain_transcription_computes(tmp_path: Path, variant: str) -> None:
    file = release(tmp_path, variant)
    model = multitrain.load(file)
    state = torch.load(file)["model_state"]
    clips = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        expected = plain.features(state, model.config, clips)
        torch.testing.assert_close(model.features(clips), expected, rtol=1e-5, atol=1e-5)
        (dataset,) = model.datasets
        logits = expected @ state["head.projection.weight"].T + state["head.projection.bias"]
        torch.testing.assert_close(model(clips)[dataset], logits.softmax(-1), rtol=1e-5, atol=1e-5)
    assert not model.report.fresh
    assert not model.report.unexpected


def test_colours_and_normalisation_are_those_of_the_text(tmp_path: Path) -> None:
    assert multitrain.load(release(tmp_path, "ssv2")).config.channels == "bgr"
    assert multitrain.load(release(tmp_path, "ssv2")).run.data.datasets["ssv2"].sampling == "segment"
    assert multitrain.load(release(tmp_path, "large")).config.mean == (0.485, 0.456, 0.406)
    assert multitrain.load(release(tmp_path, "large")).config.std == (0.229, 0.224, 0.225)


def test_a_release_starts_a_run_with_other_heads(tmp_path: Path) -> None:
    file = release(tmp_path)
    config, *_ = read_cfg(text_of("release"))
    wanted = config.model_copy(update={"head": "mlp", "head_hidden": 8, "expander": True, "projections": True})
    model = MultiTrain(wanted, {"kinetics": 7, "ssv2": 3})
    report = initialise_from(model, file)
    assert set(report.matched) == set(plain.shapes(config))
    assert all(name.startswith(("heads.", "expander.", "projections.")) for name in report.fresh)
    assert report.unexpected == ("heads.kinetics.weight", "heads.kinetics.bias")
    state = torch.load(file)["model_state"]
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in report.matched)


def test_another_order_of_colours_is_the_same_function(tmp_path: Path) -> None:
    file = release(tmp_path, "ssv2")
    theirs = multitrain.load(file)
    ours = MultiTrain(theirs.config.model_copy(update={"channels": "rgb"}), {"ssv2": CLASSES}).eval()
    assert "reversed from bgr to rgb" in str(initialise_from(ours, file))
    clips = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.features(clips), theirs.features(clips.flip(1)), rtol=1e-5, atol=1e-6)


def test_a_run_of_another_network_is_told_what_to_set(tmp_path: Path) -> None:
    file = release(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.backbone=mvitv2 model\.frames=4 .*model\.stages=\[1,3\]") as caught:
        initialise_from(MultiTrain(ModelConfig(frames=4, crop=32, depth=2, width=16, stages=(1,)), {"a": 2}), file)
    assert "\n" not in str(caught.value)
    config, *_ = read_cfg(text_of("release"))
    other = config.model_copy(update={"backbone_args": config.backbone_args | {"class_token": False}})
    with pytest.raises(ConfigError, match=r"cls_token.*class_token=true"):
        initialise_from(MultiTrain(other, {"a": 2}), file)


@pytest.mark.parametrize("variant", ["release", "one absolute table", "mvit"])
def test_clips_of_another_size_interpolate_the_position_tables(tmp_path: Path, variant: str) -> None:
    file = release(tmp_path, variant)
    model = multitrain.load(file, frames=8, crop=64)
    with torch.no_grad():
        assert model.features(torch.randn(1, 3, 8, 64, 64)).isfinite().all()
    config = model.config
    run = MultiTrain(config, {"a": 2})
    with pytest.raises(ConfigError, match="interpolate_positions=true") as caught:
        initialise_from(run, file)
    assert len(str(caught.value)) < 900
    report = initialise_from(run, file, interpolate_positions=True)
    assert "interpolated" in str(report)
    for name in plain.shapes(config):
        assert torch.equal(run.state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize("variant", ["release", "large", "mvit"])
def test_a_release_is_written_back_as_it_was(tmp_path: Path, variant: str) -> None:
    file = release(tmp_path, variant)
    convert(file, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back.pyth")
    before, after = torch.load(file), torch.load(tmp_path / "back.pyth")
    assert after["cfg"] == before["cfg"]
    assert after["epoch"] == before["epoch"]
    assert list(after["model_state"]) != []
    assert all(torch.equal(after["model_state"][name], t) for name, t in before["model_state"].items())
    assert set(after["model_state"]) == set(before["model_state"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_text_made_for_a_network_describes_it(variant: str) -> None:
    from multitrain.interop.pyslowfast_config import make_cfg

    config, datasets, multi_label, _ = read_cfg(text_of(variant))
    again, named, *_ = read_cfg(make_cfg(config, datasets, multi_label))
    assert (again, named) == (config, datasets)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("MVIT.POOL_FIRST", True),
        ("MVIT.MODE", "max"),
        ("MVIT.LAYER_SCALE_INIT_VALUE", 0.1),
        ("MVIT.PATCH_KERNEL", "(3, 4, 4)"),
        ("MVIT.USE_FIXED_SINCOS_POS", True),
        ("MVIT.DIM_MUL", [[1, 3.0], [3, 2.0]]),
        ("DATA.STD", [0.0, 1.0, 1.0]),
    ],
)
def test_an_option_that_is_not_supported_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: object
) -> None:
    monkeypatch.setitem(VARIANTS, "odd", {option: value})
    file = release(tmp_path, "release", cfg=text_of("odd"))
    with pytest.raises(ConfigError, match=option.split(".")[-1].lower() if "STD" in option else option) as caught:
        multitrain.load(file)
    assert "\n" not in str(caught.value)
