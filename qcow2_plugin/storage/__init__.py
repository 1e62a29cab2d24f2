"""Storage: where the bytes of a file live, as the engine sees it.

Owns the protocols that every storage keeps, and nothing else: how to read bytes at a host offset, how many there are
and which of them are holes; how to change them and make the changes last. A storage knows nothing of qcow2, of guest
offsets or of policies; `file` is the local file, `space` how it gets and gives back disk space, `locks` keeps other
programs away from it, `opener` decides which file may be opened under which name, `directory` makes names last.

All offsets and lengths are plain ints in bytes, not negative (callers see to that: to `preadv` -1 means the file
position). Nothing has to be aligned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

Buffer = bytes | bytearray | memoryview
"""What can be written; a memoryview of bytes (format "B")."""


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


class WritableStorage(Storage, Protocol):
    """A storage that can be changed as well. Every method may be called by many threads at once, except `close`.

    Writes of several threads to one place come in any order; so does what a crash leaves of everything written since
    the last `barrier`. The end of the storage is no limit: what is written past it moves it, with zeros between.

    Raises: OSError as the system gave it, with ENOSPC where the disk is full; then any part of the change may be done.
    """

    def write_from(self, buffer: Buffer, host_offset: int) -> None:
        """Write all of `buffer` at `host_offset`."""

    def write_vector(self, buffers: Sequence[Buffer], host_offset: int) -> None:
        """Write all of `buffers`, however many, one after the other from `host_offset`."""

    def write_zeroes(self, host_offset: int, length: int, *, may_punch: bool) -> None:
        """Make a range read as zeros without moving the end: past it are zeros anyway.

        With `may_punch` its disk space is given back where the system can, without it is kept.
        """

    def punch(self, host_offset: int, length: int) -> None:
        """Give back the disk space of a range whose contents nobody needs; afterwards it reads as zeros or as before.

        A hint: where the system cannot, nothing happens. The end does not move.
        """

    def truncate(self, size: int) -> None:
        """Move the end to `size`; what is new in front of it reads as zeros."""

    def preallocate(self, host_offset: int, length: int) -> None:
        """Get disk space for a range, moving the end to cover it; what was written there stays.

        Nobody else may be writing to the range, because a system without the means writes to it in its stead.
        """

    def barrier(self) -> None:
        """Return when everything written before is durable, and the size as far as reading it back needs that.

        After an error nothing is known of what is durable, and a later success does not tell either.
        """
