"""Checking everything but L2 tables: what the header names, snapshots, bitmaps, refcount blocks, and L1 tables.

Every reference is counted; which L2 tables L1 tables name, and how often, is handed on. L1 and bitmap tables are read
as ranges of the file: where several overlap, or are one and the same, what they have in common is read once and counts
as often as it is covered. Holes are not read at all.

Source: docs/interop/qcow2.rst.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.checking.damaged_snapshots import SnapshotTable, TableFault, read_snapshot_table, too_many
from qcow2_plugin.engine.checking.findings import Finding, FindingClass
from qcow2_plugin.engine.checking.inspection import CLEAR_BITS, Inspection, beyond_end
from qcow2_plugin.engine.checking.references import Range, covered
from qcow2_plugin.engine.checking.table_references import TableReferences
from qcow2_plugin.errors import CorruptImageError, Qcow2Error, printable
from qcow2_plugin.format import bitmaps as format_bitmaps
from qcow2_plugin.format import bits, geometry
from qcow2_plugin.format.bitmaps import Bitmap
from qcow2_plugin.format.entries import OFFSET_MASK
from qcow2_plugin.format.snapshots import Snapshot

Words = npt.NDArray[np.uint64]

_L1_RESERVED = 0x7F00_0000_0000_01FF
_REFCOUNT_TABLE_RESERVED = 0x1FF
_CHUNK = 1 << 19
"""Bytes of tables that are looked at together."""
_MAX_NAME_TAIL = geometry.MAX_NAME_LENGTH + 7
"""Bytes of a bitmap directory that may be missing where they are zeros: no entry is as short as a name."""
_MIN_EXTRA_SIZE = 16
"""Bytes of extra data up to the disk size, which version 3 asks for."""


class _Part(NamedTuple):
    """Some words of a table that are next to each other in the file."""

    host_offset: int
    words: Words
    times: int
    """How many tables they are part of."""


def check_structures(inspection: Inspection, tables: TableReferences, *, as_repaired: bool) -> None:
    """Count what all structures refer to but L2 tables, which go to `tables`.

    The snapshot table may be one that cannot be used; `as_repaired` takes it as a repair would leave it.

    Raises AbortedError, StoppedError, OSError; UnsupportedFeatureError.
    """
    header = inspection.header
    snapshots = _read_snapshots(inspection, as_repaired=as_repaired)
    table_size = header.refcount_table_clusters << header.cluster_bits
    inspection.require_reachable("L1 table", header.l1_table_offset, 8 * header.l1_size)
    inspection.require_reachable("refcount table", header.refcount_table_offset, table_size)
    inspection.refer("header", 0, header.geometry.cluster_size)
    inspection.refer("L1 table", header.l1_table_offset, 8 * header.l1_size)
    start = header.l1_table_offset
    for part in _parts(inspection, [Range(start, start + 8 * header.l1_size, 1)]):
        _count_l1(inspection, part, tables, is_active=True)
    _count_snapshots(inspection, snapshots, tables)
    told = inspection.end_of_references, inspection.findings.is_complete
    inspection.refer("refcount table", header.refcount_table_offset, table_size)
    inspection.end_of_references, inspection.findings.is_complete = told  # a lost one can be made anew
    if header.encryption is not None:
        inspection.refer("encryption header", header.encryption.offset, header.encryption.length)
    _count_bitmaps(inspection)


def count_refcount_blocks(inspection: Inspection) -> None:
    """Count the refcount blocks, last of all: each must be the only thing in its place.

    Raises StoppedError.
    """
    header, entries, references = inspection.header, inspection.stored.entries, inspection.references
    offsets = entries & np.uint64(~_REFCOUNT_TABLE_RESERVED & (1 << 64) - 1)
    for slot in np.flatnonzero(entries).tolist():
        entry, offset = int(entries[slot]), int(offsets[slot])
        if entry & _REFCOUNT_TABLE_RESERVED:
            _bad_block(inspection, "refcount-entry-reserved", slot, entry, "has reserved bits")
        elif offset & header.geometry.cluster_size - 1:
            _bad_block(inspection, "refcount-entry-unaligned", slot, entry, "is not at the start of a cluster")
        elif offset >> header.cluster_bits >= len(references.counts):
            inspection.corrupt(
                "refcount-block-outside",
                "refcount table",
                f"entry {slot} is {entry:#x}, past the end of the file",
                host_offset=header.refcount_table_offset,
                index=slot,
                data=(slot, entry),
                repair="extend the file by the block, or make new refcounts from the tables",
            )
        elif offset:
            inspection.refer("refcount block", offset, header.geometry.cluster_size)
            count = int(references.counts[offset >> header.cluster_bits])
            if count != 1:
                detail = f"is a block whose cluster has {count} references"
                _bad_block(inspection, "refcount-block-shared", slot, entry, detail)


def _bad_block(inspection: Inspection, kind: str, slot: int, entry: int, detail: str) -> None:
    inspection.findings.needs_rebuild = True
    inspection.corrupt(
        kind,
        "refcount table",
        f"entry {slot} is {entry:#x} and {detail}",
        host_offset=inspection.header.refcount_table_offset,
        index=slot,
        data=(slot, entry),
        repair="make new refcounts from the tables",
    )


# ---- reading tables


def _parts(inspection: Inspection, ranges: Iterable[Range]) -> Iterator[_Part]:
    """The words in ranges of the file, in parts, but for holes and what is past the end: there they are zeros."""
    storage, file_size = inspection.storage, inspection.file_size
    for start, stop, times in ranges:
        for offset, length, is_data in storage.data_ranges(start, max(min(stop, file_size) - start, 0)):
            for piece in range(offset, offset + length if is_data else offset, _CHUNK):
                stored = storage.pread(min(_CHUNK, offset + length - piece), piece)
                stored += bytes(-len(stored) % 8)
                yield _Part(piece, np.frombuffer(stored, dtype=">u8").astype(np.uint64), times)


# ---- L1 tables


def _count_l1(inspection: Inspection, part: _Part, tables: TableReferences, *, is_active: bool) -> None:
    """Count the L2 tables that a part of an L1 table names."""
    indexes = np.flatnonzero(part.words)
    if not indexes.size:
        return
    entries, times = part.words[indexes], part.times
    offsets = (entries & np.uint64(OFFSET_MASK)).view(np.int64)
    first = (part.host_offset - inspection.header.l1_table_offset) // 8 if is_active else 0
    title = "L1 table" if is_active else "snapshot L1 table"

    def place(position: int) -> tuple[int, int | None, int | None]:
        index = int(indexes[position])
        guest_offset = first + index << inspection.header.geometry.l2_coverage_bits
        entry_offset = part.host_offset + 8 * index
        return (entry_offset, guest_offset, first + index) if is_active else (entry_offset, None, None)

    def wrong(kind: str, position: int, detail: str, repair: str | None = None) -> Finding:
        host_offset, guest_offset, index = place(position)
        word = int(entries[position])
        return Finding(
            kind,
            FindingClass.CORRUPTION,
            title,
            host_offset,
            guest_offset,
            index,
            f"entry {word:#x} {detail}",
            repair,
            times,
            data=(host_offset, word),
        )

    def outside(position: int) -> Finding:
        entry_offset, guest_offset, index = place(position)
        return beyond_end(
            "L2 table",
            int(offsets[position]),
            title,
            count=times,
            guest_offset=guest_offset,
            index=index,
            entry_offset=entry_offset,
        )

    reserved = np.flatnonzero(entries & np.uint64(_L1_RESERVED))
    inspection.each(
        "l1-entry-reserved",
        reserved,
        times,
        lambda place: wrong("l1-entry-reserved", place, "has reserved bits", CLEAR_BITS),
    )
    inspection.refer_clusters(title, offsets, times, outside)
    size = inspection.header.geometry.cluster_size
    unaligned = np.flatnonzero(offsets & size - 1)
    inspection.each(
        "l2-table-unaligned",
        unaligned,
        times,
        lambda place: wrong("l2-table-unaligned", place, "names an L2 table that is not at the start of a cluster"),
    )
    if is_active:
        single = inspection.singles(offsets >> inspection.header.cluster_bits)
        flagged = (entries >> np.uint64(63)).astype(np.int8)
        inspection.each(
            "l1-copied-wrong",
            np.flatnonzero((offsets != 0) & (single >= 0) & (flagged != single)),
            1,
            lambda place: wrong(
                "l1-copied-wrong", place, "has a COPIED flag that the refcount contradicts", "change the flag"
            ),
        )
    if unaligned.size or int(offsets.max()) >= inspection.file_size:
        inspection.findings.is_complete = False
    tables.add(offsets, times, first + indexes if is_active else None)


# ---- snapshots


def _read_snapshots(inspection: Inspection, *, as_repaired: bool) -> SnapshotTable:
    """The snapshot table. Raises AbortedError if it cannot be used, unless `as_repaired`."""
    header = inspection.header
    if not as_repaired and (fault := too_many(header)) is not None:  # before they are read
        _cannot_use(inspection, fault)
    try:
        table = read_snapshot_table(inspection.storage, header)
    except CorruptImageError as error:
        place = header.snapshots_offset
        inspection.abort("snapshot-table-misplaced", "snapshot table", error.detail, host_offset=place)
    for fault in table.faults:
        if not as_repaired:
            _cannot_use(inspection, fault)
        inspection.corrupt(
            fault.kind,
            "snapshot table",
            fault.detail,
            host_offset=header.snapshots_offset,
            index=fault.index,
            count=fault.count,
            repair=fault.repair,
        )
    return table


def _cannot_use(inspection: Inspection, fault: TableFault) -> NoReturn:
    inspection.abort(
        fault.kind,
        "snapshot table",
        fault.detail,
        host_offset=inspection.header.snapshots_offset,
        index=fault.index,
        repair=fault.repair,
    )


def _count_snapshots(inspection: Inspection, table: SnapshotTable, tables: TableReferences) -> None:
    header, snapshots = inspection.header, table.snapshots
    if header.has_data_file and snapshots:
        inspection.corrupt(
            "snapshots-with-data-file",
            "snapshot table",
            f"{len(snapshots)} snapshots in an image with a data file",
            host_offset=header.snapshots_offset,
        )
    l1_tables = []
    for index, snapshot in enumerate(snapshots):
        if header.version > 2 and len(snapshot.extra) < _MIN_EXTRA_SIZE:
            inspection.corrupt(
                "snapshot-incomplete",
                "snapshot table",
                f"entry {index} does not have the size of its disk",
                host_offset=header.snapshots_offset,
                index=index,
                repair="write the current size of the disk into it",
                data=(index,),
            )
        if _is_usable(inspection, index, snapshot):
            inspection.require_reachable("snapshot L1 table", snapshot.l1_table_offset, 8 * snapshot.l1_size)
            l1_tables.append((snapshot.l1_table_offset, 8 * snapshot.l1_size))
    _refer_tables(inspection, "snapshot L1 table", l1_tables)
    for part in _parts(inspection, covered((start, start + length) for start, length in l1_tables)):
        _count_l1(inspection, part, tables, is_active=False)
    inspection.refer("snapshot table", header.snapshots_offset, table.size)


def _is_usable(inspection: Inspection, index: int, snapshot: Snapshot) -> bool:
    """False, and a corruption, if there can be no L1 table where a snapshot says."""
    name = printable(snapshot.id)
    start = snapshot.l1_table_offset
    if start % inspection.header.geometry.cluster_size:
        kind, detail = "snapshot-l1-unaligned", "is not at the start of a cluster"
    elif snapshot.l1_size > geometry.MAX_L1_ENTRIES:
        kind, detail = "snapshot-l1-too-large", f"has {snapshot.l1_size} entries, too many"
    else:
        return True
    inspection.findings.is_complete = False
    inspection.corrupt(kind, f'L1 table of snapshot "{name}"', detail, host_offset=start, index=index)
    return False


def _refer_tables(inspection: Inspection, structure: str, tables: list[tuple[int, int]]) -> None:
    """Count the clusters of tables, each an offset and a length, by how many of them cover a cluster."""
    cluster_bits, file_size = inspection.header.cluster_bits, inspection.file_size
    ranges = []
    for start, length in tables:
        end = start + length
        if length and end <= file_size:
            ranges.append((start >> cluster_bits, (end - 1 >> cluster_bits) + 1))
        else:
            inspection.refer(structure, start, length)
    for first, stop, times in covered(ranges):
        inspection.too_many(structure, inspection.references.add_run(first, stop - first, times))


# ---- bitmaps


def _count_bitmaps(inspection: Inspection) -> None:
    """Raises AbortedError if any of them cannot be read."""
    header = inspection.header
    try:
        pointer = header.bitmaps
    except Qcow2Error as error:
        _bad_bitmaps(inspection, 0, error.detail)
    if pointer is None:
        return
    inspection.refer("bitmap directory", pointer.directory_offset, pointer.directory_size)
    if pointer.directory_offset + pointer.directory_size - inspection.file_size > _MAX_NAME_TAIL:
        _bad_bitmaps(inspection, pointer.directory_offset, "lies past the end of the file")
    directory = inspection.read(pointer.directory_size, pointer.directory_offset)
    try:
        bitmaps = format_bitmaps.parse_directory(directory, pointer.bitmap_count, header.geometry.cluster_size)
    except CorruptImageError as error:
        _bad_bitmaps(inspection, pointer.directory_offset, error.detail)
    for bitmap in bitmaps:
        reason = _refused(bitmap, inspection)
        if reason is not None:
            _bad_bitmaps(inspection, pointer.directory_offset, f'bitmap "{printable(bitmap.name)}": {reason}')
    tables = [(bitmap.table_offset, 8 * bitmap.table_entries) for bitmap in bitmaps]
    for start, length in tables:
        inspection.require_reachable("bitmap table", start, length)
    _refer_tables(inspection, "bitmap table", tables)
    for part in _parts(inspection, covered((start, start + length) for start, length in tables)):
        _count_bits(inspection, part)


def _refused(bitmap: Bitmap, inspection: Inspection) -> str | None:
    """Why QEMU takes the whole directory for broken because of this bitmap, None if it does not."""
    header = inspection.header
    data_size = bitmap.table_entries * header.geometry.cluster_size
    if bitmap.extra:
        return "it has extra data"
    if bitmap.flags & ~(format_bitmaps.FLAG_IN_USE | format_bitmaps.FLAG_AUTO):
        return f"its flags {bitmap.flags:#x} are unknown"
    if not bitmap.in_use:
        return bitmap.unusable_reason(header.virtual_size, header.geometry.cluster_size)
    if bitmap.type != format_bitmaps.TYPE_DIRTY_TRACKING:
        return f"its type {bitmap.type} is unknown"
    if not 9 <= bitmap.granularity_bits <= 31 or data_size > geometry.MAX_BITMAP_DATA_SIZE:
        return "its granularity or size is not supported"
    return None


def _count_bits(inspection: Inspection, part: _Part) -> None:
    """Count the clusters of bits that a part of a bitmap table names."""
    entries = part.words[part.words != 0]
    if not entries.size:
        return
    if not bits.is_sound(entries, inspection.header.geometry.cluster_size).all():
        _bad_bitmaps(inspection, part.host_offset, "an entry of a bitmap table is invalid")
    offsets = (entries & np.uint64(bits.TABLE_OFFSET_MASK)).view(np.int64)
    offsets = offsets[offsets != 0]
    inspection.refer_clusters(
        "bitmap table",
        offsets,
        part.times,
        lambda place: beyond_end("cluster of bits", int(offsets[place]), "bitmap table", count=part.times),
    )


def _bad_bitmaps(inspection: Inspection, host_offset: int, detail: str) -> NoReturn:
    inspection.abort(
        "bitmaps-unreadable", "bitmap directory", detail, host_offset=host_offset, finding_class=FindingClass.CORRUPTION
    )
