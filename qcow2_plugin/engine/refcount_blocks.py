"""The refcounts of an image file, block by block, as they are in memory and on disk.

A block that differs from the disk (*dirty*) or has no place there yet (*new*) is kept until a write-back has written
it; of the others the oldest are forgotten. What a refcount becomes, and why, is the business of `allocator`; here are
the blocks, and refcounts of whole arrays of clusters looked at and counted up at once.

**Lock.** The image's, for everything here.

Source: docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.engine.image_file import Clusters, ImageFile, Structure
from qcow2_plugin.format.refcounts import REFCOUNT_TABLE_OFFSET_MASK, by_block, pack_block, unpack_block

Refcounts = npt.NDArray[Any]

_BLOCK_CACHE_SIZE = 8 << 20
"""Bytes of refcounts, as in memory, that are kept unless they changed."""


class RefcountBlocks:
    """The refcount table of one image file and the blocks that it names."""

    def __init__(self, file: ImageFile) -> None:
        """Raises TruncatedImageError, OSError."""
        self._file = file
        self._begin()

    def _begin(self) -> None:
        """Take the refcounts as the header tells of them now, and forget others. Raises as `__init__` does."""
        file, header = self._file, self._file.header
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.geometry.cluster_size
        self._order = header.refcount_order
        self._per_block = self._cluster_size * 8 >> header.refcount_order
        self._dtype = np.dtype(f"u{max(1 << header.refcount_order >> 3, 1)}")
        table_size = header.refcount_table_clusters << header.cluster_bits
        stored = read_structure(file.storage, "refcount table", header.refcount_table_offset, table_size)
        self._table = np.frombuffer(stored, dtype=">u8").astype(np.uint64) & np.uint64(REFCOUNT_TABLE_OFFSET_MASK)
        self._table_offset = header.refcount_table_offset
        self._blocks: dict[int, Refcounts] = {}
        self._max_blocks = max(_BLOCK_CACHE_SIZE // (self._per_block * self._dtype.itemsize), 4)
        self._dirty: set[int] = set()
        self._new: set[int] = set()
        self._being_written: set[int] = set()

    @property
    def per_block(self) -> int:
        """Clusters that one refcount block describes."""
        return self._per_block

    @property
    def changed_size(self) -> int:
        """Bytes, as in memory, of refcount blocks that differ from the disk."""
        return len(self._dirty | self._new) * self._per_block * self._dtype.itemsize

    # -- looking --

    def refcount(self, cluster: int) -> int:
        """The refcount of one cluster. Raises TruncatedImageError, OSError."""
        slot, index = divmod(cluster, self._per_block)
        if slot >= len(self._table) or not self._table[slot]:
            return 0
        return int(self._block(slot)[index])

    def refcounts_of(self, clusters: Clusters) -> npt.NDArray[np.uint64]:
        """The refcounts of many clusters. Raises TruncatedImageError, OSError."""
        is_ascending = (clusters[1:] >= clusters[:-1]).all()
        order = np.arange(len(clusters)) if is_ascending else np.argsort(clusters, kind="stable")
        ascending = clusters[order]
        found = np.zeros(len(clusters), dtype=np.uint64)
        for slot, start, stop in by_block(ascending, self._per_block):
            if slot < len(self._table) and self._table[slot]:
                found[order[start:stop]] = self._block(slot)[ascending[start:stop] - slot * self._per_block]
        return found

    def end_of_use(self) -> int:
        """The first host offset behind every cluster that has a refcount. Raises TruncatedImageError, OSError."""
        for slot in reversed(np.flatnonzero(self._table).tolist()):
            used = np.flatnonzero(self._block(slot))
            if used.size:
                last_cluster: int = slot * self._per_block + int(used[-1])
                return last_cluster + 1 << self._cluster_bits
        return 0

    def blocks(self) -> Iterator[tuple[int, Refcounts]]:
        """The blocks that there are, ascending: the first cluster that each describes, and its refcounts.

        Raises TruncatedImageError, OSError.
        """
        for slot in np.flatnonzero(self._table).tolist():
            yield slot * self._per_block, self._block(slot)

    # -- counting --

    def count_up(self, distinct: Clusters, references: Clusters) -> None:
        """Ascending clusters, which have so many references each, get as many again.

        Raises OverflowError if a refcount does not fit its width; CorruptImageError if one was too low already;
        TruncatedImageError, OSError; then nothing has changed.
        """
        limit = np.uint64((1 << (1 << self._order)) - 1)
        raised: list[tuple[int, Refcounts, Clusters, Refcounts]] = []
        for slot, start, stop in by_block(distinct, self._per_block):
            known = self._block(slot) if self._place(slot) else np.zeros(self._per_block, dtype=self._dtype)
            indexes, gains = distinct[start:stop] - slot * self._per_block, references[start:stop].astype(np.uint64)
            held = known[indexes].astype(np.uint64)
            if (held < gains).any():
                detail = "counts fewer references than there are; repair the image with 'qcow2 check -r all'"
                raise self._file.corrupt("refcount block", detail, self._place(slot))
            if (held > limit - gains).any():
                raise OverflowError(f"a cluster would have more references than {1 << self._order} bits can count")
            raised.append((slot, known, indexes, (held + gains).astype(self._dtype)))
        for slot, known, indexes, refcounts in raised:
            known[indexes] = refcounts
            self._blocks[slot] = known
            self._dirty.add(slot)

    def count_fresh(self, clusters: Clusters, references: int) -> None:
        """Ascending clusters that were just handed out are to be referred to so many times; that fits the width."""
        for slot, start, stop in by_block(clusters, self._per_block):
            self._block(slot)[clusters[start:stop] - slot * self._per_block] = references
            self._dirty.add(slot)

    # -- the blocks --

    def written(self) -> None:
        """What `take_writes` gave out is on disk."""
        self._being_written = set()
        while len(self._blocks) > self._max_blocks and self._forget_one():
            pass

    def _place(self, slot: int) -> int:
        """Host offset of the block of a slot, 0 if it has none."""
        return int(self._table[slot]) if slot < len(self._table) else 0

    def _packed(self, slot: int) -> bytes:
        return pack_block(self._blocks[slot].astype(np.uint64), self._order)

    def _block(self, slot: int) -> Refcounts:
        """The refcounts of a slot that has a block."""
        block = self._blocks.get(slot)
        if block is None:
            place = self._place(slot)
            if place & self._cluster_size - 1 or self._file.metadata.owner(place >> self._cluster_bits) != (
                Structure.REFCOUNT_BLOCK
            ):
                raise self._file.corrupt("refcount table", f"entry {slot} is {place:#x}, no place for a block")
            stored = read_structure(self._file.storage, "refcount block", place, self._cluster_size)
            block = unpack_block(stored, self._order).astype(self._dtype)
            if len(self._blocks) - len(self._dirty) >= self._max_blocks:
                self._forget_one()
            self._blocks[slot] = block
        return block

    def _forget_one(self) -> bool:
        """Drop the oldest block that is as it is on disk; False if none is."""
        for slot in self._blocks:
            if slot not in self._dirty and slot not in self._new and slot not in self._being_written:
                del self._blocks[slot]
                return True
        return False
