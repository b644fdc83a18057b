"""Odd and broken video files, made here with ffmpeg: the kinds that the developers' folders hold, under the same names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / "shared"
MARK = "whole_"
"""Beginning of the names of the developers' files where they are linked beside the made ones."""
_H264 = ["-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p"]
_PLAIN = [*_H264, "-g", "30"]
_ONE_THREAD = ["-threads", "1"]  # libvpx's threads burn time where they wait for each other
ODD: dict[str, tuple[str, list[str]]] = {
    "making_cake.mp4": ("mandelbrot=s=320x240:r=25", ["-t", "5", *_PLAIN]),
    "yoga.mp4": ("testsrc2=s=320x240:r=30", ["-t", "5", *_PLAIN]),
    "arm_wrestling.mp4": ("mandelbrot=s=320x240:r=25:start_scale=1.2:maxiter=400,gblur=2", ["-t", "3", *_PLAIN]),
    "d_1frame.mp4": ("testsrc2=s=128x96:r=25", ["-frames:v", "1", *_PLAIN]),
    "d_2frames.mp4": ("testsrc2=s=128x96:r=25", ["-frames:v", "2", *_PLAIN]),
    "d_bframes_longgop.mp4": ("testsrc2=s=192x128:r=25", ["-t", "4", *_H264, "-g", "500", "-bf", "8"]),
    "d_intra.mp4": ("testsrc2=s=128x96:r=25", ["-t", "2", *_H264, "-g", "1"]),
    "d_vfr_yoga.mp4": (
        "testsrc2=s=320x240:r=30",
        ["-t", "5", "-vf", "select='mod(n,3)+eq(mod(n,9),0)'", "-fps_mode", "vfr", *_PLAIN],
    ),
    "d_odd_341x255_vp9.webm": ("testsrc2=s=341x255:r=25", ["-t", "2", "-c:v", "libvpx-vp9", "-cpu-used", "8"]),
    "d_vp9.webm": ("testsrc2=s=192x128:r=25", ["-t", "2", "-c:v", "libvpx-vp9", "-cpu-used", "8"]),
    "d_ssv2_like.webm": (
        "testsrc2=s=320x240:r=12",
        ["-t", "4", "-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8"],
    ),
    "hevc_10bit.mp4": (
        "mandelbrot=s=192x128:r=25,gblur=4",
        [
            "-t",
            "2",
            "-c:v",
            "libx265",
            "-preset",
            "veryfast",
            "-pix_fmt",
            "yuv420p10le",
            "-x265-params",
            "log-level=none",
        ],
    ),
    "av1.mkv": ("testsrc2=s=128x96:r=25", ["-t", "1", "-c:v", "libaom-av1", "-cpu-used", "8"]),
    "ucf_archery.avi": ("testsrc2=s=320x240:r=25", ["-t", "4", "-c:v", "mpeg4", "-vtag", "XVID", "-q:v", "4"]),
    "unordered.mov": (
        "testsrc2=s=192x128:r=25",
        ["-t", "3", *_PLAIN, "-x264-params", "bframes=3:b-pyramid=2:open-gop=1"],
    ),
}
"""Made by one command each: the source of lavfi and the options."""
TURNED = {"rot90.mov": "90", "rot180.mov": "180", "rot270.mov": "270", "d_rot90_10s.mp4": "90"}
"""Copies of `yoga.mp4` with a turn in the header."""
NO_VIDEO = ("zero_byte.mp4", "text.mp4", "jpeg_as.mp4", "audio_only.mp4", "moov_missing.mp4", "random_bytes.mp4")
PLAYABLE = ("one_frame.mp4", "wrong_ext_mp4_as.avi")
"""Files of the folder of broken ones that a player shows whole."""


def kind(name: str) -> str:
    """A file's name without the mark of the developers' ones."""
    return name.removeprefix(MARK)


def names(folder: Path, *kinds: str) -> set[str]:
    """Files of `folder` of these kinds, made and developers'."""
    return {p.name for p in folder.iterdir() if kind(p.name) in kinds}


def _ffmpeg(*words: str) -> None:
    *others, out = words
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-filter_threads", "1", *others, *_ONE_THREAD, out], check=True)


def _link(folder: Path, beside: str) -> None:
    source = BESIDE / beside
    for file in sorted(source.iterdir()) if source.is_dir() else ():
        if file.suffix not in (".md", ".csv"):
            (folder / f"{MARK}{file.name}").symlink_to(file)


def write_odd(folder: Path) -> Path:
    """Playable files of unusual kinds in `folder`; skips the test where there is no ffmpeg to make them."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("no ffmpeg command to make the files with")
    for name, (source, options) in ODD.items():
        _ffmpeg("-f", "lavfi", "-i", source, *options, str(folder / name))
    for name, turn in TURNED.items():
        _ffmpeg("-i", str(folder / "yoga.mp4"), "-c", "copy", "-metadata:s:v:0", f"rotate={turn}", str(folder / name))
    _ffmpeg("-ss", "1.3", "-i", str(folder / "making_cake.mp4"), "-c", "copy", str(folder / "d_editlist.mp4"))
    _link(folder, "videos")
    return folder


def write_broken(folder: Path) -> Path:
    """Files that are no videos, or damaged ones, in `folder`, and two that look so and are whole."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("no ffmpeg command to make the files with")
    whole, late = folder / "whole.mp4", folder / "late.mp4"
    picture = ["-f", "lavfi", "-i", "testsrc2=s=192x128:r=25"]
    _ffmpeg(*picture, "-frames:v", "300", *_PLAIN, "-movflags", "+faststart", str(whole))
    _ffmpeg("-i", str(whole), "-c", "copy", str(late))
    content, behind = whole.read_bytes(), late.read_bytes()
    data = content.index(b"mdat") + 4
    for share in (50, 95):
        (folder / f"truncated_faststart_{share}.mp4").write_bytes(content[: len(content) * share // 100])
    (folder / "moov_missing.mp4").write_bytes(behind[: behind.index(b"moov") - 4])
    (folder / "bitflips_mdat.mp4").write_bytes(_flipped(content, data))
    middle = data + (len(content) - data) // 3
    zeros = bytes((len(content) - data) // 3)
    (folder / "zeroed_middle.mp4").write_bytes(content[:middle] + zeros + content[middle + len(zeros) :])
    (folder / "wrong_ext_mp4_as.avi").write_bytes(content)
    (folder / "zero_byte.mp4").touch()
    (folder / "text.mp4").write_text("This is no video.\n" * 50)
    (folder / "random_bytes.mp4").write_bytes(bytes((n * n * 31 + n * 7) % 251 for n in range(20_000)))
    _ffmpeg(*picture, "-frames:v", "1", "-f", "image2", "-c:v", "mjpeg", str(folder / "a.jpg"))
    (folder / "a.jpg").rename(folder / "jpeg_as.mp4")
    _ffmpeg(*picture, "-frames:v", "1", *_PLAIN, str(folder / "one_frame.mp4"))
    _ffmpeg("-f", "lavfi", "-i", "sine=d=2", "-c:a", "aac", str(folder / "audio_only.mp4"))
    whole.unlink()
    late.unlink()
    _link(folder, "broken")
    return folder


def _flipped(content: bytes, start: int) -> bytes:
    """Every 97th byte behind `start` and the first picture's header with one bit turned."""
    changed = bytearray(content)
    for place in range(start + 800, len(content), 97):
        changed[place] ^= 1 << (place % 8)
    return bytes(changed)
