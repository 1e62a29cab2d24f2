"""A local file as storage: a descriptor, and the system calls that read it.

Owns the descriptor from the moment it is constructed. Refuses to know names (`opener` opens, `path` is for messages
only) and never relies on the file position, so that threads share the descriptor freely.

`read_into` is the hottest function of the package: one `preadv` into the caller's buffer and one comparison. What is
rare (a short read, the end of the file) lives in a function of its own.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from os import preadv

from qcow2_plugin.extent import clear

_CANNOT_TELL_HOLES = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


class FileStorage:
    """A regular file or block device, open for reading; keeps the `Storage` protocol."""

    __slots__ = ("_fd", "identity", "path")

    def __init__(self, fd: int, path: str) -> None:
        """Take over the descriptor `fd`; `path` names the file in messages."""
        status = os.fstat(fd)
        self._fd = fd
        self.path = path
        self.identity = (status.st_dev, status.st_ino)

    def read_into(self, buffer: memoryview, host_offset: int) -> None:
        """Fill all of `buffer` (bytes, format "B") from `host_offset`; past the end of the file are zeros."""
        count = preadv(self._fd, (buffer,), host_offset)
        if count != len(buffer):
            self._read_rest(buffer, count, host_offset + count)

    def _read_rest(self, buffer: memoryview, done: int, host_offset: int) -> None:
        rest = memoryview(buffer)
        if rest.nbytes != len(buffer):
            raise TypeError(f"the buffer must be of bytes, not of format {rest.format!r}")
        rest = rest[done:]
        while len(rest) and (count := preadv(self._fd, (rest,), host_offset)):
            rest = rest[count:]
            host_offset += count
        clear(rest)

    def pread(self, length: int, host_offset: int) -> bytes:
        """`length` bytes from `host_offset`; fewer only where the file ends."""
        data = os.pread(self._fd, length, host_offset)
        while len(data) < length and (more := os.pread(self._fd, length - len(data), host_offset + len(data))):
            data += more
        return data

    def size(self) -> int:
        """Bytes up to the end of the file, asked anew at each call."""
        return os.lseek(self._fd, 0, os.SEEK_END)  # unlike st_size, right for block devices too

    def allocated_size(self) -> int:
        """Bytes of disk space that the file occupies; 0 for a block device."""
        return os.fstat(self._fd).st_blocks * 512

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Tile a range into (offset, length, is_data), ascending and without gaps, lazily.

        Source: lseek(2), SEEK_DATA and SEEK_HOLE.
        """
        end = offset + length
        while offset < end:
            data_start = self._seek(os.SEEK_DATA, offset, end)
            if offset < data_start:
                yield offset, data_start - offset, False
            data_end = self._seek(os.SEEK_HOLE, data_start, end)
            if data_start < data_end:
                yield data_start, data_end - data_start, True
            offset = data_end

    def _seek(self, whence: int, offset: int, end: int) -> int:
        """Where the first data or hole (`whence`) at or after `offset` begins, `end` at most."""
        if offset >= end:
            return end
        try:
            return min(os.lseek(self._fd, offset, whence), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # the file ends before `offset`, or holds no data from there on
                return end if whence == os.SEEK_DATA else offset
            if error.errno not in _CANNOT_TELL_HOLES:
                raise
        file_end = min(max(offset, self.size()), end)
        if whence == os.SEEK_HOLE:
            return file_end
        return offset if offset < file_end else end

    def prefetch(self, offset: int, length: int) -> None:
        """Ask the system to have the range in memory soon; a hint that never fails."""
        if length <= 0:  # to the system, 0 means up to the end of the file
            return
        with suppress(OSError, OverflowError):  # by contract: whoever reads the range will hear of its troubles
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Give back the file and its locks; a second call does nothing. No other call may be running."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
