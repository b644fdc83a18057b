"""The order of videos: every video exactly once per pass, in exact proportions, whatever happens to the hardware."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from multitrain.order import ORDER_VERSION, SAMPLE_DTYPE, TICKET, Plan, Source, solve
from multitrain.order.plan import apportion, layout, simplest

PAPER = (Source("kinetics", 240_436), Source("mit", 791_297), Source("ssv2", 168_913))
moderate = settings(deadline=None, max_examples=60)


@st.composite
def plans(draw: st.DrawFn, largest: int = 60, mixture: str | None = None, proportions: str | None = None) -> Plan:
    sizes = draw(st.lists(st.integers(1, largest), min_size=1, max_size=5))
    sources = [
        Source(f"d{n}", size, draw(st.integers(1, 3)), draw(st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 1, 2.5, 7])))
        for n, size in enumerate(sizes)
    ]
    mixture = mixture or draw(st.sampled_from(["interleave", "concat"]))
    shares = ["size"] if mixture == "concat" else ["size", "weights", "temperature"]
    group = draw(st.sampled_from([1, 2, 3, 4]))
    return Plan(
        sources,
        seed=draw(st.integers(0, 2**32)),
        effective_batch=group * draw(st.integers(1, 24)),
        mixture=mixture,  # type: ignore[arg-type]
        proportions=proportions or draw(st.sampled_from(shares)),  # type: ignore[arg-type]
        temperature=draw(st.sampled_from([0.5, 1.0, 1.7, 2.0, 10.0])),
        group=group,
    )


def counts(tickets: np.ndarray, sources: int) -> list[int]:
    return np.bincount(tickets["dataset"], minlength=sources).tolist()


def seen(tickets: np.ndarray) -> Counter:
    return Counter(tickets.tolist())


# Exactly once.


@moderate
@given(plans())
def test_every_video_comes_exactly_once_per_pass_over_its_dataset_two_passes_deep(plan: Plan) -> None:
    horizon = 2 * plan.epoch_size
    if plan.mixture == "interleave":
        weights = plan._weights()
        horizon = max((2 * s.size + 3) * sum(weights) // w + 1 for s, w in zip(plan.sources, weights))
    assume(horizon < min(20_000, 3000 * plan.effective_batch))
    tickets = plan.samples(0, -(-horizon // plan.effective_batch) * plan.effective_batch)
    assert len(np.unique(tickets)) == len(tickets)
    for number, source in enumerate(plan.sources):
        own = tickets[tickets["dataset"] == number]
        for number_of_pass in range(2 * source.replicas if plan.mixture == "concat" else 2):
            assert sorted(own["index"][own["pass"] == number_of_pass]) == list(range(source.size))


@moderate
@given(plans(mixture="interleave"))
def test_interleave_ends_a_pass_before_it_begins_the_next(plan: Plan) -> None:
    tickets = plan.samples(0, 40 * plan.effective_batch)
    for number, source in enumerate(plan.sources):
        own = tickets[tickets["dataset"] == number]
        assert own["pass"].tolist() == [k // source.size for k in range(len(own))]


@moderate
@given(plans(mixture="concat"), st.integers(0, 2**20))
def test_concat_shows_every_replica_exactly_once_per_pass_over_the_union(plan: Plan, union: int) -> None:
    size = plan.epoch_size
    tickets = plan.samples(union * size, (union + 1) * size)
    expected = {
        (d, i, union * s.replicas + r)
        for d, s in enumerate(plan.sources)
        for r in range(s.replicas)
        for i in range(s.size)
    }
    assert seen(tickets) == Counter(expected)


@moderate
@given(plans(proportions="size"), st.integers(1, 3))
def test_by_size_an_epoch_is_exactly_one_pass_times_replicas_over_each_dataset(plan: Plan, epochs: int) -> None:
    """As far as whole updates can: to the video where updates and epochs meet, and never a video late or early."""
    batch, size = plan.effective_batch, plan.epoch_size
    within = counts(plan.samples(0, epochs * size // batch * batch), len(plan.sources))
    enough = counts(plan.samples(0, plan.updates(epochs) * batch), len(plan.sources))
    for source, least, most in zip(plan.sources, enough, within):
        assert most <= epochs * source.draws <= least


@moderate
@given(plans(proportions="size", largest=12))
def test_by_size_updates_that_fill_whole_epochs_hold_whole_passes(plan: Plan) -> None:
    epochs = plan.effective_batch
    assert plan.updates(epochs) == plan.epoch_size
    tickets = plan.samples(0, epochs * plan.epoch_size)
    assert counts(tickets, len(plan.sources)) == [epochs * s.draws for s in plan.sources]


@pytest.mark.parametrize("mixture", ["interleave", "concat"])
def test_positions_around_the_end_of_a_pass(mixture: Any) -> None:
    plan = Plan([Source("one", 17)], seed=3, effective_batch=4, mixture=mixture)
    first, second = plan.samples(0, 17), plan.samples(17, 34)
    assert sorted(first["index"]) == sorted(second["index"]) == list(range(17))
    assert first["index"].tolist() != second["index"].tolist()
    assert set(first["pass"]) == {0}
    assert set(second["pass"]) == {1}
    everything = plan.samples(0, 40)
    for position in (0, 1, 15, 16, 17, 18, 33, 34, 35):
        assert plan.samples(position, position + 1).tolist() == [everything[position].item()]
        assert len(plan.samples(position, position)) == 0


@pytest.mark.parametrize("mixture", ["interleave", "concat"])
def test_the_published_datasets_are_seen_exactly_once_in_an_epoch(mixture: Any) -> None:
    plan = Plan(PAPER, seed=0, effective_batch=512, mixture=mixture)
    tickets = plan.samples(0, plan.updates(1) * 512)
    for number, source in enumerate(PAPER):
        first = tickets[(tickets["dataset"] == number) & (tickets["pass"] == 0)]["index"]
        assert np.array_equal(np.sort(first), np.arange(source.size))


# The same whatever the hardware.


@moderate
@given(plans(), st.lists(st.tuples(st.integers(0, 127), st.integers(0, 9), st.integers(0, 5)), max_size=8))
def test_any_world_size_micro_batch_and_interruption_gives_the_same_updates(
    plan: Plan, lives: list[tuple[int, int, int]]
) -> None:
    """A run that lives several times, each time on another world, and dies within an update, which it then repeats."""
    batch, updates = plan.effective_batch, 12
    worlds = [w for w in range(1, 129) if batch % (w * plan.group) == 0]
    done: list[np.ndarray] = []
    for which_world, which_micro, length in [*lives, (0, 0, updates)]:
        plan = pickle.loads(pickle.dumps(plan))
        world = worlds[which_world % len(worlds)]
        micros = [m for m in range(plan.group, batch // world + 1, plan.group) if batch // world % m == 0]
        micro = [None, *micros][which_micro % (len(micros) + 1)]
        shape = solve(batch, nodes=1, gpus=world, micro_batch=micro, group=plan.group)
        for update in range(len(done), min(updates, len(done) + length)):
            slices = [shape.slice(update, a, r) for r in range(world) for a in range(shape.accumulation)]
            done.append(np.concatenate([plan.samples(*s) for s in slices]))
        plan.samples(*shape.slice(len(done), 0, 0))
    assert np.array_equal(np.concatenate(done), plan.samples(0, updates * batch))


@moderate
@given(plans(), st.integers(0, 2**40), st.lists(st.integers(0, 70), min_size=1, max_size=8))
@example(Plan(PAPER, seed=0, effective_batch=512), 2**40, [1, 511, 2])
def test_tickets_do_not_depend_on_how_they_are_asked_for(plan: Plan, start: int, steps: list[int]) -> None:
    cuts = np.cumsum([start, *steps]).tolist()
    parts = [plan.samples(a, b) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), plan.samples(cuts[0], cuts[-1]))
    assert np.array_equal(plan.samples(np.int64(start), np.int64(cuts[-1])), plan.samples(start, cuts[-1]))


@pytest.mark.parametrize("mixture", ["interleave", "concat"])
@pytest.mark.parametrize("start", [2**31 - 3, 2**32 - 3, 2**40 - 3, 2**40])
def test_far_positions_do_not_overflow(mixture: Any, start: int) -> None:
    sources = [Source("large", 2**40 + 15, 5), Source("small", 3, 7), Source("medium", 10**6 + 3)]
    plan = Plan(sources, seed=1, effective_batch=510, mixture=mixture)
    tickets = plan.samples(start, start + 2000)
    assert len(np.unique(tickets)) == 2000
    assert np.array_equal(plan.samples(np.uint64(start), np.uint64(start + 2000)), tickets)  # type: ignore[arg-type]
    assert tickets["index"].min() >= 0
    assert tickets["pass"].min() >= 0
    plan = Plan(PAPER, seed=1, effective_batch=512, mixture=mixture)
    tickets = plan.samples(start, start + 2000)
    assert abs(int(tickets["pass"][0]) - start // plan.epoch_size) <= 1


def test_cost_is_independent_of_the_position() -> None:
    """Loose, so that a busy machine passes: work that grows with the position would be a thousand times slower."""
    plan = Plan(PAPER, seed=0, effective_batch=512, group=2)

    def cost(start: int) -> float:
        times = []
        for n in range(20):
            begin = time.process_time()
            plan.samples(start + n * 512, start + (n + 1) * 512)
            times.append(time.process_time() - begin)
        return min(times)

    cost(0)
    near, far = cost(0), cost(2**40)
    assert far < 5 * near + 1e-3
    assert near < 15e-3


# Proportions.


@moderate
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(1, 6),
    st.sampled_from([1.0, 0.1, 1 / 3, 1e-7, 1234.5, 1e12]),
    st.integers(0, 2**40),
)
@example([16, 32, 16], 8, 1 / 64, 2**40)
def test_float_weights_give_exact_counts_in_every_update(
    shares: list[int], times: int, scale: float, position: int
) -> None:
    batch = sum(shares) * times
    sources = [Source(f"d{n}", 11 + n, weight=share * scale) for n, share in enumerate(shares)]
    plan = Plan(sources, seed=0, effective_batch=batch, proportions="weights")
    first = position // batch
    for update in (0, 1, 2, first, first + 1):
        tickets = plan.samples(update * batch, (update + 1) * batch)
        assert counts(tickets, len(shares)) == [share * times for share in shares]


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.1, 0.1), (0.5, 0.13, 0.13, 0.13, 0.11)])
def test_a_dataset_whose_share_is_whole_gets_it_exactly_even_when_the_others_are_not(
    weights: tuple[float, ...],
) -> None:
    sources = [Source(f"d{n}", 50, weight=w) for n, w in enumerate(weights)]
    plan = Plan(sources, seed=0, effective_batch=512, proportions="weights")
    for update in range(50):
        half, *others = counts(plan.samples(update * 512, update * 512 + 512), len(weights))
        assert half == 256
        assert all(abs(count - 512 * w) < 2 for count, w in zip(others, weights[1:]))


@moderate
@given(plans(mixture="interleave"))
def test_counts_never_stray_from_the_proportions(plan: Plan) -> None:
    number, batch, weights = len(plan.sources), plan.effective_batch, plan._weights()
    whole = [batch * w % sum(weights) == 0 for w in weights]
    shared = sum(w for w, exact in zip(weights, whole) if not exact)
    dataset = plan.samples(0, 20 * batch)["dataset"].reshape(20, batch)
    so_far = np.cumsum([(dataset == n).sum(1) for n in range(number)], axis=1)
    for update in range(20):
        for count, w, exact in zip(so_far[:, update].tolist(), weights, whole):
            stray = abs(count - Fraction((update + 1) * batch * w, sum(weights)))
            assert stray <= (0 if exact else (1 + Fraction((number - sum(whole)) * w, shared)) / 2)


def test_every_dataset_is_in_every_update_as_soon_as_its_share_allows() -> None:
    """The projection loss needs samples for every head."""
    sources = [Source("a", 10_007), Source("b", 90_001), Source("c", 203)]  # c: 1.04 videos of 512
    plan = Plan(sources, seed=0, effective_batch=512)
    for update in range(400):
        assert min(counts(plan.samples(update * 512, update * 512 + 512), 3)) >= 1


def test_temperature_is_the_power_of_size_times_replicas() -> None:
    sources = [Source("a", 100), Source("b", 450, 2), Source("c", 2500)]
    shares = {0.5: (1, 81, 625), 1.0: (1, 9, 25), 2.0: (1, 3, 5)}
    for temperature, share in shares.items():
        batch = sum(share)
        plan = Plan(sources, seed=0, effective_batch=batch, proportions="temperature", temperature=temperature)
        for update in range(3):
            assert counts(plan.samples(update * batch, (update + 1) * batch), 3) == list(share)
    hot = Plan(sources, seed=0, effective_batch=3000, proportions="temperature", temperature=1e9)
    assert counts(hot.samples(0, 3000), 3) == [1000, 1000, 1000]


def test_temperature_one_is_by_size() -> None:
    by_size = Plan(PAPER, seed=5, effective_batch=64)
    by_temperature = replace(by_size, proportions="temperature")
    assert np.array_equal(by_size.samples(1000, 3000), by_temperature.samples(1000, 3000))


@moderate
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 200), st.integers(0, 2**90))
def test_apportion_is_webster_seat_by_seat(weights: list[int], seats: int, rounds: int) -> None:
    assume(sum(weights))
    order = sorted((Fraction(2 * j + 1, w), n) for n, w in enumerate(weights) if w for j in range(seats))
    by_definition = [sum(owner == n for _, owner in order[:seats]) for n in range(len(weights))]
    assert apportion(seats, weights) == by_definition
    far = apportion(rounds * sum(weights) + seats, weights)
    assert far == [rounds * w + count for w, count in zip(weights, by_definition)]


@pytest.mark.parametrize(
    ("number", "fraction"),
    [
        (0.3, (3, 10)),
        (1 / 3, (1, 3)),
        (0.1 + 0.2, (3, 10)),
        (7, (7, 1)),
        (0.0, (0, 1)),
        (240436 / 1200646, (120218, 600323)),
    ],
)
def test_floats_are_taken_for_the_simple_fractions_they_stand_for(number: float, fraction: tuple[int, int]) -> None:
    assert simplest(number) == Fraction(*fraction)


@given(st.floats(1e-300, 1e300))
def test_no_positive_number_is_lost_in_simplification(number: float) -> None:
    assert abs(simplest(number) - Fraction(number)) <= Fraction(number) / 10**14


# Groups and the layout of an update.


@moderate
@given(plans(mixture="interleave"))
def test_mix_groups_are_of_one_dataset_except_at_the_end_of_an_update(plan: Plan) -> None:
    group, batch = plan.group, plan.effective_batch
    tickets = plan.samples(0, 10 * batch)
    for update in range(10):
        own = tickets["dataset"][update * batch : (update + 1) * batch]
        held = counts(tickets[update * batch : (update + 1) * batch], len(plan.sources))
        pure = sum(count // group for count in held)
        groups = own.reshape(-1, group)
        assert (groups[:pure] == groups[:pure, :1]).all()
        assert own[pure * group :].tolist() == [d for d, count in enumerate(held) for _ in range(count % group)]


@moderate
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.sampled_from([1, 2, 4]))
@example([512, 0], 2)
def test_datasets_are_spread_evenly_over_an_update(held: list[int], group: int) -> None:
    dataset, ordinal = layout(tuple(held), group)
    assert np.bincount(dataset, minlength=len(held)).tolist() == held
    for number in range(len(held)):
        assert ordinal[dataset == number].tolist() == list(range(held[number]))
    whole = [count // group for count in held]
    leaders = dataset[: sum(whole) * group : group]
    for number, count in enumerate(whole):
        ideal = np.arange(1, len(leaders) + 1) * count / max(1, len(leaders))
        stray = np.abs(np.cumsum(leaders == number) - ideal)
        assert stray.max(initial=0) <= 0.5 + len(held) / 2 + 1e-9


def test_each_rank_gets_a_fair_mixture() -> None:
    plan = Plan(
        [Source("a", 1000, 2), Source("b", 2000, 2), Source("c", 1000, 2)], seed=0, effective_batch=512, group=2
    )
    for rank in range(16):
        assert counts(plan.samples(512 + rank * 32, 512 + rank * 32 + 32), 3) == [8, 16, 8]


# What the order depends on, and what not.


def test_the_order_of_a_dataset_depends_on_seed_name_and_pass_only() -> None:
    def order(plan: Plan, name: str) -> list[int]:
        number = [s.name for s in plan.sources].index(name)
        tickets = plan.samples(0, 4000)
        return tickets["index"][tickets["dataset"] == number][:200].tolist()

    base = Plan([Source("a", 300), Source("b", 300)], seed=0, effective_batch=8)
    assert order(base, "a") == order(Plan([Source("x", 90), Source("a", 300)], seed=0, effective_batch=64), "a")
    assert order(base, "a") != order(base, "b")
    assert order(base, "a") != order(replace(base, seed=1), "a")


@pytest.mark.parametrize("mixture", ["interleave", "concat"])
def test_seeds_and_passes_never_share_an_order(mixture: Any) -> None:
    """With seed + epoch as the key, pass 1 of seed 0 is pass 0 of seed 1."""
    orders = set()
    for seed in range(10):
        tickets = Plan([Source("a", 50)], seed=seed, effective_batch=5, mixture=mixture).samples(0, 500)
        orders |= {tuple(tickets["index"][n * 50 : n * 50 + 50].tolist()) for n in range(10)}
    assert len(orders) == 100


CHANGES: dict[str, Callable[[Plan], Plan]] = {
    "seed was 0, is now 1": lambda p: replace(p, seed=1),
    "effective_batch was 512, is now 256": lambda p: replace(p, effective_batch=256),
    "mixture was interleave, is now concat": lambda p: replace(p, mixture="concat"),
    "proportions was size, is now temperature": lambda p: replace(p, proportions="temperature"),
    "temperature was 1.0, is now 2.0": lambda p: replace(p, temperature=2.0),
    "group was 1, is now 2": lambda p: replace(p, group=2),
    "dataset 'mit': size was 20, is now 21": lambda p: _with(p, size=21),
    "dataset 'mit': replicas was 1, is now 2": lambda p: _with(p, replicas=2),
    "dataset 'mit': weight was None, is now 2.0": lambda p: _with(p, weight=2),
    "dataset 'mit': digest was 0123456789ab…, is now none": lambda p: _with(p, digest=""),
    "dataset 'k400' is gone": lambda p: replace(p, sources=p.sources[1:]),
    "dataset 'new' was not there": lambda p: replace(p, sources=(*p.sources, Source("new", 5))),
    "the order of the datasets was k400, mit; is now mit, k400": lambda p: replace(p, sources=p.sources[::-1]),
}
BASE = Plan([Source("k400", 10), Source("mit", 20, digest="0123456789abcdef0123")], seed=0, effective_batch=512)


def _with(plan: Plan, **change: Any) -> Plan:
    return replace(plan, sources=[plan.sources[0], replace(plan.sources[1], **change)])


@pytest.mark.parametrize("line", CHANGES)
def test_each_change_of_a_plan_changes_its_fingerprint_and_is_named_in_one_line(line: str) -> None:
    changed = CHANGES[line](BASE)
    assert changed.fingerprint != BASE.fingerprint
    assert changed.differences(json.loads(json.dumps(BASE.describe()))) == [line]


def test_all_changes_are_named() -> None:
    other = Plan([Source("mit", 21), Source("k700", 10)], seed=0, effective_batch=256)
    assert other.differences(BASE.describe()) == [
        "effective_batch was 512, is now 256",
        "dataset 'k700' was not there",
        "dataset 'k400' is gone",
        "dataset 'mit': size was 20, is now 21",
        "dataset 'mit': digest was 0123456789ab…, is now none",
    ]
    old = {**BASE.describe(), "order_version": 0}
    assert BASE.differences(old) == [f"order_version was 0, is now {ORDER_VERSION}"]
    assert BASE.differences({**BASE.describe(), "extinct": 3}) == ["extinct was 3, is now None"]


@moderate
@given(plans())
def test_equal_plans_have_one_fingerprint_no_differences_and_one_order(plan: Plan) -> None:
    twin = pickle.loads(pickle.dumps(plan))
    assert twin == plan
    assert twin.fingerprint == plan.fingerprint
    assert plan.differences(json.loads(json.dumps(twin.describe()))) == []
    assert twin.digest(0, 50) == plan.digest(0, 50)


def test_numbers_of_numpy_and_whole_floats_make_the_same_plan() -> None:
    sources = [Source("k400", np.int64(10)), Source("mit", np.int32(20), digest="0123456789abcdef0123")]  # type: ignore
    other = Plan(sources, seed=np.int64(0), effective_batch=np.int64(512), temperature=1)  # type: ignore[arg-type]
    assert other.fingerprint == BASE.fingerprint
    assert np.array_equal(other.samples(2**40, 2**40 + 9), BASE.samples(2**40, 2**40 + 9))


def test_digest_stands_for_the_tickets() -> None:
    plan = Plan(PAPER, seed=0, effective_batch=512)
    digests = {plan.digest(n * 512, n * 512 + 512) for n in range(50)}
    assert len(digests) == 50
    assert replace(plan, seed=1).digest(0, 512) not in digests
    assert len({Plan([Source("a", 1)], seed=0, effective_batch=1).digest(n, n + 1) for n in range(9)}) == 9
    assert all(len(d) == 16 and int(d, 16) >= 0 for d in digests)


# Stand-ins for unreadable videos.


@moderate
@given(plans(), st.integers(0, 2000))
def test_stand_ins_are_all_the_other_videos_of_the_dataset_in_turn(plan: Plan, position: int) -> None:
    ticket = plan.samples(position, position + 1)[0]
    size, bad = plan.sources[int(ticket["dataset"])].size, int(ticket["index"])
    others = [plan.stand_in(ticket, attempt) for attempt in range(size - 1)]
    assert sorted(others) == [i for i in range(size) if i != bad]
    assert plan.stand_in(ticket, 0) == pickle.loads(pickle.dumps(plan)).stand_in(ticket, 0)
    assert plan.stand_in(ticket, 10**6) != bad or size == 1


def test_stand_ins_of_different_passes_differ() -> None:
    plan = Plan([Source("a", 10_000)], seed=0, effective_batch=8)
    tickets = np.zeros(20, SAMPLE_DTYPE)
    tickets["pass"] = np.arange(20)
    assert len({plan.stand_in(t, 0) for t in tickets}) > 15


# Refusals.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "one dataset or more"),
        ({"sources": [Source("a", 1), Source("a", 2)]}, "a name of its own"),
        ({"mixture": "blend"}, "no such mixture=blend"),
        ({"proportions": "luck"}, "proportions=luck"),
        ({"mixture": "concat", "proportions": "temperature"}, "proportions=size only"),
        ({"proportions": "weights"}, "needs a weight for every dataset"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"effective_batch": 0}, "effective_batch=0"),
        ({"group": 3}, "effective_batch=512 is not a multiple of group=3"),
    ],
)
def test_a_plan_refuses_what_contradicts_itself(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BASE, **change)


@pytest.mark.parametrize("bad", [{"size": 0}, {"replicas": 0}, {"weight": 0.0}, {"weight": float("inf")}])
def test_a_source_refuses_to_be_empty(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'a'"):
        replace(Source("a", 1), **bad)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2)])
def test_there_are_no_samples_before_the_first(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="no range"):
        BASE.samples(start, stop)
    with pytest.raises(TypeError):
        BASE.samples(0.0, 3.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("epochs", "updates"), [(0, 0), (1, 1), (17.06, 1), (17.07, 2), (51.2, 3), (0.1, 1), (102.4, 6)]
)
def test_updates_rounds_up_and_only_what_is_not_whole(epochs: float, updates: int) -> None:
    assert BASE.updates(epochs) == updates
    with pytest.raises(ValueError, match="number from 0 upwards"):
        BASE.updates(-epochs - 1)


def test_order_needs_numpy_and_the_standard_library_only() -> None:
    code = "import sys, multitrain.order; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert not {"torch", "pydantic", "hydra", "yaml", "cv2", "av", "scipy"} & set(loaded)


def test_the_older_names_of_samples_still_work() -> None:
    with pytest.warns(DeprecationWarning, match=r"Plan\.samples"):
        older = BASE.tickets(3, 9)
    assert older.dtype == TICKET
    assert np.array_equal(older, BASE.samples(3, 9))
