"""Checkpoints in the published layout: a joint and a single model that are at hand everywhere, and the published ones beside."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.published import JOINT, SINGLE, SMALL, WHOLE, models
from multitrain.config import ModelConfig
from multitrain.interop.layout import layout
from multitrain.interop.published_cfg import make_cfg
from multitrain.interop.pyslowfast import write_pyth

TINY: dict[str, Any] = {"frames": 8, "crop": 64, "depth": 4, "width": 32, "stages": (1, 3), "kv_stride": 8}
NAMES = {"kinetics": 400, "mit": 305, "ssv2": 174}
SOLVER = {"BASE_LR": 2e-4, "MAX_EPOCH": 200, "WEIGHT_DECAY": 0.05}
OF_WHOLE = [WHOLE / f"{name}.pyth" for name in models(WHOLE)]


@pytest.fixture(scope="session")
def joint_pyth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint model of random weights, small hidden layers, with the solver's options that a training run writes."""
    config = ModelConfig(**TINY, head_hidden=24, expander_hidden=40)
    generator = torch.Generator().manual_seed(0)
    state = {n: 0.1 * torch.randn(shape, generator=generator) for n, shape in layout(config, NAMES).items()}
    path = tmp_path_factory.mktemp("joint") / f"{JOINT}.pyth"
    cfg = yaml.safe_dump(yaml.safe_load(make_cfg(config, NAMES)) | {"SOLVER": SOLVER})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # small widths are not the published ones
        write_pyth(path, config, NAMES, state, cfg=cfg)
    return path


@pytest.fixture(
    scope="session", params=["joint", SINGLE, *OF_WHOLE], ids=lambda p: p if isinstance(p, str) else f"whole-{p.stem}"
)
def pyth(request: pytest.FixtureRequest, joint_pyth: Path) -> Path:
    """A checkpoint in the published layout."""
    if isinstance(request.param, Path):
        return request.param
    return joint_pyth if request.param == "joint" else SMALL / f"{SINGLE}.pyth"
