"""Are the tables and bits of bitmaps where they can be, and how much do they mark?

Looks at the bitmaps of one image together, because what two of them call their own is of neither. What it is held
against: the file's size, the header cluster, the tables that the header names, the bitmap directory, and the other
bitmaps. L2 tables, refcount blocks and guest data are not looked for; that takes a check of the image.

Work and memory are bounded whatever the image says: at most `_MAX_TABLES_SIZE` bytes of bitmap tables are read, and
`_MAX_BITS_SIZE` bytes of bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.errors import Qcow2Error
from qcow2_plugin.format import bits
from qcow2_plugin.format.bitmaps import Bitmap
from qcow2_plugin.format.header import Header, Table
from qcow2_plugin.storage import Storage

_MAX_TABLES_SIZE = 64 << 20
_MAX_BITS_SIZE = 64 << 20
_BITS_AT_ONCE = 1 << 20
_ONES = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)

Words = npt.NDArray[np.uint64]


class Surveyed(NamedTuple):
    """One bitmap: why it cannot be read, if it cannot; else the bytes of the disk that it marks, None if counting them
    would take too long."""

    problem: str | None
    dirty_size: int | None


def survey(storage: Storage, header: Header, bitmaps: list[Bitmap]) -> list[Surveyed]:
    """What there is to say of each bitmap that nothing else speaks against. Raises OSError."""
    return _Survey(storage, header, bitmaps).run()


class _Survey:
    def __init__(self, storage: Storage, header: Header, bitmaps: list[Bitmap]) -> None:
        self._storage = storage
        self._header = header
        self._bitmaps = bitmaps
        self._cluster_size = header.geometry.cluster_size
        self._problems: list[str | None] = [None] * len(bitmaps)
        self._tables: list[Words | None] = [None] * len(bitmaps)
        self._bits_size = 0
        self._named = list(self._structures())

    def run(self) -> list[Surveyed]:
        self._find_shared_tables()
        tables_size = 0
        for index, bitmap in enumerate(self._bitmaps):
            if self._problems[index] is not None:
                continue
            if tables_size + 8 * bitmap.table_entries > _MAX_TABLES_SIZE:
                self._problems[index] = f"the image has more than {_MAX_TABLES_SIZE >> 20} MiB of bitmap tables"
            elif self._read_table(index):
                tables_size += 8 * bitmap.table_entries
        self._find_shared_bits()
        return [self._told(index) for index in range(len(self._bitmaps))]

    # -- tables --

    def _find_shared_tables(self) -> None:
        """Bitmap tables that share a cluster with one another, or with what the header names."""
        places = sorted((*self._clusters(bitmap), index) for index, bitmap in enumerate(self._bitmaps))
        furthest_end, furthest = 0, -1
        for start, end, index in places:
            if start < furthest_end:
                for each in (index, furthest):
                    self._problems[each] = "its table shares a cluster with the table of another bitmap"
            if end > furthest_end:
                furthest_end, furthest = end, index
        for index, bitmap in enumerate(self._bitmaps):
            length = -(-8 * bitmap.table_entries // self._cluster_size) * self._cluster_size
            for named in self._named:
                if named.overlaps(bitmap.table_offset, length):
                    self._problems[index] = f"its table overlaps the {named.name}"

    def _clusters(self, bitmap: Bitmap) -> tuple[int, int]:
        start = bitmap.table_offset // self._cluster_size
        return start, start + -(-8 * bitmap.table_entries // self._cluster_size)

    def _structures(self) -> Iterator[Table]:
        """What the header names, and the header itself."""
        yield Table("header", 0, self._cluster_size)
        for table in self._header.tables:
            yield self._whole(table)
        if self._header.bitmaps is not None:
            yield self._whole(self._header.bitmaps.table)

    def _whole(self, table: Table) -> Table:
        return table._replace(length=-(-table.length // self._cluster_size) * self._cluster_size)

    def _read_table(self, index: int) -> bool:
        """False if it could not be read."""
        bitmap = self._bitmaps[index]
        try:
            stored = read_structure(self._storage, "bitmap table", bitmap.table_offset, 8 * bitmap.table_entries)
            table = np.frombuffer(stored, dtype=">u8").astype(np.uint64)
            bits.check_table(table, self._cluster_size)
            self._problems[index] = self._misplaced(table)
        except Qcow2Error as error:
            self._problems[index] = f"the {error.detail}"
            return False
        self._tables[index] = table
        return True

    def _misplaced(self, table: Words) -> str | None:
        """What is wrong with the places of the clusters of bits that a table names."""
        places = _places_in(table)
        last = self._storage.size() - self._cluster_size
        if places.size and int(places.max()) > last:
            return "bits of it lie past the end of the file: the image is truncated"
        for named in self._named:
            start, end = np.uint64(named.host_offset), np.uint64(named.host_offset + named.length)
            if ((places >= start) & (places < end)).any():
                return f"bits of it lie in the {named.name}"
        return None

    def _find_shared_bits(self) -> None:
        """Clusters of bits that are named twice, or are a bitmap's table."""
        known = [(index, _places_in(table)) for index, table in enumerate(self._tables) if table is not None]
        if not known:
            return
        places = np.concatenate([each for _, each in known])
        owners = np.concatenate([np.full(len(each), index, dtype=np.int64) for index, each in known])
        tables = [self._clusters(bitmap) for bitmap in self._bitmaps]
        starts = np.sort(np.array([start for start, _ in tables], dtype=np.int64))
        ends = np.sort(np.array([end for _, end in tables], dtype=np.int64))
        clusters = (places // np.uint64(self._cluster_size)).astype(np.int64)
        inside = np.searchsorted(starts, clusters, side="right") > np.searchsorted(ends, clusters, side="right")
        for index in np.unique(owners[inside]).tolist():
            self._problems[index] = "bits of it lie in the table of a bitmap"
        order = np.argsort(clusters, kind="stable")
        same = np.flatnonzero(clusters[order[1:]] == clusters[order[:-1]])
        for index in np.unique(owners[np.concatenate((order[same], order[same + 1]))]).tolist():
            self._problems[index] = "bits of it share a cluster with other bits"

    # -- bits --

    def _told(self, index: int) -> Surveyed:
        table = self._tables[index]
        if self._problems[index] is not None or table is None:
            return Surveyed(self._problems[index], None)
        try:
            return Surveyed(None, self._dirty_size(self._bitmaps[index], table))
        except Qcow2Error as error:
            return Surveyed(f"the {error.detail}", None)

    def _dirty_size(self, bitmap: Bitmap, table: Words) -> int | None:
        self._bits_size += len(_places_in(table)) * self._cluster_size
        if self._bits_size > _MAX_BITS_SIZE:
            return None
        virtual_size = self._header.virtual_size
        bits_per_cluster = 8 * self._cluster_size
        bit_count = -(-virtual_size >> bitmap.granularity_bits)
        marked = 0
        is_last_marked = False
        for index in np.flatnonzero(table).tolist():
            here = min(bit_count - index * bits_per_cluster, bits_per_cluster)
            if here <= 0:
                break
            entry = int(table[index])
            ones, is_last_marked = (here, True) if entry == bits.TABLE_ALL_ONES else self._count(entry, here)
            is_last_marked &= index * bits_per_cluster + here == bit_count
            marked += ones
        last_size = virtual_size - (bit_count - 1 << bitmap.granularity_bits)
        return (marked << bitmap.granularity_bits) - is_last_marked * (bitmap.granularity - last_size)

    def _count(self, host_offset: int, bit_count: int) -> tuple[int, bool]:
        """How many of the first bits of a cluster are set, and whether the last of these is."""
        length = -(-bit_count // 8)
        ones, last_byte = 0, 0
        for start in range(0, length, _BITS_AT_ONCE):
            part = read_structure(
                self._storage, "cluster of bits", host_offset + start, min(_BITS_AT_ONCE, length - start)
            )
            counted = np.frombuffer(part, dtype=np.uint8)
            ones += int(_ONES[counted].sum(dtype=np.int64))
            last_byte = int(counted[-1])
        used = (bit_count - 1 & 7) + 1
        return ones - (last_byte >> used).bit_count(), bool(last_byte >> used - 1 & 1)


def _places_in(table: Words) -> Words:
    """Host offsets of the clusters of bits that a table names."""
    return table[table > np.uint64(bits.TABLE_ALL_ONES)]
