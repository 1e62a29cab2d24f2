"""L1 and L2 entries: what one means, for one entry (`classify`) and for a whole table (`classify_table`).

The two forms must agree on every possible entry; a property test holds them together. Whether a host offset is
right for its guest offset (external data files) or inside the file is not asked here.

Source: docs/interop/qcow2.rst, "Cluster mapping", "Standard Cluster Descriptor", "Compressed Clusters Descriptor",
"Extended L2 Entries".
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcow2_plugin.format.geometry import SECTOR_SIZE, SUBCLUSTERS, Geometry

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1

Entries = npt.NDArray[np.uint64]
Kinds = npt.NDArray[np.uint8]


class ClusterKind(enum.IntEnum):
    """What an entry, or with extended L2 one subcluster of it, says about its guest range."""

    UNALLOCATED = 0
    """Nothing here: backing file or zeros."""
    UNALLOCATED_ALLOCATED = 1
    """Extended L2 only: reads like UNALLOCATED, but the host cluster is reserved."""
    ZERO_PLAIN = 2
    ZERO_ALLOCATED = 3
    """Reads as zeros; the host cluster is kept."""
    NORMAL = 4
    COMPRESSED = 5
    INVALID = 6
    """The entry breaks the format: every access to the cluster fails."""


@dataclass(frozen=True, slots=True)
class EntryRules:
    """What decides the meaning of the bits, the same for all entries of an image."""

    geometry: Geometry
    has_zero_flag: bool
    """Version 3 with standard entries; elsewhere bit 0 has no such meaning."""
    has_data_file: bool


def classify(entry: int, bitmap: int, rules: EntryRules) -> ClusterKind:
    """The kind of a standard entry; with extended L2, of an entry whose subclusters are all alike.

    `bitmap` is the second word of an extended entry, else 0. Raises nothing: INVALID is an answer.
    """
    return subcluster_kind(entry, bitmap, 0, rules)


def subcluster_kind(entry: int, bitmap: int, subcluster: int, rules: EntryRules) -> ClusterKind:
    """The kind of one subcluster; without extended L2 the cluster is its only one (index 0)."""
    if entry & COMPRESSED:
        if rules.has_data_file or bitmap or entry & _forbidden_if_compressed(rules.geometry.cluster_bits):
            return ClusterKind.INVALID
        return ClusterKind.COMPRESSED
    host_offset = entry & OFFSET_MASK
    if host_offset & (rules.geometry.cluster_size - 1):
        return ClusterKind.INVALID
    is_allocated = host_offset != 0 or (rules.has_data_file and entry & COPIED != 0)
    if rules.geometry.extended_l2:
        return _extended_kind(bitmap, subcluster, is_allocated)
    if entry & ZERO:
        if not rules.has_zero_flag:
            return ClusterKind.INVALID
        return ClusterKind.ZERO_ALLOCATED if host_offset else ClusterKind.ZERO_PLAIN
    return ClusterKind.NORMAL if is_allocated else ClusterKind.UNALLOCATED


def _extended_kind(bitmap: int, subcluster: int, is_allocated: bool) -> ClusterKind:
    data, zero = bitmap & ALL_SUBCLUSTERS, bitmap >> SUBCLUSTERS
    if data & zero or (data and not is_allocated):
        return ClusterKind.INVALID
    if data >> subcluster & 1:
        return ClusterKind.NORMAL
    if zero >> subcluster & 1:
        return ClusterKind.ZERO_ALLOCATED if is_allocated else ClusterKind.ZERO_PLAIN
    return ClusterKind.UNALLOCATED_ALLOCATED if is_allocated else ClusterKind.UNALLOCATED


def _forbidden_if_compressed(cluster_bits: int) -> int:
    """COPIED, and the bits of the host offset that small clusters have room for and the format forbids."""
    return COPIED | (1 << 70 - cluster_bits) - 1 >> 56 << 56


def compressed_location(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Host offset of a compressed cluster's first byte and the bytes to fetch there.

    The stream ends somewhere in the last sector; what follows it may belong to the next cluster.
    """
    offset_bits = 70 - cluster_bits
    host_offset = entry & (1 << min(offset_bits, 56)) - 1
    additional_sectors = entry >> offset_bits & (1 << 62 - offset_bits) - 1
    return host_offset, (additional_sectors + 1) * SECTOR_SIZE - host_offset % SECTOR_SIZE


def compressed_entry(host_offset: int, stored_length: int, cluster_bits: int) -> int:
    """The entry of a cluster whose compressed form of at most a cluster's bytes stands there; as `compressed_location`
    reads it."""
    additional_sectors = (host_offset % SECTOR_SIZE + stored_length - 1) // SECTOR_SIZE
    return COMPRESSED | additional_sectors << 70 - cluster_bits | host_offset


