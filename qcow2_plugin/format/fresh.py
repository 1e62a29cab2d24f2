"""The layout of a new image, in closed form: where its structures lie, and the bytes that they hold.

    header | refcount table | refcount blocks | L1 table | L2 tables | data clusters

There are no gaps, so a few long writes make an image of any size. L2 tables exist where guest clusters are mapped
beforehand, data clusters where these are not in an external data file.

It is the layout of QEMU's new images, byte for byte, as long as one refcount block describes the whole file, and one L2
table maps what is kept in it. Of larger images QEMU strews blocks and tables between the data.

Source: docs/interop/qcow2.rst, "Host cluster management" and "Cluster mapping".
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from qcow2_plugin.errors import OptionError
from qcow2_plugin.format.geometry import MAX_L1_ENTRIES, MAX_REFCOUNT_TABLE_SIZE, SUBCLUSTERS, Geometry

_COPIED = 1 << 63
_END_OF_HOST_OFFSETS = 1 << 56
_ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1
_CHUNK = 1 << 20
"""Bytes of L2 tables made at once: few enough to stay in the processor's cache until they are written."""


class Places(Protocol):
    """What the header tells of a layout. Offsets in bytes."""

    @property
    def geometry(self) -> Geometry:
        """Of its clusters."""

    @property
    def virtual_size(self) -> int:
        """Bytes of the disk."""

    @property
    def l1_size(self) -> int:
        """Entries of the L1 table."""

    @property
    def l1_table_offset(self) -> int:
        """Where the L1 table is."""

    @property
    def refcount_table_offset(self) -> int:
        """Where the refcount table is."""

    @property
    def refcount_table_clusters(self) -> int:
        """Clusters of the refcount table."""

    @property
    def refcount_order(self) -> int:
        """The logarithm to base 2 of the bits of a refcount."""


