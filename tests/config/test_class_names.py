"""Class names are read in every format that the datasets' authors and PySlowFast use."""

from __future__ import annotations

from pathlib import Path

import pytest

from multitrain.config import ConfigError
from multitrain.config.class_names import find_class_names, read_class_names

NAMES = ["abseiling", "air drumming", "pushing, slowly"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "abseiling\nair drumming\npushing, slowly\n"),
        ("moments_categories.txt", "air drumming,1\nabseiling,0\npushing, slowly,2\n"),
        ("kinetics_classnames.json", '{"\\"air drumming\\"": 1, "abseiling": 0, "pushing, slowly": 2}'),
        ("labels.json", '{"air drumming": "1", "abseiling": "0", "pushing, slowly": "2"}'),
        ("class_names.json", '{"1": "air drumming", "0": "abseiling", "2": "pushing, slowly"}'),
        ("classnames.json", '["abseiling", "air drumming", "pushing, slowly"]'),
    ],
)
def test_names_are_found_in_the_annotation_folder(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_class_names(tmp_path / name) == NAMES
    assert find_class_names(tmp_path, 3) == NAMES
    assert find_class_names(tmp_path, 4) is None


def test_names_that_end_in_a_number_stay_whole(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("class 1\nclass 0\n")
    assert read_class_names(tmp_path / "classes.txt") == ["class 1", "class 0"]


def test_what_names_nothing_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"a": 5}')
    with pytest.raises(ConfigError, match=r"labels\.json: neither a list"):
        read_class_names(tmp_path / "labels.json")
    assert find_class_names(tmp_path, 1) is None
