"""Test views are the published ones, and cost one decode and one resize a frame."""

from __future__ import annotations

import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from benchmarks.published import matching, same_bits, values
from multitrain.config import ConfigError, DataConfig, DatasetConfig, ModelConfig
from multitrain.data import decode, views
from multitrain.data.call_timeout import CallTimeout, WriteLease
from multitrain.data.decode.convert import Converter
from multitrain.data.frames import view_indices
from multitrain.data.spatial import Box, resize_crop, short_side_size, uniform_crop
from multitrain.data.views import crop_plan, load_views, short_side

MODEL = ModelConfig(frames=8, crop=64, depth=4, stages=(1, 3))


def dataset(**settings: Any) -> DatasetConfig:
    return DatasetConfig(annotations="a", videos="v", classes=4, **settings)


def data(entry: DatasetConfig, **settings: Any) -> DataConfig:
    return DataConfig(datasets={"d": entry}, **settings)


def load(path: Path, entry: DatasetConfig, model: ModelConfig = MODEL) -> np.ndarray:
    return load_views(path, entry, data(entry), model)


def published(path: Path, entry: DatasetConfig, model: ModelConfig = MODEL) -> torch.Tensor:
    """The views the long way: every frame decoded, normalised, resized and cropped for every view."""
    with decode.open_video(path) as video:
        times = view_indices(entry, data(entry), video.frame_count, video.fps, model.frames)
        out = []
        for indices in times:
            x = torch.from_numpy(video.frames(indices)).permute(3, 0, 1, 2).float()
            x = (x / 255.0 - 0.45) / 0.225
            size = short_side_size(*x.shape[2:], short_side(entry, model))
            x = interpolate(x, size, mode="bilinear", align_corners=False)
            for position in (1,) if entry.spatial_views == 1 else (0, 1, 2):
                top, left, h, w = uniform_crop(*size, model.crop, position)
                out.append(x[:, :, top : top + h, left : left + w])
    return torch.stack(out)


