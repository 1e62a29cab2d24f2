"""The sizes that follow from cluster bits, against the published formulas."""

from __future__ import annotations

import pytest

from qcow2_plugin.format import geometry
from qcow2_plugin.format.geometry import Geometry

STANDARD = range(9, 22)
EXTENDED = range(14, 22)


@pytest.mark.parametrize("cluster_bits", STANDARD)
def test_standard_entries(cluster_bits: int) -> None:
    made = Geometry(cluster_bits)
    size = 2**cluster_bits
    assert made.cluster_size == made.subcluster_size == size
    assert (made.l2_entry_size, made.l2_entries) == (8, size // 8)
    assert made.l2_coverage == 2**made.l2_coverage_bits == size * size // 8


@pytest.mark.parametrize("cluster_bits", EXTENDED)
def test_extended_entries(cluster_bits: int) -> None:
    made = Geometry(cluster_bits, extended_l2=True)
    size = 2**cluster_bits
    assert (made.cluster_size, made.subcluster_size) == (size, size // 32)
    assert (made.l2_entry_size, made.l2_entries) == (16, size // 16)
    assert made.l2_coverage == 2**made.l2_coverage_bits == size * size // 16


@pytest.mark.parametrize("cluster_bits", STANDARD)
def test_l1_entries_round_up(cluster_bits: int) -> None:
    made = Geometry(cluster_bits)
    sizes = (0, 1, made.l2_coverage - 1, made.l2_coverage, made.l2_coverage + 1, 7 * made.l2_coverage)
    assert [made.l1_entries_for(size) for size in sizes] == [0, 1, 1, 1, 2, 7]


@pytest.mark.parametrize(
    ("cluster_bits", "extended_l2", "largest"),
    [(9, False, 128 << 30), (16, False, 2 << 50), (21, False, 2 << 60), (16, True, 1 << 50)],
)
def test_the_largest_disk_needs_the_largest_l1_table(cluster_bits: int, extended_l2: bool, largest: int) -> None:
    assert Geometry(cluster_bits, extended_l2).l1_entries_for(largest) == geometry.MAX_L1_ENTRIES
    assert Geometry(cluster_bits, extended_l2).l1_entries_for(largest + 1) == geometry.MAX_L1_ENTRIES + 1


def test_the_limits_are_those_of_the_format() -> None:
    assert geometry.MAX_L1_ENTRIES * 8 == 32 << 20
    assert geometry.MAX_REFCOUNT_TABLE_SIZE == 8 << 20
    assert geometry.MAX_SNAPSHOTS == 65536
    assert geometry.MAX_BITMAPS == 65535
    assert geometry.MAX_BITMAP_DIRECTORY_SIZE == 67107840
    assert geometry.MAX_BITMAP_TABLE_ENTRIES == 0x8000000
    assert geometry.MAX_BITMAP_DATA_SIZE == 512 << 20
    assert geometry.MAX_NAME_LENGTH == 1023
    assert geometry.MAX_HOST_OFFSET == 2**63 - 1
