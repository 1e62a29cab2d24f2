"""Where a write goes, and what becomes of the entries: the mapping of a disk that is being written.

`place` plans a write to one slice of a table: pieces that say where the caller's bytes go and what has to be filled in
around them, and the entries as they will be. Nothing of it is visible until `commit`; `abandon` takes it back.
`plan_clear` plans zeroes and discards, whose entries change without any data being moved; `apply` carries that out.

**In place or elsewhere.** A cluster is written in place if its entry has COPIED *and* its refcount is 1. A preallocated
zero is, too, but all of it must be written. Everything else is written to a new cluster, filled up with what a read
shows there: old data, a decompressed cluster, the backing file, zeros. With an external data file the new place is the
same place. With extended L2 the unit of filling is the subcluster; a cluster that moves takes its allocated subclusters
along.

**Lock.** The image's, for everything here; the caller has claimed the clusters of a placement until its commit.

Source: docs/interop/qcow2.rst, "Standard Cluster Descriptor", "Extended L2 Entries".
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from qcow2_plugin.engine.allocator import Allocator, Run
from qcow2_plugin.engine.image_file import Clusters, ImageFile
from qcow2_plugin.engine.mapping import Mapping
from qcow2_plugin.engine.tables import RUN_MASK, Slice
from qcow2_plugin.engine.written_tables import WrittenTables
from qcow2_plugin.extent import Extent, ExtentKind, GuestDisk
from qcow2_plugin.format import entries
from qcow2_plugin.format.entries import ALL_SUBCLUSTERS, COMPRESSED, COPIED, OFFSET_MASK, ZERO, ClusterKind
from qcow2_plugin.format.geometry import SECTOR_SIZE, SUBCLUSTERS
from qcow2_plugin.storage import Storage

_ALL_ZERO = ALL_SUBCLUSTERS << SUBCLUSTERS


class Fill(NamedTuple):
    """What surrounds the caller's bytes: `length` bytes told by `extents`; zeros where those end, or are none."""

    length: int
    extents: tuple[Extent, ...]


NO_FILL = Fill(0, ())


class Piece(NamedTuple):
    """A run of the caller's bytes from guest `start` to `end`, whose first byte goes to `host_offset`, with what is to
    be written directly before and behind it. `is_clean`: the place reads as zeros already."""

    start: int
    end: int
    host_offset: int
    head: Fill
    tail: Fill
    is_clean: bool


@dataclass(slots=True)
class _Target:
    """One guest cluster of a write, by the number of its entry in the slice.

    `host_offset` is the cluster's, None if a new one is needed; guest bytes `first` to `last` must be written so that
    `start` to `end` can be; `bitmap` is the new one. `shows_zeros`: all of the cluster is known to read as zeros.
    """

    entry: int
    start: int
    end: int
    host_offset: int | None
    first: int
    last: int
    bitmap: int
    is_changed: bool
    shows_zeros: bool = False


class _Change(NamedTuple):
    """What `cluster_count` entries from this number on become: the clusters in line from `host_offset` on. `old` is
    what the entry was, the same for all of them."""

    entry: int
    cluster_count: int
    host_offset: int
    bitmap: int
    old: int


@dataclass(slots=True)
class Placement:
    """A planned write to guest clusters `first` to `end` (not included). Without `changes` it claims nothing."""

    key: int
    first: int
    end: int
    pieces: list[Piece] = field(default_factory=list)
    changes: list[_Change] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


class Clearing(enum.Enum):
    """How guest clusters are to read as zeros."""

    KEEP = "keep"
    """Zeros; what is allocated stays so."""
    FREE = "free"
    """Zeros; what is allocated is given back."""
    DISCARD = "discard"
    """Given back; what is not allocated may stay as it is if no backing file shows through."""
    DROP = "drop"
    """Given back, with nothing to say that there ever was anything: for what lies behind the end of the disk."""


@dataclass(slots=True)
class Clear:
    """Planned new words of a part of a slice, from `index` on; `freed` are host clusters that lose a reference."""

    key: int
    index: int
    words: entries.Entries
    freed: Clusters


