"""Frames of 4K and 8K: converted, augmented and resized part by part, with the bits of the whole frame and in little memory."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from multitrain.config import AugmentConfig
from multitrain.data import randaugment_tiles, spatial
from multitrain.data.augment import Augmenter
from multitrain.data.decode import Picture, convert, open_video, part, pixels
from multitrain.data.decode.picture import Cutter
from multitrain.data.randaugment_tiles import rows_read
from multitrain.data.random import KeyedRNG
from multitrain.data.spatial import resize_crop, short_side_size, uniform_crop

FORMATS = (
    *("yuv420p", "yuvj420p", "yuv422p", "yuv440p", "yuv444p", "yuva420p", "nv12", "yuv420p10le", "yuv422p10le"),
    *("yuv444p10le", "yuv420p12le", "p010le", "gray", "gray10le", "rgb24", "gbrp", "bgr0", "yuv410p", "yuyv422"),
)
WHOLE = ("yuv410p", "yuyv422")
"""Converted whole."""


def write(path: Path, kind: str, size: tuple[int, int], codec: str = "rawvideo", grain: int = 1) -> Path:
    """Two frames of noise, of size (width, height), its grains of some pixels."""
    import av

    rng = np.random.default_rng(size)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = *size, kind
        for _ in range(2):
            noisy = rng.integers(0, 256, (size[1] // grain, size[0] // grain, 3), dtype=np.uint8)
            noisy = noisy.repeat(grain, 0).repeat(grain, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noisy, format="rgb24").reformat(format=kind)))
        container.mux(stream.encode())
    return path


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "LARGE", 1000)
    monkeypatch.setattr(spatial, "LARGE", 1000)
    monkeypatch.setattr(randaugment_tiles, "_TILE", 96)


def boxes(height: int, width: int, count: int) -> list[tuple[int, int, int, int]]:
    """Boxes of a frame, of which many lie at its borders; one is all of it."""
    rng = np.random.default_rng((height, width))
    found = [(0, 0, height, width), (height - 1, width - 1, 1, 1), (3, 5, 0, 7)]
    for _ in range(count):
        h, w = (int(rng.integers(1, side + 1)) for side in (height, width))
        top, left = (int(rng.choice([0, room, rng.integers(0, room + 1)])) for room in (height - h, width - w))
        found.append((top, left, h, w))
    return found


@pytest.mark.parametrize("size", [(200, 160), (330, 98), (201, 151)], ids=str)
def test_a_part_of_a_frame_has_the_bits_of_the_whole(
    tmp_path: Path, small_is_large: None, size: tuple[int, int]
) -> None:
    """Every pixel format, sizes that no vector instruction divides, odd sizes, boxes at borders."""
    for kind in FORMATS:
        with open_video(write(tmp_path / f"{kind}.nut", kind, size)) as video:
            for _, frame in video.pictures([0]):
                assert isinstance(frame, Picture) == (kind not in WHOLE and size[0] % 2 == 0), kind
                whole = pixels(frame)
                assert whole.shape == frame.shape == (size[1], size[0], 3)
                for top, left, h, w in boxes(size[1], size[0], 4):
                    np.testing.assert_array_equal(
                        part(frame, top, left, h, w), whole[top : top + h, left : left + w], kind
                    )
                del frame


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_a_part_of_a_turned_or_mirrored_frame_is_a_part_of_the_upright_one(
    turned: bool, signs: tuple[int, int]
) -> None:
    import av

    a, b = signs
    matrix = (0, a, b, 0) if turned else (a, 0, 0, b)
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(noise, format="rgb24").reformat(format="yuv420p")
    cutter = Cutter(200, 150, partial(convert._upright, matrix=matrix))
    whole = cutter.whole(frame)
    height, width = (200, 150) if turned else (150, 200)
    assert Picture(frame, cutter).shape == whole.shape == (height, width, 3)
    for top, left, h, w in boxes(height, width, 30):
        np.testing.assert_array_equal(
            Picture(frame, cutter).cut(top, left, h, w), whole[top : top + h, left : left + w]
        )


@pytest.mark.parametrize(("kind", "size"), [("yuv420p", (330, 250)), ("yuv420p10le", (250, 330)), ("gray", (202, 350))])
def test_training_and_test_clips_have_the_same_bits_part_by_part(
    tmp_path: Path, small_is_large: None, kind: str, size: tuple[int, int]
) -> None:
    with open_video(write(tmp_path / "a.nut", kind, size)) as video:
        for _, frame in video.pictures([1]):
            assert isinstance(frame, Picture)
            whole = pixels(frame)
            height, width = whole.shape[:2]
            for number in range(40):
                side = 24 if number % 2 else 112
                augmenter = Augmenter(height, width, AugmentConfig(), side, KeyedRNG("large", kind, number), True)
                once, parts = np.zeros((2, side, side, 3), np.uint8)
                augmenter(whole, once)
                augmenter(frame, parts)
                np.testing.assert_array_equal(parts, once, str(augmenter.drawn))
            for short in (64, 101, 125, min(size) // 2):  # the last one halves
                target = short_side_size(height, width, short)
                crop = uniform_crop(*target, min(short, 90), 2)
                np.testing.assert_array_equal(resize_crop(frame, target, crop), at_once(whole, target, crop))
            del frame


def at_once(image: np.ndarray, size: tuple[int, int], crop: spatial.Box) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spatial, "LARGE", 1 << 30)
        return resize_crop(image, size, crop)


def test_an_opencv_whose_warps_cannot_be_cut_works_on_whole_frames(
    tmp_path: Path, small_is_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(randaugment_tiles, "warps_agree", lambda: False)
    with open_video(write(tmp_path / "a.nut", "yuv420p", (200, 160))) as video:
        for _, frame in video.pictures([0]):
            for number in range(20):
                augmenter = Augmenter(160, 200, AugmentConfig(), 24, KeyedRNG("large", number), True)
                once, parts = np.zeros((2, 24, 24, 3), np.uint8)
                augmenter(pixels(frame), once)
                augmenter(frame, parts)
                np.testing.assert_array_equal(parts, once)
            del frame


@pytest.mark.parametrize(("length", "size"), [(4320, 224), (897, 224), (2000, 7), (448, 224), (100, 224), (1, 5)])
def test_no_row_beyond_those_named_is_read_by_a_resize(length: int, size: int) -> None:
    import cv2

    image = np.random.default_rng(0).integers(0, 256, (length, 60, 3), dtype=np.uint8)
    rows = rows_read(length, size)
    other = np.full_like(image, 255)
    other[rows] = image[rows]
    np.testing.assert_array_equal(*(cv2.resize(some, (size, size)) for some in (image, other)))
    assert len(rows) <= 4 * size


CHILD = """
import gc, re, sys
from pathlib import Path
import numpy as np
from multitrain.config import AugmentConfig, DataConfig, DatasetConfig, ModelConfig
from multitrain.data.augment import Augmenter, changer
from multitrain.data.decode import open_video
from multitrain.data.pool import configure_worker
from multitrain.data.random import KeyedRNG
from multitrain.data.randaugment import Operation
from multitrain.data.views import crop_plan, show

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def each(path, use):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    with open_video(path) as video:
        for _, frame in video.pictures(range(video.frame_count)):
            use(frame)
            del frame
    return peak()

