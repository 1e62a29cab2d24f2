"""Copying the disk of an image out, to a file or device that holds nothing but that disk; or ranges of it, to where
they are to stand in a file (`copy_ranges`).

**Pieces.** The disk is told as extents, one L2 table at a time, and cut into pieces: bytes that stand as they are in
some file of the chain, and ranges that only the image can read (compressed clusters). Workers take the pieces one by
one, in order; whoever takes the next one holds the lock of the list, and nothing else is locked.

**Ways.** A piece that stands in a file goes by the first way that works: shared blocks, if the file system has them;
the kernel's own copy, if that is asked for; else through a buffer that stays in the processor's cache, from which
granules of zeros are not written. Holes of the file that it stands in are passed over. An image that is open for
writing is read through the image alone, since what stands where may change under the copy.

**Telling.** Whoever wants to see the bytes on their way (`Told`) has them all read through the image, in parts that are
cut by the disk, not by where its clusters stand. A short range is read so in any case, sooner than it is looked up.

**Early.** What is written is on its way to the disk while more is, so that the barrier after it has little to wait for.

**Zeros.** In a new file they are there already. On a device (`is_empty` False) everything that is not data is written
as zeros.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.raw import RawDisk
from qcow2_plugin.engine.zeros import data_runs
from qcow2_plugin.extent import Extent, ExtentKind, GuestDisk, parts
from qcow2_plugin.storage import Storage
from qcow2_plugin.storage.early import EarlyWriting
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.offload import Offload

_CHUNK = 256 << 10
_PIECE = 8 << 20
_SHARED_PIECE = 1 << 30
_ZERO_PIECE = 64 << 20
_REMEMBERED = 4096
"""Ranges of data in one file."""

Progress = Callable[[int, int], None]


class Options(NamedTuple):
    """How to copy. `granule` is the least run of zeros, in bytes (whole sectors), that is not written; 0: none."""

    granule: int
    may_share: bool
    may_copy: bool
    is_empty: bool
    """The target reads as zeros wherever nothing is written to it."""
    threads: int


@dataclass(slots=True)
class Copied:
    """Bytes, by the way they went."""

    written: int = 0
    shared: int = 0
    offloaded: int = 0
    zeros: int = 0

    def add(self, other: Copied) -> None:
        """Both together."""
        self.written += other.written
        self.shared += other.shared
        self.offloaded += other.offloaded
        self.zeros += other.zeros


class _Source:
    """A file of the chain in which guest data stand, and what is known of it."""

    def __init__(self, storage: Storage, target: FileStorage, options: Options) -> None:
        self.storage = storage
        self.offload: Offload | None = None
        if isinstance(storage, FileStorage) and (options.may_share or options.may_copy):
            self.offload = Offload(storage, target, may_share=options.may_share, may_copy=options.may_copy)
        self._starts: list[int] = []
        self._stops: list[int] = []

    def ranges(self, host_offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """The range, as `Storage.data_ranges` tells it.

        What the file is asked once is remembered, because to some file systems the way to the next hole is long.
        """
        end = host_offset + length
        while host_offset < end:
            known = bisect_right(self._starts, host_offset)
            if known and host_offset < self._stops[known - 1]:
                stop, is_data = self._stops[known - 1], True
            else:
                stop, is_data = self._ask(host_offset, end)
            stop = min(stop, end)
            yield host_offset, stop - host_offset, is_data
            host_offset = stop

    def _ask(self, host_offset: int, end: int) -> tuple[int, bool]:
        """Where the data or the hole at `host_offset` ends, as far as that is not behind both `end` and the file."""
        reach = max(self.storage.size(), end) - host_offset
        _, length, is_data = next(iter(self.storage.data_ranges(host_offset, reach)))
        if is_data:
            if len(self._starts) == _REMEMBERED:
                self._starts.clear()
                self._stops.clear()
            place = bisect_right(self._starts, host_offset)
            self._starts.insert(place, host_offset)
            self._stops.insert(place, host_offset + length)
        return host_offset + length, is_data


class _Piece(NamedTuple):
    """What is to stand in the target from `guest_offset + shift` on. `source` None: only the image can read it;
    `is_zero`: nothing is to be read at all."""

    guest_offset: int
    length: int
    shift: int = 0
    source: _Source | None = None
    host_offset: int = 0
    is_zero: bool = False


@dataclass(slots=True)
class _Pieces:
    """What is left to do, for all workers. After an error nothing is."""

    total: int
    progress: Progress | None
    start: int | None = None
    """Where in the target the first piece is to stand."""
    pieces: Iterator[_Piece] = field(default_factory=lambda: iter(()))
    lock: threading.Lock = field(default_factory=threading.Lock)
    error: BaseException | None = None

    def take(self) -> _Piece | None:
        """The next piece; None if there is none. Raises what telling the extents does."""
        with self.lock:
            if self.error is not None:
                return None
            piece = next(self.pieces, None)
            if piece is not None and self.progress is not None:
                target_offset = piece.guest_offset + piece.shift
                self.start = target_offset if self.start is None else self.start
                self.progress(target_offset - self.start, self.total)
            return piece

    def fail(self, error: BaseException) -> None:
        """The first error is what stopped the work. Takes no lock: who looks for a piece may hold it for long."""
        self.error = self.error or error


def copy_out(image: Image, target: FileStorage, options: Options, progress: Progress | None = None) -> Copied:
    """Let the first `image.virtual_size` bytes of `target` be the disk, which `target` is long enough for.

    `progress` is told (done, total) bytes, by any of the threads. Raises what reading the image does, OSError of any
    of the files with its path; then any part may be written.
    """
    size = image.virtual_size
    return copy_ranges(image, [Range(0, size, 0)], target, options, total=size, progress=progress)


class Range(NamedTuple):
    """A range of the disk, and where it is to stand in the target. Bytes."""

    guest_offset: int
    length: int
    target_offset: int


Told = Callable[[int, int, memoryview | None], None]
"""What is told of a range of the disk: guest offset, length, and the bytes, good until it returns; None for zeros."""


def copy_ranges(
    image: Image,
    ranges: Iterable[Range],
    target: FileStorage,
    options: Options,
    *,
    total: int,
    told: Told | None = None,
    progress: Progress | None = None,
) -> Copied:
    """Let ranges of the disk, `total` bytes, ascending, stand one behind the other in `target`, which is long enough.

    Guest and target offsets differ by multiples of the granule. `told` is told of all bytes, by any of the threads, in
    parts that end at multiples of 256 KiB of the disk, or with their range; nothing is shared or offloaded then.
    Progress and errors are as for `copy_out`.
    """
    work = _Pieces(total, progress)
    work.pieces = _pieces(image, ranges, target, options, work) if told is None else _readable(ranges)
    workers = [_Worker(image, target, options, work, told) for _ in range(options.threads)]
    started: list[_Worker] = []
    try:
        with suppress(RuntimeError):  # no room for a thread: those that are there do all of the work
            for worker in workers[1:]:
                threading.Thread(target=worker.run).start()
                started.append(worker)
        workers[0].run()
    except BaseException as error:
        work.fail(error)
    _wait_for(started, work)
    if work.error is not None:
        raise work.error
    if progress is not None:
        progress(total, total)
    copied = Copied()
    for worker in workers:
        copied.add(worker.copied)
    copied.zeros = total - copied.written - copied.shared - copied.offloaded
    return copied


def _wait_for(workers: list[_Worker], work: _Pieces) -> None:
    """Return when none of them works any more: who is interrupted would close the files under their hands.

    Not by `Thread.join`, which believes after an interruption that the thread has ended (bpo-45274).
    """
    for worker in workers:
        while not worker.has_ended.is_set():
            try:
                worker.has_ended.wait()
            except BaseException as error:
                work.fail(error)


def data_storages(image: Image) -> list[Storage]:
    """The file that keeps the guest's data of each layer, by depth."""
    storages: list[Storage] = []
    disk: GuestDisk | None = image
    while isinstance(disk, Image):
        storages.append(disk.layer.data)
        disk = disk.layer.backing
    if isinstance(disk, RawDisk):
        storages.append(disk.storage)
    return storages


