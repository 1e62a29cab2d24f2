"""A storage in memory that fails when it is told to: at the k-th call of some kind, once or from then on.

Owns how a call fails: with which error, before anything or half-way. What has to come of it is asked elsewhere.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Flag, auto

from qcow2_plugin.storage import Buffer
from tests.support.recording import SECTOR, Action, Log, RecordingStorage


class Calls(Flag):
    """Which calls can fail."""

    READ = auto()
    WRITE = auto()
    CLEAR = auto()
    """Writing zeros."""
    PUNCH = auto()
    RESIZE = auto()
    """`truncate` and `preallocate`."""
    BARRIER = auto()
    CHANGE = WRITE | CLEAR | RESIZE


@dataclass(frozen=True)
class Fault:
    """How calls fail. `grows`: only those that make the file larger; `half`: half of a write is done first, in whole
    sectors."""

    name: str
    calls: Calls
    errno: int
    sticky: bool = False
    grows: bool = False
    half: bool = False


FAULTS = (
    Fault("read error", Calls.READ, errno.EIO),
    Fault("write error", Calls.CHANGE, errno.EIO),
    Fault("punch error", Calls.PUNCH, errno.EIO),
    Fault("disk full once", Calls.CHANGE, errno.ENOSPC),
    Fault("disk full", Calls.CHANGE, errno.ENOSPC, sticky=True),
    Fault("no room to grow", Calls.CHANGE, errno.ENOSPC, sticky=True, grows=True),
    Fault("half a write", Calls.WRITE, errno.ENOSPC, half=True),
    Fault("barrier error", Calls.BARRIER, errno.EIO),
)


@dataclass
class Faults:
    """The fault of one run, shared by all its files. `at` counts the calls that could fail, from 0; None: never."""

    fault: Fault
    at: int | None = None
    seen: int = 0
    fired: int = 0
    is_paused: bool = False

    def arm(self, at: int | None) -> None:
        """Fail at the `at`-th call from now."""
        self.at, self.seen, self.fired = at, 0, 0

    def clear(self) -> None:
        """Nothing fails any more; the calls are still counted."""
        self.at = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing fails and nothing is counted: a test looks at the files."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def meet(self, calls: Calls, *, grows: bool = False) -> bool:
        """Count a call; True if it has to fail."""
        if self.is_paused or not calls & self.fault.calls or (self.fault.grows and not grows):
            return False
        number, self.seen = self.seen, self.seen + 1
        if self.at is None or number < self.at or (number > self.at and not self.fault.sticky):
            return False
        self.fired += 1
        return True

    def error(self) -> OSError:
        """What a failed call raises."""
        return OSError(self.fault.errno, os.strerror(self.fault.errno))


class FaultyStorage(RecordingStorage):
    """A recording storage whose calls meet `faults`."""

    def __init__(self, log: Log, number: int, content: bytes | bytearray, path: str, faults: Faults) -> None:
        super().__init__(log, number, content, path)
        self.faults = faults

    def pread(self, length: int, host_offset: int) -> bytes:
        """`length` bytes from `host_offset`; fewer only at the end."""
        self._meet(Calls.READ)
        return super().pread(length, host_offset)

    def write_from(self, buffer: Buffer, host_offset: int) -> None:
        """Write all of `buffer`, or the first half of it, or nothing."""
        if self.faults.meet(Calls.WRITE, grows=host_offset + len(buffer) > len(self.content)):
            if self.faults.fault.half:
                end = (host_offset + len(buffer) // 2) // SECTOR * SECTOR
                super().write_from(bytes(buffer[: max(end - host_offset, 0)]), host_offset)
            raise self.faults.error()
        super().write_from(buffer, host_offset)

    def write_zeroes(self, host_offset: int, length: int, *, may_punch: bool) -> None:
        """Zeros, or nothing."""
        self._meet(Calls.CLEAR)
        super().write_zeroes(host_offset, length, may_punch=may_punch)

    def punch(self, host_offset: int, length: int) -> None:
        """Give back space, or nothing."""
        self._meet(Calls.PUNCH)
        super().punch(host_offset, length)

    def truncate(self, size: int) -> None:
        """Move the end, or nothing."""
        self._meet(Calls.RESIZE, grows=size > len(self.content))
        super().truncate(size)

    def preallocate(self, host_offset: int, length: int) -> None:
        """Get space, or nothing."""
        self._meet(Calls.RESIZE, grows=host_offset + length > len(self.content))
        super().preallocate(host_offset, length)

    def barrier(self) -> None:
        """A failed one leaves it open what is durable."""
        if self.faults.meet(Calls.BARRIER):
            self._record(Action.BARRIER, 0, 0, len(self.content), failed=True)
            raise self.faults.error()
        super().barrier()

    def _meet(self, calls: Calls, *, grows: bool = False) -> None:
        if self.faults.meet(calls, grows=grows):
            raise self.faults.error()
