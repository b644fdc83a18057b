"""A backbone of the user's own: what is called, what is refused in one line, and what its random numbers depend on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from multitrain.config import ConfigError, ModelConfig
from multitrain.model import MultiTrain

MODULE = """
import torch
from torch import nn
from os import system

class Net(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.patches = nn.Conv3d(3, width, (2, 8, 8), (2, 8, 8))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(dropout))
                                    for _ in range(2))
        self.register_buffer("order", torch.arange(4))

    def forward(self, clips):
        x = self.patches(clips).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = x + layer(x)
        return x.mean(1)

def build(width=16, dropout=0.5, frames=None, crop=None):
    assert (frames, crop) == (4, 32)
    net = Net(width, dropout)
    return net, list(net.layers)

def alone(width=16): return Net(width, 0.5)
def number(): return 3
def unpooled(): return nn.Conv3d(3, 4, 1)
def whole_clips(): return nn.Flatten(0)
def listed(): return alone(), [nn.Linear(1, 1)]
def needs(argument): return argument
def normed(): return nn.Sequential(nn.Conv3d(3, 8, 4, 4), nn.BatchNorm3d(8), nn.AdaptiveAvgPool3d(1), nn.Flatten())
def failing(): return nn.Linear(7, 7)
"""
CLIPS = torch.randn(3, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
KEYS = torch.tensor([5, 6, 7])


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "ownnet.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("ownnet", None)


def model_of(function: str = "ownnet:build", mode: str = "none", crop: int = 32, **arguments: object) -> MultiTrain:
    config = ModelConfig(
        frames=4, crop=crop, backbone=function, backbone_args=arguments, head_hidden=16, expander_hidden=16
    )
    return MultiTrain(config, {"a": 3, "b": 2}, activation_checkpointing=mode)  # type: ignore[arg-type]


def gradients(mode: str) -> dict[str, torch.Tensor]:
    model = model_of(mode=mode).train()
    out = model.outputs(CLIPS, KEYS)
    sum(z.square().sum() for z in [*out.projected.values(), out.expanded]).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["mlp", "selective", "full"])
def test_activation_checkpointing_changes_no_bit(mode: str) -> None:
    expected, actual = gradients("none"), gradients(mode)
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_dropout_depends_on_the_first_clips_key_alone_and_leaves_the_global_generator() -> None:
    model = model_of().train()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model.features(CLIPS, KEYS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(model.features(CLIPS, KEYS), first)
    assert not torch.equal(model.features(CLIPS, KEYS + 1), first)
    model.eval()
    assert torch.equal(model.features(CLIPS), model.features(CLIPS))


def test_initial_weights_are_the_functions_own_under_the_seed() -> None:
    one, same, other = model_of(), model_of(), model_of()
    one.initialise(3)
    same.initialise(3)
    other.initialise(4)
    for name, tensor in one.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor)
    assert not torch.equal(other.state_dict()["backbone.patches.weight"], one.state_dict()["backbone.patches.weight"])
    assert one.state_dict()["backbone.patches.weight"].abs().max() < 0.06  # torch's own rule, not the published one


def test_a_function_may_return_a_module_alone_and_on_the_meta_device() -> None:
    assert model_of("ownnet:alone").dim == 16
    with torch.device("meta"):
        assert model_of("ownnet:alone", width=24).dim == 24


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("ownnet:number", "an object of type int; an nn.Module is wanted"),
        ("ownnet:unpooled", r"a tensor of shape \[2, 4, 4, 32, 32\] .*features of shape \[2, D\] are wanted"),
        ("ownnet:whole_clips", r"a tensor of shape \[24576\]"),
        ("ownnet:listed", "a list of layers of the module is wanted"),
        ("ownnet:needs", "TypeError: needs.. missing 1 required positional argument"),
        ("ownnet:failing", r"fails on clips of shape \[2, 3, 4, 32, 32\]: RuntimeError"),
        ("ownnet:nothing", "no function 'nothing'; it has build, alone"),
        ("ownnet:system", "is not defined in ownnet"),
        ("nowhere:build", "no module 'nowhere' on the Python path; put its folder on PYTHONPATH"),
        ("broken:build", "needs the module 'a_module_that_is_not_there'"),
        ("subprocess:check_output", "no file of yours"),
        ("torch.nn:Linear", "no file of yours"),
        ("builtins:print", "no file of yours"),
        ("multitrain.files:replacing", "no file of yours"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(function: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        model_of(function)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model.backbone={function}")


def test_a_weights_file_calls_no_function_of_an_installed_package(tmp_path: Path) -> None:
    """The description in a file is a stranger's: here it asks for a shell command."""
    import json

    from safetensors.torch import save_file

    import multitrain

    proof = tmp_path / "ran"
    model = ModelConfig(frames=4, crop=32).model_dump(mode="json")
    model |= {"backbone": "subprocess:call", "backbone_args": {"args": f"touch '{proof}'", "shell": True}}
    text = json.dumps({"model": model, "datasets": {"a": 2}})
    save_file({"backbone.x": torch.zeros(1)}, tmp_path / "x.safetensors", {"multitrain": text})
    with pytest.raises(ConfigError, match="no file of yours"):
        multitrain.load(tmp_path / "x.safetensors")
    assert not proof.exists()


def test_batch_norm_is_not_trained() -> None:
    model = model_of("ownnet:normed")
    assert "batch norm" in str(model.untrainable())
    assert model_of().untrainable() is None


@pytest.mark.parametrize("name", ["mynet", "my net:build", "a.b", ":x", "a:b:c"])
def test_a_name_that_is_no_function_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"package\.module:function"):
        ModelConfig(backbone=name)


def test_options_of_mvitv2_are_checked() -> None:
    with pytest.raises(ValueError, match=r"backbone_args.class_tokn.*has class_token"):
        ModelConfig(backbone="mvitv2", backbone_args={"class_tokn": True})
    with pytest.raises(ValueError, match=r"without model\.backbone"):
        ModelConfig(backbone_args={"class_token": True})
