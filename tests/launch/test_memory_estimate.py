"""`dry_run=true` says what a run will need, and warns when the cluster cannot give it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.memory_estimate import Forecast, clip_bytes, forecast, parameters, summary_lines
from multitrain.config import ModelConfig, RunConfig, compose
from multitrain.order import BatchShape, solve

SIXTEEN = {"frames": 16, "depth": 16, "stages": (1, 3, 14)}


def run(*overrides: str) -> tuple[RunConfig, BatchShape]:
    config = compose(["nodes=2", "gpus=8", *overrides])
    return config, solve(512, nodes=2, gpus=8, micro_batch=config.micro_batch, group=config.group)


def predicted(*overrides: str) -> Forecast:
    return forecast(*run(*overrides))


@pytest.mark.parametrize(
    ("changes", "classes"),
    [({}, {"k": 400, "m": 305, "s": 174}), (SIXTEEN, {"k": 400}), ({"head": "linear", "expander": False}, {"a": 5, "b": 7}),
     ({"crop": 64, "frames": 8, "width": 32, "depth": 4, "stages": (1, 3), "kv_stride": 4}, {"a": 5})],
)  # fmt: skip
def test_parameters_are_those_of_the_model(changes: dict[str, Any], classes: dict[str, int]) -> None:
    from multitrain.model.multitrain import MultiTrain

    config = ModelConfig(**changes)
    with torch.device("meta"):
        model = MultiTrain(config, classes)
    found = sum(p.numel() for p in model.parameters())
    assert parameters(config, list(classes.values())) == pytest.approx(found, rel=0.002)


def test_memory_grows_with_the_micro_batch_and_shrinks_with_checkpointing() -> None:
    two, eight = predicted("micro_batch=2"), predicted("micro_batch=8")
    assert eight.bytes - two.bytes == pytest.approx(6 * 2 * two.clip_bytes)
    kept = predicted("micro_batch=8", "activation_checkpointing=selective")
    assert kept.bytes < eight.bytes / 2
    assert kept.fixed_bytes == eight.fixed_bytes


SLOW = pytest.mark.slow


@pytest.mark.parametrize("mode", ["none", "mlp", "selective", "full"])
@pytest.mark.parametrize(
    ("changes", "percent"),
    [
        pytest.param({}, 1, marks=SLOW, id="32x3"),
        pytest.param(SIXTEEN, 1, marks=SLOW, id="16x4"),
        pytest.param({"frames": 16, "crop": 160, "depth": 6, "stages": (1, 4)}, 10, id="another"),
    ],
)
def test_a_clips_activations_are_those_that_are_counted(changes: dict[str, Any], percent: int, mode: str) -> None:
    from benchmarks.footprint import peak

    config = ModelConfig(**changes)
    assert clip_bytes(config, mode) == pytest.approx(peak(config, mode), rel=percent / 100)


def test_more_gpus_hold_less_of_the_optimizer_each() -> None:
    config, shape = run("micro_batch=2")
    alone = forecast(config, BatchShape(512, 1, 2, 256))
    assert alone.fixed_bytes - forecast(config, shape).fixed_bytes == pytest.approx(12 * 64.3e6 * 15 / 16, rel=0.02)


def test_a_warning_names_what_would_fit() -> None:
    said = summary_lines(*run("micro_batch=32", "cluster.gpu_memory=48"))
    (warning,) = [line for line in said if line.startswith("# warning")]
    assert "do not fit cluster.gpu_memory=48 GB; use micro_batch=" in warning
    assert "activation_checkpointing=selective" in warning
    fits = int(warning.split("micro_batch=")[1].split(" ")[0])
    assert not any(
        "do not fit" in line
        for line in summary_lines(*run(f"micro_batch={2 ** (fits.bit_length() - 1)}", "cluster.gpu_memory=48"))
    )


def test_too_few_cores_are_warned_of() -> None:
    warnings = [w for w in summary_lines(*run("cluster.cpus_per_gpu=1", "cluster.gpu_clips=60")) if "cannot feed" in w]
    assert len(warnings) == 1
    enough = warnings[0].split("cluster.cpus_per_gpu=")[1].split(",")[0]
    assert not any(
        "warning" in w for w in summary_lines(*run(f"cluster.cpus_per_gpu={enough}", "cluster.gpu_clips=60"))
    )


def test_enough_of_everything_warns_of_nothing() -> None:
    assert not any("warning" in line for line in summary_lines(*run("cluster.gpu_memory=80")))


@pytest.mark.parametrize("crop", [224, 236, 252, 100])
def test_tokens_are_those_of_the_model_where_a_grid_cannot_be_halved(crop: int) -> None:
    """236 / 4 = 59 tokens a side become 30, 15, 8."""
    from launch.memory_estimate import _blocks
    from multitrain.model.mvit import block_shapes

    config = ModelConfig(crop=crop, stages=(2, 5, 21))
    grids = [shape.grid for shape in block_shapes(config)]
    assert [t * h * w for t, h, w in grids] == [tokens for tokens, _, _ in _blocks(config)]


def test_a_small_network_has_no_estimate_and_a_machine_without_gpus_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    said = " ".join(summary_lines(*run("model=tiny")))
    assert "no estimate for so small a network" in said
    assert "cannot feed" not in said
    monkeypatch.setattr("launch.memory_estimate.on_cpus", lambda config: True)
    said = " ".join(summary_lines(*run("cluster.gpu_request=none")))
    assert "GB per rank" in said
    assert "CPU cores" in said
    assert "a GPU" not in said


def test_more_loader_processes_than_cores_are_said_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.memory_estimate import local_notes

    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("launch.memory_estimate.on_cpus", lambda config: True)
    note, warning = local_notes(compose(["cluster=local", "gpus=2", "data.workers=8"]))
    assert note == "# note: no GPU on this machine: 2 ranks train on its 2 cores"
    assert "2 ranks × data.workers=8 = 16 loader processes on 2 cores; use data.workers=1" in warning
    alone = local_notes(compose(["cluster=local", "gpus=1", "data.workers=8"]))
    assert alone[0] == "# note: no GPU on this machine: 1 rank trains on its 2 cores"
    assert "1 rank × data.workers=8 = 8 loader processes" in alone[1]
    assert local_notes(compose(["gpus=2", "data.workers=8"])) == []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(32)))
    assert len(local_notes(compose(["cluster=local", "gpus=2", "data.workers=8"]))) == 1
