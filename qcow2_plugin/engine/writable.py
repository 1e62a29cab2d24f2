"""An image that is open for writing, and the write path from top to bottom.

A write is planned under the image's lock (`WrittenMapping.place`), moved without it and committed under it again. In
front of that stands the write lane (see `written_tables`): nearly every write to a disk in use goes from the caller's
buffer straight to the storage, without a lock.

    write_from     the write lane: allocated, ours alone, in line   -> storage
    _write_placed  everything else, slice by slice: place -> _move -> storage -> commit, or abandon
    write_zeroes   entries changed under the lock; odd ends as data
    discard        entries changed under the lock
    flush          `writeback`, which owns the order of writes

Nothing is written by opening an image. Before its first change (`_begin`) what would be untrue afterwards is put right
on disk, durably: refcounts of a dirty image, feature bits that we do not know, bitmaps that are about to change.

**Raw data files.** The file shows at any time what the guest sees, after a crash too. So every entry says data, and
says it durably before anything but zeros is in the file there: zeroes and discards zero the file and leave the entries
alone, and where another program has left an entry that says zero, `say_data` comes before the first write.

**Lock.** The image's lock guards the tables, refcounts, bitmaps and claims; it is never held while guest data moves.
The turn of `writeback` is taken before it, never inside.
"""

from __future__ import annotations

import errno
import os
from _thread import get_ident
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import cast

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.dirty_bitmaps.dirty import DirtyBitmap
from qcow2_plugin.engine.dirty_bitmaps.tracking import BitmapTracker
from qcow2_plugin.engine.first_change import put_right
from qcow2_plugin.engine.image import Image, Layer
from qcow2_plugin.engine.image_file import ImageFile
from qcow2_plugin.engine.internal_snapshots.snapshot_views import SnapshotViews
from qcow2_plugin.engine.metadata import read_metadata
from qcow2_plugin.engine.placement import Clearing, Fill, Piece, Placement, WrittenMapping
from qcow2_plugin.engine.requests import Requests
from qcow2_plugin.engine.resizing import resize
from qcow2_plugin.engine.tables import RUN_MASK, TableSource
from qcow2_plugin.engine.writeback import WriteBack
from qcow2_plugin.engine.written_tables import WrittenTables
from qcow2_plugin.extent import ZEROS, Extent
from qcow2_plugin.format.bitmaps import Bitmap
from qcow2_plugin.format.geometry import SECTOR_SIZE
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.snapshots import Snapshot
from qcow2_plugin.storage import Buffer, WritableStorage

_MAX_ZERO_FILL = 64 << 10
"""Bytes of zeros around a write that are written along with it; more are left to the file system."""
_EXTENTS_AT_ONCE = 4096
_TABLES_AT_ONCE = 64
"""Extents told, and L2 tables looked at, under one hold of the lock."""
_MIN_CHANGED_SIZE = 1 << 20


