"""Where the structures of an image are in its file: what a writer must not overwrite, and what counts as a reference.

`structures` walks the image from the header: tables, refcount blocks, L1 tables of snapshots, bitmaps. `read_metadata`
makes the map of it that guards every write, and refuses an image that has no such map: one in which two structures
share a cluster, or in which one is not where it can be, or in which the active disk calls an L2 table its own that is
named twice. What L2 tables say is not looked at.

Memory: 8 bytes for each cluster that holds a structure, several times over while the map is made.

Source: docs/interop/qcow2.rst.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.dirty_bitmaps.bitmaps import read_bitmaps
from qcow2_plugin.engine.distinct import distinct
from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.engine.image_file import Clusters, MetadataMap, Structure
from qcow2_plugin.engine.internal_snapshots.snapshots import check_l1_table, read_snapshots
from qcow2_plugin.errors import CorruptImageError, TruncatedImageError, UnsupportedFeatureError, about_file
from qcow2_plugin.format import bits
from qcow2_plugin.format.bitmaps import Bitmap
from qcow2_plugin.format.entries import COPIED, OFFSET_MASK
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.refcounts import REFCOUNT_TABLE_OFFSET_MASK
from qcow2_plugin.format.snapshots import pack_table
from qcow2_plugin.storage import Storage

Words = npt.NDArray[np.uint64]

_MAX_CLUSTERS = 8 << 20
"""Clusters with structures that a map is made of: twice the L2 tables that an image can have."""
_MAX_BITMAP_TABLES_SIZE = 1 << 30
"""Bytes of bitmap tables that are read."""
_CHUNK = 65536
"""Bitmap table entries looked at together."""


def read_metadata(storage: Storage, header: Header) -> MetadataMap:
    """The map of an image's structures.

    Raises CorruptImageError if two share a cluster or one cannot be where a table says; TruncatedImageError;
    UnsupportedFeatureError if there are too many; OSError.
    """
    parts: list[tuple[Structure, Clusters]] = []
    active = kept = np.zeros(0, dtype=np.int64)
    cluster_count = 0
    for structure, clusters in structures(storage, header):
        if structure is Structure.L2_TABLE:
            active = distinct(clusters)
        elif structure is Structure.SNAPSHOT_L2_TABLE:
            kept = distinct(kept, clusters)
        else:
            parts.append((structure, clusters))
            cluster_count += len(clusters)
        if cluster_count + len(active) + len(kept) > _MAX_CLUSTERS:
            raise UnsupportedFeatureError(
                f"the image has more than {_MAX_CLUSTERS} clusters of tables, too many to write to it",
                file=storage.path,
            )
    parts.append((Structure.L2_TABLE, active))
    parts.append((Structure.SNAPSHOT_L2_TABLE, np.setdiff1d(kept, active, assume_unique=True)))
    _require_apart(parts, storage, header)
    if not header.dirty:  # of such an image the flags are put right before they are believed
        _require_own(kept, storage, header)
    return MetadataMap(parts, kept)


def structures(storage: Storage, header: Header) -> Iterator[tuple[Structure, Clusters]]:
    """The clusters of each structure, once for every reference to them, some in several parts.

    The L2 tables that the active disk shares with a snapshot are among those of either. Raises as `read_metadata` does.
    """
    places = _Places(storage, header)
    yield Structure.HEADER, np.zeros(1, dtype=np.int64)
    yield Structure.L1_TABLE, places.run("L1 table", header.l1_table_offset, 8 * header.l1_size)
    yield Structure.L2_TABLE, l2_tables(storage, header, header.l1_table_offset, header.l1_size)
    table_size = header.refcount_table_clusters << header.cluster_bits
    yield Structure.REFCOUNT_TABLE, places.run("refcount table", header.refcount_table_offset, table_size)
    table = _read_words(storage, "refcount table", header.refcount_table_offset, table_size // 8)
    table &= np.uint64(REFCOUNT_TABLE_OFFSET_MASK)
    blocks = places.named(
        "refcount block", "refcount table", header.refcount_table_offset, table, REFCOUNT_TABLE_OFFSET_MASK
    )
    yield Structure.REFCOUNT_BLOCK, blocks
    if header.snapshot_count:
        snapshots = read_snapshots(storage, header)
        table_size = len(pack_table(snapshots))
        yield Structure.SNAPSHOT_TABLE, places.run("snapshot table", header.snapshots_offset, table_size)
        for snapshot in snapshots:
            check_l1_table(snapshot, storage, header, allow_damaged=False)
            clusters = places.run("snapshot L1 table", snapshot.l1_table_offset, 8 * snapshot.l1_size)
            yield Structure.SNAPSHOT_L1_TABLE, clusters
            tables = l2_tables(storage, header, snapshot.l1_table_offset, snapshot.l1_size)
            yield Structure.SNAPSHOT_L2_TABLE, tables
    for clusters in _bitmap_clusters(storage, header, places):
        yield Structure.BITMAP, clusters


def l2_tables(storage: Storage, header: Header, l1_table_offset: int, l1_size: int) -> Clusters:
    """The clusters of the L2 tables that an L1 table names, as often as it names them, in its order.

    Raises CorruptImageError, TruncatedImageError, OSError.
    """
    entries = _read_words(storage, "L1 table", l1_table_offset, l1_size)
    entries &= np.uint64(OFFSET_MASK | COPIED)
    return _Places(storage, header).named("L2 table", "L1 table", l1_table_offset, entries, OFFSET_MASK)


class _Places:
    """What can be a place in one file."""

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self._file_size = storage.size()
        self._cluster_bits = header.cluster_bits
        self._ones = header.geometry.cluster_size - 1

    def run(self, structure: str, host_offset: int, length: int) -> Clusters:
        """The clusters of a table; its offset is aligned. Raises TruncatedImageError."""
        if host_offset + length > self._file_size:
            raise self._truncated(structure, host_offset)
        first, end = host_offset >> self._cluster_bits, host_offset + length + self._ones >> self._cluster_bits
        return np.arange(first, end, dtype=np.int64)

    def named(self, structure: str, table: str, table_offset: int, entries: Words, mask: int) -> Clusters:
        """The clusters that the entries of a table name, each for a `structure`; 0 names none.

        Raises CorruptImageError, TruncatedImageError.
        """
        offsets = entries & np.uint64(mask)
        bad = (entries != 0) & ((offsets == 0) | (offsets & np.uint64(self._ones) != 0))
        if bad.any():
            index = int(np.flatnonzero(bad)[0])
            detail = f"entry {index} is {int(entries[index]):#x}, where no {structure} can be"
            raise CorruptImageError(table, detail, host_offset=table_offset, file=self._storage.path)
        offsets = offsets[offsets != 0]
        outside = np.flatnonzero(~self.inside(offsets))
        if outside.size:
            raise self._truncated(structure, int(offsets[outside[0]]))
        clusters: Clusters = (offsets >> np.uint64(self._cluster_bits)).astype(np.int64)
        return clusters

    def inside(self, offsets: Words) -> npt.NDArray[np.bool_]:
        """For each whether a whole cluster from there on is in the file."""
        last = self._file_size - self._ones - 1
        return offsets <= np.uint64(last) if last >= 0 else np.zeros(len(offsets), dtype=np.bool_)

    def _truncated(self, structure: str, host_offset: int) -> TruncatedImageError:
        return TruncatedImageError(
            structure,
            f"lies past the end of the file of {self._file_size} bytes: the image is truncated",
            host_offset=host_offset,
            file=self._storage.path,
        )


def _bitmap_clusters(storage: Storage, header: Header, places: _Places) -> Iterator[Clusters]:
    """The clusters of the bitmap directory, of the bitmaps' tables and of their bits."""
    bitmaps = _listed_bitmaps(storage, header)
    if not bitmaps or (pointer := header.bitmaps) is None:
        return
    yield places.run("bitmap directory", pointer.directory_offset, pointer.directory_size)
    if sum(bitmap.table_entries for bitmap in bitmaps) > _MAX_BITMAP_TABLES_SIZE // 8:
        raise UnsupportedFeatureError("the image has too large bitmaps to write to it", file=storage.path)
    for bitmap in bitmaps:
        is_trusted = bitmap.unusable_reason(header.virtual_size, header.geometry.cluster_size) is None
        yield from _clusters_of(bitmap, storage, header, places, is_trusted)