def _readable(ranges: Iterable[Range]) -> Iterator[_Piece]:
    """The pieces of ranges that are to be read through the image."""
    for each in ranges:
        yield from _cut(_Piece(each.guest_offset, each.length, each.target_offset - each.guest_offset), _PIECE)


def _pieces(
    image: Image, ranges: Iterable[Range], target: FileStorage, options: Options, work: _Pieces
) -> Iterator[_Piece]:
    """Ends early after an error: a disk may go on and on without a piece."""
    sources = [_Source(storage, target, options) for storage in data_storages(image)]
    stands_still = not image.writable
    for each in ranges:
        shift = each.target_offset - each.guest_offset
        if each.length <= _CHUNK:  # read sooner than looked up
            yield _Piece(each.guest_offset, each.length, shift)
            continue
        for extent in image.extents(each.guest_offset, each.length):
            if work.error is not None:
                return
            if extent.kind is ExtentKind.COMPRESSED or (extent.kind is ExtentKind.DATA and not stands_still):
                yield from _cut(_Piece(extent.guest_offset, extent.length, shift), _PIECE)
            elif extent.kind is ExtentKind.DATA and extent.host_offset is not None:
                yield from _standing(extent, extent.host_offset, shift, sources[extent.depth], options)
            elif not options.is_empty:
                yield from _cut(_Piece(extent.guest_offset, extent.length, shift, is_zero=True), _ZERO_PIECE)


