"""What an L2 entry means: the decision tables of the format, row by row."""

from __future__ import annotations

import numpy as np
import pytest

from qcow2_plugin.format.entries import (
    ClusterKind,
    EntryRules,
    classify,
    classify_table,
    compressed_location,
    compressed_locations,
    subcluster_kind,
)
from qcow2_plugin.format.geometry import Geometry
from tests.support.fields import ALL_PARTS, COMPRESSED, COPIED, ZERO

UNALLOCATED, UNALLOCATED_ALLOCATED, ZERO_PLAIN, ZERO_ALLOCATED, NORMAL, PACKED, INVALID = ClusterKind

V3 = EntryRules(Geometry(16), has_zero_flag=True, has_data_file=False)
V2 = EntryRules(Geometry(16), has_zero_flag=False, has_data_file=False)
DATA_FILE = EntryRules(Geometry(16), has_zero_flag=True, has_data_file=True)
EXTENDED = EntryRules(Geometry(16, extended_l2=True), has_zero_flag=False, has_data_file=False)
EXTENDED_DATA_FILE = EntryRules(Geometry(16, extended_l2=True), has_zero_flag=False, has_data_file=True)
HOST = 0x50000


def both(entry: int, bitmap: int, subcluster: int, rules: EntryRules) -> ClusterKind:
    """The kind as the scalar form has it, after the vector form said the same."""
    words = np.array([entry], dtype=np.uint64)
    bitmaps = np.array([bitmap], dtype=np.uint64) if rules.geometry.extended_l2 else None
    kind = subcluster_kind(entry, bitmap, subcluster, rules)
    assert classify_table(words, bitmaps, rules)[subcluster] == kind
    return kind


@pytest.mark.parametrize(
    ("entry", "v3", "v2", "data_file"),
    [
        (0, UNALLOCATED, UNALLOCATED, UNALLOCATED),
        (COPIED, UNALLOCATED, UNALLOCATED, NORMAL),  # cluster 0 of a data file
        (HOST, NORMAL, NORMAL, NORMAL),
        (HOST | COPIED, NORMAL, NORMAL, NORMAL),  # COPIED decides nothing here
        (ZERO, ZERO_PLAIN, INVALID, ZERO_PLAIN),
        (COPIED | ZERO, ZERO_PLAIN, INVALID, ZERO_PLAIN),  # never "allocated at 0"
        (HOST | ZERO, ZERO_ALLOCATED, INVALID, ZERO_ALLOCATED),
        (HOST | COPIED | ZERO, ZERO_ALLOCATED, INVALID, ZERO_ALLOCATED),
        (COMPRESSED, PACKED, PACKED, INVALID),
        (COMPRESSED | 0x52435, PACKED, PACKED, INVALID),
        (COMPRESSED | ZERO, PACKED, PACKED, INVALID),  # bit 0 is part of the offset
        (COMPRESSED | COPIED | HOST, INVALID, INVALID, INVALID),
        (0x50200, INVALID, INVALID, INVALID),  # not at the start of a cluster
        (0x200 | ZERO, INVALID, INVALID, INVALID),
        (HOST | 0x1FE, NORMAL, NORMAL, NORMAL),  # reserved bits mean nothing to a reader
        (HOST | 0x3F << 56, NORMAL, NORMAL, NORMAL),
        (0x3F << 56 | 0x1FE, UNALLOCATED, UNALLOCATED, UNALLOCATED),
        (0x00FF_FFFF_FFFF_0000, NORMAL, NORMAL, NORMAL),
    ],
)
def test_standard_entries(entry: int, v3: ClusterKind, v2: ClusterKind, data_file: ClusterKind) -> None:
    assert both(entry, 0, 0, V3) == classify(entry, 0, V3) == v3
    assert both(entry, 0, 0, V2) == classify(entry, 0, V2) == v2
    assert both(entry, 0, 0, DATA_FILE) == classify(entry, 0, DATA_FILE) == data_file


@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_offsets_are_aligned_to_the_cluster(cluster_bits: int) -> None:
    rules = EntryRules(Geometry(cluster_bits), has_zero_flag=True, has_data_file=False)
    assert both(3 << cluster_bits, 0, 0, rules) == NORMAL
    for bit in range(9, cluster_bits):
        assert both(3 << cluster_bits | 1 << bit, 0, 0, rules) == INVALID


A5, Z5 = 1 << 5, 1 << 37


@pytest.mark.parametrize(
    ("entry", "bitmap", "kind"),
    [
        (HOST, A5, NORMAL),
        (HOST | COPIED, A5, NORMAL),
        (HOST, Z5, ZERO_ALLOCATED),
        (HOST, 0, UNALLOCATED_ALLOCATED),
        (HOST, A5 | Z5, INVALID),
        (0, Z5, ZERO_PLAIN),
        (0, 0, UNALLOCATED),
        (0, A5, INVALID),
        (0, A5 | Z5, INVALID),
        (COPIED, 0, UNALLOCATED),
        (COPIED, A5, INVALID),
        (HOST | 1, A5, NORMAL),  # no zero flag here
        (1, 0, UNALLOCATED),
        (1, Z5, ZERO_PLAIN),
        (HOST | 0x200, A5, INVALID),
        (0x200, 0, INVALID),
        (COMPRESSED | 0x52435, 0, PACKED),
        (COMPRESSED | 0x52435, A5, INVALID),
        (COMPRESSED | 0x52435, Z5, INVALID),
        (COMPRESSED | 0x52435, 1 << 63, INVALID),
        (COMPRESSED | COPIED, 0, INVALID),
    ],
)
def test_extended_entries(entry: int, bitmap: int, kind: ClusterKind) -> None:
    assert both(entry, bitmap, 5, EXTENDED) == kind


