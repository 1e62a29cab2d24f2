"""Checking an external data file that promises to hold the whole disk by itself (the raw bit).

Where the image has nothing, or says zeros, a reader of the image sees zeros, so the file must hold zeros there too.
Which ranges have no data at all the file system says; data that is there is read. Tables are gone through in the order
of the disk, one at a time; what is wrong with themselves others say.

Source: docs/interop/qcow2.rst, "Header" (raw external data).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qcow2_plugin.engine.checking.findings import Finding, FindingClass
from qcow2_plugin.engine.checking.inspection import Inspection
from qcow2_plugin.engine.tables import entry_rules
from qcow2_plugin.format.entries import OFFSET_MASK, ClusterKind, classify_table
from qcow2_plugin.storage import Storage

_PIECE = 1 << 20
"""Bytes of the data file that are looked at together."""
_L1_CHUNK = 65536
"""L1 entries that are looked at together."""
_NOTHING = (ClusterKind.UNALLOCATED, ClusterKind.UNALLOCATED_ALLOCATED)
_ZEROS = (ClusterKind.ZERO_PLAIN, ClusterKind.ZERO_ALLOCATED)


def check_data_file(inspection: Inspection, data: Storage, *, deep: bool) -> None:
    """Hold what the image has nothing for, and if `deep` what it says is zeros, against the data file.

    Raises StoppedError, OSError.
    """
    header = inspection.header
    if header.backing_file is not None:
        inspection.corrupt(
            "raw-with-backing-file",
            "header",
            "has a backing file, and a data file that is to hold the whole disk",
            is_ours=True,
        )
        return
    for start, stop in _ranges(inspection, _NOTHING, with_missing=True):
        for first, count in _clusters_with_data(data, start, stop, header.cluster_bits):
            place = max(first << header.cluster_bits, start)
            _report(inspection, "raw-not-covered", place, count, "is not mapped", repair="on request, map it")
    if not deep:
        return
    for start, stop in _ranges(inspection, _ZEROS, with_missing=False):
        for first, count in _clusters_with_data(data, start, stop, header.cluster_bits):
            _report(inspection, "raw-not-zero", max(first << header.cluster_bits, start), count, "is zeros")


def _report(
    inspection: Inspection, kind: str, guest_offset: int, count: int, state: str, *, repair: str | None = None
) -> None:
    """The disk is in this `state` where the data file has data, in `count` clusters."""
    detail = f"the disk {state} here, but the data file, which is to hold all of it, has data"
    inspection.findings.add(
        Finding(kind, FindingClass.CORRUPTION, "L2 table", None, guest_offset, None, detail, repair, count, True)
    )


def _clusters_with_data(data: Storage, start: int, stop: int, cluster_bits: int) -> Iterator[tuple[int, int]]:
    """Runs (first, count) of clusters in which the range has bytes that are not 0, a piece of it at a time."""
    for offset, length, is_data in data.data_ranges(start, stop - start):
        for piece in range(offset, offset + length if is_data else offset, _PIECE):
            stored = np.frombuffer(data.pread(min(_PIECE, offset + length - piece), piece), dtype=np.uint8)
            if not stored.any():
                continue
            clusters = np.unique(np.flatnonzero(stored) + piece >> cluster_bits)
            starts = np.concatenate(([0], np.flatnonzero(np.diff(clusters) != 1) + 1))
            ends = np.concatenate((starts[1:], [len(clusters)]))
            yield from zip(clusters[starts].tolist(), (ends - starts).tolist(), strict=True)


def _ranges(inspection: Inspection, kinds: tuple[ClusterKind, ...], *, with_missing: bool) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) of the disk whose entries are of these kinds, joined; `with_missing` those without an L2
    table are, too."""
    header = inspection.header
    coverage, size = header.geometry.l2_coverage, header.virtual_size
    waiting = (0, 0)
    for index, offset in _l2_tables(inspection):
        start = index * coverage
        if offset:
            found = _ranges_of_table(inspection, offset, start, kinds)
        else:
            found = iter([(start, start + coverage)] if with_missing else ())
        for first, end in found:
            if first == waiting[1]:
                waiting = waiting[0], end
                continue
            if waiting[0] < waiting[1]:
                yield waiting
            waiting = first, end
    first, end = waiting[0], min(waiting[1], size)
    if first < end:
        yield first, end


def _l2_tables(inspection: Inspection) -> Iterator[tuple[int, int]]:
    """(index, host offset of the table, 0 for none) of each L1 entry of the disk."""
    header, storage = inspection.header, inspection.storage
    count = header.geometry.l1_entries_for(header.virtual_size)
    for first in range(0, count, _L1_CHUNK):
        length = 8 * min(_L1_CHUNK, count - first)
        stored = storage.pread(length, header.l1_table_offset + 8 * first)
        words = np.frombuffer(stored + bytes(length - len(stored)), dtype=">u8")
        yield from enumerate((words & np.uint64(OFFSET_MASK)).tolist(), first)


def _ranges_of_table(
    inspection: Inspection, table_offset: int, guest_offset: int, kinds: tuple[ClusterKind, ...]
) -> Iterator[tuple[int, int]]:
    """The ranges of the disk that the table maps from `guest_offset` on whose entries are of these kinds."""
    geometry = inspection.header.geometry
    stored = inspection.storage.pread(geometry.cluster_size, table_offset)
    words = np.frombuffer(stored + bytes(geometry.cluster_size - len(stored)), dtype=">u8").astype(np.uint64)
    entries, bitmaps = (words[::2], words[1::2]) if geometry.extended_l2 else (words, None)
    chosen = np.isin(classify_table(entries, bitmaps, entry_rules(inspection.header)).reshape(-1), kinds)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False])).astype(np.int8)))
    for first, end in edges.reshape(-1, 2).tolist():
        yield guest_offset + first * geometry.subcluster_size, guest_offset + end * geometry.subcluster_size
