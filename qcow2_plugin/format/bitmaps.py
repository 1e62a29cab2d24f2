"""Persistent dirty bitmaps: the directory that lists them. What they mark is in `bits`.

Source: docs/interop/qcow2.rst, "Bitmaps"; docs/interop/bitmaps.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.format import geometry as limits

FLAG_IN_USE = 1 << 0
FLAG_AUTO = 1 << 1
FLAG_EXTRA_DATA_COMPATIBLE = 1 << 2
_FLAGS_KNOWN = FLAG_IN_USE | FLAG_AUTO | FLAG_EXTRA_DATA_COMPATIBLE
TYPE_DIRTY_TRACKING = 1
_MIN_GRANULARITY_BITS = 9
_MAX_GRANULARITY_BITS = 31

_FIXED = struct.Struct(">QIIBBHI")
TABLE_OFFSET_AT, TABLE_ENTRIES_AT, FLAGS_AT = 0, 8, 12
"""Where in a directory entry the fields of 8, 4 and 4 bytes are that change in place."""


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One directory entry; `table_entries` counts 8-byte entries, `extra` and `name` are verbatim."""

    table_offset: int
    table_entries: int
    flags: int
    type: int
    granularity_bits: int
    extra: bytes
    name: bytes

    @property
    def granularity(self) -> int:
        """Guest bytes that one bit stands for."""
        return 1 << self.granularity_bits

    @property
    def in_use(self) -> bool:
        """The stored bits may be stale: a writer did not finish."""
        return bool(self.flags & FLAG_IN_USE)

    @property
    def auto(self) -> bool:
        """Enabled: every change of the disk is recorded."""
        return bool(self.flags & FLAG_AUTO)

    def unusable_reason(self, virtual_size: int, cluster_size: int) -> str | None:
        """Why the bits must not be used for a disk of this size, None if they may."""
        if self.in_use:
            return "it is in use or was not closed properly"
        if self.type != TYPE_DIRTY_TRACKING:
            return f"its type {self.type} is unknown"
        if self.flags & ~_FLAGS_KNOWN:
            return f"its flags {self.flags:#x} are unknown"
        if self.extra and not self.flags & FLAG_EXTRA_DATA_COMPATIBLE:
            return "it has extra data of an unknown kind"
        if not _MIN_GRANULARITY_BITS <= self.granularity_bits <= _MAX_GRANULARITY_BITS:
            return f"its granularity of 2^{self.granularity_bits} bytes is not supported"
        if self.table_entries * cluster_size > limits.MAX_BITMAP_DATA_SIZE:
            return "it is too large"
        if self.table_entries != table_entries_for(virtual_size, self.granularity_bits, cluster_size):
            return "its size does not fit the disk"
        return None


def table_entries_for(virtual_size: int, granularity_bits: int, cluster_size: int) -> int:
    """Entries of the table of a bitmap over a disk of `virtual_size` bytes."""
    bit_count = -(-virtual_size // (1 << granularity_bits))
    byte_count = -(-bit_count // 8)
    return -(-byte_count // cluster_size)


def parse_directory(directory: bytes, count: int, cluster_size: int) -> list[Bitmap]:
    """The entries of a directory that must hold exactly `count`. Raises CorruptImageError."""
    bitmaps: list[Bitmap] = []
    names = set()
    offset = 0
    while offset < len(directory):
        if len(bitmaps) == count or offset + _FIXED.size > len(directory):
            raise _corrupt(f"does not hold exactly {count} entries")
        table_offset, table_entries, flags, kind, granularity_bits, name_length, extra_size = _FIXED.unpack_from(
            directory, offset
        )
        extra_start = offset + _FIXED.size
        name_start = extra_start + extra_size
        end = name_start + name_length
        if end > len(directory):
            raise _corrupt(f"entry {len(bitmaps)} runs past the end")
        bitmap = Bitmap(
            table_offset,
            table_entries,
            flags,
            kind,
            granularity_bits,
            directory[extra_start:name_start],
            directory[name_start:end],
        )
        _check_entry(bitmap, len(bitmaps), cluster_size)
        if bitmap.name in names:
            raise _corrupt(f"entry {len(bitmaps)} has the name of another")
        names.add(bitmap.name)
        bitmaps.append(bitmap)
        offset = end + 7 & ~7
    if len(bitmaps) != count or offset != len(directory):
        raise _corrupt(f"does not hold exactly {count} entries")
    return bitmaps


def pack_directory(bitmaps: Iterable[Bitmap]) -> bytes:
    """The directory as bytes, every entry padded to a multiple of 8."""
    packed = bytearray()
    for bitmap in bitmaps:
        packed += _FIXED.pack(
            bitmap.table_offset,
            bitmap.table_entries,
            bitmap.flags,
            bitmap.type,
            bitmap.granularity_bits,
            len(bitmap.name),
            len(bitmap.extra),
        )
        packed += bitmap.extra + bitmap.name
        packed += bytes(-len(packed) % 8)
    return bytes(packed)


def entry_offsets(bitmaps: Iterable[Bitmap]) -> list[int]:
    """Where each entry begins in the directory that holds these bitmaps in this order; multiples of 8."""
    offsets: list[int] = []
    end = 0
    for bitmap in bitmaps:
        offsets.append(end)
        end += _FIXED.size + len(bitmap.extra) + len(bitmap.name) + 7 & ~7
    return offsets


def _check_entry(bitmap: Bitmap, index: int, cluster_size: int) -> None:
    if not bitmap.table_offset or bitmap.table_offset % cluster_size:
        raise _corrupt(f"entry {index} has its table at host offset {bitmap.table_offset:#x}")
    if bitmap.table_offset + bitmap.table_entries * 8 > limits.MAX_HOST_OFFSET:
        raise _corrupt(f"entry {index} has its table at host offset {bitmap.table_offset:#x}")
    if not 0 < bitmap.table_entries <= limits.MAX_BITMAP_TABLE_ENTRIES:
        raise _corrupt(f"entry {index} has a table of {bitmap.table_entries} entries")
    if not 0 < len(bitmap.name) <= limits.MAX_NAME_LENGTH:
        raise _corrupt(f"entry {index} has a name of {len(bitmap.name)} bytes")


def _corrupt(detail: str) -> CorruptImageError:
    return CorruptImageError("bitmap directory", detail)
