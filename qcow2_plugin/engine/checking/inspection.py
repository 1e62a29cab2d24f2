"""One check of one image: what it looks at, what it has counted so far, and where its findings go.

The rules that all structures share are here: when a reference counts, and how many findings of a kind are told one by
one. QEMU's rule for the end of the file is kept to the byte, because its numbers are: a structure that reaches a whole
cluster past it is a corruption and refers to nothing; one that reaches less far is counted, since the last cluster of a
file need not be all there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.checking.findings import TOO_MANY_REFERENCES, Finding, FindingClass, Findings
from qcow2_plugin.engine.checking.references import Clusters, Excess, References
from qcow2_plugin.engine.checking.stored_refcounts import MAX_FILE_SIZE, StoredRefcounts
from qcow2_plugin.format.header import Header
from qcow2_plugin.storage import Storage

Times = int | npt.NDArray[np.int64]
"""How often something counts: the same for all of an array, or one by one."""
BEYOND_END = "reference-beyond-end"
_CUT_OFF = "table-cut-off"
CLEAR_BITS = "on request, clear the bits"
"""What a repair does about bits that mean nothing."""


class AbortedError(Exception):
    """The check cannot go on: what it needs cannot be read, and QEMU's ends here too."""


class Inspection:
    """An image being checked."""

    def __init__(self, storage: Storage, header: Header, findings: Findings) -> None:
        """Raises UnsupportedFeatureError, OSError."""
        self.storage = storage
        self.header = header
        self.findings = findings
        self.file_size = storage.size()
        self.references = References.of_file(storage, header)
        self.stored = StoredRefcounts(storage, header)
        self.end_of_references = 0
        """One past the highest byte that was referred to."""
        self._singles = self.stored.singles(len(self.references.counts) + 1)

    def corrupt(
        self,
        kind: str,
        structure: str,
        detail: str,
        *,
        host_offset: int | None = None,
        index: int | None = None,
        count: int = 1,
        repair: str | None = None,
        is_ours: bool = False,
        data: tuple[int, ...] = (),
    ) -> None:
        """One corruption. Raises StoppedError."""
        self.findings.add(
            Finding(
                kind, FindingClass.CORRUPTION, structure, host_offset, None, index, detail, repair, count, is_ours, data
            )
        )

    def abort(
        self,
        kind: str,
        structure: str,
        detail: str,
        *,
        host_offset: int,
        index: int | None = None,
        finding_class: FindingClass = FindingClass.CHECK_ERROR,
        repair: str | None = None,
    ) -> NoReturn:
        """The last finding of a check that cannot go on. Raises AbortedError."""
        self.findings.is_complete = False
        self.findings.add(Finding(kind, finding_class, structure, host_offset, None, index, detail, repair))
        raise AbortedError(f"{structure} at host offset {host_offset:#x}: {detail}")

    def each(
        self,
        kind: str,
        places: npt.NDArray[Any],
        times: Times,
        describe: Callable[[int], Finding],
        *,
        is_ours: bool = False,
    ) -> None:
        """A corruption for each of `places`, whatever they number; of them, `describe` is asked for those to keep.

        `times` is how often each counts, indexed by place. Raises StoppedError.
        """
        if not places.size:
            return
        room = self.findings.room(kind)
        for place in places[:room].tolist():
            self.findings.add(describe(place))
        rest = places[room:]
        if rest.size:
            number = len(rest) * times if isinstance(times, int) else int(times[rest].sum())
            self.findings.count(FindingClass.CORRUPTION, kind, number, is_ours=is_ours)

    def read(self, length: int, host_offset: int) -> bytes:
        """`length` bytes; past the end of the file are zeros. Raises OSError."""
        stored = self.storage.pread(length, host_offset) if host_offset < self.file_size else b""
        return stored + bytes(length - len(stored))

    def require_reachable(self, structure: str, host_offset: int, length: int) -> None:
        """Raises AbortedError if a table is where no file can reach, and QEMU cannot even try to read it."""
        if length and host_offset + length > MAX_FILE_SIZE:
            self.abort("table-unreachable", structure, "is where no file can reach", host_offset=host_offset)

    def singles(self, clusters: Clusters) -> npt.NDArray[np.int8]:
        """For each cluster 1 if its stored refcount is 1, 0 if it is another, -1 if nobody can tell. Raises OSError."""
        known = self._singles
        if int(clusters.max(initial=0)) < len(known):
            return known[clusters]
        inside = clusters < len(known)
        found = np.zeros(len(clusters), dtype=np.int8)
        found[inside] = known[clusters[inside]]
        found[~inside] = self.stored.singles_of(clusters[~inside])
        return found

    def refer(self, structure: str, host_offset: int, length: int, times: int = 1) -> None:
        """`times` references to everything that `length` bytes touch. Raises StoppedError."""
        if length <= 0:
            return
        bits = self.header.cluster_bits
        self.end_of_references = max(self.end_of_references, host_offset + length)
        if host_offset + length - self.file_size >= 1 << bits:
            self.findings.is_complete = False
            self.corrupt(BEYOND_END, structure, "lies past the end of the file", host_offset=host_offset, count=times)
            return
        if host_offset + length > self.file_size:
            self.cut_off(structure, host_offset, times)
        first, last = host_offset >> bits, host_offset + length - 1 >> bits
        self.too_many(structure, self.references.add_run(first, last - first + 1, times))

    def cut_off(self, structure: str, host_offset: int, times: int = 1) -> None:
        """The file ends inside a structure, which is then not all there. Raises StoppedError."""
        self.findings.is_complete = False
        self.corrupt(
            _CUT_OFF,
            structure,
            "is not all there, the file ends inside it",
            host_offset=host_offset,
            count=times,
            is_ours=True,
        )

    def refer_clusters(self, structure: str, offsets: Clusters, times: int, describe: Callable[[int], Finding]) -> None:
        """`times` references to one cluster at each offset; `describe` is asked for what is wrong with the place in
        `offsets` that lies past the end of the file. Raises StoppedError."""
        if not offsets.size:
            return
        highest = int(offsets.max())
        self.end_of_references = max(self.end_of_references, highest + self.header.geometry.cluster_size)
        if highest >= self.file_size:
            inside = offsets < self.file_size
            self.each(BEYOND_END, np.flatnonzero(~inside), times, describe)
            offsets = offsets[inside]
        bits = self.header.cluster_bits
        clusters = offsets >> bits
        self.too_many(structure, self.references.add(clusters, times))
        unaligned = (offsets & (1 << bits) - 1) != 0
        if unaligned.any():
            self.too_many(structure, self.references.add(clusters[unaligned] + 1, times))

    def too_many(self, structure: str, excess: Excess | None) -> None:
        """References that a refcount cannot count. Raises StoppedError."""
        if excess is None:
            return
        bits, maximum = self.header.cluster_bits, self.references.maximum

        def describe(place: int) -> Finding:
            return Finding(
                TOO_MANY_REFERENCES,
                FindingClass.CORRUPTION,
                structure,
                int(excess.clusters[place]) << bits,
                None,
                None,
                f"refers to cluster {int(excess.clusters[place])}, which has the {maximum} references already that a "
                "refcount can count; widen the refcounts (amend), or copy the disk to a new image",
                None,
                int(excess.counts[place]),
            )

        self.each(TOO_MANY_REFERENCES, np.arange(len(excess.clusters)), excess.counts.astype(np.int64), describe)


def beyond_end(
    structure: str,
    host_offset: int,
    named_by: str,
    *,
    count: int,
    guest_offset: int | None = None,
    index: int | None = None,
    entry_offset: int | None = None,
) -> Finding:
    """What to say of a reference to a place that the file does not have."""
    return Finding(
        BEYOND_END,
        FindingClass.CORRUPTION,
        named_by,
        entry_offset,
        guest_offset,
        index,
        f"refers to a {structure} at host offset {host_offset:#x}, past the end of the file",
        None,
        count,
    )
