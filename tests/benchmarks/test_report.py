"""Every figure in the documents is the one that a benchmark measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report, results


def test_the_readme_says_what_the_result_files_say(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert report.with_section(readme, report.load()) == readme, "run python -m benchmarks.report"


def test_the_benchmark_page_is_the_generated_one(root: Path) -> None:
    page = (root / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert report.page(report.load()) == page, "run python -m benchmarks.report"


def test_every_plot_of_the_page_is_there(root: Path) -> None:
    for result in report.load():
        for number in range(len(result["plots"])):
            assert (root / "benchmarks" / "plots" / f"{result['name']}-{number}.svg").is_file()


def test_a_saved_result_says_where_it_comes_from(tmp_path: Path) -> None:
    row = results.row("decode", ours=2.0, baseline=8.0, unit="ms", target=">= 3×", aim=">= 5×")
    file = results.save("thing", [row], size="full", folder=tmp_path)
    found = json.loads(file.read_text())
    assert set(found) == {"name", "command", "date", "hardware", "versions", "size", "rows", "plots"}
    assert found["rows"][0]["ratio"] == 4.0
    assert found["size"] == "full"
    assert found["versions"]["numpy"]


def test_a_result_file_stays_small_and_what_was_observed_besides_lies_beside_it(tmp_path: Path) -> None:
    drawn = results.plot("p", "x", "y", {"line": [(x, x / 3) for x in range(5000)]})
    file = results.save("thing", [], plots=[drawn], folder=tmp_path, table="| a |", interruptions=[1 / 3] * 5000)
    found = json.loads(file.read_text())
    assert len(found["plots"][0]["lines"]["line"]) <= results.MAX_POINTS
    assert found["table"] == "| a |"
    assert file.stat().st_size < 5000
    assert json.loads((tmp_path / "raw" / "thing.json").read_text()) == {"interruptions": [1 / 3] * 5000}


@pytest.mark.parametrize(
    ("ours", "ratio", "target", "aim", "grade"),
    [
        (1.0, 4.2, ">= 4.1×", ">= 6×", "yes"),
        (1.0, 6.2, ">= 4.1×", ">= 6×", "aim"),
        (1.0, 4.0, ">= 4.1×", ">= 6×", "**no**"),
        (1.4, None, "<= 1.5 ms", "", "yes"),
        (1.6, 9.0, "<= 1.5 ms", "", "**no**"),
        (1200.0, None, "<= 1,300 MB", "<= 1,200 MB", "aim"),
        (1.0, None, "", "", ""),
        (1.0, None, ">= 4×", "", ""),
    ],
)
def test_grades(ours: float, ratio: float | None, target: str, aim: str, grade: str) -> None:
    assert report.grade(results.row("x", ours=ours, ratio=ratio, target=target, aim=aim)) == grade


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4.123, "4.12"),
        (0.1234, "0.123"),
        (12.34, "12.3"),
        (123.4, "123"),
        (64_300_000, "64,300,000"),
        (0, "0"),
        (5.0, "5"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert report._figure(value) == text
