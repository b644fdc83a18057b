"""Annotation files: every line read right, every mistake named with file and line, nothing read twice."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multitrain.config import DatasetConfig, dump
from multitrain.data.annotations import CatalogError, Syntax, _parse_fast, _parse_slowly
from multitrain.data.catalog import Catalog, open_catalogs, resolve_classes, sources
from tests.data.numbered import run_config


def dataset(folder: Path, text: str | bytes | None, **fields: Any) -> DatasetConfig:
    """A dataset whose train.csv is `text` and whose videos are empty files, as far as the lines can be read."""
    annotations, videos = folder / "annotations", folder / "videos"
    annotations.mkdir(exist_ok=True)
    videos.mkdir(exist_ok=True)
    if text is not None:
        content = text.encode() if isinstance(text, str) else text
        (annotations / "train.csv").write_bytes(content)
        for line in content.decode("utf-8", "surrogateescape").lstrip("\ufeff").splitlines():
            path = videos / line.strip().rpartition(fields.get("separator", " "))[0].strip()
            if path != videos:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    return DatasetConfig(**{"annotations": str(annotations), "videos": str(videos), "classes": 10, **fields})


def opened(folder: Path, text: str | bytes | None, **fields: Any) -> Catalog:
    return Catalog.open(dataset(folder, text, **fields), "d", "train", folder / "index")


def error(folder: Path, text: str | bytes | None, **fields: Any) -> str:
    with pytest.raises(CatalogError) as caught:
        opened(folder, text, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def content(catalog: Catalog) -> list[tuple[str, tuple[int, ...]]]:
    return [(catalog.relative_path(i), catalog.labels(i)) for i in range(len(catalog))]


def test_paths_and_labels_are_those_of_the_lines(tmp_path: Path) -> None:
    catalog = opened(tmp_path, "a/b.mp4 3\nc.mp4 0\nd.mp4 9\n")
    assert content(catalog) == [("a/b.mp4", (3,)), ("c.mp4", (0,)), ("d.mp4", (9,))]
    assert catalog.path(0) == tmp_path / "videos/a/b.mp4"
    assert catalog.label_array().tolist() == [3, 0, 9]
    assert catalog.classes == 10
    with pytest.raises(IndexError):
        catalog.labels(3)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("a b.mp4 3\nc.mp4 0", {}),
        ("a b.mp4 3\r\nc.mp4 0\r\n", {}),
        ("\n a b.mp4   3 \n\nc.mp4 0\n\n", {}),
        ("\ufeffa b.mp4 3\nc.mp4 0\n", {}),
        ("a b.mp4\t3\nc.mp4\t0\n", {"separator": "\t"}),
        ("a b.mp4,3\nc.mp4,0\n", {"separator": ","}),
        ("a b.mp4 || 3\nc.mp4 || 0\n", {"separator": " || "}),
    ],
)
def test_blanks_line_ends_byte_order_marks_and_separators(tmp_path: Path, text: str, fields: dict[str, Any]) -> None:
    catalog = opened(tmp_path, text, **fields)
    assert content(catalog) == [("a b.mp4", (3,)), ("c.mp4", (0,))]
    assert catalog.digest == opened(tmp_path, "a b.mp4 3\nc.mp4 0\n").digest


def test_names_of_any_bytes_are_found(tmp_path: Path) -> None:
    catalog = opened(tmp_path, "ü/é 日本.mp4 1\n".encode() + b"\xff\xfe.mp4 2\n")
    assert catalog.path(0).exists()
    assert catalog.path(1).exists()


def test_several_labels_a_video(tmp_path: Path) -> None:
    catalog = opened(tmp_path, "a.mp4 3,1\nb.mp4 0\nc.mp4 2, 2\n", multi_label=True)
    assert [catalog.labels(i) for i in range(3)] == [(1, 3), (0,), (2,)]
    assert catalog.label_array()[0].tolist() == [i in (1, 3) for i in range(10)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text("ab /._é,0 9", min_size=1), st.integers(0, 99_999_999)), min_size=1),
    st.sampled_from(["\n", "\r\n"]), st.booleans(),
)  # fmt: skip
def test_the_fast_parser_agrees_with_the_careful_one(rows: list[tuple[str, int]], end: str, last: bool) -> None:
    text = end.join(f"{path} {label}" for path, label in rows) + (end if last else "")
    fast = _parse_fast(text.encode(), b" ")
    if fast is not None:
        slow = _parse_slowly(text.encode(), Path("x.csv"), Syntax(b" ", False))
        assert fast.paths(text.encode()) == slow.paths(text.encode())
        assert fast.labels.tolist() == slow.labels.tolist()


def test_ordinary_files_take_the_fast_parser() -> None:
    for text in (b"a/b c.mp4 10\nd.mp4 2\n", b"a/b c.mp4 10\r\nd.mp4 2\r\n", b"a/b c.mp4 10\nd.mp4 2"):
        assert _parse_fast(text, b" ") is not None


@pytest.mark.parametrize(
    ("text", "fields", "says"),
    [
        ("a.mp4 1\nb.mp4\n", {}, ["train.csv:2", "'b.mp4'", "correct the line"]),
        ("a.mp4 1\nb.mp4,2\n", {}, ["train.csv:2", "separator to ','"]),
        ("a.mp4\t1\n", {}, ["train.csv:1", "separator to '\\t'"]),
        ("a.mp4 1\n\nb.mp4 x\n", {}, ["train.csv:3", "'x'", "whole number"]),
        ("path label\na.mp4 1\n", {}, ["train.csv:1", "header"]),
        ("a.mp4 1\nb.mp4 -1\n", {}, ["train.csv:2", "'-1'"]),
        ("a.mp4 1.0\n", {}, ["train.csv:1", "'1.0'"]),
        ("a.mp4 1,2\n", {}, ["train.csv:1", "multi_label=true"]),
        ("a.mp4 1\n\nb.mp4 10\n", {}, ["train.csv:3", "label 10", "'b.mp4'", "classes=10", "0 to 9"]),
        ("a.mp4 1,12\n", {"multi_label": True}, ["train.csv:1", "label 12", "classes=10"]),
        ("a.mp4 1,,2\n", {"multi_label": True}, ["train.csv:1", "''"]),
        ("a.mp4 99999999999999999999\n", {}, ["train.csv:1", "whole number"]),
        ("", {}, ["train.csv", "no line"]),
        ("\n\n", {}, ["train.csv", "no line"]),
        ("a.mp4 1\nb.mp4 2\na.mp4 3\n", {}, ["train.csv:3", "label 3 here and 1 in line 1", "keep one"]),
        (None, {}, ["train.csv", "no such file", "data.datasets.d.annotations"]),
        ("a.mp4 1\n", {"annotations": "/nowhere"}, ["/nowhere", "no such folder", "data.datasets.d.annotations"]),
        ("a.mp4 1\n", {"videos": "/nowhere"}, ["/nowhere", "no such folder", "data.datasets.d.videos"]),
        ("a.mp4 1\n", {"class_names": "labels.txt"}, ["labels.txt", "no such file", "one name a line"]),
        ("a.mp4,1\n", {"separator": ",", "multi_label": True}, ["separator=','"]),
    ],
)
def test_mistakes_are_named_with_file_line_and_remedy(
    tmp_path: Path, text: str | None, fields: dict[str, Any], says: list[str]
) -> None:
    message = error(tmp_path, text, **fields)
    assert all(part in message for part in says), message


def test_the_wrong_video_folder_is_found_out_but_a_missing_video_is_not_an_error(tmp_path: Path) -> None:
    config = dataset(tmp_path, "a.mp4 1\nb.mp4 2\n")
    (tmp_path / "videos/a.mp4").unlink()
    assert len(Catalog.open(config, "d", "train", tmp_path / "index")) == 2
    (tmp_path / "videos/b.mp4").unlink()
    with pytest.raises(
        CatalogError, match=r"train\.csv:1: none of the first 2 videos exists, e\.g\. .*a\.mp4; set data"
    ):
        Catalog.open(config, "d", "train", tmp_path / "index")


def test_a_misnamed_csv_is_offered(tmp_path: Path) -> None:
    config = dataset(tmp_path, None)
    (tmp_path / "annotations/trian.csv").write_text("a.mp4 1\n")
    with pytest.raises(CatalogError, match=r"did you mean 'trian\.csv'"):
        Catalog.open(config, "d", "train", tmp_path / "index")


def test_repeated_lines_are_counted_and_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    catalog = opened(tmp_path, "a.mp4 1\nb.mp4 2\na.mp4 1\n")
    assert (len(catalog), catalog.duplicates) == (3, 1)
    assert "1 lines repeat" in caplog.text


def test_classes_come_from_the_number_or_the_names(tmp_path: Path) -> None:
    names = tmp_path / "annotations/names.txt"
    config = dataset(tmp_path, "a.mp4 1\n", classes=None, class_names="names.txt")
    names.write_text("arm wrestling\n  yoga \n\n")
    assert resolve_classes(config) == 2
    assert Catalog.open(config, "d", "train", tmp_path / "index").class_names == ["arm wrestling", "yoga"]
    with pytest.raises(CatalogError, match="2 class names but classes=5"):
        resolve_classes(config.model_copy(update={"classes": 5}))
    names.write_text("\n")
    with pytest.raises(CatalogError, match="no class name"):
        resolve_classes(config)


def test_classes_txt_names_classes_when_it_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = dataset(tmp_path, "a.mp4 1\n", classes=2)
    (tmp_path / "annotations/classes.txt").write_text("x\ny\n")
    assert Catalog.open(config, "d", "train", tmp_path / "index").class_names == ["x", "y"]
    (tmp_path / "annotations/classes.txt").write_text("x\ny\nz\n")
    assert Catalog.open(config, "d", "train", tmp_path / "index").class_names is None
    assert "3 names but classes=2" in caplog.text


def test_a_stride_keeps_every_nth_line(tmp_path: Path) -> None:
    config = dataset(tmp_path, "".join(f"v{i}.mp4 {i % 10}\n" for i in range(11)))
    catalog = Catalog.open(config, "d", "train", tmp_path / "index", stride=5)
    assert content(catalog) == [("v0.mp4", (0,)), ("v5.mp4", (5,)), ("v10.mp4", (0,))]
    assert catalog.label_array().tolist() == [0, 5, 0]
    assert catalog.digest != Catalog.open(config, "d", "train", tmp_path / "index").digest


def test_a_catalog_pickles_small_and_maps_again(tmp_path: Path) -> None:
    catalog = opened(tmp_path, "".join(f"v{i}.mp4 {i % 10}\n" for i in range(300)))
    packed = pickle.dumps(catalog)
    assert len(packed) < 1000
    assert content(pickle.loads(packed)) == content(catalog)


def settle(csv: Path) -> None:
    """Let a csv look as if it had been written a minute ago."""
    past = time.time_ns() - 60 * 10**9
    os.utime(csv, ns=(past, past))


def test_an_unchanged_csv_is_not_read_again(tmp_path: Path) -> None:
    config = dataset(tmp_path, "a.mp4 1\n")
    csv = tmp_path / "annotations/train.csv"
    settle(csv)
    first = Catalog.open(config, "d", "train", tmp_path / "index")
    before = csv.stat()
    csv.write_bytes(b"x" * before.st_size)  # unreadable, were it read
    os.utime(csv, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content(Catalog.open(config, "d", "train", tmp_path / "index")) == content(first)
    csv.write_text("a.mp4 2\n")
    assert Catalog.open(config, "d", "train", tmp_path / "index").labels(0) == (2,)


def test_a_csv_changed_within_one_tick_of_the_clock_is_read_again(tmp_path: Path) -> None:
    config = dataset(tmp_path, "a.mp4 1\n")
    csv = tmp_path / "annotations/train.csv"
    assert Catalog.open(config, "d", "train", tmp_path / "index").labels(0) == (1,)
    before = csv.stat()
    csv.write_text("a.mp4 2\n")
    os.utime(csv, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Catalog.open(config, "d", "train", tmp_path / "index").labels(0) == (2,)


def test_a_damaged_index_is_built_anew(tmp_path: Path) -> None:
    config = dataset(tmp_path, "a.mp4 1\nb.mp4 2\n")
    settle(tmp_path / "annotations/train.csv")
    first = Catalog.open(config, "d", "train", tmp_path / "index")
    (index,) = (tmp_path / "index").glob("*.index")
    for damage in (index.read_bytes()[:-1], b"", b"other"):
        index.write_bytes(damage)
        assert content(Catalog.open(config, "d", "train", tmp_path / "index")) == content(first)


def test_many_open_at_once(tmp_path: Path) -> None:
    config = dataset(tmp_path, "".join(f"v{i}.mp4 {i % 10}\n" for i in range(300)))
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(Catalog.open, config, "d", "train", tmp_path / "index") for _ in range(16)]
        assert len({f.result().digest for f in futures}) == 1
    assert not [p for p in (tmp_path / "index").iterdir() if p.name.startswith(".")]


def test_an_index_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    config = dataset(tmp_path, "a.mp4 1\n")
    (tmp_path / "file").touch()
    with pytest.raises(CatalogError, match=r"set data\.index"):
        Catalog.open(config, "d", "train", tmp_path / "file/index")


def test_sources_are_in_the_order_of_the_heads(videos: Path, tmp_path: Path) -> None:
    config = run_config(videos)
    catalogs = open_catalogs(config.data, "train", tmp_path)
    listed = sources(config.data, catalogs)
    assert [(s.name, s.size) for s in listed] == [("stride", 11), ("segment", 7), ("with.dot", 6)]
    assert [s.digest for s in listed] == [catalogs[s.name].digest for s in listed]


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "multitrain.data.catalog", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_prints_sources_and_imports_neither_torch_nor_opencv(videos: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump(run_config(videos, eval__every=1, eval__val_stride=5)))
    done = run_command(str(config), "--index", str(tmp_path / "index"), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [s["name"] for s in found["sources"]] == ["stride", "segment", "with.dot"]
    assert found["epoch_size"] == 24
    assert found["validation"] == {"stride": 3, "segment": 2, "with.dot": 2}
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not modules & {"torch", "cv2", "av", "decord"}
    table = run_command(str(config), "--index", str(tmp_path / "index")).stdout
    assert "stride: 11 videos of 5 classes" in table


def test_the_command_refuses_in_one_line(videos: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump(run_config(videos, data__datasets__stride__annotations=str(tmp_path / "nowhere"))))
    command = [sys.executable, "-m", "multitrain.data.catalog", str(config), "--index", str(tmp_path / "index")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "nowhere: no such folder of annotations" in done.stderr
