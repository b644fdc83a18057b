"""Parameters and multiply-accumulates are the published ones."""

from __future__ import annotations

import sys

import pytest

from multitrain.config import ConfigError, ModelConfig
from multitrain.model.cost import flops

MULTI = {"kinetics": 400, "mit": 305, "ssv2": 174}
SINGLE = {"head": "linear", "projections": False, "expander": False}


@pytest.fixture(autouse=True)
def _fvcore() -> None:
    pytest.importorskip("fvcore", reason="fvcore is not installed: pip install 'multitrain[flops]'")


def test_the_multi_dataset_model_costs_what_was_published() -> None:
    parameters, macs = flops(ModelConfig(), MULTI)
    assert parameters == 64_297_643
    assert macs / 1e9 == pytest.approx(223.84, abs=0.005)


def test_the_kinetics_16x4_model_costs_what_was_published() -> None:
    parameters, macs = flops(ModelConfig(frames=16, depth=16, stages=(1, 3, 14), **SINGLE), {"kinetics": 400})
    assert parameters == 34_709_296
    assert macs / 1e9 == pytest.approx(64.10, abs=0.005)


def test_a_missing_fvcore_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with pytest.raises(ConfigError, match=r"multitrain\[flops\]"):
        flops(ModelConfig(), MULTI)


@pytest.mark.parametrize(
    ("network", "parameters", "published"),
    [
        ({"frames": 16, "depth": 16, "stages": (1, 3, 14)}, 34.5, 64.5),
        ({"frames": 32, "depth": 24, "stages": (2, 5, 21)}, 51.2, 225),
    ],
)
def test_the_official_mvitv2_costs_what_its_authors_report(
    network: dict[str, object], parameters: float, published: float
) -> None:
    count, macs = flops(ModelConfig.model_validate({"backbone": "mvitv2", **SINGLE, **network}), {"kinetics": 400})
    assert count / 1e6 == pytest.approx(parameters, abs=0.05)
    assert macs / 1e9 == pytest.approx(published, rel=2e-3)
