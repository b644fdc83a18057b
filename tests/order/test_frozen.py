"""The order is frozen for ever: a change here needs a new ORDER_VERSION and breaks every run in progress."""

from __future__ import annotations

from dataclasses import replace

import pytest

from multitrain.order import ORDER_VERSION, Plan, Source

GOLDEN = Plan(
    [Source("kinetics", 240_436, weight=0.5), Source("mit", 791_297, 2, 0.2), Source("ssv2", 13, 3, 1 / 3)],
    seed=7,
    effective_batch=12,
    group=2,
)


def golden(name: str) -> Plan:
    mixture, proportions = name.split()
    return replace(GOLDEN, mixture=mixture, proportions=proportions, temperature=3.0)  # type: ignore[arg-type]


GOLDEN_TICKETS: dict[str, list[tuple[int, int, int]]] = {
    "interleave size": [
        (1, 208752, 0),
        (1, 441394, 0),
        (1, 323352, 0),
        (1, 233605, 0),
        (0, 59406, 0),
        (0, 160805, 0),
        (1, 535315, 0),
        (1, 208937, 0),
        (1, 43078, 0),
        (1, 222537, 0),
        (1, 376476, 0),
        (1, 5185, 0),
    ],
    "interleave weights": [
        (0, 59406, 0),
        (0, 160805, 0),
        (2, 12, 0),
        (2, 1, 0),
        (0, 149739, 0),
        (0, 83250, 0),
        (1, 208752, 0),
        (1, 441394, 0),
        (2, 2, 0),
        (2, 6, 0),
        (0, 145080, 0),
        (0, 72651, 0),
    ],
    "interleave temperature": [
        (1, 208752, 0),
        (1, 441394, 0),
        (0, 59406, 0),
        (0, 160805, 0),
        (1, 323352, 0),
        (1, 233605, 0),
        (1, 535315, 0),
        (1, 208937, 0),
        (0, 149739, 0),
        (0, 83250, 0),
        (1, 43078, 0),
        (1, 222537, 0),
    ],
    "concat size": [
        (1, 49873, 1),
        (1, 268895, 1),
        (1, 431196, 0),
        (0, 52746, 0),
        (1, 270653, 0),
        (1, 228094, 0),
        (1, 421281, 0),
        (1, 152619, 1),
        (1, 493723, 1),
        (0, 142416, 0),
        (1, 197095, 1),
        (1, 703114, 0),
    ],
}
GOLDEN_DIGESTS: dict[str, tuple[str, str, str]] = {
    "interleave size": ("1ff9806e036f3697", "f442d31d82029be9", "a10f1fb79175f3c9"),
    "interleave weights": ("f78e818b93693cc6", "904d0e3858d59d52", "f158b3215d8acaf6"),
    "interleave temperature": ("88de4c1aafd90b88", "ce169e99320bc1d8", "bcc2fb379377cb4d"),
    "concat size": ("a7554acadedd830f", "fd68f429d726d742", "7a997b1db37f7763"),
}
GOLDEN_FINGERPRINT = "d518c119c5aa52d082d2bbcb376322a14daac222b588d76967a8ee71be73aff8"
GOLDEN_STAND_INS: list[int] = [159611, 97691, 223593, 203432, 87962]


@pytest.mark.parametrize("name", GOLDEN_TICKETS)
def test_the_order_is_frozen_for_ever(name: str) -> None:
    plan = golden(name)
    assert plan.samples(0, 12).tolist() == GOLDEN_TICKETS[name]
    assert (plan.digest(0, 1200), plan.digest(10**6, 10**6 + 99), plan.digest(2**40, 2**40 + 99)) == GOLDEN_DIGESTS[
        name
    ]


def test_fingerprint_and_stand_ins_are_frozen_for_ever() -> None:
    assert ORDER_VERSION == 1
    assert GOLDEN.fingerprint == GOLDEN_FINGERPRINT
    assert [GOLDEN.stand_in(GOLDEN.samples(5, 6)[0], n) for n in range(5)] == GOLDEN_STAND_INS
