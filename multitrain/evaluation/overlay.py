"""A copy of a video with the model's predictions drawn in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from multitrain.data.decode import Backend, Video, open_video
from multitrain.data.encode import write_video
from multitrain.text import printable


def write_overlay(
    source: str | Path, target: str | Path, predictions: Mapping[str, Sequence[tuple[str, float]]], decoder: Backend
) -> int:
    """Writes `source` as `target` (H.264 in MP4, no sound) with the predictions in its lower left corner.

    The picture is as a player shows the source: upright, every frame at its own time.

    Args:
        source: a video file.
        target: the file to write.
        predictions: (label, probability) by dataset, best first.
        decoder: of `source`.

    Returns:
        The number of frames written.

    Raises:
        VideoError: `source` cannot be read to its end, or `target` not be written; no `target` is left then.
    """
    label: np.ndarray | None = None
    with open_video(source, decoder) as video, write_video(Path(target), video.fps) as writer:
        times = video.times()
        for number, frame in _in_order(video):
            label = caption(predictions, frame.shape[0], frame.shape[1]) if label is None else label
            writer.add(_blend(frame, label), times[number])
            del frame  # before the next one is decoded
        return video.frame_count


def _in_order(video: Video) -> Iterator[tuple[int, np.ndarray]]:
    """All frames in order, one in memory at a time; a frame that fails is requested again by itself."""
    done = 0
    while done < video.frame_count:
        for number, frame in video.each(range(done, video.frame_count)):
            if number != done:
                break
            yield number, frame
            del frame
            done += 1
        else:
            continue
        yield from video.each([done])
        done += 1


def caption(predictions: Mapping[str, Sequence[tuple[str, float]]], height: int, width: int) -> np.ndarray:
    """The lines of text on a transparent background, for frames of height × width: uint8 [h, w, 4], h ≤ height, w ≤ width.

    The best class of every dataset is shown, and further ones as long as the text covers no more than :data:`COVERED` of the height.
    Lines that are wider than the frame end in an ellipsis.
    """
    room = int(COVERED * height)
    size = float(max(8, min(height // 20, 4 * room // (5 * max(len(predictions), 1)))))
    font = ImageFont.load_default(size)
    step = int(size * 1.25)
    each = max(1, (room - 4) // step // max(len(predictions), 1))
    texts = [f"{name}: {label} {100 * p:.1f}%" for name, best in predictions.items() for label, p in best[:each]]
    lines = [_fitting(printable(text), font, width - 8) for text in texts]
    wide = min(width, int(max((font.getlength(line) for line in lines), default=0)) + 8)
    image = Image.new("RGBA", (max(wide, 1), max(min(height, step * len(lines) + 4), 1)), (0, 0, 0, 150))
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        draw.text((4, 2 + row * step), line, font=font, fill=(255, 255, 255, 255))
    return np.asarray(image)


def _fitting(line: str, font: Any, width: int) -> str:
    """`line`, or as much of its beginning as is `width` pixels wide, with an ellipsis."""
    if font.getlength(line) <= width:
        return line
    kept = next((n for n in range(len(line) - 1, 0, -1) if font.getlength(f"{line[:n]}…") <= width), 0)
    return f"{line[:kept].rstrip()}…" if kept else ""


COVERED = 1 / 3
"""Share of a frame's height that the text may cover; the best class of every dataset is shown even in smaller frames."""


def _blend(frame: np.ndarray, label: np.ndarray) -> np.ndarray:
    """`frame` with `label` over its lower left corner."""
    out = frame.copy()
    corner = out[-label.shape[0] :, : label.shape[1]]
    opacity = label[..., 3:].astype(np.float32) / 255
    corner[...] = np.rint(corner * (1 - opacity) + label[..., :3] * opacity).astype(np.uint8)
    return out
