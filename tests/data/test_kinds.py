"""Other people's files: the right frames at the right times, or one line that says why not."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from multitrain.config import AugmentConfig
from multitrain.data import randaugment_opencv, spatial
from multitrain.data.decode import VideoError, container, open_video, scan_video
from multitrain.data.frames import view_windows
from multitrain.data.random import KeyedRNG
from multitrain.data.spatial import Box, resize_crop
from tests import material
from tests.data.augmented import augment_clip
from tests.data.numbered import number_of, write_numbered

X264 = {"x264-params": "keyint=20:min-keyint=20:scenecut=0:bframes=2"}


def copied(source: Path, target: Path, skip: int = 0, keep: set[int] | None = None, **options: str) -> Path:
    """The packets of a video from number `skip` on in another container, of which only those of `keep`, as numbered."""
    import av

    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = old.streams.video[0]
        other = new.add_stream_from_template(stream)
        for number, packet in enumerate(p for p in old.demux(stream) if p.size):
            if number >= skip and (keep is None or number in keep):
                packet.stream = other
                new.mux(packet)
    return target


def shown(path: Path) -> list[int]:
    with open_video(path) as video:
        return [number_of(frame) for frame in video.frames(range(video.frame_count))]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_numbered(tmp_path_factory.mktemp("plain") / "a.mp4", 60, options=X264)


# --- frame rates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["ts", "mkv", "flv", "mpg", "avi", "mov", "mp4"])
def test_a_constant_rate_is_the_containers(tmp_path: Path, ending: str) -> None:
    codec = "mpeg2video" if ending == "mpg" else "libx264"
    path = write_numbered(tmp_path / f"a.{ending}", 40, codec=codec, options={"bf": "2", "g": "10"})
    with open_video(path) as video:
        assert (video.frame_count, video.fps) == (40, 30.0)
    assert scan_video(path).frames == 40


@pytest.mark.parametrize("ending", ["ts", "mkv", "webm", "flv"])
def test_a_rate_that_the_time_stamps_belie_is_theirs(tmp_path: Path, ending: str) -> None:
    codec = "libvpx" if ending == "webm" else "libx264"
    times = [n for n in range(75) if n % 5 != 4]
    path = write_numbered(tmp_path / f"a.{ending}", 60, codec=codec, rate=25, times=times)
    with open_video(path) as video:
        assert video.frame_count == 60
        assert video.fps == pytest.approx(59 / (73 / 25), rel=0.011)
        assert np.allclose(video.times(), np.array(times) / 25, atol=1e-3)


def test_an_avi_whose_header_counts_empty_chunks_is_whole_and_has_its_frames_over_its_length(
    tmp_path: Path,
) -> None:
    """Every fifth picture of an MJPEG AVI left out; one that is cut off; and one with nothing left out."""
    every = write_numbered(tmp_path / "b.avi", 75, codec="mjpeg", rate=25, options={"strict": "unofficial"})
    path = copied(every, tmp_path / "c.avi", keep={n for n in range(75) if n % 5 != 4 or n == 74})
    with open_video(path) as video:
        assert video.frame_count == 61
        assert video.fps == pytest.approx(61 / 3)
    assert scan_video(path).decoded == 61
    ordinary = write_numbered(tmp_path / "d.avi", 40, options={"bf": "2"})
    assert scan_video(ordinary).fps == 30.0
    (tmp_path / "e.avi").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"cut off: \d+ of 75 frames|cannot be decoded beyond"):
        scan_video(tmp_path / "e.avi")


def test_a_stream_whose_clock_is_set_anew_or_jumps_goes_on(tmp_path: Path, plain: Path) -> None:
    first = copied(plain, tmp_path / "a.ts")
    later = write_numbered(tmp_path / "b.ts", 60, options=X264, times=[n + 30 * 3600 for n in range(60)])
    for second in (first, later):
        both = tmp_path / "both.ts"
        both.write_bytes(first.read_bytes() + second.read_bytes())
        with open_video(both) as video:
            assert video.frame_count == 120
            assert video.fps == 30.0
            assert max(np.diff(video.times())) < 0.1
        assert shown(both) == [*range(60), *range(60)]


# --- beginnings -------------------------------------------------------------------------------------------------------

BEGINNINGS = {
    "h264": ("libx264", X264, "mp4"),
    "hevc": ("libx265", {"x265-params": "log-level=none:keyint=20:min-keyint=20:bframes=2:open-gop=1"}, "mp4"),
    "mpeg2": ("mpeg2video", {"g": "12", "bf": "2"}, "ts"),
    "vp8": ("libvpx", {"g": "20"}, "mkv"),
    "vp9": ("libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}, "mkv"),
    "open groups": ("libx264", {"x264-params": "open-gop=1:keyint=20:min-keyint=20:bframes=3:scenecut=0"}, "mp4"),
}
IN_TS = ("h264", "hevc", "mpeg2")
"""Those that MPEG-TS holds, with their parameters where they begin."""


@pytest.mark.parametrize(("kind", "ending"), [(k, "mkv") for k in BEGINNINGS] + [(k, "ts") for k in IN_TS])
def test_nothing_before_the_first_key_picture_is_shown_and_every_window_is_readable(
    tmp_path: Path, kind: str, ending: str
) -> None:
    codec, options, source = BEGINNINGS[kind]
    whole = write_numbered(tmp_path / f"a.{source}", 60, codec=codec, options=options)
    path = copied(whole, tmp_path / f"b.{ending}", skip=7)
    numbers = shown(path)
    assert numbers == list(range(numbers[0], 60))
    assert 7 < numbers[0] <= 21
    assert scan_video(path).decoded == len(numbers)
    rng = random.Random(0)
    for _ in range(8):
        wanted = sorted(rng.choices(range(len(numbers)), k=4))
        with open_video(path) as video:
            assert [number_of(f) for f in video.frames(wanted)] == [numbers[n] for n in wanted]


def test_pictures_that_an_intra_refresh_restores_begin_where_they_are_whole(tmp_path: Path) -> None:
    options = {"x264-params": "intra-refresh=1:bframes=0:keyint=20"}
    path = copied(write_numbered(tmp_path / "a.mp4", 60, options=options), tmp_path / "b.mkv", skip=20)
    with open_video(path) as video:
        assert 10 < video.frame_count < 40
        video.frames(range(video.frame_count))
    assert shown(write_numbered(tmp_path / "c.mp4", 40, options=options)) == list(range(40))


def test_decord_gives_the_same_frames_of_a_recording_that_begins_inside_a_group(tmp_path: Path, plain: Path) -> None:
    pytest.importorskip("decord")
    path = copied(plain, tmp_path / "b.ts", skip=7)
    with open_video(path) as ours, open_video(path, "decord") as theirs:
        assert (ours.frame_count, ours.fps) == (theirs.frame_count, theirs.fps)
        np.testing.assert_array_equal(ours.frames([3, 30]), theirs.frames([3, 30]))


# --- what is no video -------------------------------------------------------------------------------------------------

TEXTS = {
    "concat script": "ffconcat version 1.0\nfile a.mp4\n",
    "playlist": "#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:2,\na.mp4\n#EXT-X-ENDLIST\n",
    "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "manifest": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>',
    "list": "[playlist]\nFile1=a.mp4\nNumberOfEntries=1\n",
    "words": "not a video\n" * 50,
}


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_that_names_a_video_is_none(tmp_path: Path, plain: Path, kind: str, backend: str) -> None:
    if backend == "decord":
        pytest.importorskip("decord")
    shutil.copyfile(plain, tmp_path / "a.mp4")
    for name in ("b.mp4", "b.txt", "b.m3u8", "b.ffconcat", "b.sdp", "b.mpd", "b%03d.png"):
        (tmp_path / name).write_text(TEXTS[kind])
        with pytest.raises(VideoError, match="no video format"):
            open_video(tmp_path / name, backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", ["mp4", "m4a", "mp3", "mkv"])
def test_a_sound_with_a_cover_picture_is_no_video_each_time(tmp_path: Path, ending: str) -> None:
    if shutil.which("ffmpeg") is None:
        pytest.skip("no ffmpeg command to make it with")
    picture = ["-f", "lavfi", "-i", "testsrc2=s=96x64:d=0.04:r=25", "-frames:v", "1", str(tmp_path / "cover.jpg")]
    subprocess.run(["ffmpeg", "-v", "error", *picture], check=True)
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "sine=d=1"]
    if ending == "mkv":
        command += ["-attach", str(tmp_path / "cover.jpg"), "-metadata:s:t", "mimetype=image/jpeg"]
    else:
        command += ["-i", str(tmp_path / "cover.jpg"), "-map", "0", "-map", "1", "-c:v", "copy"]
        command += ["-disposition:v:0", "attached_pic"]
    subprocess.run([*command, str(tmp_path / f"a.{ending}")], check=True)
    for backend in ("pyav", "decord", *["pyav"] * 18):
        with pytest.raises(VideoError, match="no video in it, only audio"):
            open_video(tmp_path / f"a.{ending}", backend)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_a_name_is_a_local_file_and_nothing_else(
    tmp_path: Path, plain: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "decord":
        pytest.importorskip("decord")
    monkeypatch.chdir(tmp_path)
    names = [
        b"cam1:0900.mp4",
        b"a%03d.mp4",
        b"-x.mp4",
        b"new\nline.mp4",
        b"lat\xe9in.mp4",
        b"http:x.mp4",
        b"file:y.mp4",
    ]
    for name in (*names, b"concat:a|b.mp4", b"pipe:0", b"data:video.mp4", b"q?x=1#a.mp4"):
        shutil.copyfile(plain, name)
        with open_video(os.fsdecode(name), backend) as video:  # type: ignore[arg-type]
            assert number_of(video.frames([5])[0]) == 5
    for name in ("nul\0.mp4", "x" * 300 + ".mp4", "gone\n\udce9.mp4"):
        with pytest.raises(VideoError) as caught:
            open_video(name, backend)  # type: ignore[arg-type]
        assert str(caught.value).isprintable()
        assert not caught.value.transient


def test_an_unknown_codec_is_a_bad_video(tmp_path: Path, plain: Path) -> None:
    path = tmp_path / "b.mp4"
    path.write_bytes(plain.read_bytes().replace(b"avc1", b"zzz9").replace(b"avcC", b"zzzC"))
    with pytest.raises(VideoError, match="codec is not known"):
        open_video(path)


def test_frames_beyond_the_largest_size_are_refused_before_they_are_decoded(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "MAX_PIXELS", 1000)
    with pytest.raises(VideoError):
        scan_video(plain)


# --- large frames -----------------------------------------------------------------------------------------------------


def test_large_frames_are_worked_on_in_bands_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (1, 700, 900, 3), dtype=np.uint8)
    crops = [resize_crop(frames[0], (256, 329), Box(0, 40, 256, 256))]
    clips = [augment_clip(frames, AugmentConfig(), 64, KeyedRNG("large", n), True)[0] for n in range(60)]
    for module in (spatial, randaugment_opencv):
        monkeypatch.setattr(module, "LARGE", 1000)
    np.testing.assert_array_equal(resize_crop(frames[0], (256, 329), Box(0, 40, 256, 256)), crops[0])
    for n, clip in enumerate(clips):
        np.testing.assert_array_equal(augment_clip(frames, AugmentConfig(), 64, KeyedRNG("large", n), True)[0], clip)


# --- files of others, where they are at hand --------------------------------------------------------------------------


def test_the_files_that_failed_have_their_right_values(shared: Path) -> None:
    bugs = shared / "bugs"
    for name, frames, fps in (
        ("vfr_jitter_ts.ts", 180, 19.974),
        ("h264_bframes.avi", 75, 25.0),
        ("mjpeg_empty_chunks.avi", 60, 20.0),
        ("midgop.ts", 50, 25.0),
        ("vfr_phone.mp4", 150, 30.301),
        ("colon_name.mp4", 75, 25.0),
    ):
        found = scan_video(bugs / name)
        assert (found.frames, found.decoded, round(found.fps, 3)) == (frames, frames, fps), name
    with open_video(bugs / "vfr_jitter_ts.ts") as video:
        (window,) = view_windows(video.frame_count, video.fps, 32, sampling_rate=2, target_fps=30, views=1)
    assert (window[0], window[-1]) == (68, 109)
    for name, reason in (("audio_cover.mp4", "only audio"), ("ffconcat_named.mp4", "no video format")):
        with pytest.raises(VideoError, match=reason):
            open_video(bugs / name)
    with pytest.raises(VideoError, match="codec is not known"):
        open_video(bugs / "unknown_codec.mp4")


def test_ffmpeg_shows_the_same_frames_of_a_recording_that_begins_inside_a_group(tmp_path: Path, plain: Path) -> None:
    if shutil.which("ffmpeg") is None:
        pytest.skip("no ffmpeg command to compare with")
    beside = material.BESIDE / "bugs/midgop.ts"
    for path in (copied(plain, tmp_path / "b.ts", skip=7), *([beside] if beside.is_file() else [])):
        command = ["ffmpeg", "-v", "quiet", "-threads", "1", "-i", str(path), "-vsync", "passthrough", "-f", "rawvideo"]
        raw = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], capture_output=True, check=True).stdout
        with open_video(path) as video:
            ours = video.frames(range(video.frame_count))
        np.testing.assert_array_equal(ours, np.frombuffer(raw, np.uint8).reshape(ours.shape))
