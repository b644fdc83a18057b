"""Weights are found wherever they lie, are whole or refused, and what does not fit a model is said by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import published
from multitrain.config import ConfigError, ModelConfig, RunConfig, dump, validate
from multitrain.engine import checkpoint as checkpoints
from multitrain.engine.checkpoint import Checkpoint
from multitrain.interop.convert import convert
from multitrain.interop.layout import layout
from multitrain.interop.model_path import resolve_model_file
from multitrain.interop.positions import resize_positions
from multitrain.interop.pyslowfast import read_published, write_pyth
from multitrain.interop.start import initialise_from
from multitrain.interop.state_dict_report import compare
from multitrain.interop.weights import read_weights, run_config
from multitrain.model import MultiTrain
from tests import support

NAMES = {"stride": 5, "segment": 3, "with.dot": 4}
CONFIG = ModelConfig.model_validate(support.MODEL)
SINGLE = CONFIG.model_copy(update={"head": "linear", "projections": False, "expander": False})


def random_state(
    config: ModelConfig = CONFIG, datasets: dict[str, int] | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in layout(config, datasets or NAMES).items()}


def add_checkpoint(run: Path, config: RunConfig, update: int, **more: Any) -> Path:
    state = {
        "update": update,
        "datasets": NAMES,
        "model": config.model.model_dump(mode="json"),
        "multi_label": ["segment"],
        **more,
    }
    content = Checkpoint(random_state(seed=update), {}, state)
    return checkpoints.write(run / "checkpoints", content, dump(config))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints after 10 and 20 updates, as the trainer writes them."""
    folder, config = support.write_run(tmp_path / "runs", support.settings(tmp_path / "data"))
    for update in (10, 20):
        add_checkpoint(folder, config, update)
    return folder


def small_pyth(path: Path, config: ModelConfig, datasets: dict[str, int], seed: int = 0) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        write_pyth(path, config, datasets, random_state(config, datasets, seed), epoch=3)
    return path


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# -- where weights lie ---------------------------------------------------------------------------------------------------


def test_a_runs_newest_checkpoint_is_read(run: Path) -> None:
    for path in (run, run / "checkpoints", run / "checkpoints" / "latest", run / "checkpoints" / "update-00000020"):
        weights = read_weights(path)
        assert_equal(weights.state, random_state(seed=20))
        assert (weights.config, weights.datasets, weights.multi_label) == (CONFIG, NAMES, ("segment",))
        assert list(weights.datasets) == list(NAMES)


def test_an_older_checkpoint_can_be_chosen(run: Path) -> None:
    folder = run / "checkpoints" / "update-00000010"
    assert_equal(read_weights(folder).state, random_state(seed=10))
    assert_equal(read_weights(folder / "model.safetensors").state, random_state(seed=10))


