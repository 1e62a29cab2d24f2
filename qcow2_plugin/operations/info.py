"""What an image says about itself, without trusting it: `info` opens one file, `info_chain` the backing files too.

Only the header, the snapshot table, the bitmap directory and the LUKS header are read; never guest data, never a data
file. What is broken beside the header is told as a problem instead of refusing the rest, because whoever asks about a
damaged image needs the answer most. What is huge is cut: `snapshot_limit`.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass

from qcow2_plugin.engine.dirty_bitmaps.bitmaps import read_bitmaps
from qcow2_plugin.engine.files import ChainFiles
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.internal_snapshots.snapshots import read_snapshots
from qcow2_plugin.errors import Qcow2Error, about_file
from qcow2_plugin.format import names
from qcow2_plugin.format.geometry import SECTOR_SIZE
from qcow2_plugin.format.header import (
    COMPATIBLE_LAZY_REFCOUNTS,
    CompressionType,
    EncryptionMethod,
    Header,
)
from qcow2_plugin.format.luks import HEADER_LENGTH, LuksHeader
from qcow2_plugin.format.snapshots import Snapshot
from qcow2_plugin.storage import Storage
from qcow2_plugin.storage.opener import Policy, open_given

DEFAULT_SNAPSHOT_LIMIT = 4096
_LISTED_SIZE = 2 << 20
"""Bytes of a snapshot table or bitmap directory that are listed; what is behind, nobody would read."""
_COMPRESSION_NAMES = {CompressionType.DEFLATE: "zlib", CompressionType.ZSTD: "zstd"}

Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """An internal snapshot; sizes in bytes, `date_seconds` since the epoch, `icount` None if not recorded."""

    id: str
    name: str
    virtual_size: int
    vm_state_size: int
    date_seconds: int
    date_nanoseconds: int
    vm_clock_nanoseconds: int
    icount: int | None


@dataclass(frozen=True, slots=True)
class BitmapInfo:
    """A persistent dirty bitmap. `unusable` says why its bits must not be used, None if they may."""

    name: str
    granularity: int
    in_use: bool
    auto: bool
    unusable: str | None


@dataclass(frozen=True, slots=True)
class EncryptionInfo:
    """How guest data is encrypted. `luks` is None for AES, and where the LUKS header cannot be read."""

    method: str
    luks: LuksHeader | None


@dataclass(frozen=True, slots=True)
class Qcow2Info:
    """What only qcow2 images have. File names are text as `os.fsdecode` makes it of the bytes stored."""

    version: int
    cluster_size: int
    refcount_bits: int
    compression: str
    extended_l2: bool
    lazy_refcounts: bool
    dirty: bool
    corrupt: bool
    encryption: EncryptionInfo | None
    backing_file: str | None
    """As stored; `full_backing_file` is what it means from where the image is."""
    full_backing_file: str | None
    backing_format: str | None
    has_data_file: bool
    data_file: str | None
    data_file_raw: bool
    snapshots: tuple[SnapshotInfo, ...]
    snapshot_count: int
    """All of them; `snapshots` may have been cut."""
    bitmaps: tuple[BitmapInfo, ...]
    problems: tuple[str, ...]
    """What could not be read, in words that are safe to print."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """A file of a chain; sizes in bytes. `qcow2` is None for a raw file."""

    path: str
    virtual_size: int
    allocated_size: int
    """Disk space that the file takes."""
    qcow2: Qcow2Info | None


def info(path: Path, *, force_share: bool = False, snapshot_limit: int | None = DEFAULT_SNAPSHOT_LIMIT) -> ImageInfo:
    """What the qcow2 image at `path` says about itself; no other file is opened, whatever it names.

    `force_share` looks although another program may be writing. `snapshot_limit` None lists all snapshots.

    Raises NotQcow2Error, UnsupportedFeatureError, CorruptImageError (header), ImageLockedError; OSError.
    """
    storage = open_given(path, force_share=force_share)
    with ExitStack() as resources:
        resources.callback(storage.close)
        return _qcow2_info(storage, _known_header(storage), os.fspath(path), snapshot_limit)


def info_chain(
    path: Path,
    *,
    policy: Policy = Policy.CONFINED,
    backing_file: Path | None = None,
    backing_format: str | None = None,
    base_directory: Path | None = None,
    force_share: bool = False,
    snapshot_limit: int | None = DEFAULT_SNAPSHOT_LIMIT,
) -> list[ImageInfo]:
    """`info` of the image at `path` and of every backing file below it, top first. Data files are not opened.

    `policy`, `backing_file`, `backing_format` and `base_directory` are as for `open_image`.

    Raises what `info` does; ReferenceDeniedError, MissingReferenceError.
    """
    told_path = os.fspath(path)
    infos: list[ImageInfo] = []
    with ExitStack() as resources:
        files = ChainFiles(
            resources,
            policy=policy,
            base_directory=base_directory,
            backing_format=backing_format,
            force_share=force_share,
        )
        storage: Storage = files.open_top(path)
        while True:
            header = _known_header(storage)
            infos.append(_qcow2_info(storage, header, told_path, snapshot_limit))
            below = files.open_backing_file(header, storage, backing_file)
            if below is None:
                return infos
            if backing_file is not None:
                told_path = os.fspath(backing_file)
            else:
                told_path = _full_name(header.backing_file, told_path) or told_path
            storage, found_format = below
            if found_format == "raw":
                return [*infos, _raw_info(storage, told_path)]
            backing_file = None


def _raw_info(storage: Storage, path: str) -> ImageInfo:
    virtual_size = -(-storage.size() // SECTOR_SIZE) * SECTOR_SIZE
    return ImageInfo(path, virtual_size, storage.allocated_size(), None)


def _known_header(storage: Storage) -> Header:
    header = read_header(storage)
    with about_file(storage.path):
        header.require_known_features()
    return header


def _qcow2_info(storage: Storage, header: Header, path: str, snapshot_limit: int | None) -> ImageInfo:
    problems: list[str] = []
    qcow2 = Qcow2Info(
        version=header.version,
        cluster_size=header.geometry.cluster_size,
        refcount_bits=header.refcount_bits,
        compression=_COMPRESSION_NAMES[header.compression_type],
        extended_l2=header.extended_l2,
        lazy_refcounts=bool(header.compatible_features & COMPATIBLE_LAZY_REFCOUNTS),
        dirty=header.dirty,
        corrupt=header.corrupt,
        encryption=_encryption(storage, header, problems),
        backing_file=_text(header.backing_file),
        full_backing_file=_full_name(header.backing_file, path),
        backing_format=_text(header.backing_format),
        has_data_file=header.has_data_file,
        data_file=_text(header.data_file),
        data_file_raw=header.data_file_raw,
        snapshots=_snapshots(storage, header, snapshot_limit, problems),
        snapshot_count=header.snapshot_count,
        bitmaps=_bitmaps(storage, header, problems),
        problems=tuple(problems),
    )
    return ImageInfo(path, header.virtual_size, storage.allocated_size(), qcow2)


def _encryption(storage: Storage, header: Header, problems: list[str]) -> EncryptionInfo | None:
    if header.encryption_method is EncryptionMethod.NONE:
        return None
    pointer = header.encryption
    luks = None
    if pointer is not None:
        try:
            luks = LuksHeader.parse(storage.pread(min(pointer.length, HEADER_LENGTH), pointer.offset))
        except Qcow2Error as error:
            problems.append(f"the LUKS header cannot be read: {error}")
    return EncryptionInfo(header.encryption_method.name.lower(), luks)


def _snapshots(storage: Storage, header: Header, limit: int | None, problems: list[str]) -> tuple[SnapshotInfo, ...]:
    try:
        found = read_snapshots(storage, header, limit, None if limit is None else _LISTED_SIZE)
    except Qcow2Error as error:
        problems.append(f"the snapshots cannot be read: {error.detail}")
        return ()
    return tuple(snapshot_info(snapshot, header) for snapshot in found)


def snapshot_info(snapshot: Snapshot, header: Header) -> SnapshotInfo:
    """A snapshot of the image with this header, for people."""
    return SnapshotInfo(
        names.to_text(snapshot.id),
        names.to_text(snapshot.name),
        snapshot.virtual_size(header.virtual_size),
        snapshot.vm_state_size,
        snapshot.date_seconds,
        snapshot.date_nanoseconds,
        snapshot.vm_clock_nanoseconds,
        snapshot.icount,
    )


def _bitmaps(storage: Storage, header: Header, problems: list[str]) -> tuple[BitmapInfo, ...]:
    try:
        pointer = header.bitmaps
        if pointer is not None and pointer.directory_size > _LISTED_SIZE:
            problems.append(f"the bitmaps are not listed: their directory has {pointer.directory_size} bytes")
            return ()
        found = read_bitmaps(storage, header)
    except Qcow2Error as error:
        problems.append(f"the bitmaps cannot be read: {error.detail}")
        return ()
    cluster_size = header.geometry.cluster_size
    return tuple(
        BitmapInfo(
            names.to_text(bitmap.name),
            bitmap.granularity,
            bitmap.in_use,
            bitmap.auto,
            bitmap.unusable_reason(header.virtual_size, cluster_size),
        )
        for bitmap in found
    )


def _text(name: bytes | None) -> str | None:
    return None if name is None else os.fsdecode(name)


def _full_name(name: bytes | None, path: str) -> str | None:
    """The backing file's name as seen from where the caller is; names with a driver prefix stand alone."""
    if name is None:
        return None
    if b":" in name.partition(b"/")[0]:
        return os.fsdecode(name)
    return os.path.join(os.path.dirname(path), os.fsdecode(name))
