"""Scores and figures that somebody else gives: read as they are, or refused in one line."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multitrain.config import ConfigError
from multitrain.evaluation import pictures, tables
from multitrain.evaluation.scored import read_evaluation

RESULT: dict[str, Any] = {
    "dataset": "a",
    "head": "a",
    "split": "test",
    "videos": 4,
    "scored": 3,
    "views": [1, 1],
    "top1": 50.0,
    "top5": 100.0,
    "class_names": ["x", "y"],
    "confusion": [[0, 1, 1]],
    "unreadable": [],
    "weights": "w",
    "precision": "fp32",
}
ARRAYS: dict[str, Any] = {
    "labels": np.array([0, 1, 1]),
    "scores": np.zeros((3, 2), np.float32),
    "paths": np.array(["a", "b", "c"]),
}


def write(folder: Path, result: Any = None, arrays: dict[str, Any] | None = None) -> Path:
    (folder / "a").mkdir(parents=True, exist_ok=True)
    content = {"datasets": {"a": RESULT if result is None else result}}
    (folder / "metrics.json").write_text(json.dumps(content))
    np.savez_compressed(folder / "a/scores.npz", **(ARRAYS | (arrays or {})))
    return folder


def test_a_finished_test_is_read(tmp_path: Path) -> None:
    found = read_evaluation(write(tmp_path))["a"]
    assert found.class_names == ["x", "y"]
    assert found.confusion is not None


@pytest.mark.parametrize(
    "changes",
    [
        *({"top1": "high"}, {"top1": float("nan")}, {"views": 3}, {"class_names": ["x"]}, {"scored": "many"}),
        *(
            {"confusion": [[0, 5, 1]]},
            {"confusion": 3},
            {"confusion": [[-1, 0, 1]]},
            {"unreadable": [3]},
            {"videos": 1},
        ),
    ],
)
def test_figures_that_no_test_writes_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(metrics\.json|scores\.npz)") as caught:
        read_evaluation(write(tmp_path, RESULT | changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        *({"labels": np.array([0, 1])}, {"labels": np.array([0, 1, 7])}, {"labels": np.array(["a"] * 3)}),
        *({"scores": np.zeros(3)}, {"scores": np.zeros((3, 0))}, {"scores": np.array([[{}, {}]] * 3)}),
        *(
            {"paths": np.array([])},
            {"labels": np.zeros((3, 5), bool)},
            {"scores": np.zeros((1 << 14, 1 << 14), np.float64)},
        ),
    ],
    ids=lambda changes: f"{next(iter(changes))} {next(iter(changes.values())).shape}",
)
def test_scores_that_no_test_writes_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"scores\.npz"):
        read_evaluation(write(tmp_path, arrays=changes))


def test_scores_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path) / "a/scores.npz"
    whole = file.read_bytes()
    for content in (b"", b"PK", whole[:-30], whole[: len(whole) // 2], bytes(100)):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"scores\.npz: damaged"):
            read_evaluation(tmp_path)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("labels.npy", b"\x93NUMPY")
    with pytest.raises(ConfigError, match=r"scores\.npz: damaged"):
        read_evaluation(tmp_path)


def test_an_evaluation_replaces_only_what_an_evaluation_wrote(tmp_path: Path) -> None:
    (write(tmp_path / "own") / "a/shards").mkdir()
    tables.require_own(tmp_path / "own", ["a"])
    layouts = {
        "other figures": lambda p: (p / "metrics.json").write_text('{"accuracy": 1}'),
        "no figures": lambda p: (p / "metrics.json").write_text("accuracy: 1"),
        "a table": lambda p: (p / "table.txt").write_text("mine"),
        "scores": lambda p: ((p / "a").mkdir(), (p / "a/scores.npz").write_text("mine")),
        "a link": lambda p: os.symlink(tmp_path / "own/a", p / "a"),
        "a link to figures": lambda p: os.symlink(tmp_path / "own/metrics.json", p / "metrics.json"),
    }
    for name, make in layouts.items():
        place = tmp_path / name
        place.mkdir()
        make(place)
        with pytest.raises(ConfigError, match="choose another --out"):
            tables.require_own(place, ["a"])


def test_names_of_strangers_are_no_formulas_and_no_control_characters_in_pictures() -> None:
    names = ["$\\frac{$", "a $ b", "\x1b[2J\n", "$x$"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = pictures.confusion({names[0]: np.eye(4, dtype=int)}, {names[0]: names})
        example = pictures.Example(
            names[0], np.zeros((6, 8, 8, 3), np.uint8), tuple(names), {names[0]: [(n, 0.5) for n in names]}
        )
        strips = pictures.film_strips([example], [names[0]])
    assert drawn.startswith(b"\x89PNG")
    assert strips.startswith(b"\x89PNG")
