"""The judge of concurrent histories finds what cannot have happened, and nothing else."""

from __future__ import annotations

import random

import pytest

from tests.support.registers import Event, violation

IMPOSSIBLE = {
    "a value from nowhere": [Event("read", 7, 0, 1)],
    "a value from the future": [Event("read", 7, 0, 1), Event("write", 7, 2, 3)],
    "a lost write": [Event("write", 7, 0, 1), Event("read", 0, 2, 3)],
    "an old value after a new one": [
        Event("write", 7, 0, 1),
        Event("write", 8, 2, 9),
        Event("read", 8, 3, 4),
        Event("read", 7, 5, 6),
    ],
    "an overwritten value": [Event("write", 7, 0, 1), Event("write", 8, 2, 3), Event("read", 7, 4, 5)],
    "a value after zeros": [Event("write", 7, 0, 1), Event("write", 0, 2, 3), Event("read", 7, 4, 5)],
    "zeros between": [Event("write", 7, 0, 1), Event("read", 0, 2, 3), Event("read", 7, 4, 5)],
    "zeros from nowhere": [Event("write", 7, 0, 1), Event("write", 8, 2, 9), Event("read", 0, 4, 5)],
    "zeros overwritten": [Event("write", 0, 0, 1), Event("write", 7, 2, 3), Event("read", 0, 4, 5)],
}
POSSIBLE = {
    "nothing": [],
    "zeros at first": [Event("read", 0, 0, 1)],
    "either of two at once": [Event("write", 7, 0, 9), Event("write", 8, 1, 8), Event("read", 7, 10, 11)],
    "old and new while it is written": [
        Event("write", 7, 0, 1),
        Event("write", 8, 2, 9),
        Event("read", 7, 3, 4),
        Event("read", 8, 5, 6),
    ],
    "a discard that does": [Event("write", 7, 0, 1), Event("discard", 0, 2, 3), Event("read", 0, 4, 5)],
    "a discard that does not": [Event("write", 7, 0, 1), Event("discard", 0, 2, 3), Event("read", 7, 4, 5)],
    "zeros while they are written": [Event("write", 7, 0, 1), Event("write", 0, 2, 9), Event("read", 7, 3, 4)],
}


@pytest.mark.parametrize("history", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_have_happened_is_found(history: list[Event]) -> None:
    assert violation(history)


@pytest.mark.parametrize("history", POSSIBLE.values(), ids=POSSIBLE)
def test_what_can_have_happened_is_not(history: list[Event]) -> None:
    assert violation(history) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_true_register_is_never_suspected(seed: int) -> None:
    """Every request takes effect at one moment, and is known to have been under way for some time around it."""
    rng = random.Random(seed)
    value, history = 0, []
    for moment in range(100, 20_000, 50):
        start, end = moment - rng.randrange(100), moment + rng.randrange(1, 400)
        kind = rng.choice(["write", "write", "zero", "discard", "read", "read", "read"])
        if kind == "read":
            history.append(Event("read", value, start, end))
        elif kind == "discard":
            value = rng.choice([0, value])
            history.append(Event("discard", 0, start, end))
        else:
            value = moment if kind == "write" else 0
            history.append(Event("write", value, start, end))
    assert violation(history) is None
