"""What of a disk has changed, as dirty bitmaps tell it, and what is there now: data, zeros, or nothing.

Both are asked where it matters only. Clean ranges are told as far as somebody wants to hear of them, and nothing is
looked up in them, so the way through a disk costs what its changes and the tables that map them cost.

A bitmap says that a range *may* have changed. It is trusted in the other direction: what it does not mark is as it
was. Whether it deserves that is for others to judge (`bitmap_health`); one that must not be used at all is refused.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.refcounts import is_preallocated
from qcow2_plugin.extent import Extent, ExtentKind, GuestDisk, joined
from qcow2_plugin.storage import Storage

_NEAR = 16
"""Clusters between two ranges that are told together, because to begin anew costs more than to pass over these."""


_GROUP = 1024
"""Ranges that are held at once."""
_FEW = 4
"""Clusters, or subclusters, that are looked up faster one by one."""


class RangeKind(enum.Enum):
    """What a range is to a backup."""

    CLEAN = "clean"
    """As it was; what is there was not looked up."""
    DIRTY_DATA = "data"
    """May have changed; bytes are stored."""
    DIRTY_ZERO = "zero"
    """May have changed; reads as zeros, because something says so."""
    DIRTY_HOLE = "hole"
    """May have changed; reads as zeros, because nothing is stored."""


class Change(NamedTuple):
    """A run of a disk, in bytes."""

    guest_offset: int
    length: int
    kind: RangeKind


class ChangeCounts(NamedTuple):
    """Bytes of each kind; together they are the disk."""

    dirty_data: int
    dirty_zero: int
    dirty_hole: int
    clean: int


_KINDS = {
    ExtentKind.DATA: RangeKind.DIRTY_DATA,
    ExtentKind.COMPRESSED: RangeKind.DIRTY_DATA,
    ExtentKind.ZERO: RangeKind.DIRTY_ZERO,
    ExtentKind.UNALLOCATED: RangeKind.DIRTY_HOLE,
}


def changes(
    image: Image,
    bitmaps: Sequence[str | bytes] | None,
    *,
    offset: int = 0,
    length: int | None = None,
    base_size: int | None = None,
    with_clean: bool = True,
) -> Iterator[Change]:
    """The changes that any of `bitmaps` marks in a range (by default to the end of the disk): ascending, merged, lazy.

    None for `bitmaps`: everything is dirty. So is what lies past `base_size`, the size of the disk when the bitmaps
    began; they know nothing of it. `with_clean` tells of what is between, too, so that there are no gaps. Offsets are
    multiples of the bitmaps' granularity, but for both ends.

    Raises what `Image.dirty_bitmap` and `Image.extents` do, the first of them at once.
    """
    end = image.virtual_size if length is None else offset + length
    if bitmaps is None:
        dirty: Iterator[tuple[int, int]] = iter([(offset, end)] if offset < end else [])
    else:
        marked = [image.dirty_bitmap(name) for name in bitmaps]
        parts = [_bounds(bitmap.ranges(offset, end - offset)) for bitmap in marked]
        if base_size is not None and base_size < end:
            parts.append(iter([(max(base_size, offset), end)]))
        dirty = _union(parts)
    found = _merged(_looked_up(image, dirty))
    return _with_gaps(found, offset, end) if with_clean else found


def estimate(image: Image, bitmaps: Sequence[str | bytes] | None, *, base_size: int | None = None) -> ChangeCounts:
    """How much there is of each kind, before any data is read. Parameters and errors are those of `changes`."""
    return count(changes(image, bitmaps, base_size=base_size, with_clean=False), image.virtual_size)


def count(found: Iterable[Change], virtual_size: int) -> ChangeCounts:
    """How much there is of each kind in the changes of a disk; what they do not tell of is clean."""
    totals = dict.fromkeys(RangeKind, 0)
    for change in found:
        totals[change.kind] += change.length
    data, zero, hole = (totals[kind] for kind in (RangeKind.DIRTY_DATA, RangeKind.DIRTY_ZERO, RangeKind.DIRTY_HOLE))
    return ChangeCounts(data, zero, hole, virtual_size - data - zero - hole)


def _bounds(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    return ((start, start + length) for start, length in ranges)


def _union(parts: Sequence[Iterator[tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    """(start, end) of what any of the parts has, each of which ascends."""
    parts = list(parts)
    if len(parts) == 1:
        yield from parts[0]
        return
    yield from joined(heapq.merge(*parts))


def _looked_up(image: Image, dirty: Iterable[tuple[int, int]]) -> Iterator[Change]:
    """What is stored in the dirty ranges."""
    sparse = _sparse_files(image)
    near = _NEAR * image.header.geometry.cluster_size
    for group in _groups(dirty, near):
        start, end = group[0][0], group[-1][1]
        wanted = iter(group)
        first, last = next(wanted)
        for extent in _extents(image, start, end - start):
            extent_end = extent.guest_offset + extent.length
            while first < extent_end:
                part_start, part_end = max(first, extent.guest_offset), min(last, extent_end)
                storage = sparse[extent.depth] if extent.kind is ExtentKind.DATA else None
                if storage is None or extent.host_offset is None:
                    yield Change(part_start, part_end - part_start, _KINDS[extent.kind])
                else:
                    yield from _with_holes(storage, part_start, part_end, extent.host_offset - extent.guest_offset)
                if last > extent_end:
                    break
                first, last = next(wanted, (end, end))


def _extents(image: Image, offset: int, length: int) -> Iterator[Extent]:
    """The extents of a range; of a short one by the way that a read would take, which is shorter too."""
    if length <= _FEW * image.header.geometry.subcluster_size:
        found = image.clusters(offset, length)
        if image.layer.backing is None or all(extent.kind is not ExtentKind.UNALLOCATED for extent in found):
            return iter(found)
    return image.extents(offset, length)


def _groups(dirty: Iterable[tuple[int, int]], near: int) -> Iterator[list[tuple[int, int]]]:
    """The ranges in groups of those that are near to each other."""
    group: list[tuple[int, int]] = []
    for start, end in dirty:
        if group and (start - group[-1][1] > near or len(group) == _GROUP):
            yield group
            group = []
        group.append((start, end))
    if group:
        yield group


def _with_holes(storage: Storage, start: int, end: int, shift: int) -> Iterator[Change]:
    """Data of which the file system may know that it was never written; it stands `shift` bytes further in its file."""
    for part, length, is_data in storage.data_ranges(start + shift, end - start):
        yield Change(part - shift, length, RangeKind.DIRTY_DATA if is_data else RangeKind.DIRTY_HOLE)


def _sparse_files(image: Image) -> list[Storage | None]:
    """What stores the data of each layer, by depth, where the file system should be asked for holes."""
    found: list[Storage | None] = []
    disk: GuestDisk | None = image
    while isinstance(disk, Image):
        is_sparse = is_preallocated(disk.header, disk.layer.storage) or disk.layer.data is not disk.layer.storage
        found.append(disk.layer.data if is_sparse else None)
        disk = disk.layer.backing
    return [*found, None]  # a raw disk tells of its holes itself


def _merged(found: Iterable[Change]) -> Iterator[Change]:
    """Neighbours of one kind joined."""
    current: Change | None = None
    for change in found:
        if current is None:
            current = change
        elif change.kind is current.kind and change.guest_offset == current.guest_offset + current.length:
            current = Change(current.guest_offset, current.length + change.length, change.kind)
        else:
            yield current
            current = change
    if current is not None:
        yield current


def _with_gaps(found: Iterable[Change], offset: int, end: int) -> Iterator[Change]:
    """The changes, and what is clean between them."""
    for change in found:
        if offset < change.guest_offset:
            yield Change(offset, change.guest_offset - offset, RangeKind.CLEAN)
        yield change
        offset = change.guest_offset + change.length
    if offset < end:
        yield Change(offset, end - offset, RangeKind.CLEAN)
