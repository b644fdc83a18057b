"""A run is named once, written whole, refused in one line, and resumed with what was typed before."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from launch import run_folder
from launch.resume import changed_since, merge
from launch.run_folder import claimed, compose_run, write
from launch.snapshot import snapshot, sources
from launch.submit import main
from multitrain.config import ConfigError, load


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(*words: str) -> run_folder.Run:
    run = compose_run(words)
    write(run)
    return run


# ---------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("how", [["launch/submit.py"], ["-m", "launch.submit"]])
def test_it_runs_as_a_script_and_as_a_module(how: list[str], root: Path) -> None:
    done = subprocess.run([sys.executable, *how, "--help"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "examples:" in done.stdout


def test_submitting_takes_under_two_seconds_and_no_torch(root: Path, tmp_path: Path) -> None:
    program = f"""
        import resource, sys
        sys.path.insert(0, {str(root)!r})
        from launch import run_folder, slurm
        from launch.run_folder import compose_run, write
        from launch.submit import main
        assert main(["nodes=2", "gpus=8", "name=x", "dry_run=true", "cluster.check_data=false"]) == 0
        write(compose_run(["nodes=2", "gpus=8", "name=y"]))
        import submitit
        heavy = {{"torch", "cv2", "av", "decord", "deepspeed", "matplotlib"}} & set(sys.modules)
        assert not heavy, heavy
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(used.ru_utime + used.ru_stime)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 2.0  # processor time: the test machine may be busy


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpsu=3"], "unknown option 'gpsu'; did you mean 'gpus'?"),
        (["nodes=two"], "nodes='two'"),
        (["cluster=slrum"], "did you mean 'slurm'"),
        (["nodes=3", "gpus=8", "dry_run=true"], "nodes=3 × gpus=8 = 24"),
        (["frist"], "name=frist starts a new run"),
        (["--nodes=2"], "options are key=value"),
        (["name=a/b"], "cannot be a folder name"),
        (["cluster.time_limit=1", "dry_run=true"], "cluster.lead_time=120"),
        (["cluster.sbatch.time=5", "dry_run=true"], "cluster.time_limit"),
        (["cluster.sbatch.open-mode=truncate", "dry_run=true"], "resuming relies on"),
        (["cluster.memory_per_node=4G", "cluster.sbatch.mem-per-cpu=1G", "dry_run=true"], "SLURM accepts one of them"),
        (["cluster=local", "nodes=2"], "use nodes=1, or cluster=slurm"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_without_slurm_the_remedy_is_named(root: Path) -> None:
    command = [sys.executable, str(root / "launch" / "submit.py"), "nodes=2"]
    done = subprocess.run(command, env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cluster=local" in done.stderr


def test_wrong_data_is_refused_in_the_words_of_the_data_check(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "launch" / "submit.py"), "cluster=local", "gpus=1", "name=x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "train.csv" in done.stderr
    assert not (tmp_path / "runs" / "x").exists()


def test_initial_weights_that_are_not_there_are_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "launch" / "submit.py"), "cluster=local", "name=x", "init_from=k400.pyth"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: init_from={tmp_path}/k400.pyth: no such file or folder")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs" / "x").exists()


# ------------------------------------------------------------------------------------------------------ resuming


def test_the_last_value_of_an_option_counts() -> None:
    assert merge([["nodes=1", "+data.x=1", "cluster=local"], ["nodes=2"], ["cluster=slurm", "~data.x"]]) == [
        "nodes=2",
        "cluster=slurm",
        "~data.x",
    ]


def test_a_resumed_run_adds_its_new_options_to_the_old_ones(tmp_path: Path) -> None:
    written("name=r", "nodes=2", "gpus=8", "cluster.partition=low", "optim.lr=1e-3")
    run = compose_run(["r", "nodes=4", "cluster.partition=high"])
    assert run.exists
    assert (run.config.nodes, run.config.gpus, run.config.cluster.partition) == (4, 8, "high")
    assert run.config.optim.lr == 1e-3
    write(run)
    assert load(tmp_path / "runs" / "r").nodes == 4
    history = yaml.safe_load((tmp_path / "runs" / "r" / "overrides.yaml").read_text())
    assert [entry["overrides"] for entry in history] == [
        ["nodes=2", "gpus=8", "cluster.partition=low", "optim.lr=1e-3"],
        ["nodes=4", "cluster.partition=high"],
    ]


