"""Annotation files as people write them: read right, or refused in one line with file, line and the remedy that fits."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import logging
import lzma
import os
import re
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from multitrain.config import ConfigError, DatasetConfig, dump
from multitrain.config.class_names import read_class_names
from multitrain.data import catalog as catalogs
from multitrain.data.annotations import (
    MAX_PATH_BYTES,
    CatalogError,
    Syntax,
    lines,
    normalise_path,
    parse,
    read_annotations,
)
from multitrain.data.catalog import Catalog, summary
from multitrain.data.index import ensure_index
from multitrain.data.tools.check import list_entries
from multitrain.data.tools.listing import AnnotationFiles, Layout, segments
from multitrain.records import jsonl as jsonl
from tests.data.numbered import run_config

PLAIN = Syntax(b" ", False)
NAME = Path("train.csv")


def read(content: bytes, syntax: Syntax = PLAIN) -> list[tuple[str, int]]:
    found = parse(content, NAME, syntax)
    paths = [os.fsdecode(p) for p in found.paths(content)]
    careful = [(os.fsdecode(line.path), line.labels[0]) for line in lines(content, NAME, syntax)]
    assert list(zip(paths, found.labels.tolist())) == careful, "data check and training read the same"
    return careful


def refused(content: bytes, syntax: Syntax = PLAIN) -> str:
    began = time.monotonic()
    messages = []
    for way in (lambda: parse(content, NAME, syntax), lambda: list(lines(content, NAME, syntax))):
        with pytest.raises(CatalogError) as caught:
            way()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert len(messages[0]) < 500
    assert time.monotonic() - began < 60
    return messages[0]


@pytest.mark.parametrize(
    ("content", "syntax", "expected"),
    [
        (b'"a b.mp4" 3\n"c.mp4" 0\n', PLAIN, [("a b.mp4", 3), ("c.mp4", 0)]),
        (b'a.mp4 1\n"a b.mp4" 3\n', PLAIN, [("a.mp4", 1), ("a b.mp4", 3)]),
        (b'"comma, and (paren).mp4" 1\r\n', PLAIN, [("comma, and (paren).mp4", 1)]),
        (b'"a b.mp4","3"\n', Syntax(b",", False), [("a b.mp4", 3)]),
        (b'\xef\xbb\xbf"a b.mp4" 3\n', PLAIN, [("a b.mp4", 3)]),
        (b'say "hi".mp4 3\n', PLAIN, [('say "hi".mp4', 3)]),
        (b'"half.mp4 3\n', PLAIN, [('"half.mp4', 3)]),
        (b"caf\xe9.mp4 1\n", PLAIN, [(os.fsdecode(b"caf\xe9.mp4"), 1)]),
        (b"a.mp4 000000000000000000003\n", PLAIN, [("a.mp4", 3)]),
    ],
)
def test_lines_of_other_tools_are_read(content: bytes, syntax: Syntax, expected: list[tuple[str, int]]) -> None:
    assert read(content, syntax) == expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a.mp4 1\nb\0.mp4 2\n", "train.csv:2: a NUL byte"),
        ("a.mp4 1\nb.mp4 2\n".encode("utf-16"), "train.csv: is UTF-16, not UTF-8; save it as UTF-8"),
        ("a.mp4 1\nb.mp4 2\n".encode("utf-16-le"), "is UTF-16"),
        ("a.mp4 1\nb.mp4 2\n".encode("utf-16-be"), "is UTF-16"),
        (b"a.mp4 1\n" + b"x" * (MAX_PATH_BYTES + 1) + b" 2\n", f"train.csv:2: a path of {MAX_PATH_BYTES + 1} bytes"),
        (b"a.mp4 1\n\n" + b"x " * 100_000 + b"\n", "train.csv:3: a line of more than 65,536 bytes"),
        (b"a.mp4 " + b"9" * 5000 + b"\n", "is no whole number up to 1,000,000,000"),
        ("a.mp4 ²\n".encode(), "train.csv:1: label '²' is no whole number"),
        (b"a.mp4 1\rb.mp4 2\r", "carriage return alone"),
        (b"a.mp4 1\r\nb.mp4 2\r", "carriage return alone"),
        (b'"a ""b"".mp4" 3\n', 'train.csv:1: \'"a ""b"".mp4"\' is quoted and has quotation marks within'),
    ],
)
def test_what_cannot_be_meant_is_one_line(content: bytes, says: str) -> None:
    assert says in refused(content)


def test_existing_files_keep_their_fingerprint(tmp_path: Path) -> None:
    content = b"a/b c.mp4 10\nd.mp4 2\nx//y.mp4 3\n./z.mp4 4\n"
    catalog = opened(tmp_path, content)
    paths, labels = [b"a/b c.mp4", b"d.mp4", b"x//y.mp4", b"./z.mp4"], [10, 2, 3, 4]
    assert [catalog.relative_path(i).encode() for i in range(4)] == paths
    expected = hashlib.blake2b(b"1:4:", digest_size=16)
    expected.update(b"\n".join(paths) + b"".join(n.to_bytes(4, "little") for n in labels))
    assert catalog.digest == expected.hexdigest()


def opened(folder: Path, content: bytes, present: bool = True, **fields: object) -> Catalog:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "videos").mkdir(exist_ok=True)
    (folder / "annotations/train.csv").write_bytes(content)
    if present:
        for line in lines(content, NAME, PLAIN):
            file = folder / "videos" / os.fsdecode(normalise_path(line.path))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            if b"/../" in line.path:
                (folder / "videos" / os.fsdecode(line.path.split(b"/../")[0])).mkdir(parents=True, exist_ok=True)
    entry = {"annotations": f"{folder}/annotations", "videos": f"{folder}/videos", "classes": 1000, **fields}
    return Catalog.open(DatasetConfig.model_validate(entry), "d", "train", folder / "index")


@pytest.mark.parametrize("other", [b"x//a.mp4", b"./x/a.mp4", b"x/./a.mp4", b"x/y/../a.mp4", b"y/../x//./a.mp4"])
def test_one_video_under_two_spellings_is_one(tmp_path: Path, other: bytes, caplog: pytest.LogCaptureFixture) -> None:
    catalog = opened(tmp_path, b"x/a.mp4 1\n" + other + b" 1\n")
    assert catalog.duplicates == 1
    assert "1 lines repeat an earlier line" in caplog.text
    with pytest.raises(
        CatalogError, match=r"train\.csv:2: .* has label 2 here and 1 in line 1 \(as 'x/a\.mp4', the same video\)"
    ):
        opened(tmp_path, b"x/a.mp4 1\n" + other + b" 2\n")


@pytest.mark.parametrize(
    "other", ["{videos}/x/a.mp4", "../videos/x/a.mp4", "{real}/x/a.mp4", "{videos}/../videos//x/a.mp4"]
)
def test_one_video_spelled_from_elsewhere_is_one(tmp_path: Path, other: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "videos").symlink_to("real")
    spelled = other.format(videos=tmp_path / "videos", real=tmp_path / "real").encode()
    fields = {"present": False}
    (tmp_path / "real/x").mkdir()
    (tmp_path / "real/x/a.mp4").touch()
    catalog = opened(tmp_path, b"x/a.mp4 1\n" + spelled + b" 1\n", **fields)
    assert catalog.duplicates == 1
    assert catalog.relative_path(1).encode() == spelled
    for _ in range(2):
        with pytest.raises(
            CatalogError, match=r"train\.csv:2: .* has label 2 here and 1 in line 1 \(as 'x/a\.mp4', the same"
        ):
            opened(tmp_path, b"x/a.mp4 1\n" + spelled + b" 2\n", **fields)
    (tmp_path / "other/x").mkdir(parents=True)
    (tmp_path / "other/x/a.mp4").touch()
    content = b"x/a.mp4 1\n" + f"{tmp_path}/real/x/a.mp4".encode() + b" 2\n"
    assert opened(tmp_path, content, **fields, videos=f"{tmp_path}/other").duplicates == 0, "two videos, from there"


def test_a_name_of_two_classes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "names.txt").write_text("alpha\nbeta\nalpha\n")
    opened(tmp_path, b"a.mp4 1\n", classes=3, class_names=str(tmp_path / "names.txt"))
    assert "'alpha' is the name of labels 0 and 2, so results do not tell them apart" in caplog.text


def test_labels_from_one_get_their_own_remedy(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="numbered from 1: subtract 1 from each"):
        opened(tmp_path, b"a.mp4 1\nb.mp4 2\n", classes=2)


def test_rows_with_a_count_of_frames_are_named(tmp_path: Path) -> None:
    (tmp_path / "videos/v0").mkdir(parents=True)
    with pytest.raises(CatalogError, match=r"train\.csv:1: .*: lines are 'path frames label', as .*v0 says"):
        opened(tmp_path, b"v0 120 3\nv0 80 2\n", present=False)
    with pytest.raises(CatalogError, match=r"train\.csv:1: .*v0 is a folder; pictures of frames are not read"):
        opened(tmp_path, b"v0 3\nv0 3\n", present=False)


def test_over_long_and_other_impossible_names_are_missing_videos(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="the video does not exist"):
        opened(tmp_path, b"x" * 300 + b" 1\n", present=False)


def some(folder: Path, missing: int, count: int = 26, first: int = 6) -> Catalog:
    """A csv of `count` videos of which `missing` from the `first` on are not there."""
    catalog = opened(folder, b"".join(b"v%d.mp4 0\n" % i for i in range(count)))
    for i in range(first, first + missing):
        (folder / f"videos/v{i}.mp4").unlink()
    return catalog


def test_missing_videos_are_found_wherever_they_stand(tmp_path: Path) -> None:
    catalog = some(tmp_path, missing=20)
    with pytest.raises(CatalogError) as caught:
        catalog.refuse_missing(0.01)
    message = str(caught.value)
    assert "train.csv:7: 20 of the 26 videos looked at (77 %) are missing, e.g. " in message
    assert "v6.mp4" in message
    assert "data.skip_cap=0.01" in message
    assert "--write-clean" in message


def test_as_many_as_training_lets_pass_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    catalog = some(tmp_path, missing=1)
    with caplog.at_level(logging.WARNING):
        catalog.refuse_missing(0.01)
    assert "1 of the 26 videos looked at (4 %) are missing" in caplog.text
    with pytest.raises(CatalogError, match=r"data\.skip_cap=0 lets"):
        catalog.refuse_missing(0)
    some(tmp_path, missing=20).refuse_missing(1.0)


def test_a_few_hundred_are_looked_at_spread_over_the_file(tmp_path: Path) -> None:
    catalog = some(tmp_path, missing=300, count=3000, first=2700)
    found = catalog.look()
    assert (found.videos, found.looked, found.missing) == (3000, 300, 30)
    with pytest.raises(CatalogError, match=r"30 of the 300 videos looked at \(10 %\)"):
        catalog.refuse_missing(0.01)


def test_a_slow_disk_ends_the_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = some(tmp_path, missing=0, count=100)
    monkeypatch.setattr(catalogs, "absent", lambda path: time.sleep(0.02))
    found = catalog.look(seconds=0.01)
    assert 4 <= found.looked < 100
    assert found.missing == 0


def test_the_check_of_a_submission_looks(videos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(videos, data)
    config = run_config(data, eval__every=1)
    assert summary(config, tmp_path / "index")["epoch_size"] == 24
    for file in sorted(Path(config.data.datasets["segment"].videos).rglob("*.mp4"))[1:]:
        file.unlink()
    (tmp_path / "config.yaml").write_text(dump(config))
    assert catalogs.main([str(tmp_path / "config.yaml"), "--index", str(tmp_path / "index")]) == 2


def test_names_of_any_bytes_are_lines_of_the_logs() -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    assert jsonl.decode(jsonl.encode({"path": name})) == {"path": name}
    assert jsonl.encode({"path": "ü"}) == '{"path": "ü"}\n'.encode()


SHARED = [
    ("pandas_quoted_some.csv", "comma, and (paren).mp4"),
    ("latin1.csv", os.fsdecode(b"caf\xe9.mp4")),
]


@pytest.mark.parametrize(("name", "last"), SHARED)
def test_shared_files_are_read(shared: Path, name: str, last: str) -> None:
    assert read((shared / "bugs" / name).read_bytes())[-1][0] == last


# ------------------------------------------------------------------------------------------ what is no list at all

READERS: dict[str, Callable[[Path], object]] = {
    "training": lambda csv: ensure_index(csv, PLAIN, csv.parent / "index"),
    "data check": lambda csv: list_entries({"d": entry(csv.parent)}),
    "data resize": lambda csv: AnnotationFiles(csv.parent),
    "segments": lambda csv: segments(Layout(csv.parent, csv.parent / "out"), csv),
}


def entry(folder: Path) -> DatasetConfig:
    return DatasetConfig.model_validate({"annotations": str(folder), "videos": str(folder), "classes": 9})


def refused_by_all(csv: Path) -> str:
    """What every reader of lists says of a file, in one line and in little memory."""
    said = set()
    for name, read in READERS.items():
        tracemalloc.start()
        try:
            with pytest.raises(CatalogError) as caught:
                read(csv)
            assert tracemalloc.get_traced_memory()[1] < 12 << 20, name
        finally:
            tracemalloc.stop()
        said.add(str(caught.value))
    (message,) = said
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ("first", "repeated", "size", "says"),
    [
        (b"", b"x" * (1 << 20), 0, ":1: a line of more than 65,536 bytes"),
        (b"a.mp4 1\n", b"x" * (1 << 20), 0, ":2: a line of more than 65,536 bytes"),
        (b"", b"a.mp4 1\r" * (1 << 17), 0, ":1: lines that end with a carriage return alone"),
        (b"a.mp4 1\n", b"", 50 << 30, ": larger than the 1024 MB"),
        (b"", b"", 1 << 28, ": bytes, not text"),
        (b"a.mp4 1\n" * 20, b"", 1 << 28, ": bytes, not text"),
    ],
)
def test_a_file_that_no_list_can_be_is_refused_unread(
    tmp_path: Path, first: bytes, repeated: bytes, size: int, says: str
) -> None:
    csv = tmp_path / "train.csv"
    with csv.open("wb") as out:
        out.write(first)
        for _ in range(32):
            out.write(repeated)
        out.truncate(max(size, out.tell()))
    assert f"{csv}{says}" in refused_by_all(csv)


def test_more_lines_than_any_list_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv = tmp_path / "train.csv"
    csv.write_bytes(b"a 1\n" * 1000 + b"b 2")
    assert read_annotations(csv).count(b"\n") == 1000
    monkeypatch.setattr("multitrain.data.annotations.MAX_LINES", 900)
    assert "more than 900 lines" in refused_by_all(csv)


def test_lines_across_blocks_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multitrain.data.annotations.MAX_LINE_BYTES", 20)
    csv = tmp_path / "train.csv"
    for block in range(1, 40):
        monkeypatch.setattr("multitrain.config.reading.BLOCK", block)
        for content in (b"", b"a 1\r\n" * 9, b"x" * 20 + b"\n" + b"y" * 20, b"\n" * 30 + b"x" * 20 + b"\n\n"):
            csv.write_bytes(content)
            assert read_annotations(csv) == content
        for content in (b"x" * 21, b"a 1\n" * 9 + b"x" * 21 + b"\nb 1", b"x" * 20 + b"\n" + b"y" * 90):
            csv.write_bytes(content)
            line = content[: content.find(b"x" * 21) if b"x" * 21 in content else content.find(b"y")].count(b"\n") + 1
            with pytest.raises(CatalogError, match=rf"train\.csv:{line}: a line of more than 20 bytes"):
                read_annotations(csv)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(b"a.mp4 1\n" * 99), "compressed by gzip, not the text itself; unpack it"),
        (b"PK\3\4\x14\0\6\0" + bytes(range(256)), "a zip archive or a spreadsheet"),
        (lzma.compress(b"a.mp4 1\n"), "compressed by xz"),
        (bz2.compress(b"a.mp4 1\n"), "compressed by bzip2"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>\n<html>404</html>\n", "a web page"),
    ],
    ids=["gzip", "zip", "xz", "bzip2", "lfs", "html"],
)
def test_files_of_other_formats_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    csv = tmp_path / "train.csv"
    csv.write_bytes(content)
    assert says in refused_by_all(csv)
    with pytest.raises(ConfigError, match=says):
        read_class_names(csv)


def test_what_is_no_file_of_bytes_is_named(tmp_path: Path) -> None:
    csv = tmp_path / "train.csv"
    for make, says in (
        (csv.mkdir, "is a folder; give a file"),
        (lambda: os.mkfifo(csv), "is no ordinary file"),
        (lambda: csv.symlink_to("/dev/zero"), "is no ordinary file"),
        (lambda: csv.symlink_to("gone.csv"), "cannot be read (No such file or directory)"),
    ):
        make()
        assert f"{csv}: {says}" in refused_by_all(csv)
        with pytest.raises(CatalogError, match=re.escape(f"{csv}: {says}")):
            Catalog.open(entry(tmp_path), "d", "train", tmp_path / "index")
        csv.rmdir() if csv.is_dir() else csv.unlink()


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"path label\n", "remove the header line"),
        ("chemin étiquette\n".encode(), "remove the header line"),
        (b"1 a/1.mp4\n", "the columns are in the other order"),
        (b'"a/1.mp4 1"\n', "the line as a whole is in quotation marks"),
        (b"'a/1.mp4 1'\n", "the line as a whole is in quotation marks"),
        (b'{"a.mp4": 1}\n', "this is JSON"),
        (b"[\n", "this is JSON"),
        (b"a.mp4 +1\n", "write it without sign and point"),
        (b"a.mp4 1.0\n", "write it without sign and point"),
        (b"a.mp4 -1\n", "labels are whole numbers from 0 up; correct the line"),
        (b"a.mp4 1,2\n", "multi_label=true"),
        (b"a.mp4,1\n", "set the dataset's separator to ','"),
    ],
)
def test_the_remedy_fits_the_line(content: bytes, remedy: str) -> None:
    assert refused(content).endswith(remedy) or remedy in refused(content)
    assert ("header" in refused(content)) == ("header" in remedy)


def test_single_quotation_marks_around_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"' stands around the path 'a/1\.mp4'; write it without"):
        opened(tmp_path, b"'a/1.mp4' 1\n", present=False)
