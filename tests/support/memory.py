"""A storage in memory, for tests that want to see or change every byte that the engine reads.

Keeps the `Storage` protocol by the same contract suite as the local file. Counts nothing, fails never: the content
is a bytearray that the test owns.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator

_numbers = itertools.count(1)


class MemoryStorage:
    """`content` as a file; a test may change it at any time, also its length."""

    def __init__(self, content: bytes | bytearray = b"", path: str = "memory") -> None:
        self.content = content if isinstance(content, bytearray) else bytearray(content)
        self.path = path
        self.identity = (0, next(_numbers))
        self.closed = False

    def read_into(self, buffer: memoryview, host_offset: int) -> None:
        """Fill all of `buffer` from `host_offset`; past the end are zeros."""
        data = self.pread(len(buffer), host_offset)
        buffer[:] = data.ljust(len(buffer), b"\0")

    def pread(self, length: int, host_offset: int) -> bytes:
        """`length` bytes from `host_offset`; fewer only at the end."""
        self._check_open()
        assert host_offset >= 0, "the engine never asks for this, and a file would not notice"
        return bytes(self.content[host_offset : host_offset + length])

    def size(self) -> int:
        """Bytes up to the end."""
        self._check_open()
        return len(self.content)

    def allocated_size(self) -> int:
        """All of them: memory has no holes."""
        return self.size()

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Data up to the end, a hole behind it."""
        end = offset + length
        data_end = min(max(offset, self.size()), end)
        if offset < data_end:
            yield offset, data_end - offset, True
        if data_end < end:
            yield data_end, end - data_end, False

    def prefetch(self, offset: int, length: int) -> None:
        """Nothing to do: it is in memory."""

    def close(self) -> None:
        """Every later call but `prefetch` and `close` fails with EBADF."""
        self.closed = True

    def _check_open(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