def test_a_config_group_chosen_anew_replaces_the_old_one() -> None:
    written("name=r", "cluster=local", "gpus=2")
    assert compose_run(["name=r", "cluster=slurm"]).config.cluster.kind == "slurm"


def test_an_edited_yaml_file_does_not_change_a_run_behind_its_owners_back(tmp_path: Path) -> None:
    site = tmp_path / "mine" / "cluster" / "site.yaml"
    site.parent.mkdir(parents=True)
    site.write_text("kind: slurm\npartition: old\ntime_limit: 60\nlead_time: 60\nsbatch: {begin: now}\n")
    write(compose_run(["name=r", "cluster=site", "gpus=8"], config_dirs=["mine"]))
    site.write_text("kind: slurm\npartition: new\ntime_limit: 90\nlead_time: 90\nsbatch: {begin: later}\n")
    unchanged = compose_run(["r"]).config
    assert unchanged == load(tmp_path / "runs" / "r")
    changed = compose_run(["r", "nodes=2", "cluster.time_limit=90"]).config
    assert changed == unchanged.model_copy(
        update={"nodes": 2, "cluster": unchanged.cluster.model_copy(update={"time_limit": 90})}
    )
    again = compose_run(["r", "cluster=site"])
    assert again.config == unchanged, "an unchanged word changes nothing"
    assert compose_run(["r", "cluster=slurm"]).config.cluster.partition is None


def test_what_the_checkout_would_make_of_the_same_words_today_is_said(tmp_path: Path) -> None:
    site = tmp_path / "mine" / "cluster" / "site.yaml"
    site.parent.mkdir(parents=True)
    site.write_text("kind: slurm\npartition: old\n")
    run = compose_run(["name=r", "cluster=site", "gpus=8"], config_dirs=["mine"])
    write(run)
    assert changed_since(run.path, ["cluster=site"], ["mine"]) == []
    site.write_text("kind: slurm\npartition: new\n")
    (note, code) = changed_since(run.path, ["cluster=site"], ["mine"])
    assert "cluster.partition is now new and old in the run" in note
    assert "update_code=true" in code
    site.write_text("kind: [slurm\n")
    assert "the run keeps its own" in changed_since(run.path, ["cluster=site"], ["mine"])[0]


@pytest.mark.parametrize("how", ["r", "runs/r", "name=r"])
def test_a_run_is_found_by_name_and_by_folder(how: str, tmp_path: Path) -> None:
    written("name=r", "gpus=4")
    run = compose_run([how])
    assert run.path == tmp_path / "runs" / "r"
    assert run.config.gpus == 4


def test_a_run_keeps_its_paths_wherever_it_is_resumed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = written("name=r", "data.root=videos", "init_from=start.pyth").config
    assert first.data.datasets["mit"].videos == f"{tmp_path}/videos/moments_in_time/videos_320p"
    assert first.init_from == f"{tmp_path}/start.pyth"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setenv("MULTITRAIN_DATA", "/elsewhere")
    again = compose_run([str(tmp_path / "runs" / "r"), "nodes=2"]).config
    assert again.data.datasets == first.data.datasets
    assert again.init_from == first.init_from
    moved = compose_run([str(tmp_path / "runs" / "r"), "data.root=/moved"]).config
    assert moved.data.datasets["mit"].videos == "/moved/moments_in_time/videos_320p"


