"""How much of an image file a snapshot refers to, and how much it alone keeps.

What a snapshot alone keeps is what its deletion gives back: clusters whose refcount is no more than the references
from it. For that every cluster it reaches is counted, some refcount blocks' worth at a time: where those are more than
memory is meant for, its tables are read again for the next ones.

Memory: `_MAX_COUNTS_SIZE`, and what `reaching` needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.checking.stored_refcounts import StoredRefcounts
from qcow2_plugin.engine.image_file import Clusters
from qcow2_plugin.engine.internal_snapshots.reaching import References, references, table_batches
from qcow2_plugin.engine.internal_snapshots.snapshots import check_l1_table
from qcow2_plugin.engine.metadata import l2_tables
from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.refcounts import by_block
from qcow2_plugin.format.snapshots import Snapshot
from qcow2_plugin.storage import Storage

_MAX_COUNTS_SIZE = 256 << 20
"""Bytes."""
_Counts = npt.NDArray[np.uint64]


class SnapshotSizes(NamedTuple):
    """Bytes of the image file: `own` would become free without the snapshot, of `referred` it makes any use."""

    own: int
    referred: int


def snapshot_sizes(storage: Storage, header: Header, snapshots: Sequence[Snapshot]) -> Iterator[SnapshotSizes]:
    """The sizes of each, by what is on disk.

    Raises CorruptImageError, also if L1 tables overlap, which could make a small file say much; TruncatedImageError,
    OSError.
    """
    _require_apart(storage, snapshots)
    stored = StoredRefcounts(storage, header)
    for each in snapshots:
        yield _sizes(storage, header, each, stored)


def _require_apart(storage: Storage, snapshots: Sequence[Snapshot]) -> None:
    places = sorted((each.l1_table_offset, 8 * each.l1_size) for each in snapshots if each.l1_size)
    for (before, length), (host_offset, _) in pairwise(places):
        if host_offset < before + length:
            raise CorruptImageError(
                "L1 table of a snapshot", "overlaps that of another", host_offset=host_offset, file=storage.path
            )


def _sizes(storage: Storage, header: Header, snapshot: Snapshot, stored: StoredRefcounts) -> SnapshotSizes:
    check_l1_table(snapshot, storage, header, allow_damaged=False)
    tables = l2_tables(storage, header, snapshot.l1_table_offset, snapshot.l1_size)
    at_once = max(_MAX_COUNTS_SIZE // (8 * stored.per_block), 1)
    own = referred = 0
    done: set[int] = set()
    while True:
        counts, is_all = _counted(_references(storage, header, snapshot, tables), stored.per_block, done, at_once)
        for slot, found in counts.items():
            is_named = found != 0
            referred += int(np.count_nonzero(is_named))
            block = stored.block(slot)
            if block is not None:
                own += int(np.count_nonzero(is_named & (block <= found)))
        if is_all:
            return SnapshotSizes(own << header.cluster_bits, referred << header.cluster_bits)
        done.update(counts)


def _references(storage: Storage, header: Header, snapshot: Snapshot, tables: Clusters) -> Iterator[References]:
    """All that a snapshot refers to, its L1 table first."""
    first = snapshot.l1_table_offset >> header.cluster_bits
    count = -(-8 * snapshot.l1_size // header.geometry.cluster_size)
    yield References(np.arange(first, first + count, dtype=np.int64), np.ones(count, dtype=np.int64))
    yield References(*np.unique(tables, return_counts=True))
    for batch in table_batches(storage, tables, header.geometry):
        yield references(batch, header.geometry)


def _counted(
    found: Iterator[References], per_block: int, done: set[int], at_once: int
) -> tuple[dict[int, _Counts], bool]:
    """References by cluster, for some refcount blocks that are not `done`; and whether those are all."""
    counts: dict[int, _Counts] = {}
    is_all = True
    for clusters, times in found:
        for slot, start, stop in by_block(clusters, per_block):
            if slot in done:
                continue
            if slot not in counts:
                if len(counts) == at_once:
                    is_all = False
                    continue
                counts[slot] = np.zeros(per_block, dtype=np.uint64)
            counts[slot][clusters[start:stop] - slot * per_block] += times[start:stop].astype(np.uint64)
    return counts, is_all
