"""The snapshot table: its bytes, its limits, and what is read from an image file."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from qcow2_plugin.engine.internal_snapshots import snapshots as engine
from qcow2_plugin.errors import CorruptImageError, MissingReferenceError, TruncatedImageError
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.snapshots import MIN_ENTRY_SIZE, Snapshot, find, pack_table, parse_entries
from tests.support.headers import header_bytes
from tests.support.memory import MemoryStorage

TABLE = 0x50000


def snapshot(id: bytes = b"1", name: bytes = b"first", extra: bytes = b"") -> Snapshot:
    return Snapshot(0x70000, 1, id, name, 1_700_000_000, 5, 7, 9, extra)


def extra(state: int = 0, size: int = 1 << 20, icount: int = 2**64 - 1) -> bytes:
    return struct.pack(">QQQ", state, size, icount)


def image(table: bytes, count: int, *, pad: int = 0) -> tuple[MemoryStorage, Header]:
    header = header_bytes(nb_snapshots=count, snapshots_offset=TABLE)
    return MemoryStorage(header.ljust(TABLE, b"\0") + table + bytes(pad)), Header.parse(header)


# ---- bytes


def test_the_fields_of_an_entry() -> None:
    fixed = struct.pack(">QIHHIIQII", 0x70000, 3, 1, 5, 1_700_000_000, 5, 7, 9, 16)
    table = fixed + struct.pack(">QQ", 11, 4096) + b"1first" + bytes(2)
    assert MIN_ENTRY_SIZE == len(fixed) == 40
    (found,), used = parse_entries(table, 1)
    assert found == Snapshot(0x70000, 3, b"1", b"first", 1_700_000_000, 5, 7, 9, struct.pack(">QQ", 11, 4096))
    assert used == len(table)
    assert pack_table([found]) == table[:-2]


@pytest.mark.parametrize("length", [0, 8, 15, 16, 23, 24, 25, 32, 1023, 1024])
def test_extra_data_has_any_length(length: int) -> None:
    table = pack_table([snapshot(extra=bytes(length)), snapshot(b"2", b"name")])
    found, _ = parse_entries(table, 2)
    assert [len(found[0].extra), found[1].id] == [length, b"2"]
    assert pack_table(found) == table


@pytest.mark.parametrize("length", [1025, 2**32 - 1])
def test_too_much_extra_data_is_corrupt(length: int) -> None:
    table = struct.pack(">QIHHIIQII", 0x70000, 1, 1, 1, 0, 0, 0, 0, length) + bytes(4096)
    with pytest.raises(CorruptImageError, match=f"{length} bytes of extra data"):
        parse_entries(table, 1)


@pytest.mark.parametrize("name_length", range(9))
def test_entries_start_at_multiples_of_8(name_length: int) -> None:
    first, second = snapshot(name=b"n" * name_length), snapshot(b"2")
    table = pack_table([first, second])
    start = (40 + 1 + name_length + 7) // 8 * 8
    assert table[start : start + 8] == (0x70000).to_bytes(8, "big")
    assert parse_entries(table, 2)[0] == [first, second]


def test_entries_that_are_cut_off_are_left_for_later() -> None:
    table = pack_table([snapshot(), snapshot(b"2", b"second")])
    assert parse_entries(table[:-1], 2) == ([snapshot()], 48)
    assert parse_entries(table[: 48 + 39], 2) == ([snapshot()], 48)
    assert parse_entries(table[:39], 2) == ([], 0)
    assert parse_entries(b"", 2) == ([], 0)
    assert parse_entries(table, 1) == ([snapshot()], 48)
    assert parse_entries(table, 0) == ([], 0)


# ---- meanings


def test_the_64_bit_state_size_wins() -> None:
    assert snapshot().vm_state_size == 9
    assert snapshot(extra=bytes(7)).vm_state_size == 9
    assert snapshot(extra=struct.pack(">Q", 2**40)).vm_state_size == 2**40
    assert snapshot(extra=bytes(8)).vm_state_size == 0


def test_a_snapshot_has_a_disk_size_of_its_own() -> None:
    assert snapshot(extra=extra(size=7777)).virtual_size(1 << 20) == 7680
    assert snapshot(extra=bytes(15)).virtual_size(1 << 20) == 1 << 20
    assert snapshot().virtual_size(1 << 20) == 1 << 20


def test_icount() -> None:
    assert snapshot(extra=extra(icount=12)).icount == 12
    assert snapshot(extra=extra(icount=0)).icount == 0
    assert snapshot(extra=extra()).icount is None
    assert snapshot(extra=bytes(23)).icount is None


def test_an_id_shadows_a_name() -> None:
    named, by_id, same_name = snapshot(b"7", b"1"), snapshot(b"1", b"x"), snapshot(b"8", b"1")
    assert find([named, by_id, same_name], "1") is by_id
    assert find([named, same_name], "1") is named
    assert find([named, by_id], b"7") is named
    assert find([named, by_id], "first") is None


def test_names_need_not_be_text() -> None:
    odd = snapshot(name=b"\xff\xfe")
    assert find([odd], b"\xff\xfe") is odd
    assert find([odd], "\udcff\udcfe") is odd


# ---- from a file


def test_no_snapshots() -> None:
    assert engine.read_snapshots(*image(b"", 0)) == []


def test_snapshots_are_read_in_table_order() -> None:
    told = [snapshot(str(index).encode(), b"n" * index, extra()) for index in range(50)]
    storage, header = image(pack_table(told), 50)
    assert engine.read_snapshots(storage, header) == told
    assert engine.read_snapshots(storage, header, limit=3) == told[:3]
    assert engine.read_snapshots(storage, header, limit=51) == told
    assert engine.read_snapshots(storage, header, limit=0) == []


def test_a_table_longer_than_one_look_is_read_to_its_end() -> None:
    told = [snapshot(str(index).encode(), b"n" * 60000, bytes(1000)) for index in range(40)]
    assert engine.read_snapshots(*image(pack_table(told), 40)) == told


@pytest.mark.parametrize("missing", [1, 6, 45, 46, 47, 94, 95])
def test_a_table_past_the_end_of_the_file_is_truncated(missing: int) -> None:
    table = pack_table([snapshot(), snapshot(b"2", b"second")])
    storage, header = image(table[: len(table) - missing], 2)
    with pytest.raises(TruncatedImageError, match=r"snapshot table at host offset 0x50000: entry [01] of 2 .*memory"):
        engine.read_snapshots(storage, header)


def test_a_table_of_more_than_64_mib_is_corrupt() -> None:
    entry = snapshot(b"i" * 65535, b"n" * 65535)
    packed = pack_table([entry, entry])[: -len(pack_table([entry]))]
    count = (64 << 20) // len(packed)
    storage, header = image(packed * (count + 1), count)
    assert len(engine.read_snapshots(storage, header)) == count
    with pytest.raises(CorruptImageError, match="too large"):
        engine.read_snapshots(storage, replace(header, snapshot_count=count + 1))


def test_extra_data_of_nonsense_names_the_file() -> None:
    table = struct.pack(">QIHHIIQII", 0x70000, 1, 1, 1, 0, 0, 0, 0, 1025)
    with pytest.raises(CorruptImageError, match=r"\(memory\)$"):
        engine.read_snapshots(*image(table, 1))


def test_a_snapshot_that_is_not_there_is_said_to_be_missing() -> None:
    assert engine.find([snapshot()], "first", "disk.qcow2") == snapshot()
    with pytest.raises(MissingReferenceError, match=r'no internal snapshot "\\x1b1" \(disk\.qcow2\)'):
        engine.find([snapshot()], "\x1b1", "disk.qcow2")


@pytest.mark.parametrize(
    ("offset", "l1_size", "size", "problem"),
    [
        (0x50000, 1, 1 << 20, None),
        (0x50000, 4 << 20, 1 << 20, "past the end"),
        (0x50000, (4 << 20) + 1, 1 << 20, "too many"),
        (0x50000, 2**32 - 1, 1 << 20, "too many"),
        (0x50000, 0, 0, None),
        (0x50000, 0, 512, "too few"),
        (0x50000, 1, 65536 * 8192, None),
        (0x50000, 1, 65536 * 8192 + 512, "too few"),
        (0x50000, 1, 2**64 - 1, "too few"),
        (0x50001, 1, 1 << 20, "not at the start of a cluster"),
        (0, 1, 1 << 20, "not at the start of a cluster"),
        (0, 0, 0, None),
        (2**62, 1, 1 << 20, "past the end"),
        (0x60000 - 0x10000, 8192, 1 << 20, None),
        (0x60000 - 0x10000, 8193, 1 << 20, "past the end"),
    ],
)
def test_the_l1_table_of_a_snapshot_is_held_against_its_limits(
    offset: int, l1_size: int, size: int, problem: str | None
) -> None:
    storage, header = image(b"", 1, pad=0x10000)
    wanted = replace(snapshot(extra=extra(size=size)), l1_table_offset=offset, l1_size=l1_size)
    if problem is None:
        engine.check_l1_table(wanted, storage, header, allow_damaged=False)
        return
    with pytest.raises(CorruptImageError, match=problem) as caught:
        engine.check_l1_table(wanted, storage, header, allow_damaged=False)
    assert isinstance(caught.value, TruncatedImageError) == (problem == "past the end")
    assert caught.value.host_offset == offset


def test_a_damaged_image_may_lack_the_l1_table_of_a_snapshot() -> None:
    storage, header = image(b"", 1)
    engine.check_l1_table(snapshot(extra=extra()), storage, header, allow_damaged=True)


@pytest.mark.parametrize("offset", [2**63 - 65536, 2**63, 2**64 - 65536])
def test_no_l1_table_lies_where_no_file_reaches(offset: int) -> None:
    storage, header = image(b"", 1)
    wanted = replace(snapshot(extra=extra()), l1_table_offset=offset, l1_size=8192)
    with pytest.raises(CorruptImageError, match="L1 table of snapshot"):
        engine.check_l1_table(wanted, storage, header, allow_damaged=True)
