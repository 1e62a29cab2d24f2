"""Counting references: saturation at the refcount's width, ranges that overlap, one cluster behind the end."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from qcow2_plugin.engine.checking import table_references
from qcow2_plugin.engine.checking.references import Range, References, covered
from qcow2_plugin.engine.checking.table_references import TableReferences


def clusters(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(numbers, dtype=np.int64)


@pytest.mark.parametrize("order", range(7))
def test_counts_are_those_of_a_counter_cut_at_the_width(order: int) -> None:
    """Runs, clusters side by side, clusters far apart; what is cut is told."""
    dice = random.Random(order)
    references, told, lost = References(5000, order), Counter[int](), 0
    for _ in range(200):
        times = dice.choice((1, 2, 300))
        if dice.random() < 0.3:
            first, count = dice.randrange(4900), dice.randrange(100)
            excess = references.add_run(first, count, times)
            told.update({cluster: times for cluster in range(first, first + count)})
        else:
            spread = dice.choice((20, 5000))
            chosen = [dice.randrange(spread) for _ in range(30)]
            excess = references.add(clusters(*chosen), times)
            for cluster in chosen:
                told[cluster] += times
        lost += 0 if excess is None else int(excess.counts.sum())
    maximum = (1 << (1 << order)) - 1
    assert references.counts.tolist() == [min(told[cluster], maximum) for cluster in range(5000)]
    assert lost == sum(max(count - maximum, 0) for count in told.values())
    assert references.counts.itemsize == max((1 << order) // 8, 1)


def test_excess_names_its_clusters() -> None:
    references = References(1000, 1)
    assert references.add_run(10, 5, 2) is None
    excess = references.add(clusters(11, 12, 12, 900), 1)
    assert excess is not None
    assert (excess.clusters.tolist(), excess.counts.tolist()) == ([12], [1])
    excess = references.add(clusters(12, 999), 4)
    assert excess is not None
    assert (excess.clusters.tolist(), excess.counts.tolist()) == ([12, 999], [4, 1])


def test_the_cluster_behind_the_end_is_there_once_it_is_referred_to() -> None:
    references = References(4, 4)
    references.add(clusters(3))
    assert len(references.counts) == 4
    references.add_run(3, 2)
    assert references.counts.tolist() == [0, 0, 0, 2, 1]


def test_nothing_is_counted_for_nothing() -> None:
    references = References(4, 4)
    assert references.add(clusters()) is None and references.add_run(7, 0) is None
    assert references.counts.tolist() == [0] * 4


def test_ranges_that_overlap_are_taken_apart() -> None:
    assert covered([]) == []
    assert covered([(5, 5), (7, 3)]) == []
    assert covered([(0, 10), (5, 15), (5, 10), (20, 30)]) == [
        Range(0, 5, 1), Range(5, 10, 3), Range(10, 15, 1), Range(20, 30, 1)
    ]  # fmt: skip
    dice = random.Random(1)
    ranges = [(start, start + dice.randrange(40)) for start in (dice.randrange(200) for _ in range(50))]
    told = Counter(place for start, stop in ranges for place in range(start, stop))
    found = Counter[int]()
    for start, stop, times in covered(ranges):
        assert start < stop
        found.update({place: times for place in range(start, stop)})
    assert found == told


@pytest.mark.parametrize("buffered", [1, 10, 1 << 20])
def test_tables_are_merged(monkeypatch: pytest.MonkeyPatch, buffered: int) -> None:
    monkeypatch.setattr(table_references, "_BUFFERED", buffered)
    references = TableReferences("memory")
    references.add(clusters(512, 0, 512), 1, clusters(3, 4, 9))
    references.add(clusters(1024, 512), 5, None)
    references.add(clusters(2048), 1, clusters(1))
    references.add(clusters(512), 1, clusters(2))
    tables = references.tables()
    assert tables.offsets.tolist() == [0, 512, 1024, 2048]
    assert tables.times.tolist() == [1, 8, 5, 1]
    assert tables.active_times.tolist() == [1, 3, 0, 1]
    assert [int(tables.l1_indexes[place]) for place in (0, 1, 3)] == [4, 2, 1]
