"""Where guest ranges live: `resolve` for a request, `runs` for long ranges.

Both answer with extents of this image alone (depth 0); what an unallocated range shows is the caller's business. Both
prove what they answer: no invalid entry slips through, with an external data file every host offset equals its guest
offset, and nothing past the end of the image file is called data (`TruncatedImageError`, unless damaged images are
allowed). They differ in cost only: `resolve` walks plain ints from kept slices, `runs` reads L2 tables past the cache
and works on arrays, in time that follows the tables that exist. A property test holds the two equal.

Source: docs/interop/qcow2.rst, "Cluster mapping", "Extended L2 Entries"; for data files "Feature bits".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.tables import RUN_MASK, Slice, Tables
from qcow2_plugin.errors import CorruptImageError, TruncatedImageError
from qcow2_plugin.extent import Extent, ExtentKind, continues
from qcow2_plugin.format import entries
from qcow2_plugin.format.entries import ClusterKind, Entries, Kinds
from qcow2_plugin.format.geometry import SUBCLUSTERS

_L1_CHUNK = 8192
"""L1 entries looked at together."""
_UNITS_CHUNK = 65536
"""Clusters, or subclusters with extended L2, looked at together."""
_MEMO_TABLES = 4096
_MEMO_RUNS = 16
"""So many L2 tables of so few runs are remembered during one walk: L1 entries may share a table."""

_EXTENT_KINDS = {
    ClusterKind.UNALLOCATED: ExtentKind.UNALLOCATED,
    ClusterKind.UNALLOCATED_ALLOCATED: ExtentKind.UNALLOCATED,
    ClusterKind.ZERO_PLAIN: ExtentKind.ZERO,
    ClusterKind.ZERO_ALLOCATED: ExtentKind.ZERO,
    ClusterKind.NORMAL: ExtentKind.DATA,
    ClusterKind.COMPRESSED: ExtentKind.COMPRESSED,
}
_KINDS_WITH_SPACE = (ClusterKind.UNALLOCATED_ALLOCATED, ClusterKind.ZERO_ALLOCATED, ClusterKind.NORMAL)
_HAS_SPACE = np.array([kind in _KINDS_WITH_SPACE for kind in ClusterKind])


class _Run(NamedTuple):
    """A run below one L2 table; `start` and `length` in guest bytes, `start` from the table's first guest byte."""

    start: int
    length: int
    kind: ExtentKind
    host_offset: int | None
    stored_length: int


