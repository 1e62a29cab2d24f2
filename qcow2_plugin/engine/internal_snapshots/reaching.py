"""What a set of L2 tables refers to: whole tables at a time, each read once however often it is named.

A reference is counted as often as it is made: a cluster that two entries name has two, and everything below a table
that two L1 entries name has two of each. A compressed cluster refers to every host cluster that it touches. An entry
that no cluster can be behind, because its offset is not aligned, refers to nothing.

Memory: about ten times the bytes of tables looked at together.

Source: docs/interop/qcow2.rst, "Standard Cluster Descriptor", "Compressed Clusters Descriptor".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.engine.image_file import Clusters
from qcow2_plugin.format.entries import COMPRESSED, OFFSET_MASK, compressed_locations
from qcow2_plugin.format.geometry import Geometry
from qcow2_plugin.format.refcounts import runs_of
from qcow2_plugin.storage import Storage

_BATCH_SIZE = 1 << 20
"""Bytes of L2 tables looked at together; one table may be more."""
_SPREAD = 8
"""Clusters are counted in an array over their whole span if that is at most so many times as long as they are many."""


class TableBatch(NamedTuple):
    """Some L2 tables: their clusters, ascending, how often each is named, and what they hold, as on disk."""

    clusters: Clusters
    times: int
    content: bytearray


class References(NamedTuple):
    """Ascending, distinct clusters, and how many references there are to each."""

    clusters: Clusters
    counts: Clusters


def table_batches(storage: Storage, tables: Clusters, geometry: Geometry) -> Iterator[TableBatch]:
    """All of `tables`, in which each is as often as it is named. Raises TruncatedImageError, OSError."""
    distinct, counts = np.unique(tables, return_counts=True)
    at_once = max(_BATCH_SIZE // geometry.cluster_size, 1)
    for count in np.unique(counts).tolist():
        chosen = distinct[counts == count]
        for first in range(0, len(chosen), at_once):
            clusters = chosen[first : first + at_once]
            yield TableBatch(clusters, count, _read(storage, clusters, geometry.cluster_size))


def _read(storage: Storage, clusters: Clusters, cluster_size: int) -> bytearray:
    content = bytearray()
    for first, count in runs_of(clusters):
        content += read_structure(storage, "L2 table", first * cluster_size, count * cluster_size)
    return content


def entries_of(batch: TableBatch, geometry: Geometry) -> npt.NDArray[np.uint64]:
    """The L2 entries of a batch, native-endian, without the bitmaps of extended ones."""
    stored: npt.NDArray[Any] = np.frombuffer(batch.content, dtype=">u8")
    return (stored[::2] if geometry.extended_l2 else stored).astype(np.uint64)


def references(batch: TableBatch, geometry: Geometry) -> References:
    """What the entries of a batch refer to."""
    entries = entries_of(batch, geometry)
    entries = entries[entries != 0]  # most tables of a large disk are nearly empty
    compressed = (entries & np.uint64(COMPRESSED)) != 0
    if not compressed.any():
        return _counted(standard_clusters(entries, geometry), batch.times)
    plain = standard_clusters(entries[~compressed], geometry)
    return _counted(np.concatenate((plain, _touched(entries[compressed], geometry.cluster_bits))), batch.times)


def standard_clusters(entries: npt.NDArray[np.uint64], geometry: Geometry) -> Clusters:
    """The clusters that standard entries name, in their order; entries that name none are left out."""
    offsets = entries & np.uint64(OFFSET_MASK)
    unaligned = (offsets & np.uint64(geometry.cluster_size - 1)) != 0
    if unaligned.any():
        offsets[unaligned] = 0
    clusters = (offsets >> np.uint64(geometry.cluster_bits)).view(np.int64)
    return clusters if clusters.all() else clusters[clusters != 0]


def _touched(entries: npt.NDArray[np.uint64], cluster_bits: int) -> Clusters:
    """The host clusters that compressed entries touch."""
    host_offsets, lengths = compressed_locations(entries, cluster_bits)
    first, last = host_offsets >> cluster_bits, (host_offsets + lengths - 1) >> cluster_bits
    pieces = []
    while first.size:
        pieces.append(first)
        goes_on = first < last
        first, last = first[goes_on] + 1, last[goes_on]
    return np.concatenate(pieces)


def _counted(clusters: Clusters, times: int) -> References:
    """Each of `clusters` is referred to so many times for every time that it is there."""
    if not (clusters[1:] <= clusters[:-1]).any():
        return References(clusters, np.full(len(clusters), times, dtype=np.int64))
    first, last = int(clusters.min()), int(clusters.max())
    if last - first < _SPREAD * len(clusters):
        counts = np.bincount(clusters - first)
        distinct = np.flatnonzero(counts)
        return References(distinct + first, counts[distinct] * times)
    distinct, counts = np.unique(clusters, return_counts=True)
    return References(distinct, counts * times)
