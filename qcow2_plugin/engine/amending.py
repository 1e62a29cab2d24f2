"""Another version, other features, other names for an image that is open for writing.

What can be known before is asked before: an amendment that is refused has changed nothing. Then come the steps, in the
order of QEMU: upgrade, width of refcounts, header (raw data file, its name, lazy refcounts), size, downgrade. Each is
whole after a crash, or has not happened, or is on its way and the image as valid as before; the same amendment once
more goes on from there.

**Upgrade.** The snapshot table is written anew, so that every snapshot records its size; then the header is switched.
**Downgrade.** First nothing is left in any table that version 2 does not know (`zero_expansion`), which changes nothing
for anybody; then the header is switched. In both cases the tables mean the same by the rules before and after.
**Raw data file.** The promise is made only when every entry says data, durably, and the data file shows what the guest
sees: where an entry says zero, the file was looked at and holds zeros.

We keep refcounts exact, whatever the header allows; "lazy" is what the next program may be.

**Lock.** Taken here. Whoever calls must neither be in flight nor in a change (see `requests`).

Source: docs/interop/qcow2.rst, "Header", "Snapshots".
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from qcow2_plugin.engine.data_file_proof import first_byte
from qcow2_plugin.engine.dirty_bitmaps.bitmaps import read_bitmaps
from qcow2_plugin.engine.image_file import Structure
from qcow2_plugin.engine.internal_snapshots.snapshots import read_snapshots
from qcow2_plugin.engine.refcount_width import change_refcount_width, require_fitting
from qcow2_plugin.engine.resizing import require_resizable
from qcow2_plugin.engine.standing_still import at_rest
from qcow2_plugin.engine.writeback import write_refcounts_now
from qcow2_plugin.engine.zero_expansion import expand_zero_clusters, has_compressed_clusters
from qcow2_plugin.errors import AmendError, printable
from qcow2_plugin.extent import ExtentKind
from qcow2_plugin.format.geometry import MAX_NAME_LENGTH, MAX_SNAPSHOT_TABLE_SIZE
from qcow2_plugin.format.header import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPATIBLE_LAZY_REFCOUNTS,
    EXTENSION_BITMAPS,
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_NAMES,
    NEW_HEADER_LENGTH,
    V2_HEADER_LENGTH,
    V3_HEADER_LENGTH,
    CompressionType,
    Header,
)
from qcow2_plugin.format.snapshots import Snapshot, pack_table

if TYPE_CHECKING:
    from qcow2_plugin.engine.checking.findings import Progress
    from qcow2_plugin.engine.writable import WritableImage

_REFCOUNT_WIDTHS = (1, 2, 4, 8, 16, 32, 64)
_V2_REFCOUNT_BITS = 16
_MAX_V2_STATE_SIZE = (1 << 32) - 1


class Amendment(NamedTuple):
    """What is to become of an image; None leaves it as it is. An empty `data_file` drops the name."""

    version: int | None = None
    refcount_bits: int | None = None
    data_file_raw: bool | None = None
    data_file: bytes | None = None
    lazy_refcounts: bool | None = None
    size: int | None = None
    allow_shrink: bool = False


def amend(image: WritableImage, wanted: Amendment, progress: Progress | None = None) -> None:
    """Carry out an amendment, durably.

    Raises AmendError, ResizeError before anything changes; HeaderFullError, CorruptImageError, TruncatedImageError,
    FailedImageError, OSError, and AmendError if others change the image meanwhile; then some steps may have been taken.
    """
    with at_rest(image):
        _require_possible(image, wanted)
        if wanted.version == 3 and image.header.version < 3:
            _upgrade(image)
        if wanted.refcount_bits not in (None, image.header.refcount_bits):
            change_refcount_width(image, wanted.refcount_bits, progress)
            image.write_back.run_alone()
        _change_header(image, wanted)
    if wanted.data_file_raw and not image.header.data_file_raw:
        _make_raw(image)
    if wanted.size is not None:
        image.resize(wanted.size, allow_shrink=wanted.allow_shrink)
    if wanted.version == 2 and image.header.version > 2:
        with at_rest(image):
            _require_possible(image, Amendment(version=2))  # others may have amended it since
            _downgrade(image, progress)


# -- what is refused --


def _require_possible(image: WritableImage, wanted: Amendment) -> None:
    header = image.header
    version = wanted.version or header.version
    refcount_bits = wanted.refcount_bits or header.refcount_bits
    detail = None
    if wanted.refcount_bits is not None and wanted.refcount_bits not in _REFCOUNT_WIDTHS:
        detail = f"refcounts have 1, 2, 4, 8, 16, 32 or 64 bits, not {wanted.refcount_bits}"
    elif version < 3 and refcount_bits != _V2_REFCOUNT_BITS:
        detail = f"compat=0.10 has refcounts of 16 bits only (refcount_bits=16), not {refcount_bits}"
    elif version < 3 and wanted.lazy_refcounts:
        detail = "lazy_refcounts needs compat=1.1"
    elif wanted.data_file is not None:
        detail = _problem_with_name(header, wanted.data_file)
    if wanted.size is not None and wanted.size <= 0:
        detail = f"nothing would be left of the disk of {image.virtual_size} bytes; take a size of more than 0"
    if detail is None and wanted.data_file_raw and not header.data_file_raw:
        detail = _problem_with_raw(image)
    if detail is not None:
        raise AmendError(detail, file=image.layer.storage.path)
    size = image.virtual_size
    if wanted.size is not None:
        size = require_resizable(image, wanted.size, allow_shrink=wanted.allow_shrink, version=version)
    require_fitting(image, refcount_bits)
    if version < header.version:
        _require_downgradable(image, size)


def _problem_with_name(header: Header, name: bytes) -> str | None:
    if not header.has_data_file:
        return "data_file is for images that have an external data file"
    if b"\0" in name or len(name) > MAX_NAME_LENGTH:
        return f'"{printable(name)}" is no name for a data_file'
    return None


def _problem_with_raw(image: WritableImage) -> str | None:
    if not image.header.has_data_file:
        return "data_file_raw is for images that have an external data file"
    if image.header.backing_file is not None or image.layer.backing is not None:
        return "data_file_raw and a backing file exclude each other"
    return None


def _require_downgradable(image: WritableImage, size: int) -> None:
    """Raises AmendError with the first reason why version 2 cannot be; CorruptImageError, TruncatedImageError,
    OSError."""
    header = image.header
    snapshots = read_snapshots(image.file.storage, header)
    detail = None
    if header.has_data_file:
        detail = "external data file"
    elif header.extended_l2:
        detail = "extended L2 entries"
    elif any(header.additional_fields):
        detail = "header fields that are not known here"
    elif read_bitmaps(image.file.storage, header):
        detail = "dirty bitmaps (remove them first)"
    elif any(snapshot.virtual_size(size) != size for snapshot in snapshots):
        detail = "internal snapshots of a disk of another size"
    elif any(snapshot.vm_state_size > _MAX_V2_STATE_SIZE for snapshot in snapshots):
        detail = "internal snapshots with a VM state of 4 GiB or more"
    elif header.compression_type is not CompressionType.DEFLATE and has_compressed_clusters(image):
        detail = "clusters compressed with zstd"
    if detail is not None:
        raise AmendError(f"compat=0.10 cannot be: it has no {detail}", file=image.layer.storage.path)


# -- the version --


def _upgrade(image: WritableImage) -> None:
    known = read_snapshots(image.file.storage, image.header)
    if any(len(snapshot.extra) < _EXTRA_SIZE for snapshot in known):
        _record_sizes(image, known)
    upgraded = replace(
        image.header,
        version=3,
        header_length=NEW_HEADER_LENGTH,
        additional_fields=bytes(NEW_HEADER_LENGTH - V3_HEADER_LENGTH - 1),
    )
    _switch(image, upgraded.with_extension(EXTENSION_FEATURE_NAMES, upgraded.usual_feature_names))


_EXTRA_SIZE = 16
"""Bytes of extra data of a snapshot with the size of its VM state and of its disk."""


def _record_sizes(image: WritableImage, known: list[Snapshot]) -> None:
    """Let every snapshot say how large its disk is: as large as the disk is now, since it could not be resized."""
    header = image.header
    table = pack_table(_with_size(snapshot, header.virtual_size) for snapshot in known)
    if len(table) > MAX_SNAPSHOT_TABLE_SIZE:
        raise AmendError(
            "compat=1.1 cannot be: the snapshots leave no room for their sizes; delete some first",
            file=image.layer.storage.path,
        )
    place = image.allocator.allocate_table(Structure.SNAPSHOT_TABLE, len(table))
    try:
        image.file.write(Structure.SNAPSHOT_TABLE, table, place)
        write_refcounts_now(image.file, image.allocator)
        image.file.barrier()
        image.file.update_header(snapshots_offset=place)
    except BaseException:
        image.allocator.release_table(place, len(table))
        raise
    image.file.barrier()
    old_clusters = -(-len(pack_table(known)) // image.cluster_size)
    image.allocator.retire_table(header.snapshots_offset >> header.cluster_bits, old_clusters)
    image.write_back.run_alone()


def _with_size(snapshot: Snapshot, virtual_size: int) -> Snapshot:
    sizes = snapshot.vm_state_size.to_bytes(8, "big") + virtual_size.to_bytes(8, "big")
    return replace(snapshot, extra=snapshot.extra if len(snapshot.extra) >= _EXTRA_SIZE else sizes)


def _downgrade(image: WritableImage, progress: Progress | None) -> None:
    expand_zero_clusters(image, progress)
    downgraded = replace(
        image.header,
        version=2,
        header_length=V2_HEADER_LENGTH,
        additional_fields=b"",
        incompatible_features=0,
        compatible_features=0,
        autoclear_features=0,
        compression_type=CompressionType.DEFLATE,
    )
    _switch(image, downgraded.with_extension(EXTENSION_FEATURE_NAMES, None))


def _switch(image: WritableImage, header: Header) -> None:
    """Another version; what the old one says of bitmaps holds no longer, or never did."""
    header = header.with_extension(EXTENSION_BITMAPS, None)
    names = ("version", "header_length", "additional_fields", "incompatible_features", "compatible_features")
    more_names = ("autoclear_features", "compression_type", "extensions")
    _change(image, **{name: getattr(header, name) for name in (*names, *more_names)})


def _change(image: WritableImage, **fields: Any) -> None:
    """Change the header, durably, and let the open image go by what is in force, whatever happens."""
    try:
        image.file.update_header(**fields)
    finally:
        image.layer = replace(image.layer, header=image.header)
        image.tables.follow_header(image.header)
        image.written.follow_tables()
    image.file.barrier()


# -- features and names --


def _change_header(image: WritableImage, wanted: Amendment) -> None:
    header = image.header
    compatible, autoclear = header.compatible_features, header.autoclear_features
    if wanted.lazy_refcounts is not None:
        compatible &= ~COMPATIBLE_LAZY_REFCOUNTS
        compatible |= COMPATIBLE_LAZY_REFCOUNTS if wanted.lazy_refcounts else 0
    if wanted.data_file_raw is False:
        autoclear &= ~AUTOCLEAR_DATA_FILE_RAW
    if wanted.data_file is not None:
        header = header.with_extension(EXTENSION_DATA_FILE, wanted.data_file or None)
    before = (image.header.compatible_features, image.header.autoclear_features, image.header.extensions)
    if (compatible, autoclear, header.extensions) == before:
        return
    _change(image, compatible_features=compatible, autoclear_features=autoclear, extensions=header.extensions)


# -- a raw data file --


def _make_raw(image: WritableImage) -> None:
    """Promise that the data file is a raw image of the disk. Raises AmendError if it is none."""
    silent = _require_equal(image)
    for start in silent:
        with image.requests.changing():
            if start < image.virtual_size:  # it may have been cut since
                image.say_data(start)
    with at_rest(image):
        if any(extent.kind is not ExtentKind.DATA for extent in image.written.runs(0, image.virtual_size)):
            raise AmendError("the disk has changed meanwhile; try again", file=image.layer.storage.path)
        if image.data.size() < image.virtual_size:
            image.data.truncate(image.virtual_size)
        image.file.barrier(image.data)
        _change(image, autoclear_features=image.header.autoclear_features | AUTOCLEAR_DATA_FILE_RAW)


def _require_equal(image: WritableImage) -> list[int]:
    """Where slices begin with entries that do not say data. Raises AmendError where the data file holds anything but
    zeros there."""
    coverage = image.written.slice_coverage
    silent: set[int] = set()
    for extent in image.extents(whole_chain=False):
        if extent.kind is ExtentKind.DATA:
            continue
        end = extent.guest_offset + extent.length
        _require_zeros(image, extent.guest_offset, extent.length)
        silent.update(range(extent.guest_offset & -coverage, end, coverage))
    return sorted(silent)


def _require_zeros(image: WritableImage, offset: int, length: int) -> None:
    found = first_byte(image.data, offset, length)
    if found is not None:
        raise AmendError(
            f"data_file_raw cannot be: at guest offset {found:#x} the disk reads as zeros, and the data file holds "
            "something else",
            file=image.data.path,
        )
