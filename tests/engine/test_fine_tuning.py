"""Fine-tuning under interruptions: learning rates by layer, frozen tensors and averaged weights, with real processes on two ranks."""

from __future__ import annotations

import fnmatch
import signal
from pathlib import Path

import pytest
import torch
from support import TINY_CLASSES, settings, train, write_run

import multitrain
from multitrain.config import load
from multitrain.engine import checkpoint as ck
from multitrain.interop.convert import convert
from multitrain.model import MultiTrain
from tests.engine.test_ema import assert_equal, content
from tests.engine.test_resume import interrupt, metrics

UPDATES, DECAY, LAYERS = 6, 0.6, 3
FROZEN = ("patch_embed.*", "pos_embed_*", "blocks.0.*", "blocks.2.norm2.bias", "heads.segment.fc1.weight")
OPTIONS = {
    "lr": 1e-3,
    "warmup_updates": 2,
    "schedule": "wsd",
    "decay_fraction": 0.5,
    "layer_decay": DECAY,
    "freeze": FROZEN,
}


@pytest.fixture(scope="module")
def tuned(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two ranks, with a checkpoint after every update."""
    mapping = settings(tiny_data, gpus=2, updates=UPDATES, data__workers=1, optim=OPTIONS, ema__decay=0.7)
    mapping |= {"checkpoint": {"every": 1, "keep": UPDATES}, "activation_checkpointing": "selective"}
    run, _ = write_run(tmp_path_factory.mktemp("tuned"), mapping)
    train(run, 2)
    return run


def is_frozen(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in FROZEN)


def test_a_frozen_tensor_keeps_its_bits_and_has_no_moments_and_the_others_change(tuned: Path) -> None:
    model = MultiTrain(load(tuned).model, TINY_CLASSES)
    model.initialise(load(tuned).seed)
    for update in (1, UPDATES):
        found = content(tuned, update)
        assert set(found.weights) == set(model.state_dict()) == set(found.average)
        for name, tensor in model.state_dict().items():
            assert torch.equal(found.weights[name], tensor) == is_frozen(name), name
            assert (f"exp_avg.{name}" in found.moments) == (not is_frozen(name)), name
            if is_frozen(name):
                assert torch.equal(found.average[name], tensor), name


def test_every_update_is_adamw_with_the_schedules_rate_times_the_layers_factor(tuned: Path) -> None:
    optim = load(tuned).optim
    for update, record in enumerate(metrics(tuned)[1:], 1):
        before, now = content(tuned, update), content(tuned, update + 1)
        for name in now.weights:
            if is_frozen(name):
                continue
            layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else LAYERS + 1
            lr = record["lr"] * DECAY ** (LAYERS + 1 - layer)
            old, beta1, beta2 = before.weights[name].double(), *optim.betas
            mean = now.moments[f"exp_avg.{name}"].double() / (1 - beta1 ** (update + 1))
            square = now.moments[f"exp_avg_sq.{name}"].double() / (1 - beta2 ** (update + 1))
            decayed = old * (1 - lr * optim.weight_decay) if old.ndim > 1 else old
            expected = decayed - lr * mean / (square.sqrt() + optim.eps)
            step, wrong = (expected - old).abs().max(), (now.weights[name].double() - expected).abs().max()
            assert wrong <= 1e-3 * step + 1e-7 * old.abs().max(), (update, name)
    assert len({round(record["lr"], 12) for record in metrics(tuned)}) > 3, "the schedule warms up and decays here"


def test_a_killed_run_ends_in_the_bits_of_an_undisturbed_one(tuned: Path, tmp_path: Path) -> None:
    mapping = load(tuned).model_dump(mode="json")
    mapping["checkpoint"]["every"] = 2
    run, _ = write_run(tmp_path, mapping)
    assert interrupt(run, 2, signal.SIGKILL, after=3, checkpoint=True) == [-9, -9]
    train(run, 2)
    assert_equal(content(run, UPDATES), content(tuned, UPDATES), "weights", "moments", "average")
    assert [m["loss"] for m in metrics(run)] == [m["loss"] for m in metrics(tuned)]


def test_another_number_of_ranks_goes_on_from_its_checkpoint(tuned: Path, tmp_path: Path) -> None:
    run, _ = write_run(tmp_path, load(tuned).model_dump(mode="json") | {"gpus": 1})
    ck.write(run / "checkpoints", content(tuned, 3), "")
    train(run, 1)
    ours, theirs, before = content(run, 4), content(tuned, 4), content(tuned, 3)
    step = max(float((theirs.weights[n] - t).abs().max()) for n, t in before.weights.items())
    for part in ("weights", "average"):
        for name, tensor in getattr(theirs, part).items():
            assert float((getattr(ours, part)[name] - tensor).abs().max()) < step / 10, name
            assert not is_frozen(name) or torch.equal(getattr(ours, part)[name], before.weights[name]), name


def test_a_run_whose_frozen_tensors_were_changed_by_hand_is_refused(tuned: Path, tmp_path: Path) -> None:
    mapping = load(tuned).model_dump(mode="json") | {"gpus": 1}
    mapping["optim"]["freeze"] = FROZEN[:-1]
    run, _ = write_run(tmp_path, mapping)
    ck.write(run / "checkpoints", content(tuned, 3), "")
    train(run, 1, expect=2)
    assert "keep the run's model settings and optim.freeze" in (run / "ranks.log").read_text()


def test_its_weights_are_read_and_converted(tuned: Path, tmp_path: Path) -> None:
    newest = content(tuned, UPDATES)
    model = multitrain.load(tuned)
    assert all(torch.equal(tensor, newest.weights[name]) for name, tensor in model.state_dict().items())
    convert(tuned, tmp_path / "tuned.pyth")
    state = torch.load(tmp_path / "tuned.pyth", weights_only=True)["optimizer_state"]
    numbers = sum(len(group["params"]) for group in state["param_groups"])
    assert numbers - len(state["state"]) == sum(map(is_frozen, newest.weights))
