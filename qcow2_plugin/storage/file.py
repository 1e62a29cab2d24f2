"""A local file as storage: a descriptor, and the system calls that read and change it.

Owns the descriptor from the moment it is constructed. Refuses to know names (`opener` opens, `path` is for messages
only) and never relies on the file position, so that threads share the descriptor freely.

`read_into` is the hottest function of the package: one `preadv` into the caller's buffer and one comparison, and
`write_from` is made like it. What is rare (a short read or write, the end of the file) lives in functions of their own.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import wraps
from os import preadv, pwritev
from typing import Concatenate, ParamSpec, TypeVar

from qcow2_plugin.extent import clear
from qcow2_plugin.storage import Buffer
from qcow2_plugin.storage.space import punch_hole, zero_range

_CANNOT_TELL_HOLES = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")
"""How many `pwritev` takes at once."""
_ZEROS = memoryview(bytes(1 << 20))  # never touched by anybody, so it takes no memory

_Told = ParamSpec("_Told")
_Answer = TypeVar("_Answer")


def _about_its_file(
    method: Callable[Concatenate[FileStorage, _Told], _Answer],
) -> Callable[Concatenate[FileStorage, _Told], _Answer]:
    """The method, with the name of the file in every OSError."""

    @wraps(method)
    def call(storage: FileStorage, /, *told: _Told.args, **named: _Told.kwargs) -> _Answer:
        try:
            return method(storage, *told, **named)
        except OSError as error:
            error.filename = error.filename or storage.path
            raise

    return call


class FileStorage:
    """A regular file or block device; keeps the `Storage` protocol and, if open for writing, `WritableStorage`.

    Every OSError of reading or changing it names the file.
    """

    __slots__ = ("_fd", "identity", "path")

    def __init__(self, fd: int, path: str) -> None:
        """Take over the descriptor `fd`; `path` names the file in messages."""
        status = os.fstat(fd)
        self._fd = fd
        self.path = path
        self.identity = (status.st_dev, status.st_ino)

    def read_into(self, buffer: memoryview, host_offset: int) -> None:
        """Fill all of `buffer` (bytes, format "B") from `host_offset`; past the end of the file are zeros."""
        try:
            count = preadv(self._fd, (buffer,), host_offset)
            if count != len(buffer):
                self._read_rest(buffer, count, host_offset + count)
        except OSError as error:
            error.filename = error.filename or self.path
            raise

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
        try:
            data = os.pread(self._fd, length, host_offset)
            while len(data) < length and (more := os.pread(self._fd, length - len(data), host_offset + len(data))):
                data += more
        except OSError as error:
            error.filename = error.filename or self.path
            raise
        return data

    def size(self) -> int:
        """Bytes up to the end of the file, asked anew at each call."""
        return os.lseek(self._fd, 0, os.SEEK_END)  # unlike st_size, right for block devices too

    def allocated_size(self) -> int:
        """Bytes of disk space that the file occupies; 0 for a block device."""
        return os.fstat(self._fd).st_blocks * 512

    def mode(self) -> int:
        """Type and permissions of the file, as in stat(2)."""
        return os.fstat(self._fd).st_mode

    def group(self) -> int:
        """The number of the group that it belongs to."""
        return os.fstat(self._fd).st_gid

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

    @_about_its_file
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

    def write_from(self, buffer: Buffer, host_offset: int) -> None:
        """Write all of `buffer` (bytes, format "B") at `host_offset`."""
        try:
            count = pwritev(self._fd, (buffer,), host_offset)
            if count != len(buffer):
                self._write_rest((buffer,), count, host_offset)
        except OSError as error:
            error.filename = error.filename or self.path
            raise

    def write_vector(self, buffers: Sequence[Buffer], host_offset: int) -> None:
        """Write all of `buffers` (bytes, format "B"), however many, one after the other from `host_offset`."""
        try:
            for first in range(0, len(buffers), _MAX_BUFFERS):
                some = buffers[first : first + _MAX_BUFFERS]
                length = sum(map(len, some))
                count = pwritev(self._fd, some, host_offset)
                if count != length:
                    self._write_rest(some, count, host_offset)
                host_offset += length
        except OSError as error:
            error.filename = error.filename or self.path
            raise

    def _write_rest(self, buffers: Iterable[Buffer], count: int, host_offset: int) -> None:
        """Write what is left of `buffers` after their first `count` bytes, of which no byte is no progress."""
        while rest := _rest(buffers, count):
            if not count:
                raise OSError(errno.EIO, "the system writes nothing", self.path)
            host_offset += count
            buffers = rest
            count = pwritev(self._fd, rest, host_offset)

    @_about_its_file
    def write_zeroes(self, host_offset: int, length: int, *, may_punch: bool) -> None:
        """Make a range read as zeros without moving the end; with `may_punch` its space is given back."""
        length = self._inside(host_offset, length)
        if not length:
            return
        if may_punch and punch_hole(self._fd, host_offset, length):
            return
        if zero_range(self._fd, host_offset, length):
            return
        for done in range(0, length, len(_ZEROS)):
            self.write_from(_ZEROS[: length - done], host_offset + done)

    @_about_its_file
    def punch(self, host_offset: int, length: int) -> None:
        """Give back the space of a range that nobody needs, where the system can."""
        length = self._inside(host_offset, length)
        if length:
            punch_hole(self._fd, host_offset, length)

    def _inside(self, host_offset: int, length: int) -> int:
        """How much of a range lies in front of the end."""
        return max(min(length, self.size() - host_offset), 0)

    @_about_its_file
    def truncate(self, size: int) -> None:
        """Move the end to `size`; what is new in front of it reads as zeros. Not for block devices (EINVAL)."""
        os.ftruncate(self._fd, size)

    @_about_its_file
    def preallocate(self, host_offset: int, length: int) -> None:
        """Get space for a range, moving the end to cover it. Not for block devices (ENODEV)."""
        if length > 0:
            os.posix_fallocate(self._fd, host_offset, length)

    @_about_its_file
    def barrier(self) -> None:
        """Return when everything written before is durable."""
        if self._fd < 0:  # to which Python says ValueError here, and only here
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            if error.errno != errno.EINVAL or self._is_writable():  # else a file system that nobody writes to
                raise

    def _is_writable(self) -> bool:
        return fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY

    def forget_cached(self) -> None:
        """Ask the system to have what is durable read from the disk again; a hint that never fails."""
        with suppress(OSError, OverflowError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def fileno(self) -> int:
        """The descriptor, for other calls of this package; -1 after `close`."""
        return self._fd

    def close(self) -> None:
        """Give back the file and its locks; a second call does nothing. No other call may be running."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _rest(buffers: Iterable[Buffer], count: int) -> list[memoryview]:
    """What is left of `buffers` after their first `count` bytes."""
    rest = []
    for buffer in buffers:
        view = memoryview(buffer)
        if view.nbytes != len(view):
            raise TypeError(f"a buffer must be of bytes, not of format {view.format!r}")
        if count < len(view):
            rest.append(view[count:])
        count = max(count - len(view), 0)
    return rest
