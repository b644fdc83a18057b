"""`make gpu-check` on the CPU: it runs to its end, every section notices a fault, and an ill section does not end the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import pack, stored
from benchmarks.gpu_check.plants import PLANTS
from benchmarks.gpu_check.sections import NAMES

pytestmark = pytest.mark.long
ENDS = ("crash", "hang")
"""Faults that end a section instead of failing a check."""
SLOW = ("moments",)
"""Faults whose section starts runs."""


def check(root: Path, out: Path, *words: str) -> tuple[int, dict[str, dict[str, Any]], str]:
    """The exit status of the check on the CPU, the result of each section, and the printed text."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--tiny", "--out", str(out), *words]
    ended = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    return ended.returncode, {line["section"]: line for line in lines if "end" in line}, ended.stdout + ended.stderr


def test_all_sections_hold_on_the_cpu_and_a_second_start_keeps_what_is_there(root: Path, tmp_path: Path) -> None:
    code, sections, text = check(root, tmp_path, "--minutes", "60")
    assert code == 0, text
    assert list(sections) == list(NAMES)
    assert {s["end"] for s in sections.values()} == {"ok"}
    assert "**no**" not in text
    assert (tmp_path / "report.md").read_text() in text
    (tmp_path / "losses.json").unlink()
    code, again, text = check(root, tmp_path, "--sections", "environment", "losses", "bits")
    assert code == 0, text
    assert [name for name, s in again.items() if not s.get("kept")] == ["losses"]


def planted(root: Path, *names: str) -> dict[str, list[str]]:
    """The failed checks of each fault's section."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.plants", *names]
    ended = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, list[str]] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_every_section_has_a_fault_that_it_notices(root: Path) -> None:
    assert {section for section, _ in PLANTS.values()} == set(NAMES)
    names = [name for name in PLANTS if name not in ENDS + SLOW]
    assert {name: bool(failed) for name, failed in planted(root, *names).items()} == dict.fromkeys(names, True)


@pytest.mark.slow
def test_moments_that_do_not_come_back_are_noticed(root: Path) -> None:
    assert planted(root, "moments")["moments"]


def test_a_crash_and_a_hang_are_lines_of_the_report_and_the_others_run(root: Path, tmp_path: Path) -> None:
    code, found, text = check(root, tmp_path, "--sections", "environment", "losses", "--plant", "crash")
    assert code == 1
    assert {n: s["end"] for n, s in found.items()} == {"environment": "crashed", "losses": "ok"}, text
    assert found["environment"]["error"].startswith("exit status 139")
    code, found, text = check(
        root, tmp_path, "--sections", "environment", "losses", "--plant", "hang", "--minutes", "0.4"
    )
    assert code == 1
    assert {n: s["end"] for n, s in found.items()} == {"environment": "time", "losses": "not run"}
    assert "before it hangs" in text
    assert "Not run, because the time was up: Losses and gradients" in text
    assert not (tmp_path / "environment.json").exists()


def test_without_a_gpu_it_is_refused_in_one_line(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: torch ")
    assert "sees no GPU here" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_stored_values_have_every_term_and_every_parameter() -> None:
    for case, parameters in (("tiny", 342_413), ("mvit_b", 64_297_643)):
        held = stored.load(case)
        assert held["parameters"] == parameters
        assert {"total", "classification", "projection", "informative"} < set(held["terms"])
        assert min(held["terms"].values()) > 0
        assert all(v["norm"] > 0 for v in held["values"].values())
    assert sum(p.stat().st_size for p in stored.FOLDER.iterdir()) < 200_000


def test_the_archive_has_the_code_and_the_wheels_and_the_command_that_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = []

    def download(names: list[str], python: str, to: Path) -> None:
        wheels.extend(names)
        (to / f"{python}.whl").write_bytes(b"wheel")

    monkeypatch.setattr(pack, "_download", download)
    monkeypatch.setattr(pack, "_build", lambda to: None)
    assert pack.main([str(tmp_path / "x.tar"), "--also", "numpy"]) == 0
    with tarfile.open(tmp_path / "x.tar") as archive:
        names = {name.removeprefix(f"{pack.FOLDER}/") for name in archive.getnames()}
    assert {
        "wheels/3.12.whl",
        "multitrain/train.py",
        "launch/submit.py",
        "benchmarks/gpu_check/stored/mvit_b.json",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/results/", "."))]
    assert "numpy" in wheels
    assert "torch" not in wheels
