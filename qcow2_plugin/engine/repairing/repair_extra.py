"""Repairs that QEMU does not do, because they decide what the guest sees, or need room of their own.

Bitmaps do not hear of them. Where the guest sees something else afterwards, bitmaps are marked as in use before, so
that no backup takes them for true.

Source: docs/interop/qcow2.rst, "Cluster mapping", "Bitmaps".
"""

from __future__ import annotations

import numpy as np

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.dirty_bitmaps.bitmaps import read_bitmaps
from qcow2_plugin.engine.image_file import ImageFile, Structure
from qcow2_plugin.engine.repairing.repair_entries import (
    Mask,
    Table,
    each_l2_table,
    fix_active_l2_tables,
    read_l2_table,
    table_of,
)
from qcow2_plugin.engine.writeback import write_refcounts_now
from qcow2_plugin.format.bitmaps import FLAG_IN_USE, FLAGS_AT, entry_offsets
from qcow2_plugin.format.entries import ALL_SUBCLUSTERS, COMPRESSED, COPIED, OFFSET_MASK, ZERO
from qcow2_plugin.format.geometry import SUBCLUSTERS

_TABLES_AT_ONCE = 64
"""New L2 tables whose refcounts are written together."""
_COPIES_AT_ONCE = 256
"""Clusters that are copied before their refcounts are written."""


def distrust_bitmaps(file: ImageFile) -> None:
    """Mark every bitmap as in use, durably. Raises CorruptImageError, OSError."""
    pointer = file.header.bitmaps
    if pointer is None:
        return
    bitmaps = read_bitmaps(file.storage, file.header)
    for bitmap, offset in zip(bitmaps, entry_offsets(bitmaps), strict=True):
        flags = (bitmap.flags | FLAG_IN_USE).to_bytes(4, "big")
        file.write(Structure.BITMAP, flags, pointer.directory_offset + offset + FLAGS_AT)
    file.barrier()


# ---- a raw data file


