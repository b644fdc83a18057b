"""Published checkpoints: the network comes from their YAML text, nothing is dropped silently, and a round trip changes no bit."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import published
from multitrain.config import ConfigError, ModelConfig
from multitrain.interop.layout import layout, name_map
from multitrain.interop.pyslowfast import (
    read_published,
    read_pyth,
    write_pyth,
)
from multitrain.interop.pyslowfast_config import make_cfg, read_cfg
from multitrain.model import MultiTrain
from tests.interop.conftest import OF_WHOLE

SMALL = ModelConfig(
    frames=4, crop=64, depth=3, width=16, heads=1, stages=(1,), kv_stride=4, head_hidden=24, expander_hidden=32
)
"""Small enough to write many files."""
NAMES = {"kinetics": 5, "mit": 4, "ssv2": 3}


def weights(config: ModelConfig, datasets: dict[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator) for n, shape in layout(config, datasets).items()}


def write(path: Path, config: ModelConfig, datasets: dict[str, int], **more: Any) -> dict[str, torch.Tensor]:
    state = weights(config, datasets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # small widths are not the published ones
        write_pyth(path, config, datasets, state, **more)
    return state


def edit(path: Path, target: Path, **changes: Any) -> Path:
    """A copy of a file with some of its parts changed by functions."""
    content = torch.load(path, weights_only=True)
    for part, change in changes.items():
        content[part] = change(content[part])
    torch.save(content, target)
    return target


def with_option(dotted: str, value: object) -> Any:
    def change(text: str) -> str:
        cfg = yaml.safe_load(text)
        *sections, key = dotted.split(".")
        node = cfg
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
        return yaml.safe_dump(cfg)

    return change


def without(*names: str) -> Any:
    return lambda state: {n: t for n, t in state.items() if n not in names}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# -- what the published code wrote -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [published.SMALL / f"{published.SINGLE}.pyth", *OF_WHOLE],
    ids=lambda p: f"{'small' if p.parent == published.SMALL else 'whole'}-{p.stem}",
)
def test_a_published_file_gives_the_published_probabilities(path: Path) -> None:
    config, datasets, state, epoch = read_pyth(path)
    golden = published.values(path.parent, path.stem)
    model = MultiTrain(config, datasets).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        found = model(golden["input"])
    assert list(found) == list(golden["eval_probs"])
    assert epoch == 0
    for dataset, expected in golden["eval_probs"].items():
        torch.testing.assert_close(found[dataset], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*the published code builds")
def test_a_published_file_written_again_is_the_same_in_every_part(pyth: Path, tmp_path: Path) -> None:
    source = pyth
    file = read_published(source)
    target = tmp_path / "again.pyth"
    write_pyth(
        target,
        file.config,
        file.datasets,
        file.state,
        epoch=file.epoch,
        cfg=file.cfg,
        optimizer_state=file.optimizer_state,
    )
    before, after = (torch.load(p, weights_only=True) for p in (source, target))
    assert same(before, after)


@pytest.mark.parametrize(("listing", "single"), [("multi", False), ("k400", True)])
def test_the_full_models_have_the_published_tensors_in_the_published_order(listing: str, single: bool) -> None:
    theirs = {name: tuple(shape) for name, shape in published.names()["tensors"][listing].items()}
    config = ModelConfig() if not single else ModelConfig(head="linear", projections=False, expander=False)
    datasets = {"kinetics": 400} if single else {"kinetics": 400, "mit": 305, "ssv2": 174}
    shapes = layout(config, datasets)
    ours = {n: shapes[name] for n, name in name_map(config, datasets, single=single).items()}
    assert list(ours.items()) == list(theirs.items())


# Rows of the facts' table of published configurations: options that differ from the multi-dataset one, parameters.
DEEP = {"DEPTH": 24, "at": (2, 5, 21), "frames": 32}
FLAT = {"DEPTH": 16, "at": (1, 3, 14), "frames": 16}
VARIANTS = {
    "multi 32x3": (DEEP, True, 0.1, None, 64_297_643),
    "k400 32x3": (DEEP, True, 0.3, ("kinetics", 400), 51_293_776),
    "k400 16x4": (FLAT, True, 0.2, ("kinetics", 400), 34_709_296),
    "ssv2 32x3": (DEEP, True, 0.4, ("ssv2", 174), 51_119_982),
    "ssv2 16x4 full": (FLAT, True, 0.4, ("ssv2", 174), 34_535_502),
    "ssv2 16x4": (FLAT, False, 0.4, ("ssv2", 174), 34_499_310),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_published_configuration_gives_its_network(joint_pyth: Path, variant: str) -> None:
    shape, full, drop_path, dataset, parameters = VARIANTS[variant]
    cfg = yaml.safe_load(torch.load(joint_pyth, weights_only=True)["cfg"])
    cfg["DATA"] |= {"NUM_FRAMES": shape["frames"], "TRAIN_CROP_SIZE": 224, "TEST_CROP_SIZE": 224}
    steps = [[b, 2.0] for b in shape["at"]]
    cfg["MVIT"] |= {
        "DEPTH": shape["DEPTH"],
        "EMBED_DIM": 96,
        "DIM_MUL": steps,
        "HEAD_MUL": steps,
        "DROPPATH_RATE": drop_path,
    }
    cfg["MVIT"] |= {"POOL_Q_STRIDE": [[b, 1, 2, 2] for b in shape["at"]], "Q_POOL_ALL": full, "Q_POOL_RESIDUAL": full}
    if dataset:
        off = {"USE_MULTI_HEAD": False, "USE_INF_LOSS": False, "MULTI_ADD_CROSS_PROJ": False}
        cfg["MODEL"] |= {"NUM_CLASSES": dataset[1], **off}
        cfg["TRAIN"]["DATASET"] = dataset[0]
    config, datasets, _, single = read_cfg(yaml.safe_dump(cfg))
    assert single == (dataset is not None)
    assert sum(math.prod(s) for s in layout(config, datasets).values()) == parameters
    assert config.stages == shape["at"]
    assert (config.drop_path, config.residual_q, config.pool_q_everywhere) == (drop_path, full, full)
    assert datasets == (dict([dataset]) if dataset else {"kinetics": 400, "mit": 305, "ssv2": 174})


def test_a_made_configuration_uses_only_options_and_types_that_the_published_schema_has() -> None:
    theirs = published.names()["options"]
    made = yaml.safe_load(make_cfg(ModelConfig(drop_path=0, head_dropout=0), {"a": 2, "b": 3}, ["b"]))
    for section, options in made.items():
        for option, value in options.items():
            assert option in theirs[section], f"{section}.{option}"
            assert type(value).__name__ == theirs[section][option], f"{section}.{option}"


# -- our own models, there and back --------------------------------------------------------------------------------------

OURS = {
    "mlp heads": (SMALL, NAMES),
    "linear heads": (SMALL.model_copy(update={"head": "linear"}), NAMES),
    "one linear head": (
        SMALL.model_copy(update={"head": "linear", "projections": False, "expander": False}),
        {"ssv2": 7},
    ),
    "one mlp head": (SMALL.model_copy(update={"projections": False}), {"ssv2": 7}),
    "one dataset with every option as it is by default": (SMALL, {"ssv2": 7}),
    "one linear head with every option as it is by default": (SMALL.model_copy(update={"head": "linear"}), {"ssv2": 7}),
    "no expander": (SMALL.model_copy(update={"expander": False}), NAMES),
    "no projections": (SMALL.model_copy(update={"projections": False}), NAMES),
    "queries pooled at stage changes only": (
        SMALL.model_copy(update={"pool_q_everywhere": False, "residual_q": False}),
        NAMES,
    ),
    "other strides": (SMALL.model_copy(update={"kv_stride": 2, "stages": (1, 2), "heads": 2}), NAMES),
    "odd names": (SMALL, {"with.dot": 2, "train": 3, "two_words": 4, "ünï": 5}),
}


@pytest.mark.parametrize("case", OURS)
def test_a_model_of_ours_comes_back_bit_for_bit(tmp_path: Path, case: str) -> None:
    config, datasets = OURS[case]
    state = write(tmp_path / "a.pyth", config, datasets, epoch=7, multi_label=[next(iter(datasets))])
    file = read_published(tmp_path / "a.pyth")
    kept = {"dropout_logits"}  # the published code has no switch for it
    assert file.config.model_dump(exclude=kept) == _used(config, datasets).model_dump(exclude=kept)
    assert (file.datasets, list(file.datasets), file.epoch) == (datasets, list(datasets), 7)
    assert file.multi_label == (next(iter(datasets)),)
    assert same(file.state, state)


def _used(config: ModelConfig, datasets: dict[str, int]) -> ModelConfig:
    """`config` with the published values where the model has no such part, so that a file cannot say another."""
    plain: dict[str, Any] = {} if config.head == "mlp" else {"head_hidden": 2048}
    plain |= {"projections": config.projections and len(datasets) > 1}
    return config.model_copy(update=plain | ({} if config.expander else {"expander_hidden": 4096}))


@pytest.mark.parametrize("case", OURS)
def test_the_layout_is_that_of_the_built_model(case: str) -> None:
    config, datasets = OURS[case]
    with torch.device("meta"):
        model = MultiTrain(config, datasets)
    assert {n: tuple(p.shape) for n, p in model.state_dict().items()} == layout(config, datasets)


@pytest.mark.filterwarnings("ignore:.*expander_hidden")
def test_widths_that_the_published_code_cannot_build_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="head_hidden=24"):
        write_pyth(tmp_path / "a.pyth", SMALL, NAMES, weights(SMALL, NAMES))


def test_dataset_names_whose_projections_would_be_called_the_same_are_refused(tmp_path: Path) -> None:
    colliding = {"a": 2, "a_a": 2}
    with pytest.raises(ConfigError, match="rename a dataset"):
        write_pyth(tmp_path / "a.pyth", SMALL, colliding, weights(SMALL, colliding))


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path) -> None:
    state = weights(SMALL, NAMES)
    state.pop("norm.bias")
    with pytest.raises(ConfigError, match=r"norm\.bias"):
        write_pyth(tmp_path / "a.pyth", SMALL, NAMES, state)
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_text_of_another_network_is_refused(tmp_path: Path) -> None:
    other = make_cfg(SMALL.model_copy(update={"kv_stride": 2}), NAMES)
    with pytest.raises(ConfigError, match="another model: kv_stride is 2 in the text, 4 in the weights"):
        write_pyth(tmp_path / "a.pyth", SMALL, NAMES, weights(SMALL, NAMES), cfg=other)
    without = make_cfg(SMALL.model_copy(update={"projections": False}), NAMES)
    with pytest.raises(ConfigError, match="projections is False in the text, True in the weights"):
        write_pyth(tmp_path / "a.pyth", SMALL, NAMES, weights(SMALL, NAMES), cfg=without)


def test_kv_strides_are_read_from_the_derived_list_too(tmp_path: Path) -> None:
    cfg = yaml.safe_load(make_cfg(SMALL, NAMES))
    del cfg["MVIT"]["POOL_KV_STRIDE_ADAPTIVE"]
    cfg["MVIT"]["POOL_KV_STRIDE"] = [[0, 1, 4, 4], [1, 1, 2, 2], [2, 1, 2, 2]]
    assert read_cfg(yaml.safe_dump(cfg))[0].kv_stride == 4
    cfg["MVIT"]["POOL_KV_STRIDE"][2] = [2, 1, 4, 4]
    with pytest.raises(ConfigError, match="at block 2"):
        read_cfg(yaml.safe_dump(cfg))


# -- what is refused -----------------------------------------------------------------------------------------------------

REFUSED = [
    ("MVIT.CLS_EMBED_ON", True),
    ("MVIT.REL_POS_EMBED", True),
    ("MVIT.REL_POS_SPATIAL", True),
    ("MVIT.SEP_POS_EMBED", False),
    ("MVIT.MODE", "max"),
    ("MVIT.POOL_FIRST", True),
    ("MVIT.NORM_STEM", True),
    ("MVIT.CHANNEL_EXPAND_FRONT", False),
    ("MVIT.USE_MEM", True),
    ("MVIT.QKV_BIAS", False),
    ("MVIT.POOL_KVQ_KERNEL", [1, 3, 3]),
    ("MVIT.PATCH_KERNEL", [3, 4, 4]),
    ("MVIT.DIM_MUL", [[1, 3.0]]),
    ("MVIT.HEAD_MUL", [[2, 2.0]]),
    ("MVIT.POOL_Q_STRIDE", [[1, 2, 2, 2]]),
    ("MVIT.POOL_KV_STRIDE_ADAPTIVE", [2, 4, 4]),
    ("DATA.TEST_CROP_SIZE", 96),
    ("DATA.MEAN", [0.5, 0.5, 0.5]),
    ("DETECTION.ENABLE", True),
    ("MODEL.MODEL_NAME", "SlowFast"),
]


@pytest.mark.parametrize(("option", "value"), REFUSED)
def test_an_option_outside_the_network_is_refused_by_name(tmp_path: Path, option: str, value: object) -> None:
    write(tmp_path / "a.pyth", SMALL, NAMES)
    file = edit(tmp_path / "a.pyth", tmp_path / "b.pyth", cfg=with_option(option, value))
    with pytest.raises(ConfigError, match=option.split(".")[-1]) as caught:
        read_pyth(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_contradict_the_configuration_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.pyth", SMALL, NAMES)

    def spoil(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = dict(state)
        state["extra.weight"] = torch.zeros(2)
        state["norm.weight"] = torch.zeros(33)
        del state["blocks.1.proj_max_pool.bias"]
        return state

    with pytest.raises(ConfigError) as caught:
        read_pyth(edit(tmp_path / "a.pyth", tmp_path / "b.pyth", model_state=spoil))
    for name in ("extra.weight", "norm.weight: [33] in the file, [32] in the model", "blocks.1.proj_max_pool.bias"):
        assert name in str(caught.value)


def test_a_head_that_is_missing_is_an_error_unless_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "a.pyth", SMALL, NAMES)
    missing = "head.heads.mit.fc2.bias"
    file = edit(tmp_path / "a.pyth", tmp_path / "b.pyth", model_state=without(missing))
    with pytest.raises(ConfigError, match=r"heads\.mit\.fc2\.bias"):
        read_pyth(file)
    assert "heads.mit.fc2.bias" not in read_pyth(file, strict=False)[2]


def test_an_official_mvit_checkpoint_without_its_cfg_is_refused_with_the_way_to_start_from_it(tmp_path: Path) -> None:
    state = weights(SMALL, NAMES)
    official = {
        n: t for n, t in state.items() if n.startswith(("blocks.", "patch_embed.", "norm.")) and "max_pool" not in n
    }
    odd = [
        "blocks.0.attn.rel_pos_h",
        "blocks.0.attn.rel_pos_w",
        "blocks.0.attn.rel_pos_t",
        "cls_token",
        "blocks.1.proj.weight",
    ]
    official |= {n: torch.zeros(3, 4) for n in odd}
    torch.save({"model_state": official}, tmp_path / "mvitv2.pyth")
    with pytest.raises(ConfigError, match="model=mvitv2_s init_from=") as caught:
        read_pyth(tmp_path / "mvitv2.pyth")
    assert "\n" not in str(caught.value)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)

    def __init__(self, target: str) -> None:
        self.target = target


def test_code_in_a_downloaded_file_does_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    torch.save({"model_state": {}, "cfg": Malicious(str(proof))}, tmp_path / "a.pyth")
    with pytest.raises(ConfigError, match="could run code"):
        read_pyth(tmp_path / "a.pyth")
    assert not proof.exists()


@pytest.mark.parametrize("damage", ["empty", "text", "half", "folder", "missing", "no state", "no cfg", "bad yaml"])
def test_a_file_that_is_no_checkpoint_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "a.pyth"
    write(file, SMALL, NAMES)
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "text":
        file.write_text("<html>Google Drive - Virus scan warning</html>")
    elif damage == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage == "missing":
        file.unlink()
    elif damage == "no state":
        torch.save({"epoch": 1}, file)
    elif damage == "no cfg":
        torch.save({"model_state": torch.load(file, weights_only=True)["model_state"]}, file)
    else:
        edit(file, file, cfg=lambda _: "a: [1")
    with pytest.raises(ConfigError) as caught:
        read_pyth(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
