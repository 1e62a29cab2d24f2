"""Several layers of a chain written as one: an image with what the top ones hold, and nothing that they hide.

**As it is stored.** Clusters go over as they are: shared blocks or the kernel's copy where the file system has that,
compressed clusters unopened. They keep their place within a sector, so that what shared one still does, and no sector
is added. What of a layer is compressed in another way than the new image is to be, and clusters that more than one
layer has a part in, go through the image and are stored plainly.

**Layout.** header | data of an L2 table, that table, data of the next one, ... | L1 table | refcounts. Compressed
clusters are packed into arenas between the plain ones. All is written in one go; what is kept in memory is one L2
table, the L1 table and two bytes for each cluster of the file.

All layers have clusters of one size and standard L2 entries, and none is longer than that above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.image import Image
from qcow2_plugin.errors import OptionError
from qcow2_plugin.extent import Extent, ExtentKind, GuestDisk
from qcow2_plugin.format.entries import COMPRESSED, COPIED, ZERO
from qcow2_plugin.format.geometry import SECTOR_SIZE, Geometry
from qcow2_plugin.format.header import CompressionType
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.offload import Offload

REFCOUNT_ORDER = 4
_ARENA = 1 << 20
"""Bytes of compressed clusters that lie together."""
_STEP = 1 << 20
_COMPRESSED_STEP = 64
"""Compressed clusters looked at together."""

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Merged:
    """What went over, in bytes: plain clusters by the way they went, compressed ones as they are stored."""

    written: int = 0
    shared: int = 0
    compressed: int = 0


class WrittenTables(NamedTuple):
    """Where the tables of the new image are, for its header; offsets in bytes."""

    l1_table_offset: int
    l1_size: int
    refcount_table_offset: int
    refcount_table_clusters: int


def layers_of(image: Image) -> list[Image]:
    """The qcow2 images of a chain by depth."""
    found: list[Image] = []
    disk: GuestDisk | None = image
    while isinstance(disk, Image):
        found.append(disk)
        disk = disk.layer.backing
    return found


def require_alike(layers: list[Image]) -> None:
    """Raises OptionError unless the layers can be merged."""
    top = layers[0]
    for layer, below in pairwise(layers):
        if below.virtual_size > layer.virtual_size:
            raise OptionError("what is below is longer than this, so they cannot be merged", file=_path(layer))
    for layer in layers:
        if layer.header.cluster_bits != top.header.cluster_bits or layer.header.extended_l2:
            raise OptionError("the layers have different kinds of clusters: they cannot be merged", file=_path(layer))


def _path(image: Image) -> str:
    return image.layer.storage.path


class Merging:
    """The work: the top `count` layers of `image` into `target`, which is empty.

    What is below them shows through in the new image as it does in `image`, so `keeps_zeros` is to be True if there is
    anything: zeros hide it.
    """

    def __init__(
        self, image: Image, target: FileStorage, count: int, compression: CompressionType, *, keeps_zeros: bool
    ) -> None:
        self.merged = Merged()
        self._image = image
        self._target = target
        self._layers = layers_of(image)[:count]
        self._offloads = [_offload(layer, target) for layer in self._layers]
        self._compression = compression
        self._keeps_zeros = keeps_zeros
        self._geometry: Geometry = image.header.geometry
        self._size = self._geometry.cluster_size
        self._end = self._size
        """Where the file ends so far: whole clusters, the first of which is the header's."""
        self._arena = self._arena_end = 0
        self._refcounts = np.zeros(1024, dtype=np.uint16)
        self._count(0, self._size)
        self._l1 = np.zeros(self._geometry.l1_entries_for(image.virtual_size), dtype=np.uint64)
        self._table = np.zeros(self._geometry.l2_entries, dtype=np.uint64)

    def run(self, progress: Progress | None = None) -> WrittenTables:
        """Write all but the header. `progress` is told (done, total) bytes of the disk.

        Raises what reading the image does; OSError of any of the files with its path.
        """
        total = self._image.virtual_size
        number = 0
        for extent in self._whole_clusters():
            if progress is not None:
                progress(extent.guest_offset, total)
            for part in self._by_table(extent):
                if part.guest_offset >> self._geometry.l2_coverage_bits != number:
                    self._end_table(number)
                    number = part.guest_offset >> self._geometry.l2_coverage_bits
                self._move(part)
        self._end_table(number)
        if progress is not None:
            progress(total, total)
        return self._end_file()

    def _whole_clusters(self) -> Iterator[Extent]:
        """The extents of the disk that are to be in the new image, in whole clusters (but for the last one of the
        disk). A cluster of which several tell has the depth -1."""
        total = self._image.virtual_size
        done = 0
        for extent in self._image.extents():
            end = extent.guest_offset + extent.length
            if end <= done:
                continue
            whole_end = end if end == total else end // self._size * self._size
            if done < whole_end:
                yield from self._wanted(extent, done, whole_end)
            done = whole_end
            if whole_end < end:
                done = min(whole_end + self._size, total)
                yield from self._mixed(whole_end, done)

    def _wanted(self, extent: Extent, start: int, end: int) -> Iterator[Extent]:
        if extent.kind is ExtentKind.UNALLOCATED or extent.depth >= len(self._layers):
            return
        if extent.kind is ExtentKind.ZERO and not self._keeps_zeros:
            return
        shift = start - extent.guest_offset
        host_offset = None if extent.host_offset is None else extent.host_offset + shift
        yield extent._replace(guest_offset=start, length=end - start, host_offset=host_offset)

    def _mixed(self, start: int, end: int) -> Iterator[Extent]:
        """A cluster in which several extents meet, if the layers have a part in it."""
        parts = list(self._image.extents(start, end - start))
        if any(self._holds(part) for part in parts):
            yield Extent(start, end - start, ExtentKind.DATA, None, depth=-1)

    def _holds(self, part: Extent) -> bool:
        if part.kind is ExtentKind.ZERO and not self._keeps_zeros:
            return False
        return part.depth < len(self._layers) and part.kind is not ExtentKind.UNALLOCATED

    def _by_table(self, extent: Extent) -> Iterator[Extent]:
        """The extent in parts that lie below one L2 table each."""
        start, end = extent.guest_offset, extent.guest_offset + extent.length
        while start < end:
            stop = min(end, (start >> self._geometry.l2_coverage_bits) + 1 << self._geometry.l2_coverage_bits)
            shift = start - extent.guest_offset
            host_offset = None if extent.host_offset is None else extent.host_offset + shift
            yield extent._replace(guest_offset=start, length=stop - start, host_offset=host_offset)
            start = stop

    def _move(self, extent: Extent) -> None:
        if extent.kind is ExtentKind.ZERO:
            first, count = self._entries(extent)
            self._table[first : first + count] = ZERO
        elif extent.kind is ExtentKind.COMPRESSED:
            self._move_compressed(extent)
        else:
            host_offset = self._place_plain(extent)
            if extent.host_offset is None:
                self._through_image(extent, host_offset)
            else:
                self._as_stored(extent.depth, extent.host_offset, host_offset, extent.length)

    def _entries(self, extent: Extent) -> tuple[int, int]:
        """The entries of the current L2 table that an extent has: the first, and how many."""
        first = extent.guest_offset >> self._geometry.cluster_bits & self._geometry.l2_entries - 1
        return first, -(-extent.length // self._size)

    def _place_plain(self, extent: Extent) -> int:
        """Where clusters for the extent are from now on."""
        first, count = self._entries(extent)
        host_offset = self._allocate(count * self._size)
        places = np.arange(count, dtype=np.uint64) * np.uint64(self._size)
        self._table[first : first + count] = places + np.uint64(host_offset | COPIED)
        self._count(host_offset, count * self._size)
        return host_offset

    def _through_image(self, extent: Extent, host_offset: int) -> None:
        for start in range(0, extent.length, _STEP):
            length = min(_STEP, extent.length - start)
            self._target.write_from(self._image.pread(length, extent.guest_offset + start), host_offset + start)
        self.merged.written += extent.length

    def _as_stored(self, depth: int, source_offset: int, host_offset: int, length: int) -> None:
        """Bytes of a layer's file, by the first way there is. What cannot be shared lies at both ends of what can."""
        offload = self._offloads[depth]
        head, shared = (0, 0) if offload is None else offload.share(source_offset, host_offset, length)
        self.merged.shared += shared
        self.merged.written += length - shared
        for start, end in ((0, head), (head + shared, length)):
            done = start
            if offload is not None:
                done += offload.copy(source_offset + start, host_offset + start, end - start)
            while done < end:
                step = min(_STEP, end - done)
                chunk = self._layers[depth].layer.data.pread(step, source_offset + done)
                self._target.write_from(chunk, host_offset + done)
                done += step

    def _move_compressed(self, extent: Extent) -> None:
        layer = self._layers[extent.depth]
        if layer.header.compression_type is not self._compression:
            plain = extent._replace(host_offset=None)
            self._through_image(plain, self._place_plain(plain))
            return
        step = _COMPRESSED_STEP * self._size
        end = extent.guest_offset + extent.length
        for start in range(extent.guest_offset, end, step):
            for run in _packed_runs(layer.clusters(start, min(step, end - start))):
                self._move_packed(layer, run)

    def _move_packed(self, layer: Image, run: list[Extent]) -> None:
        """Compressed clusters that were written one after the other."""
        begin = _stored_at(run[0])
        length = _stored_at(run[-1]) + run[-1].stored_length - begin
        place = self._pack(begin % SECTOR_SIZE, length)
        self._target.write_from(layer.layer.storage.pread(length, begin), place)
        self.merged.compressed += length
        offset_bits = 70 - self._geometry.cluster_bits
        for cluster in run:
            host_offset = place + _stored_at(cluster) - begin
            sectors = (host_offset % SECTOR_SIZE + cluster.stored_length) // SECTOR_SIZE - 1
            self._table[self._entries(cluster)[0]] = COMPRESSED | sectors << offset_bits | host_offset
            self._count(host_offset, cluster.stored_length)

    def _pack(self, within_sector: int, length: int) -> int:
        """A place for `length` bytes that begins so many bytes behind a sector's begin."""
        place = self._arena + (within_sector - self._arena) % SECTOR_SIZE
        if place + length > self._arena_end:
            needed = max(_ARENA, within_sector + length)
            clusters = -(-needed // self._size) * self._size
            if self._arena_end != self._end or not self._arena:
                place = self._end + within_sector
            self._arena_end = self._allocate(clusters) + clusters
        self._arena = place + length
        return place

    def _allocate(self, length: int) -> int:
        """Whole clusters at the end of the file."""
        host_offset = self._end
        self._end += length
        return host_offset

    def _count(self, host_offset: int, length: int) -> None:
        """One reference more to the clusters of a range of the file."""
        first, last = (
            host_offset >> self._geometry.cluster_bits,
            host_offset + length - 1 >> self._geometry.cluster_bits,
        )
        if last >= len(self._refcounts):
            self._refcounts = np.concatenate([self._refcounts, np.zeros(last + 1, dtype=np.uint16)])
        self._refcounts[first : last + 1] += 1

    def _end_table(self, number: int) -> None:
        """Write the L2 table of that number, if anything is in it, and begin the next one."""
        if not self._table.any():
            return
        self._trim()
        self._l1[number] = self._write_table(self._table) | COPIED
        self._table[:] = 0

    def _write_table(self, words: npt.NDArray[np.uint64]) -> int:
        """Big-endian, in clusters of their own; where they are."""
        packed = words.astype(">u8").tobytes()
        return self._write_clusters(packed)

    def _write_clusters(self, packed: bytes) -> int:
        length = -(-len(packed) // self._size) * self._size
        host_offset = self._allocate(length)
        self._target.write_from(packed.ljust(length, b"\0"), host_offset)
        self._count(host_offset, length)
        return host_offset

    def _end_file(self) -> WrittenTables:
        l1_offset = self._write_table(self._l1) if len(self._l1) else 0
        per_block = self._size * 8 >> REFCOUNT_ORDER
        others = self._end // self._size
        table = blocks = 1
        while True:
            needed = -(-(others + table + blocks) // per_block)
            needed_table = -(-needed * 8 // self._size)
            if (needed_table, needed) == (table, blocks):
                break
            table, blocks = needed_table, needed
        table_offset = self._allocate((table + blocks) * self._size)
        self._count(table_offset, (table + blocks) * self._size)
        first_block = table_offset + table * self._size
        offsets = np.arange(blocks, dtype=np.uint64) * np.uint64(self._size) + np.uint64(first_block)
        self._target.write_from(offsets.astype(">u8").tobytes().ljust(table * self._size, b"\0"), table_offset)
        used = self._refcounts[: self._end // self._size].astype(">u2").tobytes()
        self._target.write_from(used.ljust(blocks * self._size, b"\0"), first_block)
        return WrittenTables(l1_offset, len(self._l1), table_offset, table)

    def _trim(self) -> None:
        """Give back what of the arena is not used, if the file ends with it."""
        if self._arena and self._arena_end == self._end:
            self._arena_end = self._end = -(-self._arena // self._size) * self._size


def _offload(layer: Image, target: FileStorage) -> Offload | None:
    data = layer.layer.data
    return Offload(data, target, may_share=True, may_copy=True) if isinstance(data, FileStorage) else None


def _stored_at(cluster: Extent) -> int:
    assert cluster.host_offset is not None, "each is a run of its own"
    return cluster.host_offset


def _packed_runs(clusters: list[Extent]) -> Iterator[list[Extent]]:
    """Compressed clusters by what was written one after the other, not too many at once."""
    run: list[Extent] = []
    for cluster in clusters:
        if run and not _continues(run, cluster):
            yield run
            run = []
        run.append(cluster)
    if run:
        yield run


def _continues(run: list[Extent], cluster: Extent) -> bool:
    """True if `cluster` was written right behind the last of `run`, perhaps into the same sector."""
    end = _stored_at(run[-1]) + run[-1].stored_length
    start = _stored_at(cluster)
    stop = start + cluster.stored_length
    is_next = max(end - SECTOR_SIZE, _stored_at(run[-1])) <= start <= end <= stop
    return is_next and stop - _stored_at(run[0]) <= _ARENA
