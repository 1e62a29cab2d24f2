"""Refcounts from the tables: what they have to be, and putting an image right whose refcounts are stale.

An image with lazy refcounts that was not closed is dirty: its L1 and L2 tables are right, its refcounts and COPIED
flags may not be. Nothing may be allocated or overwritten in it before they are.

`rebuild_refcounts` counts, writes refcounts that differ, then L1 and L2 entries whose COPIED flag differs, and after a
barrier clears the dirty bit. Until then the image is dirty: whatever of this a crash leaves behind, nobody believes a
refcount or a flag in it, and the next writer begins anew. So the order inside does not matter, and every step may be
done twice. A refcount block that is missing is added; it becomes a reference itself, and is counted the next time.

Nothing changes before everything was counted: an image in which something refers to a place past the end of the file,
or to one cluster more often than a refcount can say, is left as it was.

Source: docs/interop/qcow2.rst, "Header" (the dirty bit), "Host cluster management".
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.engine.image_file import Clusters, ImageFile, Structure
from qcow2_plugin.engine.metadata import l2_tables, structures
from qcow2_plugin.engine.writeback import write_refcounts_now
from qcow2_plugin.errors import CorruptImageError, TruncatedImageError, UnsupportedFeatureError
from qcow2_plugin.format.entries import COMPRESSED, COPIED, OFFSET_MASK, Entries, compressed_locations
from qcow2_plugin.format.header import INCOMPATIBLE_DIRTY, Header
from qcow2_plugin.storage import Storage

References = npt.NDArray[np.uint32]

_MAX_CLUSTERS = 1 << 31
"""Clusters of a file whose references are counted."""
_MAX_REFERENCES = (1 << 32) - 1
"""To one cluster."""
_BLOCKS_AT_ONCE = 64
"""Refcount blocks that are changed in memory before they are written."""


def rebuild_refcounts(file: ImageFile, allocator: Allocator) -> None:
    """Make refcounts and COPIED flags those that follow from the tables, and clear the dirty bit, durably.

    Tables that were read before may have other flags than those on disk now. Raises CorruptImageError,
    TruncatedImageError, UnsupportedFeatureError; OSError. Lock: the image's; no write-back may be running.
    """
    header = file.header
    references = count_references(file.storage, header)
    if header.refcount_order < 6 and int(references.max()) >> header.refcount_bits:
        cluster = int(references.argmax())
        raise CorruptImageError(
            "refcount block",
            f"{int(references[cluster])} references do not fit into a refcount",
            host_offset=cluster << header.cluster_bits,
            file=file.storage.path,
        )
    _set_refcounts(file, allocator, references)
    _correct_flags(file, references)
    file.barrier()
    file.update_header(incompatible_features=header.incompatible_features & ~INCOMPATIBLE_DIRTY)
    file.barrier()


def count_references(storage: Storage, header: Header) -> References:
    """How often every cluster of the image file is referred to.

    Memory: 4 bytes for each cluster of the file, as far as there are references near it, and one L2 table. Every L2
    table is read once. Raises CorruptImageError, TruncatedImageError if something refers to a place past the end of
    the file, UnsupportedFeatureError if the file is too large; OSError.
    """
    cluster_count = -(-storage.size() >> header.cluster_bits)
    if cluster_count > _MAX_CLUSTERS:
        raise UnsupportedFeatureError(
            f"the file has {cluster_count} clusters, too many to count the references to them", file=storage.path
        )
    counter = _Counter(storage, header, np.zeros(cluster_count, dtype=np.uint32))
    tables, times = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for structure, clusters in structures(storage, header):
        if structure in (Structure.L2_TABLE, Structure.SNAPSHOT_L2_TABLE):
            tables, times = _merged(tables, times, clusters)
        else:
            counter.add(structure.title, clusters)
    for cluster, count in zip(tables.tolist(), times.tolist(), strict=True):
        counter.add_l2_table(cluster, count)
    return counter.references


def _merged(tables: Clusters, times: Clusters, more: Clusters) -> tuple[Clusters, Clusters]:
    """Distinct L2 tables and how often each is named, with `more` that are named."""
    distinct, inverse = np.unique(np.concatenate((tables, more)), return_inverse=True)
    totals = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(totals, inverse, np.concatenate((times, np.ones(len(more), dtype=np.int64))))
    return distinct, totals


class _Counter:
    """Counts references in one file."""

    def __init__(self, storage: Storage, header: Header, references: References) -> None:
        self.references = references
        self._storage = storage
        self._header = header
        self._cluster_bits = header.cluster_bits

    def add_l2_table(self, cluster: int, times: int) -> None:
        """The table in this cluster is named so many times, and so is what it names."""
        self.add("L1 table", np.array([cluster], dtype=np.int64), times)
        stored = _read_l2_table(self._storage, self._header, cluster)
        if self._header.has_data_file:
            return  # what the entries name is in the other file
        entries = _entries_of(np.frombuffer(stored, dtype=">u8").astype(np.uint64), self._header)
        compressed = (entries & np.uint64(COMPRESSED)) != 0
        host_offsets = (entries[~compressed] & np.uint64(OFFSET_MASK)).astype(np.int64)
        host_offsets = host_offsets[host_offsets != 0]
        lengths = np.full(len(host_offsets), 1 << self._cluster_bits, dtype=np.int64)
        stream_offsets, stream_lengths = compressed_locations(entries[compressed], self._cluster_bits)
        for offsets_and_lengths in ((host_offsets, lengths), (stream_offsets, stream_lengths)):
            for clusters in self._touched(*offsets_and_lengths):
                self.add("L2 table", clusters, times, cluster << self._cluster_bits)

    def _touched(self, host_offsets: Clusters, lengths: Clusters) -> Iterator[Clusters]:
        """The first cluster that each range touches, then the second ones where there are such, and so on."""
        clusters = host_offsets >> self._cluster_bits
        last = host_offsets + lengths - 1 >> self._cluster_bits
        while clusters.size:
            yield clusters
            goes_on = clusters < last
            clusters, last = clusters[goes_on] + 1, last[goes_on]

    def add(self, structure: str, clusters: Clusters, times: int = 1, host_offset: int | None = None) -> None:
        """A structure, the one at `host_offset`, refers to each of these clusters so many times."""
        if not clusters.size:
            return
        distinct, counts = np.unique(clusters, return_counts=True)
        if int(distinct[-1]) >= len(self.references):
            raise TruncatedImageError(
                structure,
                f"refers to host offset {int(distinct[-1]) << self._cluster_bits:#x} past the end of the file",
                host_offset=host_offset,
                file=self._storage.path,
            )
        totals = self.references[distinct] + counts.astype(np.uint64) * np.uint64(times)
        if int(totals.max()) > _MAX_REFERENCES:
            raise CorruptImageError(
                structure, "refers to a cluster too often", host_offset=host_offset, file=self._storage.path
            )
        self.references[distinct] = totals


def _set_refcounts(file: ImageFile, allocator: Allocator, references: References) -> None:
    """Write the refcounts that differ, some blocks at a time."""
    per_block = allocator.per_block
    slot_count = max(-(-len(references) // per_block), allocator.table_run[1] << file.header.cluster_bits - 3)
    changed_count = 0
    for slot in range(slot_count):
        refcounts = references[slot * per_block : (slot + 1) * per_block].astype(np.uint64)
        changed_count += allocator.set_refcounts(slot, refcounts)
        if changed_count == _BLOCKS_AT_ONCE:
            write_refcounts_now(file, allocator)
            changed_count = 0
    write_refcounts_now(file, allocator)  # among them, what an attempt before could not write


def _correct_flags(file: ImageFile, references: References) -> None:
    """Write the entries of the active tables whose COPIED flag is not what the references say."""
    header, storage = file.header, file.storage
    tables = l2_tables(storage, header, header.l1_table_offset, header.l1_size)
    stored = read_structure(storage, "L1 table", header.l1_table_offset, 8 * header.l1_size)
    _correct(file, Structure.L1_TABLE, header.l1_table_offset, stored, references)
    if header.has_data_file:
        return  # COPIED says there that a cluster is allocated, and what it names has no refcount
    for cluster in np.unique(tables).tolist():
        stored = _read_l2_table(storage, header, cluster)
        _correct(file, Structure.L2_TABLE, cluster << header.cluster_bits, stored, references)


def _correct(file: ImageFile, structure: Structure, place: int, stored: bytes, references: References) -> None:
    """Correct one table, of which `stored` is on disk."""
    words = np.frombuffer(stored, dtype=">u8").astype(np.uint64)
    entries = _entries_of(words, file.header) if structure is Structure.L2_TABLE else words
    offsets = entries & np.uint64(OFFSET_MASK)
    named = (offsets != 0) & ((entries & np.uint64(COMPRESSED)) == 0)
    flagged = (entries & np.uint64(COPIED)) != 0
    single = np.zeros(len(entries), dtype=np.bool_)
    single[named] = references[(offsets[named] >> np.uint64(file.header.cluster_bits)).astype(np.int64)] == 1
    wrong = np.flatnonzero(named & (flagged != single))
    if not wrong.size:
        return
    entries[wrong] ^= np.uint64(COPIED)
    step = len(words) // len(entries)
    first, end = int(wrong[0]) * step, (int(wrong[-1]) + 1) * step
    file.write(structure, words[first:end].astype(">u8").tobytes(), place + 8 * first)


def _read_l2_table(storage: Storage, header: Header, cluster: int) -> bytes:
    return read_structure(storage, "L2 table", cluster << header.cluster_bits, header.geometry.cluster_size)


def _entries_of(words: Entries, header: Header) -> Entries:
    """The entries in the words of an L2 table, without the bitmaps of extended ones; a view."""
    return words[::2] if header.extended_l2 else words
