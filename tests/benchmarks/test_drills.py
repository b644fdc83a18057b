"""The campaigns draw every kind of interruption, in an order that follows from the seed."""

from __future__ import annotations

from benchmarks.drills import controller, local
from benchmarks.drills.kinds import KINDS, matching
from benchmarks.drills.strikes_controller import WAYS


def test_every_kind_can_be_tried_somewhere() -> None:
    assert [k.name for k in KINDS.values() if not k.backends] == []
    assert {k.name for backend in ("local", "controller") for k in matching(backend)} == set(KINDS)
    assert [k.name for k in matching("local", "twin, suspend")] == ["twin start", "suspended"]


def test_ten_local_runs_have_every_kind_and_the_same_seed_the_same_ones() -> None:
    kinds = matching("local")
    decks = [[local.share(kinds, 7, number, local.STRIKES) for number in range(10)] for _ in range(2)]
    assert decks[0] == decks[1]
    assert {k.name for run in decks[0] for k in run} == {k.name for k in kinds}
    assert all(not local.of(k).last for run in decks[0] for k in run[:-3]), "what ends a run comes last"


def test_a_controller_campaign_has_every_kind_once_in_each_way() -> None:
    kinds = matching("controller")
    dealt = controller.deal(kinds, controller.COUNT, 3, WAYS)
    for way in WAYS:
        assert sorted(k.name for k, w in dealt if w == way) == sorted(k.name for k in kinds)
