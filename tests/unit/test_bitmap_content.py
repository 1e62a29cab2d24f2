"""What bitmaps mark, merged: the same granules, whatever the granularities, sizes of clusters and what is on disk."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_plugin.engine.dirty_bitmaps.bitmap_content import Drawing
from qcow2_plugin.format.bitmaps import table_entries_for
from tests.support.depth import examples

SECTOR = 512
ONES, CLUSTERS_AT = 1, 1 << 20
Marks = npt.NDArray[np.bool_]


class Stored(NamedTuple):
    """A bitmap of a disk of `size` bytes, as it might be on a disk."""

    size: int
    granularity_bits: int
    cluster_size: int
    table: npt.NDArray[np.uint64]
    clusters: dict[int, bytes]

    def drawing(self) -> Drawing:
        return Drawing(self.granularity_bits, self.size, self.cluster_size, self.table, self.clusters.__getitem__)


def stored(size: int, granularity_bits: int, cluster_size: int, seed: int) -> Stored:
    """Clusters of bits that are random, sparse, full or empty, told in one way or the other."""
    chance = np.random.default_rng(seed)
    bit_count = -(-size >> granularity_bits)
    entries = table_entries_for(size, granularity_bits, cluster_size)
    table = np.zeros(entries, dtype=np.uint64)
    clusters = {}
    for index in range(entries):
        kind = chance.integers(6)
        values = chance.random(8 * cluster_size) < (0.5, 0.001, 1, 0, 0, 0.01)[kind]
        values[max(bit_count - 8 * cluster_size * index, 0) :] = False
        if kind == 2 and (chance.random() < 0.5 or index < entries - 1):
            table[index] = ONES
        elif kind != 3:
            table[index] = CLUSTERS_AT + index * cluster_size
            clusters[int(table[index])] = np.packbits(values, bitorder="little").tobytes()
    return Stored(size, granularity_bits, cluster_size, table, clusters)


def sectors(drawing: Drawing, size: int) -> Marks:
    """Which sectors of the disk are marked."""
    packed = np.zeros(len(drawing.table) * drawing.cluster_size, dtype=np.uint8)
    for index, piece in drawing.pieces():
        packed[index * drawing.cluster_size : (index + 1) * drawing.cluster_size] = 0xFF if piece is None else piece
    return as_sectors(packed, drawing.granularity_bits, size)


def as_sectors(packed: npt.NDArray[np.uint8], granularity_bits: int, size: int) -> Marks:
    values = np.unpackbits(packed, bitorder="little")[: -(-size >> granularity_bits)]
    marked: Marks = np.repeat(values, 1 << granularity_bits - 9)[: size // SECTOR] != 0
    return marked


def rounded(marks: Marks, granularity_bits: int) -> Marks:
    """The sectors of all granules of which one is marked."""
    group = 1 << granularity_bits - 9
    padded = np.zeros(-(-len(marks) // group) * group, dtype=np.bool_)
    padded[: len(marks)] = marks
    wide: Marks = np.repeat(padded.reshape(-1, group).any(axis=1), group)[: len(marks)]
    return wide


SIZES = st.integers(1, 12 << 11).map(lambda count: count * SECTOR)
GRANULARITIES = st.sampled_from([9, 10, 12, 13, 16, 20, 24, 31])
CLUSTER_SIZES = st.sampled_from([512, 1024, 4096])


@examples(150)
@given(SIZES, st.tuples(GRANULARITIES, CLUSTER_SIZES), st.tuples(GRANULARITIES, CLUSTER_SIZES), st.integers(0, 1 << 30))
def test_what_is_merged_marks_what_either_marks(
    size: int, of_own: tuple[int, int], of_other: tuple[int, int], seed: int
) -> None:
    (own_bits, own_size), (other_bits, other_size) = of_own, of_other
    own, other = stored(size, own_bits, own_size, seed), stored(size, other_bits, other_size, seed + 1)
    before = sectors(own.drawing(), size)
    drawing, source = own.drawing(), other.drawing()
    drawing.merge(source.pieces(), other_bits, other_size)
    expected = before | rounded(sectors(source, size), own_bits)
    assert (sectors(drawing, size) == expected).all()
    assert (drawing.table[sorted(drawing.fresh)] == 0).all()
    for index, piece in drawing.pieces():
        if index in drawing.fresh:
            assert piece is not None and piece.any()
            unused = np.unpackbits(piece, bitorder="little")[max(-(-size >> own_bits) - 8 * own_size * index, 0) :]
            assert not unused.any(), "bits behind the end of the disk"
    again = sorted(drawing.fresh)
    drawing.merge(source.pieces(), other_bits, other_size)
    assert sorted(drawing.fresh) == again
    assert (sectors(drawing, size) == expected).all()


def test_what_is_marked_already_stays_where_it_is() -> None:
    own = stored(8 << 20, 9, 512, 3)
    drawing = own.drawing()
    drawing.merge(own.drawing().pieces(), 9, 512)
    assert not drawing.fresh
    assert (drawing.table == own.table).all()


def test_clusters_of_ones_need_no_place() -> None:
    drawing = Drawing(9, 8 << 20, 512, np.zeros(4, dtype=np.uint64), bytes)
    drawing.merge([(0, np.full(512, 0xFF, dtype=np.uint8)), (1, None)], 9, 512)
    assert drawing.table.tolist() == [1, 1, 0, 0] and not drawing.fresh
    drawing.merge([(0, np.array([2] + 511 * [0], dtype=np.uint8))], 16, 512)
    assert drawing.table.tolist() == [1, 1, 0, 0] and not drawing.fresh


@pytest.mark.parametrize("granularity_bits", [9, 16, 31])
def test_pieces_behind_the_end_are_nothing(granularity_bits: int) -> None:
    """As an image may have them that was made to mislead."""
    drawing = Drawing(9, SECTOR * 100, 512, np.zeros(1, dtype=np.uint64), bytes)
    drawing.merge([(0, np.full(512, 0xFF, dtype=np.uint8)), (5, None)], granularity_bits, 512)
    assert sectors(drawing, SECTOR * 100).all()
    assert np.unpackbits(drawing.fresh[0], bitorder="little").sum() == 100


def test_merged_bitmaps_go_their_own_ways_afterwards() -> None:
    """What is marked in the one later is not marked in the other."""
    drawings = [Drawing(9, 8 << 20, 512, np.zeros(4, dtype=np.uint64), bytes) for _ in range(2)]
    first, second = drawings
    first.merge([(0, np.array([1, *bytes(511)], dtype=np.uint8))], 9, 512)
    first.merge([(0, np.array([2, *bytes(511)], dtype=np.uint8))], 9, 512)
    second.merge(first.pieces(), 9, 512)
    second.merge([(0, np.array([4, *bytes(511)], dtype=np.uint8))], 9, 512)
    first.merge([(0, np.array([8, *bytes(511)], dtype=np.uint8))], 9, 512)
    assert [int(drawing.fresh[0][0]) for drawing in drawings] == [1 + 2 + 8, 1 + 2 + 4]
