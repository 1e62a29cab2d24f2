"""A digest of what a guest would read, the same for a qcow2 image, a raw file and a device with the same contents.

What it is made of is told in `engine.digest_tree`. Here disks of either kind are read for it, where they store
anything: zeros that the tables or the file system know of are not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

from qcow2_plugin.engine.digest_tree import BLOCK, Leaves, Recorder, hash_ranges
from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.raw import RawDisk
from qcow2_plugin.errors import DigestError, OptionError
from qcow2_plugin.extent import ExtentKind, GuestDisk, joined
from qcow2_plugin.format.geometry import SECTOR_SIZE
from qcow2_plugin.operations.changes import RangeKind, changes
from qcow2_plugin.storage.opener import open_given

ALGORITHM = "blake3-tree-64k"
THREADS = 2

Path = str | os.PathLike[str]
Progress = Callable[[int, int], None]


class Digest(NamedTuple):
    """`root` is the digest in hexadecimal, `leaves` what the next one can be made from."""

    root: str
    leaves: Leaves


def content_digest(
    disk: GuestDisk, *, virtual_size: int | None = None, threads: int = THREADS, progress: Progress | None = None
) -> Digest:
    """The digest of a disk, or of its first `virtual_size` bytes: of a device that is larger than the disk on it.

    `progress` is told (done, total) bytes of the disk. Raises OptionError; what reading the disk raises.
    """
    size = disk.virtual_size if virtual_size is None else virtual_size
    if not 0 <= size <= disk.virtual_size or size % SECTOR_SIZE:
        raise OptionError(f"the disk has {disk.virtual_size} bytes; a digest is of as many, or fewer whole sectors")
    leaves = Leaves(size)
    stored = _blocks(_stored(disk, size))
    with closing(hash_ranges(disk.read_into, stored, leaves, threads)) as hashed:
        for _, end in hashed:
            if progress is not None:
                progress(min(end, size), size)
    if progress is not None:
        progress(size, size)
    return Digest(leaves.root(), leaves)


def recorder(image: Image, before: Leaves | None = None) -> Recorder:
    """Makes the digest of `image` while it is copied by `write_member`: its `told` is the `on_block` there.

    `before` are the leaves of what the disk was when the bitmaps began, None for a full copy. Raises DigestError if
    the disk was larger then.
    """
    if before is not None and before.virtual_size > image.virtual_size:
        raise DigestError(
            f"the disk has shrunk from {before.virtual_size} to {image.virtual_size} bytes, so its digest must be made "
            "anew",
            file=image.layer.storage.path,
        )
    return Recorder(image.read_into, image.virtual_size, before)


@contextmanager
def opened_raw(path: Path) -> Iterator[RawDisk]:
    """A raw file or device as a disk, locked as a reader's. Raises what opening it does."""
    storage = open_given(path)
    try:
        yield RawDisk(storage)
    finally:
        storage.close()


def _stored(disk: GuestDisk, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what may be something else than zeros."""
    if isinstance(disk, Image):
        for change in changes(disk, None, length=size, with_clean=False):
            if change.kind is RangeKind.DIRTY_DATA:
                yield change.guest_offset, change.guest_offset + change.length
        return
    for extent in disk.extents(0, size):
        if extent.kind is ExtentKind.DATA:
            yield extent.guest_offset, extent.guest_offset + extent.length


def _blocks(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The ranges made whole blocks, those that meet joined."""
    return joined((start // BLOCK * BLOCK, -(-end // BLOCK) * BLOCK) for start, end in ranges)
