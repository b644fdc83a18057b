"""A check that dies says in one line what died, where, how, and what to do; one that refuses is quoted."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from launch import checks
from launch.child_error import child_error
from launch.run_folder import compose_run
from launch.submit import main

DEATHS = {
    "import os; os.kill(os.getpid(), 9)": "was killed by SIGKILL (exit code -9)",
    "import os; os.kill(os.getpid(), 11)": "was killed by SIGSEGV (exit code -11)",
    "raise MemoryError": "failed with exit code 1 on {node}; its last line is 'MemoryError'",
    "raise SystemExit(7)": "failed with exit code 7 on {node}; ",
    "raise SystemExit(2)": "failed with exit code 2 on {node}; ",
    "import sys; sys.stderr.write('\\n  \\n'); sys.exit(1)": "failed with exit code 1 on {node}; ",
    r"import sys; sys.stderr.write('\x1b[31mred'); sys.exit(1)": r"its last line is '\x1b[31mred'",
}


@pytest.mark.parametrize(("program", "said"), DEATHS.items())
def test_a_program_that_dies_says_what_died_where_and_what_to_do(program: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    line = child_error("the check of the data", done.returncode, done.stderr, "try again")
    assert line.startswith("the check of the data ")
    assert said.format(node=platform.node()) in line
    assert platform.node() in line
    assert line.endswith("; try again")
    assert line.isprintable()


def test_a_program_that_refuses_is_quoted() -> None:
    assert child_error("the check", 2, "a note\nerror: train.csv:3: no label\n", "try again") == "train.csv:3: no label"


@pytest.mark.parametrize(
    ("death", "said"),
    [("kill -9 $$", "was killed by SIGKILL"), ("echo MemoryError >&2; exit 1", "its last line is 'MemoryError'")],
)
def test_a_submission_whose_check_dies_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], death: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{death}\n")
    python.chmod(0o755)
    monkeypatch.setattr("launch.checks.sys.executable", str(python))
    assert main(["experiment=demo", "cluster=local", "gpus=1", "dry_run=true"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the check of the data (python -m multitrain.data.catalog) ")
    assert said in error
    assert "cluster.check_data=false" in error
    assert error.count("\n") == 1


def test_a_dry_run_shows_which_tensors_are_trained_how_and_refuses_patterns_without_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["experiment=k400", "model=tiny", "cluster=local", "gpus=1", "dry_run=true", "cluster.check_data=false"]
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert "learning rate" not in plain
    assert main([*words, "optim.freeze=[patch_embed.*,blocks.0.*]", "optim.layer_decay=0.5"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "# tensors layer number parameters learning rate weight decay" in lines
    assert any(line.startswith("# blocks.0 1 ") and line.endswith("frozen –") for line in lines)
    assert any(line.startswith("# norm, heads") and "× 1 0.05" in line for line in lines)
    assert main([*words, "optim.freeze=block.*"]) == 2
    note, error = capsys.readouterr().err.splitlines()[-2:]
    assert note.startswith("note: optim.freeze without init_from")
    assert error.startswith("error: optim.freeze: 'block.*' matches no tensor of this network; did you mean 'blocks.*'")


def test_a_sweep_of_learning_rates_checks_its_network_once(tmp_path: Path) -> None:
    runs = [
        compose_run(["experiment=demo", "cluster=local", f"runs={tmp_path}", f"name=r{i}", *words])
        for i, words in enumerate(
            (["optim.lr=1e-3"], ["optim.lr=1e-4"], ["optim.freeze=blocks.*"], ["optim.layer_decay=0.5"])
        )
    ]
    assert [run.name for run in checks._distinct(runs, checks.NETWORK_OPTIONS)] == ["r0", "r2", "r3"]