@pytest.mark.parametrize(
    ("change", "option", "before", "now"),
    [
        ("seed=1", "seed", "0", "1"),
        ("effective_batch=256", "effective_batch", "512", "256"),
        ("data.mixture=concat", "data.mixture", "interleave", "concat"),
        ("data.datasets.mit.replicas=2", "data.datasets.mit.replicas", "1", "2"),
        ("data=ssv2", "data.datasets", "kinetics, mit, ssv2", "ssv2"),
        ("model.depth=23", "model.depth", "24", "23"),
        ("augment.mix_group=4", "augment.mix_group", "2", "4"),
    ],
)
def test_another_plan_or_network_needs_another_name(change: str, option: str, before: str, now: str) -> None:
    written("name=r", "gpus=8")
    with pytest.raises(ConfigError) as refused:
        compose_run(["r", change])
    message = str(refused.value)
    assert message.startswith(f"{option}: run 'r' has {before}, and {now} was requested")
    assert "name=" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "change",
    ["data.workers=2", "data.decode_timeout=5", "data.datasets.mit.temporal_views=3", "updates=10", "precision=fp32"],
)
def test_what_does_not_touch_the_plan_may_change(change: str) -> None:
    written("name=r", "gpus=8")
    assert compose_run(["r", change]).exists


def test_a_run_in_progress_is_not_started_twice() -> None:
    run = written("name=r", "gpus=8")
    with claimed(run.path), pytest.raises(ConfigError, match=rf"process {os.getpid()} .*name="), claimed(run.path):
        pass
    with claimed(run.path):
        pass


def test_of_two_submissions_of_a_new_name_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = compose_run(["name=r", "gpus=8"]), compose_run(["name=r", "gpus=8", "seed=1"])
    write(first)
    monkeypatch.setattr(run_folder.Run, "exists", False)  # as the second had seen it
    with pytest.raises(ConfigError, match="another submission was faster"):
        write(second)
    assert load(first.path).seed == 0


def test_the_class_names_of_a_run_are_its_own(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {i}\n" for i in range(400)))
    run = written("name=r", "experiment=k400", "gpus=8", f"data.datasets.kinetics.class_names={names}")
    names.write_text("changed\n")
    kept = load(run.path).data.datasets["kinetics"].class_names
    assert kept == str(run.path / "class_names" / "kinetics.txt")
    assert Path(kept).read_text().startswith("class 0\n")
    write(compose_run(["r", "nodes=2"]))
    assert Path(kept).read_text().startswith("class 0\n")
    run.path.rename(tmp_path / "runs" / "renamed")
    again = compose_run(["renamed"]).config.data.datasets["kinetics"].class_names
    assert again == str(tmp_path / "runs" / "renamed" / "class_names" / "kinetics.txt")


# ------------------------------------------------------------------------------------------------- what is written


def test_the_folder_holds_what_was_asked_for_and_what_runs(tmp_path: Path, root: Path) -> None:
    run = written("name=r", "nodes=2", "gpus=8")
    folder = tmp_path / "runs" / "r"
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "overrides.yaml", "code", "env.txt", "logs"}
    assert load(folder) == run.config
    assert run.config.name == "r"
    assert (folder / "code" / "multitrain" / "train.py").read_bytes() == (root / "multitrain" / "train.py").read_bytes()
    assert (folder / "code" / "configs" / "config.yaml").is_file()
    assert "numpy==" in (folder / "env.txt").read_text()
    assert not list((tmp_path / "runs").glob(".r.new*"))


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file, not a folder")
    with pytest.raises(ConfigError, match="runs"):
        written("name=r", "gpus=8")


