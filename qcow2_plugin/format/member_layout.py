"""The layout of an image that is written once, from front to back, with just the clusters that it needs.

    header | refcount table | refcount blocks | L1 table | L2 tables | data clusters, in the guest's order

What each cluster holds is known before any data is (`ClusterUses`), so everything in front of the data can be written,
or sent, first, and where a guest cluster will stand follows from how many come before it. L2 tables exist where
something is mapped. There are no gaps, and every refcount is 1.

An image whose data are compressed has its tables behind them, because where they stand is known last.

Source: docs/interop/qcow2.rst, "Host cluster management" and "Cluster mapping".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcow2_plugin.errors import OptionError
from qcow2_plugin.format.entries import COPIED, ZERO
from qcow2_plugin.format.fresh import DenseRefcounts
from qcow2_plugin.format.geometry import MAX_L1_ENTRIES, Geometry

REFCOUNT_ORDER = 4
_NOTHING, _ZERO, _DATA = 0, 1, 2
_STRETCH = 1 << 16
"""Clusters; more where an L2 table has more entries."""


class ClusterRun(NamedTuple):
    """Guest clusters in line; `rank` counts the data clusters in front of the first."""

    first: int
    cluster_count: int
    rank: int


class ClusterUses:
    """What the clusters of a disk hold in the image: nothing, zeros or data.

    Kept is a byte for each cluster of a stretch in which they differ, and nothing for one of which all do the same.
    """

    def __init__(self, geometry: Geometry, virtual_size: int) -> None:
        """Raises OptionError if there can be no such disk."""
        self.geometry = geometry
        self.virtual_size = virtual_size
        self.l1_size = geometry.l1_entries_for(virtual_size)
        if self.l1_size > MAX_L1_ENTRIES:
            raise OptionError(
                f"a disk of {virtual_size} bytes is too large: clusters of {geometry.cluster_size} bytes are good for "
                f"{MAX_L1_ENTRIES * geometry.l2_coverage}; take larger clusters"
            )
        self._cluster_count = -(-virtual_size // geometry.cluster_size)
        self._stretch = max(_STRETCH, geometry.l2_entries)
        self._stretches: dict[int, int | npt.NDArray[np.uint8]] = {}

    def mark_data(self, first: int, end: int) -> None:
        """The clusters from `first` to before `end` hold data."""
        self._mark(first, end, _DATA)

    def mark_zero(self, first: int, end: int) -> None:
        """The clusters from `first` to before `end` read as zeros, whatever is below."""
        self._mark(first, end, _ZERO)

    def _mark(self, first: int, end: int, use: int) -> None:
        while first < end:
            index, within = divmod(first, self._stretch)
            stop = min(self._stretch, end - index * self._stretch)
            if within == 0 and stop == self._length(index):
                self._stretches[index] = use
            else:
                self._uses(index)[within:stop] = use
            first = index * self._stretch + stop

    def _length(self, index: int) -> int:
        """Clusters of the disk in a stretch."""
        return min(self._stretch, self._cluster_count - index * self._stretch)

    def _uses(self, index: int) -> npt.NDArray[np.uint8]:
        """What each cluster of a stretch holds, to be changed."""
        known = self._stretches.get(index, _NOTHING)
        if isinstance(known, int):
            uses = np.zeros(self._stretch, dtype=np.uint8)
            uses[: self._length(index)] = known
            self._stretches[index] = known = uses
        return known

    def indexes(self) -> list[int]:
        """Of the L1 entries with something below, ascending."""
        found: list[int] = []
        entries = self.geometry.l2_entries
        for index in sorted(self._stretches):
            first, known = index * self._stretch // entries, self._stretches[index]
            if isinstance(known, int):
                found.extend(range(first, first + -(-self._length(index) // entries)))
            else:
                found.extend((np.flatnonzero(known.reshape(-1, entries).any(axis=1)) + first).tolist())
        return found

    def count_data(self) -> int:
        """How many clusters hold data."""
        total = 0
        for index, known in self._stretches.items():
            if isinstance(known, int):
                total += self._length(index) if known == _DATA else 0
            else:
                total += int(np.count_nonzero(known == _DATA))
        return total

    def data_runs(self) -> Iterator[ClusterRun]:
        """The clusters that hold data, ascending."""
        rank = 0
        for first, end in self._runs(_DATA):
            yield ClusterRun(first, end - first, rank)
            rank += end - first

    def zero_runs(self) -> Iterator[tuple[int, int]]:
        """(first, count) of the clusters that are said to be zeros, ascending."""
        return ((first, end - first) for first, end in self._runs(_ZERO))

    def _runs(self, use: int) -> Iterator[tuple[int, int]]:
        """(first, end) of the clusters of this use, ascending; those of two stretches are two runs."""
        for index in sorted(self._stretches):
            base, known = index * self._stretch, self._stretches[index]
            if isinstance(known, int):
                if known == use:
                    yield base, base + self._length(index)
                continue
            edges = (np.flatnonzero(np.diff(known == use, prepend=False, append=False)) + base).tolist()
            yield from zip(edges[::2], edges[1::2], strict=True)

    def _below(self, index: int) -> npt.NDArray[np.uint8]:
        """What each cluster below an L1 entry holds."""
        entries = self.geometry.l2_entries
        stretch, first = divmod(index * entries, self._stretch)
        known = self._stretches.get(stretch, _NOTHING)
        if not isinstance(known, int):
            return known[first : first + entries]
        uses = np.zeros(entries, dtype=np.uint8)
        uses[: max(self._length(stretch) - first, 0)] = known
        return uses

    def zero_entries(self, index: int) -> npt.NDArray[np.uint64]:
        """The L2 table below an L1 entry with all that is not data."""
        return np.where(self._below(index) == _ZERO, np.uint64(ZERO), np.uint64(0))

    def entries(self, index: int, host_offset: int) -> tuple[npt.NDArray[np.uint64], int]:
        """The L2 table below an L1 entry, its data clusters in line from `host_offset` on, and where these end."""
        table = self.zero_entries(index)
        data = np.flatnonzero(self._below(index) == _DATA)
        steps = np.arange(len(data), dtype=np.uint64) * np.uint64(self.geometry.cluster_size)
        table[data] = steps + np.uint64(COPIED | host_offset)
        return table, host_offset + len(data) * self.geometry.cluster_size


@dataclass(frozen=True, slots=True)
class MemberLayout:
    """Where everything lies in an image of these uses. Offsets and sizes in bytes."""

    uses: ClusterUses
    geometry: Geometry = field(init=False)
    virtual_size: int = field(init=False)
    refcount_order: int = field(init=False)
    l1_size: int = field(init=False)
    """Entries."""
    refcount_table_offset: int = field(init=False)
    refcount_table_clusters: int = field(init=False)
    l1_table_offset: int = field(init=False)
    """0 if there is no entry."""
    data_offset: int = field(init=False)
    data_clusters: int = field(init=False)
    file_size: int = field(init=False)
    _refcounts: DenseRefcounts = field(init=False)
    _l2_offset: int = field(init=False)
    _indexes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Raises OptionError if the format has no place for so much."""
        geometry = self.uses.geometry
        cluster_size = geometry.cluster_size
        l1_clusters = -(-self.uses.l1_size * 8 // cluster_size)
        indexes = self.uses.indexes()
        l2_tables = len(indexes)
        data_clusters = self.uses.count_data()
        refcounts = DenseRefcounts.of(geometry, REFCOUNT_ORDER, 1 + l1_clusters + l2_tables + data_clusters)
        l1_cluster = 1 + refcounts.table_clusters + refcounts.block_count
        l2_offset = (l1_cluster + l1_clusters) * cluster_size
        data_offset = l2_offset + l2_tables * cluster_size
        derive = object.__setattr__
        derive(self, "geometry", geometry)
        derive(self, "virtual_size", self.uses.virtual_size)
        derive(self, "refcount_order", REFCOUNT_ORDER)
        derive(self, "l1_size", self.uses.l1_size)
        derive(self, "refcount_table_offset", cluster_size)
        derive(self, "refcount_table_clusters", refcounts.table_clusters)
        derive(self, "l1_table_offset", l1_cluster * cluster_size if self.uses.l1_size else 0)
        derive(self, "data_offset", data_offset)
        derive(self, "data_clusters", data_clusters)
        derive(self, "file_size", data_offset + data_clusters * cluster_size)
        derive(self, "_refcounts", refcounts)
        derive(self, "_l2_offset", l2_offset)
        derive(self, "_indexes", indexes)

    def front(self, header: bytes) -> Iterator[bytes]:
        """All that stands in front of the data, piece by piece, from the begin of the file on."""
        cluster_size = self.geometry.cluster_size
        yield header.ljust(cluster_size, b"\0")
        yield self._refcounts.table((1 + self.refcount_table_clusters) * cluster_size)
        yield from self._refcounts.blocks(self.file_size // cluster_size)
        offsets = range(self._l2_offset, self.data_offset, cluster_size)
        yield l1_table(self.l1_size, dict(zip(self._indexes, offsets, strict=True))).ljust(
            -(-self.l1_size * 8 // cluster_size) * cluster_size, b"\0"
        )
        host_offset = self.data_offset
        for index in self._indexes:
            table, host_offset = self.uses.entries(index, host_offset)
            yield table.astype(">u8").tobytes()


def l1_table(l1_size: int, tables: Mapping[int, int]) -> bytes:
    """All L1 entries; `tables` has the offsets of the L2 tables by index."""
    table = np.zeros(l1_size, dtype=np.uint64)
    for index, offset in tables.items():
        table[index] = COPIED | offset
    return table.astype(">u8").tobytes()
