"""Repairing an image: what a check finds is put right, in an order that a crash may interrupt anywhere.

    1   L1 and L2 entries that nothing can follow let go of what they name, where that changes nothing for the guest
    2   refcounts that are too low rise; lost refcount structures are written anew beside the old ones
    3   a snapshot table that breaks the format is written anew, and the header switched to it
    4   refcounts that are too high fall
    5   COPIED flags say what the refcounts say
    6   dirty and corrupt are cleared, if nothing is wrong any more

There is a barrier behind each step. A pointer that goes is durably gone before the refcount falls, a refcount has risen
before anything new is pointed to, so after a crash at any point no cluster is counted too low that was not before, what
could be read can be read, and the next repair finds less to do. References are counted again after every step that
changes them: the count decides, not a list of findings, which may be cut short.

**What is not given back.** Where a table cannot be followed, what it named looks like leaked space. Refcounts do not
fall then, so that whoever mends the table finds its clusters unharmed. (QEMU frees them.)

**What QEMU does not repair** is done on request only: bits that mean nothing are cleared, clusters of a data file are
looked for where their guest is, unmapped parts of a raw data file are mapped, and of two guest clusters that share a
host cluster one gets a copy (`repair_extra`).

Source: docs/interop/qcow2.rst.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.checking.check import check_image
from qcow2_plugin.engine.checking.damaged_snapshots import snapshots_as_repaired
from qcow2_plugin.engine.checking.findings import DEFAULT_MAX_FINDINGS, TOO_MANY_REFERENCES, CheckResult, Progress
from qcow2_plugin.engine.image_file import Clusters, ImageFile
from qcow2_plugin.engine.repairing.damaged_map import read_damaged_map
from qcow2_plugin.engine.repairing.repair_entries import (
    Mask,
    clear_l1_reserved,
    clear_l2_reserved,
    correct_flags,
    fix_active_l2_tables,
    fix_l1_tables,
    fix_l2_tables,
    put_where_the_guest_is,
    zero_unaligned,
)
from qcow2_plugin.engine.repairing.repair_extra import cover_raw_disk, distrust_bitmaps, part_aliases
from qcow2_plugin.engine.repairing.repair_refcounts import (
    References,
    are_usable,
    is_table_usable,
    lower_refcounts,
    raise_refcounts,
    rebuild_structures,
)
from qcow2_plugin.engine.repairing.repair_snapshots import DROPPING_KINDS, SNAPSHOT_KINDS, write_snapshots
from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.format.header import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_DATA_FILE_RAW,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    EncryptionMethod,
    Header,
)
from qcow2_plugin.storage import Storage, WritableStorage

Mode = Literal["leaks", "all"]

_COPIED_KINDS = ("l1-copied-wrong", "l2-copied-wrong")


def repair_image(
    storage: WritableStorage,
    header: Header,
    *,
    mode: Mode,
    repair_ours: bool = False,
    data: Storage | None = None,
    max_findings: int | None = DEFAULT_MAX_FINDINGS,
    progress: Progress | None = None,
) -> CheckResult:
    """Repair the image with this header, as `read_header_for_check` gives it, and check it once more.

    "leaks" lowers refcounts that are too high and, if nothing else is wrong, puts COPIED flags right; "all" does
    everything that QEMU does; `repair_ours` adds what QEMU does not. `data` is the external data file, which is read.

    The result is that of the second check, with what was put right; of the only one, if there was nothing to do.
    Raises CorruptImageError, with the image unchanged, if refcounts have to be rebuilt and that was not asked for, or
    the check cannot be completed; UnsupportedFeatureError; OSError. Memory: that of a check, twice.
    """
    return _Repair(
        storage,
        header,
        is_all=mode == "all",
        repair_ours=repair_ours,
        data=data,
        max_findings=max_findings,
        progress=progress,
    ).run()


class _Repair:
    """One repair."""

    def __init__(
        self,
        storage: WritableStorage,
        header: Header,
        *,
        is_all: bool,
        repair_ours: bool,
        data: Storage | None,
        max_findings: int | None,
        progress: Progress | None,
    ) -> None:
        self._storage = storage
        self._data = data
        self._is_all = is_all
        self._ours = repair_ours
        self._max_findings = max_findings
        self._progress = progress
        self._corruptions_fixed = self._leaks_fixed = self._leaks_made = 0
        self._has_changed = False
        self._found = self._check(header)
        self._require_possible(self._found)
        self._snapshots = snapshots_as_repaired(storage, header)
        self._file = self._open(header)

    def run(self) -> CheckResult:
        """Everything; see `repair_image`."""
        first = self._found
        if not first.is_sound:
            self._begin()
            self._mend_entries()
            self._settle()
            if self._ours:
                self._mend_more()
        if self._has_changed:
            self._found = self._check(self._file.header)
        self._clear_marks()
        return replace(
            self._found,
            corruptions_fixed=self._corruptions_fixed,
            leaks_fixed=self._leaks_fixed,
            extra_corruptions_fixed=max(first.extra_corruptions - self._found.extra_corruptions, 0),
        )

    # ---- looking

    def _check(self, header: Header) -> CheckResult:
        return check_image(
            self._storage,
            header,
            data=self._data,
            max_findings=self._max_findings,
            progress=self._progress,
            as_repaired=self._is_all,
        )

    def _count_again(self) -> None:
        """After a change of what is referred to."""
        self._found = self._check(self._file.header)
        self._require_possible(self._found)
        self._file = self._open(self._file.header)

    def _open(self, header: Header) -> ImageFile:
        """The image file, with the places that were found in it."""
        not_alone = self._found.tables_not_alone
        assert not_alone is not None  # of a check that was completed
        return ImageFile(self._storage, header, read_damaged_map(self._storage, header, self._snapshots, not_alone))

    def _require_possible(self, found: CheckResult) -> None:
        if found.aborted is not None:
            raise CorruptImageError("image", f"cannot be repaired: {found.aborted}", file=self._storage.path)
        if found.needs_rebuild and not self._is_all:
            raise CorruptImageError(
                "refcounts", "have to be rebuilt, which '-r all' does; nothing was repaired", file=self._storage.path
            )

    @property
    def _references(self) -> References:
        references = self._found.references
        assert references is not None  # of a check that was completed
        return references

    # ---- steps

    def _begin(self) -> None:
        """Features that nobody here knows lose their promise before anything is changed."""
        header = self._file.header
        kept = header.autoclear_features & (AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW)
        if kept != header.autoclear_features:
            self._file.update_header(autoclear_features=kept)
            self._file.barrier()

    def _mend_entries(self) -> None:
        """Step 1."""
        if self._is_all and self._has("preallocated-unaligned"):
            mended = fix_l2_tables(self._file, zero_unaligned(self._file.header))
            self._corruptions_fixed += mended
            self._entries_changed(mended)
        if not self._ours:
            return
        before, header = self._found, self._file.header
        mended = fix_l1_tables(self._file, self._snapshots, clear_l1_reserved)
        mended += fix_l2_tables(self._file, clear_l2_reserved(header))
        if header.has_data_file and self._has("host-not-guest"):
            distrust_bitmaps(self._file)
            mended += fix_active_l2_tables(self._file, put_where_the_guest_is(header))
        self._entries_changed(mended)
        self._corruptions_fixed += max(_but_flags(before) - _but_flags(self._found), 0)

    def _entries_changed(self, count: int) -> None:
        if count:
            self._file.barrier()
            self._has_changed = True
            self._count_again()

    def _settle(self) -> None:
        """Steps 2 to 5."""
        if self._is_all:
            if not self._are_usable():
                self._rebuild()
            self._raise_refcounts()
            self._mend_snapshots()
        if not is_table_usable(self._file):
            return
        allocator = Allocator(self._file)
        self._lower_refcounts(allocator)
        if (self._is_all or self._nothing_but_flags()) and self._are_usable():
            self._correct_flags(allocator)

    def _raise_refcounts(self) -> None:
        """Step 2, in place."""
        if not self._are_usable():
            return
        raised = raise_refcounts(self._file, Allocator(self._file), self._references)
        self._corruptions_fixed += raised
        if raised:
            self._file.barrier()
            self._has_changed = True

    def _rebuild(self) -> None:
        """Step 2, in new structures."""
        before = self._found
        rebuild_structures(
            self._file,
            self._references,
            keeps=not before.is_complete,
            fits_inside=before.is_complete,
            grows=self._is_end_known,
        )
        self._has_changed = True
        self._count_again()
        self._corruptions_fixed += max(_but_flags(before) - _but_flags(self._found), 0)
        self._leaks_made += self._found.leaks  # the old structures
        if before.is_complete:
            self._leaks_fixed += before.leaks

    def _mend_snapshots(self) -> None:
        """Step 3."""
        broken = sum(self._found.kinds.get(kind, 0) for kind in SNAPSHOT_KINDS)
        if not broken or not self._is_room_known or not self._are_usable():
            return
        before = self._found.leaks
        write_snapshots(self._file, Allocator(self._file), self._snapshots)
        self._corruptions_fixed += broken
        self._has_changed = True
        self._count_again()
        self._leaks_made += self._found.leaks - before  # the old table

    def _lower_refcounts(self, allocator: Allocator) -> None:
        """Step 4."""
        if not self._found.leaks or not self._found.is_complete:
            return
        if any(self._has(kind) for kind in DROPPING_KINDS):
            return  # the table that names them could not be written anew
        lowered = lower_refcounts(self._file, allocator, self._references, behind=self._is_end_known)
        self._file.barrier()
        self._has_changed = True
        self._leaks_fixed += max(lowered - self._leaks_made, 0)
        self._leaks_made = 0

    def _correct_flags(self, allocator: Allocator) -> None:
        """Step 5."""
        if self._found.has_overflow and self._file.header.refcount_order == 0:
            return  # a refcount of 1 says nothing then
        references = self._references

        def are_single(clusters: Clusters) -> Mask:
            is_known = clusters < len(references)
            single: Mask = allocator.refcounts_of(clusters) == 1
            single[is_known] &= references[clusters[is_known]] == 1
            return single

        corrected = correct_flags(self._file, are_single)
        if corrected:
            self._file.barrier()
            self._has_changed = True
            self._corruptions_fixed += corrected

    def _mend_more(self) -> None:
        """What needs clusters of its own, in an image that is sound by now.

        In an encrypted image what a cluster holds may depend on where it is, so nothing is moved there.
        """
        header = self._file.header
        if header.encryption_method is not EncryptionMethod.NONE:
            return
        if not self._is_room_known or self._found.check_errors or not self._are_usable():
            return
        changed = 0
        if header.has_data_file and header.data_file_raw and self._has("raw-not-covered"):
            distrust_bitmaps(self._file)
            changed += cover_raw_disk(self._file, Allocator(self._file))
        if not header.has_data_file and self._has("guest-aliased"):
            changed += part_aliases(self._file, Allocator(self._file), len(self._references))
        if changed:
            self._has_changed = True
            self._count_again()
            fixed = self._corruptions_fixed, self._leaks_fixed
            self._settle()
            self._corruptions_fixed, self._leaks_fixed = fixed  # what is put right here was made here

    def _clear_marks(self) -> None:
        """Step 6."""
        found, header = self._found, self._file.header
        if found.aborted is not None or found.corruptions or found.check_errors:
            return
        cleared = INCOMPATIBLE_DIRTY | (0 if found.extra_corruptions else INCOMPATIBLE_CORRUPT)
        kept = header.incompatible_features & ~cleared
        if header.version > 2 and kept != header.incompatible_features:
            self._begin()
            self._file.update_header(incompatible_features=kept)
            self._file.barrier()

    # ---- questions

    def _are_usable(self) -> bool:
        """`are_usable`; with refcounts of one bit, references to a block that could not be counted count as well."""
        found = self._found
        if self._file.header.refcount_order == 0 and found.has_overflow:
            told = [finding for finding in found.findings if finding.kind == TOO_MANY_REFERENCES]
            if any(finding.structure == "refcount block" for finding in told):
                return False
            if sum(finding.count for finding in told) < found.kinds[TOO_MANY_REFERENCES]:
                return False
        return are_usable(self._file, self._references)

    def _has(self, kind: str) -> bool:
        return self._found.kinds.get(kind, 0) > 0

    def _nothing_but_flags(self) -> bool:
        return self._found.is_complete and not self._found.check_errors and not _but_flags(self._found)

    @property
    def _is_room_known(self) -> bool:
        """What nothing was found to refer to is free, inside the file and behind it."""
        return self._found.is_complete and self._is_end_known

    @property
    def _is_end_known(self) -> bool:
        """Nothing refers to a place behind the last cluster that the file has a byte of."""
        size = self._file.header.geometry.cluster_size
        return self._found.end_of_references <= -(-self._storage.size() // size) * size


def _but_flags(found: CheckResult) -> int:
    """Corruptions, wrong COPIED flags apart."""
    return found.corruptions - sum(found.kinds.get(kind, 0) for kind in _COPIED_KINDS)
