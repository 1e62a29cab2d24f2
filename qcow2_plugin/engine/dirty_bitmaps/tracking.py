"""Persistent dirty bitmaps, kept true while the disk that they describe is being changed.

**States of a bitmap.** *Settled*: what is on disk is right. *Held*: in_use is set on disk, durably, so nobody believes
the bits there, and they need not be right; what of the disk changed is marked in memory. A crash leaves a held bitmap
well formed and known to be stale; whoever makes backups makes a full one.

    begin         settled -> held   every enabled bitmap; durable before the first change of the disk
    mark                            in memory only
    settle                          what follows, with the barriers between
      store_bits                    bits, to their place or to new clusters; durable with the refcounts of those before
      store_tables                  table entries; durable before
      finish      held -> settled   in_use is cleared

Bits are overwritten in place, which is safe while in_use is set. A table entry is written when the refcount of the
cluster that it names, and the bits there, are durable, so that even a stale bitmap names no cluster that is somebody
else's. in_use is cleared when all of that is durable, since from then on the bits are believed.

An enabled bitmap that we cannot keep, because its kind, its flags or its size are none that we know, is held by `begin`
and never settled again. A disabled one does not follow the disk and is left alone.

**Another size of the disk** changes all bitmaps, disabled ones too, so all are held first. A table that grows beyond
its clusters is copied:

    grow     new table > refcounts > barrier > its offset into the directory > barrier > its number of entries > barrier
    shrink   number of entries > barrier > what lies behind is retired, bits behind the end of the disk are cleared

Between the two steps of growing the directory has the new table with the old number of entries: its beginning is the
old table. What falls away is retired when no durable pointer is left. A held bitmap may have any size, so the size of
the disk can change before or after; it is settled only when both agree. The new part of the disk is clean, as in QEMU.

**What may be torn.** A directory entry begins at a multiple of 8 in a directory that begins with a cluster, and a
sector is 512 bytes; so table offset (8 bytes at 0), number of entries (4 at 8) and flags (4 at 12) each lie in one
sector, and each is one write. Two of them together may lie in two sectors, so they are two writes with a barrier
between. Entries of a bitmap table are 8 bytes at multiples of 8.

What reads as zeros and is zeroed, or discarded, has not changed; where that is known it is not marked, as QEMU would.

Bits are kept and written in *chunks*, a page or, where that is smaller, a cluster; memory follows what is marked.

What has to be durable in between is the caller's business, but in `settle` and `resize`. Which bitmaps there are, and
what they are called, is changed by `bitmap_changes`, which brings a new list (`adopt`).

**Lock.** The image's, for everything here; for `resize`, which writes refcounts, no write-back may be running either.

Source: docs/interop/qcow2.rst, "Bitmaps".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.engine.image_file import Clusters, ImageFile, Structure
from qcow2_plugin.engine.writeback import write_refcounts_now
from qcow2_plugin.errors import MissingReferenceError, ResizeError, about_file, printable
from qcow2_plugin.format import bits
from qcow2_plugin.format.bitmaps import (
    FLAG_IN_USE,
    FLAGS_AT,
    TABLE_ENTRIES_AT,
    TABLE_OFFSET_AT,
    Bitmap,
    entry_offsets,
    table_entries_for,
)
from qcow2_plugin.format.geometry import MAX_BITMAP_DATA_SIZE

Piece = tuple[int, npt.NDArray[np.uint8] | None]
"""The number of a cluster of bits and the bits, None for ones all over."""

_CHUNK_SIZE = 4096
"""Bytes of bits at most."""
_ENTRIES_AT_ONCE = 65536
"""Entries looked at together of a table that may be of any size."""


@dataclass(slots=True, eq=False)
class Kept:
    """One bitmap, as it is kept while the image is open for writing."""

    bitmap: Bitmap
    """As in the directory, but for in_use."""
    entry_offset: int
    """Host offset of the directory entry."""
    unusable_reason: str | None
    is_in_use: bool
    """On disk, now."""
    is_lost: bool = False
    """A change of its structure failed half-way: it stays in use."""
    is_in_doubt: bool = False
    """Clearing in_use failed, so who knows what the disk says."""
    marks: dict[int, bytearray] = field(default_factory=dict)
    """Bits set since the image was opened, by number of chunk."""
    changed: set[int] = field(default_factory=set)
    """Chunks whose marks are not on disk."""
    table: npt.NDArray[np.uint64] | None = None
    """Once it was needed."""
    unwritten: set[int] = field(default_factory=set)
    """Entries of the table that are not on disk."""

    @property
    def reason(self) -> str | None:
        """Why it must not be used, None if it may."""
        if self.is_lost:
            return "a change of its size has failed half-way"
        return self.unusable_reason

    @property
    def is_held(self) -> bool:
        """In use by us, and can be settled."""
        return self.is_in_use and self.reason is None


class BitmapTracker:
    """The bitmaps of one image: `bitmaps` is what its directory lists."""

    def __init__(self, file: ImageFile, bitmaps: list[Bitmap]) -> None:
        self._file = file
        self._cluster_size = file.header.geometry.cluster_size
        self._chunk_size = min(_CHUNK_SIZE, self._cluster_size)
        self._chunks_per_cluster = self._cluster_size // self._chunk_size
        self._virtual_size = file.header.virtual_size
        pointer = file.header.bitmaps
        directory_offset = 0 if pointer is None else pointer.directory_offset
        self._kept = [
            Kept(
                bitmap,
                directory_offset + offset,
                bitmap.unusable_reason(self._virtual_size, self._cluster_size),
                bitmap.in_use,
            )
            for bitmap, offset in zip(bitmaps, entry_offsets(bitmaps), strict=True)
        ]
        self._tracked = _tracked(self._kept)
        self._first_size = file.storage.size()

    @property
    def kept(self) -> list[Kept]:
        """The bitmaps, in the order of the directory."""
        return list(self._kept)

    def watch(self, bitmap: Bitmap) -> Callable[[], None]:
        """What raises MissingReferenceError once this bitmap of the directory is removed, made anew or moved."""
        place = bitmap.table_offset
        marks = next((each.marks for each in self._kept if each.bitmap.table_offset == place), None)

        def require_current() -> None:
            if not any(each.marks is marks and each.bitmap.table_offset == place for each in self._kept):
                name, path = printable(bitmap.name), self._file.storage.path
                raise MissingReferenceError(f'bitmap "{name}" was removed or changed while it was read', file=path)

        return require_current

    def adopt(self, kept: list[Kept]) -> None:
        """From now on these are the bitmaps: the directory says so."""
        self._kept, self._tracked = kept, _tracked(kept)

    @property
    def is_empty(self) -> bool:
        """No bitmap follows the disk."""
        return not self._tracked

    @property
    def has_held(self) -> bool:
        """There are bitmaps to store and to settle."""
        return any(each.is_held for each in self._kept)

    # -- following the disk --

    def begin(self) -> bool:
        """Hold every enabled bitmap. True if something was written, which the caller makes durable before the disk
        changes. Raises CorruptImageError, OSError."""
        return self._hold(each for each in self._kept if each.bitmap.auto)

    def mark(self, offset: int, length: int) -> None:
        """The guest range changes. What of it lies behind the disk as the bitmaps know it is new, and so clean."""
        length = min(length, self._virtual_size - offset)
        if length <= 0:
            return
        for each in self._tracked:
            for chunk, start, stop in self._parts(each, offset, length):
                marks = each.marks.get(chunk)
                if marks is None:
                    marks = each.marks[chunk] = bytearray(self._chunk_size)
                bits.set_bits(marks, start, stop)
                each.changed.add(chunk)

    def covers(self, offset: int, length: int) -> bool:
        """True if `mark` for this range would change nothing, now or when the bitmaps have followed a resize."""
        if not length:
            return True
        for each in self._tracked:
            for chunk, start, stop in self._parts(each, offset, length):
                marks = each.marks.get(chunk)
                if marks is None or not bits.are_set(marks, start, stop):
                    return False
        return True

    def _parts(self, each: Kept, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(chunk, first bit in it, one past the last) for a guest range that is not empty."""
        granularity_bits, per_chunk = each.bitmap.granularity_bits, 8 * self._chunk_size
        first, last = offset >> granularity_bits, offset + length - 1 >> granularity_bits
        for chunk in range(first // per_chunk, last // per_chunk + 1):
            base = chunk * per_chunk
            yield chunk, max(first - base, 0), min(last + 1 - base, per_chunk)

    # -- storing --

    def store_bits(self, allocator: Allocator) -> None:
        """Write the bits of held bitmaps that changed. Where a new cluster was needed, `store_tables` names it.

        Raises CorruptImageError, TruncatedImageError, OSError; then it can be tried again.
        """
        held = [each for each in self._kept if each.is_held]
        homeless: list[tuple[Kept, int]] = []
        for each in held:
            for chunk in sorted(each.changed):
                index, number = divmod(chunk, self._chunks_per_cluster)
                entry = int(self.table_of(each)[index])
                if entry > bits.TABLE_ALL_ONES:
                    self._merge_bits(each, chunk, entry + number * self._chunk_size)
                elif not entry and (each, index) not in homeless[-1:]:
                    homeless.append((each, index))
        runs = allocator.allocate(len(homeless))
        places = [
            place for run in runs for place in range(run.host_offset, run.host_offset + run.length, self._cluster_size)
        ]
        try:
            for (each, index), place in zip(homeless, places, strict=True):
                self._file.metadata.claim(Structure.BITMAP, place // self._cluster_size, 1)
                self._write(self._whole(each, index), place)
        except BaseException:
            self._file.metadata.release(place // self._cluster_size for place in places)
            allocator.release(runs)
            raise
        for (each, index), place in zip(homeless, places, strict=True):
            each.unwritten.add(index)  # before the table has it, so that no interrupt hides what is to be written
            self.table_of(each)[index] = place
        for each in held:
            each.changed.clear()

    def _merge_bits(self, each: Kept, chunk: int, host_offset: int) -> None:
        stored = self.read_bits(each, host_offset, self._chunk_size)
        merged = (np.frombuffer(stored, dtype=np.uint8) | np.frombuffer(each.marks[chunk], dtype=np.uint8)).tobytes()
        if merged != stored:
            self._write(merged, host_offset)

    def _whole(self, each: Kept, index: int) -> bytes:
        """All marks of one cluster of bits."""
        nothing = bytes(self._chunk_size)
        return b"".join(each.marks.get(chunk, nothing) for chunk in self._chunks(index))

    def _chunks(self, index: int) -> range:
        """The chunks of one cluster of bits."""
        return range(index * self._chunks_per_cluster, (index + 1) * self._chunks_per_cluster)

    def store_tables(self) -> None:
        """Write what the tables of held bitmaps have to say about new clusters. Raises CorruptImageError, OSError."""
        for each in self._kept:
            if each.is_held and each.unwritten:
                table = self.table_of(each)
                for index in sorted(each.unwritten):
                    self._write(int(table[index]).to_bytes(8, "big"), each.bitmap.table_offset + 8 * index)
                each.unwritten.clear()

    def settle(self, allocator: Allocator, write_back: Callable[[], None]) -> None:
        """Store and settle what is held, durably; `write_back` brings refcounts to disk, and a barrier behind them.

        Raises what it does, and what the steps do. The barrier after `store_tables` is for the bits as well: a
        write-back that finds nothing to do for the image file, beside a data file, has none for it.
        """
        if not self.has_held:
            return
        self.store_bits(allocator)
        write_back()
        self.store_tables()
        self._file.barrier()
        self.finish()
        self._file.barrier()

    def finish(self) -> None:
        """Settle the held bitmaps, but those that are not stored, or do not fit the disk since a resize failed.

        Raises CorruptImageError, OSError.
        """
        if self._virtual_size != self._file.header.virtual_size:
            return
        for each in self._kept:
            if each.is_held and not each.changed and not each.unwritten:
                each.is_in_doubt = True
                self._write_flags(each, each.bitmap.flags)
                each.is_in_use = each.is_in_doubt = False

    # -- another size of the disk --

    def require_resizable(self, new_size: int) -> None:
        """Raises ResizeError, with what to do, if a bitmap cannot follow the disk to `new_size` bytes."""
        for each in self._kept:
            reason = each.unusable_reason
            entries = table_entries_for(new_size, each.bitmap.granularity_bits, self._cluster_size)
            if reason is None and not 0 < entries * self._cluster_size <= MAX_BITMAP_DATA_SIZE:
                reason = f"it cannot describe {new_size} bytes"
            if reason is not None:
                raise ResizeError(
                    f'bitmap "{printable(each.bitmap.name)}" cannot follow the disk to another size: {reason}; '
                    "remove the bitmap first",
                    file=self._file.storage.path,
                )

    def resize(self, new_size: int, allocator: Allocator) -> None:
        """Let all bitmaps follow the disk to `new_size` bytes, durably but for the bits; they are held afterwards.

        Raises what `require_resizable` does; CorruptImageError, TruncatedImageError, OSError.
        """
        self.require_resizable(new_size)
        for each in self._kept:
            self.table_of(each)  # an error in one of them must come before anything changes
        if self._hold(self._kept):
            self._file.barrier()
        if new_size > self._virtual_size:
            if self._virtual_size < self._file.header.virtual_size:
                self._lose(self._kept)  # they were cut short for a disk that was not: what was behind is forgotten
            self._grow(new_size, allocator)
        else:
            self._shrink(new_size, allocator)
        self._virtual_size = new_size

    def _grow(self, new_size: int, allocator: Allocator) -> None:
        longer: list[tuple[Kept, Bitmap]] = []
        moved: list[tuple[int, int]] = []
        try:
            for each in self._kept:
                self._clear_tail(each, self._virtual_size)
                entries = table_entries_for(new_size, each.bitmap.granularity_bits, self._cluster_size)
                if entries > each.bitmap.table_entries:
                    longer.append((each, self._lengthen(each, entries, allocator, moved)))
            if moved:
                write_refcounts_now(self._file, allocator)
            if longer:
                self._file.barrier()
        except BaseException:
            for host_offset, length in moved:
                allocator.release_table(host_offset, length)
            raise
        if longer:
            self._publish(longer)
        for each, bitmap in longer:
            if bitmap.table_offset != each.bitmap.table_offset:
                first = each.bitmap.table_offset // self._cluster_size
                allocator.retire_table(first, self._table_clusters(each.bitmap.table_entries))
            added = np.zeros(bitmap.table_entries - each.bitmap.table_entries, dtype=np.uint64)
            each.table = np.concatenate((self.table_of(each), added))
            each.bitmap = bitmap

    def _publish(self, longer: list[tuple[Kept, Bitmap]]) -> None:
        """Change the directory to what it has to say about longer tables."""
        try:
            moved = [each for each in longer if each[0].bitmap.table_offset != each[1].table_offset]
            for each, bitmap in moved:
                self._write_field(each, TABLE_OFFSET_AT, bitmap.table_offset, 8)
            if moved:
                self._file.barrier()
            for each, bitmap in longer:
                self._write_field(each, TABLE_ENTRIES_AT, bitmap.table_entries, 4)
            self._file.barrier()
        except BaseException:
            self._lose(each for each, _ in longer)
            raise

    def _lengthen(self, each: Kept, entries: int, allocator: Allocator, moved: list[tuple[int, int]]) -> Bitmap:
        """The bitmap with room for so many entries, written, but for the directory; what was allocated in `moved`."""
        bitmap = each.bitmap
        table_clusters = self._table_clusters(entries)
        if table_clusters == self._table_clusters(bitmap.table_entries):
            added = bytes(8 * (entries - bitmap.table_entries))
            self._write(added, bitmap.table_offset + 8 * bitmap.table_entries)
            return replace(bitmap, table_entries=entries)
        length = table_clusters * self._cluster_size
        place = allocator.allocate_table(Structure.BITMAP, length)
        moved.append((place, length))
        content = self.table_of(each).astype(">u8").tobytes()
        self._write(content.ljust(length, b"\0"), place)
        return replace(bitmap, table_offset=place, table_entries=entries)

    def _shrink(self, new_size: int, allocator: Allocator) -> None:
        cut: list[tuple[Kept, int]] = []
        for each in self._kept:
            entries = table_entries_for(new_size, each.bitmap.granularity_bits, self._cluster_size)
            if entries < each.bitmap.table_entries:
                cut.append((each, entries))
        try:
            for each, entries in cut:
                self._write_field(each, TABLE_ENTRIES_AT, entries, 4)
            if cut:
                self._file.barrier()
            for each, entries in cut:
                self._cut_off(each, entries, allocator)
            for each in self._kept:
                self._clear_tail(each, new_size)
        except BaseException:
            self._lose(self._kept)
            raise

    def _cut_off(self, each: Kept, entries: int, allocator: Allocator) -> None:
        """Forget what lies behind so many entries of the table; on disk they are gone."""
        table = self.table_of(each)
        clusters = _clusters_in(table[entries:], self._cluster_size)
        self._file.metadata.release(clusters.tolist())
        allocator.retire(clusters)
        kept_clusters, table_clusters = map(self._table_clusters, (entries, each.bitmap.table_entries))
        if kept_clusters < table_clusters:
            first = each.bitmap.table_offset // self._cluster_size
            allocator.retire_table(first + kept_clusters, table_clusters - kept_clusters)
        each.table = table[:entries].copy()
        each.bitmap = replace(each.bitmap, table_entries=entries)
        chunk_count = entries * self._chunks_per_cluster
        each.marks = {chunk: marks for chunk, marks in each.marks.items() if chunk < chunk_count}
        each.changed = {chunk for chunk in each.changed if chunk < chunk_count}
        each.unwritten = {index for index in each.unwritten if index < entries}

    def _clear_tail(self, each: Kept, virtual_size: int) -> None:
        """Clear the bits behind the end of a disk of this size in the cluster of bits that it ends in."""
        index, bit = divmod(-(-virtual_size >> each.bitmap.granularity_bits), 8 * self._cluster_size)
        if not bit:
            return
        table = self.table_of(each)
        entry = int(table[index])
        if entry == bits.TABLE_ALL_ONES:  # stands for bits behind the end too: these have to be stored one by one
            table[index] = 0
            for chunk in self._chunks(index):
                each.marks[chunk] = bytearray(b"\xff" * self._chunk_size)
                each.changed.add(chunk)
        elif entry:
            stored = bytearray(self.read_bits(each, entry, self._cluster_size))
            before = bytes(stored)
            bits.clear_from(stored, bit)
            if stored != before:
                self._write(bytes(stored), entry)
        last, bit = divmod(bit, 8 * self._chunk_size)
        for chunk in self._chunks(index)[last + bool(bit) :]:
            each.marks.pop(chunk, None)
            each.changed.discard(chunk)
        if bit and (marks := each.marks.get(self._chunks(index)[last])) is not None:
            bits.clear_from(marks, bit)

    def _table_clusters(self, entries: int) -> int:
        return -(-8 * entries // self._cluster_size)

    # -- reading and writing --

    def clusters_of(self, each: Kept) -> list[Clusters]:
        """The clusters of its table and those of its bits. Of one that nobody can use those that nobody else has; none
        if that is not known. Raises CorruptImageError, TruncatedImageError, OSError."""
        bitmap = each.bitmap
        first = bitmap.table_offset // self._cluster_size
        parts = [np.arange(first, first + self._table_clusters(bitmap.table_entries), dtype=np.int64)]
        if each.reason is None:
            return [*parts, _clusters_in(self.table_of(each), self._cluster_size)]
        if each.is_lost or bitmap.table_offset + 8 * bitmap.table_entries > self._first_size:
            return []
        for index in range(0, bitmap.table_entries, _ENTRIES_AT_ONCE):
            count = min(_ENTRIES_AT_ONCE, bitmap.table_entries - index)
            entries = self._read_entries(bitmap.table_offset + 8 * index, count)
            is_ours = bits.is_sound(entries, self._cluster_size)  # and was in the file, or it was never ours
            is_ours &= entries + np.uint64(self._cluster_size) <= np.uint64(self._first_size)
            parts.append(_clusters_in(entries[is_ours], self._cluster_size))
        return parts

    def pieces_of(self, each: Kept) -> Iterator[Piece]:
        """What it marks now, on disk or in memory. Raises CorruptImageError, TruncatedImageError, OSError."""
        table = self.table_of(each)
        marked = {chunk // self._chunks_per_cluster for chunk in each.marks}
        for index in sorted(marked.union(np.flatnonzero(table).tolist())):
            entry = int(table[index])
            if entry == bits.TABLE_ALL_ONES:
                yield index, None
                continue
            stored = self.read_bits(each, entry, self._cluster_size) if entry else bytes(self._cluster_size)
            packed = np.frombuffer(stored, dtype=np.uint8)
            if index in marked:
                packed = packed | np.frombuffer(self._whole(each, index), dtype=np.uint8)
            yield index, packed

    def _hold(self, wanted: Iterable[Kept]) -> bool:
        """Set in_use where it is not set. True if something was written."""
        settled = [each for each in wanted if not each.is_in_use or each.is_in_doubt]
        for each in settled:
            self._write_flags(each, each.bitmap.flags | FLAG_IN_USE)
            each.is_in_use, each.is_in_doubt = True, False
        return bool(settled)

    def _lose(self, lost: Iterable[Kept]) -> None:
        for each in lost:
            each.is_lost = True

    def _write_flags(self, each: Kept, flags: int) -> None:
        self._write_field(each, FLAGS_AT, flags, 4)

    def _write_field(self, each: Kept, at: int, value: int, size: int) -> None:
        self._write(value.to_bytes(size, "big"), each.entry_offset + at)

    def _write(self, data: bytes, host_offset: int) -> None:
        self._file.write(Structure.BITMAP, data, host_offset)

    def table_of(self, each: Kept) -> npt.NDArray[np.uint64]:
        """Its table. Raises CorruptImageError, TruncatedImageError, OSError."""
        if each.table is None:
            bitmap = each.bitmap
            each.table = self._read_entries(bitmap.table_offset, bitmap.table_entries)
            with about_file(self._file.storage.path):
                bits.check_table(each.table, self._cluster_size)
        return each.table

    def _read_entries(self, host_offset: int, count: int) -> npt.NDArray[np.uint64]:
        stored = read_structure(self._file.storage, "bitmap table", host_offset, 8 * count)
        return np.frombuffer(stored, dtype=">u8").astype(np.uint64)

    def read_bits(self, each: Kept, host_offset: int, length: int) -> bytes:
        """Bits at this place. Raises TruncatedImageError, OSError."""
        name = f'bitmap "{printable(each.bitmap.name)}"'
        return read_structure(self._file.storage, name, host_offset, length)


def _tracked(kept: Iterable[Kept]) -> list[Kept]:
    """Those that follow the disk."""
    return [each for each in kept if each.bitmap.auto and each.unusable_reason is None]


def _clusters_in(entries: npt.NDArray[np.uint64], cluster_size: int) -> Clusters:
    """The clusters of bits that table entries name."""
    named: Clusters = (entries[entries > bits.TABLE_ALL_ONES] // np.uint64(cluster_size)).astype(np.int64)
    return named
