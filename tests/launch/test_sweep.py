"""A sweep is every combination of what was asked for, each a run of its own; a failed run is a failed sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.sweep import grid, main
from multitrain.config import ConfigError
from multitrain.config.overrides import readable


def test_points_are_all_combinations_in_order() -> None:
    assert grid(["optim.lr=0.0001,0.0002", "seed=range(2)", "updates=3"]) == [
        ["optim.lr=0.0001", "seed=0", "updates=3"],
        ["optim.lr=0.0001", "seed=1", "updates=3"],
        ["optim.lr=0.0002", "seed=0", "updates=3"],
        ["optim.lr=0.0002", "seed=1", "updates=3"],
    ]


def test_a_path_with_signs_of_the_grammar_is_one_value_of_a_sweep() -> None:
    assert grid(["data.root=~/data (1)", "seed=1,2"]) == [["data.root=~/data (1)", f"seed={n}"] for n in (1, 2)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1"], "nothing to sweep over"),
        (["gpus=1,2"], "all runs of a sweep share gpus"),
        (["seed=1,"], "is not an option"),
        (["seed=range(0)"], "no value"),
        (["seed=range(1,2,0)"], "cannot be listed; write them out"),
        (["optim.lr=interval(0,1)"], "cannot be listed; write them out"),
        (["model=glob(*)"], "cannot be listed; write them out"),
        (["seed=range(1000000000)"], "more than 10000 combinations"),
        (["seed=range(200)", "optim.lr=range(200)"], "more than 10000 combinations"),
    ],
)
def test_what_cannot_be_swept_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        grid(words)


def test_a_local_sweep_ends_with_the_table_and_a_failure_counts(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    monkeypatch.setenv("TINY_DATA", str(tiny_data))
    common = [
        "--config-dir",
        str(root / "tests" / "configs"),
        "experiment=tiny",
        "cluster=local",
        "gpus=1",
        f"runs={tmp_path}",
    ]
    common += ["model=tinier", "updates=1", "cluster.restarts_in_place=0", "cluster.check_data=false"]
    missing = tmp_path / "weights.pyth"
    missing.write_text("no weights")
    assert main([*common, "name=s", f"init_from=null,{missing}"]) == 1
    capsys.readouterr()
    assert main([str(tmp_path / ".sweeps" / "s"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [r["state"] for r in found["runs"]] == ["finished", "failed"]
    assert str(missing) in found["runs"][1]["last_error"]
    assert main([*common, "name=s", "seed=0,1"]) == 2, "a sweep is not written over"


@pytest.fixture
def sweep_words(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    monkeypatch.setenv("TINY_DATA", str(tiny_data))
    monkeypatch.chdir(tmp_path)
    folders = ["--config-dir", str(root / "tests" / "configs")]
    return [*folders, "experiment=tiny", "model=tinier", "gpus=1", f"runs={tmp_path}", "name=s"]


REFUSED = [
    (["seed=0,1", "updates=3", "epochs=2"], "epochs=2: changes nothing, since the run's length is updates=3"),
    (["data.temperature=2,3"], "data.temperature=2: changes nothing, since data.proportions is size"),
    (["loss.dataset_weights.stride=1,-1"], "loss.dataset_weights.stride=-1: a weight below 0"),
    (["nope=1,2"], "unknown option 'nope'"),
    (["optim.lr=a,b"], "optim.lr='a'"),
    (["seed=0,1", "--nope"], "unknown flag '--nope'"),
]


@pytest.mark.parametrize(("more", "said"), REFUSED)
def test_both_kinds_of_sweep_refuse_what_a_submission_refuses(
    sweep_words: list[str], capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    from multitrain import sweep

    for start, words in ((main, [*sweep_words, *more]), (sweep.main, ["-m", *sweep_words, *more])):
        assert start(words) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert list(Path().glob("s-*")) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["seed=0,1", "dry_run=true"], "dry_run: Hydra's launcher has none; use python launch/sweep.py"),
        (["seed=1,1"], "two of the runs would be the same"),
    ],
)
def test_hydras_sweep_trains_nothing_that_was_not_meant(
    sweep_words: list[str], capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    from multitrain import sweep

    assert sweep.main(["-m", *sweep_words, *more]) == 2
    assert said in capsys.readouterr().err


def test_a_word_is_noted_as_idle_only_if_it_is_in_every_run(
    sweep_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    idle = [*sweep_words, "dry_run=true", "cluster.check_data=false", "loss.scope=micro", "augment.copies=2"]
    assert main([*idle, "loss.informative_weight=0", "seed=0,1"]) == 0
    assert capsys.readouterr().err.count("note: loss.scope=micro: changes nothing") == 1
    assert main([*idle, "loss.informative_weight=0,0.1"]) == 0
    assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize("dry", [[], ["dry_run=true"]])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["seed=0,1", "init_from=no.pyth"], "no.pyth: no such file or folder"),
        (["seed=0,1", "data.datasets.stride.annotations=nowhere"], "nowhere: no such folder of annotations"),
        (["seed=1,1"], "s-1 and s-0 would be the same run"),
        (["seed=1,2", "seed=3"], "s-1 and s-0 would be the same run"),
    ],
)
def test_a_sweep_and_its_dry_run_refuse_runs_that_cannot_start(
    sweep_words: list[str], capsys: pytest.CaptureFixture[str], more: list[str], said: str, dry: list[str]
) -> None:
    assert main([*sweep_words, *more, *dry]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(Path().glob("s-*")) == []


def test_what_the_runs_of_a_sweep_share_is_looked_at_once(
    sweep_words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr("launch.checks._run_check", lambda what, module, run, *_, **__: asked.append(module) or "")
    assert main([*sweep_words, "seed=0,1,2,3", "dry_run=true"]) == 0
    assert asked == ["multitrain.data.catalog"]


def test_a_path_with_signs_of_the_grammar_passes_hydras_own_command_line() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for path in ("/data (1", "it's(1", "a\\b(", "(\\", "(\\'", "~/data", "/plain"):
        word = readable(f"++data.root={path}")
        assert str(OverridesParser.create().parse_override(word).value()) == path


def test_compare_shows_what_differs(tiny_data: Path, tmp_path: Path) -> None:
    from support import settings, write_run

    from multitrain.report.compare import compare, text

    first, _ = write_run(tmp_path, settings(tiny_data, name="one"))
    second, _ = write_run(tmp_path, settings(tiny_data, name="two", optim__lr=0.5))
    rows = compare([first, second])
    assert [r["differs"] for r in rows] == [{"optim.lr": 0.001}, {"optim.lr": 0.5}]
    assert "optim.lr" in text(rows).splitlines()[0]