def compressed_locations(entries: Entries, cluster_bits: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`compressed_location` of many entries: host offsets and stored lengths."""
    offset_bits = 70 - cluster_bits
    host_offsets = (entries & np.uint64((1 << min(offset_bits, 56)) - 1)).astype(np.int64)
    sectors = (entries >> np.uint64(offset_bits) & np.uint64((1 << 62 - offset_bits) - 1)).astype(np.int64)
    return host_offsets, (sectors + 1) * SECTOR_SIZE - host_offsets % SECTOR_SIZE


def classify_table(entries: Entries, bitmaps: Entries | None, rules: EntryRules) -> Kinds:
    """The kinds of a table's entries: one per cluster, or one per subcluster (32 a cluster) with extended L2.

    `entries` and `bitmaps` are native-endian; `bitmaps` is None without extended L2.
    """
    host_offsets = entries & np.uint64(OFFSET_MASK)
    copied = (entries & np.uint64(COPIED)) != 0
    compressed = (entries & np.uint64(COMPRESSED)) != 0
    invalid = (host_offsets & np.uint64(rules.geometry.cluster_size - 1)) != 0
    forbidden = (entries & np.uint64(_forbidden_if_compressed(rules.geometry.cluster_bits))) != 0
    invalid[compressed] = rules.has_data_file | forbidden[compressed]
    allocated = host_offsets != 0
    if rules.has_data_file:
        allocated |= copied
    if bitmaps is not None:
        return _classify_extended_table(bitmaps, allocated, compressed, invalid)
    kinds = np.where(allocated, np.uint8(ClusterKind.NORMAL), np.uint8(ClusterKind.UNALLOCATED))
    zero = (entries & np.uint64(ZERO)) != 0
    if zero.any():
        if rules.has_zero_flag:
            kinds[zero] = np.uint8(ClusterKind.ZERO_PLAIN)
            kinds[zero & (host_offsets != 0)] = np.uint8(ClusterKind.ZERO_ALLOCATED)
        else:
            invalid |= zero & ~compressed
    kinds[compressed] = np.uint8(ClusterKind.COMPRESSED)
    kinds[invalid] = np.uint8(ClusterKind.INVALID)
    return kinds


def end_of_storage(words: Entries, rules: EntryRules) -> int:
    """One past the highest host offset at which the clusters of an L2 table begin; 0 if it stores none.

    `words` are native-endian, with extended L2 entries and bitmaps in turn. Invalid entries store nothing.
    """
    table, bitmaps = (words[::2], words[1::2]) if rules.geometry.extended_l2 else (words, None)
    host_offsets = table & np.uint64(OFFSET_MASK)
    kinds = classify_table(table, bitmaps, rules).reshape(len(table), -1)
    stored = host_offsets[(kinds == ClusterKind.NORMAL).any(axis=1)]
    end = int(stored.max()) + 1 if stored.size else 0
    compressed = table[kinds[:, 0] == ClusterKind.COMPRESSED]
    if not compressed.size:
        return end
    return max(end, int(compressed_locations(compressed, rules.geometry.cluster_bits)[0].max()) + 1)


def _classify_extended_table(
    bitmaps: Entries,
    allocated: npt.NDArray[np.bool_],
    compressed: npt.NDArray[np.bool_],
    invalid: npt.NDArray[np.bool_],
) -> Kinds:
    data_bits = (bitmaps & np.uint64(ALL_SUBCLUSTERS)).astype(np.uint32)
    zero_bits = (bitmaps >> np.uint64(SUBCLUSTERS)).astype(np.uint32)
    invalid = invalid | (data_bits & zero_bits != 0) | ((data_bits != 0) & ~allocated & ~compressed)
    invalid |= compressed & (bitmaps != 0)
    data, zero = _bits_as_rows(data_bits), _bits_as_rows(zero_bits)
    has_space = allocated[:, np.newaxis]
    kinds = np.where(
        zero,
        np.where(has_space, np.uint8(ClusterKind.ZERO_ALLOCATED), np.uint8(ClusterKind.ZERO_PLAIN)),
        np.where(has_space, np.uint8(ClusterKind.UNALLOCATED_ALLOCATED), np.uint8(ClusterKind.UNALLOCATED)),
    )
    kinds[data] = np.uint8(ClusterKind.NORMAL)
    kinds[compressed] = np.uint8(ClusterKind.COMPRESSED)
    kinds[invalid] = np.uint8(ClusterKind.INVALID)
    return kinds.reshape(-1)


def _bits_as_rows(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Row i holds the 32 bits of words[i], lowest first."""
    in_bytes = words.astype("<u4").view(np.uint8).reshape(-1, 4)
    return np.unpackbits(in_bytes, axis=1, bitorder="little").astype(np.bool_)
