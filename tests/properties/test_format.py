"""Pure formats: packing and parsing are inverse, scalar and vector forms agree, arbitrary bytes do no harm."""

from __future__ import annotations

import codecs
import itertools
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qcow2_plugin.errors import CorruptImageError, Qcow2Error, printable
from qcow2_plugin.format.bitmaps import Bitmap, pack_directory, parse_directory
from qcow2_plugin.format.bits import check_table, runs_of_bits
from qcow2_plugin.format.entries import (
    EntryRules,
    classify,
    classify_table,
    compressed_location,
    compressed_locations,
    subcluster_kind,
)
from qcow2_plugin.format.geometry import Geometry
from qcow2_plugin.format.refcounts import pack_block, unpack_block
from qcow2_plugin.format.snapshots import Snapshot, pack_table, parse_entries
from tests.support.depth import examples
from tests.support.words import bitmaps, words

UINT32, UINT64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
CLUSTER = 65536

# ---- snapshot table

SNAPSHOTS = st.builds(
    Snapshot,
    UINT64,
    UINT32,
    st.binary(max_size=40),
    st.binary(max_size=40),
    UINT32,
    UINT32,
    UINT64,
    UINT32,
    st.binary(max_size=64),
)


@given(st.lists(SNAPSHOTS, max_size=6))
@examples(150)
def test_snapshot_tables_come_back(told: list[Snapshot]) -> None:
    table = pack_table(told)
    found, used = parse_entries(table, len(told))
    assert found == told
    assert len(table) <= used < len(table) + 8
    assert pack_table(found) == table


@given(st.lists(SNAPSHOTS, max_size=4), st.data())
@examples(150)
def test_snapshot_tables_can_be_read_in_pieces(told: list[Snapshot], data: st.DataObject) -> None:
    table = pack_table(told) + bytes(8)
    window = data.draw(st.integers(40 + 3 * 64 + 8, 1000))
    found: list[Snapshot] = []
    offset = 0
    while len(found) < len(told):
        more, used = parse_entries(table[offset : offset + window], len(told) - len(found))
        assert more
        found += more
        offset += used
    assert found == told


@given(st.binary(max_size=400), st.integers(0, 70000))
@examples(200)
def test_arbitrary_snapshot_tables(table: bytes, count: int) -> None:
    try:
        found, used = parse_entries(table, count)
    except Qcow2Error:
        return
    assert len(found) <= count
    assert used < len(table) + 8
    assert all(pack_table([each]) in table for each in found)


# ---- bitmap directory


def bitmap_of(name: bytes, cluster: int, entries: int, *rest: int, extra: bytes) -> Bitmap:
    flags, kind, granularity_bits = rest
    return Bitmap(cluster * CLUSTER, entries, flags, kind, granularity_bits, extra, name)


BITMAPS = st.builds(
    bitmap_of,
    st.binary(min_size=1, max_size=40),
    st.integers(1, 2**46),
    st.integers(1, 0x8000000),
    UINT32,
    st.integers(0, 255),
    st.integers(0, 255),
    extra=st.binary(max_size=20),
)


@given(st.lists(BITMAPS, max_size=6, unique_by=lambda bitmap: bitmap.name))
@examples(150)
def test_bitmap_directories_come_back(told: list[Bitmap]) -> None:
    directory = pack_directory(told)
    assert parse_directory(directory, len(told), CLUSTER) == told
    assert pack_directory(parse_directory(directory, len(told), CLUSTER)) == directory
    for count in (len(told) - 1, len(told) + 1):
        with pytest.raises(CorruptImageError):
            parse_directory(directory, count, CLUSTER)


