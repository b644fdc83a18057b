"""Open video containers: local files only, of known formats and bounded size. No other module opens containers.

A path is always taken as a file name, never as a URL, a pattern or a list of files. Text files that name other files
(playlist, concat script, session description), still images, and audio files with a cover image are rejected.
"""

from __future__ import annotations

import io
import os
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from multitrain.data.decode.video import VideoError, from_pack, is_transient, located
from multitrain.data.packs import Stored, is_far, read, read_part

if TYPE_CHECKING:
    import av

MAX_PIXELS = 1 << 26
"""Maximum pixels of a frame, 8192 × 8192; 8K is half of it."""

VIDEO_FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "live_flv", "asf", "asf_o", "ogg", "mxf", "gxf", "nut", "ivf"),
    *("h261", "h263", "h264", "hevc", "vvc", "evc", "m4v", "mpegvideo", "obu", "av1", "vc1", "vc1test", "cavsvideo"),
    *("avs2", "avs3", "dirac", "dnxhd", "dv", "mjpeg", "mjpeg_2000", "ingenient", "mpjpeg", "smjpeg", "yuv4mpegpipe"),
    *("gif", "apng", "rm", "ivr", "nsv", "nuv", "pva", "wtv", "ty", "kux", "vivo", "swf", "lxf", "cine", "lmlm4"),
    *("dhav", "luodat", "hxvs", "ifv", "nc", "iv8", "mxg", "flic", "smk", "bink", "thp", "roq"),
)
"""libavformat's demuxers of video files. Demuxers that open other files are excluded."""
_SOUND_FORMATS = (
    "mp3",
    "aac",
    "flac",
    "wav",
    "w64",
    "aiff",
    "ape",
    "wv",
    "tta",
    "caf",
    "amr",
    "ac3",
    "eac3",
    "dts",
    "au",
)
_PICTURE_FORMATS = tuple(
    f"{kind}_pipe"
    for kind in ("jpeg", "png", "bmp", "webp", "tiff", "gif", "ppm", "pgm", "jpegxl", "j2k", "psd", "exr")
)
"""Still-image formats, accepted by the demuxer only so that the error can name them."""
_KNOWN = ",".join((*VIDEO_FORMATS, *_SOUND_FORMATS, *_PICTURE_FORMATS))

_BLOCK, _BLOCKS = 1 << 20, 8
"""Bytes of a request to a network, and number of blocks kept for an open video."""


def open_container(path: Path, *, whole: bool = True) -> tuple[av.container.InputContainer, av.VideoStream]:
    """Open a file and its video stream, with a single-threaded decoder; other streams are discarded.

    Args:
        whole: whether a packed video is read completely and compared with its checksum, or only the parts that are needed.

    Raises:
        VideoError: the file has no video, an unknown codec, or frames larger than `MAX_PIXELS`.
    """
    import av

    source = opened(path) if whole else ranges(path)
    options = {"protocol_whitelist": "file", "format_whitelist": _KNOWN, "max_pixels": str(MAX_PIXELS)}
    try:
        container = av.open(source, "r", options=options, metadata_errors="replace")
    except av.error.ArgumentError as error:
        raise VideoError(
            path, "no video format; a text, playlist, picture or other file under a video's name"
        ) from error
    except av.error.InvalidDataError as error:
        raise VideoError(path, "no video format that is known, or cut off before its index") from error
    except Exception as error:
        raise as_video_error(path, error) from error
    try:
        stream = _video_stream(path, container)
        _open_decoder(path, stream)
    except BaseException:
        container.close()
        raise
    return container, stream


def stream_index(path: Path) -> int:
    """The index, in its file, of the video stream that is read; passed to ffmpeg, so that it reads the same one. Raises VideoError as
    `open_container` does."""
    container, stream = open_container(path)
    with container:
        return stream.index


_Source = TypeVar("_Source", "Bytes", "Ranges")


class Bytes(io.BytesIO):
    """A video in memory, with a name, because libavformat uses the suffix to detect the format."""

    name: str


def opened(path: Path) -> str | Bytes:
    """The input to pass to a library: the name of a file (see `local_name`), or the bytes of a packed video.

    Raises:
        VideoError: the shard that holds the video cannot be read.
    """
    with from_pack(path):
        content = read(path)
    return local_name(path) if content is None else _as_named(Bytes(content), path)


