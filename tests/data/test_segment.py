"""A line `path start end label` is the part of the video that a player shows between these times, as if it had been cut out."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multitrain.cli import main
from multitrain.config import DatasetConfig, RunConfig, validate
from multitrain.data.annotations import CatalogError, Syntax, lines
from multitrain.data.catalog import Catalog, open_catalogs, plan_of, summary
from multitrain.data.clips import EvalViewsFn, Task, TrainClipFn
from multitrain.data.decode import VideoError, open_video
from multitrain.data.segment import Segment, named, split_name
from multitrain.data.tools.check import find_problems, list_entries
from multitrain.data.tools.listing import PARTS, Copy
from multitrain.data.tools.resize import Encoding, Item, Resize
from tests.data.numbered import number_of, write_numbered
from tests.support import settings

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here")
ENCODINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mp4": ("a.mp4", "libx264", {"options": {"bf": "3", "g": "12"}}),
    "open groups of pictures": ("a.mp4", "libx264", {"options": {"x264-params": "open-gop=1:keyint=12:bframes=4"}}),
    "variable rate": ("a.mp4", "libx264", {"times": [n + 3 * (n // 7) for n in range(60)]}),
    "mkv": ("a.mkv", "libx264", {"options": {"g": "10"}}),
    "transport stream": ("a.ts", "libx264", {"options": {"g": "10"}}),
    "avi without presentation times": ("a.avi", "libx264", {"options": {"bf": "3", "g": "10"}}),
    "mpeg4 avi": ("a.avi", "mpeg4", {"options": {"bf": "2", "g": "12"}}),
    "vp9": ("a.webm", "libvpx-vp9", {"options": {"deadline": "realtime", "cpu-used": "8"}}),
}


def compare_with_cut(video: Path, out: Path, start: float, end: float) -> int:
    """Cut a segment without loss, compare all its frames with those of the segment, and return their number."""
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    record = Resize(video.parent, out, Encoding(4096, crf=0, preset="ultrafast"), 60)(
        Item(Copy(video.name, "cut.mp4", (start, end)))
    )
    try:
        part = open_video(named(str(video), Segment(start, end)))
    except VideoError:
        assert "error" in record
        return 0
    with part, open_video(out / PARTS / record["part"]) as cut:
        assert cut.frame_count == part.frame_count, (start, end)
        assert np.allclose(cut.times(), part.times(), rtol=0, atol=1e-3)
        everything = range(cut.frame_count)
        moved = np.abs(cut.frames(everything).astype(np.int16) - part.frames(everything))
        assert moved.mean() < 1.0, (video.name, start, end)  # other rounding of colours only
        assert abs(cut.fps - part.fps) < 0.02 * cut.fps + 1 / max(part.times()[-1], 0.1)
        return part.frame_count


@needs_ffmpeg
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_segment_has_the_frames_of_the_cut_copy(tmp_path: Path, encoding: str) -> None:
    name, codec, more = ENCODINGS[encoding]
    video, rng = write_numbered(tmp_path / name, 60, codec=codec, **more), random.Random(encoding)
    with open_video(video) as whole:
        shown = whole.shown_at()
        assert shown[0] == pytest.approx(0.0, abs=1e-6)
    for _ in range(4):
        start = round(rng.uniform(0, shown[-1]), 3)
        end = round(start + rng.uniform(0.02, 1.0), 3)
        count = compare_with_cut(video, tmp_path / "out", start, end)
        inside = np.flatnonzero((shown >= start - 5e-7) & (shown < end - 5e-7))
        assert count == len(inside)
        if count:
            with open_video(f"{video}#t={start},{end}") as part:
                assert [number_of(f) for f in part.frames(range(count))] == inside.tolist()


@needs_ffmpeg
def test_odd_files_are_cut_where_segments_are(shared: Path, tmp_path: Path) -> None:
    names = ("videos/d_vfr_yoga.mp4", "videos/d_bframes_longgop.mp4", "videos/d_rot90_10s.mp4", "videos/d_editlist.mp4")
    for number, name in enumerate((*names, "bugs/vfr_phone.mp4", "bugs/midgop.ts", "bugs/h264_bframes.avi")):
        rng = random.Random(number)
        for _ in range(2):
            start = round(rng.uniform(0, 1.8), 3)
            assert compare_with_cut(shared / name, tmp_path / "out", start, start + 0.4)


@needs_ffmpeg
def test_time_begins_with_the_sound_if_that_is_earlier(tmp_path: Path) -> None:
    write_numbered(tmp_path / "v.mp4", 60)
    command = ["ffmpeg", "-v", "error", "-itsoffset", "0.5", "-i", tmp_path / "v.mp4", "-f", "lavfi", "-i", "sine"]
    more = ["-t", "2.4", "-c:v", "copy", "-c:a", "aac", tmp_path / "late.mp4"]
    subprocess.run([*map(str, command), *map(str, more)], check=True)
    with open_video(f"{tmp_path / 'late.mp4'}#t=1,1.5") as part:
        assert [number_of(f) for f in part.frames([0, part.frame_count - 1])] == [15, 29]
    assert compare_with_cut(tmp_path / "late.mp4", tmp_path / "out", 1.0, 1.5) == 15


def test_a_segment_at_the_time_of_a_frame_begins_with_it(tmp_path: Path) -> None:
    video = write_numbered(tmp_path / "a.mp4", 90)
    for first in range(0, 88, 3):
        with open_video(f"{video}#t={first / 30:.6f},{(first + 2) / 30:.6f}") as part:
            assert [number_of(f) for f in part.frames(range(part.frame_count))] == [first, first + 1]


def test_decord_gives_the_same_segment(tmp_path: Path) -> None:
    pytest.importorskip("decord")
    video = write_numbered(tmp_path / "a.mp4", 90, options={"bf": "3"})
    name = f"{video}#t=0.71,1.93"
    with open_video(name, "decord") as part, open_video(name) as ours:
        assert (part.frame_count, part.fps) == (ours.frame_count, ours.fps)
        assert np.array_equal(part.frames([0, 9, part.frame_count - 1]), ours.frames([0, 9, ours.frame_count - 1]))


@pytest.mark.parametrize("name", ["a.mp4#t=1,2", "a b#t=.mp4#t=0.5,7.25", "x#t=1,2#t=3,4"])
def test_names_of_segments_are_read_back(name: str) -> None:
    path, segment = split_name(name)
    assert segment is not None
    assert named(path, segment) == name


def test_a_file_whose_name_looks_like_a_segment_is_that_file(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", 60)
    write_numbered(tmp_path / "b.mp4", 7).rename(tmp_path / "a.mp4#t=0,1")
    with open_video(tmp_path / "a.mp4#t=0,1") as video:
        assert video.frame_count == 7
    with open_video(tmp_path / "a.mp4#t=0,0.5") as video:
        assert video.frame_count == 15


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.mp4#t=2,3", "no frame in the segment; the video's frames are shown at 0.00 to 1.97 s"),
        ("a.mp4#t=1,1", "no length"),
        ("a.mp4#t=1,nan", "no numbers"),
        ("a.mp4#t=-1,1", "starts before the video"),
        ("b.mp4#t=0,1", "No such file"),
    ],
)
def test_an_impossible_segment_says_why(tmp_path: Path, name: str, reason: str) -> None:
    write_numbered(tmp_path / "a.mp4", 60)
    with pytest.raises(VideoError) as caught:
        open_video(tmp_path / name)
    assert reason in caught.value.reason


# -------------------------------------------------------------------------------------------------------- annotation files

ROWS = {
    " ": 'a b.mp4 0.5 1.5 1\nc.mp4 0\n"a b.mp4" 1 2 0\nd 3.mp4  0  1e0  2\ne.mp4 7 2\n',
    ",": "a b.mp4,0.5,1.5,1\nc.mp4,0\na b.mp4, 1, 2, 0\nd 3.mp4,0,1.0,2\ne.mp4 7,2\n",
    "\t": "a b.mp4\t0.5\t1.5\t1\nc.mp4\t0\na b.mp4\t1\t2\t0\nd 3.mp4\t0\t1\t2\ne.mp4 7\t2\n",
}


@pytest.mark.parametrize("separator", ROWS)
def test_lines_with_and_without_segments_are_read(separator: str) -> None:
    read = list(lines(ROWS[separator].encode(), Path("x.csv"), Syntax(separator.encode(), False, True)))
    assert [(line.name, line.labels) for line in read] == [
        ("a b.mp4#t=0.5,1.5", [1]),
        ("c.mp4", [0]),
        ("a b.mp4#t=1,2", [0]),
        ("d 3.mp4#t=0,1", [2]),
        ("e.mp4 7", [2]),
    ]


@pytest.mark.parametrize("times", ["2 1", "1 1", "-1 2", "nan 1", "0 inf"])
def test_times_that_are_no_segment_are_refused_with_their_line(times: str) -> None:
    content = f"a.mp4 0 1 0\na.mp4 {times} 0\n".encode()
    with pytest.raises(CatalogError, match=r"x.csv:2: .*no segment"):
        list(lines(content, Path("x.csv"), Syntax(b" ", False, True)))


def dataset(folder: Path, text: str, **more: Any) -> DatasetConfig:
    folder.mkdir(exist_ok=True)
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text(text)
    return DatasetConfig(annotations=str(folder), videos=str(folder), classes=3, **more)


def test_lines_that_look_like_segments_are_not_read_without_a_word(tmp_path: Path) -> None:
    write_numbered(tmp_path / "d" / "a.mp4", 60)
    with pytest.raises(CatalogError, match="segments=true"):
        Catalog.open(dataset(tmp_path / "d", "a.mp4 0.5 1 0\n"), "d", "train", tmp_path / "index")
    with pytest.raises(CatalogError, match="path frames label"):
        Catalog.open(dataset(tmp_path / "d", "a.mp4 60 0\n", segments=True), "d", "train", tmp_path / "index")


def test_check_names_the_option_where_lines_look_like_segments(tmp_path: Path) -> None:
    write_numbered(tmp_path / "d" / "a.mp4", 60)
    entries = list_entries({"d": dataset(tmp_path / "d", "a.mp4 0.5 1 0\n")})
    missing = {"kind": "missing", "error": "no such file"}
    (finding, *_) = find_problems(entries, {entries[0].file: missing}, 1).findings
    assert "data.datasets.d.segments=true" in finding.detail


def test_a_csv_without_segments_keeps_its_digest(tmp_path: Path) -> None:
    write_numbered(tmp_path / "d" / "a.mp4", 60)
    plain, allowed = (
        Catalog.open(dataset(tmp_path / "d", "a.mp4 0\n", segments=s), "d", "train", tmp_path / "index")
        for s in (False, True)
    )
    assert plain.digest == allowed.digest
    digests = {plain.digest}
    for text in ("a.mp4 0 1 0\n", "a.mp4 0 1.5 0\n", "a.mp4 0.25 1 0\n"):
        digests.add(Catalog.open(dataset(tmp_path / "d", text, segments=True), "d", "train", tmp_path / "index").digest)
    assert len(digests) == 4


def test_a_segment_has_one_label_and_a_video_may_have_many(tmp_path: Path) -> None:
    write_numbered(tmp_path / "d" / "a.mp4", 60)
    text = "a.mp4 0 1 0\na.mp4 0.5 1.5 1\n./a.mp4 0 1 0\n"
    catalog = Catalog.open(dataset(tmp_path / "d", text, segments=True), "d", "train", tmp_path / "index")
    assert catalog.duplicates == 1
    with pytest.raises(CatalogError, match=r"a.mp4#t=0,1.* has label 1 here and 0"):
        Catalog.open(dataset(tmp_path / "d", text + "a.mp4 0 1.0 1\n", segments=True), "d", "train", tmp_path / "index")


# ---------------------------------------------------------------------------------------------------------------- runs

PARTS_OF = ((0.0, 0.9), (0.5, 1.5), (1.2, 1.9))


def run_on(folder: Path, text: str, **changes: Any) -> RunConfig:
    one = dataset(folder, text, segments=True).model_dump()
    base = settings(folder.parent, data__workers=0, model__crop=32, augment__mix_group=2, **changes)
    base["data"]["datasets"] = {"d": one}
    return validate(base)


def made(config: RunConfig, index: Path) -> tuple[list[bytes], list[bytes]]:
    """Training clips and test views."""
    catalogs = open_catalogs(config.data, "train", index)
    job = TrainClipFn(catalogs, plan_of(config, catalogs), config)
    job.warm_up()
    out, clips = np.empty(job.shape, job.dtype), []
    for sample in job.plan.samples(0, 8):
        assert not job.run(Task(0, sample), out).skipped
        clips.append(out.tobytes())
    views = EvalViewsFn(catalogs["d"], config.data.datasets["d"], config)
    shown, all_views = np.empty(views.shape, views.dtype), []
    for number in range(len(catalogs["d"])):
        assert views.run(number, shown) == ""
        all_views.append(shown.tobytes())
    return clips, all_views


def intra(path: Path, first: int, last: int) -> None:
    """A file of which every frame has the same bits, whatever comes before it."""
    import av

    from tests.data.numbered import numbered_frame

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"g": "1", "qp": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for n in range(first, last):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(n, 96, 64), format="rgb24")))
        out.mux(stream.encode())


def test_a_run_on_segments_is_the_run_on_their_copies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    intra(whole / "a.mp4", 0, 60)
    for number, (start, end) in enumerate(PARTS_OF):
        intra(cut / f"{number}.mp4", round(30 * start), round(30 * end))
    of_segments = run_on(whole, "".join(f"a.mp4 {s} {e} {n}\n" for n, (s, e) in enumerate(PARTS_OF)))
    of_copies = run_on(cut, "".join(f"{n}.mp4 {n}\n" for n in range(3)))
    here, there = made(of_segments, tmp_path / "index"), made(of_copies, tmp_path / "index")
    assert here == there
    assert summary(of_segments, tmp_path / "index")["sources"][0]["size"] == 3

    assert (
        main(["data", "pack", str(whole), str(tmp_path / "packed"), "--annotations", str(whole), "--segment-lines"])
        == 0
    )
    mapping = of_segments.model_dump(mode="json")
    mapping["data"]["datasets"]["d"]["videos"] = str(tmp_path / "packed")
    assert made(validate(mapping), tmp_path / "index") == here
    mapping["data"]["shuffle_window"] = 1
    summary(validate(mapping), tmp_path / "index")
    assert "segments of a video are spread" in caplog.text


def test_a_bad_segment_is_named_with_its_times_and_replaced(tmp_path: Path) -> None:
    intra(tmp_path / "d" / "a.mp4", 0, 60)
    config = run_on(tmp_path / "d", "a.mp4 0 1 0\na.mp4 50 60 1\n")
    catalogs = open_catalogs(config.data, "train", tmp_path / "index")
    job, skipped = TrainClipFn(catalogs, plan_of(config, catalogs), config), []
    for sample in job.plan.samples(0, 4):
        skipped += job.run(Task(0, sample), np.empty(job.shape, job.dtype)).skipped
    assert {(s["path"], s["stand_in"]) for s in skipped} == {("a.mp4#t=50,60", "a.mp4#t=0,1")}
    assert "no frame in the segment" in skipped[0]["reason"]


def test_check_finds_bad_segments_and_keeps_good_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "d"
    intra(folder / "a b.mp4", 0, 60)
    rows = ["0 1 0", "0.5 1.5 1", "3 4 0", "0 9 0", "1.9 2 0", "0 1 0", "0.25 1 2", "0.25 1 1", "0 2.5 0"]
    dataset(folder, "")
    (folder / "train.csv").write_text("".join(f"a b.mp4 {row}\n" for row in rows))
    (folder / "val.csv").write_text("a b.mp4 1.6 1.85 0\n")
    (folder / "test.csv").unlink()
    given = {"annotations": str(folder), "videos": str(folder), "classes": 3, "segments": True}
    config = tmp_path / "run.yaml"
    mapping = settings(tmp_path, data__workers=0)
    mapping["data"]["datasets"] = {"d": given}
    config.write_text(json.dumps(mapping))
    command = ["data", "check", "--run", str(config), "--out", str(tmp_path / "out"), "--min-frames", "5"]
    assert main([*command, "--write-clean", str(tmp_path / "clean"), "--workers", "1"]) == 1
    text = (tmp_path / "out" / "check.csv").read_text()
    for line, kind in (
        (3, "outside"),
        (4, "outside"),
        (5, "short"),
        (6, "duplicate"),
        (7, "labelled twice"),
        (9, "leak"),
    ):
        assert any(f",{line}," in row and kind in row for row in text.splitlines()), (line, kind)
    kept = (tmp_path / "clean" / "d" / "train.csv").read_text().splitlines()
    assert kept == ["a b.mp4 0 1 0", "a b.mp4 0.5 1.5 1"]
