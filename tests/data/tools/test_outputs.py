"""What `data import`, `check --write-clean`, `stats`, `show`, `index` and the demo write never replaces anything foreign."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import settings, write_run

from multitrain.cli import main
from multitrain.data.annotations import CatalogError, Syntax
from multitrain.data.demo import generate
from multitrain.data.demo import main as demo
from multitrain.data.encode import write_video
from multitrain.data.index import ensure_index
from multitrain.data.tools.importing import read
from multitrain.errors import ConfigError
from tests.data.tools.test_nothing_destroyed import state


@pytest.fixture
def run(tiny_data: Path, tmp_path: Path) -> Path:
    """A run's folder; the annotations may be written to."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    return write_run(tmp_path / "runs", settings(data))[0]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file passes, without workers."""

    from multitrain.data.tools import parallel_map

    def map_resumable(
        items: Iterable[Any], work: parallel_map.Work, **_: object
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        for item in items:
            yield item, {"frames": 12, "decoded": 12, "fps": 30.0, "width": 8, "height": 8, "digest": str(item)}

    monkeypatch.setattr(parallel_map, "map_resumable", map_resumable)


def test_clean_annotations_never_replace_the_annotations_or_anything_foreign(
    run: Path, tmp_path: Path, checked: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine" / "stride").mkdir(parents=True)
    (tmp_path / "mine" / "stride" / "val.csv").write_text("precious")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "stride").symlink_to(tmp_path / "data" / "stride")
    (tmp_path / "whole").symlink_to(tmp_path / "data")
    before = state(tmp_path)
    for folder in ("data", "mine", "linked", "whole"):
        arguments = ["data", "check", "--run", str(run), "--out", str(tmp_path / "c"), "--write-clean"]
        assert main([*arguments, str(tmp_path / folder)]) == 2
        assert f"{tmp_path}" in capsys.readouterr().err
    assert {p: s for p, s in state(tmp_path).items() if f"{tmp_path}/c" not in p} == before
    for _ in range(2):
        assert main([*arguments, str(tmp_path / "clean")]) == 1
    assert (tmp_path / "clean" / "stride" / "train.csv").is_file()


def test_the_table_of_an_earlier_version_is_replaced_and_a_foreign_one_is_not(
    run: Path, tmp_path: Path, checked: None
) -> None:
    out = tmp_path / "c"
    out.mkdir()
    arguments = ["data", "check", "--run", str(run), "--out", str(out)]
    (out / "check.csv").write_text("my own list\n")
    assert main(arguments) == 2
    assert (out / "check.csv").read_text() == "my own list\n"
    (out / "check.csv").write_text("dataset,split,annotations,line,path,labels,kind,detail\n")
    assert main(arguments) == 1
    assert "leak" in (out / "check.csv").read_text()


@pytest.mark.parametrize("what", ["link", "foreign", "folder"])
def test_a_journal_is_appended_to_only_if_it_is_one(run: Path, tmp_path: Path, checked: None, what: str) -> None:
    out, precious = tmp_path / "c", tmp_path / "precious"
    out.mkdir()
    precious.write_text("no newline at the end")
    journal = out / "check-0-of-1.jsonl"
    if what == "link":
        journal.symlink_to(precious)
    elif what == "folder":
        journal.mkdir()
    else:
        shutil.copy(precious, journal)
    before = state(tmp_path)
    assert main(["data", "check", "--run", str(run), "--out", str(out)]) == 2
    assert state(tmp_path) == before


@pytest.mark.parametrize("verb", [["stats", "--sample", "2", "--plot"], ["show", "--videos", "2", "--out"]])
def test_a_picture_replaces_only_one_of_the_same_command(
    run: Path, tmp_path: Path, verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "precious.png"
    precious.write_text("precious")
    (tmp_path / "link.png").symlink_to(precious)
    (tmp_path / "folder.png").mkdir()
    command = ["data", verb[0], "--run", str(run), *verb[1:]]
    for name in ("precious.png", "link.png", "folder.png"):
        assert main([*command, str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err
    assert precious.read_text() == "precious"
    for _ in range(2):
        assert main([*command, str(tmp_path / "new.png")]) == 0
    assert (tmp_path / "new.png").read_bytes().startswith(b"\x89PNG")


def test_import_replaces_its_own_files_only(tmp_path: Path) -> None:
    header = "label,youtube_id,time_start,time_end,split\n"
    source = tmp_path / "train.csv"
    source.write_text(header + "riding,abc,3,13,train\n")
    before = source.read_bytes()
    assert main(["data", "import", "kinetics", str(source), "--out", str(tmp_path)]) == 2, "beside its source"
    out = tmp_path / "out"
    for _ in range(2):
        assert main(["data", "import", "kinetics", str(source), "--out", str(out)]) == 0
    for record in out.glob(".multitrain-files*"):
        record.unlink()
    assert main(["data", "import", "kinetics", str(source), "--out", str(out)]) == 0, "the same files may stay"
    source.write_text(header + "riding,abc,3,13,train\nriding,abd,3,13,train\n")
    assert main(["data", "import", "kinetics", str(source), "--out", str(out)]) == 2
    assert (out / "train.csv").read_text() == "abc_000003_000013.mp4 0\n"
    source.write_bytes(before)


HOSTILE = ("/../../x", "../../x", "a\nb", "a\x1b[31m", "a\0b", "/etc/x", "\u202ex")


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_of_an_official_file_leads_out(tmp_path: Path, name: str) -> None:
    anet = tmp_path / "activity_net.json"
    video = {"subset": "training", "annotations": [{"label": "a", "segment": [0, 9]}]}
    anet.write_text(json.dumps({"database": {name: video, "b": {**video, "subset": "validation"}}}))
    labels, some = tmp_path / "labels.json", tmp_path / "something-train.json"
    labels.write_text(json.dumps({"x": "0"}))
    some.write_text(json.dumps([{"id": name, "template": "x"}]))
    for form, file, classes in (("activitynet", anet, None), ("something", some, labels)):
        if form == "activitynet" and name == "/etc/x":
            continue  # v_/etc/x stays inside
        with pytest.raises(CatalogError, match=file.name) as told:
            read(form, [file], classes)
        assert "\n" not in str(told.value)
        assert "\x1b" not in str(told.value)


def test_the_demo_replaces_nothing_foreign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"motions": {"train": 2}}
    place = tmp_path / "motions" / "videos" / "train"
    place.mkdir(parents=True)
    (place / "00001.mp4").write_text("precious")
    with pytest.raises(ConfigError, match=r"00001\.mp4 is in the way"):
        generate(tmp_path, clips=few, processes=1)
    assert (place / "00001.mp4").read_text() == "precious"
    (place / "00001.mp4").unlink()
    assert generate(tmp_path, clips=few, processes=1)
    assert generate(tmp_path, clips=few, seed=1, processes=1), "its own it does"
    (tmp_path / "demo.json").write_text('{"mine": 1}')
    assert demo(["--out", str(tmp_path), "--fraction", "0.01", "--processes", "1"]) == 2
    assert "demo.json is in the way" in capsys.readouterr().err
    assert (tmp_path / "demo.json").read_text() == '{"mine": 1}'


def test_an_index_replaces_no_link(tmp_path: Path) -> None:
    csv = tmp_path / "train.csv"
    csv.write_text("a.mp4 0\n")
    folder = tmp_path / "index"
    made = ensure_index(csv, Syntax(b" ", False), folder)
    (tmp_path / "precious").write_text("precious")
    made.unlink()
    made.symlink_to(tmp_path / "precious")
    with pytest.raises(CatalogError, match=made.name):
        ensure_index(csv, Syntax(b" ", False), folder)
    assert (tmp_path / "precious").read_text() == "precious"
    made.unlink()
    made.write_bytes(b"torn")
    os.utime(csv, ns=(1, 1))
    assert ensure_index(csv, Syntax(b" ", False), folder).stat().st_size > 4


def test_a_video_replaces_only_one_of_the_same_command(tmp_path: Path) -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    source = tmp_path / "source.mp4"

    def write(path: Path, *sources: Path) -> None:
        with write_video(path, 30.0, sources) as writer:
            writer.add(picture, 0.0)

    for _ in range(2):
        write(source)
    (tmp_path / "link.mp4").symlink_to(source)
    (tmp_path / "precious.mp4").write_text("precious")
    before = state(tmp_path)
    for path in ("link.mp4", "precious.mp4", "source.mp4"):
        with pytest.raises(ConfigError, match=path):
            write(tmp_path / path, source)
    assert state(tmp_path) == before
