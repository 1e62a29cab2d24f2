"""The snapshot table: entries of internal snapshots, parsed and packed to the same bytes.

Source: docs/interop/qcow2.rst, "Snapshots".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.format import names
from qcow2_plugin.format.geometry import MAX_SNAPSHOT_EXTRA_SIZE, SECTOR_SIZE

_FIXED = struct.Struct(">QIHHIIQII")
_UINT64 = struct.Struct(">Q")
MIN_ENTRY_SIZE = _FIXED.size
_NO_ICOUNT = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry. `id` and `name` are bytes as stored; `extra` is the extra data verbatim."""

    l1_table_offset: int
    l1_size: int
    id: bytes
    name: bytes
    date_seconds: int
    date_nanoseconds: int
    vm_clock_nanoseconds: int
    vm_state_size_32: int
    extra: bytes

    @classmethod
    def of_disk(cls, id: bytes, name: bytes, date: tuple[int, int], l1_size: int, virtual_size: int) -> Snapshot:
        """A snapshot of a disk without a running machine, whose L1 table has no place yet; `date` in seconds and
        nanoseconds since the epoch."""
        extra = b"".join(map(_UINT64.pack, (0, virtual_size, _NO_ICOUNT)))
        return cls(0, l1_size, id, name, *date, 0, 0, extra)

    @property
    def vm_state_size(self) -> int:
        """Bytes of VM state; the 64-bit field wins where it exists."""
        return self._extra_field(0, self.vm_state_size_32)

    @property
    def icount(self) -> int | None:
        """Instructions executed, None if not recorded."""
        icount = self._extra_field(16, _NO_ICOUNT)
        return None if icount == _NO_ICOUNT else icount

    def virtual_size(self, current: int) -> int:
        """Disk size in bytes when the snapshot was taken; `current` where the entry does not record it (v2)."""
        return self._extra_field(8, current) & ~(SECTOR_SIZE - 1)

    def _extra_field(self, start: int, default: int) -> int:
        if len(self.extra) < start + _UINT64.size:
            return default
        return int(_UINT64.unpack_from(self.extra, start)[0])


def parse_entries(table: bytes, count: int) -> tuple[list[Snapshot], int]:
    """As many of the next `count` entries as lie wholly in `table`, and the bytes that they and their padding take.

    `table` begins at an entry. Raises CorruptImageError on too much extra data.
    """
    snapshots: list[Snapshot] = []
    offset = 0
    while len(snapshots) < count and offset + _FIXED.size <= len(table):
        l1_table_offset, l1_size, id_length, name_length, seconds, nanoseconds, clock, state_size, extra_size = (
            _FIXED.unpack_from(table, offset)
        )
        if extra_size > MAX_SNAPSHOT_EXTRA_SIZE:
            raise CorruptImageError("snapshot table", f"an entry has {extra_size} bytes of extra data")
        extra_start = offset + _FIXED.size
        id_start = extra_start + extra_size
        name_start = id_start + id_length
        end = name_start + name_length
        if end > len(table):
            break
        snapshots.append(
            Snapshot(
                l1_table_offset,
                l1_size,
                table[id_start:name_start],
                table[name_start:end],
                seconds,
                nanoseconds,
                clock,
                state_size,
                table[extra_start:id_start],
            )
        )
        offset = end + 7 & ~7
    return snapshots, offset


def pack_table(snapshots: Iterable[Snapshot]) -> bytes:
    """The table as bytes; the padding after the last entry is left out, as it does not count for refcounts."""
    packed = bytearray()
    for snapshot in snapshots:
        packed += bytes(-len(packed) % 8)
        packed += _FIXED.pack(
            snapshot.l1_table_offset,
            snapshot.l1_size,
            len(snapshot.id),
            len(snapshot.name),
            snapshot.date_seconds,
            snapshot.date_nanoseconds,
            snapshot.vm_clock_nanoseconds,
            snapshot.vm_state_size_32,
            len(snapshot.extra),
        )
        packed += snapshot.extra + snapshot.id + snapshot.name
    return bytes(packed)


def find(snapshots: Iterable[Snapshot], wanted: str | bytes) -> Snapshot | None:
    """The snapshot with this ID, else the first with this name: an ID shadows a name, as in QEMU."""
    key = names.to_bytes(wanted)
    known = list(snapshots)
    by_id = next((snapshot for snapshot in known if snapshot.id == key), None)
    return by_id or next((snapshot for snapshot in known if snapshot.name == key), None)
