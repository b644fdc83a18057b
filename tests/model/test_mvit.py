"""The backbone is the published one, computed leanly: fp64 agreement with a naive version, geometry, sizes, precisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.baseline import model as naive
from multitrain.config import ConfigError, ModelConfig
from multitrain.model import MultiTrain, MViT
from multitrain.model.mvit import block_shapes

SMALL = {
    "frames": 4,
    "crop": 32,
    "depth": 4,
    "width": 16,
    "stages": (1, 3),
    "kv_stride": 4,
    "head_hidden": 24,
    "expander_hidden": 40,
}
DATASETS = {"a": 7, "b": 5, "c": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "published multi": {},
    "linear heads": {"head": "linear"},
    "pool q at stage changes only": {"pool_q_everywhere": False, "residual_q": False},
    "residual q without pooling": {"pool_q_everywhere": False},
    "no residual q": {"residual_q": False},
    "two heads from the start": {"heads": 2},
    "kv stride 8": {"kv_stride": 8, "crop": 64},
    "one stage": {"stages": (2,), "depth": 3},
    "no stage change": {"stages": (), "depth": 1},
    "two frames": {"frames": 2},
    "odd grid": {"crop": 96, "stages": (1, 2, 3), "kv_stride": 4},
    "grid that is rounded up": {"crop": 52, "stages": (1, 2, 3), "kv_stride": 8},
}


def config_of(variant: str) -> ModelConfig:
    return ModelConfig(**{**SMALL, **VARIANTS[variant]})


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float64) -> MultiTrain:
    model = MultiTrain(config, DATASETS).to(dtype)
    naive.perturbed(model)
    return model.eval()


def clips_of(config: ModelConfig, count: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (count, 3, config.frames, config.crop, config.crop)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_agrees_with_the_naive_model_in_fp64(variant: str) -> None:
    config = config_of(variant)
    model, clips = model_of(config), clips_of(config)
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = naive.outputs(state, config, DATASETS, clips)
    out = model.outputs(clips)
    actual = {"features": out.features, **out.logits, **{f"{a}>{b}": z for (a, b), z in out.projected.items()}}
    actual["expanded"] = out.expanded
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12)

    sum(value.square().sum() for value in actual.values()).backward()
    sum(value.square().sum() for value in expected.values()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("frames", "depth", "stages", "kv_grids"),
    [
        (32, 24, (2, 5, 21), {2: 3136, 5: 3136, 21: 3136}),
        (16, 16, (1, 3, 14), {1: 1568, 3: 1568, 14: 1568}),
    ],
)
def test_the_geometry_is_that_of_the_published_layer_table(
    frames: int, depth: int, stages: tuple[int, ...], kv_grids: dict[int, int]
) -> None:
    shapes = block_shapes(ModelConfig(frames=frames, depth=depth, stages=stages, drop_path=0.1))
    time, ordinary = frames // 2, frames // 2 * 49
    dim, side, stride = 96, 56, 8
    for i, shape in enumerate(shapes):
        change = i in stages
        assert shape.dim_in == dim
        assert shape.grid == (time, side, side)
        if change:
            dim, side, stride = dim * 2, side // 2, stride // 2
        assert (shape.dim_out, shape.heads, shape.q_grid) == (dim, dim // 96, (time, side, side))
        assert shape.kv_stride == stride
        t, h, w = shape.kv_grid
        assert t * h * w == kv_grids.get(i, ordinary)
        assert shape.drop_path == pytest.approx(0.1 * i / (depth - 1))


@pytest.mark.parametrize(
    ("changes", "datasets", "parameters"),
    [
        ({}, {"kinetics": 400, "mit": 305, "ssv2": 174}, 64_297_643),
        ({"expander": False, "projections": False}, {"kinetics": 400, "mit": 305, "ssv2": 174}, 57_511_983),
        ({"head": "linear", "expander": False}, {"kinetics": 400}, 51_293_776),
        ({"head": "linear", "expander": False}, {"ssv2": 174}, 51_119_982),
        ({"frames": 16, "depth": 16, "stages": (1, 3, 14), "head": "linear", "expander": False}, {"kinetics": 400}, 34_709_296),
        ({"frames": 16, "depth": 16, "stages": (1, 3, 14), "head": "linear", "expander": False}, {"ssv2": 174}, 34_535_502),
        (
            {
                "frames": 16, "depth": 16, "stages": (1, 3, 14), "head": "linear", "expander": False,
                "pool_q_everywhere": False, "residual_q": False,
            },
            {"ssv2": 174},
            34_499_310,
        ),
    ],
)  # fmt: skip
def test_every_published_network_has_its_number_of_parameters(
    changes: dict[str, Any], datasets: dict[str, int], parameters: int
) -> None:
    with torch.device("meta"):
        model = MultiTrain(ModelConfig(**changes), datasets)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_clip_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    config = ModelConfig(**SMALL)
    model, clips = model_of(config), clips_of(config, 3)
    with torch.no_grad():
        together = model.features(clips)
        alone = torch.cat([model.features(clip[None]) for clip in clips])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_only_stage_changes_pool_the_shortcut_and_nothing_is_copied_to_pool() -> None:
    config = ModelConfig(**{**SMALL, "depth": 6, "stages": (1, 3)})
    model, clips = model_of(config, torch.float32), clips_of(config, dtype=torch.float32)
    with torch.no_grad():
        model.features(clips)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            model.features(clips)
    counts = {event.key: event.count for event in seen.key_averages()}
    one_axis = 2
    assert counts["aten::maximum"] == 2 * 2 * one_axis
    assert counts["aten::conv3d"] == 1 + 2 * config.depth
    # The tokens of the patch embedding, and keys and values of each block for their norms.
    assert counts.get("aten::contiguous", 0) <= 1 + 2 * config.depth


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["autocast", "pure"])
def test_half_precisions_stay_near_fp32(dtype: torch.dtype, weights: str) -> None:
    config = ModelConfig(**SMALL)
    model, clips = MultiTrain(config, DATASETS).eval(), clips_of(config, dtype=torch.float32)
    with torch.no_grad():
        expected = model.features(clips)
    if weights == "pure":
        features = model.to(dtype).features(clips.to(dtype))
        assert features.dtype == dtype
    else:
        with torch.autocast("cpu", dtype=dtype):
            features = model.features(clips)
        assert features.dtype == torch.float32
    error = (features.float() - expected).norm() / expected.norm()
    assert 0 < error < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    features.float().square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n.startswith("blocks")
    )


def test_bf16_is_no_farther_from_fp32_than_the_naive_model_is() -> None:
    config = ModelConfig(**{**SMALL, "crop": 64, "width": 32, "depth": 10})
    model, clips = model_of(config, torch.float32), clips_of(config, 4, torch.float32)
    state = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        exact = naive.features(state, config, clips)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = model.features(clips), naive.features(state, config, clips).float()
    assert (ours - exact).abs().mean() <= 1.05 * (theirs - exact).abs().mean()


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 4, 32, 33), (2, 3, 5, 32, 32), (2, 1, 4, 32, 32), (3, 4, 32, 32)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_clips_of_another_size_are_refused_in_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"model\.frames=4, model\.crop=32") as error:
        MViT(ModelConfig(**SMALL))(torch.zeros(shape))
    assert "\n" not in str(error.value)


def test_keys_of_another_number_of_clips_are_refused() -> None:
    config = ModelConfig(**SMALL)
    with pytest.raises(ConfigError, match="one key"):
        MViT(config)(clips_of(config, dtype=torch.float32), torch.zeros(1, dtype=torch.int64))


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is not a multiple of heads=3"):
        ModelConfig(**{**SMALL, "heads": 3})


@pytest.mark.slow
def test_the_full_size_model_agrees_with_the_naive_one_in_fp32() -> None:
    config = ModelConfig()
    model, clips = MultiTrain(config, {"kinetics": 400}).eval(), clips_of(config, 1, torch.float32)
    state = dict(model.named_parameters())
    with torch.no_grad():
        expected, actual = naive.features(state, config, clips), model.features(clips)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
