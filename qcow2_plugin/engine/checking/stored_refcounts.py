"""The refcounts that an image file stores, block by block, whatever state they are in.

A refcount block that lies past the end of the file, or that the table does not name, stores zeros; one that cannot be
where the table says has no refcounts at all. Nothing is judged here.

Source: docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.checking.references import Clusters, Counts, count_type
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.refcounts import REFCOUNT_TABLE_OFFSET_MASK
from qcow2_plugin.storage import Storage

MAX_FILE_SIZE = (1 << 63) - (1 << 30)
"""QEMU reads nothing past it."""
_CACHE_SIZE = 16 << 20
"""Bytes of blocks that are kept."""


class StoredRefcounts:
    """Reads refcounts; `entries` is the refcount table as stored. Raises OSError everywhere.

    Memory: the table, up to 8 MiB, and some blocks.
    """

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self._header = header
        self._order = header.refcount_order
        table_size = header.refcount_table_clusters << header.cluster_bits
        self._file_size = storage.size()
        is_there = header.refcount_table_offset < self._file_size
        stored = storage.pread(table_size, header.refcount_table_offset) if is_there else b""
        self.entries: npt.NDArray[np.uint64] = np.zeros(table_size // 8, dtype=np.uint64)
        found = np.frombuffer(stored[: len(stored) & ~7], dtype=">u8")
        self.entries[: len(found)] = found
        self.per_block = header.geometry.cluster_size * 8 >> self._order
        self._kept: dict[int, Counts] = {}

    def block(self, slot: int) -> Counts | None:
        """The refcounts of the block that an entry of the table names, which the caller must not change; None if there
        can be no block."""
        offset = self.block_offset(slot)
        if offset % self._header.geometry.cluster_size or offset >= MAX_FILE_SIZE:
            return None
        if not offset or offset >= self._file_size:
            return self._unpacked(0)
        found = self._kept.get(offset)
        if found is None:
            found = self._unpacked(offset)
            if len(self._kept) * found.nbytes >= _CACHE_SIZE:
                self._kept.clear()
            self._kept[offset] = found
        return found

    def block_offset(self, slot: int) -> int:
        """Where the table says that the block is, 0 for nowhere."""
        return int(self.entries[slot]) & REFCOUNT_TABLE_OFFSET_MASK if slot < len(self.entries) else 0

    def singles(self, cluster_count: int) -> npt.NDArray[np.int8]:
        """For each of the first clusters 1 if its refcount is 1, 0 if it is another, -1 if that cannot be told."""
        found = np.zeros(cluster_count, dtype=np.int8)
        for slot in range(min(-(-cluster_count // self.per_block), len(self.entries))):
            if not self.block_offset(slot):
                continue
            start = slot * self.per_block
            stop = min(start + self.per_block, cluster_count)
            found[start:stop] = _singles(self.block(slot))[: stop - start]
        return found

    def singles_of(self, clusters: Clusters) -> npt.NDArray[np.int8]:
        """The same for clusters anywhere."""
        found = np.zeros(len(clusters), dtype=np.int8)
        for slot, here in self._by_slot(clusters):
            singles = _singles(self.block(slot))
            found[here] = singles if singles.size == 1 else singles[clusters[here] % self.per_block]
        return found

    def of(self, clusters: Clusters) -> npt.NDArray[np.uint64]:
        """The refcounts of clusters anywhere; 0 where they cannot be told."""
        found = np.zeros(len(clusters), dtype=np.uint64)
        for slot, here in self._by_slot(clusters):
            block = self.block(slot)
            if block is not None:
                found[here] = block[clusters[here] % self.per_block]
        return found

    def _by_slot(self, clusters: Clusters) -> Iterator[tuple[int, Clusters]]:
        """The entries of the table that know about these clusters, and the places of those in the array."""
        slots = clusters // self.per_block
        order = np.argsort(slots, kind="stable")
        edges = np.flatnonzero(np.diff(slots[order])) + 1
        for here in np.split(order, edges) if order.size else ():
            slot = int(slots[here[0]])
            if slot >= len(self.entries):
                return
            if self.block_offset(slot):
                yield slot, here

    def _unpacked(self, offset: int) -> Counts:
        """The block at this offset of the file; zeros for 0."""
        size = self._header.geometry.cluster_size
        stored = self._storage.pread(size, offset) if offset else b""
        return unpack_narrow(stored + bytes(size - len(stored)), self._order)


def unpack_narrow(block: bytes, refcount_order: int) -> Counts:
    """The refcounts of a block, in the type of `references.count_type`."""
    if refcount_order >= 3:
        kind = count_type(refcount_order)
        return np.frombuffer(block, dtype=kind.newbyteorder(">")).astype(kind)
    packed = np.frombuffer(block, dtype=np.uint8)
    shifts = np.arange(0, 8, 1 << refcount_order, dtype=np.uint8)
    mask = np.uint8((1 << (1 << refcount_order)) - 1)
    return (packed[:, np.newaxis] >> shifts & mask).reshape(-1)


def _singles(block: Counts | None) -> npt.NDArray[np.int8]:
    """One -1 for a block that cannot be read."""
    return np.full(1, -1, dtype=np.int8) if block is None else (block == 1).view(np.int8)
