"""Joining neighbours: what may be told as one extent, and what must not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qcow2_plugin.extent import Extent, ExtentKind, continues, merge

DATA, ZERO, COMPRESSED, UNALLOCATED = ExtentKind.DATA, ExtentKind.ZERO, ExtentKind.COMPRESSED, ExtentKind.UNALLOCATED


def extent(
    guest: int, length: int, kind: ExtentKind, host: int | None = None, stored: int = 0, *, depth: int = 0
) -> Extent:
    return Extent(guest, length, kind, host, stored, depth)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (extent(0, 10, DATA, 100), extent(10, 5, DATA, 110), True),
        (extent(0, 10, DATA, 100), extent(10, 5, DATA, 111), False),
        (extent(0, 10, DATA, 100), extent(10, 5, DATA, 100), False),
        (extent(0, 10, DATA, 0), extent(10, 5, DATA, 10), True),
        (extent(0, 10, ZERO), extent(10, 5, ZERO), True),
        (extent(0, 10, ZERO), extent(10, 5, ZERO, 10), False),
        (extent(0, 10, ZERO, 100), extent(10, 5, ZERO), False),
        (extent(0, 10, ZERO, 100), extent(10, 5, ZERO, 110), True),
        (extent(0, 10, ZERO), extent(10, 5, UNALLOCATED), False),
        (extent(0, 10, UNALLOCATED), extent(10, 5, UNALLOCATED, depth=1), False),
        (extent(0, 10, COMPRESSED, 7, 3), extent(10, 5, COMPRESSED, 99, 4), True),
        (extent(0, 10, COMPRESSED, 7, 3), extent(10, 5, COMPRESSED, 99, 4, depth=1), False),
        (extent(0, 10, COMPRESSED, 7, 3), extent(10, 5, DATA, 17), False),
    ],
)
def test_continues(first: Extent, second: Extent, expected: bool) -> None:
    assert continues(first, second) is expected


def test_nothing_merges_to_nothing() -> None:
    assert list(merge([])) == []


def test_one_extent_stays_as_it_is() -> None:
    only = extent(3, 4, COMPRESSED, 17, 9, depth=2)
    assert list(merge([only])) == [only]


def test_runs_in_line_become_one() -> None:
    parts = [extent(0, 10, DATA, 100), extent(10, 10, DATA, 110), extent(20, 1, DATA, 120), extent(21, 9, DATA, 7)]
    assert list(merge(parts)) == [extent(0, 21, DATA, 100), extent(21, 9, DATA, 7)]


def test_compressed_runs_lose_their_place_and_keep_their_sum() -> None:
    parts = [extent(0, 10, COMPRESSED, 100, 3), extent(10, 10, COMPRESSED, 103, 4), extent(20, 10, COMPRESSED, 9, 5)]
    assert list(merge(parts)) == [extent(0, 30, COMPRESSED, None, 12)]


def test_merging_is_lazy() -> None:
    asked = []

    def parts() -> Iterator[Extent]:
        for index in range(1000):
            asked.append(index)
            yield extent(index, 1, DATA, 2 * index)

    merged = merge(parts())
    assert not asked
    assert next(merged) == extent(0, 1, DATA, 0)
    assert len(asked) == 2
