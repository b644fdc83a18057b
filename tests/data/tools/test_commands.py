"""`data check` and `data resize`: every fault named, nothing half-written, and interruptions that leave no trace."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import write_video

from multitrain.cli import main
from multitrain.config import DatasetConfig
from multitrain.data.decode import scan_video
from multitrain.data.tools.check import Entry, find_problems, list_entries
from multitrain.data.tools.listing import PARTS, Copy, Layout, Listed, copies, found_below
from multitrain.data.tools.resize import Encoding, Item, Resize
from multitrain.data.tools.scan import ScanFile
from tests import material

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg on this machine")


def damage(file: Path) -> None:
    """Zeros in the last twelfth of the pictures' bytes, behind the first picture, which is most of them."""
    content = bytearray(file.read_bytes())
    start = content.index(b"mdat")
    size = int.from_bytes(content[start - 4 : start], "big")
    content[start + size - 8 - size // 12 : start + size - 8] = bytes(size // 12)
    file.write_bytes(content)


def dataset(folder: Path) -> None:
    """A small dataset with one fault of each kind."""
    folder.mkdir()
    for i, name in enumerate(("good", "twin", "short", "cut", "both")):
        write_video(folder / f"{name}.mp4", i, frames=3 if name == "short" else 12)
    shutil.copy(folder / "good.mp4", folder / "twin.mp4")
    damage(folder / "cut.mp4")
    (folder / "text.mp4").write_text("no video")
    train = [
        "good.mp4 0",
        "twin.mp4 0",
        "short.mp4 1",
        "cut.mp4 1",
        "gone.mp4 0",
        "text.mp4 1",
        "both.mp4 0",
        "both.mp4 1",
    ]
    (folder / "train.csv").write_text("\n".join(train) + "\n")
    (folder / "val.csv").write_text("twin.mp4 0\n")


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def run_file(folder: Path, tiny: Path) -> Path:
    """A run's configuration with the dataset in `tiny`."""
    from support import settings, write_run

    mapping = settings(tiny)
    mapping["data"]["datasets"] = {"tiny": {"annotations": str(tiny), "videos": str(tiny), "classes": 2}}
    run, _ = write_run(folder / "runs", mapping)
    return run


def test_check_names_every_fault_and_writes_clean_annotations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path / "d")
    run = run_file(tmp_path, tmp_path / "d")
    arguments = [
        "data",
        "check",
        "--run",
        str(run),
        "--out",
        str(tmp_path / "c"),
        "--write-clean",
        str(tmp_path / "clean"),
    ]
    assert main([*arguments, "--min-frames", "4", "--workers", "2"]) == 1
    found = {(r["path"], r["split"], r["kind"]) for r in rows(tmp_path / "c" / "check.csv")}
    assert found == {
        ("twin.mp4", "train", "duplicate"),
        ("good.mp4", "train", "leak"),
        ("twin.mp4", "train", "leak"),
        ("short.mp4", "train", "short"),
        ("cut.mp4", "train", "broken"),
        ("text.mp4", "train", "broken"),
        ("gone.mp4", "train", "missing"),
        ("both.mp4", "train", "labelled twice"),
    }
    assert all(r["detail"] for r in rows(tmp_path / "c" / "check.csv"))
    assert (tmp_path / "clean" / "tiny" / "train.csv").read_text() == ""
    assert (tmp_path / "clean" / "tiny" / "val.csv").read_text() == "twin.mp4 0\n"
    capsys.readouterr()
    assert main([*arguments, "--min-frames", "2"]) == 1, "nothing is decoded again for another limit"
    assert "done already" in capsys.readouterr().err
    assert "short.mp4 1" in (tmp_path / "clean" / "tiny" / "train.csv").read_text()


def test_shards_of_check_together_give_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(5):
        write_video(tmp_path / f"v{i}.mp4", i)
    common = ["data", "check", str(tmp_path), "--out", str(tmp_path / "c"), "--workers", "1", "--shard"]
    assert main([*common, "1/2"]) == 0
    assert "2 of 5 files are checked" in capsys.readouterr().err
    assert not (tmp_path / "c" / "check.csv").exists()
    assert main([*common, "0/2"]) == 0
    assert rows(tmp_path / "c" / "check.csv") == []


def remuxed(source: Path, target: Path) -> None:
    """The same packets in another container."""
    import av

    with av.open(str(source)) as whole, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)


def test_the_same_video_in_another_container_is_a_duplicate(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 0)
    remuxed(tmp_path / "a.mp4", tmp_path / "b.mkv")
    assert scan_video(tmp_path / "a.mp4").digest == scan_video(tmp_path / "b.mkv").digest


