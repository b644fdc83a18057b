"""A long video is sought, not read whole, and the frames are those of a file that is read from its start, bit by bit."""

from __future__ import annotations

import math
import random
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from multitrain.data import packs
from multitrain.data.decode import VideoError, known_packets, open_video
from multitrain.data.decode.pyav import PyAVVideo
from tests.data.numbered import number_of, write_numbered

KEYS = {"x264-params": "keyint=12:min-keyint=12:bframes=3:scenecut=0"}
OPEN = {"x264-params": "keyint=12:min-keyint=12:bframes=4:scenecut=0:open-gop=1"}
MADE: dict[str, tuple[str, str, dict[str, str]]] = {
    "mp4": ("a.mp4", "libx264", KEYS),
    "open groups of pictures": ("a.mp4", "libx264", OPEN),
    "mov, all intra": ("a.mov", "libx264", {"g": "1"}),
    "mpeg4 mp4": ("a.mp4", "mpeg4", {"bf": "2", "g": "12"}),
    "vp9 mp4": ("a.mp4", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "intra refresh": ("a.mp4", "libx264", {"x264-params": "intra-refresh=1:bframes=0:keyint=10"}),
    "mkv": ("a.mkv", "libx264", OPEN),
    "vp8 with hidden frames": ("a.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "12"}),
    "transport stream": ("a.ts", "libx264", KEYS),
    "avi": ("a.avi", "mpeg4", {"bf": "2", "g": "12"}),
    "raw stream": ("a.h264", "libx264", KEYS),
}
BY_TABLES = {"mp4", "open groups of pictures", "mov, all intra", "mpeg4 mp4", "vp9 mp4", "intra refresh"}


@pytest.fixture(autouse=True)
def all_long(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every video is long enough to be sought, and none is known yet."""
    monkeypatch.setattr(known_packets, "LONG", 1)
    known_packets.forget()
    yield
    known_packets.forget()


def seen(path: Path | str, seed: int, *, whole: bool = False, some: bool = False) -> tuple[list[Any], bool]:
    """(what a video says and shows for some sets of frames, or its error; whether it is sought)."""
    rng = random.Random(seed)
    try:
        video = PyAVVideo(Path(path), math.inf, whole=whole)
        with video:
            count = video.frame_count
            if some:
                return [
                    count,
                    video.fps,
                    video.times(),
                    video.frames([rng.randrange(count) for _ in range(2)]),
                ], video._seeks
            starts = [rng.randrange(count) for _ in range(3)]
            sets = [[min(count - 1, s + 3 * i) for i in range(rng.choice([1, 4, 9]))] for s in starts]
            sets += [[rng.randrange(count) for _ in range(4)], [count - 1], [0]]
            return [count, video.fps, video.times(), *(video.frames(s) for s in sets)], video._seeks
    except VideoError as error:
        return [error.reason], False


def assert_equal(one: list[Any], other: list[Any], what: object) -> None:
    assert len(one) == len(other), what
    for a, b in zip(one, other):
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, what


def assert_sought_as_whole(path: Path, tar: Path | None, seed: int, *, some: bool = False) -> tuple[bool, bool]:
    """Compare a file, and a tar with it, indexed and known, with the file read from its start; whether each time it was sought."""
    expected, _ = seen(path, seed, whole=True, some=some)
    known_packets.forget()
    found = [seen(path, seed, some=some) for _ in range(2)]
    if tar is None:
        for values, _ in found:
            assert_equal(values, expected, path)
        return found[0][1], found[1][1]
    with tarfile.open(tar, "w") as out:
        out.add(path, "before/it.mp4")
        out.add(path, f"x/{path.name}")
    packs.forget()
    found += [seen(f"{tar}::x/{path.name}", seed, some=some) for _ in range(2)]
    for values, _ in found:
        assert_equal(values, expected, path)
    assert [sought for _, sought in found[:2]] == [sought for _, sought in found[2:]]
    return found[0][1], found[1][1]


@pytest.mark.parametrize("kind", MADE)
def test_a_sought_video_has_the_bits_of_a_whole_one(tmp_path: Path, kind: str) -> None:
    name, codec, options = MADE[kind]
    path = write_numbered(tmp_path / name, 90, codec=codec, options=options)
    first, again = assert_sought_as_whole(path, tmp_path / "one.tar", 1)
    assert first == (kind in BY_TABLES)
    assert again or kind in ("vp8 with hidden frames", "raw stream", "avi")


def test_odd_and_broken_files_are_sought_as_they_are_read_whole(shared: Path, tmp_path: Path) -> None:
    folders = ("videos", "bugs", "broken")
    files = [f for folder in folders for f in sorted((shared / folder).glob("*.*")) if f.suffix not in (".csv", ".md")]
    sought = 0
    for number, file in enumerate(f for f in files if f.is_file() and f.suffix != ".json"):
        tar = tmp_path / "one.tar" if number % 5 == 0 else None
        sought += assert_sought_as_whole(file, tar, number, some=True)[1]
    assert sought > 25


def test_damaged_tables_give_what_a_whole_read_gives(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 60, options=OPEN)
    content, rng, sought = path.read_bytes(), random.Random(3), 0
    at = content.index(b"stbl")
    for seed in range(120):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 2, 4])):
            damaged[rng.randrange(at, len(damaged))] = rng.randrange(256)
        (file := tmp_path / "b.mp4").write_bytes(damaged)
        known_packets.forget()
        expected = seen(file, seed, whole=True)[0]
        for _ in range(2):
            found, sought_here = seen(file, seed)
            assert_equal(found, expected, seed)
            sought += sought_here
    assert sought > 20


def long_file(path: Path) -> Path:
    """A file of 1.5 MB and 300 frames of noise, with a key frame every 12."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options=KEYS | {"preset": "ultrafast", "qp": "30"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for _ in range(300):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (96, 160, 3), np.uint8), "rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("place", ["file", "pack", "mkv"])
def test_a_clip_reads_a_small_part_of_the_file(tmp_path: Path, place: str) -> None:
    path = long_file(tmp_path / ("a.mkv" if place == "mkv" else "a.mp4"))
    if place == "pack":
        with tarfile.open(tmp_path / "b.tar", "w") as tar:
            tar.add(path, "a.mp4")
        path = tmp_path / "b.tar::a.mp4"
    size = (tmp_path / ("a.mkv" if place == "mkv" else "a.mp4")).stat().st_size
    assert size > 1 << 20
    with open_video(path) as video:
        video.frames([0])
    for first in (5, 150, 280):
        before = read_bytes()
        with open_video(path) as video:
            video.frames(range(first, first + 12))
        assert read_bytes() - before < 0.35 * size


def test_a_file_that_changes_is_indexed_again(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 40, options=KEYS)
    with open_video(path) as video:
        assert video.frame_count == 40
    write_numbered(path, 30, options=KEYS)
    with open_video(path) as video:
        assert [number_of(f) for f in video.frames([29, 3])] == [29, 3]


def test_what_is_not_as_the_index_says_is_read_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_numbered(tmp_path / "a.mp4", 60, options=KEYS)
    with open_video(path) as video:
        assert isinstance(video, PyAVVideo)
        assert video._seeks
        monkeypatch.setattr(PyAVVideo, "_seek", lambda self, time: self.container.seek(0, stream=self.stream))
        far = [number_of(f) for f in video.frames([50, 20])]
        monkeypatch.setattr(video._listed, "holds", lambda number, packet: False)
        assert [number_of(f) for f in video.frames([50, 20])] == far == [50, 20]
        assert not video._seeks
    for _ in range(2):  # known now
        with open_video(path) as video:
            assert isinstance(video, PyAVVideo)
            assert not video._seeks


def test_a_file_that_is_replaced_while_it_is_open_is_no_silent_mix(tmp_path: Path) -> None:
    path = long_file(tmp_path / "a.mp4")
    other = write_numbered(tmp_path / "b.mp4", 50, options=OPEN)
    with open_video(path) as video:
        shutil.copyfile(other, path)
        with pytest.raises(VideoError) as caught:
            video.frames([250])
    assert "changed while it was read" in caught.value.reason
    assert caught.value.transient


def test_the_cache_of_packets_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_packets, "MAX_BYTES", 9000)
    for number in range(6):
        with open_video(write_numbered(tmp_path / f"{number}.mp4", 40, options=KEYS)) as video:
            video.frames([number])
    assert 1 <= len(known_packets._known) < 6
    assert sum(known.nbytes for known in known_packets._known.values()) <= 9000
