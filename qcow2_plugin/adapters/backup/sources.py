"""The disks of a job: how their images are opened, and what is told of them in a manifest.

Owns the two ways of opening. Offline images only: neither way gets by a program that writes to one.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from qcow2_plugin.adapters.backup import names
from qcow2_plugin.adapters.backup.model import DiskRequest
from qcow2_plugin.engine.chain import open_alone, open_image
from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.raw import RawDisk
from qcow2_plugin.errors import OptionError, printable
from qcow2_plugin.extent import GuestDisk
from qcow2_plugin.format.geometry import MAX_BITMAP_DATA_SIZE
from qcow2_plugin.operations.info import info
from qcow2_plugin.storage.directory import absolute_path, identity_of
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import Policy

if TYPE_CHECKING:
    from qcow2_plugin.engine.files import References
    from qcow2_plugin.engine.writable import WritableImage

_MIN_CLUSTER_SIZE, _MAX_CLUSTER_SIZE = 4 << 10, 64 << 10


class Source(NamedTuple):
    """One disk of a job: its name in the repository, and the absolute path of its image."""

    disk: str
    path: str
    policy: Policy
    references: References | None

    def open(self) -> Image:
        """The disk, for reading: nobody writes to it meanwhile. Raises what `open_image` does."""
        return open_image(self.path, policy=self.policy, references=self.references)

    def open_for_changes(self) -> WritableImage:
        """The image alone, for changes of its bitmaps. Raises what `open_image` does."""
        return cast(
            "WritableImage", open_alone(self.path, writable=True, policy=self.policy, references=self.references)
        )

    def is_written_behind(self) -> bool:
        """As `is_written_behind` of the image. Raises what `open_image` does."""
        with open_alone(self.path, policy=self.policy, references=self.references) as image:
            return is_written_behind(image)


def sources_of(
    requests: Sequence[DiskRequest], policy: Policy, references: References | None = None
) -> tuple[Source, ...]:
    """The disks of a job. Raises ManifestError if one cannot have its name; OptionError if there is none, or one is
    there twice; OSError."""
    if not requests:
        raise OptionError("a backup is of one disk at least")
    found = [Source(names.check_disk(each.disk), absolute_path(each.path), policy, references) for each in requests]
    disks: set[str] = set()
    images: set[tuple[int, int] | None] = set()
    for source in found:
        if source.disk in disks:
            raise OptionError(f'two disks would be called "{source.disk}"; name one of them (DISK=IMAGE)')
        identity = identity_of(source.path)
        if identity in images and identity is not None:
            raise OptionError("the image is named twice", file=source.path)
        disks.add(source.disk)
        images.add(identity)
    return tuple(found)


def disk_name(path: str) -> str:
    """What a disk is called by default: after the file of its image. Raises OptionError if that cannot be."""
    stem = re.sub(r"\.(?:qcow2|img|raw|qcow)$", "", os.path.basename(path).lower())
    name = re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:61]
    if not name:
        raise OptionError(f'"{printable(path)}" gives no name for a disk; name it (DISK=IMAGE)')
    return name


def member_cluster_size(image: Image) -> int:
    """Bytes of a member's clusters: as bitmaps have it by default, so that a bit stands for a cluster."""
    return min(max(image.header.geometry.cluster_size, _MIN_CLUSTER_SIZE), _MAX_CLUSTER_SIZE)


def bitmap_granularity(image: Image) -> int | None:
    """Bytes that a bit of a new bitmap is to stand for, None for the usual number: more, if the bitmap of a very large
    disk could not be kept otherwise."""
    needed = -(-image.virtual_size // (8 * MAX_BITMAP_DATA_SIZE))
    return None if needed <= member_cluster_size(image) else 1 << (needed - 1).bit_length()


def options_of(path: str) -> dict[str, Any]:
    """The options of `create_image` that make an image like the one at `path`, but for its size and backing file.

    `data_file` is the name as the image has it. Raises what `info` does.
    """
    found = info(path, snapshot_limit=0).qcow2
    assert found is not None, "the image was opened"
    return {
        "version": found.version,
        "cluster_size": found.cluster_size,
        "refcount_bits": found.refcount_bits,
        "lazy_refcounts": found.lazy_refcounts,
        "extended_l2": found.extended_l2,
        "compression_type": found.compression,
        "data_file": None if found.data_file is None else printable(found.data_file),
        "data_file_raw": found.data_file_raw,
    }


def fingerprint(image: Image) -> dict[str, int] | None:
    """What tells whether somebody has written to the raw data file: inode, size in bytes and time of the last change.
    None if there is none, or it is no regular file. Raises OSError."""
    data = image.layer.data
    if data is image.layer.storage or not image.header.data_file_raw or not isinstance(data, FileStorage):
        return None
    found = os.stat(data.path)
    if not stat.S_ISREG(found.st_mode):
        return None
    return {"inode": found.st_ino, "size": found.st_size, "mtime_ns": found.st_mtime_ns}


def fingerprints(image: Image) -> dict[str, int] | None:
    """What tells of all files besides the image itself whether somebody has written to them. Raises OSError."""
    return (fingerprint(image) or {}) | fingerprint_below(image) or None


def fingerprint_below(image: Image) -> dict[str, int]:
    """What tells whether somebody has changed a backing file: inode and time of the last change of each regular
    file below the image, by its depth. Raises OSError."""
    found: dict[str, int] = {}
    below, depth = image.layer.backing, 1
    while isinstance(below, Image | RawDisk):
        beneath: GuestDisk | None = None
        if isinstance(below, RawDisk):
            files = {"": below.storage}
        else:
            files, beneath = {"": below.layer.storage, "_data": below.layer.data}, below.layer.backing
        for kind, storage in files.items():
            if isinstance(storage, FileStorage) and stat.S_ISREG((status := os.stat(storage.path)).st_mode):
                found[f"backing{depth}{kind}_inode"] = status.st_ino
                found[f"backing{depth}{kind}_mtime_ns"] = status.st_mtime_ns
        below, depth = beneath, depth + 1
    return found


def is_written_behind(image: Image) -> bool:
    """The raw data file has changed after the image last did, so by a program that has left no record of it. That can
    be seen until somebody writes to the image. Raises OSError."""
    found = fingerprint(image)
    return found is not None and found["mtime_ns"] > os.stat(image.layer.storage.path).st_mtime_ns
