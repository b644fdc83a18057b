"""A video network starts from an image network's weights (MViTv2 on ImageNet-21k): convolutions inflated, positions in time zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from multitrain.config import ConfigError, ModelConfig
from multitrain.interop.incompatible_checkpoints import IncompatibleWeights
from multitrain.interop.inspection import inspect
from multitrain.interop.start import initialise_from
from multitrain.model import MultiTrain

SIZE: dict[str, Any] = {
    "depth": 4,
    "width": 16,
    "stages": [1, 3],
    "kv_stride": 4,
    "backbone": "mvitv2",
    "head": "linear",
}


def video(crop: int = 32, **arguments: Any) -> MultiTrain:
    config = ModelConfig(frames=4, crop=crop, expander=False, projections=False, backbone_args=arguments, **SIZE)
    return MultiTrain(config, {"kinetics": 5})


def image_release(folder: Path, crop: int = 32, **more: torch.Tensor) -> Path:
    """A file with the names and shapes of the official image networks."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, tensor in video(crop).state_dict().items():
        if name.startswith("heads.") or name.endswith("rel_pos_t") or name == "cls_token":
            continue
        shape = (*tensor.shape[:2], *tensor.shape[3:]) if tensor.dim() == 5 else tensor.shape
        state[name] = torch.randn(shape, generator=generator)
    head = {"head.projection.weight": torch.zeros(19168, 64), "head.projection.bias": torch.zeros(19168)}
    torch.save({"model_state": state | head | more}, folder / "MViTv2_in21k.pyth")
    return folder / "MViTv2_in21k.pyth"


def test_every_tensor_is_the_image_networks_or_says_that_it_is_not(tmp_path: Path) -> None:
    file, model = image_release(tmp_path), video()
    token = model.state_dict()["cls_token"].clone()
    report = initialise_from(model, file)
    theirs, ours = torch.load(file, weights_only=True)["model_state"], model.state_dict()
    for name, tensor in ours.items():
        if name.startswith("heads.") or name == "cls_token":
            continue
        if name.endswith("rel_pos_t"):
            assert not tensor.any()
        elif tensor.dim() == 5:
            assert torch.equal(tensor, (theirs[name][:, :, None] / 3).expand(tensor.shape)), name
        else:
            assert torch.equal(tensor, theirs[name]), name
    assert torch.equal(ours["cls_token"], token)
    assert set(report.fresh) == {"cls_token", "heads.kinetics.weight", "heads.kinetics.bias"}
    assert [name for name, *_ in report.reshaped] == ["heads.kinetics.weight", "heads.kinetics.bias"]
    assert (
        "inflated from images: 13 convolutions; 4 tables of relative positions in time are 0; cls_token keeps"
        in str(report)
    )


def test_a_still_clip_gives_the_image_networks_patches_away_from_its_ends(tmp_path: Path) -> None:
    file, model = image_release(tmp_path), video()
    initialise_from(model, file)
    theirs = torch.load(file, weights_only=True)["model_state"]
    image = torch.randn(1, 3, 32, 32)
    expected = F.conv2d(image, theirs["patch_embed.proj.weight"], theirs["patch_embed.proj.bias"], stride=4, padding=3)
    clips = image[:, :, None].expand(-1, -1, 4, -1, -1)
    patches = model.patch_embed(clips).view(1, 2, 64, 16)
    torch.testing.assert_close(patches[:, 1], expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_tables_of_larger_images_are_interpolated_on_request_only(tmp_path: Path) -> None:
    file, model = image_release(tmp_path, crop=64), video()
    with pytest.raises(ConfigError, match=r"position tables of another clip size .*; add interpolate_positions=true$"):
        initialise_from(model, file)
    report = initialise_from(model, file, interpolate_positions=True)
    assert "blocks.0.attn.rel_pos_h interpolated from [31, 16] to [15, 16]" in str(report)
    table = torch.load(file, weights_only=True)["model_state"]["blocks.0.attn.rel_pos_h"]
    expected = F.interpolate(table.T[None], size=15, mode="linear")[0].T
    torch.testing.assert_close(model.state_dict()["blocks.0.attn.rel_pos_h"], expected)


def test_images_of_another_network_are_refused_tensor_by_tensor(tmp_path: Path) -> None:
    file = image_release(tmp_path, **{"blocks.4.norm1.weight": torch.zeros(64)})
    with pytest.raises(IncompatibleWeights) as caught:
        initialise_from(video(), file)
    assert list(caught.value.reasons) == ["blocks.4.norm1.weight"]


def test_the_file_is_recognised(tmp_path: Path) -> None:
    found = inspect(image_release(tmp_path))
    assert found.network == "4 blocks of 16 to 64 channels, for images"
    assert (found.problem, dict(found.heads)) == (None, {"head.projection": 19168})