def test_the_snapshot_has_the_sources_and_nothing_that_git_ignores(tmp_path: Path, root: Path) -> None:
    names = {str(f) for f in sources()}
    assert {"multitrain/__init__.py", "launch/submit.py", "configs/config.yaml"} <= names
    assert not [n for n in names if n.endswith(".pyc") or n.startswith((".venv", "tests", "runs"))]
    snapshot(tmp_path / "code")
    done = subprocess.run(
        [sys.executable, "launch/submit.py", "nodes=2", "gpus=8", "dry_run=true", "cluster.check_data=false"],
        cwd=tmp_path / "code",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr  # complete: it can submit by itself


def test_a_resumed_run_goes_on_with_its_own_code_unless_told_otherwise(tmp_path: Path, root: Path) -> None:
    """The whole resubmission is done by it: what the checkout says, or no longer says, does not matter."""
    run = written("name=r", "gpus=8", "cluster.check_data=false")
    (run.path / "code" / "configs" / "cluster" / "own.yaml").write_text("kind: slurm\npartition: frozen\n")
    submit = [sys.executable, str(root / "launch" / "submit.py"), "r", "dry_run=true"]
    own = subprocess.run([*submit, "cluster=own"], capture_output=True, text=True, check=False)
    assert "#SBATCH --partition=frozen" in own.stdout
    assert "note: the code of this checkout differs from the run" in own.stderr
    today = subprocess.run([*submit, "cluster=own", "update_code=true"], capture_output=True, text=True, check=False)
    assert (today.returncode, "there is no such cluster" in today.stderr) == (2, True)


def test_a_run_is_resumed_through_a_link_to_its_folder_of_runs(tmp_path: Path, root: Path) -> None:
    """Its own code has to see that it is the run's own, or it starts itself again and again."""
    written("name=r", "gpus=8", "cluster.check_data=false")
    (tmp_path / "linked").symlink_to("runs")
    submit = [sys.executable, str(root / "launch" / "submit.py"), "dry_run=true"]
    for words in (["r", f"runs={tmp_path / 'linked'}"], [str(tmp_path / "linked" / "r")], ["name=r", "runs=linked"]):
        done = subprocess.run([*submit, *words], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "(resumed)" in done.stdout


def test_a_run_of_an_older_version_goes_on_with_the_code_of_this_one(tmp_path: Path, root: Path) -> None:
    run = written("name=r", "gpus=8", "cluster.check_data=false")
    (run.path / "code" / "launch" / "job.sh").unlink()
    submit = [sys.executable, str(root / "launch" / "submit.py"), "r", "dry_run=true"]
    done = subprocess.run(submit, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "older version" in done.stderr
    write(compose_run(["r"]))
    assert (run.path / "code" / "launch" / "job.sh").is_file()


def test_the_snapshot_has_no_hidden_file_no_link_and_only_known_groups(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for name in ("data/a.yaml", ".kube/config.yaml", "secrets/db.yaml", "data/.hidden.yaml", "data/notes.txt"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("kind: x\n")
    (mine / "data" / "link.yaml").symlink_to(mine / "secrets" / "db.yaml")
    (mine / "model").symlink_to(mine / "secrets")
    snapshot(tmp_path / "code", [str(mine)])
    copied = [p for p in (tmp_path / "code" / "config_dirs").rglob("*") if p.is_file()]
    assert [str(p.relative_to(tmp_path / "code" / "config_dirs")) for p in copied] == ["0/data/a.yaml"]
    (mine / "data" / "big.yaml").write_text("x" * (1 << 20) + "y")
    with pytest.raises(ConfigError, match=r"big.yaml has 1.0 MB"):
        snapshot(tmp_path / "code2", [str(mine)])


def test_from_scratch_is_for_runs_whose_checkpoints_are_gone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is new"):
        compose_run(["name=r", "gpus=8", "from_scratch=true"])
    run = written("name=r", "gpus=8")
    again = compose_run(["r", "from_scratch=true"])
    assert again.from_scratch
    assert not again.config.from_scratch
    (run.path / "checkpoints" / "update-00000004").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has checkpoints, up to update-00000004"):
        compose_run(["r", "from_scratch=true"])


def test_own_config_groups_are_used_remembered_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine" / "cluster").mkdir(parents=True)
    (tmp_path / "mine" / "cluster" / "site.yaml").write_text("kind: slurm\npartition: tomorrow\n")
    run = compose_run(["name=r", "cluster=site", "gpus=8"], config_dirs=["mine"])
    write(run)
    assert (run.path / "code" / "config_dirs" / "0" / "cluster" / "site.yaml").is_file()
    assert compose_run(["r", "nodes=2"]).config.cluster.partition == "tomorrow"


def test_unnamed_runs_are_called_after_experiment_and_time(tmp_path: Path) -> None:
    assert compose_run(["gpus=8", "experiment=ssv2"]).name.startswith("ssv2-20")
    assert compose_run(["gpus=8"], default_name="job7").name == "k400_mit_ssv2-job7"


def test_a_lone_quotation_mark_in_a_name_is_refused_and_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("'a", 'a"'):
        assert main([f"name={name}", "experiment=demo", "cluster=local", "dry_run=true"]) == 2
        assert "cannot be a folder name" in capsys.readouterr().err
    assert compose_run(["name='a'", "experiment=demo"]).name == "a"