@pytest.mark.parametrize(
    ("entry", "bitmap", "kind"),
    [
        (COPIED, A5, NORMAL),
        (COPIED, Z5, ZERO_ALLOCATED),
        (COPIED, 0, UNALLOCATED_ALLOCATED),
        (0, A5, INVALID),  # without COPIED the data is lost
        (0, Z5, ZERO_PLAIN),
        (HOST | COPIED, A5, NORMAL),
        (COMPRESSED, 0, INVALID),
    ],
)
def test_extended_entries_with_a_data_file(entry: int, bitmap: int, kind: ClusterKind) -> None:
    assert both(entry, bitmap, 5, EXTENDED_DATA_FILE) == kind


@pytest.mark.parametrize("position", [0, 1, 15, 30, 31])
def test_every_subcluster_has_its_own_bits(position: int) -> None:
    kinds = [both(HOST, 1 << position | (1 << 32 << (position + 1) % 32), index, EXTENDED) for index in range(32)]
    expected = [UNALLOCATED_ALLOCATED] * 32
    expected[position], expected[(position + 1) % 32] = NORMAL, ZERO_ALLOCATED
    assert kinds == expected


@pytest.mark.parametrize("bad", [0, 17, 31])
def test_one_bad_pair_spoils_the_whole_cluster(bad: int) -> None:
    bitmap = ALL_PARTS | 1 << 32 + bad
    assert {both(HOST, bitmap, index, EXTENDED) for index in range(32)} == {INVALID}
    assert {both(0, 1 << bad, index, EXTENDED) for index in range(32)} == {INVALID}


def test_whole_clusters_of_subclusters() -> None:
    assert classify(HOST, ALL_PARTS, EXTENDED) == NORMAL
    assert classify(0, ALL_PARTS << 32, EXTENDED) == ZERO_PLAIN
    assert classify(HOST, ALL_PARTS << 32, EXTENDED) == ZERO_ALLOCATED


def test_a_table_is_told_in_its_order() -> None:
    words = np.array([0, HOST, HOST | ZERO, ZERO, COMPRESSED, HOST + 1024], dtype=np.uint64)
    before = words.copy()
    kinds = classify_table(words, None, V3)
    assert kinds.dtype == np.uint8
    assert kinds.tolist() == [UNALLOCATED, NORMAL, ZERO_ALLOCATED, ZERO_PLAIN, PACKED, INVALID]
    assert (words == before).all()


def test_a_table_of_subclusters_is_told_in_its_order() -> None:
    words = np.array([HOST, 0, COMPRESSED], dtype=np.uint64)
    bitmaps = np.array([1 | 1 << 33, 1 << 63, 0], dtype=np.uint64)
    kinds = classify_table(words, bitmaps, EXTENDED).tolist()
    assert kinds[:32] == [NORMAL, ZERO_ALLOCATED] + [UNALLOCATED_ALLOCATED] * 30
    assert kinds[32:64] == [UNALLOCATED] * 31 + [ZERO_PLAIN]
    assert kinds[64:] == [PACKED] * 32


# ---- compressed clusters


@pytest.mark.parametrize(
    ("cluster_bits", "offset_bits", "count_bits", "most"),
    [(9, 61, 1, 1), (12, 58, 4, 15), (14, 56, 6, 63), (16, 54, 8, 255), (20, 50, 12, 4095), (21, 49, 13, 8191)],
)
def test_the_count_is_of_additional_sectors(cluster_bits: int, offset_bits: int, count_bits: int, most: int) -> None:
    assert offset_bits + count_bits == 62
    last_offset = 2 ** min(offset_bits, 56) - 1
    for host_offset in (0, 511, 512, 0x52435, last_offset):
        for count in (0, 1, most):
            entry = COMPRESSED | count << offset_bits | host_offset
            expected = (host_offset, (count + 1) * 512 - host_offset % 512)
            assert compressed_location(entry, cluster_bits) == expected
            offsets, lengths = compressed_locations(np.array([entry], dtype=np.uint64), cluster_bits)
            assert (offsets.tolist(), lengths.tolist()) == ([expected[0]], [expected[1]])


def test_an_entry_that_qemu_wrote() -> None:
    assert compressed_location(0x4480000000052435, 16) == (0x52435, 9675)


@pytest.mark.parametrize("cluster_bits", range(9, 14))
@pytest.mark.parametrize("extended_free", [V3, V2])
def test_a_compressed_offset_past_2_to_56_is_invalid(cluster_bits: int, extended_free: EntryRules) -> None:
    """The field has room for more than the format allows; other bytes must not be served instead."""
    rules = EntryRules(Geometry(cluster_bits), extended_free.has_zero_flag, has_data_file=False)
    for bit in range(56, 70 - cluster_bits):
        assert both(COMPRESSED | 1 << bit | 0x600, 0, 0, rules) == INVALID
    assert both(COMPRESSED | 1 << 55 | 0x600, 0, 0, rules) == PACKED
