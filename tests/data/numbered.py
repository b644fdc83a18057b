"""Small real video files whose frames carry their number."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from support import settings

from multitrain.config import RunConfig, validate

LENGTHS = (12, 40, 1, 2, 25, 31, 9)
"""Frames of the videos of a dataset, going round."""

_BLOCK = 16
_BITS = 10


def numbered_frame(number: int, width: int, height: int, tint: int = 0) -> np.ndarray:
    """A picture whose blocks, white or black, spell `number` in binary; the rest is a gradient that moves with it."""
    ramp = (np.arange(width)[None, :, None] + np.arange(height)[:, None, None] + 3 * number + tint) % 256
    picture = np.broadcast_to(ramp, (height, width, 3)).astype(np.uint8).copy()
    for bit in range(_BITS):
        row, column = divmod(bit, 4)
        block = picture[row * _BLOCK : (row + 1) * _BLOCK, column * _BLOCK : (column + 1) * _BLOCK]
        block[:] = 255 if number >> bit & 1 else 0
    return picture


def number_of(picture: np.ndarray) -> int:
    """The number that a decoded picture carries."""
    number = 0
    for bit in range(_BITS):
        row, column = divmod(bit, 4)
        middle = picture[row * _BLOCK + 4 : row * _BLOCK + 12, column * _BLOCK + 4 : column * _BLOCK + 12]
        number |= int(middle.mean() > 127) << bit
    return number


def write_numbered(
    path: Path,
    frames: int,
    *,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    rate: int = 30,
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    tint: int = 0,
) -> Path:
    """A video of `frames` numbered frames; `times` are presentation times in frames, for a variable rate."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"preset": "veryfast"} | (options or {}))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for n in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(n, *size, tint), format="rgb24")
            frame.pts, frame.time_base = (times[n] if times else n), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def run_config(data: Path, **changes: Any) -> RunConfig:
    """The configuration of a tiny run on the files of `videos`."""
    return validate(settings(data, **{"model__crop": 32, "augment__mix_group": 2, **changes}))
