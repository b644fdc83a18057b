"""Synthetic videos for the benchmarks, so that these need only the checkout: 320p H.264, ten seconds, 30 frames per second.

A hand-held camera over a scene with a natural spectrum (amplitude falling as 1 / frequency), textured objects that move and turn,
changing light, and sensor noise. The cost of decoding and augmenting them is close to that of real clips; the results page gives
the difference where real clips were measured.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from multitrain.data.decode import Backend, VideoError, open_video

CACHE = Path(__file__).resolve().parent / ".footage"
VERSION = 1
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")


def real(folder: Path | str, count: int) -> list[Path]:
    """At most `count` video files below a folder, spread evenly over it; those that a decoder cannot read are left out.

    Raises SystemExit, in one line, when there is none.
    """
    if not Path(folder).is_dir():
        raise SystemExit(f"--videos {folder}: no such folder")
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise SystemExit(f"--videos {folder}: no video file in it ({', '.join(SUFFIXES)})")
    chosen = [found[n * len(found) // min(count, len(found))] for n in range(min(count, len(found)))]
    readable = [path for path in chosen if _is_readable(path)]
    if not readable:
        raise SystemExit(f"--videos {folder}: none of {len(chosen)} files in it can be read")
    return readable


def _is_readable(path: Path) -> bool:
    """Whether every installed decoder can read the file; prints a message if not."""
    for decoder in decoders():
        try:
            with open_video(path, decoder) as video:
                for _ in video.each(range(video.frame_count)):
                    pass
        except VideoError as error:
            print(f"left out, {decoder} cannot read it: {error}", file=sys.stderr, flush=True)
            return False
    return True


def decoders() -> list[Backend]:
    """The installed decoders."""
    return ["pyav", "decord"] if importlib.util.find_spec("decord") else ["pyav"]


def described(videos: Sequence[Path]) -> str:
    """A description without names: ``12 videos (avi, mp4), 320×240 to 1280×720, 25 to 30 fps, 2 to 10 s``."""
    heights, widths, rates, seconds = [], [], [], []
    for path in videos:
        with open_video(path) as video:
            height, width = video.frames([0]).shape[1:3]
            heights.append(height)
            widths.append(width)
            rates.append(video.fps)
            seconds.append(video.duration)
    kinds = ", ".join(sorted({p.suffix.lower()[1:] for p in videos}))
    smallest, largest = f"{min(widths)}×{min(heights)}", f"{max(widths)}×{max(heights)}"
    size = smallest if smallest == largest else f"{smallest} to {largest}"
    return f"{len(videos)} videos ({kinds}), {size}, {_range(rates)} fps, {_range(seconds)} s"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def made(
    count: int, size: tuple[int, int] = (568, 320), frames: int = 300, rate: int = 30, folder: Path = CACHE
) -> list[Path]:
    """`count` files of `size` (width, height) and `rate` frames per second, generated if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [folder / f"v{VERSION}-{size[0]}x{size[1]}-{frames}at{rate}-{n}.mp4" for n in range(count)]
    for number, file in enumerate(names):
        if not file.exists():
            _write(file, number, size, frames, rate)
    return names


def _write(file: Path, seed: int, size: tuple[int, int], frames: int, rate: int) -> None:
    import av

    partial = file.with_suffix(f".{os.getpid()}.mp4")
    scene = Scene(seed, size)
    with av.open(str(partial), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "23", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = size[0], size[1], "yuv420p"
        stream.thread_count = 1
        for t in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scene.frame(t), format="rgb24")))
        container.mux(stream.encode())
    os.replace(partial, file)


class Scene:
    """A scene determined by its seed, with random access to its frames."""

    def __init__(self, seed: int, size: tuple[int, int]) -> None:
        self._rng = np.random.default_rng(seed)
        self._seed, self._size = seed, size
        self._ground = _texture(self._rng, (size[1] * 3 // 2, size[0] * 3 // 2), 1.0)
        self._things = [_Thing(self._rng, size) for _ in range(4)]
        self._pan = self._rng.uniform(0.3, 1.0, 4) * self._rng.choice([-1, 1], 4)

    def frame(self, t: int) -> np.ndarray:
        """uint8 [H, W, 3]."""
        width, height = self._size
        sway = np.array([np.sin(t / 41 * self._pan[0]), np.cos(t / 37 * self._pan[1])]) * (width / 12, height / 12)
        shake = np.random.default_rng((self._seed, t)).normal(0, 0.35, 2)
        centre = np.array([self._ground.shape[1], self._ground.shape[0]]) / 2
        turn = cv2.getRotationMatrix2D(tuple(centre), 3 * np.sin(t / 90 * self._pan[2]), 1 + 0.05 * np.sin(t / 60))
        turn[:, 2] += np.array([width, height]) / 2 - centre + sway + shake
        picture = cv2.warpAffine(
            self._ground, turn, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
        )
        for thing in self._things:
            thing.paint(picture, t, sway)
        picture *= 1 + 0.04 * np.sin(t / 25)
        picture += np.random.default_rng((self._seed, t, 1)).normal(0, 2.0, picture.shape).astype(np.float32)
        return np.clip(picture, 0, 255).astype(np.uint8)


class _Thing:
    """A textured ellipse that moves along a path."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self._size = size
        side = int(size[1] * rng.uniform(0.25, 0.55))
        self._skin = _texture(rng, (side, side), 0.9)
        y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1
        distance = np.sqrt(x**2 + (y / rng.uniform(0.5, 1.0)) ** 2)
        self._mask = np.clip((1 - distance) * side / 4, 0, 1).astype(np.float32)
        self._place = rng.uniform(0.2, 0.8, 2) * size
        self._swing = rng.uniform(0.05, 0.3, 2) * size
        self._speed = rng.uniform(8, 40, 3) * rng.choice([-1, 1], 3)

    def paint(self, picture: np.ndarray, t: int, sway: np.ndarray) -> None:
        side = len(self._mask)
        at = self._place + self._swing * (np.sin(t / self._speed[0]), np.cos(t / self._speed[1])) + sway
        turn = cv2.getRotationMatrix2D((side / 2, side / 2), 25 * np.sin(t / self._speed[2]), 1.0)
        turn[:, 2] += at - side / 2
        mask = cv2.warpAffine(self._mask, turn, self._size)[..., None]
        picture += mask * (cv2.warpAffine(self._skin, turn, self._size) - picture)


def _texture(rng: np.random.Generator, shape: tuple[int, int], power: float) -> np.ndarray:
    """Coloured noise whose amplitude falls with frequency to the `power`: float32 [H, W, 3] of 0 … 255."""
    fy, fx = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :]
    fall = np.maximum(np.hypot(fy, fx), 1 / max(shape)) ** -(power + 0.25)
    planes = []
    for _ in range(3):
        phase = rng.normal(size=(shape[0], fall.shape[1])) + 1j * rng.normal(size=(shape[0], fall.shape[1]))
        planes.append(np.fft.irfft2(fall * phase, shape))
    light = planes[0]
    out = np.stack([light + 0.35 * p for p in planes], axis=-1)
    out = (out - out.mean()) / out.std()
    return (128 + 52 * out).clip(0, 255).astype(np.float32)
