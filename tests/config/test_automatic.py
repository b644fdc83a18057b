"""``auto``: what is chosen follows from the data and the machine, what is typed counts, and a resumed run keeps its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from multitrain.config import ConfigError, RunConfig, automatic, compose, dump, machine
from multitrain.config.compose import compose_and_choose
from multitrain.engine import checkpoint as checkpoints
from multitrain.model import MultiTrain


def datasets(folder: Path, **sizes: int) -> Path:
    """A folder for --config-dir with a dataset of each size; every one has val.csv and test.csv."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        (folder / name).mkdir(exist_ok=True)
        for split, count in (("train", size), ("val", 10), ("test", 10)):
            (folder / name / f"{split}.csv").write_text("".join(f"{split}{i}.mp4 {i % 3}\n" for i in range(count)))
        dataset = {"annotations": str(folder / name), "videos": str(folder), "classes": 3}
        (folder / "data" / f"{name}.yaml").write_text(yaml.safe_dump({"datasets": {name: dataset}}))
    return folder


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, cores=2, gpus=0, slurm=False)


def on(monkeypatch: pytest.MonkeyPatch, *, cores: int, gpus: int, slurm: bool) -> None:
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(machine, "gpu_count", lambda: gpus)
    monkeypatch.setattr(machine, "has_slurm", lambda: slurm)


def finetune(folder: Path, *words: str) -> RunConfig:
    return compose(["experiment=finetune", *words], config_dirs=[folder])


@pytest.mark.usefixtures("cpu")
def test_a_small_dataset_on_a_cpu(tmp_path: Path) -> None:
    words = ["experiment=finetune", "data=mine"]
    config, chosen = compose_and_choose(words, config_dirs=[datasets(tmp_path, mine=48)])
    assert (config.cluster.kind, config.gpus, config.data.workers, config.precision) == ("local", 1, 1, "fp32")
    assert (config.effective_batch, config.micro_batch, config.model.width) == (8, None, 32)
    assert (config.loss.informative_weight, config.model.projections, config.model.expander) == (0, False, False)
    assert (config.checkpoint.best, config.then, config.augment.copies) == ("val/mine/top1", "eval", 1)
    total = config.epochs * 48 / 8
    assert 800 <= total <= 810
    assert config.eval.every == pytest.approx(total / 10, abs=1)
    said = automatic.lines(chosen)
    assert "precision=fp32: no GPU, and bf16 is slow on most CPUs" in said
    assert "effective_batch=8: 48 training videos, 6 updates a pass" in said
    assert all(": " in line for line in said)
    assert "auto" not in dump(config)


@pytest.mark.parametrize("size", [1, 3, 7, 100, 9_537, 240_000])
@pytest.mark.parametrize(("cores", "gpus", "slurm"), [(1, 0, False), (64, 0, False), (16, 3, False), (8, 0, True)])
def test_every_size_on_every_machine_gives_a_run_that_can_be_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, cores: int, gpus: int, slurm: bool
) -> None:
    from multitrain.order import solve

    on(monkeypatch, cores=cores, gpus=gpus, slurm=slurm)
    config = finetune(datasets(tmp_path, mine=size), "data=mine")
    shape = solve(config.effective_batch, nodes=1, gpus=config.gpus, micro_batch=config.micro_batch, group=config.group)
    assert shape.world_size == config.gpus <= max(gpus, cores // 2, 1) or slurm
    assert config.effective_batch <= max(size, config.group)
    assert config.cluster.kind == ("slurm" if slurm else "local")
    if not slurm and cores > 1:
        assert config.gpus * (1 + config.data.workers) <= cores
    assert config.precision == ("bf16" if gpus or slurm else "fp32")


def test_what_determines_the_result_depends_on_the_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, found = datasets(tmp_path, mine=5000), []
    for cores, gpus in ((16, 4), (64, 8), (4, 1)):
        on(monkeypatch, cores=cores, gpus=gpus, slurm=False)
        config = finetune(folder, "data=mine")
        found.append([config.effective_batch, config.epochs, config.optim, config.augment, config.loss, config.model])
    assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("word", "option"),
    [
        ("effective_batch=12", "effective_batch"),
        ("gpus=4", "gpus"),
        ("epochs=3", "epochs"),
        ("data.workers=0", "data.workers"),
        ("precision=bf16", "precision"),
        ("optim.lr=0.5", "optim.lr"),
        ("optim.warmup_epochs=0", "optim.warmup_epochs"),
        ("loss.informative_weight=0.3", "loss.informative_weight"),
        ("eval.every=7", "eval.every"),
        ("checkpoint.best=null", "checkpoint.best"),
        ("then=null", "then"),
        ("model=mvitv2_s", "model.depth"),
        ("model.width=48", "model.width"),
        ("augment=recommended", "augment.copies"),
        ("augment.copies=2", "augment.copies"),
        ("cluster=slurm", "cluster.kind"),
        ("optim.warmup_updates=9", "optim.warmup_updates"),
    ],
)
def test_a_typed_value_counts(tmp_path: Path, word: str, option: str) -> None:
    folder = datasets(tmp_path, mine=48)
    plain, chosen = compose_and_choose(["experiment=finetune", "data=mine", word], config_dirs=[folder])
    wanted: Any = compose([word])
    for name in option.split("."):
        plain, wanted = getattr(plain, name), getattr(wanted, name)
    assert plain == wanted
    assert option not in {choice.option for choice in chosen}


