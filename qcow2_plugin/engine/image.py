"""One open image: the guest's view of a qcow2 file, and the read path from top to bottom.

A read is planned under the image's lock (`Mapping.resolve`) and moved without it. In front of that stands the lane
(see `tables`): one dictionary look-up and one comparison decide, without a lock, whether the whole request may go
straight from the storage into the caller's buffer. That is nearly every request to a disk in use, so each Python step
there counts.

    read_into      the lane: mapped, plain, in line        -> storage
    _read_extents  everything else, extent by extent       -> storage | zeros | cluster cache | backing disk

An image is safe for many threads at once; only `close` wants to be alone. Bulk users ask `extents` first and read what
is worth reading. `snapshots` and `bitmaps` are read when asked for, never held.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from qcow2_plugin.engine.codec import ClusterCache
from qcow2_plugin.engine.dirty_bitmaps import bitmaps
from qcow2_plugin.engine.dirty_bitmaps.dirty import DirtyBitmap
from qcow2_plugin.engine.internal_snapshots import snapshots
from qcow2_plugin.engine.mapping import Mapping
from qcow2_plugin.engine.tables import RUN_MASK, Tables, TableSource
from qcow2_plugin.engine.through import through_backing
from qcow2_plugin.errors import ImageClosedError, OutOfRangeError, ReadOnlyImageError
from qcow2_plugin.extent import Extent, ExtentKind, GuestDisk, clear, merge
from qcow2_plugin.format.bitmaps import Bitmap
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.snapshots import Snapshot
from qcow2_plugin.storage import Buffer, Storage

_MAX_FETCH = 2 << 20
"""Bytes of compressed clusters read together; one cluster may be more."""
_MAX_PREFETCH = 64 << 20
_PREFETCH_STEP = 1 << 20
"""Bytes mapped under the lock at once."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What an image is made of, opened and checked; `data` is the data file, or `storage` where there is none.

    `cache_size` in bytes bounds the table cache; decompressed clusters may take a quarter as much beside it.
    `allow_damaged` reads zeros where the file is cut off.
    """

    header: Header
    storage: Storage
    data: Storage
    backing: GuestDisk | None
    cache_size: int
    allow_damaged: bool


class Image:
    """The active disk of a layer or, with `snapshot`, the disk as it was then. Use `open_image` to get one."""

    writable = False

    def __init__(self, layer: Layer, resources: ExitStack, snapshot: Snapshot | None = None) -> None:
        """`resources` is closed with the image."""
        header = layer.header
        self.layer = layer
        self._resources = resources
        self._lock = threading.Lock()
        self._closed = False
        source = TableSource.of(header, layer.storage, snapshot, allow_damaged=layer.allow_damaged)
        self.virtual_size = source.virtual_size
        self._use(Mapping(Tables(source, layer.cache_size)))
        cluster_size = header.geometry.cluster_size
        self._clusters = ClusterCache(header.compression_type, cluster_size, layer.cache_size // 4, layer.storage.path)
        self._cluster_bits = header.cluster_bits
        self._cluster_mask = header.geometry.cluster_size - 1
        self._read_data = layer.data.read_into

    def _use(self, mapping: Mapping) -> None:
        self._mapping = mapping
        tables = mapping.tables
        self._lane = tables.lane
        self._lane_bits = tables.slice_bits
        self._lane_mask = tables.slice_entries - 1

    @property
    def header(self) -> Header:
        """The header as it is now."""
        return self.layer.header

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` (of bytes) from guest `offset`; no alignment is needed, the range must lie inside the disk.

        Raises OutOfRangeError, CorruptImageError, TruncatedImageError, ImageClosedError; OSError of the files.
        After an error the contents of `buffer` are undefined.
        """
        try:
            lane_word = self._lane[offset >> self._lane_bits][offset >> self._cluster_bits & self._lane_mask]
        except KeyError:
            lane_word = 0
        clusters_in_line = lane_word & RUN_MASK
        within = offset & self._cluster_mask
        if within + len(buffer) <= clusters_in_line << self._cluster_bits:
            self._read_data(buffer, lane_word - clusters_in_line + within)
        else:
            view = memoryview(buffer).cast("B")
            self._read_extents(view, offset, self._resolve(offset, len(view)))

    def pread(self, length: int, offset: int) -> bytes:
        """`length` bytes from guest `offset`. Raises as `read_into` does."""
        self._require_range(offset, length)
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def extents(self, offset: int = 0, length: int | None = None, *, whole_chain: bool = True) -> Iterator[Extent]:
        """The runs of a range (to the end of the disk by default), merged, ascending, without gaps, made lazily.

        With `whole_chain`, what is unallocated here is told as the backing files have it, `depth` counting layers;
        what no layer has is UNALLOCATED in the lowest that is long enough. Compressed clusters in line are one extent
        without host offset. Raises as `read_into` does, when it comes to the place.
        """
        length = self.virtual_size - offset if length is None else length
        self._require_range(offset, length)
        own = merge(self._runs(offset, length))
        if not whole_chain or self.layer.backing is None:
            return own
        return merge(through_backing(own, self.layer.backing, offset + length))

    def clusters(self, offset: int, length: int) -> list[Extent]:
        """The runs of a short range in this image alone, each compressed cluster a run of its own, which has a host
        offset therefore. Raises as `read_into` does."""
        return self._resolve(offset, length)

    def _runs(self, offset: int, length: int) -> Iterator[Extent]:
        return self._mapping.runs(offset, length)

    def dirty_extents(self, bitmap: str | bytes) -> Iterator[Extent]:
        """The extents of all ranges that a persistent dirty bitmap marks, ascending, made lazily.

        Raises as `dirty_bitmap` and `extents` do.
        """
        for offset, length in self.dirty_bitmap(bitmap).ranges(0, self.virtual_size):
            yield from self.extents(offset, length)

    def dirty_bitmap(self, name: str | bytes) -> DirtyBitmap:
        """A persistent dirty bitmap of the active disk, ready to be asked for marked ranges.

        Raises MissingReferenceError if there is no such bitmap, CorruptImageError if it must not be used.
        """
        found = bitmaps.find(self.bitmaps(), name, self.layer.storage.path)
        return DirtyBitmap(self.layer.storage, self.header, found)

    def snapshots(self) -> list[Snapshot]:
        """The internal snapshots, read now. Raises CorruptImageError, TruncatedImageError, OSError."""
        with self._lock:
            return snapshots.read_snapshots(self.layer.storage, self.header)

    def bitmaps(self) -> list[Bitmap]:
        """The persistent bitmaps, usable or not, read now. Raises CorruptImageError, TruncatedImageError, OSError."""
        return bitmaps.read_bitmaps(self.layer.storage, self.header)

    def at_snapshot(self, wanted: str | bytes | Snapshot) -> Image:
        """The disk as an internal snapshot keeps it: one of `snapshots`, or found there by ID or else by name.

        Read-only; it shares this image's files and is good until this image is closed or the snapshot deleted. Raises
        MissingReferenceError if there is no such snapshot, CorruptImageError or TruncatedImageError if its L1 table
        cannot be right.
        """
        storage = self.layer.storage
        with self._lock:
            header = self.header
            if not isinstance(wanted, Snapshot):
                wanted = snapshots.find(snapshots.read_snapshots(storage, header), wanted, storage.path)
            elif self.writable and wanted not in snapshots.read_snapshots(storage, header):
                raise snapshots.missing(wanted.id, storage.path)
            snapshots.check_l1_table(wanted, storage, header, allow_damaged=self.layer.allow_damaged)
            cache_size = self.layer.cache_size // 4  # many may be in use beside the disk
            return self._view_of(replace(self.layer, header=header, cache_size=cache_size), wanted)

    def _view_of(self, layer: Layer, snapshot: Snapshot) -> Image:
        return Image(layer, ExitStack(), snapshot)

    def prefetch(self, offset: int, length: int) -> None:
        """Ask the system to have the range in memory soon; a hint, of which the first 64 MiB are taken.

        Raises as `read_into` does.
        """
        self._require_range(offset, length)
        end = offset + min(length, _MAX_PREFETCH)
        for start in range(offset, end, _PREFETCH_STEP):
            for extent in self._resolve(start, min(_PREFETCH_STEP, end - start)):
                self._prefetch_extent(extent)

    def _prefetch_extent(self, extent: Extent) -> None:
        backing = self.layer.backing
        if extent.kind is ExtentKind.UNALLOCATED and backing is not None:
            inside = min(extent.length, backing.virtual_size - extent.guest_offset)
            if inside > 0:
                backing.prefetch(extent.guest_offset, inside)
        elif extent.kind is ExtentKind.COMPRESSED and extent.host_offset is not None:
            self.layer.storage.prefetch(extent.host_offset, extent.stored_length)
        elif extent.kind is ExtentKind.DATA and extent.host_offset is not None:
            self.layer.data.prefetch(extent.host_offset, extent.length)

    def write_from(self, buffer: Buffer, offset: int, *, durable: bool = False) -> None:
        """Write `buffer` to guest `offset`; no alignment is needed, the range must lie inside the disk.

        Safe after a crash once `flush` has returned, or this call with `durable`. Raises ReadOnlyImageError unless
        the image was opened for writing; OutOfRangeError, CorruptImageError, TruncatedImageError, FailedImageError,
        ImageClosedError; OSError of the files (ENOSPC, EIO, ...). After an error each byte is old or new.
        """
        raise self._read_only()

    def pwrite(self, data: Buffer, offset: int, *, durable: bool = False) -> None:
        """`write_from` by the name that pairs with `pread`."""
        self.write_from(data, offset, durable=durable)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True, only_fast: bool = False) -> None:
        """Make a guest range read as zeros. Without `may_unmap` what is allocated stays so.

        With `only_fast` it is OSError with ENOTSUP, before anything changes, if zeros would have to be written as
        data. Raises as `write_from` does.
        """
        raise self._read_only()

    def discard(self, offset: int, length: int) -> None:
        """Give back the clusters that lie whole in a guest range, or end the disk; they read as zeros after. What is
        of other clusters stays as it is. Raises as `write_from` does."""
        raise self._read_only()

    def flush(self) -> None:
        """Everything whose call has returned survives a crash from now on. Raises as `write_from` does.

        After a failure of the storage to make data durable the image takes no more changes.
        """
        raise self._read_only()

    def resize(self, virtual_size: int, *, allow_shrink: bool = False, preallocation: str = "off") -> None:
        """Change the size of the disk, to whole sectors, durably. What is added reads as zeros.

        `preallocation` is "off", "metadata", "falloc" or "full", as for `create_image`. Raises as `write_from` does;
        ResizeError if the image cannot have that size, or would lose data and `allow_shrink` does not say so.
        """
        raise self._read_only()

    def _read_only(self) -> ReadOnlyImageError:
        return ReadOnlyImageError("the image is not open for writing", file=self.layer.storage.path)

    def close(self) -> None:
        """Give back files and locks; requests must have ended. A second call does nothing."""
        self._closed = True
        with self._lock:
            self._mapping.tables.forget()
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def require_open(self) -> None:
        """Raises ImageClosedError once the image is closed."""
        if self._closed:
            raise ImageClosedError("the image is closed", file=self.layer.storage.path)

    def _require_range(self, offset: int, length: int) -> None:
        self.require_open()
        if offset < 0 or length < 0 or offset + length > self.virtual_size:
            raise OutOfRangeError(
                f"range of {length} bytes at {offset:#x} is not inside the disk of {self.virtual_size} bytes",
                file=self.layer.storage.path,
            )

    def _resolve(self, offset: int, length: int) -> list[Extent]:
        self._require_range(offset, length)
        with self._lock:
            return self._mapping.resolve(offset, length)

    def _read_extents(self, view: memoryview, offset: int, extents: Iterable[Extent]) -> None:
        """Fill `view` from guest `offset`, of which `extents` tell."""
        for is_compressed, group in itertools.groupby(extents, _is_compressed):
            if is_compressed:
                self._read_compressed(view, offset, list(group))
                continue
            for extent in group:
                part = view[extent.guest_offset - offset :][: extent.length]
                if extent.kind is ExtentKind.DATA and extent.host_offset is not None:
                    self._read_data(part, extent.host_offset)
                elif extent.kind is ExtentKind.UNALLOCATED and self.layer.backing:
                    _read_or_clear(self.layer.backing, part, extent.guest_offset)
                else:
                    clear(part)

    def _read_compressed(self, view: memoryview, offset: int, extents: list[Extent]) -> None:
        """Neighbours were mostly written one after the other, so they are fetched together."""
        cluster_size = self._cluster_mask + 1
        stored, stored_start = memoryview(b""), 0
        for index, extent in enumerate(extents):
            host_offset = extent.host_offset or 0
            cluster = self._clusters.find(host_offset, extent.stored_length)
            if cluster is None:
                if not stored_start <= host_offset <= stored_start + len(stored) - extent.stored_length:
                    stored_start = host_offset
                    stored_end = _end_of_fetch(extents[index:])
                    fetched = self.layer.storage.pread(stored_end - stored_start, stored_start)
                    stored = memoryview(fetched.ljust(stored_end - stored_start, b"\0"))
                begin = host_offset - stored_start
                cluster = self._clusters.decompress(stored[begin : begin + extent.stored_length], host_offset)
                if extent.length < cluster_size:
                    self._clusters.keep(host_offset, extent.stored_length, cluster)
            start = extent.guest_offset & self._cluster_mask
            view[extent.guest_offset - offset :][: extent.length] = memoryview(cluster)[start : start + extent.length]


def _read_or_clear(disk: GuestDisk, part: memoryview, offset: int) -> None:
    """Fill `part` from `disk`, with zeros where it lies past the disk's end."""
    inside = max(min(len(part), disk.virtual_size - offset), 0)
    if inside:
        disk.read_into(part[:inside], offset)
    if inside < len(part):
        clear(part[inside:])


def _is_compressed(extent: Extent) -> bool:
    return extent.kind is ExtentKind.COMPRESSED


def _end_of_fetch(extents: list[Extent]) -> int:
    """Where to end a read that begins with the first of these compressed clusters: behind the last that directly
    continues it, as long as that is not too much."""
    start = extents[0].host_offset or 0
    end = start + extents[0].stored_length
    for extent in extents[1:]:
        next_start = extent.host_offset or 0
        next_end = next_start + extent.stored_length
        if not end - 512 <= next_start <= end < next_end or next_end - start > _MAX_FETCH:
            break
        end = next_end
    return end
