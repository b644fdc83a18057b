"""The needs of a network are counted without data: its parameters, and less memory for more recomputation."""

from __future__ import annotations

from pathlib import Path

from support import settings

from multitrain.commands.backbone_needs import needs
from multitrain.config import RunConfig, validate
from multitrain.model import MultiTrain

MODEL = {"frames": 4, "crop": 64, "depth": 6, "width": 16, "stages": [1], "kv_stride": 4, "backbone": "mvitv2"}


def config(mode: str, **changes: object) -> RunConfig:
    return validate(settings(Path("nowhere"), model=MODEL, activation_checkpointing=mode, **changes))


def test_parameters_are_the_networks_and_recomputing_takes_less_memory() -> None:
    found = {mode: needs(config(mode)) for mode in ("none", "mlp", "selective", "full")}
    run = config("none")
    datasets = {name: d.classes or 0 for name, d in run.data.datasets.items()}
    parameters = sum(p.numel() for p in MultiTrain(run.model, datasets).parameters())
    assert {one["parameters"] for one in found.values()} == {parameters}
    sizes = {mode: one["clip_bytes"] for mode, one in found.items()}
    assert sizes["none"] > sizes["mlp"] > max(sizes["selective"], sizes["full"]) > 0
