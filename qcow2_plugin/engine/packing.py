"""A new image whose clusters are compressed, written from front to back while they are.

    header | stored clusters and L2 tables, as they come | L1 table | refcount table | refcount blocks

Compressed clusters stand one behind the other without regard to host clusters, as closely as the format allows; a
cluster that gets no shorter is stored as it is, in a host cluster of its own. The space behind the compressed bytes
before it is not lost: they go on there as long as they fit. L2 tables follow the data below them, some at a time, so
what is kept in memory is 2 bytes for each host cluster. Where everything stands is known at the end, and the header is
written last.

Threads read and compress some clusters at once; one takes the results in their order, so that the same disk makes the
same bytes, however many threads there are.

Source: docs/interop/qcow2.rst, "Compressed Clusters Descriptor", "Host cluster management".
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qcow2_plugin.engine.codec import Encoder
from qcow2_plugin.engine.copy_out import Told
from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.in_order import in_order
from qcow2_plugin.engine.zeros import data_runs
from qcow2_plugin.errors import OptionError
from qcow2_plugin.extent import parts
from qcow2_plugin.format.entries import COPIED, ZERO, compressed_entry
from qcow2_plugin.format.fresh import DenseRefcounts
from qcow2_plugin.format.geometry import Geometry
from qcow2_plugin.format.member_layout import REFCOUNT_ORDER, ClusterUses, l1_table
from qcow2_plugin.storage import Buffer
from qcow2_plugin.storage.early import EarlyWriting
from qcow2_plugin.storage.file import FileStorage

_BATCH = 1 << 20
"""Bytes that a thread reads and compresses at once."""
_TABLES_AT_ONCE = 1 << 20
_WRITE_AT_ONCE = 1 << 20

Progress = Callable[[int, int], None]


class _Batch(NamedTuple):
    """Clusters in line below one L2 table."""

    first: int
    cluster_count: int


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the tables of the image ended up. Offsets in bytes, `l1_size` in entries."""

    geometry: Geometry
    virtual_size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    file_size: int
    read: int
    """Bytes of the disk."""
    data: int
    """Bytes of them that are not zeros, by clusters."""
    refcount_order: int = REFCOUNT_ORDER


def write_packed(
    image: Image,
    uses: ClusterUses,
    target: FileStorage,
    encoder: Encoder,
    threads: int,
    *,
    is_alone: bool,
    told: Told | None = None,
    progress: Progress | None = None,
) -> PackedLayout:
    """Write everything but the header cluster of an image of these clusters of `image`.

    `is_alone`: it has no backing file, so that clusters which turn out to be zeros need not be told of.
    `told` is told of all bytes that are read, in parts as for `copy_ranges`, `progress` (done, total) bytes of them.
    Raises what reading raises, OptionError if the image gets too large, OSError.
    """
    zero_entry = 0 if is_alone else ZERO
    return _Packer(image, uses, target, encoder, zero_entry=zero_entry, told=told).write(threads, progress)


