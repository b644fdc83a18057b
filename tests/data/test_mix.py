"""Normalising, erasing, mixing and soft labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.published import values
from multitrain.config import AugmentConfig, DataConfig, DatasetConfig
from multitrain.data import mix
from multitrain.data.mix import DeviceBatch, Mixing, finalize_batch
from multitrain.data.random import KeyedRNG
from multitrain.data.spatial import Box

DATASETS = {"kinetics": 400, "mit": 305, "ssv2": 174}
PUBLISHED = AugmentConfig(mix_across_datasets=True, smoothing_classes=700)
PLAIN = AugmentConfig(mix_probability=0.0, erase_probability=0.0)


@dataclass
class Batch:
    """What `finalize_batch` reads."""

    clips: Tensor
    dataset: Tensor
    labels: list[tuple[int, ...]]
    boxes: Tensor
    keys: Tensor
    start: int = 0


def batch_of(videos: int, copies: int = 2, seed: int = 0, start: int = 0, datasets: list[int] | None = None) -> Batch:
    """Videos of datasets 0, 0, 1, 1, 2, 2, 0, … with a box to erase in every third clip."""
    g = torch.Generator().manual_seed(seed)
    n = videos * copies
    own = torch.tensor(datasets or [v // 2 % 3 for v in range(videos)]).repeat_interleave(copies)
    boxes = torch.zeros(n, 4, dtype=torch.int32)
    boxes[::3] = torch.tensor([2, 3, 7, 5])
    return Batch(
        clips=torch.randint(0, 256, (n, 3, 16, 16, 3), generator=g, dtype=torch.uint8),
        dataset=own,
        labels=[(7 * i % 100,) for i in range(n)],
        boxes=boxes,
        keys=torch.randint(-(2**62), 2**62, (n,), generator=g),
        start=start,
    )


def part(batch: Batch, first: int, count: int, copies: int = 2) -> Batch:
    """Videos first … first + count − 1 of a batch, as a batch of their own."""
    clips = slice(first * copies, (first + count) * copies)
    return Batch(
        batch.clips[clips],
        batch.dataset[clips],
        batch.labels[clips],
        batch.boxes[clips],
        batch.keys[clips],
        batch.start + first,
    )


def data(multi_label: tuple[str, ...] = ()) -> DataConfig:
    return DataConfig(
        datasets={
            name: DatasetConfig(annotations=name, videos=name, classes=classes, multi_label=name in multi_label)
            for name, classes in DATASETS.items()
        }
    )


def run(batch: Batch, augment: AugmentConfig, seed: int = 0, **settings: Any) -> DeviceBatch:
    return finalize_batch(batch, settings.pop("data", data()), DATASETS, augment, "cpu", seed, **settings)


@pytest.fixture(scope="module")
def golden(published: Path) -> dict[str, Any]:
    return values(published, "tiny_multi")


class TestPublished:
    """`mix_across_datasets=true` with `smoothing_classes=700` is the published mixing."""

    @pytest.mark.parametrize("case", ["train_mixup", "train_cutmix"])
    def test_soft_labels(self, golden: dict[str, Any], case: str, monkeypatch: pytest.MonkeyPatch) -> None:
        own = self.mixed(golden, case, monkeypatch)[1]
        for name, expected in golden[case]["labels"].items():
            torch.testing.assert_close(own[name], expected, atol=1e-7, rtol=0)

    @pytest.mark.parametrize("case", ["train_mixup", "train_cutmix"])
    def test_clips(self, golden: dict[str, Any], case: str, monkeypatch: pytest.MonkeyPatch) -> None:
        own = self.mixed(golden, case, monkeypatch)[0]
        assert own.double().sum().item() == pytest.approx(golden[case]["input_sum"], abs=0.01)

    def test_the_box_is_the_published_one(self, golden: dict[str, Any]) -> None:
        case = golden["train_cutmix"]
        top, bottom, left, right = case["box"]
        share = 1 - (bottom - top) * (right - left) / 64**2
        assert share == pytest.approx(case["lam"], abs=1e-12)
        boxes = {mix.cutmix_box(64, 64, case["lam_raw"], y, x) for y in range(64) for x in range(64)}
        assert Box(top, left, bottom - top, right - left) in boxes

    def test_boxes_are_cut_to_whole_pixels_and_to_the_clip(self) -> None:
        assert mix.cutmix_box(15, 15, 0.75, 7, 7) == Box(4, 4, 6, 6)  # half of int(7.5), downwards
        assert mix.cutmix_box(64, 32, 0.75, 0, 31) == Box(0, 23, 16, 9)

    @staticmethod
    def mixed(golden: dict[str, Any], name: str, patch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The golden input under the golden λ and box."""
        case = golden[name]
        box = None
        if case["box"]:
            top, bottom, left, right = case["box"]
            box = Box(top, left, bottom - top, right - left)
        patch.setattr(mix, "draw_mixing", lambda *_: Mixing(case["lam"], box))
        clips, own = golden["input"].clone(), torch.tensor(golden["sample_dataset"])
        targets = mix.one_hot([(c,) for c in golden["sample_class"]], own, DATASETS)
        augment = PUBLISHED.model_copy(update={"mix_group": 3})
        mix.smooth(targets, own, augment)
        mix.mix(clips, targets, own, 0, augment, 0)
        return clips, targets


