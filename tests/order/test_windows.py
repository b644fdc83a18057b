"""Windowed order: every video exactly once per pass, from few shards at a time; without windows nothing has changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from multitrain.order import Plan, Source, solve
from multitrain.order.windows import scatter
from tests.order.test_frozen import GOLDEN, GOLDEN_FINGERPRINT

FLAGSHIP = (Source("kinetics", 254_343), Source("mit", 748_135), Source("ssv2", 220_847))
GOLDEN_WINDOWED = {
    "interleave": ("567e292e36c467bd", "1f266ca4e2487c2f1c0e1aee70355758d2049686aeeedfc917aa315921bbc71c"),
    "concat": ("2bd7a465b989cf9a", "e73b143864317a3195a8d3235ffdc6aeb0bf27b45487fb7c04045372f91451d3"),
}


def shard_of(indices: np.ndarray, size: int, shard_videos: int) -> np.ndarray:
    """The shard of each video."""
    place = np.empty(size, np.int64)
    place[scatter(np.arange(size), size)] = np.arange(size)
    return place[indices] // shard_videos


def test_without_windows_the_fingerprint_is_what_it_always_was() -> None:
    assert GOLDEN.shuffle_window is None
    assert replace(GOLDEN, shard_videos=7).fingerprint == GOLDEN.fingerprint == GOLDEN_FINGERPRINT
    assert "shuffle_window" not in GOLDEN.describe()


@pytest.mark.parametrize("mixture", ["interleave", "concat"])
def test_the_windowed_order_is_frozen_for_ever(mixture: str) -> None:
    plan = replace(GOLDEN, mixture=mixture, proportions="size", shuffle_window=8, shard_videos=100)
    assert (plan.digest(10**6, 10**6 + 99), plan.fingerprint) == GOLDEN_WINDOWED[mixture]


def test_a_window_is_part_of_the_fingerprint_and_named() -> None:
    plan = replace(GOLDEN, shuffle_window=64)
    assert len({p.fingerprint for p in (GOLDEN, plan, replace(plan, shard_videos=10))}) == 3
    assert any("shuffle_window was none, is now 64" in d.lower() for d in plan.differences(GOLDEN.describe()))


@pytest.mark.parametrize("window", [1, 2, 3, 8])
@pytest.mark.parametrize("shard_videos", [1, 7, 64])
def test_every_pass_has_every_video_once_for_all_sizes_to_2000(window: int, shard_videos: int) -> None:
    step = 1 if window == 3 and shard_videos == 7 else 37
    for size in (*range(1, 40), *range(40, 2001, step)):
        plan = Plan([Source("a", size)], seed=size, effective_batch=1, shuffle_window=window, shard_videos=shard_videos)
        tickets = plan.samples(size, 3 * size)
        for lap in (1, 2):
            assert np.array_equal(np.sort(tickets["index"][tickets["pass"] == lap]), np.arange(size))


@pytest.mark.parametrize("mixture", ["interleave", "concat"])
def test_replicas_and_several_datasets_have_every_video_once_a_pass(mixture: str) -> None:
    sources = [Source("a", 101, 2), Source("b", 17, 3), Source("c", 1)]
    plan = Plan(sources, seed=5, effective_batch=8, mixture=mixture, shuffle_window=4, shard_videos=10)  # type: ignore[arg-type]
    tickets = plan.samples(0, 2 * plan.epoch_size)
    if mixture == "interleave":
        tickets = plan.samples(0, plan.effective_batch * plan.epoch_size)
    for number, source in enumerate(sources):
        own = tickets[tickets["dataset"] == number]
        for lap in range(2 * source.replicas):
            assert sorted(own["index"][own["pass"] == lap]) == list(range(source.size))


def test_all_of_the_flagship_comes_exactly_once() -> None:
    size = sum(s.size for s in FLAGSHIP)
    plan = Plan([Source("all", size)], seed=3, effective_batch=512, shuffle_window=64)
    assert np.array_equal(np.sort(plan.samples(size, 2 * size)["index"]), np.arange(size))


@pytest.mark.parametrize("window", [1, 2, 5, 64])
def test_an_update_reads_window_plus_one_shards_of_a_dataset_at_most(window: int) -> None:
    plan = Plan(FLAGSHIP, seed=1, effective_batch=512, shuffle_window=window)
    for first, updates in ((0, 400), (10**7, 100)):
        tickets = plan.samples(first * 512, (first + updates) * 512)
        update = np.arange(len(tickets)) // 512
        for number, source in enumerate(FLAGSHIP):
            own = tickets["dataset"] == number
            shards = shard_of(tickets["index"][own], source.size, plan.shard_videos)
            read = np.unique(np.stack([update[own], shards]), axis=1)[0]
            assert np.bincount(read).max() <= window + 1


@pytest.mark.parametrize("proportions", ["size", "weights", "temperature"])
def test_windows_change_no_proportion(proportions: str) -> None:
    plain = replace(GOLDEN, proportions=proportions, temperature=2.0)  # type: ignore[arg-type]
    windowed = replace(plain, shuffle_window=4)
    a, b = plain.samples(0, 1200), windowed.samples(0, 1200)
    assert np.array_equal(a["dataset"], b["dataset"])
    assert np.array_equal(a["pass"], b["pass"])


def test_any_world_size_sees_the_same_update() -> None:
    plan = Plan(FLAGSHIP, seed=1, effective_batch=512, shuffle_window=64)
    whole = plan.samples(300 * 512, 301 * 512)
    for nodes, gpus in ((1, 1), (1, 8), (4, 8), (16, 8)):
        shape = solve(512, nodes=nodes, gpus=gpus)
        parts = [
            plan.samples(*shape.slice(300, step, rank))
            for rank in range(shape.world_size)
            for step in range(shape.accumulation)
        ]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("wrong", [{"shuffle_window": 0}, {"shuffle_window": 2, "shard_videos": 0}])
def test_impossible_windows_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="shuffle_window"):
        replace(GOLDEN, **wrong)  # type: ignore[arg-type]