def _listed_bitmaps(storage: Storage, header: Header) -> list[Bitmap]:
    try:
        return read_bitmaps(storage, header)
    except CorruptImageError as error:
        raise type(error)(
            "bitmap directory",
            f"cannot be read ({error.detail}), so bitmaps cannot follow what is written; the disk can still be read: "
            "copy it to a new image",
            file=storage.path,
        ) from error


def _clusters_of(
    bitmap: Bitmap, storage: Storage, header: Header, places: _Places, is_trusted: bool
) -> Iterator[Clusters]:
    """The clusters of one bitmap. Of one that nobody can use anyway, those that make sense."""
    try:
        yield places.run("bitmap table", bitmap.table_offset, 8 * bitmap.table_entries)
    except TruncatedImageError:
        if is_trusted:
            raise
        return
    for index in range(0, bitmap.table_entries, _CHUNK):
        count = min(_CHUNK, bitmap.table_entries - index)
        entries = _read_words(storage, "bitmap table", bitmap.table_offset + 8 * index, count)
        offsets = entries & np.uint64(bits.TABLE_OFFSET_MASK)
        if is_trusted:
            with about_file(storage.path):
                bits.check_table(entries, header.geometry.cluster_size)
        else:
            offsets = offsets[bits.is_sound(entries, header.geometry.cluster_size) & places.inside(offsets)]
        yield places.named("cluster of bits", "bitmap table", bitmap.table_offset, offsets, bits.TABLE_OFFSET_MASK)


