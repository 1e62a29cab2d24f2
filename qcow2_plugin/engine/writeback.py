"""From memory to disk, in the one order that survives a crash at any point.

Between two barriers writes may reach the disk in any order, in part or not at all; a sector is written whole or not.
What must hold on disk at every instant: a refcount is at least the number of references, and whatever a pointer names
is there. So a write-back goes in steps, each behind a barrier of the one before:

    0   new refcount blocks, a new refcount table
    1   the refcount table's entries, or the header's pointer to a new table; refcounts; L2 tables that no durable L1
        entry names yet; and the guest data written so far, with it the data file's
    2   L1 entries and L2 entries: now everything that they name is durable
    -   what lost its last pointer in step 2 may be reclaimed

Step 2 comes last, so data is durable before the entry that shows it, and a refcount before the pointer that it counts.
A refcount falls only in memory, after a write-back in which the pointer went, and reaches the disk with the next one. A
step with nothing to write is skipped, its barrier too: a flush after writes in place is one barrier.

What is to be written is taken at one moment, under the image's lock, and written without it: requests go on, and what
they change belongs to the next write-back. One runs at a time. After a failed write everything taken counts as changed
again; after a failed barrier the image takes no more changes (see `image_file`).

**What may be torn.** Entries of tables and refcounts never straddle a sector, and any mixture of old and new ones is
sound within a step. Header fields change in one sector.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from qcow2_plugin.engine.allocator import Allocator, RefcountWrites, Retired
from qcow2_plugin.engine.image_file import ImageFile, Structure
from qcow2_plugin.engine.requests import Requests
from qcow2_plugin.engine.written_tables import TableWrites, WrittenTables
from qcow2_plugin.storage import WritableStorage


class _Reclaimable(NamedTuple):
    """What lost its pointers, durably; requests of this epoch or before may still use it."""

    epoch: int
    retired: Retired


class _Taken(NamedTuple):
    """What one write-back is about."""

    retired: list[Retired]
    refcounts: RefcountWrites
    tables: TableWrites
    epoch: int


class WriteBack:
    """Writes back the refcounts and tables of one image; `lock` is the image's, `data` where guest data goes."""

    def __init__(
        self,
        file: ImageFile,
        data: WritableStorage,
        *,
        allocator: Allocator,
        tables: WrittenTables,
        requests: Requests,
        lock: threading.Lock,
    ) -> None:
        self._lock = lock
        self._file = file
        self._data = data
        self._allocator = allocator
        self._tables = tables
        self._requests = requests
        self.turn = threading.Lock()
        """Held by the write-back that is running; taken before the image's lock."""
        self._begun = self._done = 0
        self._reclaimable: list[_Reclaimable] = []

    def run(self) -> None:
        """Make durable everything that was acknowledged before the call. Lock: none.

        Raises FailedImageError, TruncatedImageError, OSError; what was not written is tried again by the next call,
        unless a barrier failed.
        """
        wanted = self._begun + 1
        with self.turn:
            if self._done >= wanted:  # somebody's whole run lies between
                return
            self._begun += 1
            with self._lock:
                taken = self._take()
            try:
                self._write(taken.refcounts, taken.tables)
            except BaseException:
                with self._lock:
                    self._put_back(taken)
                raise
            with self._lock:
                self._finish(taken)
            self._done = self._begun

    def run_alone(self) -> None:
        """`run` for whoever holds the turn and the lock, with everything standing still. Raises as `run` does.

        What the caller has written to the image file is durable as well if a refcount or a table has changed, or if
        there is no data file; else that takes a barrier of its own.
        """
        taken = self._take()
        try:
            self._write(taken.refcounts, taken.tables)
        except BaseException:
            self._put_back(taken)
            raise
        self._finish(taken)

    def _take(self) -> _Taken:
        self._file.require_writable()
        self._file.require_uncut()
        return _Taken(
            self._allocator.take_retired(),
            self._allocator.take_writes(),
            self._tables.take_writes(),
            self._requests.end_epoch(),
        )

    def _put_back(self, taken: _Taken) -> None:
        self._allocator.put_back(taken.refcounts)
        self._allocator.put_back_retired(taken.retired)
        self._tables.put_back()

    def _finish(self, taken: _Taken) -> None:
        self._allocator.written()
        self._tables.written(taken.tables)
        self._reclaimable += [_Reclaimable(taken.epoch, retired) for retired in taken.retired]
        oldest = self._requests.oldest
        while self._reclaimable and self._reclaimable[0].epoch < oldest:
            self._allocator.reclaim(self._reclaimable[0].retired)
            del self._reclaimable[0]

    def _write(self, refcounts: RefcountWrites, tables: TableWrites) -> None:
        has_pointers = bool(tables.l1_entries or tables.slices)
        write_refcounts(self._file, refcounts)
        for host_offset, data in tables.unpublished:
            self._file.write(Structure.L2_TABLE, data, host_offset)
        if self._data is not self._file.storage:
            self._file.barrier(self._data)
        if self._data is self._file.storage or has_pointers or refcounts.has_any:
            self._file.barrier()
        if not has_pointers:
            return
        self._tables.publish(tables)
        for host_offset, data in tables.l1_entries:
            self._file.write(Structure.L1_TABLE, data, host_offset)
        for host_offset, data in tables.slices:
            self._file.write(Structure.L2_TABLE, data, host_offset)
        self._file.barrier()

    @property
    def has_work(self) -> bool:
        """Refcounts or tables differ from the disk, or clusters wait to be reclaimed. Lock: the image's."""
        return bool(self._allocator.has_changes or self._tables.has_changes or self._reclaimable)


def write_refcounts_now(file: ImageFile, allocator: Allocator) -> None:
    """Write the refcounts alone, for whoever holds the turn and the lock; the barrier behind them is the caller's.

    Raises CorruptImageError, OSError; what was not written counts as changed still.
    """
    writes = allocator.take_writes()
    try:
        write_refcounts(file, writes)
    except BaseException:
        allocator.put_back(writes)
        raise
    allocator.written()


def write_refcounts(file: ImageFile, writes: RefcountWrites) -> None:
    """Steps 0 and 1 for refcounts; the barrier behind step 1 is the caller's. Raises CorruptImageError, OSError."""
    for host_offset, data in writes.new_blocks:
        file.write(Structure.REFCOUNT_BLOCK, data, host_offset)
    if writes.table is not None:
        file.write(Structure.REFCOUNT_TABLE, writes.table[1], writes.table[0])
    if writes.new_blocks or writes.table is not None:
        file.barrier()
    if writes.table is not None:
        file.update_header(refcount_table_offset=writes.table[0], refcount_table_clusters=writes.table_clusters)
    for host_offset, data in writes.entries:
        file.write(Structure.REFCOUNT_TABLE, data, host_offset)
    for host_offset, data in writes.blocks:
        file.write(Structure.REFCOUNT_BLOCK, data, host_offset)
