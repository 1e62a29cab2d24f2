"""L1 and L2 tables as read from the image file, kept in a bounded cache.

**Slices.** An L2 table can be 2 MiB, so it is read and kept in slices of up to 4 KiB; a slice has a key, the guest
offset shifted right by `slice_bits`. The L1 table, up to 32 MiB, is never held: its one entry is read when a slice is
missing. If the tables of the whole disk can be kept, the slices around are read along with it, so that a table is
looked at once and not a dozen times.

**Two generations.** Every slice enters the young generation. When the young one has taken half of the budget, it
becomes the old one and the previous old one is forgotten; a slice that `slice_at` finds among the old is young again.
That forgets roughly what came first, and a hit needs no bookkeeping at all.

**The lane.** Beside the entries a slice holds one number per cluster for readers in a hurry: host offset, with the
count of clusters from here on that follow each other on disk in its low 9 bits (host offsets are multiples of 512).
A cluster is in the lane only if a read of it may go straight to the storage: whole inside the virtual disk,
allocated, not compressed, not zero, aligned, inside the file, and with a data file at the host offset that equals its
guest offset. Everything else has 0 there, a run of no clusters. `Tables.lane` maps keys to lanes of kept slices and
may be read without a lock: entries only appear and vanish, a lane never changes, and a key that is missing means no
more than "ask `slice_at`".

**Lock.** The caller of `slice_at` holds the image's lock. `read_l1` and `read_l2` take none.

What the entries mean is `format.entries`; which bytes of the guest they map is `mapping`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.format.entries import (
    ALL_SUBCLUSTERS,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    ZERO,
    Entries,
    EntryRules,
)
from qcow2_plugin.format.header import Header, Table
from qcow2_plugin.format.snapshots import Snapshot
from qcow2_plugin.storage import Storage

RUN_MASK = 0x1FF
"""The low bits of a lane word: clusters in line from this one on, 0 if a read must not go straight to disk."""
_SLICE_SIZE = 4096
_GROUP_SIZE = 65536
"""Bytes of an L2 table that are read together at most."""
_SLICE_OVERHEAD = 1200
"""Bytes of Python objects around the arrays of one slice."""
_MISSING_OVERHEAD = 120
"""Bytes of knowing that there is no L2 table."""


@dataclass(frozen=True, slots=True)
class TableSource:
    """Where the tables of one view (the active disk or a snapshot) are, and what must hold for them.

    `reserved` are structures that no L2 table may overlap. `allow_damaged` reads what lies past the end of the file
    as zeros instead of refusing it.
    """

    storage: Storage
    l1_table_offset: int
    l1_size: int
    virtual_size: int
    rules: EntryRules
    reserved: tuple[Table, ...]
    allow_damaged: bool

    @classmethod
    def of(cls, header: Header, storage: Storage, snapshot: Snapshot | None, *, allow_damaged: bool) -> TableSource:
        """The tables of the active disk, or of the disk as `snapshot` keeps it."""
        return cls(
            storage,
            header.l1_table_offset if snapshot is None else snapshot.l1_table_offset,
            header.l1_size if snapshot is None else snapshot.l1_size,
            header.virtual_size if snapshot is None else snapshot.virtual_size(header.virtual_size),
            entry_rules(header),
            header.tables,
            allow_damaged,
        )


def entry_rules(header: Header) -> EntryRules:
    """What decides the meaning of the entries in the tables of an image with this header."""
    has_zero_flag = header.version > 2 and not header.extended_l2
    return EntryRules(header.geometry, has_zero_flag, header.has_data_file)


@dataclass(slots=True, eq=False)
class Slice:
    """Part of an L2 table. `words` are native-endian: one per cluster, with extended L2 two (entry, bitmap)."""

    words: memoryview
    lane: memoryview
    host_offset: int
    """Where the slice begins in the image file; 0 if there is no L2 table."""
    write_lane: memoryview | None = None
    """As `lane`, for clusters that may be written in place; made by `written_tables` when it is asked for."""
    lane_version: int = 0
    """Of `write_lane`."""


class Tables:
    """The tables of one view; `cache_size` in bytes bounds what is kept."""

    def __init__(self, source: TableSource, cache_size: int) -> None:
        self.source = source
        geometry = source.rules.geometry
        slice_size = min(_SLICE_SIZE, geometry.cluster_size)
        self.slice_entries = slice_size // geometry.l2_entry_size
        self.slice_bits = geometry.cluster_bits + self.slice_entries.bit_length() - 1
        self.lane: dict[int, memoryview] = {}
        self._young: dict[int, Slice] = {}
        self._old: dict[int, Slice] = {}
        self._young_size = 0
        self._generation_size = cache_size // 2
        self._slice_cost = slice_size + 8 * self.slice_entries + _SLICE_OVERHEAD
        slice_count = -(-source.virtual_size >> self.slice_bits)
        can_keep_all = slice_count * self._slice_cost <= cache_size
        self._group = min(_GROUP_SIZE, geometry.cluster_size) // slice_size if can_keep_all else 1
        """Slices that are read together."""
        clusters = np.arange(self._group * self.slice_entries, dtype=np.int64)
        self._left = np.minimum(self.slice_entries - clusters % self.slice_entries, RUN_MASK)
        """For each cluster of a group the count of clusters to the end of its slice."""
        self.steps = (clusters << geometry.cluster_bits).astype(np.uint64)
        """How far the clusters of a group are from the first if they are in line."""
        words_per_entry = geometry.l2_entry_size // 8
        self._missing = Slice(
            np.zeros(self.slice_entries * words_per_entry, dtype=np.uint64).data,
            np.zeros(self.slice_entries, dtype=np.int64).data,
            0,
        )

    def slice_at(self, key: int) -> Slice:
        """The slice with this key, read if it is not kept. Raises CorruptImageError, TruncatedImageError, OSError.

        Lock: the image's.
        """
        found = self._young.get(key)
        if found is not None:
            return found
        found = self._old.get(key)
        if found is None:
            found = self._read_slice(key)
        self._keep(key, found)
        return found

    def read_l1(self, index: int, count: int) -> Entries:
        """`count` L1 entries from `index`, native-endian."""
        data = self._read("L1 table", self.source.l1_table_offset + 8 * index, 8 * count)
        return np.frombuffer(data, dtype=">u8").astype(np.uint64)

    def read_l2(self, table_offset: int, index: int, count: int) -> Entries:
        """The words of `count` L2 entries from `index` of the table at this host offset, native-endian."""
        entry_size = self.source.rules.geometry.l2_entry_size
        data = self._read("L2 table", table_offset + entry_size * index, entry_size * count)
        return np.frombuffer(data, dtype=">u8").astype(np.uint64)

    def l2_table_offset(self, l1_entry: int, l1_index: int) -> int:
        """Host offset of the L2 table that an L1 entry points to, 0 for none. Raises CorruptImageError."""
        table_offset = l1_entry & OFFSET_MASK
        if not table_offset and not l1_entry & COPIED:
            return 0
        geometry = self.source.rules.geometry
        if not table_offset or table_offset % geometry.cluster_size:
            raise self._corrupt_l1(l1_index, f"is {l1_entry:#x}, no place for an L2 table")
        for table in self.source.reserved:
            if table.overlaps(table_offset, geometry.cluster_size):
                raise self._corrupt_l1(l1_index, f"points into the {table.name}")
        return table_offset

    def forget(self) -> None:
        """Drop everything that is kept. Lock: the image's."""
        self.lane.clear()
        self._young.clear()
        self._old.clear()

    def _corrupt_l1(self, index: int, detail: str) -> CorruptImageError:
        return CorruptImageError(
            "L1 table",
            f"entry {index} {detail}",
            host_offset=self.source.l1_table_offset,
            file=self.source.storage.path,
        )

    def _read(self, structure: str, host_offset: int, length: int) -> bytes:
        if not self.source.allow_damaged:
            return read_structure(self.source.storage, structure, host_offset, length)
        data = self.source.storage.pread(length, host_offset)
        return data + bytes(length - len(data))

    def _read_slice(self, key: int) -> Slice:
        geometry = self.source.rules.geometry
        l1_index = key >> geometry.l2_coverage_bits - self.slice_bits
        if l1_index >= self.source.l1_size:
            return self._missing
        table_offset = self.l2_table_offset(int(self.read_l1(l1_index, 1)[0]), l1_index)
        if not table_offset:
            return self._missing
        base = key & -self._group
        first_entry = base * self.slice_entries % geometry.l2_entries
        words = self.read_l2(table_offset, first_entry, self._group * self.slice_entries)
        slices = self._sliced(words, base, table_offset + first_entry * geometry.l2_entry_size)
        for other, kept in enumerate(slices, base):
            if other != key and not self._knows(other):
                self._keep(other, kept)
        return slices[key - base]

    def _sliced(self, words: Entries, base: int, host_offset: int) -> list[Slice]:
        """The slices of a group that begins with the key `base`."""
        count, step = self.slice_entries, len(words) // self._group
        lane = self._lane_of(words, base * count)
        return [
            Slice(
                words[index * step : (index + 1) * step].data,
                lane[index * count : (index + 1) * count].data,
                host_offset + 8 * index * step,
            )
            for index in range(self._group)
        ]

    def _knows(self, key: int) -> bool:
        """True if this slice need not be read."""
        return key in self._young or key in self._old

    def _lane_of(self, words: Entries, first_cluster: int) -> npt.NDArray[np.int64]:
        """The lane of the slices of a group whose first entry maps this guest cluster; no run leaves its slice."""
        source = self.source
        geometry = source.rules.geometry
        if not words.any():
            return np.zeros(len(self._left), dtype=np.int64)
        if self._are_in_line(words, first_cluster):
            lane = self.steps.astype(np.int64)
            lane += int(words[0]) & OFFSET_MASK
            lane |= self._left
            return lane
        entries = words[::2] if geometry.extended_l2 else words
        cluster_count = len(entries)
        host_offsets = (entries & np.uint64(OFFSET_MASK)).astype(np.int64)
        excluded = COMPRESSED if geometry.extended_l2 else COMPRESSED | ZERO
        direct = (entries & np.uint64(excluded)) == 0
        if geometry.extended_l2:
            direct &= words[1::2] == ALL_SUBCLUSTERS
        direct &= (host_offsets & (geometry.cluster_size - 1)) == 0
        if source.rules.has_data_file:
            guest_clusters = np.arange(first_cluster, first_cluster + cluster_count, dtype=np.int64)
            direct &= host_offsets == guest_clusters << geometry.cluster_bits
            direct &= (host_offsets != 0) | ((entries & np.uint64(COPIED)) != 0)
        else:
            direct &= (host_offsets != 0) & (host_offsets <= source.storage.size() - geometry.cluster_size)
        direct[max((source.virtual_size >> geometry.cluster_bits) - first_cluster, 0) :] = False
        lane = lane_words(direct, host_offsets, geometry.cluster_size)
        counts = lane & RUN_MASK
        lane += np.minimum(counts, self._left) - counts
        return lane

    def _are_in_line(self, words: Entries, first_cluster: int) -> bool:
        """True if the clusters of a group, the first of which is this one of the guest, all belong into the lane and
        follow each other on disk. So it is in most images that were made or filled in one go."""
        source = self.source
        geometry = source.rules.geometry
        first, last = int(words[0]), int(words[-1])
        host_offset, length = first & OFFSET_MASK, len(words) << geometry.cluster_bits
        if geometry.extended_l2 or last - first != length - geometry.cluster_size:
            return False
        if first != host_offset | COPIED or host_offset & geometry.cluster_size - 1:
            return False
        guest_offset = first_cluster << geometry.cluster_bits
        if guest_offset + length > source.virtual_size:
            return False
        if source.rules.has_data_file and host_offset != guest_offset:
            return False
        if not source.rules.has_data_file and not 0 < host_offset <= source.storage.size() - length:
            return False
        return bool((words - np.uint64(first) == self.steps).all())

    def _keep(self, key: int, kept: Slice) -> None:
        if self._young_size >= self._generation_size:
            self._grow_old()
        self._young[key] = kept
        self._young_size += _MISSING_OVERHEAD if kept is self._missing else self._slice_cost
        self.lane[key] = kept.lane

    def _grow_old(self) -> None:
        """The young generation becomes the old one, and that is forgotten."""
        self._old, self._young, self._young_size = self._young, {}, 0
        self.lane.clear()
        self.lane.update({key: kept.lane for key, kept in self._old.items()})


def lane_words(
    direct: npt.NDArray[np.bool_], host_offsets: npt.NDArray[np.int64], cluster_size: int
) -> npt.NDArray[np.int64]:
    """A lane that has the clusters which are `direct`."""
    return np.where(direct, host_offsets | _run_lengths(direct, host_offsets, cluster_size), 0)


def _run_lengths(
    direct: npt.NDArray[np.bool_], host_offsets: npt.NDArray[np.int64], cluster_size: int
) -> npt.NDArray[np.int64]:
    """For every cluster the count of clusters in line from it on, at most RUN_MASK."""
    count = len(direct)
    clusters = np.arange(count, dtype=np.int64)
    goes_on = direct[:-1] & direct[1:] & (host_offsets[1:] - host_offsets[:-1] == cluster_size)
    if goes_on.all():
        return np.minimum(count - clusters, RUN_MASK)
    end_of_run = clusters + 1
    end_of_run[:-1][goes_on] = count
    end_of_run = np.minimum.accumulate(end_of_run[::-1])[::-1]
    lengths: npt.NDArray[np.int64] = np.minimum(end_of_run - clusters, RUN_MASK)
    return lengths
