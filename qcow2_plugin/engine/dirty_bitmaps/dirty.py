"""What a persistent dirty bitmap marks, read lazily from an image file.

Source: docs/interop/qcow2.rst, "Bitmaps".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.errors import CorruptImageError, about_file, printable
from qcow2_plugin.format import bits
from qcow2_plugin.format.bitmaps import Bitmap
from qcow2_plugin.format.header import Header, Table
from qcow2_plugin.storage import Storage

_TABLE_CHUNK = 8192
"""Bitmap table entries looked at together."""
_BITS_CHUNK = 4096
"""Bytes of bits looked at together."""
_KEPT_CHUNKS = 8
"""Chunks of bits whose runs are kept for the next question."""


class DirtyBitmap:
    """What one bitmap marks. Safe for many threads.

    Raises CorruptImageError when constructed if the bitmap must not be used; when ranges are asked for, and the place
    is reached, CorruptImageError, TruncatedImageError or OSError.
    """

    def __init__(self, storage: Storage, header: Header, bitmap: Bitmap) -> None:
        reason = bitmap.unusable_reason(header.virtual_size, header.geometry.cluster_size)
        if reason is not None:
            name = printable(bitmap.name)
            raise CorruptImageError("bitmap", f'"{name}" cannot be used: {reason}', file=storage.path)
        self.bitmap = bitmap
        self.require_current: Callable[[], None] = lambda: None
        """Raises if the bitmap has gone from its place, which only a writer knows; asked behind every look there."""
        self._storage = storage
        pointer = header.bitmaps
        self._metadata = header.tables if pointer is None else (*header.tables, pointer.table)
        self._require_apart(bitmap.table_offset, 8 * bitmap.table_entries)
        self._metadata = (*self._metadata, Table("bitmap table", bitmap.table_offset, 8 * bitmap.table_entries))
        self._cluster_size = header.geometry.cluster_size
        self._coverage_bits = bitmap.granularity_bits + header.cluster_bits + 3
        self._read_runs = lru_cache(_KEPT_CHUNKS)(self._read_runs_uncached)

    def ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the marked ranges inside a range of the disk, merged, ascending, made lazily."""
        end = offset + length
        pending_start = pending_end = offset
        for marked_start, marked_end in self._marked(offset, end):
            start, stop = max(marked_start, offset), min(marked_end, end)
            if start >= stop:
                continue
            if start > pending_end:
                if pending_start < pending_end:
                    yield pending_start, pending_end - pending_start
                pending_start = start
            pending_end = stop
        if pending_start < pending_end:
            yield pending_start, pending_end - pending_start

    def _marked(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """(start, end) of what is marked in every chunk of bits that `offset` to `end` touches."""
        first, last = offset >> self._coverage_bits, -(-end >> self._coverage_bits)
        for chunk_start in range(first, last, _TABLE_CHUNK):
            entries = self._read_table(chunk_start, min(_TABLE_CHUNK, last - chunk_start))
            for index in np.flatnonzero(entries).tolist():
                base = chunk_start + index << self._coverage_bits
                entry = int(entries[index])
                if entry == bits.TABLE_ALL_ONES:
                    yield base, base + (1 << self._coverage_bits)
                    continue
                self._require_apart(entry, self._cluster_size)
                yield from self._marked_in_cluster(entry, base, offset, end)

    def _marked_in_cluster(self, host_offset: int, base: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """As `_marked`, in the cluster of bits at `host_offset`, whose first bit stands for guest offset `base`."""
        chunk_size = min(_BITS_CHUNK, self._cluster_size)
        chunk_coverage = chunk_size * 8 << self.bitmap.granularity_bits
        for chunk in range(self._cluster_size // chunk_size):
            chunk_base = base + chunk * chunk_coverage
            if chunk_base < end and offset < chunk_base + chunk_coverage:
                for start, stop in self._read_runs(host_offset + chunk * chunk_size, chunk_size):
                    yield chunk_base + start, chunk_base + stop

    def _require_apart(self, host_offset: int, length: int) -> None:
        """Raises CorruptImageError if a part of the bitmap overlaps other metadata, which are no bits."""
        for table in self._metadata:
            if table.overlaps(host_offset, length):
                raise CorruptImageError(
                    f'bitmap "{printable(self.bitmap.name)}"',
                    f"overlaps the {table.name}",
                    host_offset=host_offset,
                    file=self._storage.path,
                )

    def _read_table(self, index: int, count: int) -> npt.NDArray[np.uint64]:
        data = read_structure(self._storage, "bitmap table", self.bitmap.table_offset + 8 * index, 8 * count)
        self.require_current()
        entries = np.frombuffer(data, dtype=">u8").astype(np.uint64)
        with about_file(self._storage.path):
            bits.check_table(entries, self._cluster_size)
        return entries

    def _read_runs_uncached(self, host_offset: int, length: int) -> list[tuple[int, int]]:
        """(start, end) of the runs of ones in a chunk of bits, in guest bytes from the first bit's place on."""
        packed = read_structure(self._storage, f'bitmap "{printable(self.bitmap.name)}"', host_offset, length)
        self.require_current()
        granularity_bits = self.bitmap.granularity_bits
        return [
            (first << granularity_bits, first + count << granularity_bits)
            for first, count, is_set in bits.runs_of_bits(packed)
            if is_set
        ]
