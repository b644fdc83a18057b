"""A sweep is every combination of what was asked for, each a run of its own; a failed run is a failed sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.sweep import grid, main
from multitrain.config import ConfigError


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
    common += ["model=tinier", "updates=1", "cluster.restarts_in_place=0"]
    missing = tmp_path / "weights.pyth"
    missing.write_text("no weights")
    assert main([*common, "name=s", f"init_from=null,{missing}"]) == 1
    capsys.readouterr()
    assert main([str(tmp_path / ".sweeps" / "s"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [r["state"] for r in found["runs"]] == ["finished", "failed"]
    assert str(missing) in found["runs"][1]["last_error"]
    assert main([*common, "name=s", "seed=0,1"]) == 2, "a sweep is not written over"


def test_compare_shows_what_differs(tiny_data: Path, tmp_path: Path) -> None:
    from support import settings, write_run

    from multitrain.report.compare import compare, text

    first, _ = write_run(tmp_path, settings(tiny_data, name="one"))
    second, _ = write_run(tmp_path, settings(tiny_data, name="two", optim__lr=0.5))
    rows = compare([first, second])
    assert [r["differs"] for r in rows] == [{"optim.lr": 0.001}, {"optim.lr": 0.5}]
    assert "optim.lr" in text(rows).splitlines()[0]
