"""512 videos an update on every cluster they divide over, and a remedy that works on every other."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multitrain.order import BatchShape, BatchShapeError, solve

moderate = settings(deadline=None, max_examples=150)


@pytest.mark.parametrize(
    ("nodes", "micro", "accumulation"),
    [(1, 4, 16), (2, 4, 8), (4, 4, 4), (8, 4, 2), (16, 4, 1), (32, 2, 1), (64, 1, 1)],
)
def test_512_videos_divide_over_powers_of_two(nodes: int, micro: int, accumulation: int) -> None:
    assert solve(512, nodes=nodes, gpus=8) == BatchShape(512, nodes * 8, micro, accumulation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"nodes": 3, "gpus": 8},
            "effective_batch=512 does not divide over nodes=3 × gpus=8 = 24 GPUs; use 16 GPUs (nodes=2 gpus=8) "
            "or 32 GPUs (nodes=4 gpus=8), or effective_batch=504 or 528",
        ),
        (
            {"nodes": 6, "gpus": 8},
            "effective_batch=512 does not divide over nodes=6 × gpus=8 = 48 GPUs; use 32 GPUs (nodes=4 gpus=8) "
            "or 64 GPUs (nodes=8 gpus=8), or effective_batch=480 or 528",
        ),
        (
            {"nodes": 12, "gpus": 8, "group": 2},
            "effective_batch=512 does not divide over nodes=12 × gpus=8 = 96 GPUs in groups of augment.mix_group=2 "
            "videos; use 64 GPUs (nodes=8 gpus=8) or 128 GPUs (nodes=16 gpus=8), or effective_batch=384 or 576",
        ),
        (
            {"nodes": 1, "gpus": 3},
            "effective_batch=512 does not divide over nodes=1 × gpus=3 = 3 GPUs; use 2 GPUs (nodes=1 gpus=2) "
            "or 4 GPUs (nodes=1 gpus=4), or effective_batch=510 or 513",
        ),
        (
            {"nodes": 3, "gpus": 4, "micro_batch": 8},
            "effective_batch=512 does not divide over nodes=3 × gpus=4 = 12 GPUs; use 8 GPUs (nodes=2 gpus=4) "
            "or 16 GPUs (nodes=4 gpus=4), or effective_batch=480 or 576",
        ),
        (
            {"nodes": 128, "gpus": 8},
            "effective_batch=512 does not divide over nodes=128 × gpus=8 = 1024 GPUs; use 512 GPUs (nodes=64 gpus=8), "
            "or effective_batch=1024",
        ),
        (
            {"nodes": 4, "gpus": 8, "micro_batch": 3},
            "micro_batch=3 does not divide the 16 videos that each of nodes=4 × gpus=8 = 32 GPUs has of "
            "effective_batch=512; use micro_batch=1 or 2 or 4 or 8 or 16",
        ),
        (
            {"nodes": 4, "gpus": 8, "micro_batch": 6, "group": 4},
            "micro_batch=6 does not hold whole groups of augment.mix_group=4 videos; use micro_batch=4 or 8, "
            "or augment.mix_group=1",
        ),
        ({"nodes": 0, "gpus": 8}, "nodes=0 is not possible; use nodes=1 or more"),
        ({"nodes": 1, "gpus": 8, "micro_batch": 0}, "micro_batch=0 is not possible; use micro_batch=1 or more"),
    ],
)
def test_a_refusal_is_one_line_that_names_the_nearest_shapes_in_the_users_words(options: dict, message: str) -> None:
    with pytest.raises(BatchShapeError) as refusal:
        solve(512, **options)
    assert str(refusal.value) == message


@moderate
@given(
    batch=st.integers(1, 2000),
    nodes=st.integers(1, 16),
    gpus=st.integers(1, 8),
    micro=st.none() | st.integers(1, 16),
    group=st.sampled_from([1, 2, 3, 4]),
    largest=st.integers(1, 16),
)
def test_a_shape_multiplies_out_or_every_remedy_in_the_refusal_works(
    batch: int, nodes: int, gpus: int, micro: int | None, group: int, largest: int
) -> None:
    options = {"nodes": nodes, "gpus": gpus, "micro_batch": micro, "group": group, "largest_micro_batch": largest}
    try:
        shape = solve(batch, **options)  # type: ignore[arg-type]
    except BatchShapeError as refusal:
        message = str(refusal)
        assert "\n" not in message
        _check_remedies(message.split("; use ")[1], batch, options)
        return
    assert shape.world_size == nodes * gpus
    assert shape.world_size * shape.micro_batch * shape.accumulation == batch == shape.effective_batch
    assert shape.videos_per_rank * shape.world_size == batch
    assert shape.micro_batch % group == 0
    if micro is not None:
        assert shape.micro_batch == micro
        return
    fitting = [m for m in range(group, shape.videos_per_rank + 1, group) if shape.videos_per_rank % m == 0]
    assert shape.micro_batch == max([m for m in fitting if m <= largest], default=group)


def _check_remedies(remedies: str, batch: int, options: dict) -> None:
    tried = 0
    for nodes, gpus in re.findall(r"nodes=(\d+) gpus=(\d+)", remedies):
        solve(batch, **{**options, "nodes": int(nodes), "gpus": int(gpus)})
        tried += 1
    for name in ("effective_batch", "micro_batch"):
        for values in re.findall(rf"{name}=(\d+(?: or \d+)*)", remedies):
            for value in map(int, values.split(" or ")):
                if name == "effective_batch":
                    solve(value, **options)
                    tried += 1
                else:
                    assert value % options["group"] == 0
                    tried += 1
    assert tried


@moderate
@given(st.integers(1, 128), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_slices_tile_every_update_in_the_order_of_ranks_then_micro_steps(
    world: int, micro: int, accumulation: int, update: int
) -> None:
    shape = BatchShape(world * micro * accumulation, world, micro, accumulation)
    position = update * shape.effective_batch
    for rank in range(world):
        for step in range(accumulation):
            assert shape.slice(update, step, rank) == (position, position + micro)
            position += micro
    assert position == (update + 1) * shape.effective_batch


@pytest.mark.parametrize(("update", "step", "rank"), [(-1, 0, 0), (0, 4, 0), (0, -1, 0), (0, 0, 32), (0, 0, -1)])
def test_a_slice_that_does_not_exist_is_refused(update: int, step: int, rank: int) -> None:
    with pytest.raises(IndexError, match="micro-step"):
        BatchShape(512, 32, 4, 4).slice(update, step, rank)


@pytest.mark.parametrize("parts", [(512, 32, 4, 3), (512, 0, 4, 4), (512, -32, -4, 4)])
def test_a_shape_that_does_not_multiply_out_cannot_be_made(parts: tuple[int, int, int, int]) -> None:
    with pytest.raises(BatchShapeError, match="is not world_size"):
        BatchShape(*parts)
