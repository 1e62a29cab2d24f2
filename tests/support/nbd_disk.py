"""An NBD export as a disk, so that whatever compares disks compares exports too.

It owns the requests to one libnbd handle, the map of a whole export put together from block status replies among
them. It refuses to know what is served.
"""

from __future__ import annotations

from collections.abc import Iterator

import nbd

from qcow2_plugin.extent import Extent, ExtentKind

MAX_REQUEST = 32 << 20
"""Bytes of one read; nbdkit answers up to 64 MiB."""
_MAX_STATUS = 1 << 31
State = tuple[int, int, int]
"""Offset, length, flags of "base:allocation"."""


class NbdDisk:
    """The export that `handle` is connected to."""

    def __init__(self, handle: nbd.NBD) -> None:
        self.handle = handle
        self.virtual_size: int = handle.get_size()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        for start in range(0, len(buffer), MAX_REQUEST):
            length = min(MAX_REQUEST, len(buffer) - start)
            buffer[start : start + length] = self.handle.pread(length, offset + start)

    def states(self, offset: int = 0, length: int | None = None, *, flags: int = 0) -> list[State]:
        """The map of a range, neighbours merged; asks until all of it was told."""
        end = self.virtual_size if length is None else offset + length
        states: list[State] = []
        while offset < end:
            for told_length, told_flags in self.reply(min(end - offset, _MAX_STATUS), offset, flags=flags):
                clipped = min(told_length, end - offset)
                if states and states[-1][2] == told_flags:
                    states[-1] = (states[-1][0], states[-1][1] + clipped, told_flags)
                else:
                    states.append((offset, clipped, told_flags))
                offset += clipped
        return states

    def reply(self, length: int, offset: int, *, flags: int = 0) -> list[tuple[int, int]]:
        """(length, flags) of every entry of one block status reply."""
        entries: list[int] = []
        self.handle.block_status(length, offset, lambda _name, _offset, told, _error: entries.extend(told), flags)
        return list(zip(entries[::2], entries[1::2], strict=True))

    def extents(self, offset: int = 0, length: int | None = None, *, whole_chain: bool = True) -> Iterator[Extent]:
        for start, run_length, flags in self.states(offset, length):
            yield Extent(start, run_length, ExtentKind.ZERO if flags & nbd.STATE_ZERO else ExtentKind.DATA, None)

    def prefetch(self, offset: int, length: int) -> None:
        self.handle.cache(length, offset)

    def close(self) -> None:
        self.handle.shutdown()


def states_of(extents: Iterator[Extent]) -> list[State]:
    """What block status must say of these extents: holes where nothing is stored, zeros where nothing is to be read."""
    states: list[State] = []
    for extent in extents:
        if extent.kind in (ExtentKind.DATA, ExtentKind.COMPRESSED):
            flags = 0
        elif extent.kind is ExtentKind.ZERO and extent.host_offset is not None:
            flags = nbd.STATE_ZERO
        else:
            flags = nbd.STATE_HOLE | nbd.STATE_ZERO
        if states and states[-1][2] == flags:
            states[-1] = (states[-1][0], states[-1][1] + extent.length, flags)
        else:
            states.append((extent.guest_offset, extent.length, flags))
    return states
