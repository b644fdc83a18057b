"""`dry_run=true` refuses what the submission would refuse, and `--cfg` prints the configuration and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from launch.run_folder import compose_run, write
from launch.submit import main
from multitrain.config import ConfigError, ModelConfig, compose, validate
from multitrain.model import MultiTrain

pytest.importorskip("submitit")

TINY = {
    "frames": 4,
    "crop": 32,
    "depth": 2,
    "width": 8,
    "stages": [1],
    "kv_stride": 2,
    "head_hidden": 8,
    "expander_hidden": 8,
}


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dataset of ten videos; nothing but their names is looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MULTITRAIN_DATA", raising=False)
    for folder in ("data/annotations", "data/videos", "mine/data"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(10):
        (tmp_path / f"data/videos/v{i}.mp4").touch()
    text = "".join(f"v{i}.mp4 {i % 2}\n" for i in range(10))
    for split in ("train", "val", "test"):
        (tmp_path / f"data/annotations/{split}.csv").write_text(text)
    entry = "datasets: {own: {annotations: '${data.root}/annotations', videos: '${data.root}/videos', classes: 2}}"
    (tmp_path / "mine/data/own.yaml").write_text(entry)


def words(*more: str) -> list[str]:
    model = [f"model.{name}={value}".replace(" ", "") for name, value in TINY.items()]
    return [
        "--config-dir",
        "mine",
        "data=own",
        "data.root=data",
        "loss=single",
        *model,
        "name=x",
        "dry_run=true",
        *more,
    ]


def answered(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    before = sorted(Path().rglob("*"))
    status = main(words(*more))
    assert sorted(Path().rglob("*")) == before, "a dry run leaves nothing"
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_run_that_can_start_passes(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = answered(capsys)
    assert (status, err) == (0, "")
    assert "#SBATCH" in out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["data.root=nowhere"], "no such folder of annotations; set data.root (or export MULTITRAIN_DATA)"),
        (
            ["data=k400", "data.root=datasets"],
            "no such folder of annotations; set data.root (or export MULTITRAIN_DATA)",
        ),
        (["data.datasets.own.classes=1"], "train.csv:2: label 1"),
        (["data.datasets.own.videos=mine"], "none of the first 4 videos exists"),
        (["init_from=nothing.pyth"], "nothing.pyth: no such file or folder"),
        (["model.heads=3"], "model: width=8 is not a multiple of heads=3; change one of them"),
        (["data.temperature=0.001"], "data.temperature=0.001: input should be greater than or equal to 0.01"),
        (["optim.betas=[0.9,1]"], "optim.betas: [0.9, 1.0] are not decay rates"),
        (
            ["loss=multitrain", "effective_batch=1", "gpus=1", "augment.mix_group=1", "augment.copies=1"],
            "loss.informative_weight is positive but an update has one clip",
        ),
        (
            [
                "loss=multitrain",
                "loss.scope=micro",
                "effective_batch=2",
                "micro_batch=1",
                "gpus=1",
                "augment.mix_group=1",
                "augment.copies=1",
            ],
            "loss.scope=micro with one clip at a time",
        ),
        (["eval.every=10", "data.datasets.own.test_short_side=16"], "test_short_side=16: smaller than model.crop=32"),
        (
            ["runs=/proc/x"],
            "runs=/proc/x: no folder can be created in /proc (No such file or directory); choose runs=FOLDER",
        ),
        (
            ["runs=/dev/null"],
            "runs=/dev/null: no folder can be created in /dev/null (Not a directory); choose runs=FOLDER",
        ),
        (["data.index=/proc/x"], "data.index=/proc/x: no folder can be created in /proc"),
        (
            ["data.datasets={}"],
            "data.datasets={}: changes nothing, since mappings are added to; ~data.datasets.NAME takes",
        ),
        (
            ["loss.dataset_weights={own: -1}"],
            "loss.dataset_weights.own=-1: a weight below 0 trains away from the labels",
        ),
        (["updates=5", "epochs=3"], "epochs=3: changes nothing, since the run's length is updates=5; add updates=null"),
        (["experiment=demo", "data=own", "epochs=3"], "epochs=3: changes nothing, since the run's length is updates="),
        (["optim.warmup_updates=5", "optim.warmup_epochs=3"], "the warm-up is optim.warmup_updates=5"),
        (["data.temperature=2"], "data.proportions is size; add data.proportions=temperature"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    status, _, err = answered(capsys, *more)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1


def test_a_stored_run_keeps_what_would_be_refused_when_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """Of an earlier version, which accepted it; only what is typed anew is looked at."""
    run = write_new_run(["updates=5"])
    for name in ("config.yaml", "overrides.yaml"):
        file = run / name
        text = file.read_text().replace("dataset_weights: {}", "dataset_weights: {own: -1}")
        file.write_text(
            text.replace("  - updates=5", "  - updates=5\n  - epochs=3\n  - 'loss.dataset_weights={own: -1}'")
        )
    kept = ("updates=5", "epochs=3", "loss.dataset_weights={own: -1}")
    for typed in ([], ["nodes=2"], list(kept)):
        config = compose_run(["x", *typed]).config
        assert config.loss.dataset_weights == {"own": -1}
        assert (config.updates, config.nodes) == (5, 2 if "nodes=2" in typed else 1)
    with pytest.raises(ConfigError, match="epochs=4: changes nothing"):
        compose_run(["x", "epochs=4"])
    with pytest.raises(ConfigError, match="trains away"):
        compose_run(["x", "loss.dataset_weights.own=-2"])


def write_new_run(more: list[str]) -> Path:
    run = compose_run(
        [w for w in words(*more) if w not in ("--config-dir", "mine", "dry_run=true")], config_dirs=["mine"]
    )
    write(run)
    return run.path


def test_missing_videos_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(5, 10):
        Path(f"data/videos/v{i}.mp4").unlink()
    status, _, err = answered(capsys)
    assert status == 2
    assert "train.csv:6: 5 of the 10 videos looked at (50 %) are missing" in err
    status, _, err = answered(capsys, "data.skip_cap=0.9")
    assert status == 0
    assert "5 of the 10 videos looked at (50 %) are missing" in err
    assert answered(capsys, "cluster.check_data=false")[0] == 0


def test_initial_weights_are_tried_on(capsys: pytest.CaptureFixture[str]) -> None:
    model = MultiTrain(ModelConfig.model_validate(TINY), {"own": 2})
    torch.save({"model_state": model.state_dict()}, "fits.pyth")
    assert answered(capsys, "init_from=fits.pyth")[0] == 0
    Path("damaged.pyth").write_bytes(Path("fits.pyth").read_bytes()[:2000])
    other = MultiTrain(ModelConfig.model_validate({**TINY, "width": 16}), {"own": 2})
    torch.save({"model_state": other.state_dict()}, "other.pyth")
    Path("runs/empty").mkdir(parents=True)
    Path("runs/empty/config.yaml").touch()
    for name, says in {
        "damaged.pyth": "damaged.pyth",
        "other.pyth": "other.pyth",
        "empty": "runs/empty: holds no checkpoint",
    }.items():
        status, _, err = answered(capsys, f"init_from={name}")
        assert status == 2, name
        assert says in err
        assert err.startswith("error: init_from=")
        assert err.count("\n") == 1


def test_cfg_prints_the_configuration_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (["--cfg", "job"], ["--cfg"]):
        status = main([*shown, *words("optim.lr=3e-4")])
        said = capsys.readouterr()
        assert (status, said.err) == (0, "")
        config = validate(yaml.safe_load(said.out))
        assert config.optim.lr == 3e-4
        assert config.eval.val_stride == compose([]).eval.val_stride
        assert config.data.datasets["own"].annotations == str(Path("data/annotations").absolute())
    assert main([*words(), "--cfg=all"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    resolved = found.pop("resolved")
    assert validate(found).name == "x"
    assert resolved["ranks"] * resolved["micro_batch"] * resolved["accumulation"] == found["effective_batch"]
    assert not Path("runs").exists()


def test_flags_of_other_programs_are_answered_with_our_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--batch-size=3"]) == 2
    assert "options are key=value, e.g. effective_batch=N" in capsys.readouterr().err
    assert main(["--config-dir", "nope", "data=own"]) == 2
    assert (
        capsys.readouterr().err
        == "error: --config-dir nope: no such folder; give the one that holds your groups, e.g. nope/data/mine.yaml\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["--config-dir"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("program", [["launch/submit.py"], ["-m", "multitrain"]])
def test_a_reader_that_goes_away_is_no_error(root: Path, program: list[str]) -> None:
    command = " ".join([sys.executable, *program, "--help"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true; echo ${{PIPESTATUS[0]}}"], cwd=root, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")
