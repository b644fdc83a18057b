"""Runs side by side: options that differ, results with their uncertainty, and whether two tests differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from multitrain.cli import main
from multitrain.evaluation.tables import compute_metrics, write_json
from multitrain.report.compare import compare, compare_runs, text
from tests import support


@pytest.fixture
def runs(tiny_data: Path, tmp_path: Path) -> list[Path]:
    names = {"one": 1e-3, "two": 0.5}
    return [
        support.write_run(tmp_path, support.settings(tiny_data, name=n, optim__lr=lr))[0] for n, lr in names.items()
    ]


def write_test(run: Path, right: Sequence[int], videos: Sequence[str], labels: Sequence[int] | None = None) -> None:
    """A test on a dataset ``d`` of two classes, of which the videos at the places `right` are predicted."""
    truth = np.array([i % 2 for i in range(len(videos))] if labels is None else labels)
    predicted = np.where(np.isin(np.arange(len(videos)), right), truth, 1 - truth)
    scores = np.eye(2, dtype=np.float32)[predicted]
    result = {"dataset": "d", "head": "d", "videos": len(videos), "scored": len(videos), "views": [1, 1]}
    result |= compute_metrics(scores, [(int(t),) for t in truth], multi_label=False)
    folder = run / "evaluation/update-00000040/test"
    write_json(folder / "metrics.json", {"datasets": {"d": result}})
    (folder / "d").mkdir(exist_ok=True)
    np.savez(folder / "d/scores.npz", scores=scores, labels=truth, paths=np.array(videos))


def test_a_test_is_shown_with_its_interval_and_compared_on_the_same_videos(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    videos = [f"{i}.mp4" for i in range(40)]
    write_test(runs[0], range(20), videos)
    write_test(runs[1], range(34), videos[::-1], [(39 - i) % 2 for i in range(40)])  # another order of the same videos
    found = compare_runs(runs)
    assert found.rows[1]["test"] == {"d": 85.0}
    assert found.rows[1]["intervals"]["d"] == pytest.approx([70.93, 92.94], abs=0.01)
    (difference,) = found.differences
    assert (difference["run"], difference["first"], difference["videos"]) == ("two", "one", 40)
    assert difference["difference"] == pytest.approx(35.0)
    assert difference["p"] == pytest.approx(0.00936, abs=1e-5)  # 6 videos only the first has right, 20 only the second
    assert difference["real"]
    assert main(["compare", *map(str, runs)]) == 0
    shown = capsys.readouterr().out
    assert "85.00 (70.9–92.9)" in shown
    assert "two − one = +35.00 points top-1" in shown
    assert "a real difference" in shown


def test_a_difference_that_chance_explains_is_called_that(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    videos = [f"{i}.mp4" for i in range(40)]
    write_test(runs[0], range(30), videos)
    write_test(runs[1], range(32), videos)
    assert not compare_runs(runs).differences[0]["real"]
    assert main(["compare", "--json", *map(str, runs)]) == 0
    assert json.loads(capsys.readouterr().out)["differences"][0]["p"] == 0.5
    main(["compare", *map(str, runs)])
    assert "no more than chance explains" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("videos", "labels", "reason"),
    [
        (["x.mp4", "y.mp4"], None, "different videos"),
        (["a.mp4", "b.mp4"], [1, 0], "their labels differ"),
        (["a.mp4", "a.mp4"], [0, 0], "listed twice"),
    ],
)
def test_tests_that_cannot_be_compared_are_named_with_the_reason(
    runs: list[Path], videos: list[str], labels: list[int] | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_test(runs[0], [0], ["a.mp4", "b.mp4"])
    write_test(runs[1], [0], videos, labels)
    assert compare_runs(runs).differences == []
    main(["compare", *map(str, runs)])
    assert reason in capsys.readouterr().out


def test_paths_in_the_runs_own_folders_do_not_differ(runs: list[Path]) -> None:
    for run in runs:
        config = (run / "config.yaml").read_text()
        assert "class_names: null" in config
        (run / "classes").mkdir()
        (run / "classes/stride.txt").write_text("a\nb\nc\n")
        (run / "config.yaml").write_text(
            config.replace("class_names: null", f"class_names: {run}/classes/stride.txt", 1)
        )
    assert list(compare(runs)[0]["differs"]) == ["optim.lr"]


def test_a_table_wider_than_the_terminal_has_a_column_a_run(runs: list[Path]) -> None:
    rows = compare(runs)
    assert text(rows).splitlines()[0].split()[:2] == ["run", "optim.lr"]
    narrow = text(rows, width=30).splitlines()
    assert narrow[0].split() == ["run", "one", "two"]
    assert ["optim.lr", "0.001", "0.5"] in [line.split() for line in narrow]


@pytest.mark.parametrize("verb", ["status", "report", "compare"])
@pytest.mark.parametrize("word", ["best", "latest", "ema"])
def test_weights_of_a_run_where_a_run_is_wanted_are_answered_with_the_run(
    runs: list[Path], verb: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, f"{runs[0]}/{word}"]) == 2
    assert f"stands for weights of a run, not for the run; give {runs[0]}\n" in capsys.readouterr().err


def test_a_folder_of_data_with_the_name_of_a_run_does_not_hide_the_run(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "desk/one").mkdir(parents=True)
    (tmp_path / "desk/runs").symlink_to(runs[0].parent)
    monkeypatch.chdir(tmp_path / "desk")
    assert main(["report", "one"]) == 0
    assert (runs[0] / "report/report.html").is_file()
    assert list((tmp_path / "desk/one").iterdir()) == []
