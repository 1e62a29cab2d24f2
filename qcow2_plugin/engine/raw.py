"""A raw file as the bottom of a backing chain."""

from __future__ import annotations

from collections.abc import Iterator

from qcow2_plugin.extent import Extent, ExtentKind
from qcow2_plugin.format.geometry import SECTOR_SIZE
from qcow2_plugin.storage import Storage


class RawDisk:
    """A `GuestDisk` whose bytes are those of a file, its size rounded up to whole sectors with zeros."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.path = storage.path
        self.virtual_size = -(-storage.size() // SECTOR_SIZE) * SECTOR_SIZE

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from guest `offset`. Raises OSError."""
        self.storage.read_into(buffer, offset)

    def extents(self, offset: int = 0, length: int | None = None, *, whole_chain: bool = True) -> Iterator[Extent]:
        """Data and holes as the file system knows them; a hole is ZERO with its place in the file."""
        length = self.virtual_size - offset if length is None else length
        for start, run_length, is_data in self.storage.data_ranges(offset, length):
            yield Extent(start, run_length, ExtentKind.DATA if is_data else ExtentKind.ZERO, start)

    def prefetch(self, offset: int, length: int) -> None:
        """Ask the system to have the range in memory soon."""
        self.storage.prefetch(offset, length)
