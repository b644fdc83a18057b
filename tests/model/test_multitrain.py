"""The whole model: what it returns, how it is initialised, and that training does not depend on how a batch is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.baseline import model as naive
from multitrain.config import ConfigError, ModelConfig
from multitrain.model import MultiTrain
from multitrain.model.random import KeyedDropPath

SMALL: dict[str, Any] = {
    "frames": 4, "crop": 32, "depth": 3, "width": 16, "stages": (1,), "kv_stride": 4, "head_hidden": 24, "expander_hidden": 40,
}  # fmt: skip
DATASETS = {"a": 7, "b": 5, "c": 3}
KEYS = torch.tensor([5, -6, 7, 8, 9, 10])


def model_of(datasets: dict[str, int] = DATASETS, **changes: Any) -> MultiTrain:
    model = MultiTrain(ModelConfig(**{**SMALL, **changes}), datasets)
    naive.perturbed(model, 0.05)
    return model


def clips_of(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_model_returns_probabilities_of_each_dataset() -> None:
    model = MultiTrain(ModelConfig(**SMALL), DATASETS, multi_label=["b"]).eval()
    assert model.datasets == DATASETS
    clips = clips_of()
    with torch.no_grad():
        probabilities, out = model(clips), model.outputs(clips)
    assert {name: p.shape for name, p in probabilities.items()} == {n: (6, k) for n, k in DATASETS.items()}
    torch.testing.assert_close(probabilities["a"], out.logits["a"].softmax(-1))
    torch.testing.assert_close(probabilities["b"], out.logits["b"].sigmoid())
    assert out.features.shape == (6, 32)
    assert set(out.projected) == {(a, b) for a in DATASETS for b in DATASETS if a != b}
    assert out.projected["a", "c"].shape == (6, 3)
    assert out.expanded is not None
    assert out.expanded.shape == (6, 32)


def test_probabilities_of_a_half_precision_model_sum_to_one_in_fp32() -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        probabilities = model_of().eval()(clips_of())["a"]
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(6))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_embeddings_are_those_of_the_outputs_to_the_bit(recompute: str) -> None:
    config = ModelConfig(**{**SMALL, "drop_path": 0.5})
    model = MultiTrain(config, DATASETS, activation_checkpointing=recompute).train()  # type: ignore[arg-type]
    naive.perturbed(model)
    out = model.outputs(clips_of(), KEYS)
    with torch.no_grad():
        first_pass = model.embeddings(clips_of(), KEYS)
    assert out.expanded is not None
    assert first_pass.equal(out.expanded)
    assert not first_pass.equal(model.embeddings(clips_of(), KEYS + 1))


def test_training_outputs_do_not_depend_on_the_micro_batch() -> None:
    model = model_of(drop_path=0.5, head_dropout=0.5, dropout_logits=True).double().train()
    clips = clips_of().double()
    whole = model.outputs(clips, KEYS)
    parts = [model.outputs(clips[i : i + 2], KEYS[i : i + 2]) for i in (0, 2, 4)]
    for name in DATASETS:
        joined = torch.cat([part.logits[name] for part in parts])
        torch.testing.assert_close(joined, whole.logits[name], rtol=1e-12, atol=1e-12)
        assert (joined == 0).float().mean() > 0.2
    torch.testing.assert_close(torch.cat([p.features for p in parts]), whole.features, rtol=1e-12, atol=1e-12)


def test_without_keys_training_draws_them_from_torchs_generator() -> None:
    model = model_of(drop_path=0.5).train()
    torch.manual_seed(1)
    first = model.outputs(clips_of())
    torch.manual_seed(1)
    assert model.outputs(clips_of()).logits["a"].equal(first.logits["a"])
    assert not model.outputs(clips_of()).logits["a"].equal(first.logits["a"])


def test_drop_path_grows_linearly_and_each_branch_has_a_stream() -> None:
    model = model_of(drop_path=0.4)
    layers = [m for m in model.modules() if isinstance(m, KeyedDropPath)]
    assert [layer.p for layer in layers] == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])
    assert len({layer.stream for layer in layers}) == 6


def test_eval_mode_needs_no_keys_and_ignores_them() -> None:
    model = model_of(drop_path=0.5).eval()
    assert model.features(clips_of()).equal(model.features(clips_of(), KEYS))


def test_one_dataset_with_a_linear_head_has_neither_projections_nor_unused_parameters() -> None:
    model = MultiTrain(ModelConfig(**{**SMALL, "head": "linear", "expander": False}), {"kinetics": 4})
    names = {n.split(".")[0] for n in model.state_dict()}
    assert names == {"pos_embed_spatial", "pos_embed_temporal", "patch_embed", "blocks", "norm", "heads"}
    assert model.state_dict()["heads.kinetics.weight"].shape == (4, 32)
    with pytest.raises(ConfigError, match="expander"):
        model.embeddings(clips_of())


def test_parameters_have_the_published_names() -> None:
    names = set(model_of().state_dict())
    for module, parts in {
        "blocks.1": [
            "norm1",
            "attn.qkv",
            "attn.proj",
            "attn.norm_q",
            "attn.norm_k",
            "attn.norm_v",
            "norm2",
            "mlp.fc1",
            "mlp.fc2",
        ],
        "": [
            "patch_embed.proj",
            "norm",
            "heads.a.fc1",
            "heads.a.fc2",
            "expander.fc1",
            "expander.fc2",
            "blocks.1.proj_max_pool",
        ],
    }.items():
        for part in parts:
            path = f"{module}.{part}" if module else part
            assert {f"{path}.weight", f"{path}.bias"} <= names
    assert {f"blocks.0.attn.pool_{x}.weight" for x in "qkv"} <= names
    assert {"projections.a.b.weight", "projections.c.a.weight", "pos_embed_spatial", "pos_embed_temporal"} <= names


def test_gradients_reach_every_parameter() -> None:
    model = model_of().train()
    out = model.outputs(clips_of(), KEYS)
    assert out.expanded is not None
    (out.expanded.square().sum() + sum(z.square().sum() for z in out.projected.values())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_initialisation_follows_the_published_rules() -> None:
    model = MultiTrain(ModelConfig(**{**SMALL, "width": 64}), DATASETS)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        if isinstance(module, nn.Linear):
            assert module.bias is None or (module.bias == 0).all()
            if module.weight.numel() > 10000:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.03)
                assert module.weight.mean().abs() < 1e-3
                assert 3.5 < (module.weight.abs().max() / 0.02).item() < 6
    assert model.pos_embed_spatial.std().item() == pytest.approx(0.02, rel=0.06)
    bound = (3 * 3 * 7 * 7) ** -0.5
    weight = model.patch_embed.proj.weight
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert 0.98 * bound < weight.abs().max() <= bound
    bias = model.patch_embed.proj.bias
    assert bias is not None
    assert 0 < bias.abs().max() <= bound
    pool = model.get_parameter("blocks.0.attn.pool_k.weight")
    assert pool.std().item() == pytest.approx(27**-0.5 / 3**0.5, rel=0.05)


def test_initialisation_is_keyed_by_name_and_seed() -> None:
    small, large = MultiTrain(ModelConfig(**SMALL), {"a": 7}), MultiTrain(ModelConfig(**SMALL), {"new": 9, "a": 7})
    shared = set(small.state_dict()) & set(large.state_dict())
    assert len(shared) == len(small.state_dict())
    assert all(small.state_dict()[name].equal(large.state_dict()[name]) for name in shared)
    other = MultiTrain(ModelConfig(**SMALL), {"a": 7})
    other.initialise(1)
    assert not other.pos_embed_spatial.equal(small.pos_embed_spatial)
    naive.perturbed(other)
    other.initialise(0)
    assert all(value.equal(small.state_dict()[name]) for name, value in other.state_dict().items())
    assert not small.get_parameter("blocks.0.mlp.fc1.weight").equal(
        small.get_parameter("blocks.1.mlp.fc1.weight")[:64, :16]
    )


def test_the_first_weights_stay_what_they_are_in_every_version() -> None:
    first = MultiTrain(ModelConfig(**SMALL), {"a": 7}).pos_embed_temporal.flatten()[:3]
    torch.testing.assert_close(
        first, torch.tensor([-0.00164258445, -0.0172047373, -0.0157812834]), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize(
    ("datasets", "multi_label", "message"),
    [
        ({}, [], "at least one dataset"),
        ({"a": 0}, [], "'a' has 0 classes"),
        ({"a": 2}, ["b"], "'b'"),
        ({"a/b": 2}, [], "'a/b'"),
    ],
)
def test_impossible_datasets_are_refused_in_one_line(
    datasets: dict[str, int], multi_label: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        MultiTrain(ModelConfig(**SMALL), datasets, multi_label=multi_label)
    assert "\n" not in str(error.value)
