"""Three small datasets of H.264 files with partly overlapping label spaces, for `make demo`, tests and drills.

The labels of `shapes` are what moves (6 classes), those of `motions` how it moves (6), those of `scenes` both (12 pairs of 4 of those
shapes and 4 of those motions). A shape of random colour, size and rotation moves or changes size over a random, drifting, noisy texture.
Properties that a dataset does not label vary freely. Every split has its own random draws, so no background, path or
speed of a test video occurs in training. Paths are centred independently of their direction, so a
single frame does not show the direction of a motion.

    python -m multitrain.data.demo --out DIR

writes ``DIR/NAME/annotations/{train,val,test}.csv`` with ``classes.txt``, and ``DIR/NAME/videos/``.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from multitrain.config.arguments import OneLineParser
from multitrain.config.reading import read_json
from multitrain.data.random import KeyedRNG, generator
from multitrain.errors import ConfigError
from multitrain.files import OutputFolder

SIZE = 64
"""Height and width of a video in pixels."""
RATE = 24
"""Frames per second."""
VERSION = 1
"""Increased whenever the same seed makes different files."""

SHAPES = ("circle", "bar", "triangle", "cross", "star", "ring")
MOTIONS = ("left", "right", "up", "down", "growing", "shrinking")
PAIRS = tuple(
    (shape, motion)
    for shape, motions in {
        "circle": ("left", "right", "up"),
        "triangle": ("right", "up", "down"),
        "cross": ("up", "down", "left"),
        "ring": ("down", "left", "right"),
    }.items()
    for motion in motions
)
CLASSES = {
    "shapes": SHAPES,
    "motions": tuple(f"moving {m}" if m in ("left", "right", "up", "down") else m for m in MOTIONS),
    "scenes": tuple(f"{shape} moving {motion}" for shape, motion in PAIRS),
}
"""Class names by dataset, in label order."""

CLIPS = {
    "shapes": {"train": 720, "val": 90, "test": 150},
    "motions": {"train": 600, "val": 90, "test": 150},
    "scenes": {"train": 720, "val": 96, "test": 180},
}
"""Number of videos by dataset and split."""

_DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@dataclass(frozen=True)
class Clip:
    """One video to generate: its path, and the key of its random draws."""

    folder: str
    dataset: str
    split: str
    index: int
    seed: int

    @property
    def label(self) -> int:
        """Labels cycle through the classes, so that they are balanced."""
        return self.index % len(CLASSES[self.dataset])

    @property
    def path(self) -> str:
        """Path below the video root; does not contain the label."""
        return f"{self.split}/{self.index:05d}.mp4"


def generate(
    out: str | Path,
    *,
    seed: int = 0,
    clips: Mapping[str, Mapping[str, int]] | None = None,
    processes: int | None = None,
) -> bool:
    """Generate the datasets in `out`, unless they exist already. The same seed gives the same bytes.

    Args:
        out: the folder.
        seed: seed of all random draws.
        clips: number of videos per dataset and split (default: :data:`CLIPS`).
        processes: number of processes (default: one per core).

    Returns:
        Whether anything was generated.

    Raises:
        ConfigError: a file that the demo did not make is in the way.
    """
    out, clips = Path(out), clips or CLIPS
    marker, content = (
        out / "demo.json",
        {"version": VERSION, "seed": seed, "clips": {d: dict(c) for d, c in clips.items()}},
    )
    if marker.is_file() and read_json(marker) == content:
        return False
    folder = _output(str(out))
    folder.remove(marker.name)
    work = [Clip(str(out), d, s, i, seed) for d in clips for s, n in clips[d].items() for i in range(n)]
    for dataset in clips:
        _write_annotations(folder, dataset, [c for c in work if c.dataset == dataset], clips[dataset])
    processes = processes or len(os.sched_getaffinity(0))
    if processes == 1:
        for clip in work:
            write_clip(clip)
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            for _ in pool.map(write_clip, work, chunksize=20):
                pass
    folder.write_text(marker.name, json.dumps(content) + "\n")
    return True


@lru_cache(maxsize=4)
def _output(folder: str) -> OutputFolder:
    return OutputFolder(folder, "demo")


def write_clip(clip: Clip) -> None:
    """Render one clip and encode it as H.264 in MP4."""
    with _output(clip.folder).writing(f"{clip.dataset}/videos/{clip.path}") as temporary:
        _encode(temporary, draw(clip))


def draw(clip: Clip) -> np.ndarray:
    """The frames of a clip: uint8 [T, 64, 64, 3] RGB, T from 24 to 48."""
    draws = KeyedRNG("demo", VERSION, clip.seed, clip.dataset, clip.split, clip.index)
    shape, motion = _content(clip, draws)
    frames = draws.integer(24, 48)
    texture = _texture(clip, draws)
    centres, radii = _path(motion, frames, draws)
    colour = _colour(draws)
    turn, spin = draws.uniform(-0.2, 0.2), draws.uniform(-0.2, 0.2)
    pan = np.array([draws.uniform(-7, 7), draws.uniform(-7, 7)])
    out = np.empty((frames, SIZE, SIZE, 3), np.uint8)
    for t in range(frames):
        s = t / (frames - 1)
        top, left = (8 + np.round(pan * s)).astype(int)
        out[t] = texture[top : top + SIZE, left : left + SIZE]
        _paint(out[t], shape, centres[t], radii[t], turn + spin * s, colour)
    return out


def _content(clip: Clip, draws: KeyedRNG) -> tuple[str, str]:
    """(shape, motion): those of the label; random where the label does not set them."""
    shape, motion = SHAPES[draws.integer(0, 5)], MOTIONS[draws.integer(0, 5)]
    if clip.dataset == "shapes":
        return SHAPES[clip.label], motion
    if clip.dataset == "motions":
        return shape, MOTIONS[clip.label]
    return PAIRS[clip.label]


def _texture(clip: Clip, draws: KeyedRNG) -> np.ndarray:
    """A background larger than the frame, so that it can drift: coarse coloured blobs plus fine grain, uint8 [80, 80, 3]."""
    import cv2

    side = SIZE + 16
    bits = generator("demo texture", VERSION, clip.seed, clip.dataset, clip.split, clip.index).bit_generator
    raw = bits.random_raw((side * side * 3 + 7) // 8 + 64).view(np.uint8)
    cells = draws.integer(3, 7)
    blobs = raw[: cells * cells * 3].reshape(cells, cells, 3).astype(np.float32)
    grain = raw[-side * side * 3 :].reshape(side, side, 3).astype(np.float32)
    coarse = cv2.resize(blobs, (side, side), interpolation=cv2.INTER_CUBIC)
    base, contrast, noise = draws.uniform(40, 100), draws.uniform(0.15, 0.4), draws.uniform(0.04, 0.15)
    mixed = base + (coarse - 127.5) * contrast + (cv2.GaussianBlur(grain, (3, 3), 0) - 127.5) * 2 * noise
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def _path(motion: str, frames: int, draws: KeyedRNG) -> tuple[np.ndarray, np.ndarray]:
    """Centres [T, 2] in pixels (x, y) and radii [T]; a motion played backwards is the opposite motion."""
    s = np.linspace(-0.5, 0.5, frames)
    drift = np.array([draws.uniform(-3, 3), draws.uniform(-3, 3)])
    if motion in _DIRECTIONS:
        radius, travel = draws.uniform(15, 19), draws.uniform(14, 24)
        along = np.array(_DIRECTIONS[motion])
        ends = travel * np.abs(along) / 2
        radii = np.full(frames, radius)
        steps = travel * along + drift * (along == 0)
    else:
        small = draws.uniform(9, 11)
        growth = np.linspace(small, small * draws.uniform(1.7, 2.1), frames)
        radii, ends, steps = growth if motion == "growing" else growth[::-1], np.zeros(2), drift
    room = np.maximum(SIZE / 2 - 1 - ends - radii.max(), 0)
    middle = SIZE / 2 + np.array([draws.uniform(-1, 1), draws.uniform(-1, 1)]) * room
    return middle + s[:, None] * steps, radii


def _colour(draws: KeyedRNG) -> tuple[int, int, int]:
    """A bright colour of any hue: one channel at the maximum, the others random."""
    channels = [255, draws.integer(60, 255), draws.integer(150, 255)]
    start = draws.integer(0, 2)
    return channels[start], channels[start - 1], channels[start - 2]


def _outline(shape: str) -> np.ndarray:
    """Corners [n, 2], for a radius of about one."""
    if shape == "bar":
        return np.array([(-1.1, -0.4), (1.1, -0.4), (1.1, 0.4), (-1.1, 0.4)])
    if shape == "triangle":
        return 1.15 * np.array([(math.sin(a), -math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)])
    if shape == "cross":
        a, b = 1.05, 0.28
        corners = [
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        ]
        return np.array(corners)
    turns = np.arange(10) * math.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, 1.15, 0.5)
    return np.stack([reach * np.sin(turns), -reach * np.cos(turns)], 1)


def _paint(
    image: np.ndarray, shape: str, centre: np.ndarray, radius: float, turn: float, colour: tuple[int, int, int]
) -> None:
    """Draw a filled shape, anti-aliased and with subpixel positions."""
    import cv2

    bits = 4
    x, y = (round(float(c) * 2**bits) for c in centre)
    if shape in ("circle", "ring"):
        size = 0.92 * radius if shape == "circle" else 0.8 * radius
        thick = -1 if shape == "circle" else max(2, round(0.36 * radius))
        cv2.circle(image, (x, y), round(size * 2**bits), colour, thick, cv2.LINE_AA, bits)
        return
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    corners = np.rint((centre + radius * _outline(shape) @ rotation.T) * 2**bits).astype(np.int32)
    cv2.fillPoly(image, [corners], colour, cv2.LINE_AA, bits)


def _encode(path: Path, frames: np.ndarray) -> None:
    """Encode as H.264 in MP4 (x264, with B-frames; one thread, so that the bytes are reproducible)."""
    import av

    options = {"preset": "superfast", "crf": "20", "threads": "1"}
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(RATE), options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _write_annotations(out: OutputFolder, dataset: str, clips: Sequence[Clip], splits: Mapping[str, int]) -> None:
    out.folder(f"{dataset}/videos")
    out.write_text(f"{dataset}/annotations/classes.txt", "".join(name + "\n" for name in CLASSES[dataset]))
    for split in splits:
        lines = "".join(f"{c.path} {c.label}\n" for c in clips if c.split == split)
        out.write_text(f"{dataset}/annotations/{split}.csv", lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m multitrain.data.demo --out DIR``; see the module's docstring."""
    parser = OneLineParser("python -m multitrain.data.demo", __doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="folder to make the datasets in")
    parser.add_argument("--seed", type=int, default=0, help="other seeds make other videos (default 0)")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the usual number of videos (default 1)")
    parser.add_argument("--processes", type=int, default=None, help="processes at once (default: one a core)")
    options = parser.parse_args(arguments)
    if not 0 < options.fraction <= 10:
        parser.error(f"--fraction {options.fraction} must be above 0 and at most 10")
    clips = {
        d: {s: max(len(CLASSES[d]), round(n * options.fraction)) for s, n in splits.items()}
        for d, splits in CLIPS.items()
    }
    began = time.monotonic()
    try:
        made = generate(options.out, seed=options.seed, clips=clips, processes=options.processes)
    except (ConfigError, OSError) as error:
        print(f"multitrain.data.demo: {error}", file=sys.stderr)
        return 2
    count = sum(sum(splits.values()) for splits in clips.values())
    what = f"made {count} videos in {time.monotonic() - began:.0f} s" if made else f"{count} videos are there already"
    print(f"{what}: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
