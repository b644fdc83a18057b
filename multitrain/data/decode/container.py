"""What counts as a video file: the one place that opens containers. Local files only, of known formats, of bounded size.

A name is a file's name and nothing else: no address, no pattern, no list of other files. A text that names other files
(playlist, concat script, session description) is no video, nor is a picture, nor a sound with a cover picture.
"""

from __future__ import annotations

import io
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from multitrain.data.decode.video import VideoError, from_pack, is_transient
from multitrain.data.packs import read

if TYPE_CHECKING:
    import av

MAX_PIXELS = 1 << 26
"""Pixels of the largest frame that is decoded, 8192 × 8192; 8K is half of it."""

VIDEO_FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "live_flv", "asf", "asf_o", "ogg", "mxf", "gxf", "nut", "ivf"),
    *("h261", "h263", "h264", "hevc", "vvc", "evc", "m4v", "mpegvideo", "obu", "av1", "vc1", "vc1test", "cavsvideo"),
    *("avs2", "avs3", "dirac", "dnxhd", "dv", "mjpeg", "mjpeg_2000", "ingenient", "mpjpeg", "smjpeg", "yuv4mpegpipe"),
    *("gif", "apng", "rm", "ivr", "nsv", "nuv", "pva", "wtv", "ty", "kux", "vivo", "swf", "lxf", "cine", "lmlm4"),
    *("dhav", "luodat", "hxvs", "ifv", "nc", "iv8", "mxg", "flic", "smk", "bink", "thp", "roq"),
)
"""libavformat's readers of files that hold moving pictures themselves. Readers that open other files are left out."""
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
"""Known only to be refused by name."""
_KNOWN = ",".join((*VIDEO_FORMATS, *_SOUND_FORMATS, *_PICTURE_FORMATS))


def open_container(path: Path) -> tuple[av.container.InputContainer, av.VideoStream]:
    """An open file and its video stream, whose decoder works in one thread; other streams are not read.

    Raises:
        VideoError: no video, of a codec that is not known, or of frames beyond `MAX_PIXELS`.
    """
    import av

    source = opened(path)
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
    """The number, within its file, of the stream that is read of a video; other programs are told it, so that they take the
    same. Raises VideoError as `open_container`."""
    container, stream = open_container(path)
    with container:
        return stream.index


class Bytes(io.BytesIO):
    """A video in memory; libavformat is told its name, whose ending it looks at as it does with a file."""

    name: str


def opened(path: Path) -> str | Bytes:
    """What libraries open: the name of a file (see `local_name`), or the bytes of a packed video.

    Raises:
        VideoError: the video lies in a shard that cannot be read.
    """
    with from_pack(path):
        content = read(path)
    if content is None:
        return local_name(path)
    source = Bytes(content)
    source.name = local_name(path)
    return source


def content_of(path: Path) -> BinaryIO:
    """The bytes of a video, of a file or a pack, to be closed.

    Raises:
        VideoError: they cannot be read.
    """
    source = opened(path)
    try:
        return source if isinstance(source, Bytes) else open(path, "rb")
    except OSError as error:
        raise as_video_error(path, error) from error


def local_name(path: Path) -> str:
    """A file's name for libavformat: whole and with a prefix, so that nothing in it is taken for a protocol, an option or a
    pattern."""
    return f"file:{os.path.abspath(path)}"


def _video_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    """The best video stream that is no cover picture; the others are told to be quiet."""
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
    context.options = {"max_pixels": str(MAX_PIXELS)}  # a stream may change its size on the way
    try:
        context.open(strict=False)  # now, for dav1d reads skip_frame here and never again
    except Exception as error:
        raise as_video_error(path, error) from error


def has_flag(container: av.container.InputContainer, name: str) -> bool:
    """Whether libavformat says this of the container's format; names as in `av.format.Flags`."""
    return bool(container.format.flags & _flag(name))


@cache
def _flag(name: str) -> int:
    from av.format import Flags

    bit: Any = Flags[name].value
    return int(bit)


def check_size(path: Path, width: int, height: int) -> None:
    """Raises VideoError for frames of more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise VideoError(
            path, f"frames of {width} × {height} pixels; more than {MAX_PIXELS >> 20} million are not decoded"
        )


def as_video_error(path: Path, error: BaseException) -> VideoError:
    """What a library raised about a file, as the one error that callers know."""
    return error if isinstance(error, VideoError) else VideoError(path, _reason(error), transient=is_transient(error))


def _reason(error: BaseException) -> str:
    """What a library says is wrong, without the path and its own decoration."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    log = getattr(error, "log", None)
    return f"{text} ({log[2].strip()})" if log else str(text).splitlines()[-1]


__all__ = [
    "MAX_PIXELS",
    "VIDEO_FORMATS",
    "as_video_error",
    "check_size",
    "content_of",
    "has_flag",
    "local_name",
    "open_container",
    "opened",
    "stream_index",
]