def cover_raw_disk(file: ImageFile, allocator: Allocator) -> int:
    """Let every cluster of the disk be where it is in a raw data file, as the raw bit promises; how many were not.

    They read as what the data file holds. Raises CorruptImageError, OSError.
    """
    header = file.header
    coverage = header.geometry.l2_coverage
    count = fix_active_l2_tables(file, lambda table: _cover(table, file, header.virtual_size))
    stored = file.storage.pread(8 * header.l1_size, header.l1_table_offset)
    l1_table = np.frombuffer(stored.ljust(8 * header.l1_size, b"\0"), dtype=">u8")
    missing = np.flatnonzero(l1_table[: -(-header.virtual_size // coverage)] == 0).tolist()
    for start in range(0, len(missing), _TABLES_AT_ONCE):
        entries: list[tuple[int, int]] = []
        for index in missing[start : start + _TABLES_AT_ONCE]:
            words = np.zeros(header.geometry.cluster_size // 8, dtype=np.uint64)
            table = table_of(words, header, 0, index * coverage)
            count += int(np.count_nonzero(_cover(table, file, header.virtual_size)))
            host_offset = allocator.allocate_table(Structure.L2_TABLE, header.geometry.cluster_size)
            file.write(Structure.L2_TABLE, words.astype(">u8").tobytes(), host_offset)
            entries.append((index, host_offset | COPIED))
        write_refcounts_now(file, allocator)
        file.barrier()
        for index, entry in entries:
            file.write(Structure.L1_TABLE, entry.to_bytes(8, "big"), header.l1_table_offset + 8 * index)
    file.barrier()
    return count


def _cover(table: Table, file: ImageFile, virtual_size: int) -> Mask:
    entries, bitmaps, size = table.entries, table.bitmaps, file.header.geometry.cluster_size
    if table.guest_offset is None:
        return np.zeros(len(entries), dtype=np.bool_)
    guest = np.uint64(table.guest_offset) + np.arange(len(entries), dtype=np.uint64) * np.uint64(size)
    is_inside = (guest < np.uint64(virtual_size)) & ((entries & np.uint64(COMPRESSED)) == 0)
    unmapped: Mask = is_inside & ((entries & np.uint64(OFFSET_MASK)) == 0) & ((entries & np.uint64(COPIED)) == 0)
    if bitmaps is None:
        unmapped &= (entries & np.uint64(ZERO)) == 0
    else:
        nowhere = ~(bitmaps | bitmaps >> np.uint64(SUBCLUSTERS)) & np.uint64(ALL_SUBCLUSTERS)
        unmapped = is_inside & (nowhere != 0)
        bitmaps[unmapped] |= nowhere[unmapped]
    entries[unmapped] = guest[unmapped] | np.uint64(COPIED)
    return unmapped


# ---- two guest clusters in one host cluster


def part_aliases(file: ImageFile, allocator: Allocator, cluster_count: int) -> int:
    """Give every guest cluster of the active disk a host cluster of its own, with the same contents; how many got one.

    In tables that belong to the active disk alone. Refcounts of what they shared stay too high until references are
    counted again. Of compressed clusters several may share one. Raises CorruptImageError, OSError. Memory: 2 bytes for
    each cluster of the file.
    """
    bits = file.header.cluster_bits
    times = np.zeros(cluster_count, dtype=np.uint8)
    for table in each_l2_table(file):
        named = _named(table, bits, cluster_count)
        distinct, counts = np.unique(named[named > 0], return_counts=True)
        times[distinct] = np.minimum(times[distinct].astype(np.int64) + counts, 2)
    is_taken = np.zeros(cluster_count, dtype=np.bool_)
    count = 0
    for table in each_l2_table(file):
        if allocator.refcount(table.host_offset >> bits) != 1:
            continue  # what several L1 entries name, or a snapshot, is copied by the next writer
        named = _named(table, bits, cluster_count)
        shared = np.flatnonzero((named > 0) & (times[named] > 1))
        moved: list[int] = []
        for index in shared.tolist():
            if is_taken[named[index]]:
                moved.append(index)
            is_taken[named[index]] = True
        for start in range(0, len(moved), _COPIES_AT_ONCE):
            _move(file, allocator, table, moved[start : start + _COPIES_AT_ONCE])
        count += len(moved)
    return count


def _named(table: Table, cluster_bits: int, cluster_count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The cluster that each entry names, 0 for none or one that is not for sure."""
    offsets = table.entries & np.uint64(OFFSET_MASK)
    clusters = (offsets >> np.uint64(cluster_bits)).astype(np.int64)
    odd = (table.entries & np.uint64(COMPRESSED)) != 0
    odd |= (offsets & np.uint64((1 << cluster_bits) - 1)) != 0
    clusters[odd | (clusters >= cluster_count)] = 0
    return clusters


def _move(file: ImageFile, allocator: Allocator, table: Table, indexes: list[int]) -> None:
    """Give these entries clusters of their own."""
    size = file.header.geometry.cluster_size
    places = [
        run.host_offset + offset for run in allocator.allocate(len(indexes)) for offset in range(0, run.length, size)
    ]
    for index, place in zip(indexes, places, strict=True):
        content = file.storage.pread(size, int(table.entries[index]) & OFFSET_MASK)
        file.storage.write_from(content.ljust(size, b"\0"), place)
    write_refcounts_now(file, allocator)
    file.barrier()
    words = read_l2_table(file, table.host_offset, None)
    for index, place in zip(indexes, places, strict=True):
        words.entries[index] = int(words.entries[index]) & ~OFFSET_MASK | place | COPIED
    step = len(words.words) // len(words.entries)
    first, end = indexes[0] * step, (indexes[-1] + 1) * step
    file.write(Structure.L2_TABLE, words.words[first:end].astype(">u8").tobytes(), table.host_offset + 8 * first)
    file.barrier()
