"""Copies of videos with a short side of 320 pixels: H.264 in MP4, without sound, upright, every frame at its own time.

A worker makes a copy under a name of its own below ``OUT/.parts`` and reads it back; then the command notes it in its journal
and moves it to its place. So a copy is there whole or not at all, and after a kill at any instant the journal tells which files
the command has made: others are never replaced.
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

from multitrain.config import ConfigError
from multitrain.data.decode import Video, VideoError, check_complete, open_video, read_whole
from multitrain.data.decode.container import MAX_PIXELS, VIDEO_FORMATS, stream_index
from multitrain.data.encode import retime
from multitrain.data.prepare.listing import PARTS, Copy, located
from multitrain.data.prepare.parallel_map import FINAL
from multitrain.data.prepare.scan import is_of_system
from multitrain.files import stamp
from multitrain.monitor.exit_status import explained

_STALE = 3600.0  # seconds after which a copy in the making of another machine has been given up
_PART = re.compile(r"part-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}\.(mp4|tar)")
_CLOSE = 1e-3  # seconds that a frame's time may move
_ALIKE = 16.0  # mean difference, of 255, up to which two pictures are one in two sizes


@dataclass(frozen=True)
class Encoding:
    """How copies are encoded."""

    short_side: int = 320
    """Pixels; a smaller video is not enlarged."""
    crf: int = 23
    preset: str = "medium"
    fast_decode: bool = False
    """``-g 32 -tune fastdecode``: half the time to decode for a third more bytes (measured)."""
    salvage: bool = False
    """Whether what can be decoded of a damaged video is kept."""

    def version(self) -> dict[str, Any]:
        """What the journal compares."""
        return asdict(self)


class Item(NamedTuple):
    """What a worker gets."""

    copy: Copy
    there: str = ""
    """What stands at the copy's place: nothing; ``ours``, which is taken if it is this copy, and replaced otherwise; or
    ``foreign``, which is taken if it is this copy (the user asked for that), and an error otherwise."""


def ffmpeg() -> str:
    """The ffmpeg command: of ``MULTITRAIN_FFMPEG``, of the PATH, or that of the package imageio-ffmpeg. Raises ConfigError."""
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
    """The options by which this ffmpeg gives every frame the time that it has in the source.

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
    """By what ``ffmpeg -version`` says; builds that have no number are newer than all that have one."""
    found = re.match(r"ffmpeg version n?(\d+)\.(\d+)", said)
    number = (int(found[1]), int(found[2])) if found else (99, 0)
    return (
        *(("-fps_mode", "passthrough") if number >= (5, 1) else ("-vsync", "passthrough")),
        *("-enc_time_base", "demux" if number >= (6, 1) else "-1"),
    )


