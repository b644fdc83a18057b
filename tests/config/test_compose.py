"""What a user types becomes a checked configuration, or one line that says what would work."""

from __future__ import annotations

from pathlib import Path

import pytest

from multitrain.config import ConfigError, compose, config_folder, dump, load, nearest, validate
from multitrain.order import solve

EXPERIMENTS = ["k400_mit_ssv2", "k400_mit_ssv2_reference", "k400", "mit", "ssv2", "demo"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_its_batch_can_be_solved(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    solve(
        config.effective_batch, nodes=config.nodes, gpus=config.gpus, micro_batch=config.micro_batch, group=config.group
    )


def test_all_experiments_are_listed_here() -> None:
    assert sorted(p.stem for p in (config_folder() / "experiment").glob("*.yaml")) == sorted(
        [*EXPERIMENTS, "finetune"]
    ), "finetune is in test_automatic, since it needs data"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_configuration_survives_being_written_and_read(experiment: str, tmp_path: Path) -> None:
    config = compose([f"experiment={experiment}", "name=x", "nodes=1"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path) == config


def test_the_recommended_run_is_the_default_and_has_879_classes_in_the_papers_order() -> None:
    config = compose([])
    assert config == compose(["experiment=k400_mit_ssv2"])
    assert {n: d.classes for n, d in config.data.datasets.items()} == {"kinetics": 400, "mit": 305, "ssv2": 174}
    assert [(d.temporal_views, d.spatial_views) for d in config.data.datasets.values()] == [(5, 1), (2, 3), (1, 3)]
    assert config.effective_batch == 512
    assert not config.data.datasets["ssv2"].flip


def test_the_reference_run_solves_to_the_published_shape() -> None:
    config = compose(["experiment=k400_mit_ssv2_reference"])
    shape = solve(512, nodes=config.nodes, gpus=config.gpus, micro_batch=config.micro_batch, group=config.group)
    assert (shape.world_size, shape.micro_batch, shape.accumulation) == (16, 4, 8)
    assert (config.loss.scope, config.optim.clip_norm, config.augment.smoothing_classes) == ("micro", 16.0, 700)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("micro_btch=3", "unknown option 'micro_btch'; did you mean 'micro_batch'?"),
        ("model.depht=3", "unknown option 'model.depht'; did you mean 'depth'?"),
        ("lr=3", "did you mean 'optim.lr'?"),
        ("+cluster.bar=2", "unknown option 'cluster.bar'; known here: account"),
        ("nodes=two", "nodes='two': input should be a valid integer"),
        ("precision=fp8", "precision='fp8': input should be 'bf16', 'fp16' or 'fp32'"),
        ("cluster.time_limit=-3", "cluster.time_limit: -3 is not a time above zero; give minutes, or 24:00:00"),
        ("checkpoint.keep=1", "checkpoint.keep=1: input should be greater than or equal to 2"),
        ("engine.zero_stage=2", "engine.zero_stage=2: input should be 1"),
        ("experiment=k4000", "experiment=k4000: there is no such experiment; did you mean 'k400'?"),
        ("model=tinyy", "model=tinyy: there is no such model; did you mean 'tiny'?"),
        ("foo", "'foo' is no override; write key=value"),
        ("optim={", "optim={: optim is chosen by name; known here: adamw"),
        ("data.datasets.x.videos=v", "data.datasets.x.annotations is missing"),
        ("name=a/b", "'a/b' cannot be a folder name"),
        ("augment.randaugment=rand-x7", "is not RandAugment notation"),
        ("model.stages=[5,2]", "must increase and lie between 1 and depth-1=23"),
        ("model.crop=102", "model.crop=102: input should be a multiple of 4"),
        ("model.expander=false", "set model.expander=true or loss.informative_weight=0"),
        ("model.projections=false", "set model.projections=true or loss.projection_weight=0"),
        ("loss.dataset_weights={k400: 2}", "'k400', which is not a dataset of this run: kinetics, mit, ssv2"),
        ("micro_batch=3", "use micro_batch=2 or augment.mix_group=1"),
        ("data.proportions=weights", "has no 'weight'"),
        ("data.mixture=concat data.proportions=temperature", "mixture=concat takes proportions=size only"),
        ("cluster=local nodes=2", "use nodes=1, or cluster=slurm"),
        ("cluster=hosts nodes=2", "needs cluster.rendezvous=ADDRESS:PORT"),
        (
            "cluster=hosts nodes=2 cluster.rendezvous=10.0.0.1:2",
            "needs cluster.node, the number of this machine: 0 to 1",
        ),
        ("cluster=hosts nodes=2 cluster.rendezvous=10.0.0.1:2 cluster.node=2", "they count from 0 to 1"),
        ("cluster=hosts nodes=2 cluster.rendezvous=10.0.0.1 cluster.node=0", "is not address:port"),
        ("cluster=hosts nodes=2 cluster.hosts=[a]", "names 1 machines and nodes=2"),
        ("cluster=hosts nodes=1 cluster.hosts=[-oProxyCommand=x]", "is not the name of a machine"),
    ],
)
def test_a_mistake_is_refused_in_one_line_that_says_what_would_work(override: str, said: str) -> None:
    parts = [override] if "{" in override else override.split()
    with pytest.raises(ConfigError) as refusal:
        compose(parts)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def own_config(folder: Path, text: str) -> list[str]:
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "own.yaml").write_text(text)
    return [str(folder)]


