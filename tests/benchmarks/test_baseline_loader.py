"""The loader that ours is measured against computes what the published code computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.baseline import loader as baseline
from benchmarks.published import matching, same_bits, values
from multitrain.data import randaugment_pil
from multitrain.data.augment import Augmentation
from multitrain.data.randaugment import Operation
from multitrain.data.spatial import MEAN, STD, Box


@pytest.fixture(scope="module")
def golden(published: Path) -> dict[str, Any]:
    return values(published, "data")


def test_views_are_the_golden_ones(published: Path, golden: dict[str, Any]) -> None:
    pytest.importorskip("decord")
    cases = {"kinetics_1x5": (5, 1, 256, "stride"), "ssv2_3x1": (1, 3, None, "segment")}
    for name, (temporal, spatial, side, sampling) in cases.items():
        expected = golden["test"][name]
        path = published / "videos" / expected[0]["path"]
        found = baseline.views(path, 8, 3, 64, temporal, spatial, side=side, sampling=sampling)
        for case in expected:
            np.testing.assert_allclose(*matching(found[case["st_idx"]], case["frames"]), atol=1e-5)


def test_short_sides_are_the_golden_ones(golden: dict[str, Any]) -> None:
    spatial = golden["spatial"]
    for side in (32, 50, 77):
        found = baseline.short_side(spatial["x"], side)
        np.testing.assert_allclose(*matching(found, spatial[f"short{side}"]), atol=1e-5)


@pytest.mark.parametrize(("name", "argument"), [("Rotate_b", 21.0), ("ShearX_b", 0.21)])
def test_a_whole_frame_is_changed_by_pillow_then_normalised(golden: dict[str, Any], name: str, argument: float) -> None:
    image = golden["randaug_image"]
    height = image.shape[0]
    drawn = Augmentation([Operation(name[:-2], argument)], Box(0, 0, height, height), False, Box(0, 0, 0, 0))
    clip = baseline.augmented(image[None], drawn, height)
    levels = ((clip * STD + MEAN) * 255)[:, 0].permute(1, 2, 0).round().numpy().astype(np.uint8)
    whole = randaugment_pil.apply(image[None].numpy(), [Operation(name[:-2], argument)])[0]
    assert same_bits(whole, golden["randaug"][name]["out"])
    np.testing.assert_array_equal(levels, whole[:, :height])