class _Packer:
    def __init__(
        self,
        image: Image,
        uses: ClusterUses,
        target: FileStorage,
        encoder: Encoder,
        *,
        zero_entry: int,
        told: Told | None,
    ) -> None:
        self._image = image
        self._uses = uses
        self._encoder = encoder
        self._zero_entry = zero_entry
        self._told = told
        self._cluster_bits = uses.geometry.cluster_bits
        self._cluster_size = uses.geometry.cluster_size
        self._space = _Space(uses.geometry)
        self._writer = _Writer(target)
        self._tables: list[tuple[int, bytes]] = []
        self._table_offsets: dict[int, int] = {}
        self._read = 0
        self._data = 0

    def write(self, threads: int, progress: Progress | None) -> PackedLayout:
        total = sum(self._length(batch) for batch in self._batches())
        entries = self._uses.geometry.l2_entries
        indexes = iter(self._uses.indexes())
        index, table = -1, np.zeros(0, dtype=np.uint64)
        batches = self._batches()
        for stored in in_order(self._compressed, self._batches(), threads):
            batch = next(batches)
            while index < batch.first // entries:
                self._keep_table(index, table)
                index = next(indexes)
                table = self._uses.zero_entries(index)
            for place, cluster in enumerate(stored, batch.first % entries):
                table[place] = self._zero_entry if cluster is None else self._store(cluster)
            self._read += self._length(batch)
            if progress is not None:
                progress(self._read, total)
        self._keep_table(index, table)
        for rest in indexes:
            self._keep_table(rest, self._uses.zero_entries(rest))
        self._write_tables()
        return self._finish()

    def _batches(self) -> Iterator[_Batch]:
        limit = min(max(_BATCH // self._cluster_size, 1), self._uses.geometry.l2_entries)
        for run in self._uses.data_runs():
            for first, end in parts(run.first, run.first + run.cluster_count, limit):
                yield _Batch(first, end - first)

    def _length(self, batch: _Batch) -> int:
        """Bytes of the disk; the last cluster may be a part of one."""
        start = batch.first * self._cluster_size
        return min(batch.cluster_count * self._cluster_size, self._image.virtual_size - start)

    def _compressed(self, batch: _Batch) -> list[Buffer | None]:
        """What is to be stored of each cluster: shorter than one if it could be, None for zeros."""
        start, length = batch.first * self._cluster_size, self._length(batch)
        buffer = memoryview(bytearray(batch.cluster_count * self._cluster_size))
        self._image.read_into(buffer[:length], start)
        if self._told is not None:
            self._told(start, length, buffer[:length])
        stored: list[Buffer | None] = [None] * batch.cluster_count
        for first, end in data_runs(buffer, self._cluster_size):
            for offset in range(first, end, self._cluster_size):
                cluster = buffer[offset : offset + self._cluster_size]
                stored[offset // self._cluster_size] = self._encoder.compress(cluster) or cluster
        return stored

    def _store(self, cluster: Buffer) -> int:
        """Write a stored cluster; its L2 entry."""
        self._data += self._cluster_size
        if len(cluster) < self._cluster_size:
            host_offset = self._space.take_packed(len(cluster))
            entry = compressed_entry(host_offset, len(cluster), self._cluster_bits)
        else:
            host_offset = self._space.take_clusters(1)
            entry = COPIED | host_offset
        self._writer.write(cluster, host_offset)
        return entry

    def _keep_table(self, index: int, table: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        if index < 0:
            return
        self._tables.append((index, table.astype(">u8").tobytes()))
        if len(self._tables) * self._cluster_size >= _TABLES_AT_ONCE:
            self._write_tables()

    def _write_tables(self) -> None:
        host_offset = self._space.take_clusters(len(self._tables))
        for index, table in self._tables:
            self._table_offsets[index] = host_offset
            self._writer.write(table, host_offset)
            host_offset += self._cluster_size
        self._tables.clear()

    def _finish(self) -> PackedLayout:
        geometry, cluster_size = self._uses.geometry, self._cluster_size
        l1_size = self._uses.l1_size
        l1_clusters = -(-l1_size * 8 // cluster_size)
        l1_offset = self._space.take_clusters(l1_clusters)
        self._writer.write(l1_table(l1_size, self._table_offsets).ljust(l1_clusters * cluster_size, b"\0"), l1_offset)
        refcounts = DenseRefcounts.of(geometry, REFCOUNT_ORDER, len(self._space.refcounts))
        table_offset = self._space.take_clusters(refcounts.table_clusters)
        block_offset = self._space.take_clusters(refcounts.block_count)
        self._writer.write(refcounts.table(block_offset), table_offset)
        blocks = np.frombuffer(self._space.refcounts, dtype=np.uint16).astype(">u2").tobytes()
        self._writer.write(blocks.ljust(refcounts.block_count * cluster_size, b"\0"), block_offset)
        self._writer.flush()
        return PackedLayout(
            geometry=geometry,
            virtual_size=self._uses.virtual_size,
            l1_size=l1_size,
            l1_table_offset=l1_offset if l1_size else 0,
            refcount_table_offset=table_offset,
            refcount_table_clusters=refcounts.table_clusters,
            file_size=self._space.end,
            read=self._read,
            data=self._data,
        )


class _Space:
    """The host clusters of a file that only grows, and their refcounts; the first one is the header's."""

    def __init__(self, geometry: Geometry) -> None:
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._limit = 1 << min(70 - geometry.cluster_bits, 56)
        self._packed = self._packed_end = 0
        self.refcounts = array("H", [1])

    @property
    def end(self) -> int:
        """Of all that was taken, in bytes."""
        return len(self.refcounts) << self._cluster_bits

    def take_clusters(self, count: int) -> int:
        """The host offset of so many clusters in line. Raises OptionError if there are no more."""
        host_offset = self.end
        if host_offset + (count << self._cluster_bits) > self._limit:
            raise OptionError(f"the image would have more than {self._limit} bytes; take larger clusters")
        self.refcounts.extend([1] * count)
        return host_offset

    def take_packed(self, length: int) -> int:
        """The host offset of so many bytes, fewer than a cluster's. Raises OptionError if there is no place."""
        if self._packed + length > self._packed_end:
            is_at_end = self._packed_end == self.end
            new = self.take_clusters(1)
            self.refcounts[-1] = 0
            if not is_at_end:
                self._packed = new
            self._packed_end = new + self._cluster_size
        host_offset = self._packed
        self._packed += length
        for cluster in range(host_offset >> self._cluster_bits, (self._packed - 1 >> self._cluster_bits) + 1):
            self.refcounts[cluster] += 1
        return host_offset


class _Writer:
    """Collects what stands in line in the file, and writes it together."""

    def __init__(self, target: FileStorage) -> None:
        self._target = target
        self._early = EarlyWriting(target)
        self._pieces: list[Buffer] = []
        self._start = self._end = 0

    def write(self, data: Buffer, host_offset: int) -> None:
        if host_offset != self._end or self._end - self._start >= _WRITE_AT_ONCE:
            self.flush()
            self._start = self._end = host_offset
        self._pieces.append(data)
        self._end += len(data)

    def flush(self) -> None:
        if self._pieces:
            self._target.write_vector(self._pieces, self._start)
            self._early.wrote(self._start, self._end - self._start)
            self._pieces.clear()
