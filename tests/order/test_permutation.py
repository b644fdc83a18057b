"""Keys never collide by construction, and a permutation is one: at every size, for every key, for ever."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from multitrain.order import key, permute

KEYS = st.integers(0, 2**64 - 1)


def test_key_is_64_bits_and_frozen_for_ever() -> None:
    assert key("order", 0, "kinetics", 0) == GOLDEN_KEYS[0]
    assert key("order", -1, "mit", 2**70) == GOLDEN_KEYS[1]
    assert key(b"\x00\xff", "é") == GOLDEN_KEYS[2]
    assert key() == GOLDEN_KEYS[3]
    assert all(0 <= key("k", n) < 2**64 for n in range(100))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a", ""), ("", "a")),
        (("a",), ("a", "")),
        (("asb",), ("a", "b")),
        (("ab\0", "c"), ("ab", "\0c")),
        ((1,), ("1",)),
        (("a",), (b"a",)),
        ((1, 23), (12, 3)),
        ((0, 1), (1, 0)),
        ((255,), (-1,)),
        ((128,), (-128,)),
        ((0,), ()),
        ((2**64,), (0,)),
        ((256,), (1, 0)),
    ],
)
def test_key_tells_tuples_apart_that_a_careless_encoding_confuses(one: tuple, other: tuple) -> None:
    assert key(*one) != key(*other)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.integers(), st.text(), st.binary()), max_size=4), st.data())
def test_key_of_different_tuples_differs(parts: list, data: st.DataObject) -> None:
    others = data.draw(
        st.lists(st.one_of(st.integers(-300, 300), st.text(max_size=3), st.binary(max_size=3)), max_size=4)
    )
    typed, others_typed = [[(type(p), p) for p in tuple_] for tuple_ in (parts, others)]
    assert (key(*parts) == key(*others)) == (typed == others_typed)


def test_key_takes_numpy_integers_for_the_numbers_they_are() -> None:
    assert key(np.int64(7), np.uint8(3)) == key(7, 3)


@pytest.mark.parametrize("part", [1.0, None, True, ("a",)])
def test_key_refuses_what_has_no_unambiguous_encoding(part: object) -> None:
    with pytest.raises(TypeError, match="a key is made of int, str and bytes"):
        key(part)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [*range(1, 200), 1023, 1024, 1025, 4095, 4096, 4097, 65536, 168_913])
def test_permute_is_a_bijection_at_every_size(size: int) -> None:
    image = permute(np.arange(size), size, key("test", size))
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(size))


@settings(deadline=None, max_examples=150)
@given(size=st.integers(1, 3000), a_key=KEYS)
def test_permute_is_a_bijection_for_every_key(size: int, a_key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, a_key)), np.arange(size))


@settings(deadline=None, max_examples=60)
@given(size=st.integers(2**20, 2**63 - 1), a_key=KEYS, start=st.integers(0, 2**63))
@example(size=2**63 - 1, a_key=2**64 - 1, start=2**63 - 2)
@example(size=2**40 + 1, a_key=0, start=2**40)
def test_permute_stays_in_a_range_too_large_to_visit_and_is_injective_there(size: int, a_key: int, start: int) -> None:
    index = (np.arange(300, dtype=np.uint64) + np.uint64(start % (size - 300))).astype(np.int64)
    image = permute(index, size, a_key)
    assert image.min() >= 0
    assert image.max() < size
    assert len(np.unique(image)) == 300


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 5000), a_key=KEYS, data=st.data())
def test_permute_of_one_index_does_not_depend_on_its_company(size: int, a_key: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = permute(index, size, a_key)
    alone = [int(permute(np.array([i]), size, a_key)[0]) for i in index]
    assert together.tolist() == alone


def test_permute_takes_a_key_for_each_index() -> None:
    index, keys = np.arange(50) % 10, np.array([key("pass", n // 10) for n in range(50)], np.uint64)
    each = [int(permute(index[n : n + 1], 10, int(keys[n]))[0]) for n in range(50)]
    assert permute(index, 10, keys).tolist() == each


def test_permute_keeps_the_shape_and_its_argument() -> None:
    index = np.arange(12).reshape(3, 4)
    assert permute(index, 12, 5).shape == (3, 4)
    assert np.array_equal(index, np.arange(12).reshape(3, 4))
    assert permute(np.zeros(0, np.int64), 0, 5).shape == (0,)
    assert permute(np.zeros(3, np.int64), 1, 5).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("index", "size"), [([5], 5), ([-1], 5), ([0], 0), ([0, 4, 5], 5), ([1], 1)])
def test_permute_refuses_an_index_outside_the_range(index: list[int], size: int) -> None:
    with pytest.raises(ValueError, match=rf"not all in range\({size}\)"):
        permute(np.array(index), size, 1)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_orders_of_a_few_videos_are_equally_frequent(size: int) -> None:
    orders = list(permutations(range(size)))
    trials = 20 * len(orders) + 2000
    keys = np.repeat(np.array([key("uniform", n) for n in range(trials)], np.uint64), size)
    images = permute(np.tile(np.arange(size), trials), size, keys).reshape(trials, size)
    seen = Counter(map(tuple, images.tolist()))
    expected = trials / len(orders)
    chi_squared = sum((seen[order] - expected) ** 2 / expected for order in orders)
    freedom = len(orders) - 1
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5 + 4


def test_a_pass_is_shuffled_well_and_independently_of_other_passes() -> None:
    size = 168_913
    first, second = (permute(np.arange(size), size, key("order", 0, "ssv2", n)).astype(float) for n in (0, 1))
    noise = 4 / size**0.5
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < noise
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < noise
    assert abs(np.corrcoef(first, second)[0, 1]) < noise
    assert abs(np.corrcoef(first % 2, np.arange(size) % 2)[0, 1]) < noise
    assert np.count_nonzero(first == np.arange(size)) < 12  # 1 expected
    steps = np.bincount(((np.diff(first) % size) * 64 // size).astype(int), minlength=64)
    assert (((steps - size / 64) ** 2) / (size / 64)).sum() < 63 + 4 * 126**0.5


def test_the_permutation_is_frozen_for_ever() -> None:
    assert permute(np.arange(10), 10, 0).tolist() == GOLDEN_TEN
    assert permute(np.arange(5) * 60_000, 240_436, key("order", 0, "kinetics", 3)).tolist() == GOLDEN_KINETICS
    assert permute(np.array([0, 2**40, 2**62]), 2**62 + 3, 2**64 - 1).tolist() == GOLDEN_HUGE


GOLDEN_KEYS = [0xE041F21DBD5E7A9E, 0x8C9DE7A2BA1C4969, 0x4B11A17BBB8EE274, 0xE4A6A0577479B2B4]
GOLDEN_TEN = [7, 6, 0, 9, 2, 5, 3, 1, 4, 8]
GOLDEN_KINETICS = [240280, 36327, 232051, 182367, 116764]
GOLDEN_HUGE = [3264684113966110153, 4597660160533414463, 862060966000294036]
