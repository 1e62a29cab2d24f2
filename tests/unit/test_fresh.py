"""format/fresh: the layout of new images, and every structure in it against a count of its own."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest

from qcow2_plugin.errors import OptionError
from qcow2_plugin.format.fresh import FreshLayout
from qcow2_plugin.format.geometry import Geometry
from qcow2_plugin.format.refcounts import unpack_block
from tests.support.fields import ALL_PARTS, COPIED

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
SHAPES = [
    (cluster_bits, order, extended_l2, is_mapped, has_data_file, size)
    for cluster_bits, order, extended_l2, is_mapped, has_data_file in itertools.product(
        (9, 12, 14, 16), (0, 1, 2, 3, 4, 5, 6), (False, True), (False, True), (False, True)
    )
    for size in (0, 512, 100 * KIB, 3 * MIB + 512, 40 * MIB)
    if not (extended_l2 and cluster_bits < 14)
]


def structures(layout: FreshLayout) -> bytes:
    """Everything from the refcount table to the end of the L2 tables."""
    parts = [layout.refcount_table(), *layout.refcount_blocks(), layout.l1_table()]
    front = b"".join(parts)
    if layout.mapped_clusters:
        front = front.ljust(layout.l2_offset - layout.geometry.cluster_size, b"\0")
    return front + b"".join(bytes(piece) for piece in layout.l2_tables(data_is_there=False))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_cluster_is_counted_once_and_found_through_the_tables(
    shape: tuple[int, int, bool, bool, bool, int],
) -> None:
    cluster_bits, order, extended_l2, is_mapped, has_data_file, size = shape
    layout = FreshLayout(Geometry(cluster_bits, extended_l2), order, size, is_mapped, has_data_file)
    cluster_size = 1 << cluster_bits
    file = bytes(cluster_size) + structures(layout)

    used = {0}
    table_clusters = range(1, 1 + layout.refcount_table_clusters)
    used.update(table_clusters)
    table = np.frombuffer(file, ">u8", len(table_clusters) * cluster_size // 8, cluster_size)
    blocks = table[: np.count_nonzero(table)].tolist()
    assert not table[len(blocks) :].any()
    used.update(block >> cluster_bits for block in blocks)
    l1 = list(struct.unpack_from(f">{layout.l1_size}Q", file, layout.l1_table_offset)) if layout.l1_size else []
    used.update(
        range(layout.l1_table_offset >> cluster_bits, -(-(layout.l1_table_offset + 8 * len(l1)) >> cluster_bits))
    )
    words = cluster_size // 8
    mapped = 0
    for entry in filter(None, l1):
        assert entry & COPIED
        used.add((entry ^ COPIED) >> cluster_bits)
        l2 = struct.unpack_from(f">{words}Q", file, entry ^ COPIED)
        for word, bitmap in zip(l2[::2], l2[1::2], strict=True) if extended_l2 else ((word, 0) for word in l2):
            assert bitmap == 0
            if not word:
                continue
            assert word & COPIED
            host_offset = word ^ COPIED
            assert host_offset == (mapped << cluster_bits) + layout.data_offset
            if not has_data_file:
                assert host_offset >> cluster_bits not in used
                used.add(host_offset >> cluster_bits)
            mapped += 1
    assert mapped == (-(-size // cluster_size) if is_mapped else 0)
    assert used == set(range(len(used))), "no cluster is left out"
    refcounts = [
        count for block in blocks for count in unpack_block(file[block : block + cluster_size], order).tolist()
    ]
    assert refcounts[: len(used)] == [1] * len(used)
    assert not any(refcounts[len(used) :])
    end = max(used) * cluster_size
    assert end < layout.file_size <= end + cluster_size
    assert len(blocks) == 1 or len(used) > (len(blocks) - 1) * (cluster_size * 8 >> order), "no block is idle"


def test_a_disk_of_a_tebibyte_is_laid_out_at_once() -> None:
    layout = FreshLayout(Geometry(16), 4, TIB, is_mapped=True)
    assert (layout.mapped_clusters, layout.l1_size) == (1 << 24, 2048)
    assert layout.refcount_block_count == 513
    assert layout.cluster_count == 1 + 1 + 513 + 1 + 2048 + (1 << 24)
    assert layout.file_size == layout.data_offset + TIB


def test_the_pieces_of_l2_tables_are_what_one_loop_would_make() -> None:
    layout = FreshLayout(Geometry(14, extended_l2=True), 4, 5 * GIB + 512, is_mapped=True)
    found = b"".join(bytes(piece) for piece in layout.l2_tables(data_is_there=True))
    words = np.frombuffer(found, ">u8").reshape(-1, 2)
    count = 5 * GIB // 16384 + 1
    assert len(words) == -(-count // 1024) * 1024
    assert (words[:count, 0] == (COPIED | layout.data_offset) + np.arange(count, dtype=np.uint64) * 16384).all()
    assert (words[:count, 1] == ALL_PARTS).all()
    assert not words[count:].any()


@pytest.mark.parametrize(
    ("cluster_bits", "extended_l2", "largest"),
    [(9, False, 128 * GIB), (16, False, 2048 * TIB), (16, True, 1024 * TIB), (21, False, 2 << 60)],
)
def test_the_largest_disks(cluster_bits: int, extended_l2: bool, largest: int) -> None:
    assert FreshLayout(Geometry(cluster_bits, extended_l2), 4, largest).l1_size == 4 << 20
    with pytest.raises(OptionError, match=rf"{largest + 512} bytes is too large.* good for {largest}; take larger"):
        FreshLayout(Geometry(cluster_bits, extended_l2), 4, largest + 512)


def test_a_refcount_table_that_the_format_has_no_place_for() -> None:
    FreshLayout(Geometry(9), 4, 60 * GIB, is_mapped=True)
    with pytest.raises(OptionError, match="too many for refcounts of 64 bits; take larger clusters or fewer bits"):
        FreshLayout(Geometry(9), 6, 60 * GIB, is_mapped=True)


@pytest.mark.parametrize("has_data_file", [False, True])
def test_offsets_that_no_entry_can_hold(has_data_file: bool) -> None:
    last = 1 << 56
    FreshLayout(Geometry(21), 4, last, is_mapped=True, has_data_file=True)
    FreshLayout(Geometry(21), 4, 2 * last, has_data_file=has_data_file)
    with pytest.raises(OptionError, match="too large for preallocation"):
        FreshLayout(Geometry(21), 4, last + (512 if has_data_file else 0), is_mapped=True, has_data_file=has_data_file)