class WritableImage(Image):
    """The active disk of an image that is open for writing. Use `open_image` to get one."""

    writable = True

    def __init__(self, layer: Layer, resources: ExitStack) -> None:
        """`layer.storage` and `layer.data` can be written to; `resources` is closed with the image.

        Raises CorruptImageError or TruncatedImageError if the structures of the image cannot be right; OSError.
        """
        super().__init__(layer, resources)
        storage, data = cast(WritableStorage, layer.storage), cast(WritableStorage, layer.data)
        self.file = ImageFile(storage, layer.header, read_metadata(storage, layer.header))
        self.allocator = Allocator(self.file)
        self.tracker = BitmapTracker(self.file, self.bitmaps())
        source = TableSource.of(layer.header, storage, None, allow_damaged=False)
        self.tables = WrittenTables(
            source, layer.cache_size, self.file, self.allocator, tracks_changes=not self.tracker.is_empty
        )
        self.written = WrittenMapping(self.tables, self.file, self.allocator, data=data, backing=layer.backing)
        self._use(self.written)
        self._write_lane = self.tables.write_lane
        self.requests = Requests(self._lock)
        self.snapshot_views = SnapshotViews(self.requests)
        self.write_back = WriteBack(
            self.file, data, allocator=self.allocator, tables=self.tables, requests=self.requests, lock=self._lock
        )
        self._max_changed_size = max(layer.cache_size // 4, _MIN_CHANGED_SIZE)
        self.data = data
        self._write_data = data.write_from
        self._is_ready = self._has_begun = False

    @property
    def header(self) -> Header:
        """The header as it is now."""
        return self.file.header

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self._cluster_mask + 1

    # -- reading --

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` (of bytes) from guest `offset`; no alignment is needed, the range must lie inside the disk.

        Raises OutOfRangeError, CorruptImageError, TruncatedImageError, ImageClosedError; OSError of the files.
        After an error the contents of `buffer` are undefined.
        """
        requests = self.requests
        ident = get_ident()
        requests.in_flight[ident] = requests.epoch
        try:
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
        finally:
            del requests.in_flight[ident]
            if requests.waiting:
                requests.ended()

    def bitmaps(self) -> list[Bitmap]:
        """The persistent bitmaps, as they are on disk; see `Image.bitmaps`."""
        with self._lock:  # the directory may move
            return super().bitmaps()

    def dirty_bitmap(self, name: str | bytes) -> DirtyBitmap:
        """See `Image.dirty_bitmap`. It raises MissingReferenceError once the bitmap is removed or made anew."""
        found = super().dirty_bitmap(name)
        found.require_current = self.tracker.watch(found.bitmap)
        return found

    def _runs(self, offset: int, length: int) -> Iterator[Extent]:
        """A table may move or vanish between two looks, so each is taken whole, under the lock."""
        end = offset + length
        while offset < end:
            extents: list[Extent] = []
            enough = offset + _TABLES_AT_ONCE * self.header.geometry.l2_coverage
            try:
                with self._lock:
                    for extent in islice(self._mapping.runs(offset, end - offset), _EXTENTS_AT_ONCE):
                        extents.append(extent)
                        if extent.guest_offset + extent.length >= enough:
                            break
            finally:
                yield from extents  # an error comes behind what was told before it
            offset = extents[-1].guest_offset + extents[-1].length

    def _view_of(self, layer: Layer, snapshot: Snapshot) -> Image:
        return self.snapshot_views.open(self, layer, snapshot)

    # -- writing --

    def write_from(self, buffer: Buffer, offset: int, *, durable: bool = False) -> None:
        """Write `buffer` to guest `offset`; see `Image.write_from`."""
        requests = self.requests
        ident = get_ident()
        requests.in_flight[ident] = requests.epoch
        try:
            try:
                lane_word = self._write_lane[offset >> self._lane_bits][offset >> self._cluster_bits & self._lane_mask]
            except KeyError:
                lane_word = 0
            clusters_in_line = lane_word & RUN_MASK
            within = offset & self._cluster_mask
            if within + len(buffer) <= clusters_in_line << self._cluster_bits:
                self._write_data(buffer, lane_word - clusters_in_line + within)
            else:
                self._write_placed(memoryview(buffer).cast("B"), offset)
        finally:
            del requests.in_flight[ident]
            if requests.waiting:
                requests.ended()
        if durable:
            self.flush()

    def _write_placed(self, view: memoryview, offset: int) -> None:
        with self._lock:
            self.requests.begin_change()
        try:
            self._require_range(offset, len(view))
            self._write_slices(view, offset)
        finally:
            with self._lock:
                self.requests.end_change()

    def _write_slices(self, view: memoryview, offset: int) -> None:
        end = offset + len(view)
        start = offset
        while start < end:
            self.make_room()
            part_end = min(end, (start | self.written.slice_coverage - 1) + 1)
            self._write_part(view[start - offset : part_end - offset], start)
            start = part_end

    def _write_part(self, view: memoryview, start: int) -> None:
        """Write what lies below one slice."""
        end = start + len(view)
        if self.file.header.data_file_raw and not self._is_said(start, end):
            self.say_data(start)
        self.put(start, end, lambda piece: self._move(piece, view[piece.start - start : piece.end - start]))

    def put(self, start: int, end: int, move: Callable[[Piece], None]) -> None:
        """Give guest bytes `start` to `end`, which lie below one slice, places that may be written to; what is new
        shows when `move` has filled every piece."""
        try:
            with self._lock:
                placement = self._place(start, end)
            self._carry_out(placement, move)
        finally:
            self._notice_failure()

    def _carry_out(self, placement: Placement, move: Callable[[Piece], None]) -> None:
        try:
            for piece in placement.pieces:
                move(piece)
            if placement.changes:
                with self._lock:
                    self._commit(placement)
        except BaseException:
            if placement.changes:
                with self._lock:
                    self._abandon(placement)
            raise

    def _place(self, start: int, end: int) -> Placement:
        self._begin_change(start, end)
        self.tracker.mark(start, end - start)
        placement = self.written.place(start, end)
        if placement.changes:
            self.requests.claim(placement.first, placement.end)
        elif len(placement.pieces) == 1 and self._is_worth_a_lane(placement):
            self.written.enter_write_lane(placement)
        return placement

    def _is_worth_a_lane(self, placement: Placement) -> bool:
        """True if clusters that are written in place are not in the lane yet, or not in one run with each other."""
        if self.tracker.is_empty:
            return placement.end - placement.first > 1
        return self._may_write(placement)

    def _move(self, piece: Piece, data: memoryview) -> None:
        """Put data where it belongs, together with what surrounds it."""
        head, tail = piece.head, piece.tail
        if not head.length and not tail.length:
            self._write_data(data, piece.host_offset)
            return
        shared = min(piece.start % SECTOR_SIZE, head.length)  # what shares a sector with data is written with it
        before = self._filling(head, piece.start - head.length, piece.host_offset - head.length, shared)
        shared = min(-piece.end % SECTOR_SIZE, tail.length)
        behind = self._filling(tail, piece.end, piece.host_offset + len(data) + shared, shared)
        self.data.write_vector([before, data, behind], piece.host_offset - len(before))

    def _filling(self, fill: Fill, guest_offset: int, zeros_offset: int, shared: int) -> Buffer:
        """The bytes of `fill`, which begins at guest `guest_offset`, as far as they are to be written along with data.

        If they are zeros that can be had cheaper, those are `shared` bytes, and the others are at host `zeros_offset`.
        """
        if fill.extents:
            content = bytearray(fill.length)
            known = fill.extents[-1].guest_offset + fill.extents[-1].length - guest_offset
            self._read_extents(memoryview(content)[:known], guest_offset, fill.extents)
            return content
        if not fill.length:
            return b""
        if fill.length <= _MAX_ZERO_FILL and self.data is self.layer.storage:
            return ZEROS[: fill.length]
        if shared < fill.length:
            is_other_file = self.data is not self.layer.storage
            self.data.write_zeroes(zeros_offset, fill.length - shared, may_punch=is_other_file)
        return ZEROS[:shared]

    def _commit(self, placement: Placement) -> None:
        self.written.commit(placement, may_write=self._may_write(placement))
        self.requests.release(placement.first, placement.end)

    def _abandon(self, placement: Placement) -> None:
        self.requests.release(placement.first, placement.end)
        self.written.abandon(placement)

    def _may_write(self, placement: Placement) -> bool:
        """True if later writes to these clusters are nothing new to any bitmap."""
        start, end = placement.first << self._cluster_bits, placement.end << self._cluster_bits
        if self.tracker.is_empty:
            return True
        return self.tracker.covers(start, min(end, self.written.virtual_size) - start)

    # -- zeroes and discards --

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True, only_fast: bool = False) -> None:
        """Make a guest range read as zeros; see `Image.write_zeroes`."""
        with self.requests.changing():
            self._require_range(offset, length)
            self.zero(offset, offset + length, Clearing.FREE if may_unmap else Clearing.KEEP, only_fast=only_fast)

    def discard(self, offset: int, length: int) -> None:
        """Give back whole clusters of a guest range; see `Image.discard`."""
        with self.requests.changing():
            self._require_range(offset, length)
            if self.header.version < 3 and self.layer.backing is not None:
                return  # the backing file would show through
            start, end = self._whole(offset, offset + length, self.cluster_size)
            if self.file.header.data_file_raw:
                self._zero_raw(start, end, may_punch=True)
            else:
                self.clear_clusters(start, end, Clearing.DISCARD)

    def zero(self, start: int, end: int, clearing: Clearing, *, only_fast: bool = False) -> None:
        """`write_zeroes`, as part of a change."""
        if self.file.header.data_file_raw:
            self._zero_raw(start, end, may_punch=clearing is Clearing.FREE)
            return
        if self.header.version < 3 and self.layer.backing is not None:
            whole_start = whole_end = end  # no entry could say zero
        else:
            whole_start, whole_end = self._whole(start, end, self.header.geometry.subcluster_size)
        first, last = self._whole(whole_start, whole_end, self.cluster_size)
        odd_ends = [(start, whole_start), (whole_end, end)]
        parts = [*self._by_cluster(whole_start, first), *self._by_cluster(last, whole_end)]
        if only_fast:
            self._require_fast(odd_ends, parts)
        for part_start, part_end in odd_ends:
            self._write_zeros_as_data(part_start, part_end)
        for part_start, part_end in parts:
            self._clear_subclusters(part_start, part_end, clearing)
        self.clear_clusters(first, last, clearing)

    def _whole(self, start: int, end: int, unit: int) -> tuple[int, int]:
        """Start and end of the whole units between `start` and `end`; both `end` if there is none. The last unit of
        the disk ends with it."""
        first = -(-start // unit) * unit
        last = end if end == self.written.virtual_size else end // unit * unit
        return (first, last) if first < last else (end, end)

    def _by_cluster(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that lie in one cluster each."""
        while start < end:
            part_end = min(end, (start | self._cluster_mask) + 1)
            yield start, part_end
            start = part_end

    def _require_fast(self, odd_ends: list[tuple[int, int]], parts: list[tuple[int, int]]) -> None:
        """Raises OSError with ENOTSUP if zeros have to be written as data."""
        with self._lock:
            is_slow = any(start < end and not self.written.reads_as_zeros(start, end) for start, end in odd_ends)
            is_slow |= any(self.written.is_compressed(start) for start, _ in parts)
        if is_slow:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def _write_zeros_as_data(self, start: int, end: int) -> None:
        """Zeros to guest bytes that share a subcluster with others; what reads as zeros already stays as it is."""
        while start < end:
            part_end = min(end, start + len(ZEROS))
            with self._lock:
                is_done = self.written.reads_as_zeros(start, part_end)
            if not is_done:
                self.write_inside(ZEROS[: part_end - start], start)
            start = part_end

    def write_inside(self, view: memoryview, offset: int) -> None:
        """Write, as part of a change."""
        with self.requests.moving():
            self._write_slices(view, offset)

    def _clear_subclusters(self, start: int, end: int, clearing: Clearing) -> None:
        """Clear some of the subclusters of one cluster."""
        with self._lock:
            is_compressed = self.written.is_compressed(start)
        if is_compressed:
            self._write_zeros_as_data(start, end)
        else:
            self._clear(start, end, clearing)

    def clear_clusters(self, start: int, end: int, clearing: Clearing) -> None:
        """Clear whole clusters, guest bytes `start` to `end`, slice by slice."""
        while start < end:
            if self.layer.backing is None or clearing is Clearing.DROP:
                with self._lock:
                    start = self.written.next_mapped(start, end)
            part_end = min(end, (start | self.written.slice_coverage - 1) + 1)
            if start < part_end:
                self._clear(start, part_end, clearing)
            start = part_end

    def _clear(self, start: int, end: int, clearing: Clearing) -> None:
        """Clear whole clusters below one slice, or whole subclusters of one cluster."""
        self.make_room()
        is_freed = clearing is not Clearing.KEEP
        first, last = start >> self._cluster_bits, (end - 1 >> self._cluster_bits) + 1
        with self.locked():
            self._begin_change(start, end)
            self.tracker.mark(start, end - start)
            clear = self.written.plan_clear(start, end, clearing)
            if clear is None:
                return
            if self.data is self.layer.storage or not is_freed:
                self.written.apply(clear, punch=is_freed)
                return
            self.requests.claim(first, last)
        try:  # before the entries say so: afterwards the place may be somebody's again
            self.data.write_zeroes(start, end - start, may_punch=True)
            with self.locked():
                self.written.apply(clear, punch=False)
        finally:
            with self._lock:
                self.requests.release(first, last)

    # -- raw data files --

    def _zero_raw(self, start: int, end: int, *, may_punch: bool) -> None:
        """Zeros for guest bytes of a raw data file: no entry says so, the file does."""
        with self.locked():
            self._begin_change(start, end)
            self.tracker.mark(start, end - start)
        self.data.write_zeroes(start, end - start, may_punch=may_punch)

    def _is_said(self, start: int, end: int) -> bool:
        """True if a read of these guest bytes, below one slice, looks for them in the data file."""
        with self._lock:
            return self.written.reads_as_data(start, end)

    def say_data(self, start: int) -> None:
        """Let the entries of the slice at guest `start` say data everywhere, durably, with zeros where they did not."""
        low = start & -self.written.slice_coverage
        high = min(low + self.written.slice_coverage, self.written.virtual_size)
        with self.locked():
            self._begin_change(low, high)
            placement = self.written.place(low, high)
            self.requests.claim(placement.first, placement.end)
        try:
            for first, last in self.written.hidden_ranges(placement):
                self.data.write_zeroes(first, last - first, may_punch=True)
            with self.locked():
                self.written.commit(placement, may_write=False)
            self._flush_between()
            with self.locked():
                self.tables.renew_write_lane(placement.key)
        finally:
            with self._lock:
                self.requests.release(placement.first, placement.end)

    # -- the beginning, the end and what lies between --

    def resize(self, virtual_size: int, *, allow_shrink: bool = False, preallocation: str = "off") -> None:
        """Change the size of the disk; see `Image.resize`."""
        with self.requests.alone():
            self.require_open()
            try:
                resize(self, virtual_size, allow_shrink=allow_shrink, preallocation=preallocation)
            finally:
                self._notice_failure()

    def flush(self) -> None:
        """Make durable what was acknowledged; see `Image.flush`."""
        self.require_open()
        self.file.require_writable()
        if not self._is_ready:
            return
        try:
            self.write_back.run()
        finally:
            self._notice_failure()

    def close(self) -> None:
        """Store everything and give back files and locks; requests must have ended. A second call does nothing.

        Raises as `flush` does, and the files are given back all the same; not if the image had failed before.
        """
        if self._closed:
            return
        try:
            if self._is_ready and self.file.failure is None:
                self._store()
        finally:
            super().close()

    def _store(self) -> None:
        """Bring the image on disk to where nothing is left to do."""
        self.write_back.run()
        self.tracker.settle(self.allocator, self.write_back.run)
        while self.write_back.has_work:  # no request is left, so what waits can be reclaimed
            self.write_back.run()

    def _begin_change(self, start: int, end: int) -> None:
        """Wait until nobody else changes these guest bytes' clusters; see that the image may be changed. Lock held."""
        self.get_ready()
        if self.requests.wait_until_free(start >> self._cluster_bits, (end - 1 >> self._cluster_bits) + 1):
            self.get_ready()

    def get_ready(self) -> None:
        """See that the image takes changes, and knows that they begin. Raises FailedImageError, OSError. Lock held."""
        if self._has_begun and self.file.failure is None:
            return
        self.get_structures_ready()
        if self.tracker.begin():
            self.file.barrier()
        self._has_begun = True

    def get_structures_ready(self) -> None:
        """`get_ready` for changes that leave the disk as it is, so that no bitmap need be held. Lock held."""
        self.file.require_writable()
        if not self._is_ready:
            put_right(self.file, self.allocator, self.tables)
            self._is_ready = True

    def settle_bitmaps(self) -> None:
        """Let the bitmaps on disk be true, and say so, until `get_ready`. Everything stands still."""
        self._has_begun = False  # before any of them says so
        self.tables.forget_write_lanes()
        self.tracker.settle(self.allocator, self.write_back.run_alone)

    def make_room(self) -> None:
        """Write back, if much has changed. No claim may be held."""
        if self.tables.changed_size > self._max_changed_size or self.allocator.is_full:
            self._flush_between()

    def _flush_between(self) -> None:
        """Flush in the middle of a request; if it is in flight, it begins anew after that."""
        with self._lock:
            was_in_flight = self.requests.leave()
        try:
            self.flush()
        finally:
            if was_in_flight:
                self.requests.enter()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The image's lock, for a change; once that finds a failure, nothing is written straight any more."""
        try:
            with self._lock:
                yield
        except BaseException:
            self._notice_failure()
            raise

    def _notice_failure(self) -> None:
        if self.file.failure is not None:
            self._write_lane = {}
