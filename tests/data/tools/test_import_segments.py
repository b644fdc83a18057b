"""`data import` writes the segments of long videos as lines, ready to train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from multitrain.cli import main
from multitrain.config import DatasetConfig
from multitrain.data.annotations import CatalogError
from multitrain.data.catalog import Catalog
from multitrain.data.decode import open_video
from multitrain.data.tools.importing import read
from tests.data.numbered import number_of, write_numbered

VERBS = "id,key,instances,category\n0,take,[],x\n1,put,[],x\n"
EPIC = "narration_id,video_id,start_timestamp,stop_timestamp,verb_class,noun_class\n"


def put(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_epic_segments_are_found_and_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verbs = put(tmp_path / "EPIC_100_verb_classes.csv", VERBS)
    rows = "a,P01_101,00:00:00.50,00:00:01.5,1,0\nb,P01_101,00:00:01.00,00:00:01.05,0,0\nc,P02_1,00:01:01.20,00:01:03,0,1\n"
    train = put(tmp_path / "EPIC_100_train.csv", EPIC + rows)
    val = put(tmp_path / "EPIC_100_validation.csv", EPIC + "d,P01_101,00:00:00.00,00:00:00.40,0,0\n")
    write_numbered(tmp_path / "v" / "P01" / "videos" / "P01_101.mp4", 60)
    (tmp_path / "v" / "P01" / "videos" / "P01_101.mp4").rename(tmp_path / "v" / "P01" / "videos" / "P01_101.MP4")
    out = tmp_path / "out"
    command = ["data", "import", "epic", str(train), str(val), "--classes", str(verbs), "--out", str(out)]
    assert main([*command, "--videos", str(tmp_path / "v")]) == 0
    said = capsys.readouterr()
    assert "segments: true" in (out / "data/out.yaml").read_text()
    assert "1 of the listed videos are not below" in said.err
    assert "1 segments shorter than 0.1 s left out" in said.err
    assert (out / "train.csv").read_text() == "P01/videos/P01_101.MP4 0.5 1.5 1\nP02_1.MP4 61.2 63 0\n"
    assert (out / "classes.txt").read_text() == "take\nput\n"
    dataset = DatasetConfig(annotations=str(out), videos=str(tmp_path / "v"), classes=2, segments=True)
    catalog = Catalog.open(dataset, "epic", "val", tmp_path / "index")
    with open_video(catalog.path(0)) as video:
        assert [number_of(f) for f in video.frames([0, video.frame_count - 1])] == [0, 11]
    with pytest.raises(CatalogError, match="verbs and nouns"):
        read("epic", [train])
    with pytest.raises(CatalogError, match=r"train.csv:2: '1 s' is no time"):
        read("epic", [put(train, EPIC + "a,P01_101,1 s,00:00:01.5,1,0\n")], verbs)


def test_charades_has_a_line_an_action(tmp_path: Path) -> None:
    classes = put(tmp_path / "Charades_v1_classes.txt", "c000 Holding some clothes\nc001 Putting\n")
    rows = "id,actions,length\nAB,c001 11.90 21.20;c000 0.00 99.00,30.5\nCD,,12\n"
    found = read("charades", [put(tmp_path / "Charades_v1_test.csv", rows)], classes)
    assert [(s.split, s.segment, s.labels) for s in found.samples] == [
        ("val", ("AB.mp4", 11.9, 21.2), ("Putting",)),
        ("val", ("AB.mp4", 0.0, 30.5), ("Holding some clothes",)),
    ]
    assert found.notes == ["1 videos without an action left out"]


def test_diving48_has_complete_videos(tmp_path: Path) -> None:
    entries = [{"vid_name": "x_1", "label": 1, "start_frame": 0, "end_frame": 90}]
    file = put(tmp_path / "Diving48_V2_train.json", entries)
    vocabulary = put(tmp_path / "Diving48_vocab.json", [["Back", "15som"], ["Front", "PIKE"]])
    (sample,) = read("diving48", [file], vocabulary).samples
    assert (sample.path, sample.labels, sample.segment) == ("x_1.mp4", ("Front PIKE",), None)
    with pytest.raises(CatalogError, match="label 7 of x_1"):
        read("diving48", [put(file, [entries[0] | {"label": 7}])], vocabulary)
