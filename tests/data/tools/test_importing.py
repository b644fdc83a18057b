"""Official annotation files become `path label` lines; labels are numbered as the dataset numbers them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from multitrain.cli import main
from multitrain.data.annotations import CatalogError
from multitrain.data.tools.importing import find, read, write


def put(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def imported(
    form: str, files: list[Path], out: Path, classes: Path | None = None, *, cut: bool = False
) -> dict[str, list[str]]:
    found = read(form, files, classes)
    found.cut = cut
    write(found, out)
    return {f.stem: f.read_text().splitlines() for f in out.iterdir()}


def test_kinetics(tmp_path: Path) -> None:
    header = "label,youtube_id,time_start,time_end,split\n"
    train = put(tmp_path / "train.csv", header + '"riding, a bike",abc,3,13,train\nabseiling,-x_,0,10,train\n')
    val = put(tmp_path / "validate.csv", header + "abseiling,def,107,117,validate\n")
    got = imported("kinetics", [train, val], tmp_path / "out")
    assert got["classes"] == ["abseiling", "riding, a bike"]
    assert got["train"] == ["abc_000003_000013.mp4 1", "-x__000000_000010.mp4 0"]
    assert got["val"] == got["test"] == ["def_000107_000117.mp4 0"], "without test labels the test is on val"


def test_moments_in_time_numbers_classes_by_its_own_list(tmp_path: Path) -> None:
    train = put(
        tmp_path / "trainingSet.csv", "flipping/a.mp4,flipping,3,0\nadult+male+singing/b.mp4,adult+male+singing,2,1\n"
    )
    val = put(tmp_path / "validationSet.csv", "flipping/c.mp4,flipping,5,0\n")
    names = put(tmp_path / "moments_categories.txt", "flipping,1\nadult+male+singing,0\n")
    got = imported("moments", [train, val], tmp_path / "out", names)
    assert got["classes"] == ["adult+male+singing", "flipping"]
    assert got["train"] == ["flipping/a.mp4 1", "adult+male+singing/b.mp4 0"]
    assert got["val"] == ["flipping/c.mp4 1"]


def test_multi_moments_has_several_labels_by_number_or_name(tmp_path: Path) -> None:
    names = put(tmp_path / "moments_categories.txt", "run,0\njump,1\nclap,2\n")
    numbered = put(tmp_path / "trainingSet.csv", "a.mp4,2,0\nb.mp4,1\n")
    named = put(tmp_path / "validationSet.csv", "c.mp4,1,2\n")
    got = imported("multi-moments", [numbered, named], tmp_path / "out", names)
    assert got["train"] == ["a.mp4 0,2", "b.mp4 1"]
    assert got["val"] == ["c.mp4 1,2"]
    with pytest.raises(CatalogError, match="--classes"):
        read("multi-moments", [numbered])


def test_something_something_follows_the_label_map_and_the_answers(tmp_path: Path) -> None:
    labels = put(tmp_path / "labels.json", {"Pushing something": "1", "Holding something next to something": "0"})
    train = put(
        tmp_path / "something-something-v2-train.json",
        [{"id": "7", "label": "x", "template": "Holding [something] next to [something]"}],
    )
    test = put(tmp_path / "test.json", [{"id": "8"}, {"id": "9"}])
    answers = put(tmp_path / "test-answers.csv", "8;Pushing something\n")
    got = imported("something", [train, test, answers], tmp_path / "out", labels)
    assert got["train"] == ["7.webm 0"]
    assert got["test"] == ["8.webm 1"]
    wrong = put(tmp_path / "validation.json", [{"id": "1", "template": "Pushng something"}])
    with pytest.raises(CatalogError, match="did you mean 'Pushing something'"):
        read("something", [wrong], labels)


def test_activitynet_lists_segments_or_copies_to_cut(tmp_path: Path) -> None:
    file = put(
        tmp_path / "activity_net.v1-3.min.json",
        {
            "database": {
                "X1": {"subset": "training", "duration": 20.0, "annotations": [{"label": "b", "segment": [1.5, 25.0]}]},
                "X2": {"subset": "validation", "annotations": [{"label": "a", "segment": [0.0, 3.25]}]},
                "X3": {"subset": "testing", "annotations": []},
            }
        },
    )
    assert imported("activitynet", [file], tmp_path / "parts")["train"] == ["v_X1.mp4 1.5 20 1"]
    assert not (tmp_path / "parts" / "segments.csv").exists()
    got = imported("activitynet", [file], tmp_path / "out", cut=True)
    assert got["train"] == ["v_X1/0000150_0002000.mp4 1"]
    assert got["segments"][1:] == [
        "v_X1.mp4,1.500,20.000,v_X1/0000150_0002000.mp4",
        "v_X2.mp4,0.000,3.250,v_X2/0000000_0000325.mp4",
    ]


@pytest.mark.parametrize(
    "tree", ["abc_000003_000013.mp4", "train/abc_000003_000013.mkv", "train/riding_bike/abc_000003_000013.mp4"]
)
def test_videos_are_found_whatever_the_layout(tmp_path: Path, tree: str) -> None:
    file = put(tmp_path / "train.csv", "label,youtube_id,time_start,time_end,split\nriding bike,abc,3,13,train\n")
    (tmp_path / "v" / tree).parent.mkdir(parents=True)
    (tmp_path / "v" / tree).touch()
    samples, missing = find(read("kinetics", [file]).samples, tmp_path / "v")
    assert (samples[0].path, missing) == (tree, 0)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.csv", "a,b\n1,2\n", "no column 'youtube_id'"),
        ("train.csv", "label,youtube_id,time_start,time_end,split\nx,y,1\n", "train.csv:2: 3 columns, not 5"),
        ("train.csv", "label,youtube_id,time_start,time_end,split\nx,y,1,2,nowhere\n", "'nowhere' is no split"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = put(tmp_path / name, content)
    assert main(["data", "import", "kinetics", str(file), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