@pytest.fixture(scope="module", params=[(94, 146), (146, 94)], ids=["wide", "tall"])
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty frames of moving stripes."""
    height, width = request.param
    path = tmp_path_factory.mktemp("video") / "stripes.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        y, x = np.mgrid[:height, :width]
        for t in range(50):
            wave = 127 + 100 * np.sin((x + 2 * t) / 5.0) * np.cos((y - t) / 7.0)
            picture = np.stack([wave, np.roll(wave, 9, 1), 255 - wave], 2).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def golden(published: Path) -> dict[str, Any]:
    return values(published, "data")


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("case", "entry"),
    [
        ("kinetics_1x5", dataset(temporal_views=5, test_short_side=256)),
        ("ssv2_3x1", dataset(sampling="segment", spatial_views=3)),
    ],
)
def test_views_are_those_of_the_published_code(
    published: Path, golden: dict[str, Any], case: str, entry: DatasetConfig, decoder: Any
) -> None:
    if decoder == "decord":
        pytest.importorskip("decord")
    expected = golden["test"][case]
    path = published / "videos" / expected[0]["path"]
    own = load_views(path, entry, data(entry, decoder=decoder), MODEL)
    assert own.dtype == np.float32
    assert len(own) == entry.temporal_views * entry.spatial_views
    assert len(expected) >= 3
    for view in expected:
        np.testing.assert_allclose(*matching(own[view["st_idx"]], view["frames"]), atol=1e-5)


@pytest.mark.parametrize(
    "entry",
    [
        dataset(temporal_views=5),
        dataset(temporal_views=2, spatial_views=3),
        dataset(sampling="segment", spatial_views=3),
        dataset(sampling="segment"),
        dataset(temporal_views=3, test_short_side=101),
    ],
    ids=["5x1", "2x3", "segment-3", "segment-1", "short-side"],
)
def test_views_are_those_computed_the_long_way(video: Path, entry: DatasetConfig) -> None:
    own, expected = load(video, entry), published(video, entry)
    assert own.shape == expected.shape == (entry.temporal_views * entry.spatial_views, 3, 8, 64, 64)
    assert own.flags.c_contiguous
    np.testing.assert_allclose(own, expected.numpy(), atol=1e-5)


def test_each_frame_is_decoded_and_resized_once(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = dataset(temporal_views=5, spatial_views=3)
    converted: Counter[int] = Counter()
    resized = 0
    convert, resize = Converter.__call__, views.resize_crop

    def counting_convert(self: Converter, frame: Any, number: int) -> np.ndarray:
        converted[number] += 1
        return convert(self, frame, number)

    def counting_resize(*args: Any) -> np.ndarray:
        nonlocal resized
        resized += 1
        return resize(*args)

    monkeypatch.setattr(Converter, "__call__", counting_convert)
    monkeypatch.setattr(views, "resize_crop", counting_resize)
    load(video, entry)
    assert set(converted.values()) == {1}
    assert len(converted) < 5 * MODEL.frames, "views that share no frame test nothing"
    assert resized == len(converted)


def test_views_are_written_to_the_place_they_are_given(video: Path) -> None:
    entry = dataset(temporal_views=2, spatial_views=3)
    slots = np.full((3, *views.views_shape(entry, MODEL)), 7, np.float32)
    found = load_views(video, entry, data(entry), MODEL, slots[1])
    assert found is slots[1] or np.shares_memory(found, slots[1])
    np.testing.assert_array_equal(slots[1], load(video, entry))
    assert (slots[[0, 2]] == 7).all()


def test_nothing_is_written_once_the_lease_has_ended(video: Path) -> None:
    entry = dataset()
    out, lease = np.full(views.views_shape(entry, MODEL), 7, np.float32), WriteLease()
    lease.end()
    with pytest.raises(CallTimeout):
        load_views(video, entry, data(entry), MODEL, out, lease)
    assert (out == 7).all()


def test_an_ending_lease_waits_for_the_write_in_progress() -> None:
    lease, written = WriteLease(), []
    inside, go = threading.Event(), threading.Event()

    def write() -> None:
        with lease:
            inside.set()
            go.wait(5)
            written.append(1)

    writer = threading.Thread(target=write)
    writer.start()
    assert inside.wait(5)
    ender = threading.Thread(target=lambda: (lease.end(), written.append(2)))
    ender.start()
    ender.join(0.1)
    assert written == []
    go.set()
    ender.join(5)
    writer.join(5)
    assert written == [1, 2]


def test_unreadable_videos_raise(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(decode.VideoError):
        load(tmp_path / "text.mp4", dataset())


def test_short_side_default() -> None:
    model = ModelConfig()
    assert short_side(dataset(), model) == 256
    assert short_side(dataset(temporal_views=2, spatial_views=3), model) == 224
    assert short_side(dataset(sampling="segment"), model) == 224
    assert short_side(dataset(sampling="segment", test_short_side=300), model) == 300


def test_a_short_side_below_the_crop_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"test_short_side=60 is smaller than model\.crop=64"):
        crop_plan(100, 200, dataset(test_short_side=60), MODEL)


class TestSpatial:
    """The primitives the views are made of."""

    def test_short_sides_and_crops_of_the_published_code(self, golden: dict[str, Any]) -> None:
        spatial = golden["spatial"]
        x = spatial["x"]
        for side in (32, 50, 77):
            size = short_side_size(50, 83, side)
            np.testing.assert_allclose(*matching(resized(x, size), spatial[f"short{side}"]), atol=1e-5)
        for position in range(3):
            cut = uniform_crop(50, 83, 32, position).cut(x.permute(2, 3, 0, 1).numpy())
            assert same_bits(cut.transpose(2, 3, 0, 1), spatial[f"crop32_{position}"])
            cut = uniform_crop(83, 50, 32, position).cut(x.permute(3, 2, 0, 1).numpy())
            assert same_bits(cut.transpose(2, 3, 0, 1), spatial[f"cropT32_{position}"])

    def test_random_resized_crop_of_the_published_code(self, golden: dict[str, Any]) -> None:
        spatial = golden["spatial"]
        top, left, h, w = spatial["rrc_params_50x83"][4]
        own = resized(spatial["x"][:, :, top : top + h, left : left + w], (24, 24))
        np.testing.assert_allclose(*matching(own, spatial["rrc_seed4"]), atol=1e-5)

    @pytest.mark.parametrize(("height", "width"), [(320, 568), (341, 255), (240, 320), (37, 41)])
    @pytest.mark.parametrize("side", [224, 256, 51])
    def test_part_of_a_resize_is_the_resize_cut(self, height: int, width: int, side: int) -> None:
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        size = short_side_size(height, width, side)
        crop = Box(side // 5, side // 7, side // 2, side // 2 + 3)
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        expected = interpolate(x, size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
        own = resize_crop(image, size, crop)
        np.testing.assert_allclose(own, crop.cut(expected), atol=2e-4)  # of 255

    def test_crops_larger_than_the_frame_are_refused(self) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            uniform_crop(63, 100, 64, 1)
        with pytest.raises(ValueError, match="crop position"):
            uniform_crop(64, 100, 64, 3)


def resized(x: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Each frame of [C, T, H, W], resized."""
    frames = x.permute(1, 2, 3, 0).contiguous().numpy()
    return np.stack([resize_crop(frame, size, Box(0, 0, *size)) for frame in frames]).transpose(3, 0, 1, 2)


def test_views_have_the_normalisation_and_the_order_of_channels_of_the_network(tmp_path: Path) -> None:
    from support import write_video

    from multitrain.data.mix import for_network

    write_video(tmp_path / "v.mp4", 1)
    entry = DatasetConfig(annotations="a", videos="v", classes=2)
    data = DataConfig(datasets={"a": entry})
    plain = ModelConfig(frames=4, crop=32)
    other = ModelConfig(frames=4, crop=32, channels="bgr", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    made = load_views(tmp_path / "v.mp4", entry, data, plain)
    pixels = made * 0.225 + 0.45
    mean, std = (np.array(v, np.float32).reshape(3, 1, 1, 1) for v in (other.mean, other.std))
    expected = ((pixels - mean) / std)[:, ::-1]
    np.testing.assert_allclose(load_views(tmp_path / "v.mp4", entry, data, other), expected, atol=2e-6)
    clips = for_network(torch.from_numpy(made.copy()), other)
    np.testing.assert_allclose(clips.numpy(), expected, atol=2e-6)
    assert np.array_equal(for_network(torch.from_numpy(made.copy()), plain).numpy(), made)
