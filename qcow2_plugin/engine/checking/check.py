"""Checking an image: is everything that it says in its place, and does it count its clusters right?

**What is done.** Every reference from a live structure is counted (`check_structures`, `check_tables`), and the counts
are held against the refcounts that the image stores (`check_refcounts`). On the way each entry is held against the
format. Which of two sides is right nobody knows; but tables lead to data and refcounts to nothing, so a repair takes
the tables for true.

**QEMU's numbers.** What QEMU looks for as well is counted as `qemu-img check` counts it: the same classes, and each
finding as often, because who replaces one by the other compares. So a table that is referred to a hundred times has
each of its faults a hundred times. What only we look for (data in another place of a data file than the guest has it, a
broken promise of a raw data file, one host cluster in two places of the disk, bits without a meaning, tables that the
end of the file cuts off) is counted apart, as `extra_corruptions`.

**What it costs.** Each distinct table is read once, in whatever number of L1 tables or snapshots it is; holes are not
read. Memory: for each cluster of the file, holes included, a number as wide as the image's refcounts are (a byte at
least) and 2 bytes more, so 4 bytes with the usual refcounts of 16 bits; up to 130 bytes for each L2 table. Files of
more than `references.MAX_CLUSTERS` clusters are refused.

Nothing is changed, not even in a dirty image, and nothing is believed: a damaged image is what a check is for. Only
where a structure that others hang on cannot be read, the check ends early (`CheckResult.aborted`), as QEMU's does.

Source: docs/interop/qcow2.rst.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np

from qcow2_plugin.engine.checking.check_data_file import check_data_file
from qcow2_plugin.engine.checking.check_refcounts import compare_refcounts
from qcow2_plugin.engine.checking.check_structures import check_structures, count_refcount_blocks
from qcow2_plugin.engine.checking.check_tables import Fragmentation, TableCheck
from qcow2_plugin.engine.checking.findings import (
    DEFAULT_MAX_FINDINGS,
    TOO_MANY_REFERENCES,
    CheckResult,
    Finding,
    FindingClass,
    Findings,
    Progress,
    StoppedError,
)
from qcow2_plugin.engine.checking.inspection import AbortedError, Inspection
from qcow2_plugin.engine.checking.references import Clusters
from qcow2_plugin.engine.checking.table_references import TableReferences, Tables
from qcow2_plugin.errors import CorruptImageError, about_file
from qcow2_plugin.format.header import Header, header_cluster_size
from qcow2_plugin.storage import Storage

_PROBE_SIZE = 512
_LENIENT, _LENIENT_AT = struct.Struct(">IIQ"), 56
"""The fields of the header that may have any value: clusters of the refcount table, count and place of snapshots."""


def read_header_for_check(storage: Storage) -> Header:
    """The header of an image that is to be checked.

    No refcount table, or too many snapshots or in a place where they cannot be, is no reason not to check. Raises what
    `Header.parse` does otherwise; UnsupportedFeatureError if the image has features that are unknown here; OSError.
    """
    with about_file(storage.path):
        cluster = bytearray(storage.pread(header_cluster_size(storage.pread(_PROBE_SIZE, 0)), 0))
        table_clusters, snapshot_count, snapshots_offset = _LENIENT.unpack_from(cluster, _LENIENT_AT)
        _LENIENT.pack_into(cluster, _LENIENT_AT, table_clusters or 1, 0, 0)
        header = replace(
            Header.parse(bytes(cluster)),
            refcount_table_clusters=table_clusters,
            snapshot_count=snapshot_count,
            snapshots_offset=snapshots_offset,
        )
        header.require_known_features()
        if header.data_file_raw and not header.has_data_file:
            raise CorruptImageError("header", "the raw data file bit is set without a data file")
    return header


def check_image(
    storage: Storage,
    header: Header,
    *,
    data: Storage | None = None,
    max_findings: int | None = DEFAULT_MAX_FINDINGS,
    stop_after: int | None = None,
    progress: Progress | None = None,
    deep: bool = False,
    as_repaired: bool = False,
) -> CheckResult:
    """Check the image in `storage`; `header` comes from `read_header_for_check`.

    `data` is its external data file, which is looked at only if it promises to hold the whole disk; `deep` reads it
    also where the image says zeros. `max_findings` of each kind are kept (None: all), everything is counted. After
    `stop_after` findings the check ends, and the result says so. `as_repaired` takes a snapshot table that is beyond
    use as `damaged_snapshots.snapshots_as_repaired` reads it, instead of ending there.

    Raises UnsupportedFeatureError if the file or its tables are too large; OSError.
    """
    findings = Findings(max_findings, stop_after)
    check = _Check(storage, header, findings, progress or (lambda done, total: None))
    outcome = CheckResult(total_clusters=-(-header.virtual_size >> header.cluster_bits))
    try:
        last_cluster = check.run(data, deep=deep, as_repaired=as_repaired)
    except AbortedError as error:
        outcome = replace(outcome, aborted=str(error))
    except StoppedError:
        outcome = replace(outcome, stopped=True)
    else:
        outcome = replace(
            outcome,
            image_end_offset=last_cluster + 1 << header.cluster_bits,
            references=check.inspection.references.counts,
            tables_not_alone=check.tables_not_alone(),
        )
    return replace(
        outcome,
        corruptions=findings.counts[FindingClass.CORRUPTION],
        leaks=findings.counts[FindingClass.LEAK],
        check_errors=findings.counts[FindingClass.CHECK_ERROR],
        extra_corruptions=findings.extra_corruptions,
        allocated_clusters=check.fragmentation.allocated,
        fragmented_clusters=check.fragmentation.fragmented,
        compressed_clusters=check.fragmentation.compressed,
        findings=tuple(findings.kept),
        needs_rebuild=findings.needs_rebuild,
        kinds=findings.kinds,
        is_complete=findings.is_complete and not outcome.stopped,
        end_of_references=check.inspection.end_of_references,
    )


class _Check:
    def __init__(self, storage: Storage, header: Header, findings: Findings, progress: Progress) -> None:
        self.inspection = Inspection(storage, header, findings)
        self.fragmentation = Fragmentation()
        self._progress = progress
        self._references = TableReferences(storage.path)

    def run(self, data: Storage | None, *, deep: bool, as_repaired: bool) -> int:
        """The last cluster in use. Raises AbortedError, StoppedError, OSError."""
        inspection = self.inspection
        check_structures(inspection, self._references, as_repaired=as_repaired)
        tables = self._references.tables()
        self._find_shared(tables)
        self._find_cut_off(tables)
        table_check = TableCheck(inspection, tables, self.fragmentation)
        table_check.run(self._progress)
        count_refcount_blocks(inspection)
        last_cluster = compare_refcounts(inspection)
        if data is not None and inspection.header.data_file_raw:
            check_data_file(inspection, data, deep=deep)
        return last_cluster

    def tables_not_alone(self) -> Clusters:
        """The clusters of L2 tables, ascending, that something else refers to as well, as far as that can be told."""
        tables, references = self._references.tables(), self.inspection.references
        inside = tables.offsets < self.inspection.file_size
        clusters = tables.offsets[inside] >> self.inspection.header.cluster_bits
        counts = references.counts[clusters].astype(np.uint64)
        more = counts > tables.times[inside].astype(np.uint64)
        if self.inspection.findings.kinds[TOO_MANY_REFERENCES]:
            more |= counts == np.uint64(references.maximum)
        found: Clusters = clusters[more]
        return found

    def _find_shared(self, tables: Tables) -> None:
        """L2 tables that the disk has in more places than one."""

        def describe(place: int) -> Finding:
            count = int(tables.active_times[place]) - 1
            return Finding(
                "guest-aliased",
                FindingClass.CORRUPTION,
                "L1 table",
                int(tables.offsets[place]),
                None,
                int(tables.l1_indexes[place]),
                f"names an L2 table that {count} more entries name",
                None,
                count,
                True,
            )

        shared = np.flatnonzero((tables.active_times > 1) & (tables.offsets != 0))
        self.inspection.each("guest-aliased", shared, tables.active_times - 1, describe, is_ours=True)

    def _find_cut_off(self, tables: Tables) -> None:
        """L2 tables that the end of the file cuts off; a snapshot's count as much as those of the disk."""
        size, file_size = self.inspection.header.geometry.cluster_size, self.inspection.file_size
        inside = tables.offsets[tables.offsets < file_size]
        for offset in inside[inside + size > file_size].tolist():
            self.inspection.cut_off("L2 table", offset)
