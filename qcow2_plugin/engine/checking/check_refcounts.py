"""Checking refcounts: those that the image stores against the references that were counted, cluster by cluster.

Neighbours that are wrong in the same way are one finding, which counts as often as there are clusters.

Source: docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

import numpy as np

from qcow2_plugin.engine.checking.findings import Finding, FindingClass
from qcow2_plugin.engine.checking.inspection import Inspection
from qcow2_plugin.engine.checking.references import Clusters, Counts

_REPAIRS = {
    "refcount-leak": (FindingClass.LEAK, "lower the refcount, which frees the space"),
    "refcount-too-low": (FindingClass.CORRUPTION, "raise the refcount"),
    "refcount-missing": (FindingClass.CORRUPTION, "make new refcounts from the tables"),
}


def compare_refcounts(inspection: Inspection) -> int:
    """The last cluster that is in use, by refcount or by reference; every difference becomes a finding.

    Refcounts of clusters that the file does not have are not looked at. Raises StoppedError, OSError.
    """
    stored, counts = inspection.stored, inspection.references.counts
    last = 0
    for slot in range(-(-len(counts) // stored.per_block)):
        start = slot * stored.per_block
        counted = counts[start : start + stored.per_block]
        block = stored.block(slot) if stored.block_offset(slot) else None
        if block is not None:
            refcounts = block[: len(counted)]
        elif stored.block_offset(slot):
            _unreadable(inspection, slot, len(counted))
            continue
        elif counted.any():
            refcounts = np.zeros_like(counted)
        else:
            continue
        used = np.flatnonzero(refcounts | counted)
        if used.size:
            last = start + int(used[-1])
        different = np.flatnonzero(refcounts != counted)
        if different.size:
            _report(inspection, start + different, refcounts[different], counted[different])
    return last


def _unreadable(inspection: Inspection, slot: int, cluster_count: int) -> None:
    inspection.findings.add(
        Finding(
            "refcounts-unreadable",
            FindingClass.CHECK_ERROR,
            "refcount table",
            inspection.header.refcount_table_offset,
            None,
            slot,
            f"entry {slot} is {int(inspection.stored.entries[slot]):#x}, where no refcount block can be, so "
            f"the refcounts of {cluster_count} clusters are not known",
            None,
            cluster_count,
        )
    )


def _report(inspection: Inspection, clusters: Clusters, refcounts: Counts, counted: Counts) -> None:
    """Clusters in ascending order whose refcounts are not what was counted."""
    if (refcounts == 0).any():
        inspection.findings.needs_rebuild = True
    goes_on = (np.diff(clusters) == 1) & (refcounts[1:] == refcounts[:-1]) & (counted[1:] == counted[:-1])
    starts = np.concatenate(([0], np.flatnonzero(~goes_on) + 1))
    lengths = np.diff(np.concatenate((starts, [len(clusters)])))
    kinds = np.where(refcounts[starts] > counted[starts], 0, np.where(refcounts[starts] == 0, 2, 1))
    for number, (kind, (finding_class, repair)) in enumerate(_REPAIRS.items()):
        chosen = np.flatnonzero(kinds == number)
        room = inspection.findings.room(kind)
        for place in chosen[:room].tolist():
            start = starts[place]
            inspection.findings.add(
                _finding(
                    inspection,
                    kind,
                    finding_class,
                    repair,
                    first=int(clusters[start]),
                    count=int(lengths[place]),
                    refcount=int(refcounts[start]),
                    references=int(counted[start]),
                )
            )
        rest = int(lengths[chosen[room:]].sum())
        if rest:
            inspection.findings.count(finding_class, kind, rest)


def _finding(
    inspection: Inspection,
    kind: str,
    finding_class: FindingClass,
    repair: str,
    *,
    first: int,
    count: int,
    refcount: int,
    references: int,
) -> Finding:
    """What to say of `count` clusters from the `first` on, which all have this refcount and so many references."""
    detail = f"refcount {refcount}, but {references} reference{'' if references == 1 else 's'}"
    detail += "" if count == 1 else ", here and in the clusters behind it"
    return Finding(
        kind,
        finding_class,
        "cluster",
        first << inspection.header.cluster_bits,
        None,
        None,
        detail,
        repair,
        count,
        data=(first, refcount, references),
    )