class WrittenMapping(Mapping):
    """The map of the active disk of an image that is open for writing."""

    tables: WrittenTables

    def __init__(
        self,
        tables: WrittenTables,
        file: ImageFile,
        allocator: Allocator,
        *,
        data: Storage,
        backing: GuestDisk | None,
    ) -> None:
        """`data` is where guest data goes."""
        super().__init__(tables)
        self._file = file
        self._allocator = allocator
        self._data = data
        self._backing = backing
        self._has_zero_entries = file.header.version > 2

    def follow_tables(self) -> None:
        """The tables have moved, the disk has another size, or the image another version."""
        self._source = self.tables.source
        self._rules = self._source.rules
        self._has_zero_entries = self._file.header.version > 2

    @property
    def virtual_size(self) -> int:
        """Of the disk as the tables know it; a resize may be about to show it."""
        return self._source.virtual_size

    @property
    def slice_coverage(self) -> int:
        """Guest bytes below one slice."""
        return 1 << self.tables.slice_bits

    # -- writes --

    def place(self, start: int, end: int) -> Placement:
        """Plan to write guest bytes `start` to `end`, which lie below one slice.

        Raises CorruptImageError (and marks the image corrupt, if a write would rely on what is wrong),
        TruncatedImageError, OSError; then nothing has changed that could be seen.
        """
        key = start >> self.tables.slice_bits
        bits = self._geometry.cluster_bits
        placement = Placement(key, start >> bits, (end - 1 >> bits) + 1)
        found = self.tables.slice_for_writing(key)
        if not self._geometry.extended_l2 and not any(self._words_of(placement, found)):
            self._place_fresh(placement, start, end)
            return placement
        targets = []
        for cluster in range(placement.first, placement.end):
            base = cluster << bits
            targets.append(self._target(found, base, max(start, base), min(end, base + self._geometry.cluster_size)))
        if any([target.is_changed for target in targets]):
            self.tables.own(key)
            self._find_places(placement, targets, found)
        try:
            self._add_pieces(placement, targets)
        except BaseException:
            self.abandon(placement)
            raise
        return placement

    def _words_of(self, placement: Placement, found: Slice) -> memoryview:
        """The entries that a placement is about, without extended L2."""
        first = placement.first & self.tables.slice_entries - 1
        return found.words[first : first + placement.end - placement.first]

    def _place_fresh(self, placement: Placement, start: int, end: int) -> None:
        """Plan a write to clusters that are all unallocated: a piece for every run of new ones."""
        bits = self._geometry.cluster_bits
        guest_offset = placement.first << bits
        length = placement.end - placement.first << bits
        if not self.tables.is_own(start):
            self.tables.own(placement.key)
        if self._rules.has_data_file:
            runs = [Run(guest_offset, length, self._is_hole(guest_offset, length))]
        else:
            runs = placement.runs = self._allocator.allocate(length >> bits)
        index = placement.first & self.tables.slice_entries - 1
        shows_zeros = self._backing is None
        try:
            for run in runs:
                run_end = guest_offset + run.length
                first, last = max(start, guest_offset), min(end, run_end)
                target = _Target(index, first, last, run.host_offset, guest_offset, run_end, 0, True, shows_zeros)
                self._add_piece(placement.pieces, target, run.host_offset + first - guest_offset, run.is_clean)
                placement.changes.append(_Change(index, run.length >> bits, run.host_offset, 0, 0))
                index += run.length >> bits
                guest_offset = run_end
        except BaseException:
            self.abandon(placement)
            raise

    def _is_hole(self, offset: int, length: int) -> bool:
        """True if the data file reads as zeros there, because nothing is stored."""
        _, hole_length, is_data = next(self._data.data_ranges(offset, length))
        return not is_data and hole_length == length

    def _target(self, found: Slice, base: int, start: int, end: int) -> _Target:
        index = base >> self._geometry.cluster_bits & self.tables.slice_entries - 1
        word = 0 if found.write_lane is None else found.write_lane[index]
        if word:
            return _Target(index, start, end, word & ~RUN_MASK, start, end, ALL_SUBCLUSTERS, False)
        entry, bitmap, entry_offset = self._entry(found, index)
        cluster_end = base + self._geometry.cluster_size
        if not entry and not self._geometry.extended_l2:
            return _Target(index, start, end, None, base, cluster_end, 0, True, self._backing is None)
        kind = self._valid_kind(entry, bitmap, entry_offset, base)
        host_offset = self._own_cluster(entry, entry_offset, kind) if self.tables.is_own(base) else None
        if self._geometry.extended_l2:
            return self._extended_target(start, end, host_offset, entry, bitmap)
        if host_offset is not None and kind == ClusterKind.NORMAL:
            return _Target(index, start, end, host_offset, start, end, 0, False)
        return _Target(index, start, end, host_offset, base, cluster_end, 0, True)

    def _extended_target(self, start: int, end: int, host_offset: int | None, entry: int, bitmap: int) -> _Target:
        base = start & -self._geometry.cluster_size
        index = base >> self._geometry.cluster_bits & self.tables.slice_entries - 1
        size = self._geometry.subcluster_size
        first, last = (start - base) // size, (end - 1 - base) // size
        touched = (1 << last + 1) - (1 << first)
        data = ALL_SUBCLUSTERS if entry & COMPRESSED else bitmap & ALL_SUBCLUSTERS
        zero = (bitmap >> SUBCLUSTERS) & ~(data | touched)
        new_bitmap = data | touched | zero << SUBCLUSTERS
        fill_start, fill_end = base + first * size, base + (last + 1) * size
        if host_offset is not None:
            if data & touched == touched:
                return _Target(index, start, end, host_offset, start, end, bitmap, False)
            fill_start = start if data >> first & 1 else fill_start
            fill_end = end if data >> last & 1 else fill_end
        elif data:  # they move along
            fill_start = min(fill_start, base + ((data & -data).bit_length() - 1) * size)
            fill_end = max(fill_end, base + data.bit_length() * size)
        return _Target(index, start, end, host_offset, fill_start, fill_end, new_bitmap, True)

    def _valid_kind(self, entry: int, bitmap: int, entry_offset: int, base: int) -> ClusterKind:
        """The kind of the cluster, of its first subcluster with extended L2, proven to be sound."""
        self._extent_of_entry(entry, bitmap, entry_offset, base, base + 1)
        return entries.classify(entry, bitmap, self._rules)

    def _own_cluster(self, entry: int, entry_offset: int, kind: ClusterKind) -> int | None:
        """Host offset of the cluster if it may be written in place."""
        has_space = kind in (ClusterKind.NORMAL, ClusterKind.ZERO_ALLOCATED, ClusterKind.UNALLOCATED_ALLOCATED)
        if not has_space or not entry & COPIED:
            return None
        host_offset = entry & OFFSET_MASK
        if self._rules.has_data_file:
            return host_offset
        self._require_inside_file(host_offset, entry_offset)
        cluster = host_offset >> self._geometry.cluster_bits
        if self._file.metadata.owner(cluster):
            raise self._file.corrupt("L2 entry", f"{entry:#x} points to a structure of the image", entry_offset)
        refcount = self._allocator.refcount(cluster)
        if refcount != 1:
            raise self._file.corrupt("L2 entry", f"{entry:#x} has COPIED, and a refcount of {refcount}", entry_offset)
        return host_offset

    def _find_places(self, placement: Placement, targets: list[_Target], found: Slice) -> None:
        """Allocate what `targets` lack, put it in, and note the changes."""
        missing = [target for target in targets if target.host_offset is None]
        if self._rules.has_data_file:
            for target in missing:
                target.host_offset = target.start & -self._geometry.cluster_size
        elif missing:
            placement.runs = self._allocator.allocate(len(missing))
            offsets = chain.from_iterable(_clusters_of(run, self._geometry.cluster_size) for run in placement.runs)
            for target, host_offset in zip(missing, offsets, strict=True):
                target.host_offset = host_offset
        for target in targets:
            if target.is_changed and target.host_offset is not None:
                old = self._entry(found, target.entry)[0]
                placement.changes.append(_Change(target.entry, 1, target.host_offset, target.bitmap, old))

    def _add_pieces(self, placement: Placement, targets: list[_Target]) -> None:
        """The pieces of a write, as few as the places allow."""
        clean_from = min([run.host_offset for run in placement.runs if run.is_clean], default=OFFSET_MASK)
        within = self._geometry.cluster_size - 1
        for target in targets:
            assert target.host_offset is not None
            host_offset = target.host_offset + (target.start & within)
            self._add_piece(placement.pieces, target, host_offset, target.host_offset >= clean_from)

    def _add_piece(self, pieces: list[Piece], target: _Target, host_offset: int, is_clean: bool) -> None:
        """A piece for a target whose first byte goes to `host_offset`; the last piece, if it goes on there."""
        start, end = target.start, target.end
        tail = self._fill(end, target.last, target, is_clean)
        if is_clean and not tail.length and end & SECTOR_SIZE - 1:  # or the file ends, and may be torn, in a sector
            tail = Fill(min(-end & SECTOR_SIZE - 1, target.last - end), ())
        if target.first == start and pieces and _goes_on(pieces[-1], host_offset, is_clean):
            pieces[-1] = pieces[-1]._replace(end=end, tail=tail)
        else:
            head = self._fill(target.first, start, target, is_clean)
            pieces.append(Piece(start, end, host_offset, head, tail, is_clean))

    def _fill(self, start: int, end: int, target: _Target, is_clean: bool) -> Fill:
        """What is to be filled in from guest `start` to `end`: no zeros where there are some, and in a data file
        nothing behind the end of the disk."""
        if start == end or (is_clean and target.shows_zeros):
            return NO_FILL
        disk_end = self._source.virtual_size
        if self._rules.has_data_file and end > disk_end:
            end = max(disk_end, start)
            if start == end:
                return NO_FILL
        extents: tuple[Extent, ...] = ()
        if not target.shows_zeros and start < disk_end:
            extents = tuple(self.resolve(start, min(end, disk_end) - start))
            extents = () if all(self._is_zero(extent) for extent in extents) else extents
        return Fill(end - start, extents) if extents or not is_clean else NO_FILL

    def _is_zero(self, extent: Extent) -> bool:
        """True if the extent is known to read as zeros."""
        if extent.kind is ExtentKind.UNALLOCATED:
            return self._backing is None or extent.guest_offset >= self._backing.virtual_size
        return extent.kind is ExtentKind.ZERO

    def reads_as_zeros(self, start: int, end: int) -> bool:
        """True if guest bytes `start` to `end` are known to be zeros. Raises as `resolve` does."""
        return all(self._is_zero(extent) for extent in self.resolve(start, end - start))

    def reads_as_data(self, start: int, end: int) -> bool:
        """True if a read looks for guest bytes `start` to `end` in the storage. Raises as `resolve` does."""
        return all(extent.kind is ExtentKind.DATA for extent in self.resolve(start, end - start))

    def commit(self, placement: Placement, *, may_write: bool) -> None:
        """Make a placement visible; its data is in the storage. With `may_write` its clusters may be written to
        straight from now on.

        Raises TruncatedImageError, OSError, and then it has to be abandoned.
        """
        found = self.tables.own(placement.key)
        freed: list[int] = []
        for change in placement.changes:
            if change.old and (change.old & OFFSET_MASK != change.host_offset or change.old & COMPRESSED):
                freed += self._references(change.old)
        if freed:
            self._allocator.retire(np.array(freed, dtype=np.int64))
        is_extended = self._geometry.extended_l2
        places = []
        whole_clusters = self._source.virtual_size >> self._geometry.cluster_bits
        whole_entries = whole_clusters - placement.key * self.tables.slice_entries
        for index, count, host_offset, bitmap, _ in placement.changes:
            if is_extended:
                found.words[2 * index], found.words[2 * index + 1] = COPIED | host_offset, bitmap
            elif count == 1:
                found.words[index] = COPIED | host_offset
            else:
                found.words[index : index + count] = self._entries_of(host_offset, count)
            whole_count = min(count, whole_entries - index)
            if whole_count > 0 and (not is_extended or bitmap == ALL_SUBCLUSTERS):
                places.append((index, whole_count, host_offset))
        self.tables.changed(placement.key, found)
        if places:
            self.tables.enter_lanes(placement.key, found, places, may_write=may_write)

    def _entries_of(self, host_offset: int, count: int) -> memoryview:
        """The entries of clusters in line that are ours alone."""
        return (self.tables.steps[:count] + np.uint64(COPIED | host_offset)).data

    def abandon(self, placement: Placement) -> None:
        """Take back what a placement allocated; it was never visible."""
        self._allocator.release(placement.runs)

    def hidden_ranges(self, placement: Placement) -> Iterator[tuple[int, int]]:
        """(start, end) of the guest ranges that a placement gives a place in the data file and that no read was told to
        look for there."""
        found = self.tables.slice_at(placement.key)
        base = placement.key * self.tables.slice_entries
        size = self._geometry.subcluster_size
        for number, count, _, bitmap, _ in placement.changes:
            start = base + number << self._geometry.cluster_bits
            if not self._geometry.extended_l2:
                yield start, min(start + count * size, self._source.virtual_size)
                continue
            hidden = bitmap & ~self._entry(found, number)[1] & ALL_SUBCLUSTERS
            for subcluster in range(SUBCLUSTERS):
                first = start + subcluster * size
                if hidden >> subcluster & 1 and first < self._source.virtual_size:
                    yield first, min(first + size, self._source.virtual_size)

    def enter_write_lane(self, placement: Placement) -> None:
        """Clusters that were written in place, and are whole inside the disk, may be written to straight."""
        found = self.tables.slice_for_writing(placement.key)
        base = placement.key * self.tables.slice_entries
        places = []
        for cluster in range(placement.first, placement.end):
            word = found.lane[cluster - base]
            if word:
                places.append((cluster - base, 1, word & ~RUN_MASK))
        if places:
            self.tables.enter_lanes(placement.key, found, places, may_write=True)
            self.tables.join_lanes(found)

    def _references(self, entry: int) -> list[int]:
        """The host clusters that an entry refers to."""
        bits = self._geometry.cluster_bits
        if entry & COMPRESSED:
            host_offset, stored_length = entries.compressed_location(entry, bits)
            return list(range(host_offset >> bits, (host_offset + stored_length - 1 >> bits) + 1))
        if self._rules.has_data_file or not entry & OFFSET_MASK:
            return []
        return [(entry & OFFSET_MASK) >> bits]

    # -- zeroes and discards --

    def plan_clear(self, start: int, end: int, clearing: Clearing) -> Clear | None:
        """Plan to clear guest bytes `start` to `end`: whole clusters below one slice or, with extended L2, whole
        subclusters of one cluster that is not compressed. None if there is nothing to do.

        Raises CorruptImageError, TruncatedImageError, OSError.
        """
        key = start >> self.tables.slice_bits
        within = self._geometry.cluster_size - 1
        if self._geometry.extended_l2 and (start & within or (end & within and end != self._source.virtual_size)):
            return self._plan_clear_part(key, start, end)
        found = self.tables.slice_at(key)
        first = (start >> self._geometry.cluster_bits) - key * self.tables.slice_entries
        stop = (end - 1 >> self._geometry.cluster_bits) + 1 - key * self.tables.slice_entries
        step = self._geometry.l2_entry_size // 8
        words = np.frombuffer(found.words, dtype=np.uint64)[first * step : stop * step]
        table, bitmaps = (words[::2], words[1::2]) if step == 2 else (words, None)
        bad = self._first_bad_cluster(table, entries.classify_table(table, bitmaps, self._rules), start)
        if bad < len(table):
            self._valid_kind(*self._entry(found, first + bad), start + (bad << self._geometry.cluster_bits))
        new_words, is_freed = self._cleared(words, clearing)
        if (new_words == words).all():
            return None
        return Clear(key, first, new_words, self._freed_by(table[is_freed]))

    def _plan_clear_part(self, key: int, start: int, end: int) -> Clear | None:
        found = self.tables.slice_at(key)
        index = start >> self._geometry.cluster_bits & self.tables.slice_entries - 1
        entry, bitmap, entry_offset = self._entry(found, index)
        base = start & -self._geometry.cluster_size
        self._valid_kind(entry, bitmap, entry_offset, base)
        size = self._geometry.subcluster_size
        touched = (1 << (end - 1 - base) // size + 1) - (1 << (start - base) // size)
        new_bitmap = (bitmap | touched << SUBCLUSTERS) & ~touched
        if new_bitmap == bitmap:
            return None
        return Clear(key, index, np.array([entry, new_bitmap], dtype=np.uint64), np.zeros(0, dtype=np.int64))

    def _cleared(self, words: entries.Entries, clearing: Clearing) -> tuple[entries.Entries, Any]:
        """What sound words become, and for each cluster whether it loses its host clusters."""
        is_extended = self._geometry.extended_l2
        table = words[::2] if is_extended else words
        is_compressed = (table & np.uint64(COMPRESSED)) != 0
        has_cluster = (table & np.uint64(OFFSET_MASK)) != 0
        if self._rules.has_data_file:
            has_cluster |= (table & np.uint64(COPIED)) != 0
        says_zero = self._has_zero_entries and clearing is not Clearing.DROP
        zero_word = ZERO if says_zero and not is_extended else 0
        new_table = np.full(len(table), zero_word, dtype=np.uint64)
        new_bitmaps = np.full(len(table), _ALL_ZERO if says_zero else 0, dtype=np.uint64)
        is_freed = is_compressed | has_cluster
        if clearing is Clearing.KEEP and self._has_zero_entries:
            kept = has_cluster & ~is_compressed
            new_table[kept] = (table[kept] & np.uint64(COPIED | OFFSET_MASK)) | np.uint64(zero_word)
            if not is_extended:  # offset 0 of a data file cannot be kept beside the zero flag
                new_table[kept & ((table & np.uint64(OFFSET_MASK)) == 0)] = zero_word
            is_freed = is_compressed
        if clearing is Clearing.DISCARD and self._backing is None:
            untouched = ~is_freed
            new_table[untouched] = table[untouched]
            if is_extended:
                new_bitmaps[untouched] = words[1::2][untouched]
        if not is_extended:
            return new_table, is_freed
        new_words = np.empty(len(words), dtype=np.uint64)
        new_words[::2], new_words[1::2] = new_table, new_bitmaps
        return new_words, is_freed

    def _freed_by(self, table: entries.Entries) -> Clusters:
        """The host clusters that these entries refer to."""
        compressed = (table & np.uint64(COMPRESSED)) != 0
        plain = np.zeros(0, dtype=np.int64)
        if not self._rules.has_data_file:
            offsets = table[~compressed] & np.uint64(OFFSET_MASK)
            plain = (offsets >> np.uint64(self._geometry.cluster_bits)).astype(np.int64)
        pieces = [plain, *(np.array(self._references(int(each)), dtype=np.int64) for each in table[compressed])]
        return np.concatenate(pieces)

    def is_compressed(self, offset: int) -> bool:
        """True if the guest cluster at `offset` is stored compressed."""
        found = self.tables.slice_at(offset >> self.tables.slice_bits)
        index = offset >> self._geometry.cluster_bits & self.tables.slice_entries - 1
        return self._entry(found, index)[0] & COMPRESSED != 0

    def apply(self, clear: Clear, *, punch: bool) -> None:
        """Carry out a plan; `punch` says that the space of what it frees is to be given back.

        Raises CorruptImageError, TruncatedImageError, OSError; then no entry has changed.
        """
        found = self.tables.own(clear.key)
        self._allocator.retire(clear.freed, punch=punch)
        self.tables.changed(clear.key, found)
        step = self._geometry.l2_entry_size // 8
        self.tables.leave_lanes(found, clear.index, clear.index + len(clear.words) // step)
        words = np.frombuffer(found.words, dtype=np.uint64)
        words[clear.index * step : clear.index * step + len(clear.words)] = clear.words

    def next_mapped(self, start: int, end: int) -> int:
        """`start` if there is an L2 table for it, else the first guest byte behind it, up to `end`, that has one."""
        bits = self._geometry.l2_coverage_bits
        index = self.tables.next_table(start >> bits, (end - 1 >> bits) + 1)
        return min(max(start, index << bits), end)


def _goes_on(piece: Piece, host_offset: int, is_clean: bool) -> bool:
    """True if what goes to `host_offset` can be written together with the piece before it."""
    is_next = piece.host_offset + piece.end - piece.start == host_offset
    return is_next and not piece.tail.length and piece.is_clean == is_clean


def _clusters_of(run: Run, cluster_size: int) -> range:
    return range(run.host_offset, run.host_offset + run.length, cluster_size)
