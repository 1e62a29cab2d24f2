"""Bitmap tables and packed bits as arrays."""

from __future__ import annotations

import random

import numpy as np
import pytest

from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.format.bits import are_set, check_table, clear_from, runs_of_bits, set_bits

CLUSTER = 65536


@pytest.mark.parametrize("entry", [0, 1, CLUSTER, 0x00FF_FFFF_FFFF_0000])
def test_entries_of_a_bitmap_table(entry: int) -> None:
    check_table(np.array([0, entry, 1], dtype=np.uint64), CLUSTER)


@pytest.mark.parametrize("entry", [2, 1 << 8, 1 << 56, 1 << 63, CLUSTER | 1, CLUSTER | 2, 512, CLUSTER + 512, 3])
def test_bad_entries_of_a_bitmap_table(entry: int) -> None:
    with pytest.raises(CorruptImageError, match=f"bitmap table: entry 2 is {entry:#x}"):
        check_table(np.array([0, 1, entry, entry], dtype=np.uint64), CLUSTER)


def test_an_empty_table_is_sound() -> None:
    check_table(np.array([], dtype=np.uint64), CLUSTER)


@pytest.mark.parametrize(
    ("data", "runs"),
    [
        (b"", []),
        (b"\x00", [(0, 8, False)]),
        (b"\xff\xff", [(0, 16, True)]),
        (b"\x01", [(0, 1, True), (1, 7, False)]),
        (b"\x80\x01", [(0, 7, False), (7, 2, True), (9, 7, False)]),
        (b"\x00\x00\xff\xff", [(0, 16, False), (16, 16, True)]),
    ],
)
def test_runs_of_bits_start_at_the_low_bit(data: bytes, runs: list[tuple[int, int, bool]]) -> None:
    found = runs_of_bits(data)
    assert found == runs
    assert all(type(value) in (int, bool) for run in found for value in run)


@pytest.mark.parametrize("seed", range(20))
def test_bits_are_set_asked_and_cleared_as_in_a_list(seed: int) -> None:
    chance = random.Random(seed)
    packed = bytearray(chance.choice([1, 2, 9]))
    values = [False] * (8 * len(packed))
    for _ in range(50):
        start = chance.randrange(len(values))
        stop = chance.randrange(start + 1, len(values) + 1)
        assert are_set(packed, start, stop) == all(values[start:stop])
        if chance.random() < 0.2:
            clear_from(packed, start)
            values[start:] = [False] * (len(values) - start)
        else:
            stop = chance.choice([start + 1, stop])
            set_bits(packed, start, stop)
            values[start:stop] = [True] * (stop - start)
        assert int.from_bytes(packed, "little") == sum(value << bit for bit, value in enumerate(values))
