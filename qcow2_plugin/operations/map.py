"""Where every byte of a disk comes from, as `qemu-img map` tells it.

That is `Image.extents` in other words, and one thing more: where an image has clearly more clusters in use than disk
space, it was preallocated. Its data may never have been written, and the file system is asked which of it are holes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.raw import RawDisk
from qcow2_plugin.engine.refcounts import is_preallocated
from qcow2_plugin.extent import Extent, ExtentKind, GuestDisk
from qcow2_plugin.storage import Storage


class MapEntry(NamedTuple):
    """A run of a disk; `start`, `length` and `offset` in bytes.

    `depth` is the layer that decides, 0 for the image itself. `present`: a layer provides the range, otherwise it is
    zeros because none does. `data`: bytes are stored; `zero`: it is known to read as zeros, both where data was
    preallocated and not written. `offset` is the place in the file that stores the range, None for compressed data and
    where nothing is stored.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None


def map_image(image: Image, offset: int = 0, length: int | None = None) -> Iterator[MapEntry]:
    """The map of a range, clipped to the disk: merged, ascending, without gaps, made lazily.

    An empty range has one entry of length 0. Raises what `Image.extents` does, when it comes to the place.
    """
    end = image.virtual_size if length is None else min(offset + length, image.virtual_size)
    if end <= offset:
        return iter([MapEntry(offset, 0, 0, False, False, False, None)])
    sparse = [_sparse_data(disk) for disk in _disks_of(image)]
    return _merged(_entries(image.extents(offset, end - offset), sparse))


def _entries(extents: Iterator[Extent], sparse: list[Storage | None]) -> Iterator[MapEntry]:
    """The entries of `extents`; `sparse` has for each layer the file to ask for holes, None if that is not worth it."""
    for start, length, kind, host_offset, _, depth in extents:
        storage = sparse[depth]
        if kind is ExtentKind.UNALLOCATED:
            yield MapEntry(start, length, depth, False, True, False, host_offset)
        elif kind is ExtentKind.ZERO:
            yield MapEntry(start, length, depth, True, True, False, host_offset)
        elif kind is ExtentKind.DATA and storage is not None and host_offset is not None:
            for part, part_length, is_data in storage.data_ranges(host_offset, length):
                yield MapEntry(start + part - host_offset, part_length, depth, True, not is_data, True, part)
        else:
            yield MapEntry(start, length, depth, True, False, True, host_offset)


def _sparse_data(disk: GuestDisk) -> Storage | None:
    """What stores the data of `disk`, if it may have been preallocated."""
    if isinstance(disk, Image) and is_preallocated(disk.header, disk.layer.storage):
        return disk.layer.data
    return None


def layer_files(image: Image) -> list[str]:
    """The path of the file that stores the data of each layer, by depth; "" for what is no file."""
    return [_data_path(disk) for disk in _disks_of(image)]


def _data_path(disk: GuestDisk) -> str:
    if isinstance(disk, Image):
        return disk.layer.data.path
    return disk.path if isinstance(disk, RawDisk) else ""


def _disks_of(image: Image) -> list[GuestDisk]:
    """The disks of a chain from the top down."""
    disks: list[GuestDisk] = [image]
    while isinstance(disk := disks[-1], Image) and disk.layer.backing is not None:
        disks.append(disk.layer.backing)
    return disks


def _merged(entries: Iterator[MapEntry]) -> Iterator[MapEntry]:
    """Neighbours joined that differ in nothing, their offsets in line."""
    current = next(entries)
    for entry in entries:
        offset = current.offset
        if entry.offset == (offset if offset is None else offset + current.length) and entry[2:6] == current[2:6]:
            current = current._replace(length=current.length + entry.length)
        else:
            yield current
            current = entry
    yield current