@pytest.mark.parametrize("damage", ["model.safetensors", "state.json", "optimizer.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(run: Path, damage: str) -> None:
    newest = run / "checkpoints" / "update-00000020"
    file = newest / damage
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content[:-1] if damage == "optimizer.safetensors" else content)
    if damage == "manifest.json":
        file.unlink()
    assert_equal(read_weights(run).state, random_state(seed=10))
    with pytest.raises(ConfigError, match=damage):
        read_weights(newest)


def test_a_run_whose_checkpoints_are_all_damaged_says_so(run: Path) -> None:
    for folder in (run / "checkpoints").glob("update-*"):
        (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint is whole .update-00000020: model\.safetensors is missing"):
        read_weights(run)


@pytest.mark.parametrize("kind", ["empty folder", "missing", "other file", "torn", "no description"])
def test_what_holds_no_model_is_one_clear_line(tmp_path: Path, run: Path, kind: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if kind == "missing":
        place = place / "nothing.safetensors"
    elif kind == "other file":
        place = place / "model.onnx"
        place.write_bytes(b"x")
    elif kind in ("torn", "no description"):
        source = (run / "checkpoints" / "update-00000010" / "model.safetensors").read_bytes()
        place = place / "model.safetensors"
        place.write_bytes(source[: -1 if kind == "torn" else None])
    with pytest.raises(ConfigError) as caught:
        read_weights(place)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_with_model_files_names_them(tmp_path: Path) -> None:
    small_pyth(tmp_path / "release.pyth", CONFIG, {"a": 2, "b": 3})
    with pytest.raises(ConfigError, match=r"release\.pyth: give that file"):
        resolve_model_file(tmp_path)


def test_tensors_that_are_not_those_of_the_description_are_refused(run: Path, tmp_path: Path) -> None:
    place = tmp_path / "model.safetensors"
    shutil.copy(run / "checkpoints" / "update-00000010" / "model.safetensors", place)
    described = {"model": CONFIG.model_dump(mode="json") | {"width": 32}, "datasets": NAMES}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"of another shape .*pos_embed_spatial"):
        read_weights(place)


# -- class names and settings --------------------------------------------------------------------------------------------


def test_class_names_come_from_the_annotation_folder_of_the_run(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "segment"
    folder.mkdir(parents=True)
    (folder / "classes.txt").write_text("push\npull\nlift\n")
    assert read_weights(run).class_names == {"segment": ["push", "pull", "lift"]}
    (folder / "classes.txt").write_text("push\npull\n")  # not one for each class
    assert read_weights(run).class_names == {}


def test_class_names_stored_in_a_checkpoint_count(run: Path) -> None:
    add_checkpoint(run, validate(support.settings(run)), 30, class_names={"segment": ["a", "b", "c"]})
    assert read_weights(run).class_names == {"segment": ["a", "b", "c"]}


def test_the_configuration_of_a_run_is_its_own(run: Path, tmp_path: Path) -> None:
    expected = validate(support.settings(tmp_path / "data"))
    assert run_config(run) == expected
    alone = tmp_path / "update-00000010"  # a checkpoint that was copied away from its run
    shutil.copytree(run / "checkpoints" / "update-00000010", alone)
    assert run_config(alone) == expected


def test_a_published_files_configuration_reads_clips_as_it_was_trained(joint_pyth: Path) -> None:
    config = run_config(joint_pyth)
    views = {n: (d.sampling, d.temporal_views, d.spatial_views) for n, d in config.data.datasets.items()}
    assert views == {"kinetics": ("stride", 5, 1), "mit": ("stride", 2, 3), "ssv2": ("segment", 1, 3)}
    assert (config.data.sampling_rate, config.model.frames, config.model.crop) == (3, 8, 64)


def test_a_published_file_of_unknown_datasets_reads_them_plainly(tmp_path: Path) -> None:
    config = run_config(small_pyth(tmp_path / "a.pyth", CONFIG, {"diving48": 48, "kinetics": 7}))
    assert {n: d.classes for n, d in config.data.datasets.items()} == {"diving48": 48, "kinetics": 7}


# -- starting from other weights -----------------------------------------------------------------------------------------


def test_a_k400_model_gives_the_joint_one_516_tensors_and_leaves_22() -> None:
    k400 = layout(ModelConfig(head="linear", projections=False, expander=False), {"kinetics": 400})
    joint = layout(ModelConfig(), {"kinetics": 400, "mit": 305, "ssv2": 174})
    report = compare(k400, joint)
    assert (len(report.matched), len(report.missing), len(report.reshaped)) == (516, 22, 0)
    assert report.unexpected == ("heads.kinetics.weight", "heads.kinetics.bias")
    kinds = [n.split(".")[0] for n in report.missing]
    assert [kinds.count(k) for k in ("heads", "projections", "expander")] == [12, 6, 4]


def test_starting_from_a_published_single_model_copies_the_backbone_and_nothing_else() -> None:
    path = published.SMALL / f"{published.SINGLE}.pyth"
    config = read_published(path).config.model_copy(
        update={"head": "mlp", "projections": True, "expander": True, "head_hidden": 24, "expander_hidden": 32}
    )
    model, fresh = (MultiTrain(config, {"kinetics": 400, "mit": 5, "ssv2": 3}) for _ in range(2))
    report = initialise_from(model, path)
    assert (len(report.matched), len(report.fresh)) == (94, 22)
    source, before = torch.load(path, weights_only=True)["model_state"], fresh.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source[name] if name in report.matched else before[name]), name
    assert "94 tensors copied, 22 left" in str(report)
    assert "heads.kinetics" in str(report)


def test_heads_of_the_same_datasets_are_copied_and_others_stay(run: Path) -> None:
    model = MultiTrain(CONFIG, {"segment": 3, "stride": 6, "new": 2})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = initialise_from(model, run)
    after, source = model.state_dict(), random_state(seed=20)
    assert torch.equal(after["heads.segment.fc2.weight"], source["heads.segment.fc2.weight"])
    assert torch.equal(after["heads.new.fc2.weight"], before["heads.new.fc2.weight"])
    assert torch.equal(after["heads.stride.fc2.weight"], before["heads.stride.fc2.weight"])
    assert ("heads.stride.fc2.weight", (5, 24), (6, 24)) in report.reshaped
    assert "projections.with%2Edot.stride.weight" in report.unexpected
    assert set(report.matched) | set(report.fresh) == set(after)


def test_position_tables_of_another_size_are_named_and_interpolated_on_request(tmp_path: Path) -> None:
    path = small_pyth(tmp_path / "short.pyth", SINGLE, {"a": 2})
    model = MultiTrain(SINGLE.model_copy(update={"frames": 8, "crop": 128}), {"a": 2})
    with pytest.raises(
        ConfigError, match=r"pos_embed_spatial: \[1, 256, 16\] in the file, \[1, 1024, 16\].*--frames 8 --crop 128"
    ):
        initialise_from(model, path)
    report = initialise_from(model, path, interpolate_positions=True)
    assert report.fresh == ()
    assert any("pos_embed_temporal interpolated from [1, 2, 16] to [1, 4, 16]" in note for note in report.notes)
    assert (
        float(model.pos_embed_spatial.detach().std()) > 0.5
    )  # the file's, whose deviation is 1, not the fresh ones of 0.02


def test_interpolated_tables_are_the_same_function_of_place_and_time() -> None:
    state = random_state(SINGLE, {"a": 2})
    grid = torch.arange(16.0) + 0.5
    plane = grid[:, None] * 3 + grid[None] * 5
    state["pos_embed_spatial"] = plane.reshape(1, 256, 1).repeat(1, 1, 16)
    state["pos_embed_temporal"] = torch.tensor([0.5, 1.5]).reshape(1, 2, 1).repeat(1, 1, 16)
    resized = resize_positions(state, SINGLE, 8, 128)
    fine = (torch.arange(32.0) + 0.5) / 2
    expected = fine[:, None] * 3 + fine[None] * 5
    inside = resized["pos_embed_spatial"][0, :, 0].reshape(32, 32)[4:-4, 4:-4]
    torch.testing.assert_close(inside, expected[4:-4, 4:-4])
    assert resized["pos_embed_temporal"][0, :, 0].tolist() == [0.5, 0.75, 1.25, 1.5]
    assert torch.equal(resized["norm.weight"], state["norm.weight"])
    same = resize_positions(state, SINGLE, 4, 64)
    assert_equal(same, state)


def test_another_backbone_is_refused_with_the_settings_that_would_fit(run: Path) -> None:
    model = MultiTrain(CONFIG.model_copy(update={"width": 32}), NAMES)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"another backbone .*model\.width=16"):
        initialise_from(model, run)
    assert_equal(model.state_dict(), before)


def test_what_no_shape_shows_is_noted(run: Path) -> None:
    report = initialise_from(MultiTrain(CONFIG.model_copy(update={"kv_stride": 2}), NAMES), run)
    assert report.notes == ("note: model.kv_stride is 2 here and 4 in the file",)


# -- converting ----------------------------------------------------------------------------------------------------------


def test_there_and_back_between_formats_changes_no_bit(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "a.safetensors")
    (tmp_path / "config.json").unlink()  # the file alone is enough
    done = convert(tmp_path / "a.safetensors", tmp_path / "b.pyth")
    assert any("with.dot" in note for note in done.notes)
    convert(tmp_path / "b.pyth", tmp_path / "c.safetensors")
    for name in ("a.safetensors", "b.pyth", "c.safetensors"):
        weights = read_weights(tmp_path / name)
        assert_equal(weights.state, random_state(seed=20))
        assert (weights.datasets, weights.multi_label) == (NAMES, ("segment",))
    assert read_weights(tmp_path / "a.safetensors").config == CONFIG
    assert run_config(tmp_path / "a.safetensors") == validate(support.settings(tmp_path / "data"))


def test_a_description_beside_the_file_is_enough_too(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "checkpoints" / "update-00000010" / "model.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model": CONFIG.model_dump(mode="json"), "datasets": NAMES}))
    assert_equal(read_weights(tmp_path / "model.safetensors").state, random_state(seed=10))
    assert run_config(tmp_path / "model.safetensors").model == CONFIG


