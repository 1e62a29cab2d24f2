"""The extents of an overlay with its backing disk showing through.

Both are walked side by side, forward only: the disk below goes on where it was asked last. So a walk costs what the
tables of the layers cost, whatever pattern they make.
"""

from __future__ import annotations

from collections.abc import Iterator

from qcow2_plugin.errors import Qcow2Error
from qcow2_plugin.extent import Extent, ExtentKind, GuestDisk

_MAX_STEPS = 512
"""Extents passed over to reach a place, before beginning anew there is cheaper: that reads an L2 table again."""


def through_backing(own: Iterator[Extent], backing: GuestDisk, end: int) -> Iterator[Extent]:
    """`own`, ascending up to guest offset `end`, with what is unallocated told as `backing` has it, one layer deeper.

    What lies past the end of `backing` stays unallocated. Raises what the extents of `backing` raise, when it comes to
    a place that shows through.
    """
    below = _ForwardWalk(backing, min(end, backing.virtual_size))
    for extent in own:
        start, extent_end = extent.guest_offset, extent.guest_offset + extent.length
        backed_end = min(extent_end, backing.virtual_size)
        if extent.kind is not ExtentKind.UNALLOCATED or start >= backed_end:
            yield extent
            continue
        for shown in below.between(start, backed_end):
            yield shown._replace(depth=shown.depth + 1)
        if backed_end < extent_end:
            yield _clipped(extent, backed_end, extent_end)


class _ForwardWalk:
    """The extents of one disk up to `end`, asked for in ascending ranges."""

    def __init__(self, disk: GuestDisk, end: int) -> None:
        self._disk = disk
        self._end = end
        self._extents: Iterator[Extent] = iter(())
        self._latest: Extent | None = None

    def between(self, start: int, end: int) -> Iterator[Extent]:
        """The extents of a range inside the disk, not before the end of the range asked last."""
        extent = self._extent_at(start, end)
        while True:
            yield _clipped(extent, start, end)
            extent_end = extent.guest_offset + extent.length
            if extent_end >= end:
                self._latest = extent
                return
            extent = self._next() or self._begin_at(extent_end, end)

    def _extent_at(self, start: int, end: int) -> Extent:
        extent = self._latest
        for _ in range(_MAX_STEPS):
            if extent is None:
                break
            if extent.guest_offset + extent.length > start:
                return extent
            extent = self._next()
        return self._begin_at(start, end)

    def _begin_at(self, start: int, end: int) -> Extent:
        """The extent at `start`, from a walk as far as anybody will ask; an error is about the range to `end` only."""
        self._extents = self._disk.extents(start, self._end - start)
        extent = self._next()
        if extent is None:
            self._extents = self._disk.extents(start, end - start)
            extent = next(self._extents)
        return extent

    def _next(self) -> Extent | None:
        """The extent behind the latest; None at the end, or if what comes cannot be told.

        The walk looks ahead, so it may fail about ranges that never show through.
        """
        try:
            return next(self._extents, None)
        except (Qcow2Error, OSError):
            return None


def _clipped(extent: Extent, start: int, end: int) -> Extent:
    first = max(start, extent.guest_offset)
    last = min(end, extent.guest_offset + extent.length)
    host_offset = None if extent.host_offset is None else extent.host_offset + first - extent.guest_offset
    stored_length = extent.stored_length * (last - first) // extent.length
    return Extent(first, last - first, extent.kind, host_offset, stored_length, extent.depth)
