"""A storage in memory that can be written to, for tests of whole images without a file.

Keeps both protocols of `storage` by the same contract suite as the local file. Counts nothing, fails never.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from qcow2_plugin.storage import Buffer
from tests.support import memory


class MemoryStorage(memory.MemoryStorage):
    """`content` as a file, image or data file; a test may change it at any time, also its length."""

    def __init__(self, content: bytes | bytearray = b"", path: str = "memory") -> None:
        super().__init__(content, path)
        self._growing = threading.Lock()

    def write_from(self, buffer: Buffer, host_offset: int) -> None:
        """Write all of `buffer` at `host_offset`."""
        self._check_open()
        assert host_offset >= 0, "the engine never asks for this"
        data = bytes(buffer)
        if not data:
            return
        end = host_offset + len(data)
        self._grow(end)
        self.content[host_offset:end] = data  # of the same length: one step to other threads

    def write_vector(self, buffers: Sequence[Buffer], host_offset: int) -> None:
        """Write all of `buffers` one after the other."""
        self.write_from(b"".join(buffers), host_offset)

    def write_zeroes(self, host_offset: int, length: int, *, may_punch: bool) -> None:
        """Zeros up to the end at most."""
        length = min(length, self.size() - host_offset)
        if length > 0:
            self.write_from(bytes(length), host_offset)

    def punch(self, host_offset: int, length: int) -> None:
        """As on most file systems, what is given back reads as zeros."""
        self.write_zeroes(host_offset, length, may_punch=True)

    def truncate(self, size: int) -> None:
        """Move the end to `size`."""
        self._grow(size)
        del self.content[size:]

    def preallocate(self, host_offset: int, length: int) -> None:
        """Moves the end, if need be: there is nothing else to get."""
        self._check_open()
        if length > 0:
            self._grow(host_offset + length)

    def barrier(self) -> None:
        """Nothing to do: memory lasts no longer than its program."""
        self._check_open()

    def _grow(self, size: int) -> None:
        self._check_open()
        with self._growing:
            self.content.extend(bytes(max(size - len(self.content), 0)))