@given(st.lists(BITMAPS, min_size=1, max_size=3, unique_by=lambda bitmap: bitmap.name), st.data())
@examples(150)
def test_changed_bitmap_directories(told: list[Bitmap], data: st.DataObject) -> None:
    directory = bytearray(pack_directory(told))
    for _ in range(data.draw(st.integers(0, 4))):
        directory[data.draw(st.integers(0, len(directory) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(directory)))
    for changed in (bytes(directory), bytes(directory[:cut])):
        try:
            found = parse_directory(changed, len(told), CLUSTER)
        except Qcow2Error:
            continue
        for bitmap in found:
            bitmap.unusable_reason(1 << 40, CLUSTER)


@given(st.binary(max_size=300), st.integers(0, 5), st.integers(9, 21))
@example(bytes(24), 1, 16)
@examples(200)
def test_arbitrary_bitmap_directories(directory: bytes, count: int, cluster_bits: int) -> None:
    try:
        found = parse_directory(directory, count, 1 << cluster_bits)
    except Qcow2Error:
        return
    assert len(found) == count


@given(st.lists(st.one_of(UINT64, st.sampled_from([0, 1, CLUSTER, CLUSTER | 1, 512])), max_size=8), st.integers(9, 21))
@examples(200)
def test_bitmap_tables(table: list[int], cluster_bits: int) -> None:
    sound = [entry in (0, 1) or not entry & ~(0x00FF_FFFF_FFFF_FE00 >> cluster_bits << cluster_bits) for entry in table]
    entries = np.array(table, dtype=np.uint64)
    if all(sound):
        check_table(entries, 1 << cluster_bits)
        return
    with pytest.raises(CorruptImageError, match=rf"entry {sound.index(False)} is "):
        check_table(entries, 1 << cluster_bits)


@given(st.one_of(st.binary(max_size=64), st.lists(st.sampled_from([b"\0" * 9, b"\xff" * 9])).map(b"".join)))
@examples(200)
def test_runs_of_bits(packed: bytes) -> None:
    values = [bool(packed[index // 8] >> index % 8 & 1) for index in range(8 * len(packed))]
    groups = [(value, len(list(group))) for value, group in itertools.groupby(values)]
    starts = itertools.accumulate((count for _, count in groups), initial=0)
    assert runs_of_bits(packed) == [
        (start, count, value) for start, (value, count) in zip(starts, groups, strict=False)
    ]


# ---- refcounts


@given(st.integers(0, 6), st.data())
@examples(150)
def test_refcount_blocks_come_back(order: int, data: st.DataObject) -> None:
    block = data.draw(st.binary(max_size=64).map(lambda part: part + bytes(-len(part) % 8)))
    counts = unpack_block(block, order)
    assert len(counts) == 8 * len(block) >> order
    assert pack_block(counts, order) == block
    bits = 1 << order
    by_bits = int.from_bytes(block, "little") if bits < 8 else None
    for index, count in enumerate(counts.tolist()):
        if by_bits is not None:
            assert count == by_bits >> index * bits & (1 << bits) - 1
        else:
            assert count == int.from_bytes(block[index * bits // 8 : (index + 1) * bits // 8], "big")


# ---- L2 entries

RULES = [
    EntryRules(Geometry(cluster_bits, extended), has_zero_flag, has_data_file)
    for cluster_bits in range(9, 22)
    for extended in ([False, True] if cluster_bits >= 14 else [False])
    for has_zero_flag in ([False] if extended else [False, True])
    for has_data_file in (False, True)
]


@given(st.sampled_from(RULES), st.data())
@examples(400)
def test_one_entry_and_a_table_of_them_are_told_alike(rules: EntryRules, data: st.DataObject) -> None:
    geometry = rules.geometry
    table = data.draw(st.lists(words(geometry.cluster_bits), min_size=1, max_size=12))
    second = [data.draw(bitmaps()) if geometry.extended_l2 else 0 for _ in table]
    parts = 32 if geometry.extended_l2 else 1
    as_array = np.array(table, dtype=np.uint64)
    kinds = classify_table(as_array, np.array(second, dtype=np.uint64) if geometry.extended_l2 else None, rules)
    one_by_one = [
        subcluster_kind(entry, bitmap, index, rules)
        for entry, bitmap in zip(table, second, strict=True)
        for index in range(parts)
    ]
    assert kinds.tolist() == one_by_one
    assert [classify(*pair, rules) for pair in zip(table, second, strict=True)] == one_by_one[::parts]
    assert as_array.tolist() == table


@given(st.integers(9, 21), st.lists(st.one_of(UINT64, UINT64.map(lambda word: word | 1 << 62)), min_size=1, max_size=8))
@examples(200)
def test_compressed_locations(cluster_bits: int, table: list[int]) -> None:
    host_offsets, stored_lengths = compressed_locations(np.array(table, dtype=np.uint64), cluster_bits)
    together = list(zip(host_offsets.tolist(), stored_lengths.tolist(), strict=True))
    assert together == [compressed_location(entry, cluster_bits) for entry in table]
    for host_offset, stored_length in together:
        assert 0 <= host_offset < 1 << 56
        assert 0 < stored_length <= 2 << cluster_bits
        assert (host_offset + stored_length) % 512 == 0


# ---- text


@given(st.one_of(st.text(max_size=50), st.binary(max_size=50)))
@examples(300)
@example("\x1b[2J\u202e\ud800\udc9b")
def test_printable_text_has_nothing_that_acts(text: str | bytes) -> None:
    shown = printable(text)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    shown.encode()


@given(st.text(st.characters(max_codepoint=127), max_size=80))
@examples(200)
def test_printable_ascii_can_be_read_back(text: str) -> None:
    assert codecs.decode(printable(text), "unicode_escape") == text
