"""Text, JSON and YAML of strangers are read within limits, or refused in one line, quickly and in little memory."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest

from multitrain.config import ConfigError
from multitrain.config.reading import (
    LARGEST_YAML,
    MOST_VALUES,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
    read_yaml,
    shown,
)

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


def refused(read: object, *given: object) -> str:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError) as caught:
        read(*given)  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert time.monotonic() - began < 60, "a tenth of that is promised, on a quiet machine"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "kB: one GB"
    return message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "more than 200,000 values"),
        ("m: &m {a: 1}\nn: &n {<<: [" + ", ".join(["*m"] * 250_000) + "]}", "values in it"),
        ("[" * 20_000, "more than 100 deep"),
        ("{a: " * 20_000, "more than 100 deep"),
        ("- " * 5_000 + "x", "more than 100 deep"),
        ("a: &a [*a]", "&a contains itself"),
        ("a: *b", "not YAML"),
        ("seed: " + "9" * 5000, "x.yaml:1: a number of 5000 digits"),
        ("nodes: [", "not YAML"),
        ("a: !!python/object/apply:os.system [echo]", "not YAML"),
        ("? [a]\n: 1", "not YAML"),
        ("a: \x07", "not YAML"),
        ("x" * (LARGEST_YAML + 1), "larger than"),
    ],
)
def test_yaml_beyond_the_limits_is_one_line(text: str, says: str) -> None:
    assert says in refused(parse_yaml, text, "x.yaml")


def test_yaml_within_them_is_what_it_says() -> None:
    assert parse_yaml("a: 2001-99-99\nb: 2001-01-01", "x") == {"a": "2001-99-99", "b": "2001-01-01"}
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a", "x") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1},
    }
    assert parse_yaml("", "x") is None
    assert parse_yaml(f"a: '{'9' * 5000}'", "x") == {"a": "9" * 5000}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "more than 100 deep"),
        ("[" * 101 + "]" * 101, "more than 100 deep"),
        ('{"a":' * 100_000, "more than 100 deep"),
        ("9" * 5000, "a number of 5000 digits"),
        ('{"a": -' + "9" * 41 + "}", "a number of 42 digits"),
        ("{", "not JSON"),
        ("", "not JSON"),
        (b"\xff\xfe{\0}\0", "is UTF-16"),
        (b'{"a": "\xe9"}', "x.json:1: not UTF-8"),
        (b"[1]\n\0", "x.json:2: a NUL byte"),
        ("[" + "," * (MOST_VALUES + 1) + "]", "more than 10,000,000 values"),
    ],
)
def test_json_beyond_the_limits_is_one_line(text: str | bytes, says: str) -> None:
    assert says in refused(parse_json, text, "x.json")


def test_json_within_them_is_what_it_says(tmp_path: Path) -> None:
    value = {"a": [1, -(10**38), 2.5, None, "ü"], "b": {"c": []}}
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())
    assert read_json(tmp_path / "x.json") == value
    assert parse_json("[" * 100 + "]" * 100, "x") is not None


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert "nothing.json: cannot be read (No such file" in refused(read_json, tmp_path / "nothing.json")
    assert "is a folder" in refused(read_yaml, tmp_path)
    assert "a\\x00b: cannot be read" in refused(read_text, Path("a\0b"))
    assert "cannot be read (File name too long)" in refused(read_text, Path("a" * 5000))
    (tmp_path / "big").write_bytes(b"")
    with (tmp_path / "big").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    assert "larger than" in refused(read_text, tmp_path / "big")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_called_by_name(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("v0.mp4 0\nv1.mp4 1\n".encode(encoding))
    assert "is UTF-16, not UTF-8; save it as UTF-8" in refused(read_text, tmp_path / "x")


def test_texts_of_strangers_are_shown_in_one_line_without_control_characters() -> None:
    assert shown("a\x1b[31m\nb") == "a\\x1b[31m b"
    assert len(shown("x" * 10_000)) == 200