def _require_apart(parts: list[tuple[Structure, Clusters]], storage: Storage, header: Header) -> None:
    """Raises CorruptImageError if a cluster is in there twice."""
    clusters = np.concatenate([each for _, each in parts])
    owners = np.concatenate([np.full(len(each), structure, dtype=np.uint8) for structure, each in parts])
    order = np.argsort(clusters, kind="stable")
    twice = np.flatnonzero(clusters[order[1:]] == clusters[order[:-1]])
    if not twice.size:
        return
    first, second = (Structure(int(owners[order[int(twice[0]) + step]])) for step in (0, 1))
    host_offset = int(clusters[order[int(twice[0])]]) << header.cluster_bits
    detail = f"overlaps the {second.title}" if first is not second else f"overlaps another {second.title}"
    raise CorruptImageError(first.title, detail, host_offset=host_offset, file=storage.path)


def _require_own(snapshot_tables: Clusters, storage: Storage, header: Header) -> None:
    """Raises CorruptImageError if an L2 table is written in place by the active disk (COPIED) and named elsewhere."""
    entries = _read_words(storage, "L1 table", header.l1_table_offset, header.l1_size)
    clusters = ((entries & np.uint64(OFFSET_MASK)) >> np.uint64(header.cluster_bits)).astype(np.int64)
    named, counts = np.unique(clusters[clusters != 0], return_counts=True)
    shared = distinct(named[counts > 1], snapshot_tables)
    wrong = np.flatnonzero(((entries & np.uint64(COPIED)) != 0) & np.isin(clusters, shared))
    if wrong.size:
        index = int(wrong[0])
        raise CorruptImageError(
            "L1 table",
            f"entry {index} is {int(entries[index]):#x}, but that L2 table is named elsewhere too; repair the image "
            "with 'qcow2 check -r all'",
            host_offset=header.l1_table_offset,
            file=storage.path,
        )


def _read_words(storage: Storage, structure: str, host_offset: int, count: int) -> Words:
    return np.frombuffer(read_structure(storage, structure, host_offset, 8 * count), dtype=">u8").astype(np.uint64)