def test_a_published_file_keeps_its_optimizer_state_and_text(pyth: Path, tmp_path: Path) -> None:
    convert(pyth, tmp_path / "b.pyth")
    before, after = (torch.load(p, weights_only=True) for p in (pyth, tmp_path / "b.pyth"))
    assert before["cfg"] == after["cfg"]
    assert before["epoch"] == after["epoch"]
    assert str(before["optimizer_state"]) == str(after["optimizer_state"])
    assert_equal(before["model_state"], after["model_state"])


def test_converting_to_another_clip_size_gives_weights_to_start_from(tmp_path: Path) -> None:
    source = small_pyth(tmp_path / "a.pyth", SINGLE, {"a": 2})
    for target in (tmp_path / "b.safetensors", tmp_path / "c.pyth"):
        done = convert(source, target, frames=8, crop=128)
        assert any("interpolated" in note for note in done.notes)
        weights = read_weights(target)
        assert (weights.config.frames, weights.config.crop) == (8, 128)
        assert run_config(target).model.frames == 8
        model = MultiTrain(SINGLE.model_copy(update={"frames": 8, "crop": 128}), {"a": 2})
        assert initialise_from(model, target).fresh == ()


def test_a_target_is_never_replaced_unasked(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    target.write_text("precious")
    with pytest.raises(ConfigError, match="--force"):
        convert(run, target)
    with pytest.raises(ConfigError, match="convert did not write it"):
        convert(run, target, force=True)
    assert target.read_text() == "precious"
    target.unlink()
    convert(run, target)
    convert(run, target, force=True)
    assert_equal(read_weights(target).state, random_state(seed=20))
    for wrong in (tmp_path / "a.onnx", tmp_path / "none" / "a.pyth"):
        with pytest.raises(ConfigError, match=str(wrong)):
            convert(run, wrong)
    assert not list(tmp_path.glob(".*.tmp"))


def test_clips_that_cannot_be_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of"):
        convert(run, tmp_path / "a.pyth", frames=7)
