"""Text from strangers cannot move a cursor, end a line or become a formula."""

from __future__ import annotations

import csv
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitrain.config.boundary import understood
from multitrain.errors import ConfigError
from multitrain.text import cell, counted, csv_text, printable


def test_control_characters_and_bytes_that_are_no_utf8_are_written_as_escapes() -> None:
    assert printable("a\x1b[31mb\nc\r\td\x00\x9b") == r"a\x1b[31mb\nc\r\td\x00\x9b"
    assert printable(os.fsdecode(b"caf\xe9.mp4")) == r"caf\xe9.mp4"
    assert printable("abc\u202efdp.exe") == r"abc\u202efdp.exe"
    assert printable("Schüsse 跳舞 مرحبا -x_0.mp4") == "Schüsse 跳舞 مرحبا -x_0.mp4"


@given(st.text())
def test_whatever_it_is_it_is_one_line_that_any_stream_takes(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert shown.encode("utf-8").decode().isprintable() or not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "@SUM(1)", "\t=1+1", "\r=1", "-2+3+cmd|' /C calc'!A0", "+f(1)"])
def test_a_formula_in_a_csv_is_text(text: str) -> None:
    assert str(cell(text)).startswith("'")


@pytest.mark.parametrize("value", ["-x_000001_000011.mp4", "+1", "-3.5", "a=b.mp4", "plain", "", 7, 1.5])
def test_names_and_numbers_stay_as_they_are(value: object) -> None:
    assert cell(value) == value


@given(st.lists(st.lists(st.text(), min_size=1, max_size=4), max_size=5))
def test_every_row_of_a_csv_is_a_line(rows: list[list[str]]) -> None:
    text = csv_text(rows)
    assert text.count("\n") == len(rows)
    for row, read in zip(rows, csv.reader(text.splitlines())):
        assert read == [cell(value) for value in row]


def test_an_error_holds_nothing_that_a_terminal_obeys() -> None:
    assert str(ConfigError("no \x1b[2J\u202ename")) == r"no \x1b[2J\u202ename"


def test_a_missing_entry_is_called_so() -> None:
    with (
        pytest.raises(ConfigError, match="entry 'views' is missing"),
        understood("results.json: damaged", "restore it"),
    ):
        {}["views"]


def test_one_of_a_kind_is_singular() -> None:
    assert [counted(n, "rank") for n in (0, 1, 2)] == ["0 ranks", "1 rank", "2 ranks"]
