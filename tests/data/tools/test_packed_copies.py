"""`data resize --pack`: the copies of `data resize`, in shards, and never as files; whole shards after a kill at any moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from multitrain.cli import main
from multitrain.data import packs
from multitrain.data.tools.packed_copies import Growing, Job, ResizeShard
from multitrain.data.tools.packing import Item
from multitrain.data.tools.parallel_map import FINAL
from multitrain.data.tools.resize import Encoding, Resize
from tests.support import write_video

pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here")


def resize(*words: object) -> int:
    return main(["data", "resize", *map(str, words), "--short-side", "32", "--preset", "ultrafast", "--workers", "1"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos and their annotations; some names are not those of the copies."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("c0", "c1", "lists"):
        (folder / name).mkdir()
    for i in range(10):
        write_video(folder / f"c{i % 2}" / f"v{i}.{'mkv' if i % 3 else 'mp4'}", i, frames=9)
    names = [f"c{i % 2}/v{i}.{'mkv' if i % 3 else 'mp4'} {i % 2}\n" for i in range(10)]
    (folder / "lists" / "train.csv").write_text("".join(names[:7]))
    (folder / "lists" / "val.csv").write_text("".join(names[7:]))
    return folder


def content(out: Path) -> dict[str, bytes]:
    packs.forget()
    pack = packs.open_pack(out)
    assert pack is not None
    return {video.name: packs.read_stored(video) for video in pack}


def test_the_shards_hold_the_bits_of_the_copies(source: Path, tmp_path: Path) -> None:
    lists = source / "lists"
    assert resize(source, tmp_path / "files", "--annotations", lists) == 0
    words = ("--annotations", lists, "--pack", "--shard-videos", 3, "--write-annotations", tmp_path / "new")
    for part in ("1/2", "0/2"):  # tasks of an array
        packs.forget()
        assert packs.open_pack(tmp_path / "packed") is None
        assert resize(source, tmp_path / "packed", *words, "--shard", part) == 0
    files = {str(f.relative_to(tmp_path / "files")): f.read_bytes() for f in (tmp_path / "files").glob("c*/*.mp4")}
    assert len(files) == 10
    assert content(tmp_path / "packed") == files
    assert (tmp_path / "new" / "val.csv").read_text() == "c1/v7.mp4 1\nc0/v8.mp4 0\nc1/v9.mp4 1\n"
    assert sorted((tmp_path / "packed" / "resize.csv").read_text().splitlines()[1:]) == sorted(
        (tmp_path / "files" / "resize.csv").read_text().splitlines()[1:]
    )
    assert not list((tmp_path / "packed").rglob("*.mp4"))
    assert not list((tmp_path / "packed" / ".parts").glob("growing*"))
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "packed").glob("*.tar")}
    assert len(stamps) == 4
    assert resize(source, tmp_path / "packed", *words) == 0
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "packed").glob("*.tar")} == stamps


def test_few_files_exist_at_any_moment_and_a_kill_leaves_whole_shards_only(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "multitrain.cli", "data", "resize", str(source), str(out), "--pack"]
    command += ["--short-side", "32", "--preset", "ultrafast", "--workers", "2", "--shard-videos", "4"]
    most, begun = 0, 0
    for turn in range(3):
        running = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 600
        logs = 0
        while running.poll() is None and logs < begun + 1 + turn and time.monotonic() < deadline:
            names = [Path(folder) / name for folder, _, files in os.walk(out) for name in files]
            most = max(most, len(names))
            logs = sum(_lines(log) for log in names if log.name == "copies.jsonl") + 4 * sum(
                n.suffix == ".tar" for n in out.glob("*")
            )
            time.sleep(0.005)
        begun = logs
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        for shard in out.glob("*.tar"):
            with tarfile.open(shard, "r:") as tar:
                assert len(tar.getnames()) in (4, 2)
        while any(_lives(folder) for folder in (out / ".parts").glob("growing*")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert resize(source, tmp_path / "files") == 0
    files = {str(f.relative_to(tmp_path / "files")): f.read_bytes() for f in (tmp_path / "files").glob("c*/*.mp4")}
    assert content(out) == files
    assert not list((out / ".parts").glob("growing*"))
    assert most < 20


def _lines(log: Path) -> int:
    try:
        return max(0, log.read_bytes().count(b"\n") - 1)
    except OSError:
        return 0


def _lives(folder: Path) -> bool:
    return Path(f"/proc/{folder.name.split('@')[3]}").exists()


def job_of(source: Path, names: list[str]) -> Job:
    sources = tuple(f"c{i % 2}/v{i}.{'mkv' if i % 3 else 'mp4'}" for i in range(len(names)))
    return Job(Item("shard-000000.tar", tuple(names), None), sources, ["version"])


def test_a_shard_that_an_ended_process_left_is_continued(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tmp_path / ".parts"
    parts.mkdir()
    work = ResizeShard(Resize(source, tmp_path, Encoding(32, preset="ultrafast"), 60), parts, False)
    job, made = job_of(source, ["a.mp4", "b.mp4", "c.mp4"]), []
    plain = Resize.__call__

    def killed_at_third(self: Resize, item: Any) -> dict[str, Any]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(item.copy.target)
        return plain(self, item)

    monkeypatch.setattr(Resize, "__call__", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        work(job)
    (left,) = parts.glob("growing*")
    with open(left / "shard.tar", "ab") as torn:
        torn.write(b"half a copy")
    _, shard, host, _, *rest = left.name.split("@")
    left.rename(parts / "@".join(["growing", shard, host, "4194305", *rest]))  # no process has this number
    monkeypatch.setattr(Resize, "__call__", plain)
    began = [json.loads(line)["name"] for line in next(parts.glob("growing*/now.jsonl")).read_text().splitlines()]
    assert began == ["a.mp4", "b.mp4", "c.mp4"]
    record = work(job)
    assert made == ["a.mp4", "b.mp4"]
    (done,) = parts.glob("growing*")
    assert record["part"] == f"{done.name}/shard.tar"
    began = [json.loads(line)["name"] for line in (done / "now.jsonl").read_text().splitlines()]
    assert began == ["a.mp4", "b.mp4", "c.mp4", "c.mp4"], "only the third was made again"
    with tarfile.open(done / "shard.tar", "r:") as tar:
        assert tar.getnames() == ["a.mp4", "b.mp4", "c.mp4"]


def test_a_shard_of_other_copies_or_changed_files_is_begun_anew(source: Path, tmp_path: Path) -> None:
    job = job_of(source, ["a.mp4"])
    versions = {"a.mp4": [1, 2]}
    for number, (other, at) in enumerate(((job._replace(version=["other"]), versions), (job, {"a.mp4": [1, 3]}))):
        (parts := tmp_path / str(number)).mkdir()
        growing = Growing.open(parts, job, versions)
        growing.add("a.mp4", source / "c0" / "v0.mp4", {"source": [1, 2]})
        growing.folder.rename(parts / "growing@shard-000000.tar@@4194305@@00000000")
        os.utime(parts / "growing@shard-000000.tar@@4194305@@00000000" / "copies.jsonl", (0, 0))
        os.utime(parts / "growing@shard-000000.tar@@4194305@@00000000", (0, 0))
        assert not Growing.open(parts, other, at).done
        assert len(list(parts.glob("growing*"))) == 1


def test_a_shard_that_another_process_took_over_is_left_to_it(source: Path, tmp_path: Path) -> None:
    growing = Growing.open(tmp_path, job_of(source, ["a.mp4"]), {})
    growing.folder.rename(tmp_path / "growing@shard-000000.tar@x@1@@00000000")
    with pytest.raises(FileNotFoundError):
        growing.log("a.mp4", {"error": "x", FINAL: True})


def test_a_video_that_cannot_be_copied_is_named_and_left_out_only_on_request(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(source, videos)
    (videos / "c0" / "bad.mp4").write_text("no video")
    words = (videos, tmp_path / "out", "--pack", "--shard-videos", 20)
    assert resize(*words) == 1
    said = capsys.readouterr()
    assert "c0/bad.mp4: no video format" in said.out
    assert "--leave-out" in said.err
    assert not list((tmp_path / "out").glob("*.tar"))
    assert resize(*words, "--leave-out") == 1
    assert len(content(tmp_path / "out")) == 10
    assert 'c0/bad.mp4,c0/bad.mp4,failed,"no video format' in (tmp_path / "out" / "resize.csv").read_text()
    for wrong in (("--leave-out",), ("--pack", "--segments", videos / "s.csv"), ("--pack", "--adopt")):
        with pytest.raises(SystemExit) as refused:
            resize(videos, tmp_path / "x", *wrong)
        assert refused.value.code == 2


@pytest.mark.parametrize("name", ["shard.tar", "copies.jsonl", "now.jsonl"])
@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_links_in_a_shard_that_grows_lead_to_nothing_else(source: Path, tmp_path: Path, name: str, link: str) -> None:
    (tmp_path / "parts").mkdir()
    job = job_of(source, ["a.mp4"])
    growing = Growing.open(tmp_path / "parts", job, {"a.mp4": [1, 2]})
    growing.add("a.mp4", source / "c0" / "v0.mp4", {"source": [1, 2]})
    mine = tmp_path / "mine"
    content = (growing.folder / name).read_bytes() if name != "now.jsonl" else b""
    mine.write_bytes(content)
    (growing.folder / name).unlink(missing_ok=True)
    (growing.folder / name).symlink_to(mine) if link == "symbolic" else (growing.folder / name).hardlink_to(mine)
    _, shard, host, _, *rest = growing.folder.name.split("@")
    growing.folder.rename(tmp_path / "parts" / "@".join(["growing", shard, host, "4194305", *rest]))
    again = Growing.open(tmp_path / "parts", job, {"a.mp4": [1, 2]})
    assert not again.done
    again.add("a.mp4", source / "c0" / "v0.mp4", {"source": [1, 2]})
    assert mine.read_bytes() == content
