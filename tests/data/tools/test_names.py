"""Names that people and machines give: every one works, or is one line; nothing on a screen or in a csv obeys them."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import pytest
from support import settings, write_run, write_video

from multitrain.cli import main

pytestmark = pytest.mark.usefixtures("in_this_process")

NAMES = (
    b"cam1:0900.mp4",
    b"50%d.mp4",
    b"-dash.mp4",
    b"--help.mp4",
    b"caf\xe9.mp4",
    b"\xe2\x80\xaeevil.mp4",
    b"=cmd|' C calc'!A0.mp4",
    b"q'uo\"te.mp4",
    b"a b.mp4",
    b"file:x.mp4",
    b"http:x.mp4",
    b"*.mp4",
    b"a\\b.mp4",
    b"esc\x1b[31m.mp4",
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", 0, frames=8)
    for name in (*NAMES, b"new\nline.mp4"):
        shutil.copy(folder / "a.mp4", os.path.join(os.fsencode(folder), name))
    (folder / "a.mp4").unlink()
    return folder


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """All that was said, which no terminal obeys and every stream takes."""
    said = capsys.readouterr()
    text = said.out + said.err
    text.encode()
    assert not set(text) & {"\x1b", "\u202e", "\0", "\r"}
    assert "Traceback" not in text
    return text


def table(file: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    assert not [cell for row in rows for cell in row.values() if cell.startswith("=")]
    return rows


def test_check_reads_every_name_and_lists_it_on_one_line(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(videos), "--out", str(tmp_path / "c")]) == 1
    rows = table(tmp_path / "c" / "check.csv")
    assert {row["kind"] for row in rows} == {"duplicate"}
    assert len(rows) == len(NAMES)
    printed(capsys)
    assert main(["data", "check", str(videos), "--out", str(tmp_path / "c")]) == 1
    assert f"{len(NAMES) + 1} of {len(NAMES) + 1} are done already" in printed(capsys)


def test_check_of_a_csv_names_what_no_disk_holds(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    hostile = (b"n" * 300 + b".mp4", b"d/" * 300 + b"x.mp4", b"gone\xe9.mp4")
    (data / "train.csv").write_bytes(b"".join(name + b" 0\n" for name in (*NAMES, *hostile)))
    mapping = settings(tmp_path)
    mapping["data"]["datasets"] = {"d": {"annotations": str(data), "videos": str(videos), "classes": 2}}
    run, _ = write_run(tmp_path / "runs", mapping)
    clean = tmp_path / "clean"
    assert main(["data", "check", "--run", str(run), "--out", str(tmp_path / "c"), "--write-clean", str(clean)]) == 1
    assert sum(row["kind"] == "missing" for row in table(tmp_path / "c" / "check.csv")) == len(hostile)
    assert (clean / "d" / "train.csv").read_bytes() == NAMES[0] + b" 0\n", "the others are duplicates"
    printed(capsys)


@pytest.mark.parametrize("verb", ["check", "resize"])
def test_a_nul_is_one_line(videos: Path, tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_bytes(b"cam1:0900.mp4 0\nnul\0.mp4 0\n")
    mapping = settings(tmp_path)
    mapping["data"]["datasets"] = {"d": {"annotations": str(data), "videos": str(videos), "classes": 2}}
    run, _ = write_run(tmp_path / "runs", mapping)
    arguments = {
        "check": ["--run", str(run), "--out", str(tmp_path / "c")],
        "resize": [str(videos), str(tmp_path / "out"), "--annotations", str(data), "--workers", "1"],
    }[verb]
    status = main(["data", verb, *arguments])
    said = printed(capsys)
    assert status in (1, 2)
    assert "nul\\x00.mp4" in said if status == 1 else "train.csv:2: " in said


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg on this machine")
def test_resize_copies_every_name_under_its_own(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "train.csv").write_bytes(b"".join(name + b" 0\n" for name in (*NAMES, b"n" * 300 + b".mp4")))
    more = ["--annotations", str(data), "--write-annotations", str(tmp_path / "new"), "--preset", "ultrafast"]
    assert main(["data", "resize", str(videos), str(out), *more]) == 1
    assert {n for n in os.listdir(os.fsencode(out)) if n.endswith(b".mp4")} == set(NAMES)
    assert (tmp_path / "new" / "train.csv").read_bytes() == b"".join(name + b" 0\n" for name in NAMES)
    assert len(table(out / "resize.csv")) == len(NAMES) + 1
    assert "1 failed" in printed(capsys)
    assert main(["data", "resize", str(videos), str(tmp_path / "found"), "--preset", "ultrafast"]) == 0
    assert len([n for n in os.listdir(tmp_path / "found") if n.endswith(".mp4")]) == len(NAMES) + 1


@pytest.mark.parametrize("verb", ["check", "resize", "stats", "show", "index", "bench", "import"])
def test_what_cannot_be_read_or_written_is_one_line(
    videos: Path, tiny_data: Path, tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = write_run(tmp_path / "runs", settings(tiny_data))
    kinetics = tmp_path / "train.csv"
    kinetics.write_text("label,youtube_id,time_start,time_end,split\nriding,abc,3,13,train\n")
    (tmp_path / "file").write_text("x")
    index = ["--index", str(tmp_path / "index")]
    for bad in ("/sys/zz", "/proc/self/zz", str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        tries = {
            "check": [[str(videos), "--out", bad], [bad, "--out", str(tmp_path / "c")], ["--run", bad]],
            "resize": [[str(videos), bad], [bad, str(tmp_path / "out")], [str(videos), bad, "--annotations", bad]],
            "stats": [
                ["--run", str(run), *index, "--plot", f"{bad}/x.png"],
                ["--run", str(run), "--index", bad],
                ["--run", bad],
            ],
            "show": [["--run", str(run), *index, "--out", f"{bad}/x.png"], ["--run", str(run), "--index", bad]],
            "index": [["--run", str(run), "--index", bad], ["--run", bad]],
            "bench": [["--run", bad]],
            "import": [["kinetics", str(kinetics), "--out", bad], ["kinetics", bad, "--out", str(tmp_path / "o")]],
        }[verb]
        tries += {"stats": [["--run", str(run), *index, "--checked", bad]]}.get(verb, [])
        for arguments in tries:
            try:
                status = main(["data", verb, *arguments])
            except SystemExit as error:
                status = int(str(error.code))
            said = printed(capsys)
            assert status == 2, (arguments, said)
            assert len(said.strip().splitlines()) == 1, said


def test_a_folder_of_videos_is_looked_at_whole_whatever_container_a_camera_writes(tmp_path: Path) -> None:
    """AVCHD camcorders (.MTS), DVDs (.VOB), broadcast (.mxf), recorders (.dav), raw streams: none is left out in silence."""
    from multitrain.data.tools.listing import found_below

    videos = [
        "00001.MTS",
        "a.m2ts",
        "VTS_01_1.VOB",
        "a.mxf",
        "a.dav",
        "a.asf",
        "a.3g2",
        "a.gif",
        "a.h265",
        "a.mp4",
        "a.rm",
    ]
    for name in (*videos, "a.srt", "a.csv", "a.jpg", "a.wav", ".hidden.mp4", "mts"):
        (tmp_path / name).touch()
    assert found_below(tmp_path) == sorted(videos)