configure_worker()
path = sys.argv[1]
made = Augmenter(2160, 3840, AugmentConfig(randaugment=None, crop_area=(1, 1)), 224, KeyedRNG("a", 0), True)
chain = [Operation("Rotate", 20.0), Operation("Equalize"), Operation("ShearX", 0.2), Operation("Sharpness", 1.5)]
busy = Augmenter(2160, 3840, AugmentConfig(randaugment=None, crop_area=(1, 1)), 224, KeyedRNG("a", 0), True)
busy.change = changer(2160, 3840, busy.drawn._replace(operations=chain), "opencv", 224)
out = np.zeros((224, 224, 3), np.uint8)
views = np.zeros((1, 3, 1, 224, 224), np.float32)
plan = crop_plan(2160, 3840, DatasetConfig(annotations="a", videos="b", classes=1, temporal_views=1), ModelConfig())
def augment(frame):
    made(frame, out)
    busy(frame, out)
def test(frame):
    show(frame, np.array([[0, 0]]), plan, views)
floor = each(path, lambda frame: None)
print(floor, each(path, augment), each(path, test))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux")
def test_a_clip_of_4k_takes_little_more_memory_than_its_decoder(tmp_path: Path) -> None:
    """As a difference of two peaks of one process; whole frames of RGB and of float32 would be 25 and 100 MB each."""
    path = write(tmp_path / "a.mp4", "yuv420p", (3840, 2160), codec="mpeg4", grain=24)
    command = [sys.executable, "-c", CHILD, str(path)]
    floor, training, test = map(float, subprocess.run(command, capture_output=True, check=True).stdout.split())
    assert training - floor < 60
    assert test - floor < 60


@pytest.mark.parametrize(("codec", "options"), [("libx265", {"x265-params": "log-level=error"}), ("libsvtav1", {})])
def test_large_frames_of_10_bit_are_those_of_ffmpeg(
    tmp_path: Path, small_is_large: None, codec: str, options: dict[str, str]
) -> None:
    """To within what the scalers of two versions differ by, as for small frames; by parts as well."""
    import av

    path = tmp_path / "a.mp4"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc2=s=320x240:r=25", "-frames:v", "4"]
    flags = [word for name, value in options.items() for word in (f"-{name}", value)]
    command += ["-pix_fmt", "yuv420p10le", "-c:v", codec, *flags, str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"this ffmpeg has no {codec}")
    with av.open(str(path)) as container:
        assert container.streams.video[0].format.name == "yuv420p10le"
    raw = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    theirs = np.frombuffer(raw, np.uint8).reshape(-1, 240, 320, 3)
    with open_video(path) as video:
        assert video.frame_count == len(theirs) == 4
        for number, frame in video.pictures(range(4)):
            assert isinstance(frame, Picture)
            whole = pixels(frame)
            assert np.abs(whole.astype(int) - theirs[number]).mean() <= 3.0
            np.testing.assert_array_equal(part(frame, 50, 60, 100, 120), whole[50:150, 60:180])
            del frame
