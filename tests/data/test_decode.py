"""The frame asked for is the frame that comes back, and a file that cannot be read says why."""

from __future__ import annotations

import csv
import os
import pickle
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import multitrain.data.decode as decode
from multitrain.config import ConfigError
from multitrain.data.decode import VideoError, open_video, pyav
from multitrain.data.decode.pyav import PyAVVideo
from tests import material
from tests.data.numbered import number_of, numbered_frame, write_numbered

ORDERS = {"one": [17], "window": list(range(5, 40, 3)), "backwards": [39, 20, 3, 0], "repeats": [2, 2, 39, 39, 2]}
ENCODINGS = {
    "mp4": ("a.mp4", "libx264", {}),
    "open groups of pictures": ("a.mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=4:scenecut=0"}),
    "pyramid of b-frames": ("a.mp4", "libx264", {"x264-params": "keyint=250:bframes=8:b-pyramid=normal"}),
    "intra refresh": ("a.mp4", "libx264", {"x264-params": "intra-refresh=1:bframes=0:keyint=10"}),
    "all intra": ("a.mp4", "libx264", {"g": "1"}),
    "mkv": ("a.mkv", "libx264", {"g": "10"}),
    "transport stream": ("a.ts", "libx264", {"g": "10"}),
    "avi without presentation times": ("a.avi", "libx264", {"bf": "3", "g": "10"}),
    "raw stream": ("a.h264", "libx264", {"bf": "3", "g": "10"}),
    "mpeg4 avi": ("b.avi", "mpeg4", {"bf": "2", "g": "12"}),
    "mpeg2": ("a.mpg", "mpeg2video", {"bf": "2", "g": "12"}),
    "vp9": ("a.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "vp8 with hidden frames": ("b.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "arnr-maxframes": "7"}),
    "av1": ("c.mp4", "libsvtav1", {"preset": "10", "svtav1-params": "hierarchical-levels=4:lp=1"}),
    "hevc": ("b.mp4", "libx265", {"x265-params": "log-level=none:keyint=15"}),
}


def numbers(frames: np.ndarray) -> list[int]:
    return [number_of(f) for f in frames]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_frames_are_those_asked_for(tmp_path: Path, encoding: str) -> None:
    name, codec, options = ENCODINGS[encoding]
    path = write_numbered(tmp_path / name, 40, codec=codec, options=options)
    with open_video(path) as video:
        assert video.frame_count == 40
        for order in ORDERS.values():
            frames = video.frames(order)
            assert frames.shape == (len(order), 64, 96, 3)
            assert frames.dtype == np.uint8
            assert numbers(frames) == order


@pytest.mark.parametrize("encoding", ["mp4", "mkv", "vp9", "all intra"])
def test_decord_gives_the_same_frames(tmp_path: Path, encoding: str) -> None:
    pytest.importorskip("decord")
    name, codec, options = ENCODINGS[encoding]
    path = write_numbered(tmp_path / name, 40, codec=codec, options=options)
    with open_video(path, "decord") as video, open_video(path) as ours:
        assert (video.frame_count, video.fps) == (40, ours.fps)
        for order in ORDERS.values():
            assert np.array_equal(video.frames(order), ours.frames(order))


def test_a_sparse_decode_has_the_bits_of_a_full_one(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 90, options={"x264-params": "keyint=30:bframes=6:open-gop=1"})
    rng = np.random.default_rng(0)
    with open_video(path) as video:
        everything = video.frames(range(90))
    for _ in range(30):
        wanted = rng.integers(0, 90, int(rng.integers(1, 12)))
        with open_video(path) as video:
            assert np.array_equal(video.frames(wanted), everything[wanted])


def test_unwanted_pictures_that_nothing_refers_to_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_numbered(
        tmp_path / "a.mp4", 60, options={"x264-params": "keyint=60:bframes=3:b-adapt=0:b-pyramid=none"}
    )
    given = []
    original = PyAVVideo._decode

    def counted(self: PyAVVideo, packet: object) -> list[object]:
        frames = original(self, packet)  # type: ignore[arg-type]
        given.extend(frames)
        return frames  # type: ignore[return-value]

    monkeypatch.setattr(PyAVVideo, "_decode", counted)
    with open_video(path) as video:
        assert numbers(video.frames([0, 59])) == [0, 59]
    assert len(given) < 30


def test_a_window_late_in_the_file_starts_at_its_key_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_numbered(tmp_path / "a.mp4", 60, options={"x264-params": "keyint=10:scenecut=0"})
    fed = []
    original = PyAVVideo._decode

    def counted(self: PyAVVideo, packet: object) -> list[object]:
        fed.append(packet)
        return original(self, packet)  # type: ignore[arg-type,return-value]

    monkeypatch.setattr(PyAVVideo, "_decode", counted)
    with open_video(path) as video:
        assert numbers(video.frames([55])) == [55]
    assert len(fed) <= 11


