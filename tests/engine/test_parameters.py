"""How tensors are trained: learning rates by layer and frozen tensors, for every kind of backbone, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY_CLASSES, settings, write_run

from launch.run_folder import compose_run
from multitrain.config import ConfigError, LossConfig, ModelConfig, OptimConfig, RunConfig, validate
from multitrain.engine.parameters import (
    LR_FACTOR,
    freeze,
    full_table,
    layer_numbers,
    parameter_groups,
    summary_table,
    treatments,
)
from multitrain.model import MultiTrain
from tests.model.test_checkpointing import KEYS

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=16, layers=3):
        super().__init__()
        self.patches = nn.Conv3d(3, width, (2, 8, 8), (2, 8, 8))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 32, 0.1, batch_first=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.token = nn.Parameter(torch.zeros(width))

    def forward(self, clips):
        x = self.patches(clips).flatten(2).transpose(1, 2) + self.token
        for layer in self.layers:
            x = layer(x)
        return self.norm(x.mean(1))

def build():
    net = Net()
    return net, list(net.layers)

def alone(): return Net()
"""
SIZE: dict[str, Any] = {"frames": 4, "crop": 32, "head_hidden": 24, "expander_hidden": 40}
BLOCKS = {"depth": 5, "width": 16, "stages": (1, 3), "kv_stride": 4, "drop_path": 0.5}
NETWORKS: dict[str, dict[str, Any]] = {
    "mvit": BLOCKS,
    "mvitv2": {**BLOCKS, "backbone": "mvitv2", "backbone_args": {"absolute": "separate", "norm_stem": True}},
    "own": {"backbone": "ownlayers:build"},
}


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "ownlayers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("ownlayers", None)


def model_of(kind: str, mode: str = "none", **changes: Any) -> MultiTrain:
    config = ModelConfig(**{**SIZE, **NETWORKS[kind], **changes})
    return MultiTrain(config, {"a": 7, "b": 5}, activation_checkpointing=mode)  # type: ignore[arg-type]


def by_hand(name: str, layers: int) -> int:
    """The layer of a tensor of the three networks, by its name."""
    name = name.removeprefix("backbone.")
    first, _, rest = name.partition(".")
    if first in ("blocks", "layers"):
        return int(rest.partition(".")[0]) + 1
    return 0 if first.startswith(("pos_embed", "cls_token", "patch", "norm_stem", "token")) else layers + 1


@pytest.mark.parametrize("kind", NETWORKS)
def test_learning_rates_decay_by_layer_as_computed_by_hand(kind: str) -> None:
    model, layers = model_of(kind), 3 if kind == "own" else 5
    found = treatments(model, OptimConfig(layer_decay=0.7, weight_decay=0.3))
    for t in found:
        assert t.layer == by_hand(t.name, layers), t.name
        assert t.lr_factor == pytest.approx(0.7 ** (layers + 1 - by_hand(t.name, layers)), rel=1e-12), t.name
        assert t.weight_decay == (0.3 if t.parameter.ndim > 1 else 0.0), t.name
    groups = parameter_groups(model, OptimConfig(layer_decay=0.7, weight_decay=0.3))
    in_groups = {id(p): (g[LR_FACTOR], g["weight_decay"]) for g in groups for p in g["params"]}
    assert in_groups == {id(t.parameter): (t.lr_factor, t.weight_decay) for t in found}
    assert sum(len(g["params"]) for g in groups) == len(found) == len(list(model.parameters()))
    assert {by_hand(t.name, layers) for t in found} == set(range(layers + 2)), "every layer is tried here"


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_values_that_mean_off_give_the_two_groups_of_before(kind: str) -> None:
    model = model_of(kind)
    decayed, others = parameter_groups(model, OptimConfig())
    assert [id(p) for p in decayed["params"]] == [id(p) for p in model.parameters() if p.ndim >= 2]
    assert [id(p) for p in others["params"]] == [id(p) for p in model.parameters() if p.ndim < 2]
    assert [(g[LR_FACTOR], g["weight_decay"]) for g in (decayed, others)] == [(1.0, 0.05), (1.0, 0.0)]


