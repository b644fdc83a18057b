"""Copies of videos with a short side of 320 pixels: H.264 in MP4, without sound, upright, every frame at its own time.

A copy appears under its name when it is whole and has been read back; never before. ffmpeg does the work.
"""

from __future__ import annotations

import contextlib
import csv
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from multitrain.config import ConfigError
from multitrain.data.annotations import CatalogError
from multitrain.data.decode import VideoError, open_video
from multitrain.data.prepare.importing import VIDEO_ENDINGS
from multitrain.data.prepare.scan import scan

PARTS = ".parts"
"""Folder in the target for copies in the making."""
_STALE = 3600.0  # seconds after which a copy in the making of another machine has been given up


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


@dataclass(frozen=True)
class Copy:
    """One copy to make."""

    source: str
    """Relative to the folder of sources."""
    target: str
    """Relative to the folder of copies; ends with .mp4."""
    segment: tuple[float, float] | None = None
    """Seconds of the source, start and end; all of it when None."""


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


def copies(sources: Sequence[str]) -> list[Copy]:
    """A copy for each source. Raises CatalogError if two would have one name."""
    made: dict[str, str] = {}
    for source in sources:
        target = str(Path(source).with_suffix(".mp4"))
        if made.setdefault(target, source) != source:
            raise CatalogError(f"{made[target]!r} and {source!r} would both become {target!r}; rename one of them")
    return [Copy(source, target) for target, source in made.items()]


def segments(file: Path) -> list[Copy]:
    """The copies that ``segments.csv`` asks for: ``source,start,end,path``. Raises CatalogError."""
    try:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
        return [Copy(r["source"], r["path"], (float(r["start"]), float(r["end"]))) for r in rows]
    except OSError as error:
        raise CatalogError(f"{file}: cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise CatalogError(
            f"{file}: not lines of source,start,end,path ({error}); `multitrain data import` writes it"
        ) from None


def found_below(folder: Path) -> list[str]:
    """The video files below a folder, by the ends of their names: relative paths in order."""
    if not folder.is_dir():
        raise CatalogError(f"{folder}: no such folder of videos")
    found = []
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [
            os.path.relpath(os.path.join(at, n), folder)
            for n in names
            if n.lower().endswith(VIDEO_ENDINGS) and n[0] != "."
        ]
    if not found:
        raise CatalogError(f"{folder}: no video files in it ({' '.join(VIDEO_ENDINGS)})")
    return sorted(found)


