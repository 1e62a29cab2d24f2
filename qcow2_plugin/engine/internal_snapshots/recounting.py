"""Counting whole trees of references up and down, and keeping COPIED as the refcounts have it.

`Recount` works on an image that stands still (see `standing_still`), with all of its tables on disk: it reads them from
there and writes them there. Refcounts change in memory, as everywhere; `write` brings them to disk. When tables were
written, whoever calls this lets the cached ones be looked at anew.

Memory: the refcount blocks that change, 1 to 8 bytes for each cluster they describe, up to a limit.

**Lock.** The image's, and the turn of write-backs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.distinct import distinct
from qcow2_plugin.engine.image_file import Clusters, ImageFile, Structure
from qcow2_plugin.engine.internal_snapshots.reaching import (
    References,
    TableBatch,
    entries_of,
    references,
    standard_clusters,
    table_batches,
)
from qcow2_plugin.engine.metadata import l2_tables
from qcow2_plugin.engine.writeback import write_refcounts, write_refcounts_now
from qcow2_plugin.errors import Qcow2Error, SnapshotError, UnsupportedFeatureError
from qcow2_plugin.format.entries import COMPRESSED, COPIED, OFFSET_MASK
from qcow2_plugin.format.refcounts import runs_of

_MAX_CHANGED_SIZE = 1 << 30
"""Bytes of changed refcounts in memory."""
_COPIED_BYTE = COPIED >> 56
_NOT_COPIED = np.uint64(COPIED ^ (1 << 64) - 1)


class Recount:
    """The references of one image."""

    def __init__(self, file: ImageFile, allocator: Allocator) -> None:
        self._file = file
        self._allocator = allocator
        self._geometry = file.header.geometry

    # -- counting --

    def double(self, tables: Clusters) -> None:
        """Everything that is reached through these L2 tables, each in there as often as it is named, and the tables
        themselves get as many references again as they have from there. In memory only.

        Raises SnapshotError if a refcount does not fit its width, UnsupportedFeatureError if too many would change;
        CorruptImageError, TruncatedImageError, OSError; then nothing has changed.
        """
        done = 0
        try:
            for each in self._references(tables):
                self._allocator.count_up(*each)
                done += 1
                if self._allocator.changed_size > _MAX_CHANGED_SIZE:
                    raise UnsupportedFeatureError(
                        "the image has too many clusters in use for internal snapshots", file=self._file.storage.path
                    )
        except BaseException as error:
            self._undo(islice(self._references(tables), done))
            if isinstance(error, OverflowError):
                raise SnapshotError(
                    f"{error}; give the image wider refcounts first (option refcount_bits)",
                    file=self._file.storage.path,
                ) from None
            raise

    def halve(self, tables: Clusters) -> None:
        """Undo `double`, as far as that goes."""
        self._undo(self._references(tables))

    def _undo(self, counted: Iterator[References]) -> None:
        with suppress(Qcow2Error, OSError):  # what stays counted is a leak
            for each in counted:
                self._allocator.count_down(*each)

    def drop(self, tables: Clusters) -> None:
        """Everything that is reached through these L2 tables, and the tables, lose the references from there, which
        are gone from the disk; nobody uses them any more. What becomes free is given back.

        Raises CorruptImageError, TruncatedImageError, OSError; then what is not done is a leak.
        """
        for each in self._references(tables):
            self._allocator.punch(self._allocator.count_down(*each))
            if self._allocator.changed_size > _MAX_CHANGED_SIZE:
                write_refcounts_now(self._file, self._allocator)

    def _references(self, tables: Clusters) -> Iterator[References]:
        """The same in the same order every time: first what tables refer to, then the tables."""
        for batch in table_batches(self._file.storage, tables, self._geometry):
            found = references(batch, self._geometry)
            if self._file.metadata.any_in(found.clusters):
                raise self._file.corrupt("L2 entry", "points to a structure of the image")
            yield found
        if len(tables):
            yield References(*np.unique(tables, return_counts=True))

    # -- COPIED --

    def clear_copied(self, structure: Structure, tables: Clusters) -> bool:
        """Clear COPIED in these L2 tables, which are such a structure; True if something was written.

        Raises CorruptImageError, OSError.
        """
        has_written = False
        for batch in table_batches(self._file.storage, tables, self._geometry):
            flags = self._flags_of(batch)
            is_set = flags & _COPIED_BYTE != 0
            flags &= 0xFF ^ _COPIED_BYTE
            has_written |= self._store(structure, batch, is_set)
        return has_written

    def clear_copied_in_l1(self) -> bool:
        """Clear COPIED in the active L1 table; True if something was written. Raises CorruptImageError, OSError."""
        entries = self._read_l1()
        return self._write_l1(entries, entries & _NOT_COPIED)

    def restore_copied(self) -> None:
        """Let COPIED in the tables of the active disk be as the refcounts have it, which become durable before.

        Raises CorruptImageError, TruncatedImageError, OSError; a flag that lacks is no harm.
        """
        writes = self._allocator.take_writes()
        try:
            write_refcounts(self._file, writes)
            self._file.barrier()
        except BaseException:
            self._allocator.put_back(writes)
            raise
        header = self._file.header
        own = distinct(l2_tables(self._file.storage, header, header.l1_table_offset, header.l1_size))
        own = np.setdiff1d(own[self._allocator.refcounts_of(own) == 1], self._file.metadata.kept, assume_unique=True)
        for batch in table_batches(self._file.storage, own, self._geometry):
            self._restore_in(batch)
        entries = self._read_l1()
        clusters = ((entries & np.uint64(OFFSET_MASK)) >> np.uint64(self._geometry.cluster_bits)).astype(np.int64)
        is_own = np.isin(clusters, own)
        self._write_l1(entries, entries & _NOT_COPIED | is_own.astype(np.uint64) << np.uint64(63))
        self._allocator.written()  # only now: until here the blocks were needed

    def _restore_in(self, batch: TableBatch) -> None:
        entries = entries_of(batch, self._geometry)
        is_standard = (entries & np.uint64(COMPRESSED)) == 0
        is_standard &= (entries & np.uint64(OFFSET_MASK)) != 0
        is_standard &= (entries & np.uint64(OFFSET_MASK & self._geometry.cluster_size - 1)) == 0
        wanted = np.zeros(len(entries), dtype=np.uint8)
        clusters = standard_clusters(entries[is_standard], self._geometry)
        wanted[is_standard] = (self._allocator.refcounts_of(clusters) == 1) * np.uint8(_COPIED_BYTE)
        flags = self._flags_of(batch)
        different = is_standard & ((flags ^ wanted) & _COPIED_BYTE != 0)
        flags[different] ^= _COPIED_BYTE
        self._store(Structure.L2_TABLE, batch, different)

    def _flags_of(self, batch: TableBatch) -> npt.NDArray[np.uint8]:
        """The first byte of each entry, to be changed in place."""
        return np.frombuffer(batch.content, dtype=np.uint8)[:: self._geometry.l2_entry_size]

    def _store(self, structure: Structure, batch: TableBatch, changed: npt.NDArray[np.bool_]) -> bool:
        """Write the tables of a batch in which any entry has changed."""
        view, cluster_size = memoryview(batch.content), self._geometry.cluster_size
        places = np.unique(np.flatnonzero(changed) // self._geometry.l2_entries)
        for (first, count), number in zip(*_runs_of_two(batch.clusters[places], places), strict=True):
            data = view[number * cluster_size : (number + count) * cluster_size]
            self._file.write(structure, bytes(data), first * cluster_size)
        return bool(places.size)

    def _read_l1(self) -> npt.NDArray[np.uint64]:
        header = self._file.header
        stored = self._file.storage.pread(8 * header.l1_size, header.l1_table_offset)
        return np.frombuffer(stored, dtype=">u8").astype(np.uint64)

    def _write_l1(self, before: npt.NDArray[np.uint64], after: npt.NDArray[np.uint64]) -> bool:
        if (before == after).all():
            return False
        self._file.write(Structure.L1_TABLE, after.astype(">u8").tobytes(), self._file.header.l1_table_offset)
        return True


def _runs_of_two(clusters: Clusters, places: Clusters) -> tuple[list[tuple[int, int]], list[int]]:
    """The runs in which clusters are in line, which are those in which their places are, and the place of each."""
    runs = runs_of(clusters)
    starts = np.searchsorted(clusters, [first for first, _ in runs])
    return runs, places[starts].tolist()
