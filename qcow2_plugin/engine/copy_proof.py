"""Is a copy of a disk that disk? Both are read again, and nothing that made the copy is believed.

The image is read through its own read path, wherever its tables do not say zeros; what the file systems said of holes
while copying counts for nothing. Where the tables say zeros the copy is looked at, if only where it has no hole.
"""

from __future__ import annotations

from collections.abc import Callable

from qcow2_plugin.engine.copy_out import data_storages
from qcow2_plugin.engine.data_file_proof import first_byte
from qcow2_plugin.engine.image import Image
from qcow2_plugin.extent import ExtentKind
from qcow2_plugin.storage import Storage

_CHUNK = 1 << 20

Progress = Callable[[int, int], None]


def first_difference(image: Image, copy: Storage, progress: Progress | None = None) -> int | None:
    """Guest offset of the first byte that `copy` has otherwise, None if there is none. Raises what reading does."""
    raw_depth = _depth_of_raw(image)
    ours, theirs = bytearray(_CHUNK), bytearray(_CHUNK)
    for extent in image.extents():
        offset, end = extent.guest_offset, extent.guest_offset + extent.length
        if progress is not None:
            progress(offset, image.virtual_size)
        if extent.depth != raw_depth and extent.kind in (ExtentKind.ZERO, ExtentKind.UNALLOCATED):
            found = first_byte(copy, offset, extent.length)
            if found is not None:
                return found
            continue
        for place in range(offset, end, _CHUNK):
            count = min(_CHUNK, end - place)
            image.read_into(memoryview(ours)[:count], place)
            copy.read_into(memoryview(theirs)[:count], place)
            if not _are_equal(ours, theirs, count):
                return place + _first_unequal(ours, theirs)
            if progress is not None:
                progress(place, image.virtual_size)
    if progress is not None:
        progress(image.virtual_size, image.virtual_size)
    return None


def _depth_of_raw(image: Image) -> int | None:
    """The depth of the raw file below, if there is one: its zeros are holes, which only the file system vouches for."""
    depth = 0
    disk = image.layer.backing
    while isinstance(disk, Image):
        depth += 1
        disk = disk.layer.backing
    return depth + 1 if len(data_storages(image)) > depth + 1 else None


def _are_equal(one: bytearray, other: bytearray, count: int) -> bool:
    """The first `count` bytes. Not of memoryviews, which are compared item by item."""
    return one == other if count == len(one) else one[:count] == other[:count]


def _first_unequal(one: bytearray, other: bytearray) -> int:
    return next(index for index in range(len(one)) if one[index] != other[index])
