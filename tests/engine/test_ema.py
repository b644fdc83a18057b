"""The averaged weights: a function of the updates, sharded and checkpointed as the moments are, and what validation scores."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from support import settings, train, write_run

from multitrain.config import ConfigError, load
from multitrain.engine import checkpoint as ck
from multitrain.engine.deepspeed import ema_decay
from multitrain.evaluation.predictor import load as load_model
from multitrain.interop.model_path import resolve_model_file
from tests.engine.test_resume import events, interrupt, metrics

UPDATES = 6


@pytest.fixture(scope="module")
def plain(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, _ = write_run(tmp_path_factory.mktemp("plain"), settings(tiny_data, gpus=2, updates=UPDATES, data__workers=1))
    train(run, 2)
    return run


@pytest.fixture(scope="module")
def averaged(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mapping = load(plain).model_dump(mode="json")
    mapping |= {"ema": {"decay": 0.7}, "checkpoint": {"every": 1, "keep": UPDATES}}
    mapping["eval"]["every"] = UPDATES
    run, _ = write_run(tmp_path_factory.mktemp("averaged"), mapping)
    train(run, 2)
    return run


def content(run: Path, update: int) -> ck.Checkpoint:
    return ck.read(ck.folder_of(run / "checkpoints", update))


def assert_equal(ours: ck.Checkpoint, theirs: ck.Checkpoint, *parts: str) -> None:
    for part in parts:
        for name, tensor in getattr(theirs, part).items():
            assert torch.equal(getattr(ours, part)[name], tensor), f"{part} {name}"


def test_the_decay_grows_with_the_updates_up_to_its_limit() -> None:
    assert [ema_decay(0.9, n) for n in (1, 2, 1000)] == [2 / 11, 3 / 12, 0.9]


def test_an_average_changes_nothing_of_the_training(plain: Path, averaged: Path) -> None:
    assert_equal(content(averaged, UPDATES), content(plain, UPDATES), "weights", "moments")
    assert not content(plain, UPDATES).average
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in metrics(averaged)] == [m[key] for m in metrics(plain)]


def test_each_update_moves_the_average_towards_the_weights(averaged: Path) -> None:
    for update in range(2, UPDATES + 1):
        before, now = content(averaged, update - 1), content(averaged, update)
        for name, tensor in now.average.items():
            expected = before.average[name].lerp(now.weights[name], 1 - ema_decay(0.7, update))
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-8)
    assert any(not torch.equal(now.average[name], now.weights[name]) for name in now.weights)


def test_a_killed_run_ends_with_the_same_average(averaged: Path, tmp_path: Path) -> None:
    mapping = load(averaged).model_dump(mode="json")
    mapping["checkpoint"]["every"] = 2
    run, _ = write_run(tmp_path, mapping)
    assert interrupt(run, 2, signal.SIGKILL, after=3, checkpoint=True) == [-9, -9]
    train(run, 2)
    assert_equal(content(run, UPDATES), content(averaged, UPDATES), "weights", "moments", "average")
    assert events(run, "validation")[-1]["results"] == events(averaged, "validation")[-1]["results"]


def test_another_number_of_ranks_goes_on_with_the_average(averaged: Path, tmp_path: Path) -> None:
    mapping = load(averaged).model_dump(mode="json") | {"gpus": 1}
    run, _ = write_run(tmp_path, mapping)
    ck.write(run / "checkpoints", content(averaged, 3), "")
    train(run, 1)
    theirs = content(averaged, 4)
    far = max(float((theirs.weights[n] - t).abs().max()) for n, t in theirs.average.items())
    for name, tensor in content(run, 4).average.items():
        assert float((tensor - theirs.average[name]).abs().max()) < far / 10, name


def test_an_average_begins_with_the_weights_of_a_run_that_had_none(plain: Path, tmp_path: Path) -> None:
    mapping = load(plain).model_dump(mode="json") | {"ema": {"decay": 0.7}, "updates": UPDATES + 1}
    run, _ = write_run(tmp_path, mapping)
    ck.write(run / "checkpoints", content(plain, UPDATES), "")
    train(run, 2)
    before, now = content(plain, UPDATES), content(run, UPDATES + 1)
    for name, tensor in now.average.items():
        expected = before.weights[name].lerp(now.weights[name], 1 - ema_decay(0.7, UPDATES + 1))
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-8)


def test_the_average_is_a_model_for_every_command_and_its_damage_is_noticed(
    plain: Path, averaged: Path, tmp_path: Path
) -> None:
    newest = content(averaged, UPDATES)
    file = resolve_model_file(averaged / "ema")
    assert file == ck.folder_of(averaged / "checkpoints", UPDATES) / "ema.safetensors"
    model = load_model(averaged / "ema")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, newest.average[name]), name
    with pytest.raises(ConfigError, match=r"has no ema weights yet; train with ema\.decay=0\.9999"):
        resolve_model_file(plain / "ema")
    with pytest.raises(ConfigError, match="no run of that name"):
        resolve_model_file(tmp_path / "ema")
    copy = tmp_path / "update-00000006"
    for part in ck.folder_of(averaged / "checkpoints", UPDATES).iterdir():
        (tmp_path / copy.name).mkdir(exist_ok=True)
        (copy / part.name).write_bytes(part.read_bytes())
    (copy / "ema.safetensors").write_bytes(b"x" * (copy / "ema.safetensors").stat().st_size)
    assert ck.verify(copy) == "ema.safetensors does not match its SHA-256"
