"""Opening an image with everything below it: header, data file, backing chain.

A chain is opened from the top down, one layer at a time (`files`), and built from the bottom up. Each file is locked
when it is opened and its header is read only after that, so no header can change in between. Opening changes no byte,
not even for writing, and an image that must not be written to is refused; but where a transaction was interrupted, the
header of an image to be written is brought to where the transaction's record has it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from qcow2_plugin.engine.dirty_bitmaps import unfinished
from qcow2_plugin.engine.files import ChainFiles, References
from qcow2_plugin.engine.header import read_header, refusals
from qcow2_plugin.engine.image import Image, Layer
from qcow2_plugin.engine.internal_snapshots.snapshots import check_l1_table, find, read_snapshots
from qcow2_plugin.engine.layout import check_complete, check_tables
from qcow2_plugin.engine.raw import RawDisk
from qcow2_plugin.engine.unopened import UnopenedDisk
from qcow2_plugin.errors import CorruptImageError, ReadOnlyImageError, UnfinishedTransactionError, about_file
from qcow2_plugin.extent import GuestDisk
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.snapshots import Snapshot
from qcow2_plugin.storage import Storage
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import Policy

DEFAULT_CACHE_SIZE = 32 << 20
"""Bytes."""

Path = str | os.PathLike[str]


class _OpenedLayer(NamedTuple):
    header: Header
    storage: Storage
    data: Storage


def open_image(
    path: Path,
    *,
    writable: bool = False,
    policy: Policy = Policy.CONFINED,
    snapshot: str | bytes | None = None,
    data_file: Path | None = None,
    backing_file: Path | None = None,
    backing_format: str | None = None,
    base_directory: Path | None = None,
    allow_damaged: bool = False,
    force_share: bool = False,
    cache_size: int = DEFAULT_CACHE_SIZE,
    references: References | None = None,
) -> Image:
    """Open a qcow2 image with its data file and backing chain, for reading or, if `writable`, for writing as well.

    To be written, the image must be sound, neither it nor its data file may be in use by anybody else, and none of
    `snapshot`, `allow_damaged` and `force_share` may be asked for. Backing files are never written.

    `policy` decides which of the files that the image names are opened; `data_file` and `backing_file` name them
    instead. `backing_format` ("qcow2" or "raw") is for backing files whose format is not recorded. Relative names in
    the image start at `base_directory`, by default the directory of the image. `snapshot` (ID or else name) opens the
    disk as an internal snapshot keeps it. `allow_damaged` reads what a truncated file lacks as zeros instead of
    refusing it. `force_share` reads although another program may write to the files. `cache_size` in bytes bounds
    the tables kept in memory, over the whole chain; decompressed clusters may take a quarter as much beside it.
    `references` are asked about the names in images, too (plugins know more than a policy).

    Raises any Qcow2Error; OSError of the files. After an error no file is left open.
    """
    if writable:
        _refuse_options(path, snapshot=snapshot is not None, allow_damaged=allow_damaged, force_share=force_share)
    with ExitStack() as resources:
        files = ChainFiles(
            resources,
            policy=policy,
            writable=writable,
            base_directory=base_directory,
            backing_format=backing_format,
            force_share=force_share,
            references=references,
        )
        opened, bottom = _open_layers(
            files, path, data_file, backing_file, writable=writable, allow_damaged=allow_damaged
        )
        layers = [Layer(*each, None, cache_size // len(opened), allow_damaged) for each in opened]
        disk: GuestDisk | None = bottom
        for layer in layers[:0:-1]:
            disk = Image(replace(layer, backing=disk), ExitStack())
        top = replace(layers[0], backing=disk)
        kept = ExitStack()
        image = _writable_image(top, kept) if writable else Image(top, kept, _snapshot_of(top, snapshot))
        kept.push(resources.pop_all())  # not before there is an image to close them
        return image


def open_alone(
    path: Path,
    *,
    writable: bool = False,
    policy: Policy = Policy.CONFINED,
    data_file: Path | None = None,
    base_directory: Path | None = None,
    cache_size: int = DEFAULT_CACHE_SIZE,
    references: References | None = None,
) -> Image:
    """`open_image` without what is below: for looks at the structures of an image, and changes of them.

    Backing files need not be there, and are not looked for. What of the disk is in one can neither be read nor written
    to: MissingReferenceError. The options are those of `open_image`. Raises what it does, but for backing files.
    """
    with ExitStack() as resources:
        files = ChainFiles(
            resources, policy=policy, writable=writable, base_directory=base_directory, references=references
        )
        storage = files.open_top(path)
        header = _settled(_read_sound_header(storage, allow_damaged=False), storage, files, writable=writable)
        data = files.open_data_file(header, storage, data_file) or storage
        backing = None if header.backing_file is None else UnopenedDisk(storage.path)
        layer = Layer(header, storage, data, backing, cache_size, False)
        kept = ExitStack()
        image = _writable_image(layer, kept) if writable else Image(layer, kept)
        kept.push(resources.pop_all())
        return image


def _snapshot_of(layer: Layer, wanted: str | bytes | None) -> Snapshot | None:
    if wanted is None:
        return None
    found = find(read_snapshots(layer.storage, layer.header), wanted, layer.storage.path)
    check_l1_table(found, layer.storage, layer.header, allow_damaged=layer.allow_damaged)
    return found


def _writable_image(layer: Layer, resources: ExitStack) -> Image:
    from qcow2_plugin.engine.writable import WritableImage  # who only reads need not wait for it

    return WritableImage(layer, resources)


def check_writable(header: Header, storage: Storage) -> None:
    """Raises unless the image with this header, which can be read, may be written to as well.

    Raises ReadOnlyImageError with what to do instead; CorruptImageError or TruncatedImageError unless each table that
    the header names has a place of its own in the file.
    """
    if header.corrupt:
        raise ReadOnlyImageError(
            "the image is marked as corrupt and not written to; repair it first with 'qcow2 check -r all'",
            file=storage.path,
        )
    if header.data_file_raw and header.backing_file is not None:
        raise ReadOnlyImageError(
            "the image has a backing file, and a data file that is to hold the whole disk (raw data file bit), which "
            "cannot both be; it is not written to; copy it to a new image with 'qemu-img convert'",
            file=storage.path,
        )
    check_tables(header, storage, with_bitmaps=True)


def _refuse_options(path: Path, **asked: bool) -> None:
    """Raises ReadOnlyImageError if an option is asked for that is for reading only."""
    reasons = {
        "snapshot": "an internal snapshot never changes; open it for reading, or the active disk for writing",
        "allow_damaged": "what is missing of it must not be written over; open it for reading, or repair it first",
        "force_share": "two programs that write to an image destroy it; stop the other one, or open it for reading",
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise ReadOnlyImageError(f"{option} is for reading only: {reasons[option]}", file=os.fspath(path))


def open_below(files: ChainFiles, header: Header, storage: Storage, backing_file: Path | None = None) -> GuestDisk:
    """The disk below the top image of `files`, which has this `header` with a backing file; read-only.

    It is good as long as `files` keeps its files open. `backing_file` is opened instead of what the header names.
    Raises as `open_image` does about what is below.
    """
    layers, disk = _open_layers_below(files, header, storage, backing_file, allow_damaged=False)
    below: GuestDisk | None = disk
    for layer in reversed(layers):
        below = Image(Layer(*layer, below, DEFAULT_CACHE_SIZE // len(layers), False), ExitStack())
    assert below is not None, "the header has a backing file"
    return below


def _open_layers(
    files: ChainFiles,
    path: Path,
    data_file: Path | None,
    backing_file: Path | None,
    *,
    writable: bool,
    allow_damaged: bool,
) -> tuple[list[_OpenedLayer], RawDisk | None]:
    """The qcow2 layers from the top down, and the raw disk below them if there is one.

    `data_file` and `backing_file` are those of the top image.
    """
    storage = files.open_top(path)
    header = _read_sound_header(storage, allow_damaged=allow_damaged)
    header = _settled(header, storage, files, writable=writable)
    data = files.open_data_file(header, storage, data_file)
    below, bottom = _open_layers_below(files, header, storage, backing_file, allow_damaged=allow_damaged)
    return [_OpenedLayer(header, storage, data or storage), *below], bottom


def _open_layers_below(
    files: ChainFiles, header: Header, storage: Storage, backing_file: Path | None, *, allow_damaged: bool
) -> tuple[list[_OpenedLayer], RawDisk | None]:
    """`_open_layers` without the top image, which has `header`; `backing_file` is its."""
    layers: list[_OpenedLayer] = []
    below = files.open_backing_file(header, storage, backing_file)
    while below is not None:
        storage, backing_format = below
        if backing_format == "raw":
            return layers, RawDisk(storage)
        header = _read_sound_header(storage, allow_damaged=allow_damaged)
        data = files.open_data_file(header, storage)
        layers.append(_OpenedLayer(header, storage, data or storage))
        below = files.open_backing_file(header, storage)
    return layers, None


def _settled(header: Header, storage: FileStorage, files: ChainFiles, *, writable: bool) -> Header:
    """The header of the top image, which may be in the middle of a transaction, and as `check_writable` wants it."""
    settled = header
    try:
        settled = unfinished.look_up(header, lambda name: files.read_record(name, storage), storage.path)
    except (UnfinishedTransactionError, CorruptImageError):
        if writable:
            raise  # to readers of the disk, bitmaps in doubt are no trouble until they ask for them
    if writable:
        check_writable(settled, storage)
        if settled is not header:
            unfinished.store(storage, header, settled)
            return read_header(storage)
    return settled


def _read_sound_header(storage: Storage, *, allow_damaged: bool) -> Header:
    """The header of an image whose guest data can be read."""
    header = read_header(storage)
    require_readable(header, storage, allow_damaged=allow_damaged)
    return header


def require_readable(header: Header, storage: Storage, *, allow_damaged: bool = False) -> None:
    """Raises what speaks against reading guest data of the image in `storage`, which has this header; OSError."""
    with about_file(storage.path):
        for refusal in refusals(header):
            raise refusal
    if not allow_damaged:
        check_tables(header, storage)
        check_complete(header, storage)
