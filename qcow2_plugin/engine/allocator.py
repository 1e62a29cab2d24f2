"""Refcounts, and who gets which cluster of the image file.

**States of a cluster.** *Free*: its refcount is 0 and nobody waits. *Handed out* by `allocate`: the refcount is 1 in
memory; nothing on disk may point to the cluster before that is durable, which `writeback` sees to. *In use*. *Retired*
by `retire`: its entry is gone from the tables in memory, but the pointer on disk may live on, and a request that began
before may still move data there. *Reclaimed*: the write-back that removed the pointer has succeeded, every such
request has ended; only now the refcount falls, and a cluster whose last reference that was is free, and is punched if
the guest discarded it. `release` takes back what was handed out and never published.

So a refcount is never lower than the number of references on disk, and a free cluster is one that nothing on disk and
nobody in flight knows. What a crash leaves is at most a refcount that is too high.

**Scanning.** Clusters are handed out from a *free run*, found by one look at a refcount block and then counted down
with plain ints. The search begins at a hint below which nothing is known to be free.

**Growth without recursion.** A refcount block that is missing says that its whole range is free, so a new block takes
the first cluster of the range that it describes and counts itself. When the refcount table is too small, or a run is
wanted that is longer than what is free, an *area* is laid out behind everything: refcount blocks that count the area
itself, then the run (or the new table). All of that exists in memory first; `take_writes` gives out what a write-back
must write, in its order.

**Lock.** The image's, for everything here.

Source: docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.image_file import Clusters, ImageFile, Structure
from qcow2_plugin.engine.refcount_blocks import RefcountBlocks, Refcounts
from qcow2_plugin.format.entries import OFFSET_MASK
from qcow2_plugin.format.geometry import MAX_REFCOUNT_TABLE_SIZE
from qcow2_plugin.format.refcounts import by_block, first_free_run, runs_of

_MAX_RETIRED = 1 << 20
"""Clusters that may wait for a write-back."""


class Run(NamedTuple):
    """Consecutive clusters of the image file; both in bytes. `is_clean`: they were never part of the file, so they
    read as zeros."""

    host_offset: int
    length: int
    is_clean: bool


class Retired(NamedTuple):
    """Clusters that lose one reference each; `punch` gives the space back once they are free."""

    clusters: Clusters
    punch: bool


@dataclass(slots=True)
class RefcountWrites:
    """What of the refcounts a write-back writes: places and bytes.

    `new_blocks` and `table` come first, then `entries` (or the header's pointer to `table`), then `blocks`.
    """

    new_blocks: list[tuple[int, bytes]] = field(default_factory=list)
    table: tuple[int, bytes] | None = None
    entries: list[tuple[int, bytes]] = field(default_factory=list)
    blocks: list[tuple[int, bytes]] = field(default_factory=list)
    new_slots: set[int] = field(default_factory=set)
    dirty_slots: set[int] = field(default_factory=set)
    table_clusters: int = 0

    @property
    def has_any(self) -> bool:
        """There is something to write."""
        return bool(self.new_blocks or self.table or self.entries or self.blocks)


class Allocator(RefcountBlocks):
    """The refcounts of one image file, and what is free."""

    def __init__(self, file: ImageFile) -> None:
        """Raises TruncatedImageError, OSError."""
        super().__init__(file)
        self._table_is_new = False
        self._old_tables: list[tuple[int, int]] = []
        """First cluster and number of clusters of tables that the header may still name."""
        self._hint = 0
        self._next = self._end = 0
        self._retired: list[Retired] = []
        self.retired_count = 0
        """Clusters that wait for a write-back to begin."""
        self._clean_from = -(-file.storage.size() // self._cluster_size) * self._cluster_size

    # -- handing out --

    def allocate(self, cluster_count: int) -> list[Run]:
        """So many clusters, in as few runs as there are free ones. Raises CorruptImageError, OSError (EFBIG, ...);
        then nothing was handed out."""
        runs: list[Run] = []
        try:
            while cluster_count:
                if self._next == self._end:
                    self._find_free_run()
                taken = min(cluster_count, self._end - self._next)
                self._hand_out(runs, self._next, taken)
                cluster_count -= taken
        except BaseException:
            self.release(runs)
            raise
        return runs

    def allocate_table(self, structure: Structure, length: int) -> int:
        """Host offset of consecutive clusters for a table of `length` bytes. Raises as `allocate` does."""
        count = -(-length // self._cluster_size)
        if self._next == self._end:
            self._find_free_run()
        if count <= self._end - self._next:
            first = self._next
            self._hand_out([], first, count)
        else:
            first = self._take_last_run(count) or self._append_area(count)
        self._file.metadata.claim(structure, first, count)
        return first << self._cluster_bits

    def release(self, runs: Iterable[Run]) -> None:
        """Take back what was handed out and never published."""
        for run in runs:
            first, count = run.host_offset >> self._cluster_bits, run.length >> self._cluster_bits
            self._lower(np.arange(first, first + count, dtype=np.int64))

    def _hand_out(self, runs: list[Run], first: int, count: int) -> None:
        """The next clusters of the free run, appended to `runs`."""
        slot, index = divmod(first, self._per_block)
        self._block(slot)[index : index + count] = 1
        self._dirty.add(slot)
        self._next = self._hint = first + count
        host_offset, length = first << self._cluster_bits, count << self._cluster_bits
        is_clean = host_offset >= self._clean_from
        self._clean_from = max(self._clean_from, host_offset + length)
        if runs and is_clean == runs[-1].is_clean and runs[-1].host_offset + runs[-1].length == host_offset:
            runs[-1] = runs[-1]._replace(length=runs[-1].length + length)
        else:
            runs.append(Run(host_offset, length, is_clean))

    def _find_free_run(self) -> None:
        """Set the free run to the first one at or behind the hint."""
        slot, index = divmod(self._hint, self._per_block)
        while True:
            if slot >= len(self._table) or not self._table[slot]:
                self._add_block(slot)
            free = first_free_run(self._block(slot), index)
            if free is not None:
                break
            slot, index = slot + 1, 0
        first, count = slot * self._per_block + free[0], free[1]
        self._require_unused(first, count)
        self._next, self._end = first, first + count

    def _take_last_run(self, count: int) -> int | None:
        """The first of so many clusters behind everything in use, None if the last block does not describe as many."""
        slot = self._first_slot_behind_use() - 1
        used = np.flatnonzero(self._block(slot))
        index = int(used[-1]) + 1 if used.size else 0
        if count > self._per_block - index:
            return None
        first = slot * self._per_block + index
        self._require_unused(first, count)
        self._count_new(first, count)
        return first

    # -- growth --

    def _add_block(self, slot: int) -> None:
        """A block for a slot that has none, in the first cluster that it describes."""
        if slot >= len(self._table):
            self._grow_table(slot)
        if self._table[slot]:
            return
        self._place_block(slot, slot * self._per_block)
        self._count_new(slot * self._per_block, 1)

    def _require_unused(self, first: int, count: int) -> None:
        """Raises OSError (EFBIG) if no entry can name these clusters, CorruptImageError if one holds a structure."""
        if first + count << self._cluster_bits > OFFSET_MASK + 1:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        taken = self._file.metadata.first_in(first, count)
        if taken is not None:
            owner = Structure(self._file.metadata.owner(taken)).title
            raise self._file.corrupt("refcounts", f"say that cluster {taken:#x} of the {owner} is free")

    def _place_block(self, slot: int, cluster: int) -> None:
        self._require_unused(cluster, 1)
        self._file.metadata.claim(Structure.REFCOUNT_BLOCK, cluster, 1)
        self._blocks[slot] = np.zeros(self._per_block, dtype=self._dtype)
        self._table[slot] = cluster << self._cluster_bits
        self._new.add(slot)

    def _count_new(self, first: int, count: int) -> None:
        """Set the refcounts of a new area to 1; its blocks exist."""
        self._clean_from = max(self._clean_from, first + count << self._cluster_bits)
        while count:
            slot, index = divmod(first, self._per_block)
            here = min(count, self._per_block - index)
            self._block(slot)[index : index + here] = 1
            self._dirty.add(slot)
            first, count = first + here, count - here

    def _append_area(self, cluster_count: int) -> int:
        """The first of so many consecutive clusters behind everything in use, with refcount blocks of their own."""
        slot = self._first_slot_behind_use()
        block_count = -(-cluster_count // (self._per_block - 1))
        if slot + block_count > len(self._table):
            self._grow_table(slot + block_count - 1)
            slot = self._first_slot_behind_use()
            if slot + block_count > len(self._table):  # the new table took the slots that it was made for
                self._grow_table(slot + block_count - 1)
                slot = self._first_slot_behind_use()
        return self._lay_out(slot, block_count, cluster_count)

    def _lay_out(self, slot: int, block_count: int, cluster_count: int) -> int:
        """An area that begins with the range of `slot`; the first cluster behind its blocks."""
        first = slot * self._per_block
        self._require_unused(first, block_count + cluster_count)
        for index in range(block_count):
            self._place_block(slot + index, first + index)
        self._count_new(first, block_count + cluster_count)
        return first + block_count

    def _first_slot_behind_use(self) -> int:
        used = np.flatnonzero(self._table)
        return int(used[-1]) + 1 if used.size else 0

    def _grow_table(self, slot: int) -> None:
        """A larger refcount table, in an area of its own that begins at `slot` or behind it."""
        slot = max(slot, self._first_slot_behind_use(), len(self._table))
        table_clusters, block_count = 1, 1
        while True:
            wanted = 8 * (slot + block_count)
            size = min(wanted + wanted // 2, max(wanted, MAX_REFCOUNT_TABLE_SIZE))
            needed_clusters = -(-size // self._cluster_size)
            needed_blocks = -(-(needed_clusters + block_count) // self._per_block)
            if (needed_clusters, needed_blocks) == (table_clusters, block_count):
                break
            table_clusters, block_count = max(needed_clusters, table_clusters), max(needed_blocks, block_count)
        if table_clusters << self._cluster_bits > MAX_REFCOUNT_TABLE_SIZE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self._require_unused(slot * self._per_block, block_count + table_clusters)
        old_table = self.table_run
        table = np.zeros((table_clusters << self._cluster_bits) // 8, dtype=np.uint64)
        table[: len(self._table)] = self._table
        self._table = table
        first = self._lay_out(slot, block_count, table_clusters)
        self._file.metadata.claim(Structure.REFCOUNT_TABLE, first, table_clusters)
        self._table_offset = first << self._cluster_bits
        self._table_is_new = True
        self._old_tables.append(old_table)  # stays a structure: a write-back may be writing to it

    # -- giving back --

    def retire(self, clusters: Clusters, *, punch: bool = False) -> None:
        """These clusters lose one reference each, as soon as that is safe.

        Raises CorruptImageError if a structure of the image is in one of them.
        """
        if not len(clusters):
            return
        if self._file.metadata.among(clusters).any():
            raise self._file.corrupt("L2 entry", "points to a structure of the image")
        self._retire(clusters, punch=punch)

    def release_table(self, host_offset: int, length: int) -> None:
        """Take back what `allocate_table` gave."""
        first, count = host_offset >> self._cluster_bits, -(-length // self._cluster_size)
        self._file.metadata.release(range(first, first + count))
        self._lower(np.arange(first, first + count, dtype=np.int64))

    def retire_table(self, first: int, count: int) -> None:
        """`retire` for consecutive clusters that held a structure."""
        self._file.metadata.release(range(first, first + count))
        self._retire(np.arange(first, first + count, dtype=np.int64), punch=False)

    def _retire(self, clusters: Clusters, *, punch: bool) -> None:
        self._retired.append(Retired(clusters, punch))
        self.retired_count += len(clusters)

    def take_retired(self) -> list[Retired]:
        """What was retired up to now: a write-back that begins now removes the last pointers to it."""
        taken, self._retired, self.retired_count = self._retired, [], 0
        return [
            Retired(np.concatenate([each.clusters for each in taken if each.punch is punch]), punch)
            for punch in sorted({each.punch for each in taken})
        ]

    def put_back_retired(self, retired: list[Retired]) -> None:
        """Undo `take_retired`: that write-back failed."""
        self._retired[:0] = retired
        self.retired_count += sum(len(each.clusters) for each in retired)

    def reclaim(self, retired: Retired) -> None:
        """Lower the refcounts of what nothing on disk points to and no request uses any more.

        Raises CorruptImageError if a refcount was 0 already; TruncatedImageError, OSError; then nothing has changed.
        """
        free = self._lower(retired.clusters)
        if retired.punch:
            self.punch(free)

    def punch(self, clusters: Clusters) -> None:
        """Give back the disk space of ascending clusters that are free."""
        with suppress(OSError):  # disk space that stays taken is no harm
            for first, count in runs_of(clusters):
                self._file.storage.punch(first << self._cluster_bits, count << self._cluster_bits)

    def _lower(self, clusters: Clusters) -> Clusters:
        """Take one from the refcount of each; those that are free now."""
        return self.count_down(*np.unique(clusters, return_counts=True))

    def count_down(self, distinct: Clusters, losses: Clusters) -> Clusters:
        """Ascending clusters lose so many references each, of which nothing is left; those that are free now.

        Raises as `reclaim` does.
        """
        lowered: list[tuple[int, Refcounts, Clusters, Refcounts]] = []
        for slot, start, stop in by_block(distinct, self._per_block):
            if not self._place(slot):
                raise self._file.corrupt(
                    "refcount table", f"lacks the block for used cluster {int(distinct[start]):#x}"
                )
            block = self._block(slot)
            indexes = distinct[start:stop] - slot * self._per_block
            if (block[indexes].astype(np.uint64) < losses[start:stop].astype(np.uint64)).any():
                raise self._file.corrupt("refcount block", "counts fewer references than there were", self._place(slot))
            lowered.append((slot, block, indexes, block[indexes] - losses[start:stop].astype(self._dtype)))
        for slot, block, indexes, refcounts in lowered:
            block[indexes] = refcounts
            self._blocks[slot] = block
            self._dirty.add(slot)
        freed = [slot * self._per_block + indexes[refcounts == 0] for slot, _, indexes, refcounts in lowered]
        free: Clusters = np.concatenate(freed) if freed else distinct
        if free.size and int(free[0]) < self._hint:
            self._hint = int(free[0])
            self._next = self._end = 0
        return free

    # -- another table, or another content --

    def spoil(self, end: int) -> None:
        """What lies before host offset `end` may have been written to, whether it was handed out or not."""
        self._clean_from = max(self._clean_from, end)

    def follow_header(self) -> None:
        """Count on in the refcount table that the header names, durably, since now: it says what the one before said.
        That one is retired, with its blocks. Nothing may wait to be written but refcounts that have fallen.

        Raises TruncatedImageError, OSError; then nothing can be counted any more.
        """
        first, count = self.table_run
        blocks = (self._table[self._table != 0] >> np.uint64(self._cluster_bits)).astype(np.int64)
        self._begin()
        self._hint = self._next = self._end = 0
        self._file.metadata.release([*range(first, first + count), *blocks.tolist()])
        self._retire(np.concatenate((np.arange(first, first + count, dtype=np.int64), blocks)), punch=False)

    def set_refcounts(self, slot: int, refcounts: npt.NDArray[np.uint64]) -> bool:
        """Replace the refcounts that the block of `slot` holds, for a rebuild; False if they were right already.

        A missing block is added where `refcounts` leaves a cluster free. Raises OverflowError if one does not fit the
        width; CorruptImageError, OSError.
        """
        if self._order < 6 and refcounts.size and int(refcounts.max()) >> (1 << self._order):
            raise OverflowError(f"refcount {int(refcounts.max())} does not fit {1 << self._order} bits")
        if slot >= len(self._table) or not self._table[slot]:
            if not refcounts.any():
                return False
            self._add_block_for(slot, refcounts)
        block = self._block(slot)
        wanted = np.zeros(self._per_block, dtype=self._dtype)
        wanted[: len(refcounts)] = refcounts
        if slot in self._new:
            own = (int(self._table[slot]) >> self._cluster_bits) - slot * self._per_block
            wanted[own] = 1
        if (block == wanted).all():
            return False
        block[:] = wanted
        self._dirty.add(slot)
        self._hint = 0
        self._next = self._end = 0
        return True

    def _add_block_for(self, slot: int, refcounts: npt.NDArray[np.uint64]) -> None:
        """A block for a slot whose clusters are in use, in one of them that is free."""
        if slot >= len(self._table):
            raise self._file.corrupt("refcount table", "is too small for the file that it describes")
        free = np.flatnonzero(np.append(refcounts, np.zeros(self._per_block - len(refcounts), dtype=np.uint64)) == 0)
        if not free.size:
            raise self._file.corrupt("refcount table", "lacks a block and there is no room for one")
        self._place_block(slot, slot * self._per_block + int(free[0]))

    @property
    def clean_from(self) -> int:
        """Host offset behind everything that was ever part of the file."""
        return self._clean_from

    @property
    def is_full(self) -> bool:
        """So much waits for a write-back that one should run before more is changed."""
        return self.retired_count > _MAX_RETIRED or len(self._blocks) > 2 * self._max_blocks

    @property
    def table_run(self) -> tuple[int, int]:
        """First cluster and number of clusters of the refcount table."""
        return self._table_offset >> self._cluster_bits, len(self._table) * 8 >> self._cluster_bits

    # -- writing back --

    @property
    def has_changes(self) -> bool:
        """Refcounts differ from those on disk, or clusters are retired."""
        return bool(self._dirty or self._new or self._retired)

    def take_writes(self) -> RefcountWrites:
        """What differs from the disk now, to be written in the order that `RefcountWrites` tells."""
        writes = RefcountWrites(new_slots=self._new, dirty_slots=self._dirty - self._new)
        self._new, self._dirty = set(), set()
        self._being_written = writes.new_slots | writes.dirty_slots
        for slot in sorted(writes.new_slots):
            writes.new_blocks.append((self._place(slot), self._packed(slot)))
        if self._table_is_new:
            writes.table = (self._table_offset, self._table.astype(">u8").tobytes())
            writes.table_clusters = len(self._table) * 8 >> self._cluster_bits
            self._table_is_new = False
            for first, count in self._old_tables:
                self.retire_table(first, count)
            self._old_tables.clear()
        else:
            writes.entries = [
                (self._table_offset + 8 * slot, self._place(slot).to_bytes(8, "big"))
                for slot in sorted(writes.new_slots)
            ]
        writes.blocks = [(self._place(slot), self._packed(slot)) for slot in sorted(writes.dirty_slots)]
        return writes

    def put_back(self, writes: RefcountWrites) -> None:
        """Undo `take_writes`: not all of it could be written."""
        self._being_written = set()
        self._new |= writes.new_slots
        self._dirty |= writes.dirty_slots
        self._table_is_new |= writes.table is not None