@pytest.mark.usefixtures("cpu")
def test_several_datasets_share_a_network_with_projections_and_a_gentle_informative_loss(tmp_path: Path) -> None:
    config = finetune(datasets(tmp_path, mine=48, other=100), "data=[mine,other]")
    assert list(config.data.datasets) == ["mine", "other"]
    assert config.model.projections
    assert config.model.expander
    assert config.loss.informative_weight == pytest.approx(0.01)
    assert config.checkpoint.best == "val/mean/top1"
    assert config.model.head == "mlp"


@pytest.mark.usefixtures("cpu")
def test_without_val_or_test_nothing_is_validated_or_tested(tmp_path: Path) -> None:
    folder = datasets(tmp_path, mine=48)
    for split in ("val", "test"):
        (folder / "mine" / f"{split}.csv").unlink()
    config = finetune(folder, "data=mine")
    assert (config.eval.every, config.checkpoint.best, config.then) == (None, None, None)


@pytest.mark.usefixtures("cpu")
def test_a_resumed_run_keeps_its_values_when_data_and_machine_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = datasets(tmp_path, mine=48)
    first = finetune(folder, "data=mine")
    datasets(tmp_path, mine=9000)
    on(monkeypatch, cores=64, gpus=8, slurm=True)
    words = ["experiment=finetune", "data=mine"]
    assert compose(words, config_dirs=[folder], saved=first) == first
    assert compose([*words, "epochs=500"], config_dirs=[folder], saved=first) == first.model_copy(
        update={"epochs": 500.0}
    )
    assert finetune(folder, "data=mine") != first


@pytest.mark.usefixtures("cpu")
def test_the_network_is_that_of_the_initial_weights(tmp_path: Path) -> None:
    folder = datasets(tmp_path, mine=48)
    earlier = compose(["experiment=demo", "model.frames=4", "model.head=mlp"])
    names = dict.fromkeys(earlier.data.datasets, 2)
    weights = {k: v.detach() for k, v in MultiTrain(earlier.model, names).state_dict().items()}
    run = tmp_path / "runs/before"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(dump(earlier))
    state = {"update": 5, "datasets": names, "model": earlier.model.model_dump(mode="json"), "multi_label": []}
    checkpoints.write(run / "checkpoints", checkpoints.Checkpoint(weights, {}, state), dump(earlier))
    config = finetune(folder, "data=mine", f"init_from={run}", "model.drop_path=0.25")
    assert (config.model.frames, config.model.depth, config.model.head) == (4, 3, "mlp")
    assert config.model.drop_path == 0.25
    assert not config.model.expander
    with pytest.raises(ConfigError, match="or say the network yourself: model=NAME"):
        finetune(folder, "data=mine", f"init_from={tmp_path}/none.pyth")


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["data=gone"],
            r"gone/train\.csv: no such file, and the defaults of experiment=finetune depend on .*data import",
        ),
        (["data=mine", "effective_batch=x"], "effective_batch=x: a number above 0 is needed"),
        (["data=mine", "nodes=auto"], "nodes=auto: a number above 0 is needed"),
        (["data=mine", "optim.eps=auto"], "^optim.eps=auto: this option is never chosen; give it a value"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    folder = datasets(tmp_path, mine=48, gone=1)
    (folder / "gone/train.csv").unlink()
    with pytest.raises(ConfigError, match=said) as refused:
        finetune(folder, *words)
    assert "\n" not in str(refused.value)


def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_file", lambda: "/dev/nvidiactl")
    assert machine.gpu_count({"CUDA_VISIBLE_DEVICES": "0,2,5"}) == 3
    assert machine.gpu_count({"CUDA_VISIBLE_DEVICES": ""}) == machine.gpu_count({"CUDA_VISIBLE_DEVICES": "-1"}) == 0
    assert machine.gpu_count({}) >= 1
    monkeypatch.setattr(machine, "device_file", lambda: None)
    assert machine.gpu_count({"CUDA_VISIBLE_DEVICES": "0"}) == 0