ENTRY = "{annotations: /a, videos: /v, classes: 7, sampling: segment, flip: false}"


def test_a_new_dataset_is_a_few_lines_of_yaml_and_may_have_any_name(tmp_path: Path) -> None:
    names = ["kitchen v2.1", "a_b", "100%", "ÄÖ-動画", "train", "keys", "x:y", "#1"]
    text = "datasets:\n" + "".join(f"  {n!r}: {ENTRY.replace('/a', f'/a{i}')}\n" for i, n in enumerate(names))
    config = compose(["data=own"], config_dirs=own_config(tmp_path, text))
    assert list(config.data.datasets) == names
    assert validate(config.model_dump(mode="json")) == config


def test_a_dataset_named_twice_is_refused(tmp_path: Path) -> None:
    dirs = own_config(tmp_path, f"datasets:\n  own: {ENTRY}\n  own: {ENTRY}\n")
    with pytest.raises(ConfigError, match="duplicate key own"):
        compose(["data=own"], config_dirs=dirs)


def test_one_folder_under_two_names_is_refused(tmp_path: Path) -> None:
    dirs = own_config(tmp_path, f"datasets:\n  one: {ENTRY}\n  two: {ENTRY}\n")
    with pytest.raises(ConfigError, match="'one' and 'two' are the same folder '/a'; remove one, or set 'replicas'"):
        compose(["data=own"], config_dirs=dirs)


def test_a_name_that_no_file_may_have_is_refused(tmp_path: Path) -> None:
    dirs = own_config(tmp_path, f"datasets:\n  a/b: {ENTRY}\n")
    with pytest.raises(ConfigError, match="'a/b' cannot be a file name"):
        compose(["data=own"], config_dirs=dirs)


def test_a_missing_or_broken_run_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: no such file"):
        load(tmp_path)
    (tmp_path / "config.yaml").write_text("nodes: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load(tmp_path)


def test_every_option_is_documented() -> None:
    from pydantic import BaseModel

    from multitrain import config

    models = [m for m in vars(config).values() if isinstance(m, type) and issubclass(m, BaseModel)]
    assert len(models) > 10
    for model in models:
        for name, field in model.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            assert nested or field.description, f"{model.__name__}.{name} has no docstring"


def test_nearest_offers_close_names_and_otherwise_lists_them() -> None:
    assert nearest("epoch", ["epochs", "seed"]) == "did you mean 'epochs'?"
    assert nearest("zzz", ["b", "a"]) == "known here: a, b"


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [
        ("1440", 1440), ("90:30", 91), ("24:00:00", 1440), ("1-00:00:00", 1440), ("2-12", 3600), ("0-01:30", 90),
    ],
)  # fmt: skip
def test_time_limits_are_read_in_slurms_own_forms(limit: str, minutes: int) -> None:
    assert compose([f"cluster.time_limit='{limit}'"]).cluster.minutes == minutes
