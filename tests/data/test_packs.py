"""Packed videos: a dataset's `videos:` may be a pack, and nothing else changes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from support import settings

from multitrain.cli import main
from multitrain.config import ConfigError, validate
from multitrain.data import packs
from multitrain.data.catalog import open_catalogs, plan_of, summary
from multitrain.data.clips import Task, TrainClipFn
from multitrain.data.decode import VideoError, open_video
from multitrain.data.index import _MAGIC, read_header
from multitrain.data.packs import BLOCK, INDEX, Pack, find_packed, open_pack
from multitrain.data.tools.packing import Unpack
from multitrain.data.tools.scan import ScanFile

NAMES = ("stride", "segment", "with.dot")


def pack(videos: Path, out: Path, *more: str) -> int:
    return main(["data", "pack", str(videos), str(out), "--workers", "1", "--shard-videos", "4", *more])


@pytest.fixture(scope="module")
def packed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets of `videos`, packed, each beside its csv files."""
    folder = tmp_path_factory.mktemp("packed")
    for name in NAMES:
        assert pack(videos / name, folder / name, "--annotations", str(videos / name)) == 0
    return folder


@pytest.fixture
def one(videos: Path, packed: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A pack that a test may damage, and the folder of its files."""
    shutil.copytree(packed / "stride", tmp_path / "pack")
    return tmp_path / "pack", videos / "stride"


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_packed_video_has_the_frames_of_its_file_by_one_read(
    videos: Path, packed: Path, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decoder == "decord":
        pytest.importorskip("decord")
    reads = []
    real = os.pread
    monkeypatch.setattr(packs.os, "pread", lambda *call: reads.append(call) or real(*call))  # type: ignore[func-returns-value]
    files = sorted((videos / "stride").rglob("*.mp4"))
    for file in files:
        path = packed / "stride" / file.relative_to(videos / "stride")
        assert not path.exists()
        with open_video(file, decoder) as loose, open_video(path, decoder) as stored:  # type: ignore[arg-type]
            assert (stored.fps, stored.times()) == (loose.fps, loose.times())
            every = range(loose.frame_count)
            assert np.array_equal(loose.frames(every), stored.frames(every))
    assert len(reads) == len(files) * (1 if decoder == "pyav" else 2)


def test_odd_files_decode_from_memory_as_from_disk(shared: Path, tmp_path: Path) -> None:
    endings = (".mp4", ".avi", ".webm", ".mkv", ".ts", ".mov", ".mpg", ".flv")
    sources = [f for f in sorted((shared / "bugs").iterdir()) if f.suffix in endings]
    for file in sources:
        shutil.copy(file, tmp_path)
    content = {}
    with tarfile.open(tmp_path / "odd.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for file in sources:
            tar.add(file, file.name)
    for file in sources:
        for path in (tmp_path / file.name, tmp_path / f"odd.tar::{file.name}"):
            try:
                with open_video(path) as video:
                    some = np.unique(np.linspace(0, video.frame_count - 1, 4).astype(int))
                    found: object = (video.frame_count, video.fps, video.frames(some).tobytes())
            except VideoError as error:
                found = error.reason
            content.setdefault(file.name, []).append(found)
    assert len(content) > 5
    assert [name for name, (loose, stored) in content.items() if loose != stored] == []


def test_a_run_on_shards_has_the_plan_and_the_clips_of_a_run_on_files(
    videos: Path, packed: Path, tmp_path: Path
) -> None:
    loose = settings(videos)
    stored = settings(videos)
    for name in NAMES:
        stored["data"]["datasets"][name]["videos"] = str(packed / name)
    jobs = []
    for mapping in (loose, stored):
        config = validate(mapping)
        catalogs = open_catalogs(config.data, "train", tmp_path)
        jobs.append(TrainClipFn(catalogs, plan_of(config, catalogs), config))
    assert jobs[0].plan.fingerprint == jobs[1].plan.fingerprint
    for sample in jobs[0].plan.samples(0, 12):
        out = [np.zeros(job.shape, job.dtype) for job in jobs]
        clips = [job.run(Task(0, sample), buffer) for job, buffer in zip(jobs, out)]
        assert np.array_equal(*out)
        assert np.array_equal(clips[0].keys, clips[1].keys)
        assert clips[1].skipped == []


def test_shards_are_plain_tars_of_a_fixed_number_of_videos(videos: Path, packed: Path) -> None:
    index = open_pack(packed / "stride")
    assert index is not None
    assert len(index) == 11
    shards = sorted((packed / "stride").glob("*.tar"))
    for shard, count in zip(shards, (4, 4, 3), strict=True):
        with tarfile.open(shard, "r:") as tar:
            assert len(tar.getnames()) == count
            for member in tar:
                assert tar.extractfile(member).read() == (videos / "stride" / member.name).read_bytes()  # type: ignore[union-attr]
    assert len(list((packed / "stride").iterdir())) == len(shards) + 3  # index, record, journals


def test_every_flipped_byte_is_named_by_video(one: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = one
    index = open_pack(folder)
    assert index is not None
    stored = sorted(index)[5]
    content = bytearray(stored.shard.read_bytes())
    places = (stored.offset, stored.offset + stored.size - 1, stored.offset - BLOCK + 3, stored.offset + stored.size)
    for turn, place in enumerate(places):
        damaged = bytearray(content)
        damaged[place] ^= 1
        stored.shard.write_bytes(damaged)
        out = tmp_path / f"checked{turn}"
        assert main(["data", "check", str(folder), "--out", str(out), "--workers", "1"]) == 1
        found = [line for line in (out / "check.csv").read_text().splitlines() if "damaged" in line]
        assert len(found) == 1
        assert stored.name in found[0]
    stored.shard.write_bytes(damaged[: stored.offset + 10])
    with pytest.raises(VideoError, match="cut off"):
        open_video(folder / stored.name)


def test_a_damaged_index_is_named(one: tuple[Path, Path]) -> None:
    folder, _ = one
    content = (folder / INDEX).read_bytes()
    for wrong in (content[:-1], content[:100], b"", b"text"):
        (folder / INDEX).write_bytes(wrong)
        packs.forget()
        assert main(["data", "check", str(folder), "--out", str(folder / "c")]) == 2
    packs.forget()


def test_an_index_of_a_stranger_names_no_file_elsewhere_and_takes_no_memory(one: tuple[Path, Path]) -> None:
    folder, _ = one
    index = open_pack(folder)
    assert index is not None
    stored = next(iter(index))
    for header, wrong in (({}, stored._replace(size=1 << 50)), ({"shards": ["/etc/passwd"]}, stored)):
        parts = packs.index_parts([wrong], [stored.shard.name], {"rows": {}, **header})
        (folder / INDEX).write_bytes(b"".join(bytes(p) for p in parts))
        packs.forget()
        with pytest.raises((VideoError, ConfigError), match=r"cut off|lies elsewhere"):
            open_video(folder / stored.name)
    packs.forget()


def test_only_files_are_resized_or_packed(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("resize", "pack"):
        assert main(["data", verb, str(packed / "stride"), str(tmp_path / "out")]) == 2
        assert "data unpack" in capsys.readouterr().err


def test_unpacked_files_are_the_packed_ones(one: tuple[Path, Path], tmp_path: Path) -> None:
    folder, files = one
    for _ in range(2):
        assert main(["data", "unpack", str(folder), str(tmp_path / "out"), "--workers", "1"]) == 0
    for file in files.rglob("*.mp4"):
        assert (tmp_path / "out" / file.relative_to(files)).read_bytes() == file.read_bytes()


def test_a_shard_that_is_missing_is_named_by_every_reader(one: tuple[Path, Path], tmp_path: Path) -> None:
    stored = next(iter(Pack(one[0])))
    stored.shard.unlink()
    packs.forget()
    says = f"{stored.shard}: No such file or directory"
    assert Unpack(one[0], tmp_path / "out")([stored])["unreadable"] == [[stored.name, says]]
    assert ScanFile()(str(one[0] / stored.name))["error"] == says
    with pytest.raises(VideoError, match=re.escape(says)):
        open_video(one[0] / stored.name)


def test_a_video_that_cannot_be_read_is_named_and_left_out_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    for i in range(6):
        (source / f"{i}.mp4").write_bytes(b"%d" % i * 700)
    (source / "3.mp4").write_bytes(b"")
    (tmp_path / "train.csv").write_text("".join(f"{i}.mp4 0\n" for i in range(7)))
    annotations = ("--annotations", str(tmp_path))
    assert pack(source, tmp_path / "out", *annotations) == 1
    said = capsys.readouterr().out
    assert "3.mp4: empty file" in said
    assert "6.mp4: No such file" in said
    assert not (tmp_path / "out" / INDEX).exists()
    assert pack(source, tmp_path / "out", *annotations, "--leave-out") == 1
    assert "3.mp4: empty file" in capsys.readouterr().out
    index = open_pack(tmp_path / "out")
    assert index is not None
    assert len(index) == 5
    (source / "3.mp4").write_bytes(b"mended")
    (source / "6.mp4").write_bytes(b"found")
    assert pack(source, tmp_path / "out", *annotations) == 0
    index = open_pack(tmp_path / "out")
    assert index is not None
    assert len(index) == 7


def test_nothing_of_anybody_else_is_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    (source / "a.mp4").write_bytes(b"a")
    assert pack(source, source) == 2
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-000000.tar").write_bytes(b"somebody's")
    assert pack(source, out) == 2
    assert (out / "shard-000000.tar").read_bytes() == b"somebody's"
    (out / "shard-000000.tar").unlink()
    (out / INDEX).write_bytes(b"somebody's")
    assert pack(source, out) == 2
    for line in ("/etc/passwd 0", "../a.mp4 0"):
        (tmp_path / "train.csv").write_text(line + "\n")
        assert pack(source, tmp_path / "new", "--annotations", str(tmp_path)) == 2
    assert [p.name for p in source.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("name", ["é\udce9 \n.mp4", "x" * 90 + "/" + "y" * 120 + ".mp4", "d/" * 90 + "z.mp4"])
def test_names_of_any_kind_are_found_again(tmp_path: Path, name: str) -> None:
    file = tmp_path / "videos" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"bytes")
    assert pack(tmp_path / "videos", tmp_path / "out") == 0
    assert packs.read(tmp_path / "out" / name) == b"bytes"
    stored = find_packed(tmp_path / "out" / name)
    assert stored is not None
    assert packs.framing_error(stored) == ""


def test_parts_of_an_array_together_write_the_index(tmp_path: Path) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    for i in range(23):
        (source / f"{i}.mp4").write_bytes(os.urandom(600))
    for part in (1, 0, 2):
        assert not (tmp_path / "out" / INDEX).exists()
        assert pack(source, tmp_path / "out", "--shard", f"{part}/3") == 0
    index = open_pack(tmp_path / "out")
    assert index is not None
    assert len(index) == 23
    assert all(packs.read(tmp_path / "out" / f.name) == f.read_bytes() for f in source.iterdir())


def test_a_kill_at_any_moment_leaves_whole_shards_only(tmp_path: Path) -> None:
    source, out = tmp_path / "videos", tmp_path / "out"
    source.mkdir()
    for i in range(60):
        (source / f"{i}.mp4").write_bytes(os.urandom(100_000))
    command = [sys.executable, "-m", "multitrain.cli", "data", "pack", str(source), str(out)]
    command += ["--workers", "2", "--shard-videos", "3"]
    for turn in range(4):
        running = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 600
        while len(list(out.glob("*.tar"))) < 3 * turn and time.monotonic() < deadline and running.poll() is None:
            time.sleep(0.01)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        for shard in out.glob("*.tar"):
            with tarfile.open(shard, "r:") as tar:
                assert len(tar.getnames()) == 3
    deadline = time.monotonic() + 600
    while any(map(_lives, (out / ".parts").glob("*.tar"))):  # a worker may outlive its killed command a little
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(2):  # the next command removes what it left
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    packs.forget()
    assert all(packs.read(out / f.name) == f.read_bytes() for f in source.iterdir())
    assert not any((out / ".parts").glob("*.tar"))


def _lives(part: Path) -> bool:
    """Whether the worker that writes a part of a pack is there still."""
    return Path(f"/proc/{part.name.rsplit('-', 2)[1]}").exists()


def test_json_says_what_was_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"a")
    assert pack(tmp_path / "videos", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "shards": 1, "waiting": 0, "videos": 1, "left_out": 0, "failures": {},
    }  # fmt: skip


def test_a_window_over_other_shards_than_the_packed_ones_is_said(
    videos: Path, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mapping = settings(videos, data__shuffle_window=2, data__shard_videos=4)
    for name in NAMES:
        mapping["data"]["datasets"][name]["videos"] = str(packed / name)
    summary(validate(mapping), tmp_path)
    assert "packed with" not in caplog.text
    mapping["data"]["shard_videos"] = 5
    summary(validate(mapping), tmp_path)
    assert "packed with 4 videos a shard for 11 lines" in caplog.text


def test_an_index_that_claims_more_than_it_holds_is_refused(one: tuple[Path, Path]) -> None:
    index = one[0] / INDEX
    whole, header = index.read_bytes(), read_header(index)
    size = len(_MAGIC) + 8
    length = int.from_bytes(whole[len(_MAGIC) : size], "little")
    header["arrays"][5][2] -= 2 * np.dtype(header["arrays"][5][0]).itemsize
    short = whole[:size] + json.dumps(header).encode().ljust(length) + whole[size + length :]
    huge = whole[: len(_MAGIC)] + (1 << 60).to_bytes(8, "little") + whole[size:]
    for content, said in ((short, "do not fit together"), (huge, "cut off")):
        index.write_bytes(content)
        with pytest.raises(ConfigError, match=f"damaged .*{said}"):
            Pack(index.parent)
