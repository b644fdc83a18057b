"""Whatever a reader is given, it takes it or refuses it in a line: no traceback, no hang, no gigabyte.

The same cases in every run of the suite; `python -m benchmarks.fuzz` tries twenty thousand others.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import Fuzz, main
from benchmarks.fuzzing.judge import GOOD, Case, Outcome, Worker
from benchmarks.fuzzing.readers import Reader
from tests.fuzz.misbehaving import misbehaving

SLOW = (
    "$",
    "flops",
    "predict",
    "convert",
    "report",
    "submit",
    "data",
    "overrides",
    "yaml group",
    "compare",
    "status",
    "embed",
)
"""Beginnings of the names of readers that take more than some hundredths of a second."""
TEXT = ("overrides", "yaml group", "csv", "multi-label csv", "class list", "class list json")

fixed = settings(
    max_examples=80, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
"""The same examples in each run."""


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzz]:
    made = Fuzz(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.worker.close()


def names(fuzz: Fuzz, *, slow: bool) -> list[str]:
    return [name for name in fuzz.readers if name.startswith(SLOW) == slow]


def tried(fuzz: Fuzz, case: Case) -> str:
    """What is wrong about the outcome of a case, with the command that makes it again; empty when nothing is."""
    outcome = fuzz.judge(case)
    again = f"python -m benchmarks.fuzz --show '{case.reader}/{case.number}'" if not case.given else case.given
    return "" if outcome.kind in GOOD else f"{case.reader}: {outcome.kind}: {outcome.text}   ({again})"


def test_the_valid_inputs_that_cases_are_made_from_are_accepted(fuzz: Fuzz) -> None:
    found = {name: fuzz.judge(Case(name, -1)) for name in names(fuzz, slow=False)}
    assert {name: o for name, o in found.items() if o.kind != "accepted"} == {}


def test_damaged_files_are_accepted_or_refused_in_a_line(fuzz: Fuzz) -> None:
    wrong = [tried(fuzz, Case(name, n)) for name in names(fuzz, slow=False) for n in range(40)]
    assert [w for w in wrong if w] == []


def test_damaged_files_and_words_of_command_lines_are_accepted_or_refused_in_a_line(fuzz: Fuzz) -> None:
    quick = [name for name in names(fuzz, slow=True) if fuzz.readers[name].every <= 2]
    wrong = [tried(fuzz, Case(name, 1_000 + n)) for name in quick for n in range(3)]
    assert [w for w in wrong if w] == []


@fixed
@given(name=st.sampled_from(TEXT), text=st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_any_text_and_any_bytes_are_accepted_or_refused_in_a_line(fuzz: Fuzz, name: str, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    assert not tried(fuzz, Case(name, 0, (data or b"\n").hex()))


@fixed
@given(
    key=st.sampled_from(
        ["name", "data.root", "model.stages", "optim.lr", "+nodes", "~seed", "data", "nope", "hydra.x"]
    ),
    value=st.text(st.sampled_from("ab1.,=[]{}()'\"\\$: ~#-*&!\u202e\x1b"), max_size=8),
)
def test_any_value_of_an_option_is_accepted_or_refused_in_a_line(fuzz: Fuzz, key: str, value: str) -> None:
    assert not tried(fuzz, Case("overrides", 0, f"{key}={value}".encode().hex()))


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Worker]:
    captures = (tmp_path / "out", tmp_path / "err")
    worker = Worker(partial(misbehaving, tmp_path, captures), captures)
    yield worker
    worker.close()


def test_the_judge_sees_what_it_is_there_for(harness: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.fuzzing.judge.CPU_SECONDS", 3.0)
    expected = {
        "raises": "traceback",
        "grows": "growth",
        "too much": "growth",
        "hangs": "hang",
        "child hangs": "hang",
        "dies": "crash",
        "speaks": "control",
        "says nothing": "silent",
        "is fine": "accepted",
    }
    found = {name: harness.judge(Case(name, 0)) for name in expected}
    assert {name: outcome.kind for name, outcome in found.items()} == expected
    assert "in misbehave" in found["hangs"].text
    assert f"ended with {-signal.SIGSEGV}" in found["dies"].text


def test_a_fuzz_that_was_ended_goes_on_after_its_last_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Case] = []

    class Ended(Fuzz):
        def __init__(self, folder: Path) -> None:
            self.readers = {name: Reader([], lambda *_: None) for name in ("csv", "events", "other")}
            self.worker = Worker(Worker, (folder, folder))  # type: ignore[arg-type]  # never started

        def judge(self, case: Case) -> Outcome:
            asked.append(case)
            if len(asked) == 4:
                raise KeyboardInterrupt
            return Outcome("traceback" if case.number == 2 else "refused", "x")

    monkeypatch.setattr("benchmarks.fuzz.Fuzz", Ended)
    words = ["csv", "events", "--cases", "7"]
    with pytest.raises(KeyboardInterrupt):
        main(words, tmp_path)
    saved = json.loads((tmp_path / "unfinished/fuzz-small.json").read_text())
    assert saved["done"] == 3
    assert saved["outcomes"] == {"csv": {"refused": 2}, "events": {"refused": 1}}
    assert main(words, tmp_path) == 1
    assert [f"{c.reader}/{c.number}" for c in asked[3:]] == ["events/1", "events/1", "csv/2", "events/2", "csv/3"]
    result = json.loads((tmp_path / "raw/fuzz.json").read_text())
    assert (result["done"], result["outcomes"]["csv"]) == (7, {"refused": 3, "traceback": 1})
    assert [f["case"] for f in result["faults"]] == ["csv/2", "events/2"]
    assert not (tmp_path / "unfinished/fuzz-small.json").exists()
