"""Extents: how a range of a virtual disk is described to callers, and what a disk must offer to be read.

All numbers are plain ints in bytes. An `Extent` says where a guest range lives, never what it contains.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

ZEROS = memoryview(bytes(1 << 20))
"""To be read from, never written to."""


class ExtentKind(enum.Enum):
    """What a read of the range does."""

    DATA = "data"
    """Bytes stored as they are at `host_offset`."""
    COMPRESSED = "compressed"
    """Clusters stored compressed."""
    ZERO = "zero"
    """Reads as zeros, whatever a backing file holds. `host_offset` is set where space is kept preallocated."""
    UNALLOCATED = "unallocated"
    """Nothing here: the backing file shows through, or zeros where there is none."""


class Extent(NamedTuple):
    """One run of a virtual disk; `depth` counts layers from 0, the image that was asked.

    `host_offset` is in the file that stores the range (image file, data file, or a raw backing file) and None when
    nothing is stored. For COMPRESSED it is the first byte of one cluster's stored form and `stored_length` the bytes
    to fetch there; a run of several compressed clusters (from `extents`) has no `host_offset` and the sum as
    `stored_length`, or its share of the sum where a layer above hides a part of the run.
    """

    guest_offset: int
    length: int
    kind: ExtentKind
    host_offset: int | None
    stored_length: int = 0
    depth: int = 0


class GuestDisk(Protocol):
    """A readable virtual disk: an image, or whatever stands in as its backing file. Safe for many threads.

    Its files are closed by whoever opened the chain.
    """

    @property
    def virtual_size(self) -> int:
        """Bytes the guest sees."""

    def read_into(self, buffer: memoryview, offset: int, /) -> None:
        """Fill `buffer` from guest `offset`; the range must lie inside the disk."""

    def extents(self, offset: int = 0, length: int | None = None, *, whole_chain: bool = True) -> Iterator[Extent]:
        """The runs of a range, ascending, without gaps or overlaps, made lazily."""

    def prefetch(self, offset: int, length: int, /) -> None:
        """Ask the system to have the range in memory soon; a hint that never fails."""


def merge(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Neighbours that continue each other (same kind and depth, host offsets in line) joined to one.

    An error of `extents` comes after everything that was told before it.
    """
    current: Extent | None = None
    try:
        for extent in extents:
            if current is None:
                current = extent
            elif continues(current, extent):
                current = current._replace(
                    length=current.length + extent.length,
                    host_offset=None if current.kind is ExtentKind.COMPRESSED else current.host_offset,
                    stored_length=current.stored_length + extent.stored_length,
                )
            else:
                yield current
                current = extent
    except Exception:
        if current is not None:
            yield current
        raise
    if current is not None:
        yield current


def continues(first: Extent, second: Extent) -> bool:
    """True if `second` directly follows `first` and both can be told as one extent."""
    if first.kind is not second.kind or first.depth != second.depth:
        return False
    if first.kind is ExtentKind.COMPRESSED:
        return True
    if first.host_offset is None:
        return second.host_offset is None
    return second.host_offset == first.host_offset + first.length


def parts(start: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
    """A range in parts, (start, end), that end where multiples of `limit` do, or with it."""
    while start < end:
        stop = min(end, start - start % limit + limit)
        yield start, stop
        start = stop


def joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges, (start, end), whose starts ascend, those that meet or overlap as one; none that is empty."""
    current_start = current_end = 0
    for start, end in ranges:
        if start <= current_end:
            current_end = max(current_end, end)
            continue
        if current_start < current_end:
            yield current_start, current_end
        current_start, current_end = start, end
    if current_start < current_end:
        yield current_start, current_end


def clear(view: memoryview) -> None:
    """Fill `view` (bytes, format "B") with zeros, without allocating as much."""
    length = len(view)
    for start in range(0, length, len(ZEROS)):
        part = view[start : start + len(ZEROS)]
        part[:] = ZEROS[: len(part)]
