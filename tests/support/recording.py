"""A storage in memory that writes down every change, over one file or several, in the order of the calls.

Owns what a call would leave on a disk, sector by sector: a disk writes whole sectors, so a call that touches a part of
one is remembered with what the rest of that sector held at that moment. What a crash makes of the calls is
crash_states.py's business.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qcow2_plugin.storage import Buffer
from tests.support.memory_storage import MemoryStorage

SECTOR = 512
ZERO_SECTOR = bytes(SECTOR)


class Action(enum.Enum):
    """What a call does."""

    WRITE = "write"
    ZERO = "zero"
    """Zeros, without giving back space; with it, PUNCH_ZERO."""
    PUNCH_ZERO = "zero and punch"
    PUNCH = "punch"
    TRUNCATE = "truncate"
    PREALLOCATE = "preallocate"
    BARRIER = "barrier"


class Call(NamedTuple):
    """One change. `sectors` are those it touches, as they are after it; `size` is the file's, before and after."""

    action: Action
    file: int
    offset: int
    length: int
    sectors: dict[int, bytes]
    size_before: int
    size: int
    failed: bool = False

    def __str__(self) -> str:
        failed = " (failed)" if self.failed else ""
        return f"{self.action.value} {self.offset:#x}+{self.length:#x} of file {self.file}{failed}"


@dataclass
class Log:
    """The calls to all files that share it."""

    calls: list[Call] = field(default_factory=list)

    @property
    def now(self) -> int:
        """How many calls there were."""
        return len(self.calls)


class RecordingStorage(MemoryStorage):
    """`content` as file `number` of a log. A call that raises is not written down."""

    def __init__(self, log: Log, number: int, content: bytes | bytearray, path: str = "memory") -> None:
        super().__init__(content, path)
        self.log, self.number = log, number

    def write_from(self, buffer: Buffer, host_offset: int) -> None:
        """Write all of `buffer` at `host_offset`."""
        size = len(self.content)
        super().write_from(buffer, host_offset)
        if len(buffer):
            self._record(Action.WRITE, host_offset, len(buffer), size)

    def write_vector(self, buffers: Sequence[Buffer], host_offset: int) -> None:
        """Write all of `buffers` one after the other, as one call."""
        self.write_from(b"".join(buffers), host_offset)

    def write_zeroes(self, host_offset: int, length: int, *, may_punch: bool) -> None:
        """Zeros up to the end at most."""
        self._clear(Action.PUNCH_ZERO if may_punch else Action.ZERO, host_offset, length)

    def punch(self, host_offset: int, length: int) -> None:
        """What is given back reads as zeros."""
        self._clear(Action.PUNCH, host_offset, length)

    def truncate(self, size: int) -> None:
        """Move the end to `size`."""
        before = len(self.content)
        super().truncate(size)
        self._record(Action.TRUNCATE, size, max(before - size, 0), before)

    def preallocate(self, host_offset: int, length: int) -> None:
        """Moves the end, if need be."""
        before = len(self.content)
        super().preallocate(host_offset, length)
        self._record(Action.PREALLOCATE, host_offset, 0, before)

    def barrier(self) -> None:
        """Ends what a crash can undo."""
        super().barrier()
        self._record(Action.BARRIER, 0, 0, len(self.content))

    def _clear(self, action: Action, host_offset: int, length: int) -> None:
        size = len(self.content)
        length = min(length, size - host_offset)
        if length > 0:
            super().write_from(bytes(length), host_offset)
            self._record(action, host_offset, length, size)

    def _record(self, action: Action, offset: int, length: int, size_before: int, *, failed: bool = False) -> None:
        sectors = {number: self.sector(number) for number in touched(offset, length)}
        call = Call(action, self.number, offset, length, sectors, size_before, len(self.content), failed)
        self.log.calls.append(call)

    def sector(self, number: int) -> bytes:
        """The sector as it is now, with zeros past the end of the file."""
        return sector_of(self.content, number)


def touched(offset: int, length: int) -> range:
    """The sectors that have a byte in the range."""
    return range(offset // SECTOR, (offset + length - 1) // SECTOR + 1) if length else range(0)


def sector_of(content: bytes | bytearray, number: int) -> bytes:
    """One sector of `content`, with zeros past its end; zeros are always the same object."""
    found = bytes(content[number * SECTOR : (number + 1) * SECTOR]).ljust(SECTOR, b"\0")
    return ZERO_SECTOR if found == ZERO_SECTOR else found
