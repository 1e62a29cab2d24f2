"""The snapshot table as far as it goes: what is kept of it, and what is wrong with it."""

from __future__ import annotations

import struct

import pytest

from qcow2_plugin.engine.checking.check import read_header_for_check
from qcow2_plugin.engine.checking.damaged_snapshots import SnapshotTable, read_snapshot_table, snapshots_as_repaired
from qcow2_plugin.errors import CorruptImageError
from tests.support.headers import header_bytes
from tests.support.memory import MemoryStorage

PLACE = 4 << 12
ENTRY = struct.Struct(">QIHHIIQII")


def entry(extra: bytes, name: bytes = b"", *, extra_size: int | None = None) -> bytes:
    size = len(extra) if extra_size is None else extra_size
    packed = ENTRY.pack(1 << 16, 7, 1, len(name), 0, 0, 0, 0, size) + extra + b"i" + name
    return packed.ljust(len(packed) + 7 & ~7, b"\0")


def table(content: bytes, count: int) -> SnapshotTable:
    header = header_bytes(cluster_bits=12, snapshots_offset=PLACE, nb_snapshots=count)
    storage = MemoryStorage(header.ljust(PLACE, b"\0") + content)
    found = read_snapshot_table(storage, read_header_for_check(storage))
    assert snapshots_as_repaired(storage, read_header_for_check(storage)) == found.snapshots
    return found


def test_a_sound_table_ends_with_its_last_name() -> None:
    found = table(entry(bytes(24), b"one") + entry(bytes(16), b"two") + b"junk", 2)
    assert [each.name for each in found.snapshots] == [b"one", b"two"]
    assert found.size == 72 + 40 + 16 + 1 + 3
    assert not found.faults


def test_extra_data_is_cut_to_what_is_allowed() -> None:
    found = table(entry(bytes(16), b"a") + entry(b"x" * 1030, b"b") + entry(b"y" * 1024, b"c"), 3)
    assert [(each.name, len(each.extra)) for each in found.snapshots] == [(b"a", 16), (b"b", 1024), (b"c", 1024)]
    assert [(fault.kind, fault.index) for fault in found.faults] == [("snapshot-extra-too-large", 1)]
    assert found.size > 1030 + 1024


def test_past_the_end_of_the_file_are_zeros() -> None:
    found = table(entry(bytes(16), b"a"), 3)
    assert [(each.name, each.l1_size) for each in found.snapshots] == [(b"a", 7), (b"", 0), (b"", 0)]


def test_a_table_that_is_too_large_loses_its_end() -> None:
    found = table(entry(bytes(24), b"n" * 65535) * 1025, 1025)
    assert len(found.snapshots) == (64 << 20) // (40 + 24 + 1 + 65535)
    assert [(fault.kind, fault.index, fault.count) for fault in found.faults] == [("snapshot-table-too-large", 1023, 2)]


def test_extra_data_that_leads_far_away_ends_the_table() -> None:
    found = table(entry(bytes(16), b"a") + entry(b"", extra_size=2**32 - 1) + entry(bytes(16), b"b"), 3)
    assert [each.name for each in found.snapshots] == [b"a"]
    assert [fault.kind for fault in found.faults] == ["snapshot-extra-too-large", "snapshot-table-too-large"]


def test_a_table_that_cannot_be_there() -> None:
    header = header_bytes(cluster_bits=12, snapshots_offset=PLACE + 512, nb_snapshots=1)
    storage = MemoryStorage(header)
    with pytest.raises(CorruptImageError, match="not where a table can be"):
        read_snapshot_table(storage, read_header_for_check(storage))
