"""The list of dirty bitmaps: the directory's bytes, its limits, and who may be used."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from qcow2_plugin.engine.dirty_bitmaps import bitmaps as engine
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.errors import CorruptImageError, MissingReferenceError, TruncatedImageError
from qcow2_plugin.format.bitmaps import (
    Bitmap,
    entry_offsets,
    pack_directory,
    parse_directory,
    table_entries_for,
)
from qcow2_plugin.format.header import Header
from tests.support.headers import header_bytes
from tests.support.marked import DIRECTORY, TABLE, marked_image
from tests.support.memory import MemoryStorage

CLUSTER = 65536
SMALL = 512


def bitmap(name: bytes = b"bitmap0", **fields: object) -> Bitmap:
    return replace(Bitmap(0x60000, 1, 0, 1, 16, b"", name), **fields)  # type: ignore[arg-type] # passed on


# ---- the directory


def test_the_fields_of_an_entry() -> None:
    directory = struct.pack(">QIIBBHI", 0x60000, 7, 6, 1, 9, 3, 2) + b"xxabc" + bytes(3)
    (found,) = parse_directory(directory, 1, CLUSTER)
    assert found == Bitmap(0x60000, 7, 6, 1, 9, b"xx", b"abc")
    assert (found.granularity, found.in_use, found.auto) == (512, False, True)
    assert pack_directory([found]) == directory
    assert bitmap(flags=1).in_use
    assert not bitmap(flags=1).auto


@pytest.mark.parametrize("length", range(1, 10))
def test_entries_are_padded_to_multiples_of_8(length: int) -> None:
    told = [bitmap(b"n" * length), bitmap(b"other")]
    directory = pack_directory(told)
    assert len(directory) == (24 + length + 7) // 8 * 8 + 32
    assert parse_directory(directory, 2, CLUSTER) == told
    assert entry_offsets(told) == [0, directory.index(b"other") - 24]


@pytest.mark.parametrize("difference", [-40, -33, -32, -8, -7, -1, 1, 8, 24, 32, 40])
def test_the_directory_has_exactly_the_size_of_its_entries(difference: int) -> None:
    directory = pack_directory([bitmap(), bitmap(b"12345678")])
    changed = directory[:difference] if difference < 0 else directory + bytes(difference)
    with pytest.raises(CorruptImageError, match="bitmap directory"):
        parse_directory(changed, 2, CLUSTER)


@pytest.mark.parametrize("count", [0, 1, 3, 65535])
def test_the_directory_has_exactly_the_count_of_entries(count: int) -> None:
    with pytest.raises(CorruptImageError, match=f"exactly {count} entries"):
        parse_directory(pack_directory([bitmap(), bitmap(b"other")]), count, CLUSTER)


def test_the_padding_of_the_last_entry_counts() -> None:
    directory = pack_directory([bitmap()])
    assert len(directory) == 24 + 7 + 1
    with pytest.raises(CorruptImageError, match="exactly 1 entries"):
        parse_directory(directory[:-1], 1, CLUSTER)


def test_nothing_behind_the_last_entry_is_looked_at() -> None:
    with pytest.raises(CorruptImageError, match="exactly 1 entries"):
        parse_directory(pack_directory([bitmap(), bitmap(b"bad", table_offset=3)]), 1, CLUSTER)


@pytest.mark.parametrize("extra_size", [8, 2**31, 2**32 - 1])
def test_an_entry_must_not_run_past_the_directory(extra_size: int) -> None:
    directory = struct.pack(">QIIBBHI", 0x60000, 1, 0, 1, 16, 8, extra_size) + b"12345678"
    with pytest.raises(CorruptImageError, match="entry 0 runs past the end"):
        parse_directory(directory, 1, CLUSTER)


def test_names_are_unique() -> None:
    with pytest.raises(CorruptImageError, match="entry 1 has the name of another"):
        parse_directory(pack_directory([bitmap(), bitmap()]), 2, CLUSTER)


@pytest.mark.parametrize(
    ("fields", "sound"),
    [
        ({"name": b""}, False),
        ({"name": b"n"}, True),
        ({"name": b"n" * 1023}, True),
        ({"name": b"n" * 1024}, False),
        ({"table_offset": 0}, False),
        ({"table_offset": 0x60008}, False),
        ({"table_offset": 0x60000 + 512}, False),
        ({"table_offset": 2**63 - CLUSTER}, True),
        ({"table_offset": 2**63 - CLUSTER, "table_entries": 8191}, True),
        ({"table_offset": 2**63 - CLUSTER, "table_entries": 8192}, False),
        ({"table_offset": 2**63}, False),
        ({"table_offset": 2**64 - CLUSTER}, False),
        ({"table_entries": 0}, False),
        ({"table_entries": 0x8000000}, True),
        ({"table_entries": 0x8000001}, False),
        ({"table_entries": 2**32 - 1}, False),
        ({"granularity_bits": 0}, True),  # well formed, though not usable
        ({"granularity_bits": 255}, True),
        ({"flags": 2**32 - 1}, True),
        ({"type": 255}, True),
        ({"extra": b"x" * 100}, True),
    ],
)
def test_the_limits_of_an_entry(fields: dict[str, object], sound: bool) -> None:
    told = [bitmap(b"before"), bitmap(**fields)]  # type: ignore[arg-type] # passed on
    if sound:
        assert parse_directory(pack_directory(told), 2, CLUSTER) == told
    else:
        with pytest.raises(CorruptImageError, match="entry 1 has "):
            parse_directory(pack_directory(told), 2, CLUSTER)


# ---- may it be used?


@pytest.mark.parametrize(
    ("virtual_size", "granularity_bits", "cluster_size", "entries"),
    [
        (0, 16, CLUSTER, 0),
        (1, 16, CLUSTER, 1),
        (CLUSTER * 8 << 16, 16, CLUSTER, 1),
        ((CLUSTER * 8 << 16) + 1, 16, CLUSTER, 2),
        (512 * 8 * 512, 9, SMALL, 1),
        (512 * 8 * 512 + 512, 9, SMALL, 2),
        (512 * 8 * 512 * 3, 9, SMALL, 3),
    ],
)
def test_the_table_has_room_for_every_bit(
    virtual_size: int, granularity_bits: int, cluster_size: int, entries: int
) -> None:
    assert table_entries_for(virtual_size, granularity_bits, cluster_size) == entries


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"flags": 2}, None),
        ({"flags": 1}, "in use"),
        ({"flags": 3}, "in use"),
        ({"flags": 8}, "flags 0x8"),
        ({"flags": 1 << 31}, "flags"),
        ({"type": 0}, "type 0"),
        ({"type": 2}, "type 2"),
        ({"extra": b"x"}, "extra data"),
        ({"extra": b"x", "flags": 4}, None),
        ({"flags": 4}, None),
        ({"granularity_bits": 0}, "granularity"),
        ({"granularity_bits": 8}, "granularity"),
        ({"granularity_bits": 9}, None),
        ({"granularity_bits": 31}, None),
        ({"granularity_bits": 32}, "granularity"),
        ({"granularity_bits": 63}, "granularity"),
        ({"granularity_bits": 255}, "granularity"),
        ({"table_entries": 2}, "size"),
        ({"table_entries": 8192}, "size"),
        ({"table_entries": 8193}, "too large"),
    ],
)
def test_why_a_bitmap_must_not_be_used(fields: dict[str, object], reason: str | None) -> None:
    said = bitmap(**fields).unusable_reason(1 << 20, CLUSTER)  # type: ignore[arg-type] # passed on
    assert (said is None) == (reason is None)
    assert reason is None or reason in str(said)


def test_a_bitmap_of_another_disk_size_must_not_be_used() -> None:
    covered = CLUSTER * 8 << 16
    assert bitmap().unusable_reason(covered, CLUSTER) is None
    assert bitmap().unusable_reason(covered + 512, CLUSTER) == "its size does not fit the disk"
    assert bitmap(table_entries=2).unusable_reason(covered + 512, CLUSTER) is None


# ---- from a file


def test_bitmaps_are_read_from_the_file() -> None:
    storage = marked_image([0, 1, 0], flags=2)
    (found,) = engine.read_bitmaps(storage, read_header(storage))
    assert found == Bitmap(TABLE, 3, 2, 1, 9, b"", b"bitmap0")
    assert engine.find([found], "bitmap0", "x") is found
    assert engine.find([found], b"bitmap0", "x") is found
    with pytest.raises(MissingReferenceError, match=r'no bitmap "\\x07" \(disk\)'):
        engine.find([found], "\x07", "disk")


def test_an_image_without_bitmaps_has_none() -> None:
    header = header_bytes()
    assert engine.read_bitmaps(MemoryStorage(header), Header.parse(header)) == []


def test_a_directory_past_the_end_of_the_file_is_truncated() -> None:
    storage = marked_image([0, 1, 0])
    header = read_header(storage)
    del storage.content[DIRECTORY + 31 :]
    with pytest.raises(TruncatedImageError, match=r"bitmap directory at host offset 0x5000: .*\(memory\)"):
        engine.read_bitmaps(storage, header)


def test_a_bad_directory_names_the_file() -> None:
    storage = marked_image([0, 1, 0], table_offset=3)
    with pytest.raises(CorruptImageError, match=r"bitmap directory: entry 0 .*\(memory\)"):
        engine.read_bitmaps(storage, read_header(storage))
