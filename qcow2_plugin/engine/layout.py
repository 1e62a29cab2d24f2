"""Is the file all there? What must hold before an image is read: tables in place, nothing cut off.

A file that was cut short looks healthy to anyone who only follows pointers until they need one: the rest of the disk
would read as zeros. So an image is held against its own books when it is opened. The refcounts name the last host
cluster in use; if that lies past the end of the file, or the refcounts cannot be trusted, every L2 table of the active
disk is looked through, once, for a real reference past the end. (A refcount alone proves nothing: a crash may leave the
refcount of a cluster that was never written.)

Source: docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

import itertools

import numpy as np

from qcow2_plugin.engine.distinct import distinct
from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.engine.tables import entry_rules
from qcow2_plugin.errors import CorruptImageError, TruncatedImageError, about_file
from qcow2_plugin.format import entries
from qcow2_plugin.format.header import Header, Table
from qcow2_plugin.format.refcounts import REFCOUNT_TABLE_OFFSET_MASK, last_used
from qcow2_plugin.storage import Storage

_MAX_SCAN = 1 << 30
_MAX_SCAN_TABLES = 65536
"""Bytes and number of L2 tables looked through at most to prove that a doubtful file is complete."""
_L1_CHUNK = 65536
"""L1 entries looked at together."""
_MAX_EMPTY_BLOCKS = 64
"""Refcount blocks without any use looked at, from the last one down."""


def check_tables(header: Header, storage: Storage, *, with_bitmaps: bool = False) -> None:
    """Raises CorruptImageError or TruncatedImageError unless the tables that the header names are in the file, behind
    the header cluster, and do not overlap.

    `with_bitmaps` counts the bitmap directory among them. Of the snapshot table only the least length is known.
    """
    file_size = storage.size()
    tables = header.tables
    if with_bitmaps:
        with about_file(storage.path):
            tables += () if header.bitmaps is None else (header.bitmaps.table,)
    for table in tables:
        if table.host_offset < header.geometry.cluster_size:
            raise _corrupt(table, "lies inside the header cluster", storage)
        if table.host_offset + table.length > file_size:
            raise TruncatedImageError(
                table.name,
                f"lies past the end of the file of {file_size} bytes: the image is truncated",
                host_offset=table.host_offset,
                file=storage.path,
            )
    for first, second in itertools.combinations(tables, 2):
        if first.overlaps(second.host_offset, second.length):
            raise _corrupt(first, f"overlaps the {second.name} at {second.host_offset:#x}", storage)


def check_complete(header: Header, storage: Storage) -> None:
    """Raises TruncatedImageError if the active disk needs bytes past the end of the file.

    `check_tables` comes first. Costs a few reads for a sound image.
    """
    if not header.dirty and _end_of_use(header, storage) <= storage.size():
        return
    rules = entry_rules(header)
    for table_offset in _distinct_l2_tables(header, storage):
        table = read_structure(storage, "L2 table", table_offset, header.geometry.cluster_size)
        if header.has_data_file:
            continue  # that the table is there is all that matters: what it points to is in the other file
        words = np.frombuffer(table, dtype=">u8").astype(np.uint64)
        if entries.end_of_storage(words, rules) > storage.size():
            raise TruncatedImageError(
                "L2 table",
                f"points past the end of the file of {storage.size()} bytes: the image is truncated",
                host_offset=table_offset,
                file=storage.path,
            )


def _end_of_use(header: Header, storage: Storage) -> int:
    """The first byte of the last host cluster with a refcount, plus one; past any file if that cannot be told."""
    unknown = 1 << 63
    table_size = header.refcount_table_clusters << header.cluster_bits
    table = np.frombuffer(storage.pread(table_size, header.refcount_table_offset), dtype=">u8")
    used = np.flatnonzero(table)
    cluster_size = header.geometry.cluster_size
    refcounts_per_block = cluster_size * 8 // header.refcount_bits
    for index in used[: -_MAX_EMPTY_BLOCKS - 1 : -1].tolist():
        block_offset = int(table[index]) & REFCOUNT_TABLE_OFFSET_MASK
        if block_offset + cluster_size > storage.size():
            return unknown
        last = last_used(storage.pread(cluster_size, block_offset), header.refcount_order)
        if last is not None:
            last_cluster: int = index * refcounts_per_block + last
            return last_cluster * cluster_size + 1
    return unknown


def _distinct_l2_tables(header: Header, storage: Storage) -> list[int]:
    """Host offsets of the L2 tables of the active disk, in ascending order."""
    l1_size = header.geometry.l1_entries_for(header.virtual_size)
    tables: set[int] = set()
    for index in range(0, l1_size, _L1_CHUNK):
        count = min(_L1_CHUNK, l1_size - index)
        chunk = np.frombuffer(storage.pread(8 * count, header.l1_table_offset + 8 * index), dtype=">u8")
        tables.update(distinct(chunk & np.uint64(entries.OFFSET_MASK)).tolist())
        tables.discard(0)
        if len(tables) > _MAX_SCAN_TABLES or len(tables) << header.cluster_bits > _MAX_SCAN:
            raise TruncatedImageError(
                "refcounts",
                "do not fit the file, and the image is too large to prove that nothing of it is missing",
                host_offset=header.refcount_table_offset,
                file=storage.path,
            )
    return sorted(tables)


def _corrupt(table: Table, detail: str, storage: Storage) -> CorruptImageError:
    return CorruptImageError(table.name, detail, host_offset=table.host_offset, file=storage.path)