@dataclass(frozen=True, slots=True)
class DenseRefcounts:
    """The refcounts of a file without gaps, each of them 1: a table, and right behind it the blocks."""

    geometry: Geometry
    refcount_order: int
    table_clusters: int
    block_count: int

    @classmethod
    def of(cls, geometry: Geometry, refcount_order: int, others: int) -> DenseRefcounts:
        """Those of `others` clusters, the table and themselves. Raises OptionError if the table gets too large."""
        table_entries = geometry.cluster_size // 8
        per_block = geometry.cluster_size * 8 >> refcount_order
        table, blocks = 1, 1
        while True:
            needed_blocks = -(-(others + table + blocks) // per_block)
            needed_table = -(-needed_blocks // table_entries)
            if (needed_table, needed_blocks) == (table, blocks):
                break
            table, blocks = needed_table, needed_blocks
        if table * geometry.cluster_size > MAX_REFCOUNT_TABLE_SIZE:
            raise OptionError(
                f"{others} clusters of {geometry.cluster_size} bytes are too many for refcounts of "
                f"{1 << refcount_order} bits; take larger clusters or fewer bits"
            )
        return cls(geometry, refcount_order, table, blocks)

    def table(self, first_block: int) -> bytes:
        """All of the refcount table; `first_block` is the host offset of the first block."""
        table = _offsets(first_block, self.block_count, self.geometry.cluster_size)
        return table.ljust(self.table_clusters * self.geometry.cluster_size, b"\0")

    def blocks(self, used: int) -> list[bytes]:
        """All refcount blocks, when `used` clusters are in use."""
        per_block = self.geometry.cluster_size * 8 >> self.refcount_order
        full = self._block(per_block)
        rest = used - (self.block_count - 1) * per_block
        return [full] * (self.block_count - 1) + [self._block(rest)]

    def _block(self, used: int) -> bytes:
        """A block whose first `used` refcounts are 1."""
        if self.refcount_order >= 3:
            block = (1).to_bytes(1 << self.refcount_order - 3, "big") * used
        else:
            bits = 1 << self.refcount_order
            whole_byte = sum(1 << position for position in range(0, 8, bits))
            whole_bytes, rest = divmod(used, 8 // bits)
            block = bytes([whole_byte]) * whole_bytes + bytes([whole_byte & (1 << rest * bits) - 1])
        return block.ljust(self.geometry.cluster_size, b"\0")[: self.geometry.cluster_size]


@dataclass(frozen=True, slots=True)
class FreshLayout:
    """`is_mapped`: every guest cluster has an L2 entry from the start. Offsets and sizes in bytes."""

    geometry: Geometry
    refcount_order: int
    virtual_size: int
    is_mapped: bool = False
    has_data_file: bool = False
    l1_size: int = field(init=False)
    """Entries."""
    mapped_clusters: int = field(init=False)
    refcount_table_clusters: int = field(init=False)
    refcount_block_count: int = field(init=False)
    refcount_table_offset: int = field(init=False)
    l1_table_offset: int = field(init=False)
    """0 if there is no entry."""
    l2_offset: int = field(init=False)
    """Of the first L2 table."""
    data_offset: int = field(init=False)
    """Of guest cluster 0, if mapped; 0 with a data file."""
    file_size: int = field(init=False)
    cluster_count: int = field(init=False)
    """Clusters of the file in use."""
    _refcounts: DenseRefcounts = field(init=False)

    def __post_init__(self) -> None:
        """Raises OptionError if the format has no place for so much."""
        geometry = self.geometry
        cluster_size = geometry.cluster_size
        l1_size = geometry.l1_entries_for(self.virtual_size)
        if l1_size > MAX_L1_ENTRIES:
            raise OptionError(
                f"a disk of {self.virtual_size} bytes is too large: clusters of {cluster_size} bytes are good for "
                f"{MAX_L1_ENTRIES * geometry.l2_coverage}; take larger clusters, or a smaller disk"
            )
        mapped_clusters = -(-self.virtual_size // cluster_size) if self.is_mapped else 0
        data_clusters = 0 if self.has_data_file else mapped_clusters
        l1_clusters = -(-l1_size * 8 // cluster_size)
        l2_tables = -(-mapped_clusters // geometry.l2_entries)
        refcounts = DenseRefcounts.of(geometry, self.refcount_order, 1 + l1_clusters + l2_tables + data_clusters)
        l1_cluster = 1 + refcounts.table_clusters + refcounts.block_count
        l2_cluster = l1_cluster + l1_clusters
        data_cluster = l2_cluster + l2_tables
        if max(data_cluster + data_clusters, mapped_clusters) * cluster_size > _END_OF_HOST_OFFSETS:
            raise OptionError(f"a disk of {self.virtual_size} bytes is too large for preallocation")
        end = l1_cluster * cluster_size + l1_size * 8
        if data_clusters:
            end = data_cluster * cluster_size + _rounded_up(self.virtual_size, geometry.subcluster_size)
        elif l2_tables:
            end = data_cluster * cluster_size
        derive = object.__setattr__
        derive(self, "l1_size", l1_size)
        derive(self, "mapped_clusters", mapped_clusters)
        derive(self, "refcount_table_clusters", refcounts.table_clusters)
        derive(self, "refcount_block_count", refcounts.block_count)
        derive(self, "_refcounts", refcounts)
        derive(self, "refcount_table_offset", cluster_size)
        derive(self, "l1_table_offset", l1_cluster * cluster_size if l1_size else 0)
        derive(self, "l2_offset", l2_cluster * cluster_size)
        derive(self, "data_offset", 0 if self.has_data_file else data_cluster * cluster_size)
        derive(self, "file_size", end)
        derive(self, "cluster_count", data_cluster + data_clusters)

    def refcount_table(self) -> bytes:
        """All of the refcount table."""
        return self._refcounts.table(self.refcount_table_offset + self.refcount_table_clusters * self._cluster_size)

    def refcount_blocks(self) -> list[bytes]:
        """All refcount blocks, which follow the table: 1 for every cluster in use."""
        return self._refcounts.blocks(self.cluster_count)

    @property
    def _cluster_size(self) -> int:
        return self.geometry.cluster_size

    def l1_table(self) -> bytes:
        """All entries of the L1 table, which follows the refcount blocks."""
        l2_tables = -(-self.mapped_clusters // self.geometry.l2_entries)
        table = _offsets(_COPIED | self.l2_offset, l2_tables, self.geometry.cluster_size)
        return table.ljust(self.l1_size * 8, b"\0")

    def l2_tables(self, *, data_is_there: bool) -> Iterator[memoryview]:
        """All L2 tables, which follow the L1 table at `l2_offset`, piece by piece.

        A piece is good until the next one is asked for. With extended L2 entries `data_is_there` says that the data
        clusters hold data already; otherwise they are reserved, and what is in them is not read.
        """
        if not self.mapped_clusters:
            return
        import numpy as np  # who maps nothing need not wait for it

        cluster_size, entry_size = self.geometry.cluster_size, self.geometry.l2_entry_size
        per_piece = min(_CHUNK // entry_size, self.mapped_clusters)
        steps = np.arange(per_piece, dtype=np.uint64) * np.uint64(cluster_size)
        entries = np.empty(per_piece, dtype=np.uint64)
        words = np.zeros((per_piece, entry_size // 8), dtype=">u8")
        if data_is_there:
            words[:, 1:] = _ALL_SUBCLUSTERS
        for first in range(0, self.mapped_clusters, per_piece):
            np.add(steps, np.uint64(_COPIED | self.data_offset + first * cluster_size), out=entries)
            words[:, 0] = entries
            count = min(per_piece, self.mapped_clusters - first)
            yield words[:count].reshape(-1).view(np.uint8).data
        yield memoryview(bytes(-self.mapped_clusters * entry_size % cluster_size))


def _offsets(first: int, count: int, step: int) -> bytes:
    """Big-endian words that ascend by `step`."""
    words = array("Q", range(first, first + count * step, step))
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