class Ranges(io.RawIOBase):
    """A packed video of which only the parts that are read are fetched from its shard; named as `Bytes`.

    Attributes:
        size: bytes of the video.
    """

    name: str

    def __init__(self, stored: Stored) -> None:
        self.size, self._stored, self._at = stored.size, stored, 0
        self._block = _BLOCK if is_far(stored) else 0
        self._fetch = lru_cache(maxsize=_BLOCKS)(self._fetched)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        if self._block:
            first, last = self._at // self._block, (self._at + size - 1) // self._block
            joined = b"".join(self._fetch(number * self._block, self._block) for number in range(first, last + 1))
            content = joined[self._at - first * self._block :][:size]
        else:
            content = self._fetched(self._at, size)
        self._at += len(content)
        return content

    def _fetched(self, begin: int, size: int) -> bytes:
        return read_part(self._stored, begin, size)


def ranges(path: Path) -> str | Ranges:
    """As `opened`, but a packed video is read in parts, which are not compared with its checksum."""
    stored = located(path)
    return local_name(path) if stored is None else _as_named(Ranges(stored), path)


def _as_named(source: _Source, path: Path) -> _Source:
    source.name = local_name(path)
    return source


def content_of(path: Path, *, whole: bool = True) -> BinaryIO:
    """Open the bytes of a video, in a file or a pack; the caller closes it. `whole` as for `open_container`.

    Raises:
        VideoError: they cannot be read.
    """
    source = opened(path) if whole else ranges(path)
    try:
        return open(path, "rb") if isinstance(source, str) else cast(BinaryIO, source)
    except OSError as error:
        raise as_video_error(path, error) from error


def local_name(path: Path) -> str:
    """A file name for libavformat: absolute and with the prefix ``file:``, so that it is not parsed as a protocol, an option or a
    pattern."""
    return f"file:{os.path.abspath(path)}"


def _video_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    """The best video stream that is not a cover image; all other streams are discarded."""
    import av
    from av.stream import Discard, Disposition

    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    moving = [s for s in container.streams.video if not s.disposition & covers]
    if not moving:
        held = ", ".join(sorted({s.type for s in container.streams if s.type != "video"}))
        raise VideoError(path, f"no video in it, only {held}" if held else "no video in it, nor anything else")
    kind = container.format.name
    if kind.endswith("_pipe"):
        raise VideoError(path, f"a picture ({kind.removesuffix('_pipe')}), not a video")
    best = container.streams.best("video")
    stream = best if isinstance(best, av.VideoStream) and best in moving else moving[0]
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all
    return stream


def _open_decoder(path: Path, stream: av.VideoStream) -> None:
    context: Any = stream.codec_context
    if context is None:
        raise VideoError(path, "its video codec is not known, or this FFmpeg has no decoder for it")
    check_size(path, context.width, context.height)
    context.thread_count = 1
    context.options = {"max_pixels": str(MAX_PIXELS)}  # a stream may change its size within the file
    try:
        context.open(strict=False)  # now, because dav1d reads skip_frame only when it is opened
    except Exception as error:
        raise as_video_error(path, error) from error


def has_flag(container: av.container.InputContainer, name: str) -> bool:
    """Whether the container's format has a libavformat flag; names as in `av.format.Flags`."""
    return bool(container.format.flags & _flag(name))


@cache
def _flag(name: str) -> int:
    from av.format import Flags

    bit: Any = Flags[name].value
    return int(bit)


def check_size(path: Path, width: int, height: int) -> None:
    """Raise VideoError for frames of more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise VideoError(
            path, f"frames of {width} × {height} pixels; more than {MAX_PIXELS >> 20} million are not decoded"
        )


def as_video_error(path: Path, error: BaseException) -> VideoError:
    """Convert an error that a library raised about a file to `VideoError`, which callers handle."""
    return error if isinstance(error, VideoError) else VideoError(path, _reason(error), transient=is_transient(error))


def _reason(error: BaseException) -> str:
    """The message of a library's error, without the path and the library's decoration."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    log = getattr(error, "log", None)
    return f"{text} ({log[2].strip()})" if log else str(text).splitlines()[-1]
