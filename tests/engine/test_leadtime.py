"""The warning of the cluster against the measured time to stop."""

from __future__ import annotations

from multitrain.engine.leadtime import LeadTime


def test_a_warning_shorter_than_the_95th_percentiles_is_said_once_and_again_when_it_gets_worse() -> None:
    lead = LeadTime({"lead": 20.0, "grace": 200.0})
    for seconds in [10.0] * 95 + [60.0] * 5:
        lead.update(seconds)
    assert lead.short() == {}, "no save was measured yet"
    lead.save(5.0)
    assert lead.needed == 15.0
    assert lead.short() == {}
    lead.save(15.0)
    assert lead.short() == {"lead": 20.0}
    assert lead.short() == {}
    lead.save(230.0)
    assert lead.short() == {"lead": 20.0, "grace": 200.0}


def test_the_first_updates_alone_are_no_measure() -> None:
    lead = LeadTime({"lead": 1.0})
    lead.save(5.0)
    for _ in range(4):
        lead.update(9.0)
    assert lead.needed is None
