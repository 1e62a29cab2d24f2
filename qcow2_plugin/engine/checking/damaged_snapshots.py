"""The snapshot table of an image that may be damaged, read as far as it goes.

What a reader has to refuse is a fault here: too many snapshots, too much extra data in an entry, a table that is too
large. The snapshots that are told are those that a repair keeps, their extra data cut to what is allowed. Past the end
of the file are zeros, and so are entries there.

Source: docs/interop/qcow2.rst, "Snapshots"; the limits are those that QEMU enforces.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.format import geometry
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.snapshots import Snapshot
from qcow2_plugin.storage import Storage

_FIXED = struct.Struct(">QIHHIIQII")
_WINDOW = 1 << 20
"""Bytes of the table that are read together."""


@dataclass(frozen=True, slots=True)
class TableFault:
    """Why a snapshot table cannot be used as it is."""

    kind: str
    detail: str
    repair: str
    index: int | None = None
    count: int = 1


class SnapshotTable(NamedTuple):
    """What is left of a snapshot table."""

    snapshots: list[Snapshot]
    size: int
    """Bytes that they take in the file."""
    faults: list[TableFault]


def snapshots_as_repaired(storage: Storage, header: Header) -> list[Snapshot]:
    """The snapshots that a repair keeps. Raises CorruptImageError if there can be no table where the header says;
    OSError."""
    return read_snapshot_table(storage, header).snapshots


def too_many(header: Header) -> TableFault | None:
    """What is wrong with the number of snapshots that the header says there are."""
    overhanging = header.snapshot_count - geometry.MAX_SNAPSHOTS
    if overhanging <= 0:
        return None
    detail = f"has {header.snapshot_count} snapshots, more than {geometry.MAX_SNAPSHOTS}"
    return TableFault("snapshots-too-many", detail, "drop those that are too many", count=overhanging)


def read_snapshot_table(storage: Storage, header: Header) -> SnapshotTable:
    """The snapshot table, whatever is in it. Raises as `snapshots_as_repaired` does."""
    start, count = header.snapshots_offset, header.snapshot_count
    if start % header.geometry.cluster_size or start + _FIXED.size * count > geometry.MAX_HOST_OFFSET:
        raise CorruptImageError("snapshot table", "is not where a table can be", host_offset=start, file=storage.path)
    overhanging = too_many(header)
    faults = [] if overhanging is None else [overhanging]
    count = min(count, geometry.MAX_SNAPSHOTS)
    reader = _Reader(storage)
    found: list[Snapshot] = []
    end, packed_size = start, 0
    for index in range(count):
        snapshot, extra_size, after = reader.entry(start + (end - start + 7 & ~7))
        if extra_size > geometry.MAX_SNAPSHOT_EXTRA_SIZE:
            detail = f"entry {index} has {extra_size} bytes of extra data, too many"
            faults.append(TableFault("snapshot-extra-too-large", detail, "cut the extra data", index))
        packed_size = (packed_size + 7 & ~7) + _size_of(snapshot)
        if packed_size > geometry.MAX_SNAPSHOT_TABLE_SIZE or after - start > (1 << 31) - 1:
            detail = f"is too large from entry {index} on"
            fault = TableFault("snapshot-table-too-large", detail, "drop the rest", index, count - index)
            faults.append(fault)
            break
        found.append(snapshot)
        end = after
    return SnapshotTable(found, end - start, faults)


def _size_of(snapshot: Snapshot) -> int:
    return _FIXED.size + len(snapshot.extra) + len(snapshot.id) + len(snapshot.name)


class _Reader:
    """Reads entries, a window of the table at a time."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._start = 0
        self._window = b""

    def entry(self, offset: int) -> tuple[Snapshot, int, int]:
        """The entry at `offset`, with what is allowed of its extra data; how much it has of that, and where it ends."""
        fixed = _FIXED.unpack(self._read(offset, _FIXED.size))
        l1_table_offset, l1_size, id_size, name_size, seconds, nanoseconds, clock, state_size, extra_size = fixed
        extra_start = offset + _FIXED.size
        extra = self._read(extra_start, min(extra_size, geometry.MAX_SNAPSHOT_EXTRA_SIZE))
        id_start = extra_start + extra_size
        names = self._read(id_start, id_size + name_size)
        snapshot = Snapshot(
            l1_table_offset,
            l1_size,
            names[:id_size],
            names[id_size:],
            seconds,
            nanoseconds,
            clock,
            state_size,
            extra,
        )
        return snapshot, extra_size, id_start + len(names)

    def _read(self, offset: int, length: int) -> bytes:
        if offset < self._start or offset + length > self._start + len(self._window):
            window = self._storage.pread(_WINDOW, offset) if offset < self._storage.size() else b""
            self._start, self._window = offset, window + bytes(_WINDOW - len(window))
        return self._window[offset - self._start : offset - self._start + length]