class TestNormalise:
    def test_values_and_layout(self) -> None:
        batch = batch_of(2)
        clips = mix.normalise(batch.clips)
        assert (clips.shape, clips.dtype, clips.is_contiguous()) == ((4, 3, 3, 16, 16), torch.float32, True)
        expected = (batch.clips.permute(0, 4, 1, 2, 3).double() / 255 - 0.45) / 0.225
        torch.testing.assert_close(clips.double(), expected, atol=1e-6, rtol=0)

    def test_the_batch_is_not_changed(self) -> None:
        batch = batch_of(4)
        before = replace(batch, clips=batch.clips.clone(), boxes=batch.boxes.clone(), keys=batch.keys.clone())
        first, second = run(batch, AugmentConfig()), run(batch, AugmentConfig())
        torch.testing.assert_close(batch.clips, before.clips, rtol=0, atol=0)
        torch.testing.assert_close(first.clips, second.clips, rtol=0, atol=0)


class TestErase:
    def test_only_the_box_is_replaced_and_by_unit_noise(self) -> None:
        batch = replace(batch_of(2), clips=torch.full((4, 32, 64, 64, 3), 100, dtype=torch.uint8))
        batch.boxes[:] = torch.tensor([[4, 9, 40, 30], [0, 0, 0, 0], [0, 0, 63, 63], [1, 2, 3, 4]])
        clips = run(batch, PLAIN).clips
        background = clips[1, 0, 0, 0, 0]
        assert (clips[1] == background).all()
        for clip, (top, left, h, w) in zip(clips, batch.boxes.tolist()):
            outside = torch.ones(64, 64, dtype=torch.bool)
            outside[top : top + h, left : left + w] = False
            assert (clip[:, :, outside] == background).all()
            assert (clip[:, :, ~outside] != background).all()
        noise = clips[0, :, :, 4:44, 9:39]
        assert noise.mean().abs() < 0.02
        assert noise.std() == pytest.approx(1.0, abs=0.02)

    def test_noise_differs_between_frames_channels_and_clips(self) -> None:
        clips = torch.zeros(2, 3, 4, 16, 16)
        mix.erase(clips, torch.tensor([[0, 0, 8, 8]] * 2, dtype=torch.int32), torch.tensor([5, 6]))
        patches = clips[..., :8, :8].flatten(0, 2)
        assert len(torch.unique(patches.flatten(1), dim=0)) == 2 * 3 * 4

    def test_noise_is_a_function_of_the_key(self) -> None:
        box = torch.tensor([[1, 1, 6, 6]], dtype=torch.int32)
        clips = torch.zeros(3, 3, 4, 16, 16)
        mix.erase(clips, box.repeat(3, 1), torch.tensor([-9, 4, -9]))
        torch.testing.assert_close(clips[0], clips[2], rtol=0, atol=0)
        assert (clips[0] != clips[1]).any()


