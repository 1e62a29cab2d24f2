"""Checking L2 tables: every entry, once for each distinct table, however many refer to it.

Tables are looked at some together, as one array of entries: first those of all kinds for what every entry must keep,
then what is left for what it refers to. Of tables that the active disk refers to also fragmentation, COPIED flags and
clusters that are mapped twice are looked at; in others COPIED means nothing. Tables that lie in holes of the file are
not read, they hold zeros.

A finding in a table counts as often as the table is referred to: so do QEMU's, which goes through it that many times.

Source: docs/interop/qcow2.rst, "Cluster mapping".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.checking.findings import Finding, FindingClass
from qcow2_plugin.engine.checking.inspection import CLEAR_BITS, Inspection, beyond_end
from qcow2_plugin.engine.checking.table_references import Tables
from qcow2_plugin.format.entries import ALL_SUBCLUSTERS, COMPRESSED, COPIED, OFFSET_MASK, ZERO, Entries
from qcow2_plugin.format.geometry import SECTOR_SIZE, SUBCLUSTERS

Array = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_RESERVED = 0x3F00_0000_0000_01FE
_BATCH = 1 << 20
"""Bytes of tables that are looked at together."""


class Fragmentation:
    """Clusters of the active disk by how they are stored; clusters of shared tables as often as they are shared."""

    def __init__(self) -> None:
        self.allocated = self.fragmented = self.compressed = 0


class TableCheck:
    """Goes through L2 tables and counts what they refer to."""

    def __init__(self, inspection: Inspection, tables: Tables, fragmentation: Fragmentation) -> None:
        """Memory: a byte for each cluster of the file, and some tables."""
        self.fragmentation = fragmentation
        self._inspection = inspection
        self._tables = tables
        header = inspection.header
        cluster_count = len(inspection.references.counts)
        self._seen = np.zeros(0 if header.has_data_file else cluster_count + 1, dtype=np.bool_)

    def run(self, progress: Callable[[int, int], object]) -> None:
        """Raises StoppedError, OSError."""
        for batch, words in self._read():
            _Batch(self, batch, words).check()
            progress(int(batch[-1]) + 1, len(self._tables.offsets))

    def _read(self) -> Iterator[tuple[Array, Entries]]:
        """The tables that are worth a look, some at a time: their places in `tables`, and their words."""
        size = self._inspection.header.geometry.cluster_size
        per_batch = max(_BATCH // size, 1)
        waiting: list[int] = []
        for place in self._present():
            waiting.append(place)
            if len(waiting) == per_batch:
                yield self._load(waiting)
                waiting = []
        if waiting:
            yield self._load(waiting)

    def _present(self) -> Iterator[int]:
        """The places of tables that are not wholly in a hole or past the end of the file, in ascending order."""
        storage, file_size = self._inspection.storage, self._inspection.file_size
        size = self._inspection.header.geometry.cluster_size
        stop, is_data = 0, False
        for place, offset in enumerate(self._tables.offsets.tolist()):
            if offset >= file_size:
                return
            if offset >= stop:
                start, length, is_data = next(storage.data_ranges(offset, file_size - offset))
                stop = start + length
            if is_data or offset + size > stop:
                yield place

    def _load(self, places: list[int]) -> tuple[Array, Entries]:
        storage = self._inspection.storage
        size = self._inspection.header.geometry.cluster_size
        batch = np.array(places, dtype=np.int64)
        offsets = self._tables.offsets[batch]
        words = np.empty(len(batch) * size // 8, dtype=np.uint64)
        buffer = words.view(np.uint8).data
        edges = np.flatnonzero(np.diff(offsets) != size) + 1
        starts = [0, *edges.tolist()]
        for first, end in zip(starts, [*starts[1:], len(batch)], strict=True):
            storage.read_into(buffer[first * size : end * size], int(offsets[first]))
        words.byteswap(inplace=True)
        return batch, words


class _Batch:
    """Some tables, all their entries in one array."""

    def __init__(self, owner: TableCheck, batch: Array, words: Entries) -> None:
        self._owner = owner
        self._inspection = inspection = owner._inspection
        self._header = header = inspection.header
        tables = owner._tables
        self._offsets = tables.offsets[batch]
        self._times = tables.times[batch]
        self._active_times = tables.active_times[batch]
        self._l1_indexes = tables.l1_indexes[batch]
        self._per_table = header.geometry.l2_entries
        self._is_active = bool(self._active_times.any())
        self._all_active_once = bool((self._active_times == 1).all())
        self._common_times = int(self._times[0]) if (self._times == self._times[0]).all() else 0
        self._entries = words[::2] if header.extended_l2 else words
        self._bitmaps = words[1::2] if header.extended_l2 else None

    def check(self) -> None:
        """Raises StoppedError."""
        union = int(np.bitwise_or.reduce(self._entries))
        if self._bitmaps is not None:
            union |= int(np.bitwise_or.reduce(self._bitmaps))
        if not union:
            return
        used = self._entries if self._bitmaps is None else self._entries | self._bitmaps
        places = np.flatnonzero(used)
        entries = self._entries if len(places) == len(used) else self._entries[places]
        bitmaps = None if self._bitmaps is None else self._bitmaps[places]
        if union & COMPRESSED:
            packed = (entries & np.uint64(COMPRESSED)) != 0
            self._check_compressed(places[packed], entries[packed], None if bitmaps is None else bitmaps[packed])
            places, entries = places[~packed], entries[~packed]
            bitmaps = None if bitmaps is None else bitmaps[~packed]
        if places.size:
            self._check_standard(places, entries, bitmaps)

    # ---- standard entries

    def _check_standard(self, places: Array, entries: Entries, bitmaps: Entries | None) -> None:
        has_data_file = self._header.has_data_file
        union = int(np.bitwise_or.reduce(entries))
        if union & _RESERVED:
            self._report(
                "l2-entry-reserved",
                places[(entries & np.uint64(_RESERVED)) != 0],
                "has reserved bits",
                repair=CLEAR_BITS,
            )
        if union & ZERO and (bitmaps is not None or self._header.version == 2):
            self._check_zero_flags(places[(entries & np.uint64(ZERO)) != 0])
        offsets = (entries & np.uint64(OFFSET_MASK)).view(np.int64)
        allocated = offsets != 0
        if has_data_file:
            at_zero = (entries & np.uint64(COPIED)) != 0
            if bitmaps is None:
                at_zero &= (entries & np.uint64(ZERO)) == 0
            allocated |= at_zero
        if bitmaps is not None:
            self._check_bitmaps(places, bitmaps, allocated)
        if not allocated.all():
            places, entries, offsets = places[allocated], entries[allocated], offsets[allocated]
            bitmaps = None if bitmaps is None else bitmaps[allocated]
        if not places.size:
            return
        if union & OFFSET_MASK & self._header.geometry.cluster_size - 1:
            self._check_alignment(places, entries, offsets, bitmaps)
        if self._is_active:
            self._count_fragments(places, offsets)
        if not has_data_file:
            self._refer(places, offsets)
        if self._is_active:
            self._check_active(places, entries, offsets)

    def _check_active(self, places: Array, entries: Entries, offsets: Array) -> None:
        """What only matters in tables of the active disk."""
        if not self._all_active_once:
            chosen = self._active_times[places // self._per_table] != 0
            places, entries, offsets = places[chosen], entries[chosen], offsets[chosen]
        if self._header.has_data_file:
            self._check_places(places, entries, offsets)
        else:
            self._find_aliases(places, offsets)
        self._check_flags(places, entries, offsets)

    def _check_zero_flags(self, places: Array) -> None:
        if self._header.version == 2:
            self._report(
                "zero-flag-in-v2",
                places,
                "has a zero flag, which version 2 does not know",
                repair=CLEAR_BITS,
                is_ours=True,
            )
        else:
            detail = "has bit 0 set, which means nothing with subclusters"
            self._report("zero-flag-reserved", places, detail, repair=CLEAR_BITS, is_ours=True)

    def _check_bitmaps(self, places: Array, bitmaps: Entries, allocated: Flags) -> None:
        data = (bitmaps & np.uint64(ALL_SUBCLUSTERS)) != 0
        both = (bitmaps >> np.uint64(SUBCLUSTERS) & bitmaps) != 0
        self._report(
            "subclusters-contradict", places[both & allocated], "has subclusters that are both allocated and zero"
        )
        self._report(
            "subclusters-without-cluster", places[data & ~allocated], "has allocated subclusters but no host cluster"
        )

    def _check_alignment(self, places: Array, entries: Entries, offsets: Array, bitmaps: Entries | None) -> None:
        unaligned = (offsets & self._header.geometry.cluster_size - 1) != 0
        is_plain = (entries & np.uint64(ZERO)) != 0 if bitmaps is None else (bitmaps & np.uint64(ALL_SUBCLUSTERS)) == 0
        self._report(
            "data-unaligned", places[unaligned & ~is_plain], "names a host cluster that is not at the start of one"
        )
        self._report(
            "preallocated-unaligned",
            places[unaligned & is_plain],
            "names a host cluster for zeros that is not at the start of one",
            repair="drop the host cluster, keep zeros",
        )

    def _count_fragments(self, places: Array, offsets: Array) -> None:
        fragmentation, times = self._owner.fragmentation, self._active_times
        goes_on = np.diff(offsets) == self._header.geometry.cluster_size
        breaks = np.flatnonzero(~goes_on)
        tables = places[breaks] // self._per_table
        breaks_inside = tables[tables == places[breaks + 1] // self._per_table]
        if self._all_active_once:
            fragmentation.allocated += len(places)
            fragmentation.fragmented += len(breaks_inside)
        else:
            fragmentation.allocated += int(times[places // self._per_table].sum())
            fragmentation.fragmented += int(times[breaks_inside].sum())

    def _refer(self, places: Array, offsets: Array) -> None:
        """Count the clusters that start at these offsets."""
        for times, chosen in self._by_times(places):
            here, there = (places, offsets) if chosen is None else (places[chosen], offsets[chosen])

            def outside(position: int, here: Array = here, there: Array = there) -> Finding:
                return self._beyond_end(int(here[position]), int(there[position]), "host cluster")

            self._inspection.refer_clusters("L2 table", there, times, outside)

    def _by_times(self, places: Array) -> Iterator[tuple[int, Flags | None]]:
        """How often tables are referred to, and which of `places` are in those; None for all of them."""
        if self._common_times:
            yield self._common_times, None
            return
        times = self._times[places // self._per_table]
        for each in np.unique(times).tolist():
            yield each, times == each

    def _find_aliases(self, places: Array, offsets: Array) -> None:
        """Host clusters that the active disk has in two places, but for those that follow from a shared table."""
        seen, bits = self._owner._seen, self._header.cluster_bits
        usable = (offsets < self._inspection.file_size) & (offsets & (1 << bits) - 1 == 0)
        if not usable.all():
            places, offsets = places[usable], offsets[usable]
        clusters = offsets >> bits
        again = seen[clusters]
        seen[clusters] = True
        if not (np.diff(clusters) > 0).all():
            first = np.zeros(len(clusters), dtype=np.bool_)
            first[np.unique(clusters, return_index=True)[1]] = True
            again |= ~first
        self._report(
            "guest-aliased",
            places[again],
            "names a host cluster that the disk has in another place too",
            repair="on request, give it a copy of its own",
            is_ours=True,
        )

    def _check_flags(self, places: Array, entries: Entries, offsets: Array) -> None:
        """COPIED must be set where the refcount is 1, and nowhere else."""
        copied = (entries >> np.uint64(63)).astype(np.int8)
        if self._header.has_data_file:
            single: npt.NDArray[np.int8] = np.ones(len(places), dtype=np.int8)
        else:
            single = self._inspection.singles(offsets >> self._header.cluster_bits)
        wrong = places[(copied != single) & (single >= 0)]
        if not wrong.size:
            return
        tables = wrong // self._per_table
        believed = self._offsets[tables] != 0  # the header is no table, even if an L1 entry says so
        believed &= self._inspection.singles(self._offsets[tables] >> self._header.cluster_bits) >= 0
        self._report(
            "l2-copied-wrong",
            wrong[believed],
            "has a COPIED flag that the refcount contradicts",
            is_active=True,
            repair="change the flag",
        )

    def _check_places(self, places: Array, entries: Entries, offsets: Array) -> None:
        """With a data file, guest data is where the guest has it."""
        tables = places // self._per_table
        guest = (self._l1_indexes[tables] * self._per_table + places % self._per_table) << self._header.cluster_bits
        self._report(
            "host-not-guest",
            places[offsets != guest],
            "does not have its cluster where the guest has it",
            is_ours=True,
            repair="on request, name the place in the data file where the guest has it",
            is_active=True,
        )

    # ---- compressed entries

    def _check_compressed(self, places: Array, entries: Entries, bitmaps: Entries | None) -> None:
        flagged = places[(entries & np.uint64(COPIED)) != 0]
        self._report("compressed-copied", flagged, "is compressed and has a COPIED flag")
        if self._header.has_data_file:
            self._report("compressed-with-data-file", places, "is compressed in an image with a data file")
            return
        if bitmaps is not None:
            plain = bitmaps == 0
            self._report("compressed-subclusters", places[~plain], "is compressed and has a subcluster bitmap")
            places, entries = places[plain], entries[plain]
        if not places.size:
            return
        if self._is_active:
            count = int(self._active_times[places // self._per_table].sum())
            fragmentation = self._owner.fragmentation
            fragmentation.allocated += count
            fragmentation.compressed += count
            fragmentation.fragmented += count
        offsets, lengths = _locations(entries, self._header.cluster_bits)
        self._inspection.end_of_references = max(self._inspection.end_of_references, int((offsets + lengths).max()))
        outside = offsets + lengths - self._inspection.file_size >= self._header.geometry.cluster_size
        if outside.any():
            beyond = offsets[outside]
            self._inspection.each(
                "reference-beyond-end",
                places[outside],
                self._times_of_places(),
                lambda place: self._beyond_end(place, int(beyond[places[outside] == place][0]), "compressed cluster"),
            )
            places, offsets, lengths = places[~outside], offsets[~outside], lengths[~outside]
        bits = self._header.cluster_bits
        for times, chosen in self._by_times(places):
            first = (offsets if chosen is None else offsets[chosen]) >> bits
            last = ((offsets + lengths - 1) if chosen is None else (offsets + lengths - 1)[chosen]) >> bits
            while first.size:
                self._inspection.too_many("L2 table", self._inspection.references.add(first, times))
                goes_on = first < last
                first, last = first[goes_on] + 1, last[goes_on]

    # ---- findings

    def _times_of_places(self, *, is_active: bool = False) -> Array:
        """How often each entry of the batch counts."""
        return np.repeat(self._active_times if is_active else self._times, self._per_table)

    def _report(
        self,
        kind: str,
        places: Array,
        detail: str,
        *,
        repair: str | None = None,
        is_ours: bool = False,
        is_active: bool = False,
    ) -> None:
        """A corruption in each of these entries of the batch."""
        if not places.size:
            return
        times = self._times_of_places(is_active=is_active or kind == "guest-aliased")

        def describe(place: int) -> Finding:
            table, index = divmod(place, self._per_table)
            word = int(self._entries[place])
            bitmap = () if self._bitmaps is None else (int(self._bitmaps[place]),)
            where = int(self._offsets[table]) + index * self._header.geometry.l2_entry_size
            return Finding(
                kind,
                FindingClass.CORRUPTION,
                "L2 table",
                int(self._offsets[table]),
                self._guest_offset(place),
                index,
                f"entry {word:#x} {detail}",
                repair,
                int(times[place]),
                is_ours,
                (where, word, *bitmap),
            )

        self._inspection.each(kind, places, times, describe, is_ours=is_ours)

    def _beyond_end(self, place: int, host_offset: int, what: str) -> Finding:
        table, index = divmod(place, self._per_table)
        return beyond_end(
            what,
            host_offset,
            "L2 table",
            count=int(self._times[table]),
            guest_offset=self._guest_offset(place),
            index=index,
            entry_offset=int(self._offsets[table]),
        )

    def _guest_offset(self, place: int) -> int | None:
        """Where the active disk has what an entry maps, None if it does not."""
        table, index = divmod(place, self._per_table)
        if not self._active_times[table]:
            return None
        return (int(self._l1_indexes[table]) * self._per_table + index) << self._header.cluster_bits


def _locations(entries: Entries, cluster_bits: int) -> tuple[Array, Array]:
    """Host offsets and lengths of compressed clusters, reserved bits of the offset taken for a part of it."""
    offset_bits = 70 - cluster_bits
    offsets = (entries & np.uint64((1 << offset_bits) - 1)).view(np.int64)
    sectors = (entries >> np.uint64(offset_bits) & np.uint64((1 << 62 - offset_bits) - 1)).view(np.int64)
    return offsets, (sectors + 1) * SECTOR_SIZE - offsets % SECTOR_SIZE
