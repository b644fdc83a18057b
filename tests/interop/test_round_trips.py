"""A published file that goes through our formats comes back equal in every bit, optimizer state, epoch and text included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.published import JOINT, SINGLE, SMALL, values
from multitrain.config import ConfigError, ModelConfig, dump
from multitrain.engine import checkpoint as checkpoints
from multitrain.engine.checkpoint import Checkpoint
from multitrain.interop.convert import convert
from multitrain.interop.json_tensors import flatten, unflatten
from multitrain.interop.layout import layout, name_map
from multitrain.interop.optimizer_state import groups
from multitrain.interop.pyslowfast import read_published
from multitrain.interop.weights import read_weights
from tests import support

DATASETS = {"kinetics": 5, "mit": 4, "ssv2": 3}
CONFIG = ModelConfig.model_validate(support.MODEL)


def identical(a: Any, b: Any) -> bool:
    """Same types, same order of keys, same bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


def trained_pyth(source: Path, target: Path) -> Path:
    """A published file with what a few steps of mixed-precision training leave in it."""
    content = torch.load(source, weights_only=True)
    model = [torch.nn.Parameter(t.clone()) for t in content["model_state"].values()]
    optimizer = torch.optim.AdamW([{"params": model[:3], "weight_decay": 0.05}, {"params": model[3:]}], lr=1e-4)
    for parameter in model:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7}
    torch.save(content | {"epoch": 41, "optimizer_state": optimizer.state_dict(), "scaler_state": scaler}, target)
    return target


@pytest.mark.filterwarnings("ignore:.*expander_hidden")
@pytest.mark.parametrize("trained", [False, True])
def test_a_published_file_comes_back_from_our_formats_in_every_part(pyth: Path, tmp_path: Path, trained: bool) -> None:
    source = trained_pyth(pyth, tmp_path / "trained.pyth") if trained else pyth
    (tmp_path / "folder").mkdir()
    way = [tmp_path / "a.safetensors", tmp_path / "folder", tmp_path / "b.safetensors", tmp_path / "c.pyth"]
    for before, after in zip([source, *way], way):
        convert(before, after)
    assert identical(torch.load(source, weights_only=True), torch.load(way[-1], weights_only=True))
    assert (tmp_path / "a.optimizer.safetensors").is_file() is trained


@pytest.mark.parametrize("name", [JOINT, SINGLE])
def test_parameter_groups_are_numbered_as_the_published_code_numbers_them(
    published: Path, joint_pyth: Path, name: str
) -> None:
    file = read_published(joint_pyth if name == JOINT else SMALL / f"{SINGLE}.pyth")
    golden = values(published, name)
    theirs = {v: k for k, v in name_map(file.config, file.datasets, single=len(file.datasets) == 1).items()}
    found = groups(layout(file.config, file.datasets), "single")
    assert [[theirs[n] for n in g] for g in found] == [list(g) for g in golden["optimizer_group_names"]]
    together = groups(layout(file.config, file.datasets), "ddp")
    assert [len(g) for g in together] == ([47, 69] if name == "tiny_multi" else [34, 62])


@pytest.mark.parametrize("grouping", ["ddp", "single"])
def test_a_runs_moments_become_a_state_that_the_published_optimizer_loads(tmp_path: Path, grouping: Any) -> None:
    run, config = support.write_run(tmp_path / "runs", support.settings(tmp_path / "data"))
    shapes = layout(CONFIG, DATASETS)
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    moments = {
        f"{m}.{n}": torch.rand(s, generator=generator) for n, s in shapes.items() for m in ("exp_avg", "exp_avg_sq")
    }
    plan = {"effective_batch": 16, "sources": [{"name": "a", "size": 30, "replicas": 2}, {"name": "b", "size": 20}]}
    described = {"update": 17, "steps_applied": 16, "datasets": DATASETS, "plan": plan, "multi_label": []}
    described["model"] = CONFIG.model_dump(mode="json")
    checkpoints.write(run / "checkpoints", Checkpoint(state, moments, described), dump(config))
    convert(run, tmp_path / "a.pyth", grouping=grouping)
    content = torch.load(tmp_path / "a.pyth", weights_only=True)
    assert content["epoch"] == 2  # 17 × 16 videos are 3.4 passes over 80: the third pass, number 2, is finished
    names = groups(shapes, grouping)
    parameters = {n: torch.nn.Parameter(torch.zeros(s)) for n, s in shapes.items()}
    optimizer = torch.optim.AdamW([{"params": [parameters[n] for n in g]} for g in names], lr=1.0)
    optimizer.load_state_dict(content["optimizer_state"])
    assert [g["weight_decay"] for g in optimizer.param_groups] == (
        [0.05, 0.0, 0.05] if len(names) == 3 else [0.05, 0.0]
    )
    assert {g["lr"] for g in optimizer.param_groups} == {config.optim.lr}
    for name, parameter in parameters.items():
        held = optimizer.state[parameter]
        assert float(held["step"]) == 16
        assert torch.equal(held["exp_avg"], moments[f"exp_avg.{name}"])
        assert torch.equal(held["exp_avg_sq"], moments[f"exp_avg_sq.{name}"])
    assert next(iter(content["model_state"])) == "pos_embed_spatial"
    convert(run, tmp_path / "b.pyth", weights_only=True)
    assert torch.load(tmp_path / "b.pyth", weights_only=True)["optimizer_state"]["state"] == {}


def test_a_file_without_optimizer_state_gets_one_that_the_published_optimizer_loads(
    joint_pyth: Path, tmp_path: Path
) -> None:
    convert(joint_pyth, tmp_path / "a.pyth", weights_only=True)
    state = torch.load(tmp_path / "a.pyth", weights_only=True)["optimizer_state"]
    assert [len(g["params"]) for g in state["param_groups"]] == [47, 69]
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(116)]
    torch.optim.AdamW([{"params": parameters[:47]}, {"params": parameters[47:]}]).load_state_dict(state)


def test_two_models_in_one_folder_keep_a_description_each(tmp_path: Path, joint_pyth: Path) -> None:
    for path in (joint_pyth, SMALL / f"{SINGLE}.pyth"):
        convert(path, tmp_path / f"{path.stem}.safetensors")
    assert (tmp_path / "config.json").is_file()
    assert (tmp_path / "tiny_k400_32x3.json").is_file()
    assert len(read_weights(tmp_path / "tiny_k400_32x3.safetensors").datasets) == 1
    assert len(read_weights(tmp_path / "tiny_multi.safetensors").datasets) == 3


def test_nested_values_come_back_with_their_types() -> None:
    value = {"a": (1, [2.5, None, "x"], {3: torch.ones(2, dtype=torch.bfloat16)}), 0: {}, "t": ()}
    structure, tensors = flatten(value)
    assert identical(unflatten(structure, tensors), value)
    with pytest.raises(ConfigError, match="set"):
        flatten({"a": {1, 2}})
