"""A copy of a video with the model's predictions drawn in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

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
    """The lines of text on a transparent background, for frames of height × width: uint8 [h, w, 4], h ≤ height, w ≤ width."""
    lines = [printable(f"{name}: {label} {100 * p:.1f}%") for name, best in predictions.items() for label, p in best]
    size = float(max(8, min(height // 16, (height - 4) // max(len(lines), 1) - 2)))
    font = ImageFont.load_default(size)
    boxes = [font.getbbox(line) for line in lines]
    step = int(size * 1.25)
    wide = min(width, int(max((box[2] for box in boxes), default=0)) + 8)
    image = Image.new("RGBA", (max(wide, 1), max(min(height, step * len(lines) + 4), 1)), (0, 0, 0, 150))
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        draw.text((4, 2 + row * step), line, font=font, fill=(255, 255, 255, 255))
    return np.asarray(image)


def _blend(frame: np.ndarray, label: np.ndarray) -> np.ndarray:
    """`frame` with `label` over its lower left corner."""
    out = frame.copy()
    corner = out[-label.shape[0] :, : label.shape[1]]
    opacity = label[..., 3:].astype(np.float32) / 255
    corner[...] = np.rint(corner * (1 - opacity) + label[..., :3] * opacity).astype(np.uint8)
    return out