def test_files_too_large_to_hold_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_numbered(tmp_path / "a.mp4", 40, options={"g": "10"})
    monkeypatch.setattr(pyav, "MAX_CACHED_BYTES", 2000)
    with open_video(path) as video:
        for order in ORDERS.values():
            assert numbers(video.frames(order)) == order


def test_a_variable_rate_is_counted_in_frames_not_in_time(tmp_path: Path) -> None:
    times = [0, 1, 2, 10, 11, 30, 31, 32, 60, 90]
    path = write_numbered(tmp_path / "a.mp4", 10, times=times, options={"bf": "0"})
    with open_video(path) as video:
        assert video.frame_count == 10
        assert numbers(video.frames(range(10))) == list(range(10))
        assert 2.5 < video.fps < 4


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_videos_of_one_and_two_frames(tmp_path: Path, count: int, backend: decode.Backend) -> None:
    if backend == "decord":
        pytest.importorskip("decord")
    path = write_numbered(tmp_path / "a.mp4", count)
    with open_video(path, backend) as video:
        assert video.frame_count == count
        assert numbers(video.frames([0] * 4 + [count - 1])) == [0] * 4 + [count - 1]


def test_frames_outside_the_video_are_refused(tmp_path: Path) -> None:
    with open_video(write_numbered(tmp_path / "a.mp4", 5)) as video:
        for indices in ([5], [-1], []):
            with pytest.raises(IndexError):
                video.frames(indices)
            with pytest.raises(IndexError):
                next(video.each(indices))


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("encoding", ["open groups of pictures", "avi without presentation times"])
def test_frames_one_by_one_are_the_frames_at_once(tmp_path: Path, encoding: str, backend: decode.Backend) -> None:
    if backend == "decord":
        pytest.importorskip("decord")
    name, codec, options = ENCODINGS[encoding]
    path = write_numbered(tmp_path / name, 40, codec=codec, options=options)
    wanted = [39, 2, 2, *range(20, 38), 0]
    with open_video(path, backend) as video:
        at_once = video.frames(wanted)
        one_by_one = dict(video.each(wanted))
        assert list(one_by_one) == sorted(set(wanted))
        for number, frame in zip(wanted, at_once):
            np.testing.assert_array_equal(one_by_one[number], frame)


def test_frames_can_be_left_half_way_and_asked_for_again(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 40, options={"bf": "3"})
    with open_video(path) as video:
        assert next(video.each(range(20)))[0] == 0
        assert numbers(video.frames([5, 39])) == [5, 39]


def with_matrix(source: Path, target: Path, matrix: tuple[int, int, int, int]) -> Path:
    """A copy of an mp4 file whose track header has the display matrix (a, b, c, d)."""
    content = bytearray(source.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (x * 65536 for x in matrix)
    for i, value in enumerate((a, b, 0, c, d, 0, 0, 0, 1 << 30)):
        content[at + 4 * i : at + 4 * i + 4] = value.to_bytes(4, "big", signed=True)
    target.write_bytes(content)
    return target


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((1, 0, 0, 1), lambda x: x),
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
    ],
)
def test_frames_are_turned_and_mirrored_as_the_file_says(
    tmp_path: Path, matrix: tuple[int, ...], turned: object
) -> None:
    plain = write_numbered(tmp_path / "a.mp4", 3)
    with open_video(plain) as video, open_video(with_matrix(plain, tmp_path / "b.mp4", matrix)) as other:  # type: ignore[arg-type]
        assert np.array_equal(other.frames([1])[0], turned(video.frames([1])[0]))  # type: ignore[operator]


def test_the_best_video_stream_is_taken_whatever_else_is_in_the_file(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        small = container.add_stream("libx264", rate=30)
        large = container.add_stream("libx264", rate=30)
        for stream, size in ((small, (64, 64)), (large, (96, 64))):
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        large.disposition = av.stream.Disposition.default
        for n in range(8):
            container.mux(large.encode(av.VideoFrame.from_ndarray(numbered_frame(n, 96, 64), format="rgb24")))
            if n < 3:
                container.mux(small.encode(av.VideoFrame.from_ndarray(numbered_frame(9, 64, 64), format="rgb24")))
        container.mux([*large.encode(), *small.encode()])
    with open_video(path) as video:
        assert video.frame_count == 8
        assert numbers(video.frames([0, 7])) == [0, 7]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "empty file"),
        (b"text " * 100, "no video format"),
        ("folder", "not a file of bytes"),
    ],
)
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_what_is_no_video_says_so(tmp_path: Path, content: object, reason: str, backend: decode.Backend) -> None:
    if backend == "decord":
        pytest.importorskip("decord")
    path = tmp_path / "x.mp4"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(VideoError, match=reason) as caught:
        open_video(path, backend)
    assert caught.value.path == path
    assert str(path) not in caught.value.reason
    assert "\n" not in str(caught.value)
    assert not caught.value.transient


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.mp4")
    began = time.monotonic()
    with pytest.raises(VideoError, match="pipe"):
        open_video(tmp_path / "x.mp4")
    assert time.monotonic() - began < 30, "opening a pipe waits for a writer, without end"


