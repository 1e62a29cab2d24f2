"""L1 and L2 entries put right in place, table by table, in an image that may be damaged elsewhere.

A fix looks at the entries of one table, changes those that are wrong and says which. Only tables are touched that
`damaged_map` gives a place of their own. Entries never straddle a sector, and each fix is right for an entry whatever
the others say, so it does not matter which of the writes a crash lets through.

Source: docs/interop/qcow2.rst, "Cluster mapping", "Standard Cluster Descriptor", "Extended L2 Entries".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.image_file import Clusters, ImageFile, Structure
from qcow2_plugin.engine.repairing.damaged_map import snapshot_l1_ranges
from qcow2_plugin.format.entries import ALL_SUBCLUSTERS, COMPRESSED, COPIED, OFFSET_MASK, ZERO, Entries
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.snapshots import Snapshot

Mask = npt.NDArray[np.bool_]
AreSingle = Callable[[Clusters], Mask]
"""For each cluster whether only one reference to it is counted."""

_L1_CHUNK = 1 << 16
"""L1 entries looked at together."""
_L1_RESERVED = ~(OFFSET_MASK | COPIED) & (1 << 64) - 1
_L2_RESERVED = 0x3F00_0000_0000_01FE


class Table(NamedTuple):
    """The words of one L2 table as they are on disk; `entries` and `bitmaps` (None without extended L2) are views."""

    words: Entries
    entries: Entries
    bitmaps: Entries | None
    host_offset: int
    guest_offset: int | None
    """Of what its first entry maps, None if several L1 entries name it."""


Fix = Callable[[Table], Mask]
"""Changes entries, and says which."""


def fix_active_l2_tables(file: ImageFile, fix: Fix) -> int:
    """Apply `fix` to every L2 table of the active disk, once each; how many entries changed. Raises OSError."""
    return _fix(file, each_l2_table(file), fix)


def fix_l2_tables(file: ImageFile, fix: Fix) -> int:
    """`fix_active_l2_tables` for the tables of snapshots as well."""
    size = file.header.geometry.cluster_size
    clusters = file.metadata.clusters_of(Structure.SNAPSHOT_L2_TABLE).tolist()
    others = (read_l2_table(file, cluster * size, None) for cluster in clusters)
    return _fix(file, each_l2_table(file), fix) + _fix(file, others, fix)


def _fix(file: ImageFile, tables: Iterable[Table], fix: Fix) -> int:
    count = 0
    for table in tables:
        wrong = fix(table)
        if wrong.any():
            count += int(np.count_nonzero(wrong))
            step = len(table.words) // len(table.entries)
            _write(file, file.metadata.owner(table.host_offset >> file.header.cluster_bits), table, wrong, step)
    return count


def fix_l1_tables(file: ImageFile, snapshots: Iterable[Snapshot], fix: Fix) -> int:
    """The same for the L1 tables of the active disk and of these snapshots, some entries at a time."""
    header = file.header
    places = [(Structure.L1_TABLE, header.l1_table_offset, header.l1_size)]
    ranges = snapshot_l1_ranges(header, snapshots)
    places += [(Structure.SNAPSHOT_L1_TABLE, start, (stop - start) // 8) for start, stop in ranges]
    count = 0
    for structure, host_offset, size in places:
        for first in range(0, size, _L1_CHUNK):
            words = _read_words(file, host_offset + 8 * first, min(_L1_CHUNK, size - first))
            table = Table(words, words, None, host_offset + 8 * first, None)
            wrong = fix(table)
            if wrong.any() and _is_all(file, structure, table.host_offset, 8 * len(words)):
                count += int(np.count_nonzero(wrong))
                _write(file, structure, table, wrong, 1)
    return count


def correct_flags(file: ImageFile, are_single: AreSingle) -> int:
    """Let COPIED say in the active tables whether a cluster has one reference; how many entries changed.

    In an image with a data file it says of guest clusters that they are there. Raises OSError.
    """
    has_data_file = file.header.has_data_file

    def l1(table: Table) -> Mask:
        return _flag(table.entries, (table.entries & np.uint64(OFFSET_MASK)) != 0, are_single, file.header)

    def l2(table: Table) -> Mask:
        named = (table.entries & np.uint64(OFFSET_MASK)) != 0
        named &= (table.entries & np.uint64(COMPRESSED)) == 0
        return _flag(table.entries, named, _all_are if has_data_file else are_single, file.header)

    return fix_l1_tables(file, (), l1) + fix_active_l2_tables(file, l2)


def _all_are(clusters: Clusters) -> Mask:
    return np.ones(len(clusters), dtype=np.bool_)


def _flag(entries: Entries, named: Mask, are_single: AreSingle, header: Header) -> Mask:
    offsets = entries[named] & np.uint64(OFFSET_MASK)
    single = np.zeros(len(entries), dtype=np.bool_)
    single[named] = are_single((offsets >> np.uint64(header.cluster_bits)).astype(np.int64))
    wrong: Mask = named & (((entries & np.uint64(COPIED)) != 0) != single)
    entries[wrong] ^= np.uint64(COPIED)
    return wrong


# ---- fixes


def zero_unaligned(header: Header) -> Fix:
    """Zero clusters that keep a host cluster where none can be let it go; their guest reads zeros as before."""
    ones = np.uint64(header.geometry.cluster_size - 1)

    def fix(table: Table) -> Mask:
        entries, bitmaps = table.entries, table.bitmaps
        wrong: Mask = ((entries & np.uint64(OFFSET_MASK)) & ones != 0) & ((entries & np.uint64(COMPRESSED)) == 0)
        if bitmaps is None:
            wrong &= (entries & np.uint64(ZERO)) != 0
            entries[wrong] = ZERO
        else:
            wrong &= (bitmaps & np.uint64(ALL_SUBCLUSTERS)) == 0
            entries[wrong] = 0
        return wrong

    return fix


def clear_l1_reserved(table: Table) -> Mask:
    """Clear the bits of L1 entries that mean nothing."""
    return _clear(table.entries, _L1_RESERVED, np.ones(len(table.entries), dtype=np.bool_))


def clear_l2_reserved(header: Header) -> Fix:
    """Clear the bits of L2 entries that mean nothing, of those that are not compressed."""
    mask = _L2_RESERVED | (0 if header.version > 2 and not header.extended_l2 else ZERO)

    def fix(table: Table) -> Mask:
        return _clear(table.entries, mask, (table.entries & np.uint64(COMPRESSED)) == 0)

    return fix


def _clear(entries: Entries, mask: int, among: Mask) -> Mask:
    wrong: Mask = among & ((entries & np.uint64(mask)) != 0)
    entries[wrong] &= np.uint64(~mask & (1 << 64) - 1)
    return wrong


def put_where_the_guest_is(header: Header) -> Fix:
    """Let clusters in a data file be at their guest offset, where the format wants them."""

    def fix(table: Table) -> Mask:
        entries = table.entries
        if table.guest_offset is None:
            return np.zeros(len(entries), dtype=np.bool_)
        guest = table.guest_offset + np.arange(len(entries), dtype=np.uint64) * np.uint64(header.geometry.cluster_size)
        offsets = entries & np.uint64(OFFSET_MASK)
        is_there = offsets != 0
        unflagged = (entries & np.uint64(ZERO)) == 0 if table.bitmaps is None else np.ones(len(entries), dtype=np.bool_)
        is_there |= ((entries & np.uint64(COPIED)) != 0) & unflagged
        wrong: Mask = is_there & ((entries & np.uint64(COMPRESSED)) == 0) & (offsets != guest)
        entries[wrong] = (entries[wrong] & np.uint64(~OFFSET_MASK & (1 << 64) - 1)) | guest[wrong]
        return wrong

    return fix


# ---- tables


def each_l2_table(file: ImageFile) -> Iterator[Table]:
    """Every L2 table of the active disk that has a place of its own, once. Raises OSError."""
    header = file.header
    clusters, indexes, counts = _named_by(file, header.l1_table_offset, header.l1_size)
    for cluster, index, count in zip(clusters.tolist(), indexes.tolist(), counts.tolist(), strict=True):
        guest_offset = index * header.geometry.l2_coverage if count == 1 else None
        if file.metadata.owner(cluster) == Structure.L2_TABLE:
            yield read_l2_table(file, cluster << header.cluster_bits, guest_offset)


def _named_by(file: ImageFile, host_offset: int, size: int) -> tuple[Clusters, Clusters, Clusters]:
    """The clusters of the L2 tables that an L1 table names, the first entry that names each, and how many do."""
    words = _read_words(file, host_offset, size)
    offsets = words & np.uint64(OFFSET_MASK)
    indexes = np.flatnonzero((offsets != 0) & (offsets & np.uint64(file.header.geometry.cluster_size - 1) == 0))
    clusters = (offsets[indexes] >> np.uint64(file.header.cluster_bits)).astype(np.int64)
    distinct, first, counts = np.unique(clusters, return_index=True, return_counts=True)
    return distinct, indexes[first], counts


def read_l2_table(file: ImageFile, host_offset: int, guest_offset: int | None) -> Table:
    """One L2 table; what of it the file ends before is 0. Raises OSError."""
    words = _read_words(file, host_offset, file.header.geometry.cluster_size // 8)
    return table_of(words, file.header, host_offset, guest_offset)


def table_of(words: Entries, header: Header, host_offset: int, guest_offset: int | None) -> Table:
    """The L2 table with these words, native-endian."""
    entries, bitmaps = (words[::2], words[1::2]) if header.extended_l2 else (words, None)
    return Table(words, entries, bitmaps, host_offset, guest_offset)


def _read_words(file: ImageFile, host_offset: int, count: int) -> Entries:
    """What of them the file ends before is 0."""
    stored = file.storage.pread(8 * count, host_offset)
    return np.frombuffer(stored.ljust(8 * count, b"\0"), dtype=">u8").astype(np.uint64)


def _is_all(file: ImageFile, structure: Structure, host_offset: int, length: int) -> bool:
    """True if `structure` alone is in all of these clusters."""
    bits = file.header.cluster_bits
    clusters = range(host_offset >> bits, (host_offset + length - 1 >> bits) + 1)
    return all(file.metadata.owner(cluster) == structure for cluster in clusters)


def _write(file: ImageFile, structure: int, table: Table, wrong: Mask, step: int) -> None:
    """Write the words from the first changed entry to the last."""
    changed = np.flatnonzero(wrong)
    first, end = int(changed[0]) * step, (int(changed[-1]) + 1) * step
    data = table.words[first:end].astype(">u8").tobytes()
    file.write(Structure(structure), data, table.host_offset + 8 * first)