def _standing(extent: Extent, host_offset: int, shift: int, source: _Source, options: Options) -> Iterator[_Piece]:
    """The pieces of an extent that stands in a file."""
    before = extent.guest_offset - host_offset
    for start, length, is_data in source.ranges(host_offset, extent.length):
        if not is_data:
            if not options.is_empty:
                yield from _cut(_Piece(start + before, length, shift, is_zero=True), _ZERO_PIECE)
            continue
        done = 0
        while done < length:
            limit = _SHARED_PIECE if source.offload is not None and source.offload.shares else _PIECE
            step = min(length - done, limit - (start + before + done) % _CHUNK)
            yield _Piece(start + before + done, step, shift, source, start + done)
            done += step


def _cut(piece: _Piece, limit: int) -> Iterator[_Piece]:
    """The piece in parts that end where multiples of `limit` do in the disk."""
    for start, end in parts(piece.guest_offset, piece.guest_offset + piece.length, limit):
        yield piece._replace(guest_offset=start, length=end - start)


class _Worker:
    """One thread of the work, with a buffer of its own."""

    def __init__(self, image: Image, target: FileStorage, options: Options, work: _Pieces, told: Told | None) -> None:
        self.copied = Copied()
        self.has_ended = threading.Event()
        self._image = image
        self._target = target
        self._early = EarlyWriting(target)
        self._work = work
        self._told = told
        self._is_empty = options.is_empty
        self._granule = options.granule or _CHUNK
        self._skips_zeros = options.granule > 0
        self._size = self._granule * max(_CHUNK // self._granule, 1)
        self._buffer = memoryview(bytearray(self._size))

    def run(self) -> None:
        """Work until nothing is left, or somebody failed."""
        try:
            while piece := self._work.take():
                self._move(piece)
                self._early.wrote(piece.guest_offset + piece.shift, piece.length)
        except BaseException as error:
            self._work.fail(error)
        finally:
            self.has_ended.set()

    def _move(self, piece: _Piece) -> None:
        target_offset = piece.guest_offset + piece.shift
        if piece.is_zero:
            self._target.write_zeroes(target_offset, piece.length, may_punch=True)
        elif piece.source is None and self._told is not None:
            self._through_buffer(self._read_and_tell, piece.guest_offset, target_offset, piece.length)
        elif piece.source is None:
            self._through_buffer(self._image.read_into, piece.guest_offset, target_offset, piece.length)
        elif piece.source.offload is None:
            read_into = piece.source.storage.read_into
            self._through_buffer(read_into, piece.host_offset, target_offset, piece.length)
        else:
            self._offloaded(piece.source, piece.source.offload, piece, target_offset)

    def _read_and_tell(self, chunk: memoryview, guest_offset: int) -> None:
        self._image.read_into(chunk, guest_offset)
        if self._told is not None:
            self._told(guest_offset, len(chunk), chunk)

    def _offloaded(self, source: _Source, offload: Offload, piece: _Piece, target_offset: int) -> None:
        """What cannot be shared lies at both ends of what can."""
        head, shared = offload.share(piece.host_offset, target_offset, piece.length)
        self.copied.shared += shared
        for start, end in ((0, head), (head + shared, piece.length)):
            if start == end:
                continue
            done = offload.copy(piece.host_offset + start, target_offset + start, end - start)
            self.copied.offloaded += done
            at = start + done
            self._through_buffer(source.storage.read_into, piece.host_offset + at, target_offset + at, end - at)

    def _through_buffer(
        self, read_into: Callable[[memoryview, int], None], offset: int, target_offset: int, length: int
    ) -> None:
        """Chunks end where the granules of the target do, so the buffer begins with what of a granule is not asked.

        Where bytes are told of, chunks also end where as long ones of the disk would.
        """
        end = target_offset + length
        while target_offset < end:
            skipped = target_offset % self._granule
            count = min(self._size - skipped, end - target_offset)
            if self._told is not None:
                count = min(count, _CHUNK - offset % _CHUNK)
            chunk = self._buffer[skipped : skipped + count]
            read_into(chunk, offset)
            self._write(chunk, skipped, target_offset)
            offset += count
            target_offset += count

    def _write(self, chunk: memoryview, skipped: int, target_offset: int) -> None:
        """Write what of `chunk` is not zeros; it stands behind `skipped` bytes of the buffer."""
        count = len(chunk)
        runs = [(0, count)]
        if self._skips_zeros:
            runs = self._runs(skipped, count)
        if not self._is_empty:
            runs = [(0, count)] if runs else []
        for start, stop in runs:
            self._target.write_from(chunk[start:stop], target_offset + start)
            self.copied.written += stop - start
        if not runs and not self._is_empty:
            self._target.write_zeroes(target_offset, count, may_punch=True)

    def _runs(self, skipped: int, count: int) -> list[tuple[int, int]]:
        stop = skipped + count
        whole = -(-stop // self._granule) * self._granule
        if skipped or whole != stop:
            self._buffer[:skipped] = bytes(skipped)
            self._buffer[stop:whole] = bytes(whole - stop)
        found = data_runs(self._buffer[:whole], self._granule)
        if not skipped and whole == stop:
            return found
        return [(max(start - skipped, 0), min(end - skipped, count)) for start, end in found]