def test_a_tensor_between_two_layers_counts_as_part_of_the_earlier_one() -> None:
    net = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(5)))
    numbers = layer_numbers(net, [net[1], net[3]])
    assert [numbers[f"{i}.weight"] for i in range(5)] == [0, 1, 1, 2, 3]


def test_layer_decay_needs_to_know_the_layers() -> None:
    model = model_of("own", backbone="ownlayers:alone")
    with pytest.raises(ConfigError, match="return the module and the list of its layers"):
        treatments(model, OptimConfig(layer_decay=0.5))
    assert {t.layer for t in treatments(model, OptimConfig())} == {None}


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["patch_embed"], r"'patch_embed' matches no tensor of this network; did you mean 'patch_embed\.\*'"),
        (["blocks.*", "pach_embed.*"], r"'pach_embed\.\*' matches no tensor.*did you mean 'patch_embed\.\*'"),
        (["blocks.0.attn.qkv.weights"], r"did you mean 'blocks\.0\.attn\.qkv\.weight'"),
        (["zzzz"], r"known here: blocks\*, expander\*, heads\*, norm\*, patch_embed\*"),
        (["*"], r"optim\.freeze=\[\*\] freezes all tensors; leave some"),
        (["*.weight", "*.bias", "pos*"], "freezes all tensors"),
        (["[!e]*"], r"freezes all tensors but expander\.fc1\.weight, .*, which the loss does not use"),
    ],
)
def test_patterns_that_match_nothing_or_leave_nothing_are_refused_in_one_line(patterns: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        freeze(model_of("mvit"), patterns, LossConfig(informative_weight=0))
    assert "\n" not in str(caught.value)


def test_one_pattern_may_be_typed_without_brackets_and_an_empty_one_is_refused() -> None:
    assert OptimConfig(freeze="blocks.*").freeze == ("blocks.*",)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty pattern"):
        OptimConfig(freeze=("blocks.*", ""))


PATTERNS = {
    "prefix": ["patch*", "pos_embed*", "cls_token", "norm_stem.*", "blocks.[01].*", "backbone.[pt]*", "backbone.layers.0.*"],
    "attention": ["*attn.*"],
    "biases": ["*.bias"],
    "all blocks": ["blocks.*", "backbone.layers.*"],
    "backbone": ["patch*", "pos_embed*", "cls_token", "norm*", "blocks.*", "backbone.*"],
}  # fmt: skip


def gradients(kind: str, mode: str, patterns: list[str], precision: str = "fp32") -> dict[str, torch.Tensor]:
    model = model_of(kind, mode).train()
    freeze(model, [p for p in patterns if any(_matches(n, p) for n, _ in model.named_parameters())])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        clips = torch.randn(4, 3, 4, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        out = model.outputs(clips, KEYS)
    assert out.expanded is not None
    (out.expanded.float().square().sum() + sum(z.float().square().sum() for z in out.projected.values())).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _matches(name: str, pattern: str) -> bool:
    import fnmatch

    return fnmatch.fnmatchcase(name, pattern)


@pytest.mark.parametrize("frozen", PATTERNS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_not_frozen_has_the_gradient_of_a_network_without_frozen_tensors_in_every_mode(
    kind: str, frozen: str
) -> None:
    whole = gradients(kind, "none", [])
    found = {mode: gradients(kind, mode, PATTERNS[frozen]) for mode in ("none", "mlp", "selective", "full")}
    left = {n for n in whole if not any(_matches(n, p) for p in PATTERNS[frozen])}
    for mode, gradient in found.items():
        assert set(gradient) == left, mode
        for name in left:
            assert torch.equal(gradient[name], found["none"][name]), (mode, name)
            torch.testing.assert_close(
                gradient[name], whole[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("frozen", PATTERNS)
def test_modes_agree_in_half_precision_too(frozen: str) -> None:
    found = {mode: gradients("mvit", mode, PATTERNS[frozen], "bf16") for mode in ("none", "mlp", "selective", "full")}
    for gradient in found.values():
        assert gradient.keys() == found["none"].keys()
        assert all(torch.equal(gradient[name], value) for name, value in found["none"].items())


def test_the_tables_say_what_is_trained_how() -> None:
    model, optim = model_of("mvit"), OptimConfig(layer_decay=0.5, freeze=("pos*", "patch*", "blocks.[0-2].*"))
    freeze(model, optim.freeze)
    lines = [" ".join(line.split()) for line in summary_table(treatments(model, optim))]
    assert len(lines) == 6
    assert lines[1].startswith("pos_embed_spatial, pos_embed_temporal, patch_embed 0 4 ")
    assert lines[2].startswith("blocks.0 … blocks.2 1-3 65 ")
    assert lines[2].endswith("frozen –")
    assert lines[3].startswith("blocks.3 4 23 ")
    assert lines[3].endswith("× 0.25 0.05 on 8")
    assert lines[5].startswith("norm, heads, projections, expander 6 16 ")
    every = full_table(treatments(model, optim))
    assert len(every) == 1 + len(list(model.parameters()))
    assert " ".join(every[1].split()) == "pos_embed_spatial 0 1×64×16 1,024 frozen –"


def tuned(tmp_path: Path, **changes: Any) -> RunConfig:
    return validate(settings(tmp_path, **changes))


def test_a_run_keeps_what_is_frozen_and_may_change_its_layer_decay(tmp_path: Path) -> None:
    words = {"runs": str(tmp_path), "optim__freeze": ["patch_embed.*"]}
    run, _ = write_run(tmp_path, settings(tmp_path, **words))
    (run / "overrides.yaml").write_text("- overrides: [experiment=demo]\n")
    with pytest.raises(
        ConfigError, match=r"optim\.freeze: run 'tiny' has \['patch_embed\.\*'\], and \[\] was requested"
    ):
        compose_run([str(run), "optim.freeze=[]"])
    assert compose_run([str(run), "optim.layer_decay=0.5"]).config.optim.layer_decay == 0.5


def test_needs_are_those_of_the_trained_tensors(tmp_path: Path) -> None:
    from launch.memory_estimate import forecast
    from multitrain.commands.backbone_needs import needs
    from multitrain.order import solve

    sizes = {}
    for name, patterns in {"none": [], "half": ["p*", "blocks.[01].*"], "blocks": ["p*", "blocks.*"]}.items():
        config = tuned(tmp_path, optim__freeze=patterns)
        found = needs(config)
        model = MultiTrain(config.model, TINY_CLASSES)
        freeze(model, patterns)
        assert found["parameters"] == sum(p.numel() for p in model.parameters())
        assert found["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert bool(found["tensors"]) == bool(patterns)
        assert found["frozen_blocks"] == {"none": 0, "half": 2, "blocks": 3}[name]
        shape = solve(16, nodes=1, gpus=1, micro_batch=2, group=config.group)
        estimate = forecast(config, shape, found)
        sizes[name] = (estimate.clip_bytes, estimate.fixed_bytes)
        if name == "none":
            assert estimate == forecast(config, shape)
    assert sizes["none"] > sizes["half"] > sizes["blocks"]
    counted = [
        needs(tuned(tmp_path, optim__freeze=p, model=settings(tmp_path)["model"] | {"backbone": "mvitv2"}))[
            "clip_bytes"
        ]
        for p in ([], ["cls_token", "patch_embed.*", "blocks.[01].*"])
    ]
    assert counted[0] > counted[1]


def test_random_weights_are_not_frozen_without_a_note(tmp_path: Path) -> None:
    words = ["experiment=k400", "optim.freeze=blocks.*", f"runs={tmp_path}", "name=new"]
    said = "optim.freeze without init_from: frozen tensors keep random initial values; add init_from=WEIGHTS"
    assert compose_run(words).idle == [said]
    assert compose_run([*words, "init_from=weights.pyth"]).idle == []
    assert compose_run([*words, "model.backbone=mine:build"]).idle == []
