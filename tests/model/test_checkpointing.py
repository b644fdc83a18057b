"""Activation checkpointing changes memory, not numbers: gradients are bit-identical, keyed masks included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.baseline import model as naive
from multitrain.config import ModelConfig
from multitrain.model import MultiTrain, MViT

CONFIG = ModelConfig(
    frames=4, crop=32, depth=5, width=16, stages=(1, 3), kv_stride=4, head_hidden=24, expander_hidden=40, drop_path=0.5
)
KEYS = torch.tensor([11, -12, 13, 14])


def gradients(recompute: str, keys: Tensor | None = KEYS, autocast: bool = False) -> dict[str, Tensor]:
    model = MultiTrain(CONFIG, {"a": 7, "b": 5}, activation_checkpointing=recompute).train()  # type: ignore[arg-type]
    naive.perturbed(model)
    torch.manual_seed(5)
    clips = torch.randn(4, 3, 4, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model.outputs(clips, keys)
    assert out.expanded is not None
    loss = out.expanded.float().square().sum() + sum(z.float().square().sum() for z in out.projected.values())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", ["mlp", "selective", "full"])
@pytest.mark.parametrize("keys", [KEYS, None], ids=["keyed", "drawn"])
def test_gradients_are_bit_identical_to_those_without(recompute: str, keys: Tensor | None, autocast: bool) -> None:
    expected, actual = gradients("none", keys, autocast), gradients(recompute, keys, autocast)
    assert set(actual) == set(expected)
    assert all(actual[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_masks_drawn_by_the_backbone_alone_are_recomputed_too(recompute: str) -> None:
    grads = []
    for mode in ("none", recompute):
        model = MViT(CONFIG, mode).train()  # type: ignore[arg-type]
        for parameter in model.parameters():
            parameter.data.fill_(0.1)
        naive.perturbed(model)
        torch.manual_seed(5)
        model(torch.randn(4, 3, 4, 32, 32)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(a is not None and a.equal(b) for a, b in zip(*grads))


def test_the_masks_of_this_test_matter() -> None:
    assert not gradients("none")["norm.weight"].equal(gradients("none", KEYS + 1)["norm.weight"])


class Recorder(TorchDispatchMode):
    """Counts the operations that reach the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.name()
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def backward_counts(recompute: str) -> dict[str, int]:
    model = MultiTrain(CONFIG, {"a": 7}, activation_checkpointing=recompute).train()  # type: ignore[arg-type]
    features = model.features(torch.randn(2, 3, 4, 32, 32), KEYS[:2])
    with Recorder() as seen:
        features.sum().backward()
    return seen.counts


def test_each_mode_computes_again_what_it_says_and_no_more() -> None:
    counts = {mode: backward_counts(mode) for mode in ("none", "mlp", "selective", "full")}
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert [c.get(attention, 0) for c in counts.values()] == [0, 0, 0, CONFIG.depth]
    query_kv_proj_fc1 = 4
    everything = query_kv_proj_fc1 * CONFIG.depth + len(CONFIG.stages)
    assert [c.get("aten::addmm", 0) for c in counts.values()] == [0, CONFIG.depth, everything, everything]


def kept_bytes(recompute: str) -> int:
    """Bytes that autograd itself keeps for the backward pass, without the parameters."""
    config = ModelConfig(**{**CONFIG.model_dump(), "crop": 64, "width": 32})
    model = MultiTrain(config, {"a": 7}, activation_checkpointing=recompute).train()  # type: ignore[arg-type]
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        features = model.features(torch.randn(4, 3, 4, 64, 64), KEYS)
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del features
    return sum(storages.values())


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_keeps_a_fraction_of_the_activations(recompute: str) -> None:
    assert kept_bytes(recompute) * 3.5 <= kept_bytes("none")
    assert kept_bytes("mlp") * 4 <= kept_bytes("none") * 3
