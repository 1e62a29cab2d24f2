"""L1 and L2 tables that are being changed: what is in memory, and what of it the disk does not have yet.

**States of a slice.** *Clean*: as on disk, kept by the two generations of `Tables`. *Own*: its L2 table is referred to
by the active L1 table alone, proven when that is first needed; only then entries change in place, and clusters may be
written to in place. A table that a snapshot shares is copied before. *Changed*: kept, whatever the generations forget,
until a write-back has it on disk. While a write-back writes a slice it counts as changed still, and so do later changes
of it.

**States of an L2 table.** A new one (fresh, or the copy of a shared one) is *unpublished*: the L1 entry that names it
is in memory only. Its content is written before any durable pointer to it, its changed slices too; once the L1 entry is
written it is like any other.

**The write lane.** As the lane of `Tables` is for readers, the write lane is for writers in a hurry: a cluster has a
word there only if a write of it may go straight to the storage. Beyond what the lane proves, that is: COPIED is set and
the refcount is 1, both, and no structure is there; proven for a whole slice at once, when it is first written to, and
kept true by every change. Where that is all of the lane, the two are one. With dirty bitmaps to keep, a cluster enters
the write lane only when they have it all.

**Lock.** The image's, for everything but looking into `lane` and `write_lane`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.image_file import ImageFile, Structure
from qcow2_plugin.engine.tables import RUN_MASK, Slice, Tables, TableSource, entry_rules, lane_words
from qcow2_plugin.format.entries import COPIED, Entries
from qcow2_plugin.format.header import Header

_L1_CHUNK = 8192
"""L1 entries looked at together."""


@dataclass(slots=True)
class TableWrites:
    """What of the tables a write-back writes: places and bytes. `unpublished` slices come before a barrier, the L1
    entries and the other slices behind it."""

    unpublished: list[tuple[int, bytes]] = field(default_factory=list)
    l1_entries: list[tuple[int, bytes]] = field(default_factory=list)
    slices: list[tuple[int, bytes]] = field(default_factory=list)
    l1_changes: dict[int, int] = field(default_factory=dict)
    new_tables: set[int] = field(default_factory=set)


class WrittenTables(Tables):
    """The tables of the active disk. `tracks_changes`: there are dirty bitmaps to keep."""

    def __init__(
        self, source: TableSource, cache_size: int, file: ImageFile, allocator: Allocator, *, tracks_changes: bool
    ) -> None:
        super().__init__(replace(source, reserved=()), cache_size)  # the map of `file` knows them as they are now
        self._slice_size = 8 * len(self._missing.words)
        self.write_lane: dict[int, memoryview] = {}
        self._file = file
        self._allocator = allocator
        self._tracks_changes = tracks_changes
        self._changed: dict[int, Slice] = {}
        self._being_written: dict[int, Slice] = {}
        self._by_place: dict[int, Slice] = {}
        """The changed slices and those being written, by host offset."""
        self._l1_changes: dict[int, int] = {}
        """L1 entries that may not be on disk."""
        self._new_tables: set[int] = set()
        """Host offsets of unpublished L2 tables."""
        self._empty_tables: set[int] = set()
        """Host offsets of unpublished L2 tables that are all zeros but for the changed slices."""
        self._own_tables: set[int] = set()
        """L1 indexes whose L2 tables are ours alone."""
        self._lane_version = 0

    # -- reading what memory knows better --

    def read_l1(self, index: int, count: int) -> Entries:
        """`count` L1 entries from `index`, native-endian. Lock: the image's."""
        if count == 1 and index in self._l1_changes:
            return np.array([self._l1_changes[index]], dtype=np.uint64)
        entries = super().read_l1(index, count)
        if count == 1:
            return entries
        for changed, entry in self._l1_changes.items():
            if index <= changed < index + count:
                entries[changed - index] = entry
        return entries

    def read_l2(self, table_offset: int, index: int, count: int) -> Entries:
        """The words of `count` L2 entries from `index` of the table at this host offset, native-endian. Lock: the
        image's."""
        if table_offset in self._empty_tables:
            words = np.zeros(count * self.source.rules.geometry.l2_entry_size >> 3, dtype=np.uint64)
        else:
            words = super().read_l2(table_offset, index, count)
        if not self._by_place:
            return words
        start = table_offset + index * self.source.rules.geometry.l2_entry_size
        slice_size = self._slice_size
        for place in range(start - (start - table_offset) % slice_size, start + 8 * len(words), slice_size):
            known = self._by_place.get(place)
            if known is not None:
                first, last = max(place, start), min(place + slice_size, start + 8 * len(words))
                known_words = np.frombuffer(known.words, dtype=np.uint64)
                words[first - start >> 3 : last - start >> 3] = known_words[first - place >> 3 : last - place >> 3]
        return words

    def l2_table_offset(self, l1_entry: int, l1_index: int) -> int:
        """Host offset of the L2 table that an L1 entry points to, 0 for none. Raises CorruptImageError."""
        table_offset = super().l2_table_offset(l1_entry, l1_index)
        owner = self._file.metadata.owner(table_offset >> self.source.rules.geometry.cluster_bits)
        if table_offset and owner not in (0, Structure.L2_TABLE, Structure.SNAPSHOT_L2_TABLE):  # some are named twice
            raise self._corrupt_l1(l1_index, f"points into the {Structure(owner).title}")
        return table_offset

    def _read_slice(self, key: int) -> Slice:
        return self._changed.get(key) or self._being_written.get(key) or super()._read_slice(key)

    def _keep(self, key: int, kept: Slice) -> None:
        super()._keep(key, kept)
        self._enter_write_lane(key, kept)

    def _grow_old(self) -> None:
        super()._grow_old()
        self.write_lane.clear()
        for key, kept in self._old.items():
            self._enter_write_lane(key, kept)

    def _enter_write_lane(self, key: int, kept: Slice) -> None:
        if kept.write_lane is not None and kept.lane_version == self._lane_version:
            self.write_lane[key] = kept.write_lane

    def _knows(self, key: int) -> bool:
        return key in self._changed or key in self._being_written or super()._knows(key)

    def forget(self) -> None:
        """Drop everything that is kept and not changed."""
        super().forget()
        self.write_lane.clear()

    def look_anew(self) -> None:
        """The tables on disk were changed behind this back, by somebody who found everything written and at rest."""
        self._own_tables.clear()
        self._lane_version += 1
        self.forget()

    def next_table(self, index: int, end: int) -> int:
        """The first L1 entry from `index` on, and before `end`, that names an L2 table; `end` if none does."""
        count = 1
        while index < end:
            entries = self.read_l1(index, min(count, end - index))
            named = np.flatnonzero(entries)
            if named.size:
                return index + int(named[0])
            index += len(entries)
            count = _L1_CHUNK
        return end

    # -- changing --

    def slice_for_writing(self, key: int) -> Slice:
        """The slice with this key and its write lane."""
        found = self.slice_at(key)
        if found is self._missing or self._has_write_lane(found):
            return found
        self._make_write_lane(key, found)
        if self.source.rules.has_data_file:  # it takes no look at refcounts
            base = key & -self._group
            for other in range(base, base + self._group):
                kept = self._young.get(other)
                if kept is not None and not self._has_write_lane(kept):
                    self._make_write_lane(other, kept)
        return found

    def _has_write_lane(self, found: Slice) -> bool:
        return found.write_lane is not None and found.lane_version == self._lane_version

    def _make_write_lane(self, key: int, found: Slice) -> None:
        found.write_lane = self.write_lane[key] = self._write_lane_of(key, found)
        found.lane_version = self._lane_version

    def own(self, key: int) -> Slice:
        """The slice with this key, its write lane too, in an L2 table that is ours alone: a fresh one where there was
        none, a copy where there was a shared one.

        Raises CorruptImageError, TruncatedImageError, OSError.
        """
        guest_offset = key << self.slice_bits
        if not self.is_own(guest_offset):
            self._replace_table(guest_offset >> self.source.rules.geometry.l2_coverage_bits)
        return self.slice_for_writing(key)

    def is_own(self, guest_offset: int) -> bool:
        """True if the L2 table for this place is referred to by the active L1 table alone.

        Raises CorruptImageError if its entry says so and that is wrong; TruncatedImageError, OSError.
        """
        geometry = self.source.rules.geometry
        l1_index = guest_offset >> geometry.l2_coverage_bits
        if l1_index in self._own_tables:
            return True
        if l1_index >= self.source.l1_size:
            return False
        entry = int(self.read_l1(l1_index, 1)[0])
        table_offset = self.l2_table_offset(entry, l1_index)
        if not table_offset or not entry & COPIED:
            return False
        cluster = table_offset >> geometry.cluster_bits
        refcount = self._allocator.refcount(cluster)
        if refcount != 1 or self._file.metadata.is_of_snapshot(cluster):
            raise self._file.corrupt(
                "L1 table", f"entry {l1_index} is {entry:#x}, but others refer to its L2 table (refcount {refcount})"
            )
        self._own_tables.add(l1_index)
        return True

    def changed(self, key: int, found: Slice) -> None:
        """Entries of this slice, which is own, differ from those on disk now."""
        self._changed[key] = found
        self._by_place[found.host_offset] = found

    def _replace_table(self, l1_index: int) -> None:
        """A fresh L2 table where there is none, a copy of the one that there is."""
        geometry = self.source.rules.geometry
        old_offset = self.l2_table_offset(int(self.read_l1(l1_index, 1)[0]), l1_index)
        content = bytes(geometry.cluster_size)
        if old_offset:
            content = self.read_l2(old_offset, 0, geometry.l2_entries).astype(">u8").tobytes()
        clean_from = self._allocator.clean_from
        table_offset = self._allocator.allocate_table(Structure.L2_TABLE, geometry.cluster_size)
        try:
            self._file.write(Structure.L2_TABLE, content, table_offset)
        except OSError:
            self._allocator.release_table(table_offset, geometry.cluster_size)
            raise
        self._l1_changes[l1_index] = table_offset | COPIED
        self._new_tables.add(table_offset)
        if old_offset:
            self._allocator.retire_table(old_offset >> geometry.cluster_bits, 1)
        else:
            self._empty_tables.add(table_offset)
        self._forget_table(l1_index)
        self._own_tables.add(l1_index)
        if table_offset < clean_from:
            self.forget_write_lanes()

    def follow_bitmaps(self, *, tracks_changes: bool) -> None:
        """There are other dirty bitmaps to keep from now on, or none."""
        self._tracks_changes = tracks_changes
        self.forget_write_lanes()

    def forget_write_lanes(self) -> None:
        """Find out anew what may be written to straight: a structure is now where, in an image that tells lies about
        its clusters, a write lane might lead."""
        self._lane_version += 1
        self.write_lane.clear()

    def _forget_table(self, l1_index: int) -> None:
        self._own_tables.discard(l1_index)
        key_bits = self.source.rules.geometry.l2_coverage_bits - self.slice_bits
        for key in range(l1_index << key_bits, l1_index + 1 << key_bits):
            self._drop_changes(key)
            self._young.pop(key, None)
            self._old.pop(key, None)
            self.lane.pop(key, None)
            self.write_lane.pop(key, None)

    def _drop_changes(self, key: int) -> None:
        for changes in (self._changed, self._being_written):
            found = changes.pop(key, None)
            if found is not None:
                self._by_place.pop(found.host_offset, None)

    # -- the lanes --

    def _write_lane_of(self, key: int, found: Slice) -> memoryview:
        geometry = self.source.rules.geometry
        lane = np.frombuffer(found.lane, dtype=np.int64)
        if self._tracks_changes or not self.is_own(key << self.slice_bits):
            return np.zeros(len(lane), dtype=np.int64).data
        readable = lane != 0
        if not readable.any():
            return found.lane
        words = np.frombuffer(found.words, dtype=np.uint64)
        host_offsets = lane & ~RUN_MASK
        direct = readable & ((words[::2] if geometry.extended_l2 else words) & np.uint64(COPIED) != 0)
        if not self.source.rules.has_data_file:
            clusters = host_offsets[direct] >> geometry.cluster_bits
            direct[direct] = (self._allocator.refcounts_of(clusters) == 1) & ~self._file.metadata.among(clusters)
        if (direct == readable).all():
            return found.lane
        return lane_words(direct, host_offsets, geometry.cluster_size).data

    def enter_lanes(self, key: int, found: Slice, places: list[tuple[int, int, int]], *, may_write: bool) -> None:
        """Clusters of a slice, which has a write lane and this key, may be read straight from the storage from now on,
        with `may_write` written to as well.

        `places` are (index in the slice, number of clusters in line, host offset of the first), ascending.
        """
        if not may_write and found.write_lane is found.lane:
            found.lane = self.lane[key] = np.frombuffer(found.lane, dtype=np.int64).copy().data
        cluster_size = self.source.rules.geometry.cluster_size
        self.leave_lanes(found, places[0][0], places[-1][0] + places[-1][1])
        next_index, next_offset, in_line = -1, -1, 0
        for index, count, host_offset in reversed(places):
            if index + count != next_index or host_offset + count * cluster_size != next_offset:
                in_line = 0
            for lane in _lanes_of(found) if may_write else (found.lane,):
                if count == 1:
                    lane[index] = host_offset | min(in_line + 1, RUN_MASK)
                else:
                    lane[index : index + count] = self._words_in_line(host_offset, count, in_line)
            in_line += count
            next_index, next_offset = index, host_offset

    def _words_in_line(self, host_offset: int, count: int, in_line: int) -> memoryview:
        """The lane words of `count` clusters in line, behind which `in_line` more are."""
        words = self.steps[:count].astype(np.int64)
        words += host_offset
        words |= np.minimum(np.arange(count + in_line, in_line, -1), RUN_MASK)
        return words.data

    def leave_lanes(self, found: Slice, first: int, end: int) -> None:
        """The clusters with these indexes are not read or written straight any more."""
        for lane in _lanes_of(found):
            if lane[first]:
                _end_runs_at(np.frombuffer(lane, dtype=np.int64), first)
            if end - first == 1:
                lane[first] = 0
            else:
                np.frombuffer(lane, dtype=np.int64)[first:end] = 0

    def renew_write_lane(self, key: int) -> None:
        """Find out anew which clusters may be written to straight."""
        self.slice_at(key).write_lane = None
        self.write_lane.pop(key, None)

    def join_lanes(self, found: Slice) -> None:
        """Let the runs of both lanes be as long as they are; clusters that entered one by one do not see to that."""
        for lane in _lanes_of(found):
            words = np.frombuffer(lane, dtype=np.int64)
            words[:] = lane_words(words != 0, words & ~RUN_MASK, self.source.rules.geometry.cluster_size)

    # -- writing back --

    @property
    def changed_size(self) -> int:
        """Bytes of changed slices."""
        return len(self._changed) * self._slice_size

    @property
    def has_changes(self) -> bool:
        """Something differs from the disk."""
        return bool(self._changed or self._l1_changes)

    def take_writes(self) -> TableWrites:
        """What differs from the disk now, to be written in the order that `TableWrites` tells."""
        geometry = self.source.rules.geometry
        writes = TableWrites(l1_changes=dict(self._l1_changes), new_tables=set(self._new_tables))
        self._being_written, self._changed = self._changed, {}
        self._empty_tables.clear()
        for found in sorted(self._being_written.values(), key=_place):
            table_offset = found.host_offset & -geometry.cluster_size
            target = writes.unpublished if table_offset in self._new_tables else writes.slices
            words: Any = np.frombuffer(found.words, dtype=np.uint64)
            target.append((found.host_offset, words.astype(">u8").tobytes()))
        writes.l1_entries = [
            (self.source.l1_table_offset + 8 * index, entry.to_bytes(8, "big"))
            for index, entry in sorted(self._l1_changes.items())
        ]
        return writes

    def publish(self, writes: TableWrites) -> None:
        """From now on the disk may name the new tables of `writes`, whether writing succeeds or not."""
        self._new_tables -= writes.new_tables

    def written(self, writes: TableWrites) -> None:
        """All of `writes` is durable."""
        for found in self._being_written.values():
            if self._by_place.get(found.host_offset) is found:
                del self._by_place[found.host_offset]
        self._being_written = {}
        for key, found in self._changed.items():
            self.changed(key, found)
        for index, entry in writes.l1_changes.items():
            if self._l1_changes.get(index) == entry:
                del self._l1_changes[index]

    def put_back(self) -> None:
        """Undo `take_writes`: not all of it could be written."""
        self._changed = {**self._being_written, **self._changed}
        self._being_written = {}

    # -- another size of the disk --

    def drop_table(self, l1_index: int) -> None:
        """An L1 entry names no L2 table any more; nothing below it is mapped. Raises CorruptImageError, OSError."""
        entry = int(self.read_l1(l1_index, 1)[0])
        table_offset = self.l2_table_offset(entry, l1_index)
        if table_offset:
            self._l1_changes[l1_index] = 0
            self._allocator.retire_table(table_offset >> self.source.rules.geometry.cluster_bits, 1)
            self._forget_table(l1_index)

    def follow_header(self, header: Header) -> None:
        """The image has another version: its entries follow other rules."""
        self.source = replace(self.source, rules=entry_rules(header))
        self.forget()

    def move(self, l1_table_offset: int, l1_size: int, virtual_size: int) -> None:
        """The L1 table is here now, or the disk has another size."""
        self.source = replace(self.source, l1_table_offset=l1_table_offset, l1_size=l1_size, virtual_size=virtual_size)
        self.forget()


def _lanes_of(found: Slice) -> tuple[memoryview, ...]:
    """Both lanes; one if they are the same."""
    if found.write_lane is None or found.write_lane is found.lane:
        return (found.lane,)
    return found.lane, found.write_lane


def _place(found: Slice) -> int:
    return found.host_offset


def _end_runs_at(lane: np.ndarray[Any, np.dtype[np.int64]], index: int) -> None:
    """Make the runs that reach `index` end before it."""
    before = lane[max(index - RUN_MASK, 0) : index]
    if not before.size:
        return
    limits = np.arange(len(before), 0, -1)
    counts = before & RUN_MASK
    np.copyto(before, before - counts + limits, where=counts > limits)
