"""Refcounts from the tables: what they have to be, and putting an image right whose refcounts are stale.

An image with lazy refcounts that was not closed is dirty: its L1 and L2 tables are right, its refcounts and COPIED
flags may not be. Nothing may be allocated or overwritten in it before they are.

`rebuild_refcounts` counts, writes refcounts that differ, then L1 and L2 entries whose COPIED flag differs, and after a
barrier clears the dirty bit. Until then the image is dirty: whatever of this a crash leaves behind, nobody believes a
refcount or a flag in it, and the next writer begins anew. So the order inside does not matter, and every step may be
done twice. A refcount block that is missing is added; it becomes a reference itself, and is counted the next time.

Nothing changes before everything was counted: an image in which something refers to a place past the end of the file,
or to one cluster more often than a refcount can say, is left as it was.

Source: docs/interop/qcow2.rst, "Header" (the dirty bit), "Host cluster management".
"""

from __future__ import annotations

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.checking.check import check_image
from qcow2_plugin.engine.checking.findings import TOO_MANY_REFERENCES, CheckResult
from qcow2_plugin.engine.checking.inspection import BEYOND_END
from qcow2_plugin.engine.image_file import Clusters, ImageFile
from qcow2_plugin.engine.repairing.repair_entries import Mask, correct_flags
from qcow2_plugin.engine.repairing.repair_refcounts import References, set_refcounts
from qcow2_plugin.errors import CorruptImageError, TruncatedImageError
from qcow2_plugin.format.header import INCOMPATIBLE_DIRTY, Header
from qcow2_plugin.storage import Storage


def rebuild_refcounts(file: ImageFile, allocator: Allocator) -> None:
    """Make refcounts and COPIED flags those that follow from the tables, and clear the dirty bit, durably.

    Tables that were read before may have other flags than those on disk now. Raises CorruptImageError,
    TruncatedImageError, UnsupportedFeatureError; OSError. Lock: the image's; no write-back may be running.
    """
    header = file.header
    references = count_references(file.storage, header)
    set_refcounts(file, allocator, references)
    correct_flags(file, lambda clusters: _are_single(references, clusters))
    file.barrier()
    file.update_header(incompatible_features=header.incompatible_features & ~INCOMPATIBLE_DIRTY)
    file.barrier()


def count_references(storage: Storage, header: Header) -> References:
    """How often every cluster of the image file is referred to.

    Memory: that of a check. Raises CorruptImageError if a table cannot be followed or a cluster is referred to more
    often than a refcount can say, TruncatedImageError if something refers to a place past the end of the file,
    UnsupportedFeatureError if the file is too large; OSError.
    """
    found = check_image(storage, header, max_findings=1)
    for finding in found.findings:
        if finding.kind in (BEYOND_END, TOO_MANY_REFERENCES):
            error = TruncatedImageError if finding.kind == BEYOND_END else CorruptImageError
            raise error(finding.structure, finding.detail, host_offset=finding.host_offset, file=storage.path)
    if found.tables_not_alone is not None and found.tables_not_alone.size:
        place = int(found.tables_not_alone[0]) << header.cluster_bits
        raise CorruptImageError("L2 table", "is where something else is, too", host_offset=place, file=storage.path)
    if found.references is None or not found.is_complete:
        raise CorruptImageError("image", f"cannot be counted through: {_reason(found)}", file=storage.path)
    return found.references


def _reason(found: CheckResult) -> str:
    return found.aborted or next((finding.detail for finding in found.findings), "a table cannot be read")


def _are_single(references: References, clusters: Clusters) -> Mask:
    single: Mask = references[clusters] == 1
    return single
