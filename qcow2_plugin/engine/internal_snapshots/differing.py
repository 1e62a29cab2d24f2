"""Where the active disk differs from a snapshot, as their tables tell it, without any data being read.

Clusters that both name are the same, since what is shared is never written to. What has moved counts as different.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.format.entries import COPIED, OFFSET_MASK, Entries
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.refcounts import runs_of
from qcow2_plugin.format.snapshots import Snapshot
from qcow2_plugin.storage import Storage

_NOT_COPIED = np.uint64(COPIED ^ (1 << 64) - 1)


def differing_ranges(storage: Storage, header: Header, snapshot: Snapshot) -> Iterator[tuple[int, int]]:
    """Start and end of the guest ranges that differ, whole clusters, ascending, some of them behind the disk; the
    tables are on disk as they are.

    Raises TruncatedImageError, OSError.
    """
    geometry = header.geometry
    tables = _l1_offsets(storage, header.l1_table_offset, header.l1_size)
    others = _l1_offsets(storage, snapshot.l1_table_offset, snapshot.l1_size)
    length = max(len(tables), len(others))
    tables, others = (np.append(each, np.zeros(length - len(each), dtype=np.uint64)) for each in (tables, others))
    for index in np.flatnonzero(tables != others).tolist():
        now, then = (_words(storage, int(each[index]), header) for each in (tables, others))
        differs = (now != then).reshape(geometry.l2_entries, -1).any(axis=1)
        for first, count in runs_of(np.flatnonzero(differs) + index * geometry.l2_entries):
            yield first << header.cluster_bits, first + count << header.cluster_bits


def _l1_offsets(storage: Storage, host_offset: int, count: int) -> Entries:
    stored = read_structure(storage, "L1 table", host_offset, 8 * count)
    return np.frombuffer(stored, dtype=">u8").astype(np.uint64) & np.uint64(OFFSET_MASK)


def _words(storage: Storage, table_offset: int, header: Header) -> Entries:
    """The words of an L2 table without COPIED; of none, zeros."""
    geometry = header.geometry
    if not table_offset:
        return np.zeros(geometry.cluster_size // 8, dtype=np.uint64)
    words = np.frombuffer(read_structure(storage, "L2 table", table_offset, geometry.cluster_size), dtype=">u8").astype(
        np.uint64
    )
    words[:: geometry.l2_entry_size // 8] &= _NOT_COPIED
    return words
