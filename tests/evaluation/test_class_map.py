"""A head's classes stand for those of a dataset that the model was not trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from multitrain.config import ConfigError
from multitrain.evaluation.class_map import ClassMap, read_class_map

HEAD = ["run fast", "run, slowly", "jump", "sit"]
NAMES = ["running", "jumping", "2"]


def read(tmp_path: Path, text: str, head_names: list[str] | None = HEAD) -> ClassMap:
    file = tmp_path / "map.csv"
    file.write_text(text)
    return read_class_map(file, "kinetics", head_names, 4, "ucf", NAMES, 3)


def test_several_classes_of_the_head_stand_for_one_and_their_probabilities_add(tmp_path: Path) -> None:
    found = read(tmp_path, 'Head,Dataset\nrun fast,running\n"run, slowly",running\n\n 2 , jumping\n')
    assert found.targets.tolist() == [0, 0, 1, -1]
    scores = np.array([[0.25, 0.25, 0.375, 0.125]], np.float32)
    assert found.scores(scores).tolist() == [[0.5, 0.375, 0.0]]
    assert found.measured([(0,), (1,), (2,), (0, 2), ()]).tolist() == [True, True, False, False, False]
    assert found.describe(NAMES, 2) == {"measured": 2, "covered_classes": 2, "unmapped_classes": ["2"]}
    assert found.describe(None, 2)["unmapped_classes"] == ["2"]


def test_a_name_counts_before_a_number_and_tabs_separate_too(tmp_path: Path) -> None:
    assert read(tmp_path, "sit\t2\n").targets.tolist() == [-1, -1, -1, 2]
    assert read(tmp_path, "3,0\n", None).targets.tolist() == [-1, -1, -1, 0]


@pytest.mark.parametrize(
    ("text", "names", "said"),
    [
        ("run fat,running\n", HEAD, "map.csv:1: kinetics has no class 'run fat'; did you mean 'run fast'"),
        ("jump,jumping\njump,running\n", HEAD, "map.csv:2: class 'jump' of kinetics is mapped twice"),
        ("jump,flying\n", HEAD, "map.csv:1: ucf has no class 'flying'"),
        ("4,jumping\n", HEAD, "map.csv:1: kinetics has no class '4'"),
        ("jump,jumping\n", None, "its class names are not known here: use 0 to 3"),
        ("run, slowly,running\n", HEAD, "map.csv:1: 3 columns"),
        ("head,dataset\n", HEAD, "maps no class"),
        ("", HEAD, "maps no class"),
    ],
)
def test_a_wrong_map_is_refused_with_the_line_and_what_to_write(
    tmp_path: Path, text: str, names: list[str] | None, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text, names)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
