"""What is unusual in a run is noticed with a remedy; a usual run is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multitrain.config import RunConfig, validate
from multitrain.records.diagnosis import diagnose
from multitrain.records.recorder import Recorder
from tests import support

TOTAL = 1000


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return validate(support.settings(tmp_path, data__workers=6))


def usual(config: RunConfig, update: int, draws: np.random.Generator) -> dict[str, Any]:
    """A noisy, falling loss as of a healthy run."""
    loss = math.log(3) * (0.1 + 0.9 * math.exp(-update / 150)) * draws.lognormal(0, 0.15)
    return {
        "update": update,
        "loss": 2 * loss + 1.0,
        "loss_informative": 9.0,
        "loss_per_dataset": dict.fromkeys(config.data.datasets, loss),
        "lr": 1e-3,
        "grad_norm": draws.lognormal(0, 0.7),
        "data_wait_fraction": 0.05,
        "device": "NVIDIA H100",
    }


def history(config: RunConfig, updates: int, change: Callable[[dict[str, Any]], None] | None = None) -> list[Any]:
    draws = np.random.default_rng(0)
    records = [usual(config, update, draws) for update in range(updates)]
    for record in records:
        if change:
            change(record)
    return records


def test_a_usual_run_is_left_alone_at_every_moment(config: RunConfig) -> None:
    records = history(config, TOTAL)
    validation = {name: {"top1": 90.0} for name in config.data.datasets}
    for end in range(10, TOTAL, 90):
        assert diagnose(records[max(0, end - 300) : end], config, TOTAL, validation) == []


def replaced(key: str, value: Any, when: Callable[[int], bool] = lambda _: True) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        if when(record["update"]):
            record[key] = value

    return change


def of_one(value: float | None) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        record["loss_per_dataset"] = {**record["loss_per_dataset"], "stride": value}

    return change


@pytest.mark.parametrize(
    ("change", "seen", "remedy"),
    [
        (replaced("grad_norm", 512.0, lambda u: u == 470), "was 512 at update 470", "optim.lr"),
        (replaced("loss", 60.0, lambda u: u == 470), "the largest 60 at update 470", "optim.lr"),
        (replaced("data_wait_fraction", 0.4), "waited for videos 40% of the last 100", "data.workers=10 (now 6)"),
        (replaced("lr", 0.0, lambda u: u > 410), "the learning rate was 0 in", "optim.end_lr"),
        (replaced("loss_informative", 200.0), "the informative loss is", "loss.informative_weight"),
        (of_one(None), "stride: no video in the last 100 updates", "data.proportions"),
        (of_one(1.6), "stride: its loss is still 1.60, that of guessing among 5 classes", "data show"),
    ],
)
def test_what_is_unusual_is_told_with_figures_and_what_helps(
    config: RunConfig, change: Callable[[dict[str, Any]], None], seen: str, remedy: str
) -> None:
    (found,) = diagnose(history(config, 500, change), config, TOTAL)
    assert seen in found.text
    assert remedy in found.remedy


def test_a_validation_at_chance_of_a_head_that_trains_well_points_at_the_labels(config: RunConfig) -> None:
    (found,) = diagnose(history(config, 500), config, TOTAL, {"stride": {"top1": 21.0}})
    assert "stride: trains well" in found.text
    assert "val.csv" in found.remedy


def test_the_log_tells_a_kind_once(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Recorder(
        tmp_path / "run",
        total_updates=TOTAL,
        tensorboard=False,
        diagnose=lambda records, results: diagnose(records, config, TOTAL, results),
    ) as recorder:
        for record in history(config, 450, replaced("data_wait_fraction", 0.4)):
            recorder.update(record)
    lines = [line for line in capsys.readouterr().err.splitlines() if "note: ranks waited" in line]
    assert len(lines) == 1