def test_a_cut_off_file_has_the_frames_that_are_there(tmp_path: Path) -> None:
    options = {"movflags": "faststart", "g": "10"}
    whole = write_numbered(tmp_path / "a.mkv", 40, options=options)
    (tmp_path / "b.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with open_video(tmp_path / "b.mkv") as video:
        assert 5 < video.frame_count < 40
        wanted = list(range(video.frame_count))
        assert numbers(video.frames(wanted)) == wanted


def test_the_time_limit_ends_a_decode(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 40)
    with pytest.raises(VideoError, match=r"longer than data\.decode_timeout"):
        open_video(path, timeout=0.0)
    with open_video(path, timeout=3) as video:
        video.frames([3])
        time.sleep(3.2)
        with pytest.raises(VideoError, match=r"longer than data\.decode_timeout"):
            video.frames([3])


def test_video_errors_travel_between_processes(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(VideoError(tmp_path / "x", "because\n of it", transient=True)))
    assert (error.path, error.reason, error.transient) == (tmp_path / "x", "because of it", True)
    assert str(error) == f"{tmp_path / 'x'}: because of it"


def test_a_missing_decord_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    with pytest.raises(ConfigError, match=r"pip install 'multitrain\[decord\]'"):
        open_video(write_numbered(tmp_path / "a.mp4", 2), "decord")


def test_decoding_leaks_neither_files_nor_threads(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 12)
    broken = tmp_path / "b.mp4"
    broken.write_bytes(path.read_bytes()[:300])

    def use() -> None:
        with open_video(path) as video:
            video.frames([3])
        with pytest.raises(VideoError):
            open_video(broken)

    use()
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(50):
        use()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)


# --- files of others, where they are at hand --------------------------------------------------------------------------

ORDINARY = 550_000  # bytes; the larger files are ordinary ones, which take long

INEXACT = {"hevc_10bit.mp4": 3.0, "d_odd_341x255_vp9.webm": 0.3}
"""Mean difference in grey levels that another version of the scaler makes: 10-bit colours and odd sizes."""


def by_ffmpeg(path: Path, wanted: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames `wanted` of a file as the command-line tool shows them: uint8 [len(wanted), H, W, 3]."""
    select = "+".join(f"eq(n\\,{n})" for n in wanted)
    command = ["ffmpeg", "-v", "error", "-threads", "1", "-i", str(path), "-map", "0:v:0", "-vf", f"select={select}"]
    command += ["-vsync", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def test_odd_files_give_the_frames_that_ffmpeg_gives(odd: Path) -> None:
    rng = np.random.default_rng(0)
    manifest = material.BESIDE / "videos/manifest.csv"
    rows = csv.DictReader(manifest.read_text().splitlines()) if manifest.is_file() else ()
    decoded = {material.MARK + row["file"]: int(row["frames_decoded"]) for row in rows}
    for file in sorted(odd.iterdir()):
        if file.stat().st_size > ORDINARY:
            continue
        with open_video(file) as video:
            assert video.frame_count == decoded.get(file.name, video.frame_count), file.name
            wanted = np.unique(rng.integers(0, video.frame_count, 5))
            ours = video.frames(wanted)
        theirs = by_ffmpeg(video.path, wanted, *ours.shape[1:3])
        difference = np.abs(ours.astype(int) - theirs).mean((1, 2, 3)).max()
        assert difference <= INEXACT.get(material.kind(file.name), 0.0), f"{file.name} differs by {difference}"


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_broken_files_say_why_or_play(broken: Path, backend: decode.Backend) -> None:
    if backend == "decord":
        pytest.importorskip("decord")
    playable, reasons = {}, {}
    for path in sorted(broken.iterdir()):
        try:
            with open_video(path, backend, timeout=20) as video:
                playable[path.name] = video.frame_count
                video.frames(np.linspace(0, video.frame_count - 1, 8).astype(int))
        except VideoError as error:
            reasons[path.name] = error.reason
    assert all(reasons.values())
    assert set(playable) - set(reasons) >= material.names(broken, *material.PLAYABLE)
    assert set(reasons) >= material.names(broken, *material.NO_VIDEO)
    if backend == "pyav":
        assert 100 < playable["truncated_faststart_50.mp4"] < 200
        assert playable.get(f"{material.MARK}truncated_faststart_50.mp4", 184) == 184
        assert "only audio" in reasons["audio_only.mp4"]
        assert "a picture (jpeg)" in reasons["jpeg_as.mp4"]
        assert set(reasons) >= material.names(broken, "zeroed_middle.mp4", "decord_corrupted.mp4", "bitflips_mdat.mp4")


def test_a_picture_that_the_decoder_has_patched_up_is_not_shown(broken: Path) -> None:
    for name in material.names(broken, "bitflips_mdat.mp4"):
        with open_video(broken / name) as video, pytest.raises(VideoError, match="frame 0 of 300 is damaged"):
            video.frames([0])