@needs_ffmpeg
def test_parts_of_one_video_that_show_other_pictures_are_other_videos(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    write_video(tmp_path / "a.mp4", 0, frames=90)
    ffmpeg = ["ffmpeg", "-nostdin", "-v", "error", "-y"]
    subprocess.run([*ffmpeg, "-i", tmp_path / "a.mp4", "-g", "90", "-bf", "0", tmp_path / "one.mp4"], check=True)
    for start in ("0.5", "1.5"):  # the same packets, of which an edit list hides the first ones
        subprocess.run(
            [*ffmpeg, "-ss", start, "-i", tmp_path / "one.mp4", "-c", "copy", folder / f"{start}.mp4"], check=True
        )
    shutil.copy(folder / "0.5.mp4", folder / "copy.mp4")
    (folder / "train.csv").write_text("0.5.mp4 0\n1.5.mp4 1\ncopy.mp4 0\n")
    scans = {str(file): ScanFile()(str(file)) for file in folder.glob("*.mp4")}
    frames = {Path(file).name: scan["frames"] for file, scan in scans.items()}
    assert (frames["0.5.mp4"], frames["1.5.mp4"]) == (75, 45)
    assert len({scan["hidden"] for scan in scans.values()}) == 2

    def found() -> list[tuple[str, str]]:
        dataset = DatasetConfig.model_validate({"annotations": str(folder), "videos": str(folder), "classes": 2})
        return [(f.entry.path, f.kind) for f in find_problems(list_entries({"d": dataset}), scans, 1).findings]

    assert found() == [("copy.mp4", "duplicate")]
    del scans[str(folder / "copy.mp4")]["hidden"]  # as in a journal of an earlier version
    assert found() == [("copy.mp4", "duplicate")]
    for scan in scans.values():
        scan.pop("hidden", None)
    assert found() == [("copy.mp4", "duplicate")]
    for scan, hidden in zip(scans.values(), "xyz"):
        scan |= {"digest": "same", "frames": 45, "hidden": hidden}
    assert found() == []


def test_one_video_in_any_spelling_by_a_link_or_remuxed_is_one_video(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    (folder / "x").mkdir(parents=True)
    write_video(folder / "a.mp4", 0, frames=12)
    os.link(folder / "a.mp4", folder / "hard.mp4")
    (folder / "soft.mp4").symlink_to("a.mp4")
    remuxed(folder / "a.mp4", folder / "b.mkv")
    others = ("./a.mp4", "x/../a.mp4", "x//..//a.mp4", f"{folder}/a.mp4", "hard.mp4", "soft.mp4", "b.mkv")
    (folder / "train.csv").write_text("a.mp4 0\n" + "".join(f"{name} 0\n" for name in others))
    (folder / "val.csv").write_text("x/../hard.mp4 1\n")
    words = ["data", "check", "--run", str(run_file(tmp_path, folder)), "--out", str(tmp_path / "c"), "--workers", "1"]
    assert main([*words, "--write-clean", str(tmp_path / "clean")]) == 1
    found = [(r["path"], r["kind"]) for r in rows(tmp_path / "c/check.csv")]
    assert sorted(p for p, kind in found if kind == "duplicate") == sorted(others)
    assert sorted(p for p, kind in found if kind == "leak") == sorted(["a.mp4", *others])
    assert len([p for p, kind in found if kind == "labelled twice"]) == 9


def test_labels_are_compared_within_a_dataset_only() -> None:
    def entry(dataset: str, split: str, label: int) -> Entry:
        return Entry(dataset, split, "x.csv", 1, "a.mp4", "/a.mp4", (label,))

    scans: dict[str, Any] = {"/a.mp4": {"frames": 9, "digest": "d"}}
    assert find_problems([entry("one", "train", 0), entry("two", "train", 1)], scans, 1).findings == []
    kinds = [f.kind for f in find_problems([entry("one", "train", 0), entry("two", "test", 1)], scans, 1).findings]
    assert kinds == ["leak"]


# ------------------------------------------------------------------------------------------------------------ resize


@needs_ffmpeg
def test_copies_have_every_frame_and_the_asked_short_side(tmp_path: Path) -> None:
    write_video(tmp_path / "wide.mp4", 0, frames=20, size=(160, 96))
    write_video(tmp_path / "tall.mp4", 1, frames=7, size=(96, 160))
    write_video(tmp_path / "small.mp4", 2, size=(48, 32))
    out = tmp_path / "out"
    assert (
        main(["data", "resize", str(tmp_path), str(out), "--short-side", "64", "--fast-decode", "--workers", "2"]) == 0
    )
    sizes = {n: (s.frames, s.width, s.height) for n in ("wide", "tall", "small") if (s := scan_video(out / f"{n}.mp4"))}
    assert sizes == {"wide": (20, 106, 64), "tall": (7, 64, 106), "small": (12, 48, 32)}


@needs_ffmpeg
def test_a_broken_source_leaves_no_copy_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset(tmp_path / "d")
    out, clean = tmp_path / "out", tmp_path / "annotations"
    command = ["data", "resize", str(tmp_path / "d"), str(out), "--annotations", str(tmp_path / "d")]
    assert main([*command, "--write-annotations", str(clean), "--workers", "2"]) == 1
    failed = {r["source"]: r["reason"] for r in rows(out / "resize.csv") if r["state"] == "failed"}
    assert set(failed) == {"cut.mp4", "text.mp4", "gone.mp4"}
    assert "frame" in failed["cut.mp4"]
    assert {p.name for p in out.glob("*.mp4")} == {"good.mp4", "twin.mp4", "short.mp4", "both.mp4"}
    lines = (clean / "train.csv").read_text().splitlines()
    assert lines == ["good.mp4 0", "twin.mp4 0", "short.mp4 1", "both.mp4 0", "both.mp4 1"]
    capsys.readouterr()
    assert main([*command, "--salvage", "--json"]) == 1
    assert set(json.loads(capsys.readouterr().out)["failures"]) == {"text.mp4", "gone.mp4"}, (
        "what is there of cut.mp4 is kept"
    )


@needs_ffmpeg
def test_segments_are_cut(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 0, frames=90)
    (tmp_path / "out" / PARTS).mkdir(parents=True)
    work = Resize(tmp_path, tmp_path / "out", Encoding(64), 60)
    record = work(Item(Copy("v.mp4", "v/0000100_0000200.mp4", (1.0, 2.0))))
    assert record["frames"] == 30
    assert work(Item(Copy("v.mp4", "w.mp4", (2.5, 9.0))))["frames"] == 15, "what is there of it"
    for encoding in (Encoding(64), Encoding(64, salvage=True)):
        record = Resize(tmp_path, tmp_path / "out", encoding, 60)(Item(Copy("v.mp4", "x.mp4", (3.0, 4.0))))
        assert record["error"] == "the segment begins at 3 s, after the last frame (the video ends at 3.0 s)"
        assert not record["final"]


@needs_ffmpeg
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_resize_goes_on_and_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals) -> None:
    source, out = tmp_path / "videos", tmp_path / "out"
    source.mkdir()
    for i in range(6):
        write_video(source / f"v{i}.mp4", i, frames=40, size=(256, 192))
    command = [
        sys.executable,
        "-m",
        "multitrain.cli",
        "data",
        "resize",
        str(source),
        str(out),
        "--short-side",
        "96",
        "--workers",
        "2",
    ]
    command += ["--preset", "slower"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not list(out.glob("v*.mp4")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("v*.mp4")}
    assert 0 < len(before) < 6
    for name in before:
        assert scan_video(out / name).frames == 40
    assert (
        main(["data", "resize", str(source), str(out), "--short-side", "96", "--workers", "2", "--preset", "slower"])
        == 0
    )
    assert len(list(out.glob("v*.mp4"))) == 6
    noted = {name for name, time_ns in before.items() if (out / name).stat().st_mtime_ns == time_ns}
    assert len(before) - len(noted) <= 2, "only what was in the works is made again"


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    from multitrain.config import ConfigError

    layout = Layout(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"'a\.avi' and 'a\.mp4' would both become 'a\.mp4'"):
        copies(layout, [Listed("a.avi"), Listed("a.mp4")])
    with pytest.raises(ConfigError, match="no video files"):
        found_below(tmp_path)


# ------------------------------------------------------------------------------------------------------- real files


def test_every_broken_file_is_named_and_every_playable_one_is_not(broken: Path, odd: Path) -> None:
    work = ScanFile()
    found = {f.name: work(str(f)).get("error") for f in broken.iterdir()}
    assert {name for name, reason in found.items() if reason is None} == material.names(broken, *material.PLAYABLE)
    kinds = ("d_editlist.mp4", "d_ssv2_like.webm", "unordered.mov", "rot90.mov", "av1.mkv", "ucf_archery.avi")
    packed = material.BESIDE / "real" / "ut_interaction" / "handshake" / "set1_41_8_0.avi"
    for file in (*(odd / name for name in material.names(odd, *kinds)), *([packed] if packed.is_file() else [])):
        assert "error" not in work(str(file)), file
