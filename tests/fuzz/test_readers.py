"""Whatever a reader is given, it takes it or refuses it in a line: no traceback, no hang, no gigabyte.

The same cases in every run of the suite; `python -m benchmarks.fuzz` tries twenty thousand others.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import Fuzz
from benchmarks.fuzzing.judge import GOOD, Case, Worker, judged, taking
from benchmarks.fuzzing.readers import REFUSALS

SLOW = ("$", "flops", "predict", "convert", "report", "submit", "data", "overrides", "yaml group", "compare", "status")
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
    """A worker whose readers misbehave."""

    def misbehave(case: Case) -> object:
        if case.reader == "raises":
            raise KeyError("x")
        if case.reader == "grows":
            return len(bytearray(b"\1") * (1_200 << 20)) and None
        if case.reader == "too much":
            return len(bytes(1 << 40)) and None
        while case.reader == "hangs":
            pass
        if case.reader == "speaks":
            print("\x1b[31m")
        return 3 if case.reader == "says nothing" else None

    captures = (tmp_path / "out", tmp_path / "err")
    said = taking(captures)
    worker = Worker(lambda case: judged(lambda *_: misbehave(case), tmp_path, b"", REFUSALS, said), captures)
    yield worker
    worker.close()


def test_the_judge_sees_what_it_is_there_for(harness: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.fuzzing.judge.CPU_SECONDS", 4.0)
    kinds = ("raises", "grows", "too much", "hangs", "speaks", "says nothing", "is fine")
    found = {name: harness.judge(Case(name, 0)).kind for name in kinds}
    expected = ("traceback", "growth", "growth", "hang", "control", "silent", "accepted")
    assert found == dict(zip(kinds, expected))