class Mapping:
    """The map of one view, the active disk or a snapshot."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self._source = tables.source
        self._rules = tables.source.rules
        self._geometry = tables.source.rules.geometry

    def resolve(self, offset: int, length: int) -> list[Extent]:
        """The extents of a range inside the virtual disk; each compressed cluster is an extent of its own.

        Raises CorruptImageError, TruncatedImageError, OSError. Lock: the image's.
        """
        extents: list[Extent] = []
        end = offset + length
        while offset < end:
            extent = self._extent_at(offset, end)
            if extents and extent.kind is not ExtentKind.COMPRESSED and continues(extents[-1], extent):
                extents[-1] = extents[-1]._replace(length=extents[-1].length + extent.length)
            else:
                extents.append(extent)
            offset += extent.length
        return extents

    def runs(self, offset: int, length: int) -> Iterator[Extent]:
        """The extents of a range inside the virtual disk, lazily. Neighbours are not always merged; compressed
        clusters in line are one extent without host offset.

        Raises as `resolve` does, when it comes to the place. Lock: none.
        """
        if not length:
            return
        end = offset + length
        bits = self._geometry.l2_coverage_bits
        memo: dict[int, list[_Run]] = {}
        for l1_entry, first, count in self._equal_l1_entries(offset >> bits, -(-end >> bits)):
            table_offset = self.tables.l2_table_offset(l1_entry, first)
            if table_offset:
                yield from self._extents_below(table_offset, range(first, first + count), offset, end, memo)
            else:
                nothing = _Run(0, count << bits, ExtentKind.UNALLOCATED, None, 0)
                yield from _clipped([nothing], first << bits, offset, end)

    # -- one request: plain ints --

    def _extent_at(self, offset: int, end: int) -> Extent:
        """The longest extent from `offset` on, not past `end`, that one look at the tables tells."""
        found = self.tables.slice_at(offset >> self.tables.slice_bits)
        index = offset >> self._geometry.cluster_bits & self.tables.slice_entries - 1
        lane_word = found.lane[index]
        clusters_in_line = lane_word & RUN_MASK
        if not clusters_in_line:
            return self._extent_of_entry(*self._entry(found, index), offset, end)
        within = offset & self._geometry.cluster_size - 1
        length = min((clusters_in_line << self._geometry.cluster_bits) - within, end - offset)
        return Extent(offset, length, ExtentKind.DATA, lane_word - clusters_in_line + within)

    def _entry(self, found: Slice, index: int) -> tuple[int, int, int]:
        """Entry, bitmap (0 without extended L2) and the entry's host offset."""
        entry_offset = found.host_offset + index * self._geometry.l2_entry_size
        if self._geometry.extended_l2:
            return found.words[2 * index], found.words[2 * index + 1], entry_offset
        return found.words[index], 0, entry_offset

    def _extent_of_entry(self, entry: int, bitmap: int, entry_offset: int, offset: int, end: int) -> Extent:
        """The extent that begins at guest `offset` and ends with its cluster or subcluster, or at `end`."""
        geometry = self._geometry
        within = offset & geometry.cluster_size - 1
        kind = entries.subcluster_kind(entry, bitmap, within // geometry.subcluster_size, self._rules)
        if kind == ClusterKind.INVALID:
            words = f"{entry:#x} with bitmap {bitmap:#x}" if geometry.extended_l2 else f"{entry:#x}"
            raise self._corrupt_entry(entry_offset, f"{words} is invalid")
        if kind == ClusterKind.COMPRESSED:
            host_offset, stored_length = entries.compressed_location(entry, geometry.cluster_bits)
            self._require_inside_file(host_offset, entry_offset)
            length = min(geometry.cluster_size - within, end - offset)
            return Extent(offset, length, ExtentKind.COMPRESSED, host_offset, stored_length)
        length = min(geometry.subcluster_size - within % geometry.subcluster_size, end - offset)
        if kind not in _KINDS_WITH_SPACE:
            return Extent(offset, length, _EXTENT_KINDS[kind], None)
        host_offset = entry & entries.OFFSET_MASK
        if self._rules.has_data_file and host_offset != offset - within:
            raise self._corrupt_entry(
                entry_offset, f"points to {host_offset:#x} of the data file instead of {offset - within:#x}"
            )
        stores_data = bitmap & entries.ALL_SUBCLUSTERS if geometry.extended_l2 else kind == ClusterKind.NORMAL
        if stores_data and not self._rules.has_data_file:
            self._require_inside_file(host_offset, entry_offset)
        return Extent(offset, length, _EXTENT_KINDS[kind], host_offset + within)

    def _require_inside_file(self, host_offset: int, entry_offset: int) -> None:
        storage = self._source.storage
        if host_offset < storage.size() or self._source.allow_damaged:
            return
        raise TruncatedImageError(
            "L2 entry",
            f"points to {host_offset:#x}, past the end of the file: the image is truncated",
            host_offset=entry_offset,
            file=storage.path,
        )

    def _corrupt_entry(self, entry_offset: int, detail: str) -> CorruptImageError:
        return CorruptImageError("L2 entry", detail, host_offset=entry_offset, file=self._source.storage.path)

    # -- long ranges: arrays --

    def _equal_l1_entries(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(entry, first index, count) of runs of equal L1 entries; behind the end of the table they are 0."""
        l1_end = min(end, self._source.l1_size)
        for start in range(first, l1_end, _L1_CHUNK):
            chunk = self.tables.read_l1(start, min(_L1_CHUNK, l1_end - start))
            starts = np.concatenate(([0], np.flatnonzero(chunk[1:] != chunk[:-1]) + 1))
            counts = np.diff(starts, append=len(chunk))
            yield from zip(chunk[starts].tolist(), (starts + start).tolist(), counts.tolist(), strict=True)
        if end > max(first, l1_end):
            yield 0, max(first, l1_end), end - max(first, l1_end)

    def _extents_below(
        self, table_offset: int, l1_indexes: range, offset: int, end: int, memo: dict[int, list[_Run]]
    ) -> Iterator[Extent]:
        """The extents between `offset` and `end` below L1 entries in line that share an L2 table. `memo` has
        the runs of tables that were walked as a whole."""
        coverage_bits = self._geometry.l2_coverage_bits
        index = l1_indexes.start
        while index < l1_indexes.stop:
            base = index << coverage_bits
            is_whole = offset <= base and base + self._geometry.l2_coverage <= end
            known = memo.get(table_offset) if is_whole else None
            if known is None:
                runs = self._table_runs(table_offset, base, offset, end)
                if is_whole:
                    runs = _remembered(runs, table_offset, memo, may_have_place=not self._rules.has_data_file)
                yield from _clipped(runs, base, offset, end)
                index += 1
            elif _is_uniform(known, self._geometry.l2_coverage):
                repeat = min(l1_indexes.stop, end >> coverage_bits) - index
                length, stored_length = known[0].length * repeat, known[0].stored_length * repeat
                all_of_them = known[0]._replace(length=length, stored_length=stored_length)
                yield from _clipped([all_of_them], base, offset, end)
                index += repeat
            else:
                yield from _clipped(known, base, offset, end)
                index += 1

    def _table_runs(self, table_offset: int, base: int, offset: int, end: int) -> Iterator[_Run]:
        geometry = self._geometry
        first = max(offset - base, 0) >> geometry.cluster_bits
        entry_end = min(geometry.l2_entries, -(-(end - base) >> geometry.cluster_bits))
        step = _UNITS_CHUNK // SUBCLUSTERS if geometry.extended_l2 else _UNITS_CHUNK
        for index in range(first, entry_end, step):
            words = self.tables.read_l2(table_offset, index, min(step, entry_end - index))
            chunk_offset = table_offset + index * geometry.l2_entry_size
            yield from self._chunk_runs(words, chunk_offset, base, base + index * geometry.cluster_size)

    def _chunk_runs(self, words: Entries, chunk_offset: int, base: int, guest_offset: int) -> Iterator[_Run]:
        """The runs of consecutive entries, which are stored at `chunk_offset` and map from `guest_offset` on."""
        geometry = self._geometry
        table = words[::2] if geometry.extended_l2 else words
        bitmaps = words[1::2] if geometry.extended_l2 else None
        if bitmaps is None and self._is_in_line(table, guest_offset):
            host_offset = int(table[0]) & entries.OFFSET_MASK
            yield _Run(guest_offset - base, len(table) * geometry.cluster_size, ExtentKind.DATA, host_offset, 0)
            return
        kinds = entries.classify_table(table, bitmaps, self._rules)
        bad = self._first_bad_cluster(table, kinds, guest_offset)
        units = len(kinds) // len(table)
        yield from self._kind_runs(table[:bad], kinds[: bad * units], guest_offset - base)
        if bad < len(table):
            entry_offset = chunk_offset + bad * geometry.l2_entry_size
            bitmap = 0 if bitmaps is None else int(bitmaps[bad])
            offset = guest_offset + bad * geometry.cluster_size
            for subcluster_offset in range(offset, offset + geometry.cluster_size, geometry.subcluster_size):
                self._extent_of_entry(int(table[bad]), bitmap, entry_offset, subcluster_offset, subcluster_offset + 1)
            # Not bad any more: the file has grown meanwhile.
            rest = words[bad * (2 if geometry.extended_l2 else 1) :]
            yield from self._chunk_runs(rest, entry_offset, base, offset)

    def _is_in_line(self, table: Entries, guest_offset: int) -> bool:
        """True if all entries are data, each cluster right behind the one before, and the last inside the file."""
        geometry = self._geometry
        span = (len(table) - 1) * geometry.cluster_size
        first, last = int(table[0]), int(table[-1])
        host_offset = first & entries.OFFSET_MASK
        if last != first + span or host_offset + span > entries.OFFSET_MASK:
            return False
        if entries.classify(first, 0, self._rules) != ClusterKind.NORMAL:
            return False
        if self._rules.has_data_file:
            is_right = host_offset == guest_offset
        else:
            is_right = host_offset + span < self._source.storage.size() or self._source.allow_damaged
        return is_right and bool((np.diff(table) == geometry.cluster_size).all())

    def _first_bad_cluster(self, table: Entries, kinds: Kinds, guest_offset: int) -> int:
        """Index of the first cluster for which `_extent_of_entry` would raise, `len(table)` if there is none."""
        geometry = self._geometry
        units = len(kinds) // len(table)
        by_cluster = kinds.reshape(-1, units)
        bad = by_cluster[:, 0] == ClusterKind.INVALID
        host_offsets = (table & np.uint64(entries.OFFSET_MASK)).astype(np.int64)
        if self._rules.has_data_file:
            guest_offsets = guest_offset + np.arange(len(table), dtype=np.int64) * geometry.cluster_size
            bad |= _HAS_SPACE[by_cluster].any(axis=1) & (host_offsets != guest_offsets)
        elif not self._source.allow_damaged:
            file_size = self._source.storage.size()
            bad |= (by_cluster == ClusterKind.NORMAL).any(axis=1) & (host_offsets >= file_size)
            compressed = by_cluster[:, 0] == ClusterKind.COMPRESSED
            if compressed.any():
                locations, _ = entries.compressed_locations(table, geometry.cluster_bits)
                bad |= compressed & (locations >= file_size)
        return int(bad.argmax()) if bad.any() else len(table)

    def _kind_runs(self, table: Entries, kinds: Kinds, start: int) -> Iterator[_Run]:
        """The runs of sound entries."""
        if not len(kinds):
            return
        geometry = self._geometry
        unit_size = geometry.subcluster_size
        host_offsets = (table & np.uint64(entries.OFFSET_MASK)).astype(np.int64)
        if geometry.extended_l2:
            steps = np.arange(SUBCLUSTERS, dtype=np.int64) * unit_size
            host_offsets = (host_offsets[:, np.newaxis] + steps).reshape(-1)
        has_space = _HAS_SPACE[kinds]
        host_offsets[~has_space] = -1
        in_line = np.diff(host_offsets) == np.where(has_space[1:], unit_size, 0)
        starts = np.concatenate(([0], np.flatnonzero((kinds[1:] != kinds[:-1]) | ~in_line) + 1))
        lengths = np.diff(starts, append=len(kinds)) * unit_size
        stored_lengths = self._stored_lengths(table, kinds, starts)
        columns = (starts * unit_size + start, lengths, kinds[starts], host_offsets[starts], stored_lengths)
        for run_start, length, kind, host_offset, stored_length in zip(*(c.tolist() for c in columns), strict=True):
            known_offset = None if host_offset < 0 else host_offset
            yield _Run(run_start, length, _EXTENT_KINDS[kind], known_offset, stored_length)

    def _stored_lengths(self, table: Entries, kinds: Kinds, starts: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        """Compressed bytes of every run, 0 for the runs of other kinds."""
        units = len(kinds) // len(table)
        compressed = kinds[::units] == ClusterKind.COMPRESSED
        if not compressed.any():
            return np.zeros(len(starts), dtype=np.int64)
        _, stored_lengths = entries.compressed_locations(table, self._geometry.cluster_bits)
        per_unit = np.zeros((len(table), units), dtype=np.int64)
        per_unit[:, 0] = np.where(compressed, stored_lengths, 0)
        return np.add.reduceat(per_unit.reshape(-1), starts)


def _remembered(
    runs: Iterable[_Run], table_offset: int, memo: dict[int, list[_Run]], *, may_have_place: bool
) -> Iterator[_Run]:
    """`runs`, put into `memo` when they have ended if they are few and, where the place of data depends on the place
    of the table (not `may_have_place`), have none."""
    kept: list[_Run] = []
    for run in runs:
        if len(kept) <= _MEMO_RUNS:
            kept.append(run)
        yield run
    is_the_same_anywhere = may_have_place or all(run.host_offset is None for run in kept)
    if len(kept) <= _MEMO_RUNS and len(memo) < _MEMO_TABLES and is_the_same_anywhere:
        memo[table_offset] = kept


def _is_uniform(runs: list[_Run], coverage: int) -> bool:
    """True if a whole L2 table is one run that is not stored anywhere, so that equal tables make one run too."""
    return len(runs) == 1 and runs[0].length == coverage and runs[0].host_offset is None


def _clipped(runs: Iterable[_Run], base: int, offset: int, end: int) -> Iterator[Extent]:
    """What of `runs`, from guest offset `base` on, lies between `offset` and `end`."""
    for run in runs:
        start = base + run.start
        first, last = max(start, offset), min(start + run.length, end)
        if first < last:
            host_offset = None if run.host_offset is None else run.host_offset + first - start
            yield Extent(first, last - first, run.kind, host_offset, run.stored_length)
