"""Runs of data in a buffer, against a look at every granule."""

from __future__ import annotations

import random

import pytest

from qcow2_plugin.engine.zeros import data_runs


def plainly(buffer: bytes, granule: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for start in range(0, len(buffer), granule):
        if not any(buffer[start : start + granule]):
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + granule)
        else:
            runs.append((start, start + granule))
    return runs


@pytest.mark.parametrize("granule", [512, 4096, 65536])
def test_runs_are_those_that_a_plain_look_finds(granule: int) -> None:
    rng = random.Random(granule)
    for _ in range(50):
        buffer = bytearray(granule * rng.randint(1, 12))
        for _ in range(rng.randrange(8)):
            buffer[rng.randrange(len(buffer))] = rng.choice((0, 1, 255))
        assert data_runs(memoryview(buffer), granule) == plainly(bytes(buffer), granule)


def test_one_byte_anywhere_is_data() -> None:
    for place in range(1024):
        buffer = bytearray(1024)
        buffer[place] = 1
        start = place // 512 * 512
        assert data_runs(memoryview(buffer), 512) == [(start, start + 512)]
