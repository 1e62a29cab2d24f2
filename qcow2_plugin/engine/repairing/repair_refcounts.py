"""Refcounts on disk made what they have to be: in place, or in new structures where the old ones cannot be used.

**In place.** The refcount blocks are gone through, and what differs is written. Refcounts never straddle a
sector, so any mixture of old and new ones is as good as the worse of the two; who calls decides what may be written
together: a refcount that rises is safe at any time, one that falls only when the pointer is durably gone.

**Anew.** Where the refcount table or a block is lost or shared, `rebuild_structures` writes blocks and a table of its
own to clusters that nothing refers to, and behind a barrier lets the header name them, by one write inside one sector.
Until then the image is as it was; after it the old structures are what a count finds to be leaked. New structures go
where nothing points to, not even an entry that is wrong. Where tables could not be followed, that is behind the end of
the file. Where references lead past the end, it is not: what they lead to would be there all of a sudden, as zeros.

Source: docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.checking.stored_refcounts import StoredRefcounts
from qcow2_plugin.engine.image_file import ImageFile, Structure
from qcow2_plugin.engine.writeback import write_refcounts_now
from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.format.geometry import MAX_REFCOUNT_TABLE_SIZE
from qcow2_plugin.format.refcounts import REFCOUNT_TABLE_OFFSET_MASK, pack_block

References = npt.NDArray[Any]
"""For each cluster of a file how often it is referred to, of any unsigned type."""
Refcounts = npt.NDArray[np.uint64]
Choose = Callable[[Refcounts, Refcounts, int], Refcounts]
"""From the refcounts on disk, the references to the same clusters, and how many of these are clusters of the file, to
the refcounts that are to be there."""

_BLOCKS_AT_ONCE = 64
"""Refcount blocks that are changed in memory before they are written."""
_WRITE_SIZE = 1 << 20
"""Bytes of new blocks that are written together."""


def raise_refcounts(file: ImageFile, allocator: Allocator, references: References) -> int:
    """Let no refcount be lower than the references; see `_change`."""
    return _change(file, allocator, references, lambda stored, wanted, known: np.maximum(stored, wanted))


def lower_refcounts(file: ImageFile, allocator: Allocator, references: References, *, behind: bool) -> int:
    """Let no refcount of a cluster of the file be higher than the references and, if nothing refers to what is
    `behind` its end, none there be more than 0; see `_change`."""

    def lowered(stored: Refcounts, wanted: Refcounts, known: int) -> Refcounts:
        least = np.minimum(stored, wanted)
        return least if behind else np.concatenate((least[:known], stored[known:]))

    return _change(file, allocator, references, lowered)


def set_refcounts(file: ImageFile, allocator: Allocator, references: References) -> int:
    """Let every refcount be the references, and 0 behind the file; see `_change`."""
    return _change(file, allocator, references, lambda stored, wanted, known: wanted)


def _change(file: ImageFile, allocator: Allocator, references: References, choose: Choose) -> int:
    """Write the refcounts that `choose` changes; of how many clusters of the file. The barrier behind it is the
    caller's.

    Raises CorruptImageError where there is no place for a block that is missing; OSError.
    """
    per_block = allocator.per_block
    changed_count = changed_slots = 0
    for slot, stored in _slots(file, allocator, references):
        known = min(max(len(references) - slot * per_block, 0), per_block)
        wanted = choose(stored, references_of(references, slot * per_block, per_block), known)
        changed = stored != wanted
        if not changed.any():
            continue
        changed_count += int(np.count_nonzero(changed[:known]))
        changed_slots += allocator.set_refcounts(slot, wanted)
        if changed_slots == _BLOCKS_AT_ONCE:
            write_refcounts_now(file, allocator)
            changed_slots = 0
    write_refcounts_now(file, allocator)  # among them, what an attempt before could not write
    return changed_count


def _slots(file: ImageFile, allocator: Allocator, references: References) -> Iterator[tuple[int, Refcounts]]:
    """The slots of blocks that there are or should be, and their refcounts; not those whose block is no good."""
    per_block = allocator.per_block
    entries = StoredRefcounts(file.storage, file.header).entries
    named = set(np.flatnonzero(entries).tolist())
    for slot in sorted(named.union(_slots_in_use(references, per_block))):
        if slot not in named or _is_block(file, int(entries[slot])):
            first = slot * per_block
            yield slot, allocator.refcounts_of(np.arange(first, first + per_block, dtype=np.int64))


def _is_block(file: ImageFile, entry: int) -> bool:
    """True if this entry of the refcount table names a block that is nothing else and wholly in the file."""
    size = file.header.geometry.cluster_size
    if entry % size or entry + size > file.storage.size():
        return False
    return file.metadata.owner(entry >> file.header.cluster_bits) == Structure.REFCOUNT_BLOCK


def references_of(references: References, first: int, count: int) -> Refcounts:
    """The references to so many clusters; 0 past the end."""
    found = np.zeros(count, dtype=np.uint64)
    known = references[first : first + count]
    found[: len(known)] = known
    return found


def is_table_usable(file: ImageFile) -> bool:
    """True if all of the refcount table is in the file, and nothing else is there."""
    bits, owner = file.header.cluster_bits, file.metadata.owner
    first, count = file.header.refcount_table_offset >> bits, file.header.refcount_table_clusters
    if not count or (first + count) << bits > file.storage.size():
        return False
    return all(owner(cluster) == Structure.REFCOUNT_TABLE for cluster in range(first, first + count))


def are_usable(file: ImageFile, references: References) -> bool:
    """True if every refcount that is needed has a place in a block that is nothing else. Raises OSError."""
    if not is_table_usable(file):
        return False
    entries = StoredRefcounts(file.storage, file.header).entries
    blocks = entries[entries != 0]
    if len(np.unique(blocks)) < len(blocks):
        return False
    bits = file.header.cluster_bits
    if not all(_is_block(file, entry) and references[entry >> bits] == 1 for entry in blocks.tolist()):
        return False
    per_block = file.header.geometry.cluster_size * 8 // file.header.refcount_bits
    return all(slot < len(entries) and entries[slot] for slot in _slots_in_use(references, per_block))


def _slots_in_use(references: References, per_block: int) -> Iterator[int]:
    for slot in range(-(-len(references) // per_block)):
        if references[slot * per_block : (slot + 1) * per_block].any():
            yield slot


class _Area(NamedTuple):
    """Consecutive clusters for new structures: blocks for these slots, then the table."""

    first: int
    slots: list[int]
    table_clusters: int

    @property
    def end(self) -> int:
        return self.first + len(self.slots) + self.table_clusters


def rebuild_structures(file: ImageFile, references: References, *, keeps: bool, fits_inside: bool, grows: bool) -> None:
    """Write a new refcount table with new blocks, and let the header name it, durably.

    The refcounts are the references, at most what the width can say; with `keeps` those on disk that are higher stay.
    Old structures count as before. `fits_inside`: clusters without references are free; `grows`: the file may become
    longer. Raises CorruptImageError if there is no room then, OSError (EFBIG if the format has none); then the image is
    as before. Memory: some bytes for each cluster of the file.
    """
    header, bits = file.header, file.header.cluster_bits
    old = StoredRefcounts(file.storage, header)
    per_block = header.geometry.cluster_size * 8 // header.refcount_bits
    slots = set(_slots_in_use(references, per_block))
    if keeps:
        slots.update(slot for slot in range(len(old.entries)) if (block := old.block(slot)) is not None and block.any())
    room = _Room(file, old, references if fits_inside else None, grows=grows)
    area = _lay_out(slots, per_block, header.geometry.cluster_size, room.find)
    file.metadata.claim(Structure.REFCOUNT_BLOCK, area.first, len(area.slots))
    file.metadata.claim(Structure.REFCOUNT_TABLE, area.first + len(area.slots), area.table_clusters)
    most = np.uint64((1 << header.refcount_bits) - 1)
    packed = bytearray()
    place = area.first << bits
    for slot in area.slots:
        first = slot * per_block
        wanted = references_of(references, first, per_block)
        block = old.block(slot) if keeps and slot < len(old.entries) else None
        if block is not None:
            wanted = np.maximum(wanted, block)
        wanted[max(area.first - first, 0) : max(area.end - first, 0)] = 1
        packed += pack_block(np.minimum(wanted, most), header.refcount_order)
        if len(packed) >= _WRITE_SIZE or slot == area.slots[-1]:
            file.write(Structure.REFCOUNT_BLOCK, bytes(packed), place)
            place += len(packed)
            packed.clear()
    table = np.zeros(area.table_clusters << bits - 3, dtype=">u8")
    table[area.slots] = (area.first + np.arange(len(area.slots), dtype=np.uint64)) << np.uint64(bits)
    file.write(Structure.REFCOUNT_TABLE, table.tobytes(), place)
    file.barrier()
    file.update_header(refcount_table_offset=place, refcount_table_clusters=area.table_clusters)
    file.barrier()


def _lay_out(slots: set[int], per_block: int, cluster_size: int, find_room: Callable[[int], int]) -> _Area:
    """An area whose blocks describe these slots and itself. Raises OSError."""
    count, table_clusters = max(len(slots), 1), 1
    while True:
        first = find_room(count + table_clusters)
        last = first + count + table_clusters - 1
        needed = sorted(slots.union(range(first // per_block, last // per_block + 1)))
        needed_clusters = -(-8 * (needed[-1] + 1) // cluster_size)
        if len(needed) <= count and needed_clusters <= table_clusters:
            break
        count, table_clusters = max(len(needed), count), max(needed_clusters, table_clusters)
        if table_clusters * cluster_size > MAX_REFCOUNT_TABLE_SIZE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return _Area(first, needed, table_clusters)


class _Room:
    """Where new structures may go: to clusters that nothing refers to, where the old table is not, and that none of its
    entries names. The header does so until it is switched, also past the end of the file."""

    def __init__(self, file: ImageFile, old: StoredRefcounts, references: References | None, *, grows: bool) -> None:
        bits = file.header.cluster_bits
        offsets = np.unique((old.entries & np.uint64(REFCOUNT_TABLE_OFFSET_MASK)) >> np.uint64(bits))
        named = np.union1d(offsets, offsets + np.uint64(1)).astype(np.int64)  # unaligned ones reach into the next
        table = (file.header.refcount_table_offset >> bits) + np.arange(file.header.refcount_table_clusters)
        self._named = np.union1d(named, table)
        self._taken: npt.NDArray[np.bool_] | None = None
        self._end = -(-file.storage.size() >> bits) if grows else None
        self._path = file.storage.path
        if references is not None:
            self._taken = (references != 0)[: file.storage.size() >> bits]
            self._taken[self._named[self._named < len(self._taken)]] = True

    def find(self, count: int) -> int:
        """The first of so many clusters in a row. Raises CorruptImageError."""
        if self._taken is not None and len(self._taken):
            edges = np.flatnonzero(np.diff(self._taken.view(np.int8), prepend=1, append=1))
            starts, ends = edges[::2], edges[1::2]
            fitting = np.flatnonzero(ends - starts >= count)
            if fitting.size:
                return int(starts[fitting[0]])
        if self._end is None:
            raise CorruptImageError(
                "refcounts",
                "cannot be rebuilt: there is no place that nothing points to, because something refers to places past "
                "the end of the file; copy what can be read to a new image",
                file=self._path,
            )
        first = self._end
        for cluster in self._named[self._named >= first].tolist():
            if cluster < first + count:
                first = cluster + 1
        return first
