"""`data resize`, `data check --write-clean`, `data import`, `stats`, `show`, `demo`: whatever the layout, no original is touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import write_video

from multitrain.cli import main
from multitrain.data.decode import scan_video

pytestmark = [
    pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg on this machine"),
    pytest.mark.usefixtures("in_this_process"),
]
FAST = ["--short-side", "32", "--workers", "1", "--preset", "ultrafast"]


def state(folder: Path) -> dict[str, str]:
    """Every file, link and folder below a folder, and what is in it."""
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            out[str(path)] = f"-> {os.readlink(path)}"
        else:
            out[str(path)] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return out


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good videos, a Matroska file, one that does not convert, and a text."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "sub").mkdir()
    write_video(folder / "good.mp4", 0, frames=4)
    write_video(folder / "sub" / "deep.mp4", 1, frames=4)
    write_video(folder / "old.mkv", 2, frames=4)
    (folder / "broken.mp4").write_bytes((folder / "good.mp4").read_bytes()[:600])
    (folder / "notes.txt").write_text("precious")
    return folder


@pytest.fixture
def orig(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "orig")
    return tmp_path / "orig"


def csvs(folder: Path, *paths: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.csv").write_bytes(b"".join(os.fsencode(str(p)) + b" 0\n" for p in paths))
    return folder


ALL = ("good.mp4", "sub/deep.mp4", "old.mkv", "broken.mp4")


def resize(videos: Path, out: Path, *more: object) -> int:
    return main(["data", "resize", str(videos), str(out), *FAST, *map(str, more)])


@pytest.mark.parametrize("spelling", ["absolute", "dots", "linked"])
def test_absolute_and_roundabout_paths_are_mapped_below_out(orig: Path, tmp_path: Path, spelling: str) -> None:
    (tmp_path / "link").symlink_to(orig)
    root = {"absolute": orig, "dots": Path("sub/../../orig"), "linked": tmp_path / "link"}[spelling]
    listed = csvs(tmp_path / "a", *(root / p for p in ALL), "good.mp4")
    before = state(orig)
    assert resize(orig, tmp_path / "out", "--annotations", listed, "--write-annotations", tmp_path / "new") == 1
    assert state(orig) == before
    made = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.mp4")}
    assert made == {"good.mp4", "sub/deep.mp4", "old.mp4"}
    lines = (tmp_path / "new" / "train.csv").read_text().splitlines()
    assert lines == ["good.mp4 0", "sub/deep.mp4 0", "old.mp4 0", "good.mp4 0"]


LAYOUTS: dict[str, Callable[[Path, Path], tuple[Path, Path]]] = {
    "out is videos": lambda orig, tmp: (orig, orig),
    "out is videos, spelled otherwise": lambda orig, tmp: (orig, orig / "sub" / ".."),
    "out is a link to videos": lambda orig, tmp: (orig, linked(tmp / "out", orig)),
    "videos is a link to out": lambda orig, tmp: (linked(tmp / "videos", orig), orig),
    "out lies inside videos": lambda orig, tmp: (orig, orig / "small"),
    "out is a folder of videos inside videos": lambda orig, tmp: (orig, orig / "sub"),
    "out holds videos": lambda orig, tmp: (orig, tmp),
    "out holds links to originals": lambda orig, tmp: (orig, full_of_links(tmp / "out", orig)),
    "out holds hard links to originals": lambda orig, tmp: (orig, full_of_hard_links(tmp / "out", orig)),
    "out holds a link to the folder": lambda orig, tmp: (orig, with_linked_folder(tmp / "out", orig)),
    "the parts are a link": lambda orig, tmp: (orig, with_linked_parts(tmp / "out", orig)),
}


def linked(path: Path, to: Path) -> Path:
    path.symlink_to(to)
    return path


def full_of_links(out: Path, orig: Path) -> Path:
    (out / "sub").mkdir(parents=True)
    for name in ALL:
        (out / name).with_suffix(".mp4").symlink_to(orig / name)
    (out / "resize.csv").symlink_to(orig / "notes.txt")
    return out


def full_of_hard_links(out: Path, orig: Path) -> Path:
    (out / "sub").mkdir(parents=True)
    for name in ALL:
        os.link(orig / name, (out / name).with_suffix(".mp4"))
    return out


def with_linked_folder(out: Path, orig: Path) -> Path:
    out.mkdir()
    (out / "sub").symlink_to(orig / "sub")
    return out


def with_linked_parts(out: Path, orig: Path) -> Path:
    out.mkdir()
    parts = orig / "parts"
    parts.mkdir()
    for name in ("host-1.mp4", f"{os.uname().nodename}-1.mp4", f"part-{os.uname().nodename}-999999-00000000.mp4"):
        (parts / name).write_text("precious")
        os.utime(parts / name, (0, 0))
    (out / ".parts").symlink_to(parts)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["found", "absolute"])
def test_no_layout_destroys_an_original(
    orig: Path, tmp_path: Path, layout: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, out = LAYOUTS[layout](orig, tmp_path)
    outside = tmp_path if "inside" not in layout else None
    more: list[object] = []
    if how != "found":
        more = ["--annotations", csvs(tmp_path / "a", *(videos / p for p in ALL))]
    before = {p: s for p, s in state(tmp_path).items() if outside or not p.startswith(str(out))}
    for _ in range(2):
        assert resize(videos, out, *more) in (1, 2)
        now = state(tmp_path)
        assert {p: now.get(p) for p in before} == before, "nothing that was there is gone or changed"
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    assert said.err + said.out


def test_a_foreign_file_in_the_way_is_named_and_stays_and_an_own_one_is_made_anew(
    orig: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "good.mp4").write_text("precious")
    (out / "sub" / "deep.mp4").mkdir()
    assert resize(orig, out) == 1
    told = capsys.readouterr().out
    assert f"{out}/good.mp4 is in the way" in told
    assert f"{out}/sub/deep.mp4 is in the way" in told
    assert (out / "good.mp4").read_text() == "precious"
    (out / "good.mp4").unlink()
    (out / "sub" / "deep.mp4").rmdir()
    assert resize(orig, out) == 1
    assert scan_video(out / "good.mp4").frames == scan_video(out / "sub" / "deep.mp4").frames == 4
    write_video(orig / "good.mp4", 9, frames=7)
    (out / "sub" / "deep.mp4").write_bytes((orig / "sub" / "deep.mp4").read_bytes())
    capsys.readouterr()
    assert resize(orig, out) == 1
    assert scan_video(out / "good.mp4").frames == 7
    assert (out / "sub" / "deep.mp4").read_bytes() == (orig / "sub" / "deep.mp4").read_bytes()
    assert "deep.mp4 is in the way" in capsys.readouterr().out


def test_videos_that_cannot_be_reached_cost_no_copy(orig: Path, tmp_path: Path) -> None:
    listed, out = csvs(tmp_path / "a", *ALL[:3]), tmp_path / "out"
    assert resize(orig, out, "--annotations", listed) == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.rglob("*.mp4")}
    orig.rename(tmp_path / "unmounted")
    assert resize(orig, out, "--annotations", listed) == 2
    orig.mkdir()
    assert resize(orig, out, "--annotations", listed) == 1
    orig.rmdir()
    (tmp_path / "unmounted").rename(orig)
    assert resize(orig, out, "--annotations", listed) == 0
    assert {p.name: p.stat().st_mtime_ns for p in out.rglob("*.mp4")} == before, "nothing is made again"


@pytest.mark.parametrize(
    "row",
    [
        "good.mp4,0,1,../victim.mp4",
        "good.mp4,0,1,a/../../victim.mp4",
        "good.mp4,0,1,{tmp}/victim.mp4",
        "missing.mp4,0,1,{tmp}/authorized_keys",
        "missing.mp4,0,1,../authorized_keys",
        "../secret.mp4,0,1,a.mp4",
        "{tmp}/secret.mp4,0,1,a.mp4",
        "good.mp4,0,1,resize.csv",
        "good.mp4,0,1,.parts/resize-0-of-1.jsonl",
        "good.mp4,0,1,a\0.mp4",
        "good.mp4,nan,1,a.mp4",
        "good.mp4,0,inf,a.mp4",
        "good.mp4,2,1,a.mp4",
        "good.mp4,0",
        "good.mp4,0,1,one.mp4\nsub/deep.mp4,0,1,one.mp4",
    ],
)
def test_hostile_segments_are_refused_with_their_line(
    orig: Path, tmp_path: Path, row: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("victim.mp4", "authorized_keys", "secret.mp4"):
        (tmp_path / name).write_text("precious")
    file = tmp_path / "segments.csv"
    file.write_text("source,start,end,path\n" + row.format(tmp=tmp_path) + "\n")
    before = state(tmp_path)
    assert resize(orig, tmp_path / "out", "--segments", file) == 2
    assert "segments.csv:" in capsys.readouterr().err
    assert state(tmp_path) == before


def test_videos_outside_the_folder_of_videos_are_refused_with_their_line(
    orig: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in ("/etc/x.mp4", "../x.mp4", tmp_path / "x.mp4"):
        assert resize(orig, tmp_path / "out", "--annotations", csvs(tmp_path / "a", "good.mp4", path)) == 2
        said = capsys.readouterr().err
        assert "train.csv:2: " in said
        assert "give a folder that holds them all as VIDEOS" in said
    assert not (tmp_path / "out").exists()


def test_annotations_are_never_rewritten_in_place(orig: Path, tmp_path: Path) -> None:
    listed = csvs(tmp_path / "a", "good.mp4", "old.mkv")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.csv").write_text("mine")
    (tmp_path / "c").symlink_to(listed)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.csv").symlink_to(listed / "train.csv")
    before = state(tmp_path)
    for folder in "abcd":
        assert resize(orig, tmp_path / "out", "--annotations", listed, "--write-annotations", tmp_path / folder) == 2
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert state(tmp_path) == before


def test_what_is_done_and_what_is_in_the_way_are_counted_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for name in "abc":
        write_video(videos / f"{name}.mp4", 0, frames=4)
    (videos / "text.mp4").write_text("no video")
    resize(videos, out)
    (out / "b.mp4").write_bytes(b"edited")
    capsys.readouterr()
    assert resize(videos, out) == 1
    said = capsys.readouterr()
    assert (
        "2 of 4 are done already, 1 of 4 have another file in the place of the copy, 1 of 4 failed before" in said.err
    )
    assert "4 videos, 2 copies, 2 failed, 0 waiting" in said.out
    assert (out / "b.mp4").read_bytes() == b"edited"


def forget(out: Path, what: str) -> None:
    """Leave `out` as the version before the record of digests did."""
    for file in out.glob(".multitrain-files*"):
        file.unlink()
    for journal in (out / ".parts").glob("*.jsonl"):
        if what == "table only":
            journal.unlink()
            continue
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        for record in records:
            for key in ("digest", "final"):
                record.pop(key, None)
        journal.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.mark.parametrize("what", ["journal", "table only"])
def test_copies_of_an_earlier_version_are_taken_as_they_are(orig: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    assert resize(orig, out) == 1
    forget(out, what)
    before = {p.name: p.stat().st_mtime_ns for p in out.rglob("*.mp4")}
    for _ in range(2):
        assert resize(orig, out) == 1
        assert {p.name: p.stat().st_mtime_ns for p in out.rglob("*.mp4")} == before
    write_video(orig / "good.mp4", 9, frames=7)
    forget(out, what)
    assert resize(orig, out) == 1
    assert scan_video(out / "good.mp4").frames == 7, "and replaced when the source has changed"


def test_copies_of_unknown_origin_are_taken_only_when_asked_and_only_if_they_are_the_same_video(
    orig: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert resize(orig, out) == 1
    shutil.rmtree(out / ".parts")
    (out / "resize.csv").unlink()
    shutil.copy(out / "sub" / "deep.mp4", out / "good.mp4")  # another video of the same length
    before = state(out)
    capsys.readouterr()
    assert resize(orig, out) == 1
    assert "3 failed" not in capsys.readouterr().out
    assert {p: s for p, s in state(out).items() if p in before and p.endswith(".mp4")} == {
        p: s for p, s in before.items() if p.endswith(".mp4")
    }
    assert resize(orig, out, "--adopt", "--json") == 1
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(told["failures"]) == {"broken.mp4", "good.mp4"}
    assert "in the way" in told["failures"]["good.mp4"]
    write_video(orig / "old.mkv", 5, frames=9)
    assert resize(orig, out, "--json") == 1
    assert "in the way" in json.loads(capsys.readouterr().out)["failures"]["old.mkv"], "an adopted file is not replaced"
    assert {p: s for p, s in state(out).items() if p in before and p.endswith(".mp4")} == {
        p: s for p, s in before.items() if p.endswith(".mp4")
    }


class Killed(BaseException):
    """In place of a signal that nobody can catch."""


@pytest.mark.parametrize("when", ["before the note", "before the move", "after the move"])
def test_a_kill_at_any_point_of_a_copys_way_is_resumed_and_what_came_in_its_place_stays(
    orig: Path, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from multitrain import files
    from multitrain.data.tools import parallel_map

    out, real, noting = tmp_path / "out", files._move, parallel_map.Journal.add

    def move(temporary: Path, path: Path, *, replace: bool) -> bool:
        if path.suffix == ".mp4" and when == "before the move":
            raise Killed
        moved = real(temporary, path, replace=replace)
        if path.suffix == ".mp4":
            raise Killed
        return moved

    def note(*arguments: Any) -> None:
        if when == "before the note":
            raise Killed
        noting(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_move", move)
        patch.setattr(parallel_map.Journal, "add", note)
        with pytest.raises(Killed):
            resize(orig, out)
    (out / "sub").mkdir(exist_ok=True)
    (out / "sub" / "deep.mp4").write_text("precious")
    for _ in range(2):
        assert resize(orig, out, "--json") == 1
        told = json.loads(capsys.readouterr().out)
        assert set(told["failures"]) == {"broken.mp4", "sub/deep.mp4"}
    assert (out / "sub" / "deep.mp4").read_text() == "precious"
    assert scan_video(out / "good.mp4").frames == scan_video(out / "old.mp4").frames == 4


def test_names_that_differ_in_case_only_never_become_one_copy(tmp_path: Path) -> None:
    orig, out = tmp_path / "orig", tmp_path / "out"
    orig.mkdir()
    write_video(orig / "A.mp4", 0, frames=3)
    write_video(orig / "b.mp4", 1, frames=4)
    if (orig / "a.mp4").exists():
        pytest.skip("this disk knows no case")
    write_video(orig / "a.mp4", 2, frames=5)
    assert resize(orig, out) == 0
    assert [scan_video(out / name).frames for name in ("A.mp4", "a.mp4", "b.mp4")] == [3, 5, 4]
