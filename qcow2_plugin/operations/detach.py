"""Detaching a data file: proof that it is all of the disk by itself, and only then no image any more.

**Proof.** The guest's view and the data file are compared by what the books say of them (`engine.data_file_proof`),
whether or not the raw bit promises anything: nobody may have changed one without the other who does not know the bit.
Nobody else uses either file meanwhile: both are locked as a writer's.

**Order.** Barrier of the data file, so that the system is sure of its holes > the proof > the data file gets the length
of the disk > its barrier, and that of its directory > the name of the image goes, if it still is that image's > barrier
of the directory. Whenever the power fails, there is the image, still right, or the data file alone, which is the disk.
Before the name goes, an error leaves the image as it was.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from qcow2_plugin.engine.chain import open_alone
from qcow2_plugin.engine.data_file_proof import Progress, first_byte, first_hidden
from qcow2_plugin.engine.image import Image
from qcow2_plugin.errors import DetachError, printable
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.transaction import is_marked
from qcow2_plugin.storage.directory import absolute_path, identity_of, make_names_durable, remove
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import Policy

Path = str | os.PathLike[str]


class Detached(NamedTuple):
    """What was proved and, unless it was for the proof alone, done. Sizes in bytes."""

    data_file: str
    """Its path; a raw image of the disk."""
    virtual_size: int
    found_size: int
    """Length of the data file before; now it is the disk's, unless it is a block device."""
    is_device: bool
    lost_bitmaps: int
    """How many dirty bitmaps go with the image."""


def detach(
    path: Path,
    *,
    dry_run: bool = False,
    lose_bitmaps: bool = False,
    policy: Policy = Policy.CONFINED,
    data_file: Path | None = None,
    base_directory: Path | None = None,
    progress: Progress | None = None,
) -> Detached:
    """Remove the image at `path`, once its external data file is proved to be the whole disk, as a raw image.

    The data file becomes exactly as long as the disk: longer if it is shorter, and shorter by what QEMU leaves behind
    the end, less than a cluster of zeros. Dirty bitmaps of the image are lost, so `lose_bitmaps` has to say that.
    `dry_run` only proves, with a reader's locks, and changes nothing. `progress` is told (done, total) now and then.
    The other options are those of `open_image`. Overlays that have the image as their backing file are not known here;
    the data file, format raw, can take its place (see `relocate`).

    Raises DetachError with what speaks against it; what `open_image` does; OSError. Then the image is there.
    """
    with open_alone(
        path, writable=not dry_run, policy=policy, data_file=data_file, base_directory=base_directory
    ) as image:
        storage, data = image.layer.storage, image.layer.data
        assert isinstance(data, FileStorage)
        reason = _reason_to_stay(image.header, lose_bitmaps=lose_bitmaps) or _problem_with_name(path)
        if reason is None:
            data.barrier()  # so that the system is sure of what are holes
            reason = _problem_with_content(image, progress)
        is_device = stat.S_ISBLK(data.mode())
        found_size = data.size()
        reason = reason or _problem_with_length(image, data, is_device=is_device)
        if reason is not None:
            raise DetachError(reason, file=storage.path)
        if not dry_run:
            _let_go(path, image, data, is_device=is_device)
        count = 0 if image.header.bitmaps is None else image.header.bitmaps.bitmap_count
        return Detached(absolute_path(data.path), image.virtual_size, found_size, is_device, count)


def _reason_to_stay(header: Header, *, lose_bitmaps: bool) -> str | None:
    """What of the header speaks against living without the image."""
    if not header.has_data_file:
        return "the image has no external data file, it keeps the disk itself; use 'qcow2 export' for a raw copy"
    if header.corrupt:
        return "the image is marked as corrupt; repair it first with 'qcow2 check -r all'"
    if header.backing_file is not None:
        return (
            f"part of the disk may be in the backing file \"{printable(header.backing_file)}\"; use 'qcow2 export' for "
            "a raw copy"
        )
    if is_marked(header):
        return "a change of the bitmaps of several images was interrupted; finish it first with 'qcow2 bitmap recover'"
    if header.snapshot_count:
        return "the image has internal snapshots, which would be lost; delete them first"
    if header.bitmaps is not None and header.bitmaps.bitmap_count and not lose_bitmaps:
        return (
            f"the image has {header.bitmaps.bitmap_count} dirty bitmaps, which would be lost, so that the next backup "
            "is a full one; say that they may be (lose_bitmaps, --lose-bitmaps), or leave the image"
        )
    return None


def _problem_with_name(path: Path) -> str | None:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        return "the image is in a block device, which cannot be removed; the data file was not looked at"
    if status.st_nlink > 1:
        return "the image has another name (hard link), by which it would stay and grow stale; remove that first"
    return None


def _problem_with_content(image: Image, progress: Progress | None) -> str | None:
    hidden = first_hidden(image, progress)
    if hidden is None:
        return None
    return (
        f"the data file is not the disk: at guest offset {hidden:#x} the disk reads as zeros, and the data file holds "
        "something else; use 'qcow2 export' for a raw copy"
    )


def _problem_with_length(image: Image, data: FileStorage, *, is_device: bool) -> str | None:
    size, disk_size = data.size(), image.virtual_size
    if size == disk_size or (size > disk_size and is_device):
        return None
    if size < disk_size:
        return f"the block device has {size} bytes only, and the disk {disk_size}" if is_device else None
    cluster_size = image.header.geometry.cluster_size
    if size > -(-disk_size // cluster_size) * cluster_size:
        return (
            f"the data file has {size} bytes, the disk only {disk_size}, and nobody knows what the rest is for; resize "
            "the disk, or cut the file, first"
        )
    found = first_byte(data, disk_size, size - disk_size)
    if found is not None:
        return (
            f"the data file has {size} bytes, the disk only {disk_size}, and behind its end, at {found:#x}, the file "
            "holds something; cut it first if that can go"
        )
    return None


def _let_go(path: Path, image: Image, data: FileStorage, *, is_device: bool) -> None:
    """Make the data file the disk, durably, and remove the image. Raises DetachError, OSError."""
    name, identity = os.path.realpath(path), image.layer.storage.identity
    if not is_device and data.size() != image.virtual_size:
        data.truncate(image.virtual_size)
    data.barrier()
    if identity_of(data.path) != data.identity:
        raise DetachError(
            "what was proved to be the disk is no longer here: the name is that of another file by now, or of none",
            file=data.path,
        )
    make_names_durable(os.path.dirname(os.path.realpath(data.path)))
    if identity_of(name) != identity:
        raise DetachError("the name of the image is that of another file by now, or of none", file=os.fspath(path))
    remove(name, identity)
    make_names_durable(os.path.dirname(name))