class TestMixing:
    @pytest.mark.parametrize("augment", [AugmentConfig(), PUBLISHED, AugmentConfig(mix_group=4)])
    def test_clips_and_targets_do_not_depend_on_the_micro_batch(self, augment: AugmentConfig) -> None:
        whole = batch_of(8, start=40)
        expected = run(whole, augment, seed=3)
        step = augment.mix_group
        pieces = [run(part(whole, first, step), augment, seed=3) for first in range(0, 8, step)]
        torch.testing.assert_close(torch.cat([p.clips for p in pieces]), expected.clips, rtol=0, atol=0)
        for name in DATASETS:
            rows = torch.cat([p.targets[name] for p in pieces])
            torch.testing.assert_close(rows, expected.targets[name], rtol=0, atol=0)

    def test_groups_and_seeds_draw_anew(self) -> None:
        same = torch.ones(8, 1, dtype=torch.long).repeat_interleave(2, 0)[:, 0]
        drawn = set()
        for seed in range(3):
            targets = {"d": torch.eye(16)}
            mix.mix(torch.zeros(16, 3, 1, 1, 1), targets, same, 0, AugmentConfig(cutmix_alpha=0.0), seed)
            drawn |= set(targets["d"].diagonal()[::4].tolist())
        assert len(drawn) == 3 * 4

    def test_partners_mirror_the_group(self) -> None:
        assert mix.partners([0, 0, 0, 0], across=False) == [3, 2, 1, 0]
        assert mix.partners([0, 1, 2], across=True) == [2, 1, 0]

    def test_partners_are_of_the_same_dataset(self) -> None:
        for own in ([0, 0, 1, 1], [0, 0, 1, 1, 0, 0], [2, 2, 2, 2, 0, 0], [0, 1, 2], [1, 0, 1]):
            partner = mix.partners(own, across=False)
            assert all(own[i] == own[j] for i, j in enumerate(partner))
            assert [partner[j] for j in partner] == list(range(len(own)))
        assert mix.partners([0, 1, 2], across=False) == [0, 1, 2]

    def test_mixup_weighs_pictures_and_labels_alike(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = run(batch_of(2), PLAIN)
        monkeypatch.setattr(mix, "draw_mixing", lambda *_: Mixing(0.3, None))
        mixed = run(batch_of(2), AugmentConfig())
        torch.testing.assert_close(mixed.clips, 0.3 * plain.clips + 0.7 * plain.clips.flip(0))
        rows = plain.targets["kinetics"]
        torch.testing.assert_close(mixed.targets["kinetics"], 0.3 * rows + 0.7 * rows.flip(0))

    def test_cutmix_takes_the_box_from_the_partner(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = run(batch_of(2), PLAIN).clips
        monkeypatch.setattr(mix, "draw_mixing", lambda *_: Mixing(0.75, Box(4, 8, 8, 8)))
        mixed = run(batch_of(2), AugmentConfig()).clips
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[4:12, 8:16] = True
        torch.testing.assert_close(mixed[..., inside], plain.flip(0)[..., inside], rtol=0, atol=0)
        torch.testing.assert_close(mixed[..., ~inside], plain[..., ~inside], rtol=0, atol=0)

    def test_the_law_of_lambda_and_box(self) -> None:
        drawn = [mix.draw_mixing(AugmentConfig(), 224, 224, KeyedRNG("law", n)) for n in range(8000)]
        cut = [m for m in drawn if m.box is not None]
        assert len(cut) / 8000 == pytest.approx(0.5, abs=0.03)
        share = torch.tensor([m.share for m in drawn if m.box is None])
        assert share.mean() == pytest.approx(0.5, abs=0.02)
        assert share.var() == pytest.approx(0.25 / 2.6, abs=0.005)  # Beta(0.8, 0.8)
        assert all(m.share == pytest.approx(1 - m.box.height * m.box.width / 224**2) for m in cut if m.box)
        assert all(0 <= m.box.top <= m.box.top + m.box.height <= 224 for m in cut if m.box)

    def test_switches(self) -> None:
        def boxes(**settings: Any) -> set[bool | None]:
            drawn = [mix.draw_mixing(AugmentConfig(**settings), 64, 64, KeyedRNG("s", n)) for n in range(60)]
            return {None if m == Mixing(1.0, None) else m.box is not None for m in drawn}

        assert boxes(mix_probability=0.0) == {None}
        assert boxes(mixup_alpha=0.0, cutmix_alpha=0.0) == {None}
        assert boxes(mixup_alpha=0.0) == {True}
        assert boxes(cutmix_alpha=0.0) == {False}
        assert boxes() == {True, False}
        assert boxes(mix_probability=0.5) == {True, False, None}


class TestTargets:
    def test_smoothing_uses_the_datasets_own_classes_and_leaves_others_zero(self) -> None:
        batch = batch_of(6, datasets=[0, 0, 1, 1, 2, 2])
        out = run(batch, AugmentConfig())
        for position, (name, classes) in enumerate(DATASETS.items()):
            rows, own = out.targets[name], out.dataset == position
            assert rows.shape == (12, classes)
            torch.testing.assert_close(rows[own].sum(1), torch.ones(4))
            assert (rows[~own] == 0).all()

    def test_an_unmixed_target(self) -> None:
        out = run(batch_of(1), PLAIN)
        row = out.targets["kinetics"][1]
        assert row[7] == pytest.approx(0.9 + 0.1 / 400)
        assert row[8] == pytest.approx(0.1 / 400)

    def test_several_labels_are_not_smoothed_and_mix_to_a_weighted_union(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mix, "draw_mixing", lambda *_: Mixing(0.25, None))
        batch = replace(batch_of(2, copies=1), labels=[(1, 5), (5, 9)])
        out = run(batch, AugmentConfig(copies=1), data=data(multi_label=("kinetics",)))
        expected = torch.zeros(2, 400)
        expected[0, [1, 5, 9]] = torch.tensor([0.25, 1.0, 0.75])
        expected[1, [1, 5, 9]] = torch.tensor([0.75, 1.0, 0.25])
        torch.testing.assert_close(out.targets["kinetics"], expected)

    def test_keys_and_datasets_come_along(self) -> None:
        batch = batch_of(3)
        out = run(batch, AugmentConfig())
        assert torch.equal(out.keys, batch.keys)
        assert torch.equal(out.dataset, batch.dataset)
