"""The list of mutations fits the code that it is about: what a change has moved is noticed here, not in the next long drill."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.drills.mutations import PAGE, Mutation, main, mutations, page, seen_before


def test_every_text_to_be_taken_out_is_in_its_file_once(root: Path) -> None:
    assert [reason for m in mutations() if (reason := m.problem(root))] == []


def test_every_mutation_changes_its_file_into_a_valid_program(root: Path) -> None:
    for m in mutations():
        assert m.after != m.before, m.what
        text = (root / m.file).read_text().replace(m.before, m.after)
        if m.file.endswith(".sh"):
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        else:
            compile(text, m.file, "exec")


def test_every_test_named_is_there(root: Path) -> None:
    for m in mutations():
        for test in m.tests:
            file, _, name = test.partition("::")
            assert re.search(rf"^def {name.partition('[')[0]}\(", (root / file).read_text(), re.MULTILINE), test


def test_the_page_has_them_all_under_their_guarantee(root: Path) -> None:
    sections = PAGE.read_text().split("\n## ")[1:]
    written = {re.search(r"\((.*)\.md\)", s)[1]: re.findall(r"^\| (.*?) \| `", s, re.MULTILINE) for s in sections}  # type: ignore[index]
    listed: dict[str, list[str]] = {}
    for m in mutations():
        listed.setdefault(m.guarantee, []).append(m.what)
    assert written == listed, "run python benchmarks/drills/mutations.py --untried --page"
    assert page(seen_before()) == PAGE.read_text(), "written anew, it keeps what was noticed before"


def test_a_text_that_is_gone_or_there_twice_is_rotten(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\ny = 1\n")
    assert Mutation("", "", "a.py", "x = 1", "", ()).problem(tmp_path) is None
    assert "0 times" in (Mutation("", "", "a.py", "z = 1", "", ()).problem(tmp_path) or "")
    assert "2 times" in (Mutation("", "", "a.py", "= 1", "", ()).problem(tmp_path) or "")
    assert "0 times" in (Mutation("", "", "gone.py", "x", "", ()).problem(tmp_path) or "")


SURVIVES = """
never-a-bad-checkpoint:
- what: something that no test looks at
  file: multitrain/order/batch.py
  before: Videos per update, over all ranks.
  after: Videos.
  tests: ["tests/order/test_batch.py::test_a_slice_that_does_not_exist_is_refused"]
- what: whole shapes only
  file: multitrain/order/batch.py
  before: if min(parts) < 1 or self.world_size * self.videos_per_rank != self.effective_batch
  after: if False
  tests: ["tests/order/test_batch.py::test_a_shape_that_does_not_multiply_out_cannot_be_made"]
"""


def test_one_that_no_test_notices_fails_the_drill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.yaml").write_text(SURVIVES)
    monkeypatch.setattr("benchmarks.drills.mutations.LIST", tmp_path / "list.yaml")
    assert main([]) == 1
    said = capsys.readouterr().out
    assert "something that no test looks at: NOT NOTICED" in said
    assert "whole shapes only: noticed by test_a_shape_that_does_not_multiply_out_cannot_be_made" in said
    assert "1 of 2 noticed" in said
    assert main(["--only", "no such thing"]) == 2
