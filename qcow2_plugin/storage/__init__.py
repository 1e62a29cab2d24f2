"""Storage: where the bytes of a file live, as the engine sees it.

Owns the protocol that every storage keeps, and nothing else: how to read bytes at a host offset, how many there are
and which of them are holes. A storage knows nothing of qcow2, of guest offsets or of policies; `file` is the local
file, `locks` keeps other programs away from it, `opener` decides which file may be opened under which name.

All offsets and lengths are plain ints in bytes, not negative (callers see to that: to `preadv` -1 means the file
position). Nothing has to be aligned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Storage(Protocol):
    """A readable sequence of bytes. Every method may be called by many threads at once, except `close`.

    Raises: OSError as the system gave it, everywhere but in `prefetch`; with EBADF after `close`.
    """

    @property
    def path(self) -> str:
        """What to call the file in messages; not for opening it again."""

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode number: equal if and only if two storages are the same file, whatever its names."""

    def read_into(self, buffer: memoryview, host_offset: int) -> None:
        """Fill all of `buffer` (bytes, format "B") from `host_offset`; past the end of the file are zeros."""

    def pread(self, length: int, host_offset: int) -> bytes:
        """`length` bytes from `host_offset`; fewer only where the file ends."""

    def size(self) -> int:
        """Bytes up to the end of the file, asked anew at each call: others may be growing it."""

    def allocated_size(self) -> int:
        """Bytes of disk space that the file occupies."""

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Tile a range into (offset, length, is_data), ascending and without gaps, lazily.

        What is no data reads as zeros; data may do so too. Past the end of the file is a hole. Where the system
        cannot tell, everything up to the end is data.
        """

    def prefetch(self, offset: int, length: int) -> None:
        """Ask the system to have the range in memory soon; a hint that never fails."""

    def close(self) -> None:
        """Give back the file and its locks; a second call does nothing. No other call may be running."""