class Resize:
    """Makes one copy; work for a crew, the item is a :class:`Copy`. What is wrong comes back as ``error``."""

    def __init__(self, videos: Path, out: Path, encoding: Encoding, timeout: float) -> None:
        self.videos, self.out, self.encoding, self.timeout = videos, out, encoding, timeout
        self.ffmpeg = ffmpeg()

    def __call__(self, copy: Copy) -> dict[str, Any]:
        source, target = located(self.videos / copy.source), self.out / copy.target
        part = self.out / PARTS / f"{platform.node()}-{os.getpid()}.mp4"
        try:
            frames = self._expected(source, copy)
            target.parent.mkdir(parents=True, exist_ok=True)
            said = self._encode(source, part, copy)
            record = self._verified(source, part, frames, said)
            _make_durable(part)
            os.replace(part, target)
            return record
        except VideoError as error:
            with contextlib.suppress(FileNotFoundError):
                target.unlink()  # of an earlier, now broken, source
            return {"error": self._reason(source, error)}
        finally:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()

    @staticmethod
    def _reason(source: Path, error: VideoError) -> str:
        """What `check` says of the file, which is plainer than what ffmpeg says; the latter when the file reads well."""
        try:
            scan(source)
        except VideoError as plainer:
            return plainer.reason
        return error.reason

    def _expected(self, source: Path, copy: Copy) -> int | None:
        """Frames that the copy must have; None where that is not known beforehand."""
        if self.encoding.salvage:
            if not source.exists():
                raise VideoError(source, "no such file")
            return None
        with open_video(source) as video:
            return None if copy.segment else video.frame_count

    def _encode(self, source: Path, part: Path, copy: Copy) -> str:
        """Runs ffmpeg; returns what it complained of. Raises VideoError if it gave up."""
        command = self.command(source, part, copy)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=self.timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise VideoError(source, f"took longer than {self.timeout:g} s") from None
        said = _complaint(done.stderr, source)
        if done.returncode:
            raise VideoError(source, said or f"ffmpeg gave up (exit status {done.returncode})")
        return said

    def command(self, source: Path, part: Path, copy: Copy) -> list[str]:
        """The ffmpeg command line of a copy."""
        e = self.encoding
        side = f"trunc(min({e.short_side},min(iw,ih))/2)*2"
        scale = f"scale=w='if(lte(iw,ih),{side},-2)':h='if(lte(iw,ih),-2,{side})':flags=bicubic"
        cut = ["-ss", f"{copy.segment[0]:.3f}", "-to", f"{copy.segment[1]:.3f}"] if copy.segment else []
        fast = ["-g", "32", "-tune", "fastdecode"] if e.fast_decode else []
        return [
            *(self.ffmpeg, "-nostdin", "-hide_banner", "-v", "error", "-y", "-threads", "1"),
            *([] if e.salvage else ["-xerror"]),
            *(*cut, "-i", str(source), "-map", "0:V:0", "-map_metadata", "-1", "-vf", scale),
            *("-fps_mode", "passthrough", "-c:v", "libx264", "-threads", "1", "-pix_fmt", "yuv420p"),
            *("-crf", str(e.crf), "-preset", e.preset, *fast, "-movflags", "+faststart", str(part)),
        ]

    def _verified(self, source: Path, part: Path, frames: int | None, said: str) -> dict[str, Any]:
        """What the finished copy holds. Raises VideoError unless all frames are in it."""
        try:
            with open_video(part) as video:
                made = video.frame_count
                height, width = video.frames([0, made - 1]).shape[1:3]
        except VideoError as error:
            raise VideoError(part, said or f"nothing of it can be decoded ({error.reason})") from None
        if frames is not None and said:
            raise VideoError(part, said)
        if frames is not None and made < frames and made < scan(source).decoded:
            raise VideoError(part, f"only {made} of {frames} frames were copied")
        record = {"frames": made, "width": width, "height": height, "bytes": part.stat().st_size}
        return {**record, "damage": said} if said else record


def clean_parts(out: Path) -> None:
    """Make the folder of copies in the making, and remove what processes that are gone have left in it."""
    folder = out / PARTS
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.iterdir():
        host, _, pid = part.stem.rpartition("-")
        with contextlib.suppress(OSError, ValueError):
            gone = host == platform.node() and not Path(f"/proc/{int(pid)}").exists()
            if gone or time.time() - part.stat().st_mtime > _STALE:
                part.unlink()


def rewritten(text: str, made: dict[str, bool], separator: str = " ") -> tuple[str, int]:
    """An annotation file's lines with the names of the copies, those without a copy left out; and how many those are.

    made: by source path, whether there is a copy.
    """
    kept, lost = [], 0
    for line in text.splitlines():
        path, found, label = line.strip().rpartition(separator)
        if not found:
            continue
        if made.get(path, False):
            kept.append(f"{Path(path).with_suffix('.mp4')}{separator}{label}\n")
        else:
            lost += 1
    return "".join(kept), lost


def located(source: Path) -> Path:
    """The source, or the file of the same name that ends differently (downloads come as mp4, mkv or webm)."""
    others = (source.with_suffix(ending) for ending in (".mkv", ".webm", ".mp4"))
    return source if source.exists() else next((p for p in others if p.exists()), source)


def _complaint(stderr: str, source: Path) -> str:
    """The first line that ffmpeg says, without addresses and the file's name."""
    for line in stderr.splitlines():
        text = line.split("] ", 1)[-1].replace(str(source), "the file").strip()
        if text and not text.startswith("Last message repeated"):
            return text
    return ""


def _make_durable(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = [
    "PARTS",
    "Copy",
    "Encoding",
    "Resize",
    "clean_parts",
    "copies",
    "found_below",
    "located",
    "rewritten",
    "segments",
]
