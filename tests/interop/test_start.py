"""Starting from files of other layouts: all backbone tensors fit, or each one that does not is named with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from multitrain.config import ModelConfig
from multitrain.interop.incompatible_checkpoints import IncompatibleWeights
from multitrain.interop.start import initialise_from
from multitrain.model import MultiTrain
from tests import support

CONFIG = ModelConfig.model_validate(support.MODEL)
DATASETS = {"a": 3, "b": 2}


def backbone(model: MultiTrain) -> dict[str, torch.Tensor]:
    own = ("heads.", "projections.", "expander.")
    return {n: torch.randn_like(t) for n, t in model.state_dict().items() if not n.startswith(own)}


def test_a_file_of_only_tensors_that_all_fit_is_a_start(tmp_path: Path) -> None:
    model = MultiTrain(CONFIG, DATASETS)
    state = backbone(model)
    head = {"head.projection.weight": torch.zeros(400, 32), "head.projection.bias": torch.zeros(400)}
    torch.save({"model_state": state | head}, tmp_path / "release.pyth")
    report = initialise_from(model, tmp_path / "release.pyth")
    assert set(report.matched) == set(state)
    assert report.unexpected == ("head.projection.weight", "head.projection.bias")
    assert all(n.startswith(("heads.", "projections.", "expander.")) for n in report.fresh)
    assert "only names and shapes" in str(report)
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_names_that_ddp_prefixed_are_read(tmp_path: Path) -> None:
    model = MultiTrain(CONFIG, DATASETS)
    state = backbone(model)
    torch.save({"model_state": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "ddp.pyth")
    assert set(initialise_from(model, tmp_path / "ddp.pyth").matched) == set(state)


def test_an_official_mvitv2_release_is_refused_tensor_by_tensor(tmp_path: Path) -> None:
    """The layout of the MViTv2 releases: relative positions, a class token, other shortcuts, no absolute tables."""
    model = MultiTrain(CONFIG, DATASETS)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = backbone(model)
    tables = [state.pop(n) for n in ("pos_embed_spatial", "pos_embed_temporal")]
    assert len(tables) == 2
    for name in list(state):
        if ".proj_max_pool." in name:
            state[name.replace("proj_max_pool", "proj")] = state.pop(name)
    state |= {f"blocks.{i}.attn.rel_pos_{a}": torch.zeros(7, 16) for i in range(CONFIG.depth) for a in "hwt"}
    state["cls_token"] = torch.zeros(1, 1, 16)
    state["patch_embed.proj.weight"] = torch.zeros(16, 3, 7, 7)
    torch.save({"model_state": state, "cfg": "MVIT: {REL_POS_SPATIAL: true}"}, tmp_path / "MViTv2_B.pyth")
    with pytest.raises(IncompatibleWeights) as caught:
        initialise_from(model, tmp_path / "MViTv2_B.pyth")
    reasons = caught.value.reasons
    assert {n for n in reasons if "rel_pos" in n} == {n for n in state if "rel_pos" in n}
    assert "class token" in reasons["cls_token"]
    assert "normalised input" in reasons["blocks.1.proj.weight"]
    assert reasons["pos_embed_spatial"] == "not in the file; this network needs it"
    assert reasons["patch_embed.proj.weight"] == "[16, 3, 7, 7] in the file, [16, 3, 3, 7, 7] in this network"
    assert not any(n.startswith(("head", "projections", "expander")) for n in reasons)
    assert len(caught.value.details) == len(reasons) == 9 + 1 + 2 + 2 + 2 + 1
    assert "\n" not in str(caught.value)
    for name, tensor in model.state_dict().items():  # nothing was copied
        assert torch.equal(tensor, before[name])
