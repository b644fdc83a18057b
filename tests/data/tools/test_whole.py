"""`data check`, `data resize` and training agree on what is a whole video, how many frames it has, and when each is shown."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support import write_video

from multitrain.data.decode import VideoError, open_video
from multitrain.data.decode.container import open_container
from multitrain.data.decode.extent import needed_bytes
from multitrain.data.encode import VideoWriter
from multitrain.data.encode import write_video as writing
from multitrain.data.tools.listing import PARTS, Copy
from multitrain.data.tools.resize import Encoding, Item, Resize, _timing_options
from multitrain.data.tools.scan import ScanFile

pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg on this machine")

FRAMES = 60


FFMPEG = ("ffmpeg", "-nostdin", "-v", "error", "-y")


def ffmpeg(*arguments: object) -> None:
    subprocess.run([*FFMPEG, *map(str, arguments)], check=True)


def phone() -> list[float]:
    """Steps of 33 ms, every ninth frame 20 ms early."""
    return [0.033 * n - 0.020 * (n % 9 == 8) for n in range(FRAMES)]


def jitter() -> list[float]:
    """Steps of 50 ms, each frame up to 17 ms early or late."""
    return (0.05 * np.arange(FRAMES) + np.random.default_rng(0).uniform(0, 0.017, FRAMES)).tolist()


def fast() -> list[float]:
    """Pairs of frames 2 ms apart, as screen recorders write them."""
    return [0.1 * (n // 2) + 0.002 * (n % 2) for n in range(FRAMES)]


TIMES = {"phone.mp4": phone(), "jitter.mp4": jitter(), "fast.mp4": fast()}


def at_times(path: Path, times: Sequence[float]) -> None:
    writer: VideoWriter
    picture = np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8)
    with writing(path, fps=len(times) / times[-1]) as writer:
        for number, seconds in enumerate(times):
            writer.add(np.roll(picture, number, axis=1), seconds)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole and broken files in many containers, made here."""
    folder = tmp_path_factory.mktemp("zoo")
    plain = folder / "plain.mp4"
    write_video(plain, 0, frames=FRAMES)
    for name, times in TIMES.items():
        at_times(folder / name, times)
    for name in ("plain.ts", "plain.mkv", "plain.avi", "plain.mov", "plain.flv", "plain.h264"):
        ffmpeg("-i", plain, "-c", "copy", folder / name)
    for kind in ("ts", "mkv"):
        ffmpeg("-i", folder / "jitter.mp4", "-c", "copy", "-copyts", folder / f"jitter.{kind}")
    source = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=20:duration=3")
    ffmpeg(
        *source,
        "-vf",
        "select=not(eq(mod(n\\,5)\\,3))",
        "-fps_mode",
        "passthrough",
        "-c:v",
        "mjpeg",
        folder / "gaps.avi",
    )
    ffmpeg(*source, "-c:v", "mpeg4", "-bf", "2", folder / "mpeg4.avi")
    ffmpeg(*source, "-c:v", "libvpx-vp9", "-deadline", "realtime", folder / "vp9.webm")
    small = ("-f", "lavfi", "-i", "testsrc2=size=32x24:rate=10:duration=2")
    second = ("-disposition:0", "0", "-disposition:1", "default")
    for name in ("two.mkv", "two.ts", "two.mp4"):  # two streams, of which the second is read
        ffmpeg(*small, *source, "-map", "0", "-map", "1", *second, "-c:v", "libx264", folder / name)
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", folder / "sound.mp4")
    ffmpeg(*source, "-c:v", "libx264", "-g", "20", "-bf", "0", folder / "recording.ts")
    recording = (folder / "recording.ts").read_bytes()
    cut = len(recording) // 188 // 5 * 188
    (folder / "midgop.ts").write_bytes(recording[:376] + recording[cut:])  # its tables, then from inside a group on
    sound = ("-f", "lavfi", "-i", "sine=duration=5")
    vp8 = ("-c:v", "libvpx", "-deadline", "realtime")
    kinds: dict[str, tuple[str, ...]] = {
        "vp8.webm": vp8,
        "vp8.ivf": (*vp8, "-an"),
        "theora.ogv": ("-c:v", "libtheora"),
        "wmv2.wmv": ("-c:v", "wmv2"),
        "sorenson.flv": ("-c:v", "flv", "-ar", "44100"),
        "live.mkv": ("-live", "1"),
        "mpeg2.mxf": ("-c:v", "mpeg2video", "-r", "25", "-an"),
        "fragments.mp4": ("-movflags", "frag_keyframe+empty_moov", "-g", "10"),
    }
    for name, options in kinds.items():  # their sound is longer than the video
        ffmpeg(*source, *sound, *options, folder / name)
    for name, kind in (("pipe.mkv", "matroska"), ("pipe.wmv", "asf"), ("pipe.flv", "flv")):
        streamed = [*FFMPEG, *source, *sound, "-ar", "44100", "-f", kind, "-"]
        (folder / name).write_bytes(subprocess.run(streamed, check=True, capture_output=True).stdout)
    for name in ("plain.mp4", "plain.avi", "plain.mkv", "gaps.avi", *kinds, "pipe.mkv", "pipe.flv"):
        content = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(content[: len(content) * 2 // 3])
    ffmpeg("-i", plain, "-c", "copy", "-movflags", "+faststart", folder / "early.mp4")
    content = (folder / "early.mp4").read_bytes()
    (folder / "cut_early.mp4").write_bytes(content[: len(content) * 2 // 3])
    (folder / "zeroed.mp4").write_bytes(content[: len(content) // 2] + bytes(200) + content[len(content) // 2 + 200 :])
    content = (folder / "plain.h264").read_bytes()
    (folder / "cut_plain.h264").write_bytes(content[: content.rfind(b"\0\0\1", 0, len(content) * 2 // 3)])
    content = (folder / "early.mp4").read_bytes()
    (folder / "unknown.mp4").write_bytes(content.replace(b"avc1", b"zzz1"))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video")
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile plain.mp4\n")
    return folder


@pytest.fixture(scope="module")
def work(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Resize:
    out = tmp_path_factory.mktemp("copies")
    (out / PARTS).mkdir()
    return Resize(zoo, out, Encoding(32, preset="ultrafast"), 60)


IN_CHUNKS = (
    *("pipe.flv", "vp8.webm", "vp8.ivf", "theora.ogv", "wmv2.wmv", "sorenson.flv", "live.mkv", "pipe.mkv", "mpeg2.mxf"),
    "fragments.mp4",
)
WHOLE = (
    *("plain.mp4", "plain.ts", "plain.mkv", "plain.avi", "plain.mov", "plain.flv", "plain.h264", "early.mp4"),
    *("phone.mp4", "jitter.mp4", "fast.mp4", "jitter.ts", "jitter.mkv", "gaps.avi", "mpeg4.avi", "vp9.webm"),
    *("recording.ts", "midgop.ts", "two.mkv", "two.ts", "two.mp4"),
    *IN_CHUNKS,
    "pipe.wmv",
)
BROKEN = (
    *("cut_plain.mp4", "cut_plain.avi", "cut_gaps.avi", "cut_early.mp4", "zeroed.mp4", "unknown.mp4", "empty.mp4"),
    *("text.mp4", "list.mp4", "sound.mp4", "cut_plain.mkv"),
    *(f"cut_{name}" for name in IN_CHUNKS if name != "vp8.ivf"),  # whose chunks have some 30 bytes
)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_file_is_whole_for_all_and_every_frame_keeps_its_time(zoo: Path, work: Resize, name: str) -> None:
    checked = ScanFile()(str(zoo / name))
    assert "error" not in checked
    made = work(Item(Copy(name, "x.mp4")))
    assert "error" not in made
    with open_video(zoo / name) as video, open_video(work.out / PARTS / made["part"]) as copy:
        assert checked["frames"] == video.frame_count == copy.frame_count == made["frames"]
        for start in range(0, video.frame_count, 7):  # as training reads: windows anywhere
            video.frames([min(start + n, video.frame_count - 1) for n in range(4)])
        original, copied = np.array(video.times()), np.array(copy.times())
        assert np.abs(copied - original).max() < 1e-3
        assert copy.fps == pytest.approx(video.fps, rel=2e-2)
        if truth := TIMES.get(f"{Path(name).stem}.mp4"):
            resolution = 1e-3 if name.endswith("mkv") else 0.0
            assert np.abs(copied - (np.array(truth) - truth[0])).max() < 1e-3 + resolution


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_broken_for_all_for_the_same_reason(zoo: Path, work: Resize, name: str) -> None:
    checked = ScanFile()(str(zoo / name))
    assert checked["kind"] == "broken"
    made = work(Item(Copy(name, "x.mp4")))
    assert made == {"error": checked["error"], "final": True}
    if name in ("unknown.mp4", "empty.mp4", "text.mp4", "list.mp4", "sound.mp4"):
        with pytest.raises(VideoError):
            open_video(zoo / name)


@pytest.mark.parametrize("name", [*IN_CHUNKS, "plain.mkv", "plain.flv", "plain.mp4", "plain.mov", "early.mp4"])
def test_a_file_that_ends_inside_a_chunk_is_cut_off_wherever_that_is(zoo: Path, name: str) -> None:
    content = (zoo / name).read_bytes()
    with open_container(zoo / name)[0] as container:
        kind = container.format.name
    for behind in (b"", b"\0" * 4096, *([b"\0\1"] if name != "vp8.ivf" else [])):
        assert needed_bytes(io.BytesIO(content + behind), len(content + behind), kind) <= len(content + behind)
    cuts = np.random.default_rng(0).integers(len(content) // 3, len(content), 200).tolist()
    found = [needed_bytes(io.BytesIO(content[:cut]), cut, kind) > cut for cut in cuts]
    if name in (*IN_CHUNKS, "plain.mkv", "plain.flv"):
        assert np.mean(found) > 0.95, "but for those between two chunks"
    else:
        assert not any(found), "frames are counted there"


def test_files_whose_end_cannot_be_known_are_the_same_for_all(zoo: Path, work: Resize) -> None:
    name = "cut_plain.h264"  # between two pictures of a stream without a header
    checked, made = ScanFile()(str(zoo / name)), work(Item(Copy(name, "x.mp4")))
    assert checked.get("error") == made.get("error")
    assert checked.get("frames") == made.get("frames")


def test_what_is_salvaged_reads_no_other_file(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / PARTS).mkdir()
    work = Resize(zoo, tmp_path, Encoding(32, preset="ultrafast", salvage=True), 60)
    assert "error" in work(Item(Copy("list.mp4", "x.mp4")))
    assert work(Item(Copy("zeroed.mp4", "x.mp4")))["damage"]


@pytest.mark.parametrize(
    ("said", "mode", "base"),
    [
        ("ffmpeg version 4.4.2-0ubuntu0.22.04.1 Copyright", "-vsync", "-1"),
        ("ffmpeg version 5.1.9-0+deb12u1 Copyright", "-fps_mode", "-1"),
        ("ffmpeg version n6.0 Copyright", "-fps_mode", "-1"),
        ("ffmpeg version 6.1.1-3ubuntu5 Copyright", "-fps_mode", "demux"),
        ("ffmpeg version 7.0.2-static https://…", "-fps_mode", "demux"),
        ("ffmpeg version N-118315-g4f3c9f2f03 Copyright", "-fps_mode", "demux"),
    ],
)
def test_the_options_that_keep_times_follow_the_version(said: str, mode: str, base: str) -> None:
    assert _timing_options(said) == (mode, "passthrough", "-enc_time_base", base)
