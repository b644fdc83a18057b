"""The official MViTv2 and MViT: fp64 agreement with a plain transcription, the goldens, lean attention, activation checkpointing."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.baseline import model as naive
from benchmarks.baseline import mvitv2 as plain
from multitrain.config import ModelConfig
from multitrain.model import MultiTrain, constants
from multitrain.model.relative import attend_with_positions, distances

SMALL: dict[str, Any] = {
    "backbone": "mvitv2",
    "frames": 4,
    "crop": 32,
    "depth": 4,
    "width": 16,
    "stages": (1, 3),
    "kv_stride": 4,
    "head": "linear",
    "head_dropout": 0.0,
    "drop_path": 0.0,
    "expander": False,
    "projections": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "release": {},
    "no class token": {"backbone_args": {"class_token": False}},
    "mean pooling": {"backbone_args": {"mean_pooling": True}},
    "mean pooling without class token": {"backbone_args": {"mean_pooling": True, "class_token": False}},
    "no relative positions": {"backbone_args": {"relative_space": False, "relative_time": False, "absolute": "joint"}},
    "relative space only": {"backbone_args": {"relative_time": False}},
    "relative time only": {"backbone_args": {"relative_space": False, "class_token": False, "absolute": "separate"}},
    "separate qkv": {"backbone_args": {"separate_qkv": True}},
    "separate qkv without bias": {"backbone_args": {"separate_qkv": True, "qkv_bias": False}},
    "qkv without bias": {"backbone_args": {"qkv_bias": False}},
    "mvit": {
        "residual_q": False,
        "pool_q_everywhere": False,
        "backbone_args": {"widen": "mlp", "relative_space": False, "relative_time": False, "absolute": "separate"},
    },
    "norm of the stem": {"backbone_args": {"norm_stem": True, "absolute": "joint", "class_token": False}},
    "no residual pooling": {"residual_q": False},
    "pool q at stage changes only": {"pool_q_everywhere": False},
    "two heads": {"heads": 2},
    "odd grids, as at 312 pixels": {"crop": 60, "frames": 6, "stages": (1, 2, 3), "kv_stride": 8},
    "kv stride that divides no grid": {"crop": 76, "kv_stride": 8, "backbone_args": {"class_token": False}},
    "two frames": {"frames": 2},
    "one block": {"depth": 1, "stages": ()},
}


def config_of(variant: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**{**SMALL, **VARIANTS[variant], **changes})


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float64, mode: Any = "none") -> MultiTrain:
    model = MultiTrain(config, {"a": 5}, activation_checkpointing=mode).to(dtype)
    naive.perturbed(model)
    return model.eval()


def clips_of(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (2, 3, config.frames, config.crop, config.crop)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_agrees_with_the_plain_transcription_in_fp64(variant: str) -> None:
    config = config_of(variant)
    model, clips = model_of(config), clips_of(config)
    state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if not n.startswith("heads.")}
    assert {name: tuple(p.shape) for name, p in state.items()} == plain.shapes(config)
    actual, expected = model.features(clips), plain.features(state, config, clips)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model.features(clips), expected, rtol=1e-10, atol=1e-12)

    actual.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in state:
            torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("variant", ["release", "no class token", "separate qkv", "mvit"])
def test_fp32_agrees_with_the_plain_transcription(variant: str) -> None:
    config = config_of(variant)
    model, clips = model_of(config, torch.float32), clips_of(config, torch.float32)
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    actual, expected = model.features(clips), plain.features(state, config, clips)
    assert largest_error(actual.detach(), expected.detach()) < 1e-5


def test_large_scores_survive_bf16() -> None:
    """Relative positions are added to the scores in the precision of the scores."""
    config = config_of("release")
    model, clips = model_of(config, torch.float32), clips_of(config, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.features(clips)
    with torch.no_grad():
        exact = model.features(clips)
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).norm() / exact.norm()) < 0.05


def test_distances_of_unequal_grids_are_truncated_as_in_the_releases() -> None:
    assert distances(4, 4, torch.device("cpu"))[0].tolist() == [3, 2, 1, 0]
    assert distances(4, 2, torch.device("cpu")).tolist() == [[2, 0], [3, 1], [4, 2], [5, 3]]
    assert distances(39, 10, torch.device("cpu"))[0].tolist() == [35, 31, 27, 23, 19, 15, 11, 7, 3, 0]


def kept_bytes(function: Any) -> int:
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function()
    del out
    return sum(storages.values())


def test_no_matrix_of_queries_by_keys_is_kept_for_the_gradient() -> None:
    q_grid, kv_grid, heads, size = (4, 28, 28), (4, 14, 14), 2, 32
    n, m = (1 + math.prod(grid) for grid in (q_grid, kv_grid))
    q, k, v = (torch.randn(1, tokens, heads, size, requires_grad=True) for tokens in (n, m, m))
    tables = tuple(torch.randn(2 * side - 1, size, requires_grad=True) for side in q_grid)
    kept = kept_bytes(lambda: attend_with_positions(q, k, v, q_grid, kv_grid, tables))
    one_matrix = 4 * heads * n * m
    assert kept < one_matrix / 2


def gradients(mode: str, autocast: bool) -> dict[str, Tensor]:
    config = config_of("release", drop_path=0.5)
    model = model_of(config, torch.float32, mode).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        features = model.features(clips_of(config, torch.float32), torch.tensor([11, -12]))
    features.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", ["mlp", "selective", "full"])
def test_gradients_are_bit_identical_under_activation_checkpointing(mode: str, autocast: bool) -> None:
    expected, actual = gradients("none", autocast), gradients(mode, autocast)
    assert set(actual) == set(expected)
    assert all(actual[name].equal(value) for name, value in expected.items())


def test_a_process_that_has_predicted_can_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "CACHE", {})
    config = config_of("release")
    model = model_of(config, torch.float32)
    with torch.inference_mode():
        model.eval().features(clips_of(config, torch.float32))
    assert gradients("none", False)


def test_full_activation_checkpointing_keeps_a_fraction() -> None:
    config = config_of("release", crop=64, width=32)
    clips, keys = clips_of(config, torch.float32), torch.tensor([1, 2])
    models = {mode: model_of(config, torch.float32, mode).train() for mode in ("none", "full")}
    kept = {mode: kept_bytes(lambda model=model: model.features(clips, keys)) for mode, model in models.items()}
    assert kept["full"] < kept["none"] / 3


def test_a_copy_computes_the_same_and_is_another_model() -> None:
    config = config_of("release")
    model, clips = model_of(config), clips_of(config)
    other = copy.deepcopy(model)
    assert isinstance(other, MultiTrain)
    expected = model.features(clips)
    with torch.no_grad():
        model.cls_token.add_(1)
    assert torch.equal(other.features(clips), expected)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ({"frames": 16, "depth": 16, "stages": (1, 3, 14)}, 34_537_744),
        ({"frames": 32, "depth": 24, "stages": (2, 5, 21)}, 51_230_128),
        ({"frames": 40, "crop": 312, "depth": 48, "width": 144, "heads": 2, "stages": (2, 8, 44)}, 213_390_112),
    ],
)
def test_the_releases_have_their_number_of_parameters(preset: dict[str, Any], parameters: int) -> None:
    """34.5, 51.2 and 213.4 million: those of the official table."""
    config = ModelConfig(backbone="mvitv2", head="linear", projections=False, expander=False, **preset)
    with torch.device("meta"):
        model = MultiTrain(config, {"kinetics": 400})
    assert sum(p.numel() for p in model.parameters()) == parameters


GOLDEN = Path(__file__).resolve().parents[3] / "shared/golden"


def largest_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("name", ["k400", "ssv2"])
def test_the_outputs_are_those_of_the_authors_code(name: str) -> None:
    file = GOLDEN / f"mvitv2_s_16x4_{name}.pt"
    if not file.is_file():
        pytest.skip("the values of the authors' code are not beside this checkout")
    import importlib.util

    spec = importlib.util.spec_from_file_location("recipe", GOLDEN / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    from multitrain.interop.pyslowfast_config import read_cfg

    golden = torch.load(file, weights_only=False)
    config, datasets, _, _ = read_cfg(golden["cfg"])
    (dataset,) = datasets
    model = MultiTrain(config, datasets).eval()
    state = recipe.state_dict(golden["shapes"], golden["salt"])
    model.load_state_dict({n.replace("head.projection", f"heads.{dataset}"): t for n, t in state.items()})
    clip = recipe.clip(golden["batch"], golden["frames"], golden["size"], golden["salt"])
    with torch.no_grad():
        assert largest_error(model.features(clip), golden["features"]) < 1e-5
        assert largest_error(model(clip)[dataset], golden["probs"]) < 1e-5
    if "grads" in golden and os.environ.get("MULTITRAIN_SLOW") == "1":
        _check_gradients(config, model.double(), clip.double(), golden, dataset)


def _check_gradients(
    config: ModelConfig, model: MultiTrain, clip: Tensor, golden: dict[str, Any], dataset: str
) -> None:
    """In fp64: in fp32, of two nearly equal maxima in the shortcut's pooling another may win, on the authors' side as on ours."""
    model.zero_grad()
    logits = model.heads.of(dataset)(model.features(clip))
    (logits * golden["loss_weight"]).sum().backward()
    for name, parameter in model.named_parameters():
        theirs = name.replace(f"heads.{dataset}", "head.projection")
        assert parameter.grad is not None
        norm = float(golden["grad_norm"][theirs])
        if norm > 1e-5:  # less is rounding: the softmax does not depend on the keys' bias
            assert float(parameter.grad.float().norm()) == pytest.approx(norm, rel=1e-5)  # theirs is a sum in fp32
            if theirs in golden["grads"]:
                assert largest_error(parameter.grad, golden["grads"][theirs]) < 1e-5, name
