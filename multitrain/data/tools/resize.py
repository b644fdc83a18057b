"""Copy videos with a short side of 320 pixels: H.264 in MP4, without audio, upright, every frame at its original time.

A worker writes a copy under a temporary name below ``OUT/.parts`` and reads it back. The command then records it in its journal
and renames it. A copy is therefore complete or absent, and after a kill at any moment the journal lists the files that
the command made; it never replaces others.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from multitrain.cluster.exit_status import describe_exit
from multitrain.config import ConfigError
from multitrain.data.decode import PartOfVideo, Video, VideoError, check_complete, open_video, scan_video
from multitrain.data.decode.container import MAX_PIXELS, VIDEO_FORMATS, stream_index
from multitrain.data.encode import retime
from multitrain.data.segment import Segment
from multitrain.data.tools.listing import PARTS, Copy, located
from multitrain.data.tools.parallel_map import FINAL
from multitrain.data.tools.scan import is_of_system
from multitrain.files import stamp

_STALE = 3600.0  # seconds after which a temporary file of another machine is abandoned
_PART = re.compile(r"part-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}\.(mp4|tar)")
_CLOSE = 1e-3  # tolerance of a frame's time in seconds
_ALIKE = 16.0  # maximum mean difference, of 255, between the same picture in two sizes


@dataclass(frozen=True)
class Encoding:
    """Encoding options of the copies."""

    short_side: int = 320
    """In pixels; a smaller video is not enlarged."""
    crf: int = 23
    preset: str = "medium"
    fast_decode: bool = False
    """``-g 32 -tune fastdecode``: half the time to decode for a third more bytes (measured)."""
    salvage: bool = False
    """Whether to keep the decodable part of a damaged video."""

    def version(self) -> dict[str, Any]:
        """The options that identify a copy in the journal."""
        return asdict(self)


class Item(NamedTuple):
    """The input of a worker."""

    copy: Copy
    there: str = ""
    """The existing file at the copy's path: empty for none; ``ours``, which is kept if it is this copy, and replaced otherwise; or
    ``foreign``, which is adopted if it is this copy (option ``--adopt``), and an error otherwise."""


class Cut(NamedTuple):
    """How ffmpeg finds the frames to copy: of a complete video, all."""

    options: tuple[str, ...] = ()
    """Options of the input."""
    filters: tuple[str, ...] = ()


def _salvaged_cut(segment: tuple[float, float] | None) -> Cut:
    return Cut() if segment is None else Cut(("-ss", f"{segment[0]:.3f}", "-to", f"{segment[1]:.3f}"))


def _cut_by_time(video: PartOfVideo) -> Cut:
    """Seek. The limits are between frames, so that neither their rounding nor whether the end counts from the first frame matters."""
    shown, first, last = video.whole.shown_at(), video.first, video.first + video.frame_count - 1
    after = float(shown[last + 1] - shown[last]) if last + 1 < len(shown) else 1 / video.fps
    before = float(shown[first] - shown[first - 1]) if first else 1 / video.fps
    start = max(0.0, float(shown[first]) - min(before / 2, after / 4))
    end = start + float(shown[last] - shown[first]) + after / 2
    return Cut(("-ss", f"{start:.6f}", "-to", f"{end:.6f}"), ("setpts=PTS-STARTPTS",))


def _cut_by_number(video: PartOfVideo) -> Cut:
    """Count the frames of the complete file."""
    frames = f"start_frame={video.first}:end_frame={video.first + video.frame_count}"
    return Cut((), (f"trim={frames}", "setpts=PTS-STARTPTS"))


def ffmpeg() -> str:
    """The ffmpeg command: from ``MULTITRAIN_FFMPEG``, the PATH, or the package imageio-ffmpeg. Raises ConfigError if there is none."""
    found = os.environ.get("MULTITRAIN_FFMPEG") or shutil.which("ffmpeg")
    if found:
        return found
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return str(get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        raise ConfigError("no ffmpeg here; load your site's module, or pip install imageio-ffmpeg") from None


@lru_cache
def timing_options(program: str) -> tuple[str, ...]:
    """The options with which this ffmpeg keeps the time of every frame.

    Raises:
        ConfigError: `program` cannot be run.
    """
    try:
        said = subprocess.run(
            [program, "-version"], capture_output=True, text=True, errors="replace", check=False
        ).stdout
    except OSError as error:
        raise ConfigError(f"{program}: cannot be run ({error.strerror}); set MULTITRAIN_FFMPEG to an ffmpeg") from None
    return _timing_options(said)


def _timing_options(said: str) -> tuple[str, ...]:
    """The options for the output of ``ffmpeg -version``; builds without a version number are newer than all others."""
    found = re.match(r"ffmpeg version n?(\d+)\.(\d+)", said)
    number = (int(found[1]), int(found[2])) if found else (99, 0)
    return (
        *(("-fps_mode", "passthrough") if number >= (5, 1) else ("-vsync", "passthrough")),
        *("-enc_time_base", "demux" if number >= (6, 1) else "-1"),
    )


class Resize:
    """Makes one copy; a function for `map_resumable` whose item is an :class:`Item`.

    Returns:
        ``frames``, ``width``, ``height``, ``bytes``, ``digest`` and ``part``, the finished copy's name below `PARTS` (absent
        if the copy existed already); ``damage`` if `Encoding.salvage` left something out. Or ``error``.
    """

    def __init__(self, videos: Path, out: Path, encoding: Encoding, timeout: float) -> None:
        self.videos, self.out, self.encoding, self.timeout = videos, out, encoding, timeout
        self.ffmpeg = ffmpeg()
        self.timing = timing_options(self.ffmpeg)

    def __call__(self, item: Item) -> dict[str, Any]:
        copy = item.copy
        source, target = located(self.videos / copy.source), self.out / copy.target
        if item.there:
            if (taken := self._taken(source, target, copy)) is not None:
                return taken
            if item.there == "foreign":
                return {"error": f"{target} is in the way: it is no copy of this video; move it away", FINAL: False}
        part = self.out / PARTS / f"part-{platform.node()}-{os.getpid()}-{os.urandom(4).hex()}.mp4"
        try:
            return {**self._made(source, part, copy), "part": part.name}
        except VideoError as error:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
            return self._failure(source, copy, error)

    @staticmethod
    def _failure(source: Path, copy: Copy, error: VideoError) -> dict[str, Any]:
        """The error that `check` reports for the file, which is clearer than ffmpeg's; ffmpeg's if the file has no error."""
        try:
            whole = scan_video(source)
        except VideoError as plainer:
            return {"error": plainer.reason, FINAL: not is_of_system(plainer)}
        if copy.segment is not None and copy.segment[0] > (whole.frames - 1) / whole.fps:
            end = f"the video ends at {whole.frames / whole.fps:.1f} s"
            return {"error": f"the segment begins at {copy.segment[0]:g} s, after the last frame ({end})", FINAL: False}
        return {"error": error.reason, FINAL: False}

    def _made(self, source: Path, part: Path, copy: Copy) -> dict[str, Any]:
        """Encode a copy and read it back. Raises VideoError."""
        if self.encoding.salvage:
            if not os.path.exists(source):
                raise VideoError(source, "no such file")
            stream = stream_index(source)
            said = self._encode(source, part, stream, _salvaged_cut(copy.segment), strict=False)
            with self._read_back(source, part, said) as made:
                return self._record(part, made) | ({"damage": said} if said else {})
        with open_video(source) as whole:
            if copy.segment is None:
                check_complete(whole)
                return self._copied(source, whole, part, Cut())
            video = PartOfVideo(whole, Segment(*copy.segment))
            if whole.timed:
                with contextlib.suppress(VideoError):  # a file in which ffmpeg does not find the frames by their times
                    return self._copied(source, video, part, _cut_by_time(video))
            return self._copied(source, video, part, _cut_by_number(video))

    def _copied(self, source: Path, video: Video, part: Path, cut: Cut) -> dict[str, Any]:
        """Encode the frames of `video` and read them back. Raises VideoError unless all of them are there, and no others."""
        stream = stream_index(source)
        try:
            said = self._encode(source, part, stream, cut, strict=True)
        except VideoError:
            said = "ffmpeg gave up"
        if said:  # ffmpeg also complains about packets before the first decodable frame of an intact file
            scan_video(source)
            said = self._encode(source, part, stream, cut, strict=False)
        self._keep_times(video, part)
        with self._read_back(source, part, said) as made:
            self._compare(video, made, source)
            return self._record(part, made)

    def _encode(self, source: Path, part: Path, stream: int, cut: Cut, *, strict: bool) -> str:
        """Run ffmpeg; return its complaint, or an empty string. Raises VideoError if ffmpeg failed."""
        command = self.command(source, part, stream, cut, strict=strict)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=self.timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise VideoError(source, f"took longer than {self.timeout:g} s") from None
        said = _complaint(done.stderr, source)
        if done.returncode < 0 or (done.returncode and not said):
            killed = done.returncode in (-signal.SIGKILL, -signal.SIGTERM)
            raise VideoError(source, f"ffmpeg {describe_exit(done.returncode)}", transient=killed)
        if done.returncode:
            raise VideoError(source, said)
        return said

    def command(self, source: Path, part: Path, stream: int, cut: Cut, *, strict: bool) -> list[str]:
        """The ffmpeg command line for a copy of stream number `stream`; with `strict`, ffmpeg stops at the first error."""
        e = self.encoding
        side = f"trunc(min({e.short_side},min(iw,ih))/2)*2"
        scale = f"scale=w='if(lte(iw,ih),{side},-2)':h='if(lte(iw,ih),-2,{side})':flags=bicubic"
        fast = ["-g", "32", "-tune", "fastdecode"] if e.fast_decode else []
        return [
            *(self.ffmpeg, "-nostdin", "-hide_banner", "-v", "error", "-y", "-threads", "1"),
            *(["-xerror"] if strict else []),
            *(
                "-protocol_whitelist",
                "file",
                "-format_whitelist",
                ",".join(VIDEO_FORMATS),
                "-max_pixels",
                str(MAX_PIXELS),
            ),
            *(*cut.options, "-i", f"file:{source}", "-map", f"0:{stream}", "-map_metadata", "-1"),
            *(
                "-vf",
                ",".join([*cut.filters, scale]),
                *self.timing,
                "-c:v",
                "libx264",
                "-threads",
                "1",
                "-pix_fmt",
                "yuv420p",
            ),
            *("-crf", str(e.crf), "-preset", e.preset, *fast, "-movflags", "+faststart", f"file:{part}"),
        ]

    @staticmethod
    def _read_back(source: Path, part: Path, said: str) -> Video:
        """Sync the finished copy to disk and open it. Raises VideoError if it cannot be decoded."""
        try:
            made = open_video(part)
            made.frames([0, made.frame_count - 1])
        except VideoError as error:
            raise VideoError(source, said or f"nothing of its copy can be decoded ({error.reason})") from None
        make_durable(part)
        return made

    @staticmethod
    def _keep_times(video: Video, part: Path) -> None:
        """Set the time of every frame of the copy to the original one, where ffmpeg guessed another (an AVI has no frame times)."""
        times = video.times()
        with open_video(part) as made:
            if made.frame_count != len(times) or _moved(made.times(), times).max() <= _CLOSE:
                return
        again = part.with_name(part.name.replace("part-", "part-again-"))
        try:
            retime(part, again, times)
            os.replace(again, part)
        finally:
            again.unlink(missing_ok=True)

    @staticmethod
    def _compare(video: Video, made: Video, source: Path) -> None:
        """Raise VideoError unless all frames are in the copy, each at its original time.

        AVI packets that repeat the previous frame have no frame in the copy.
        """
        if made.frame_count != video.frame_count:
            if made.frame_count > video.frame_count or made.frame_count < scan_video(source).decoded:
                raise VideoError(source, f"only {made.frame_count} of {video.frame_count} frames were copied")
            return
        moved = _moved(made.times(), video.times())
        if moved.max() > _CLOSE:
            raise VideoError(source, f"the time of frame {int(moved.argmax())} was moved by {1e3 * moved.max():.1f} ms")

    @staticmethod
    def _record(file: Path, made: Video) -> dict[str, Any]:
        height, width = made.frames([0]).shape[1:3]
        return {"frames": made.frame_count, "width": width, "height": height, **stamp(file)}

    def _taken(self, source: Path, target: Path, copy: Copy) -> dict[str, Any] | None:
        """The record of an existing file, if it is this copy: same size, frame times and first frame; else None."""
        if copy.segment is not None or self.encoding.salvage:
            return None
        try:
            with open_video(source) as video, open_video(target) as made:
                self._compare(video, made, source)
                made.frames([made.frame_count - 1])
                return self._record(target, made) if self._alike(video.frames([0])[0], made.frames([0])[0]) else None
        except VideoError:
            return None

    def _alike(self, original: np.ndarray, copied: np.ndarray) -> bool:
        import cv2

        height, width = original.shape[:2]
        short = min(self.encoding.short_side, height, width) // 2 * 2
        if min(copied.shape[:2]) != short:
            return False
        small = cv2.resize(original, (copied.shape[1], copied.shape[0]), interpolation=cv2.INTER_AREA)
        return float(np.abs(small.astype(np.int16) - copied).mean()) < _ALIKE


def _moved(times: Sequence[float], original: Sequence[float]) -> np.ndarray:
    """Difference of each frame's time from the original, in seconds, float64."""
    moved: np.ndarray = np.abs(np.subtract(times, original))
    return moved


def clean_parts(folder: Path) -> None:
    """Remove temporary files of processes that no longer run."""
    for part in folder.iterdir():
        if (found := _PART.fullmatch(part.name)) is None:
            continue
        with contextlib.suppress(FileNotFoundError):
            status = part.lstat()
            gone = found["host"] == platform.node() and not Path(f"/proc/{found['pid']}").exists()
            if stat.S_ISREG(status.st_mode) and (gone or time.time() - status.st_mtime > _STALE):
                part.unlink()


def stamps(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The values by which the copies of some journal records are recognised; for those of earlier versions, only the size.

    Adopted copies are excluded, because the command did not make them.
    """
    return [{k: r[k] for k in ("bytes", "digest") if k in r} for r in records if "bytes" in r and "adopted" not in r]


def _complaint(stderr: str, source: Path) -> str:
    """The first line of ffmpeg's messages, without addresses and the file's name."""
    for line in stderr.splitlines():
        text = line.split("] ", 1)[-1].replace(f"file:{source}", "the file").replace(str(source), "the file").strip()
        if text and not text.startswith("Last message repeated"):
            return text
    return ""


def make_durable(file: Path) -> None:
    """Sync a file to disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