class Resize:
    """Makes one copy; work for several processes, the item is an :class:`Item`.

    Returns:
        ``frames``, ``width``, ``height``, ``bytes``, ``digest`` and ``part``, the finished copy's name below `PARTS` (without it
        where the copy was there already); ``damage`` where `Encoding.salvage` left something out. Or ``error``.
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
        """What `check` says of the file, which is plainer than what ffmpeg says; the latter when the file reads well."""
        try:
            whole = read_whole(source)
        except VideoError as plainer:
            return {"error": plainer.reason, FINAL: not is_of_system(plainer)}
        if copy.segment is not None and copy.segment[0] > (whole.frames - 1) / whole.fps:
            end = f"the video ends at {whole.frames / whole.fps:.1f} s"
            return {"error": f"the segment begins at {copy.segment[0]:g} s, after the last frame ({end})", FINAL: False}
        return {"error": error.reason, FINAL: False}

    def _made(self, source: Path, part: Path, copy: Copy) -> dict[str, Any]:
        """Encode and read back. Raises VideoError."""
        if self.encoding.salvage:
            if not os.path.exists(source):
                raise VideoError(source, "no such file")
            stream = stream_index(source)
            said = self._encode(source, part, copy, stream, strict=False)
            with self._read_back(source, part, said) as made:
                return self._record(part, made) | ({"damage": said} if said else {})
        with open_video(source) as video:
            if copy.segment is None:
                check_complete(video)
            stream = stream_index(source)
            try:
                said = self._encode(source, part, copy, stream, strict=True)
            except VideoError:
                said = "ffmpeg gave up"
            if said:  # of a whole file, too: of what comes before the first picture that can be decoded
                read_whole(source)
                said = self._encode(source, part, copy, stream, strict=False)
            if copy.segment is None:
                self._keep_times(video, part)
            with self._read_back(source, part, said) as made:
                if copy.segment is None:
                    self._compare(video, made, source)
                return self._record(part, made)

    def _encode(self, source: Path, part: Path, copy: Copy, stream: int, *, strict: bool) -> str:
        """Runs ffmpeg; returns what it complained of. Raises VideoError if it gave up."""
        command = self.command(source, part, copy, stream, strict=strict)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=self.timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise VideoError(source, f"took longer than {self.timeout:g} s") from None
        said = _complaint(done.stderr, source)
        if done.returncode < 0 or (done.returncode and not said):
            killed = done.returncode in (-signal.SIGKILL, -signal.SIGTERM)
            raise VideoError(source, f"ffmpeg {explained(done.returncode)}", transient=killed)
        if done.returncode:
            raise VideoError(source, said)
        return said

    def command(self, source: Path, part: Path, copy: Copy, stream: int, *, strict: bool) -> list[str]:
        """The ffmpeg command line of a copy of the stream of that number; `strict` ends with the first error."""
        e = self.encoding
        side = f"trunc(min({e.short_side},min(iw,ih))/2)*2"
        scale = f"scale=w='if(lte(iw,ih),{side},-2)':h='if(lte(iw,ih),-2,{side})':flags=bicubic"
        cut = ["-ss", f"{copy.segment[0]:.3f}", "-to", f"{copy.segment[1]:.3f}"] if copy.segment else []
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
            *(*cut, "-i", f"file:{source}", "-map", f"0:{stream}", "-map_metadata", "-1"),
            *("-vf", scale, *self.timing, "-c:v", "libx264", "-threads", "1", "-pix_fmt", "yuv420p"),
            *("-crf", str(e.crf), "-preset", e.preset, *fast, "-movflags", "+faststart", f"file:{part}"),
        ]

    @staticmethod
    def _read_back(source: Path, part: Path, said: str) -> Video:
        """The finished copy, on disk. Raises VideoError when nothing of it can be decoded."""
        try:
            made = open_video(part)
            made.frames([0, made.frame_count - 1])
        except VideoError as error:
            raise VideoError(source, said or f"nothing of its copy can be decoded ({error.reason})") from None
        make_durable(part)
        return made

    @staticmethod
    def _keep_times(video: Video, part: Path) -> None:
        """Give every frame of the copy its own time where ffmpeg has guessed another (an AVI has no times of frames)."""
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
        """Raises VideoError unless all frames are in the copy, each at its own time.

        Packets of an AVI that only say that a picture stays give no frame of the copy.
        """
        if made.frame_count != video.frame_count:
            if made.frame_count > video.frame_count or made.frame_count < read_whole(source).decoded:
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
        """The record of a file that is this copy already: of its size, with every frame at its time, and the same first picture."""
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
    """Seconds, float64, by which each frame's time has moved."""
    moved: np.ndarray = np.abs(np.subtract(times, original))
    return moved


def clean_parts(folder: Path) -> None:
    """Remove what processes that are gone have left in the folder of copies in the making."""
    for part in folder.iterdir():
        if (found := _PART.fullmatch(part.name)) is None:
            continue
        with contextlib.suppress(FileNotFoundError):
            status = part.lstat()
            gone = found["host"] == platform.node() and not Path(f"/proc/{found['pid']}").exists()
            if stat.S_ISREG(status.st_mode) and (gone or time.time() - status.st_mtime > _STALE):
                part.unlink()


def stamps(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the copies in some records of a journal are recognised by; those of earlier versions by their size alone.

    Adopted ones are not among them: the command did not make them.
    """
    return [{k: r[k] for k in ("bytes", "digest") if k in r} for r in records if "bytes" in r and "adopted" not in r]


def _complaint(stderr: str, source: Path) -> str:
    """The first line that ffmpeg says, without addresses and the file's name."""
    for line in stderr.splitlines():
        text = line.split("] ", 1)[-1].replace(f"file:{source}", "the file").replace(str(source), "the file").strip()
        if text and not text.startswith("Last message repeated"):
            return text
    return ""


def make_durable(file: Path) -> None:
    """Wait until a file is on disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = ["Encoding", "Item", "Resize", "clean_parts", "ffmpeg", "make_durable", "stamps", "timing_options"]
