"""Where the structures of a damaged image are, as far as that can be told: what a repair may write to.

`metadata` refuses an image in which two structures share a cluster or one is where none can be. A repair has to look at
just these. Its map leaves out what cannot be followed, and gives a cluster that several structures claim, or an L2
table and guest data, to none of them, so that putting right the one never destroys the other; but the header is the
header.

Memory: 8 bytes for each cluster that holds a structure, several times over while the map is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from qcow2_plugin.engine.checking.references import merged
from qcow2_plugin.engine.dirty_bitmaps.bitmaps import read_bitmaps
from qcow2_plugin.engine.distinct import distinct
from qcow2_plugin.engine.image_file import Clusters, MetadataMap, Structure
from qcow2_plugin.engine.metadata import Words
from qcow2_plugin.errors import CorruptImageError, UnsupportedFeatureError
from qcow2_plugin.format import bits
from qcow2_plugin.format.entries import OFFSET_MASK
from qcow2_plugin.format.geometry import MAX_L1_ENTRIES
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.refcounts import REFCOUNT_TABLE_OFFSET_MASK
from qcow2_plugin.format.snapshots import Snapshot, pack_table
from qcow2_plugin.storage import Storage

_MAX_CLUSTERS = 8 << 20
"""Clusters with structures that a map is made of."""
_BUFFERED = 1 << 20
"""Clusters that are gathered before those that are there twice are dropped."""
_CHUNK = 1 << 19
"""Bytes of tables that are looked at together."""


def read_damaged_map(
    storage: Storage, header: Header, snapshots: Iterable[Snapshot], not_alone: Clusters
) -> MetadataMap:
    """The map of the structures that can be followed; `snapshots` are those in the table, as far as it is read.

    `not_alone` are clusters of L2 tables that may hold guest data: an L1 entry may be wrong that leads there.

    Raises UnsupportedFeatureError if there are too many; OSError.
    """
    gathered = _Gathered(storage.path)
    for structure, clusters in _parts(storage, header, snapshots):
        gathered.add(structure, clusters)
    parts = gathered.parts()
    kept = parts[Structure.SNAPSHOT_L2_TABLE - 1][1]
    active = parts[Structure.L2_TABLE - 1][1]
    parts[Structure.SNAPSHOT_L2_TABLE - 1] = (Structure.SNAPSHOT_L2_TABLE, np.setdiff1d(kept, active))
    every = np.concatenate([clusters for _, clusters in parts])
    distinct, counts = np.unique(every, return_counts=True)
    contested = np.union1d(distinct[(counts > 1) & (distinct != 0)], not_alone[not_alone != 0])
    parts = [(structure, clusters[clusters != 0]) for structure, clusters in parts]
    parts[Structure.HEADER - 1] = (Structure.HEADER, np.zeros(1, dtype=np.int64))
    apart = [(structure, np.setdiff1d(clusters, contested)) for structure, clusters in parts]
    return MetadataMap([*apart, (Structure.CONTESTED, contested)], kept)


class _Gathered:
    """Clusters by structure, each once."""

    def __init__(self, path: str) -> None:
        none: Clusters = np.zeros(0, dtype=np.int64)
        self._path = path
        self._known: dict[Structure, Clusters] = dict.fromkeys(list(Structure)[: Structure.BITMAP], none)
        self._new: dict[Structure, list[Clusters]] = {structure: [] for structure in self._known}
        self._new_count = 0

    def add(self, structure: Structure, clusters: Clusters) -> None:
        """Raises UnsupportedFeatureError if there are too many."""
        self._new[structure].append(clusters)
        self._new_count += len(clusters)
        if self._new_count > _BUFFERED:
            self._merge()

    def parts(self) -> list[tuple[Structure, Clusters]]:
        """All of them, in the order of `Structure`. Raises UnsupportedFeatureError."""
        self._merge()
        return list(self._known.items())

    def _merge(self) -> None:
        for structure, pieces in self._new.items():
            if pieces:
                self._known[structure] = distinct(self._known[structure], *pieces)
                pieces.clear()
        self._new_count = 0
        if sum(map(len, self._known.values())) > _MAX_CLUSTERS:
            raise UnsupportedFeatureError(
                f"the image has more than {_MAX_CLUSTERS} clusters of tables, too many to repair it", file=self._path
            )


def _parts(storage: Storage, header: Header, snapshots: Iterable[Snapshot]) -> Iterator[tuple[Structure, Clusters]]:
    places = _Places(storage, header)
    yield Structure.HEADER, np.zeros(1, dtype=np.int64)
    yield Structure.L1_TABLE, places.run(header.l1_table_offset, 8 * header.l1_size)
    for l2_tables in places.l2_tables(header.l1_table_offset, header.l1_size):
        yield Structure.L2_TABLE, l2_tables
    table_size = header.refcount_table_clusters << header.cluster_bits
    yield Structure.REFCOUNT_TABLE, places.run(header.refcount_table_offset, table_size)
    for blocks in places.named(header.refcount_table_offset, table_size // 8, REFCOUNT_TABLE_OFFSET_MASK):
        yield Structure.REFCOUNT_BLOCK, blocks
    yield from _parts_of_snapshots(places, header, snapshots)
    yield from _parts_of_bitmaps(places, storage, header)


def _parts_of_snapshots(
    places: _Places, header: Header, snapshots: Iterable[Snapshot]
) -> Iterator[tuple[Structure, Clusters]]:
    known = list(snapshots)
    if known:
        yield Structure.SNAPSHOT_TABLE, places.run(header.snapshots_offset, len(pack_table(known)))
    for start, stop in snapshot_l1_ranges(header, known):
        yield Structure.SNAPSHOT_L1_TABLE, places.run(start, stop - start)
        for l2_tables in places.l2_tables(start, (stop - start) // 8):
            yield Structure.SNAPSHOT_L2_TABLE, l2_tables


def snapshot_l1_ranges(header: Header, snapshots: Iterable[Snapshot]) -> list[tuple[int, int]]:
    """Where the L1 tables of snapshots are, as far as one can be there; what several cover is there once."""
    return merged(
        (each.l1_table_offset, each.l1_table_offset + 8 * each.l1_size)
        for each in snapshots
        if not each.l1_table_offset % header.geometry.cluster_size and each.l1_size <= MAX_L1_ENTRIES
    )


def _parts_of_bitmaps(places: _Places, storage: Storage, header: Header) -> Iterator[tuple[Structure, Clusters]]:
    try:
        bitmaps, pointer = read_bitmaps(storage, header), header.bitmaps
    except CorruptImageError:  # what they take is not told; check says so
        return
    if pointer is None:
        return
    yield Structure.BITMAP, places.run(pointer.directory_offset, pointer.directory_size)
    tables = merged((each.table_offset, each.table_offset + 8 * each.table_entries) for each in bitmaps)
    for start, stop in tables:
        yield Structure.BITMAP, places.run(start, stop - start)
        for clusters in places.named(start, (stop - start) // 8, bits.TABLE_OFFSET_MASK):
            yield Structure.BITMAP, clusters


class _Places:
    """What is inside one file."""

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self._cluster_bits = header.cluster_bits
        self._ones = header.geometry.cluster_size - 1
        self._file_size = storage.size()
        self._cluster_count = -(-storage.size() >> header.cluster_bits)

    def run(self, host_offset: int, length: int) -> Clusters:
        """The clusters of a table, as far as they are in the file."""
        first, end = host_offset >> self._cluster_bits, host_offset + length + self._ones >> self._cluster_bits
        return np.arange(first, max(min(end, self._cluster_count), first), dtype=np.int64)

    def l2_tables(self, l1_table_offset: int, l1_size: int) -> Iterator[Clusters]:
        """The clusters of the L2 tables that an L1 table names and that are in the file."""
        return self.named(l1_table_offset, l1_size, OFFSET_MASK)

    def named(self, table_offset: int, count: int, mask: int) -> Iterator[Clusters]:
        """The clusters that the entries of a table name, piece by piece. Holes are not read."""
        stop = min(table_offset + 8 * count, self._file_size)
        for offset, length, is_data in self._storage.data_ranges(table_offset, max(stop - table_offset, 0)):
            for place in range(offset, offset + length if is_data else offset, _CHUNK):
                stored = self._storage.pread(min(_CHUNK, offset + length - place), place)
                entries: Words = np.frombuffer(stored[: len(stored) & ~7], dtype=">u8").astype(np.uint64)
                offsets = entries & np.uint64(mask)
                offsets = offsets[(offsets != 0) & (offsets & np.uint64(self._ones) == 0)]
                clusters: Clusters = (offsets >> np.uint64(self._cluster_bits)).astype(np.int64)
                yield clusters[clusters < self._cluster_count]
