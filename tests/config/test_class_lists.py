"""One parser of class lists for import, training and display: every usual file gives the right names, or one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from multitrain.config import ConfigError
from multitrain.config.class_names import read_class_names

NAMES = ["abseiling", "air drumming", "pushing, slowly"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "id,name\n0,abseiling\n1,air drumming\n2,pushing, slowly\n"),
        ("a.csv", "0,abseiling\n1,air drumming\n2,pushing, slowly\n"),
        ("a.csv", '0,abseiling\n1,air drumming\n2,"pushing, slowly"\n'),
        ("a.csv", ",name\n0,abseiling\n1,air drumming\n2,pushing, slowly\n"),
        ("a.csv", "name,id\nabseiling,0\nair drumming,1\npushing, slowly,2\n"),
        ("a.csv", "label;class_name\r\n2;pushing, slowly\r\n0;abseiling\r\n1;air drumming\r\n"),
        ("a.tsv", "class_id\tclass\n0\tabseiling\n1\tair drumming\n2\tpushing, slowly\n"),
        ("a.txt", "0 abseiling\n1 air drumming\n2 pushing, slowly\n"),
        ("a.txt", "\ufeffabseiling\r\nair drumming\r\npushing, slowly\r\n\r\n"),
        ("a.txt", "abseiling\rair drumming\rpushing, slowly\r"),
        ("a.json", json.dumps({"id2label": dict(enumerate(NAMES))})),
        ("a.json", json.dumps({"label2id": {n: i for i, n in enumerate(NAMES)}})),
        ("a.json", json.dumps({"model": "x", "id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}})),
        ("a.json", json.dumps({"classes": NAMES})),
        ("a.txt", json.dumps(NAMES, indent=1)),
        ("a.txt", json.dumps({n: i for i, n in enumerate(NAMES)})),
        ("a.json", json.dumps([{"id": i, "name": n} for i, n in enumerate(NAMES)])),
    ],
)  # fmt: skip
def test_every_usual_list_gives_the_names_by_label(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, newline="")
    assert read_class_names(tmp_path / name) == NAMES


@pytest.mark.parametrize(
    "text",
    [
        "400 m run\n10 pin bowling\nyoga\n",
        "400 m run\n10 pin bowling\n",
        "class 1\nclass 0\n",
        "a, b\nc, d\n",
        "label\nname\n",
    ],
)
def test_names_with_numbers_or_commas_stay_whole(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    assert read_class_names(tmp_path / "classes.txt") == text.splitlines()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", '{"abseiling":1,"air":2}', "numbered from 1"),
        ("a.json", '{"1": "abseiling", "2": "air"}', "numbered from 1"),
        ("a.json", '{"id2label": {"1": "abseiling", "2": "air"}}', "numbered from 1"),
        ("a.csv", "1,abseiling\n2,air\n", "numbered from 1"),
        ("a.csv", "id,name\n1,abseiling\n2,air\n", "numbered from 1"),
        ("a.txt", "1 abseiling\n2 air\n", "numbered from 1"),
        ("a.csv", "abseiling,0\nair,2\n", "no name for label 1"),
        ("a.csv", "abseiling,0\nair,0\n", "label 0 is 'abseiling' and 'air'"),
        ("a.json", '{"0": ["a"], "1": ["b"]}', "neither a list of names"),
        ("a.json", '{"a": [1], "b": 2}', "neither a list of names"),
        ("a.json", '{"a": "²", "b": "¹"}', "neither a list of names"),
        ("a.json", '{"a": true, "b": false}', "neither a list of names"),
        ("a.json", '{"a": 0.0}', "neither a list of names"),
        ("a.json", '{"a": "' + "9" * 5000 + '"}', "neither a list of names"),
        ("a.json", '{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ("a.json", "3", "neither a list of names"),
        ("a.json", "{}", "neither a list of names"),
        ("a.json", "[" * 100_000, "more than 100 deep"),
        ("a.json", '["a", 1]', "neither a list of names"),
        ("a.json", '{"0": "alpha", "0": "beta", "1": "c"}', "'0' stands twice in one object"),
        ("a.json", '{"id2label": {"0": "a", "1": "b", "1": "b"}}', "'1' stands twice in one object"),
        ("a.json", '{"a": 0, "a": 1}', "'a' stands twice in one object"),
        ("a.txt", '["alpha", 3]', "neither a list of names"),
        ("a.txt", '[\n"alpha",\n', "not JSON"),
        ("a.txt", "a\n\nb\n", "a.txt:2: an empty line between names"),
        ("a.txt", "a\nb\0\n", "a.txt:2: a NUL byte"),
    ],
)
def test_what_is_no_list_from_0_up_is_refused_and_never_renumbered(
    tmp_path: Path, name: str, text: str, says: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_class_names(tmp_path / name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a\nb\n".encode("utf-16"))
    with pytest.raises(ConfigError, match="is UTF-16"):
        read_class_names(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("a\né\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a\.txt:2: not UTF-8"):
        read_class_names(tmp_path / "a.txt")
