"""The ranges that a dirty bitmap marks. One cluster of bits covers COVERED bytes of the disk."""

from __future__ import annotations

from itertools import islice

import pytest

from qcow2_plugin.engine.dirty_bitmaps.bitmaps import read_bitmaps
from qcow2_plugin.engine.dirty_bitmaps.dirty import DirtyBitmap
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.errors import CorruptImageError, TruncatedImageError
from tests.support.marked import BITS, COVERED, marked_image
from tests.support.memory import MemoryStorage


def opened(storage: MemoryStorage) -> DirtyBitmap:
    header = read_header(storage)
    return DirtyBitmap(storage, header, read_bitmaps(storage, header)[0])


def ranges(
    table: list[int], data: bytes = b"", *, size: int = 3 * COVERED, offset: int = 0, length: int | None = None
) -> list[tuple[int, int]]:
    dirty = opened(marked_image(table, data, size))
    return list(dirty.ranges(offset, size - offset if length is None else length))


def test_a_table_word_stands_for_a_whole_cluster_of_bits() -> None:
    assert ranges([0, 0, 0]) == []
    assert ranges([1, 1, 1]) == [(0, 3 * COVERED)]
    assert ranges([0, 1, 0]) == [(COVERED, COVERED)]
    assert ranges([1, 0, 1]) == [(0, COVERED), (2 * COVERED, COVERED)]


def test_bits_mark_granules() -> None:
    bits = b"\x06" + bytes(510) + b"\x80"
    assert ranges([BITS, 1, BITS], bits) == [
        (512, 1024),
        (COVERED - 512, COVERED + 512),
        (2 * COVERED + 512, 1024),
        (3 * COVERED - 512, 512),
    ]


def test_bits_behind_the_disk_mark_nothing() -> None:
    size = 2 * COVERED + 1024
    assert ranges([0, 0, 1], size=size) == [(2 * COVERED, 1024)]
    assert ranges([0, 0, BITS], b"\xfe" + b"\xff" * 511, size=size) == [(2 * COVERED + 512, 512)]


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 0, []),
        (COVERED, 0, []),
        (512, 512, [(512, 512)]),
        (600, 10, [(600, 10)]),
        (0, 513, [(512, 1)]),
        (1535, 2, [(1535, 1)]),
        (1536, COVERED, [(COVERED, 1536)]),
        (COVERED - 1, 2, [(COVERED, 1)]),
        (2 * COVERED - 1, 1, [(2 * COVERED - 1, 1)]),
        (2 * COVERED, COVERED, []),
        (3 * COVERED, 0, []),
    ],
)
def test_ranges_are_cut_to_what_was_asked(offset: int, length: int, expected: list[tuple[int, int]]) -> None:
    assert ranges([BITS, 1, 0], b"\x06" + bytes(511), offset=offset, length=length) == expected


def test_only_the_needed_part_of_the_table_is_read() -> None:
    dirty = opened(marked_image([2, 1, 2]))
    assert list(dirty.ranges(COVERED, COVERED)) == [(COVERED, COVERED)]
    with pytest.raises(CorruptImageError, match=r"bitmap table: entry 0 is 0x2 \(memory\)"):
        list(dirty.ranges(0, 1))


@pytest.mark.parametrize(
    ("fields", "reason"), [({"flags": 1}, "it is in use"), ({"type": 2}, "its type 2"), ({"table_size": 2}, "its size")]
)
def test_a_bitmap_that_must_not_be_used_is_refused_at_once(fields: dict[str, int], reason: str) -> None:
    with pytest.raises(CorruptImageError, match=rf'"bitmap0" cannot be used: {reason} .*\(memory\)'):
        opened(marked_image([0, 1, 0], b"", **fields))


def test_bits_past_the_end_of_the_file_are_truncated() -> None:
    dirty = opened(marked_image([1, 0, BITS], bytes(511)))
    assert list(dirty.ranges(0, 2 * COVERED)) == [(0, COVERED)]
    with pytest.raises(TruncatedImageError, match=r'bitmap "bitmap0" at host offset 0x6000: .*\(memory\)'):
        list(dirty.ranges(0, 3 * COVERED))


def test_a_table_past_the_end_of_the_file_is_truncated() -> None:
    storage = marked_image([1, 0, 0], table_offset=0x7000)
    dirty = opened(storage)
    del storage.content[0x7000 + 23 :]
    assert list(dirty.ranges(0, 2 * COVERED)) == [(0, COVERED)]
    with pytest.raises(TruncatedImageError, match="bitmap table"):
        list(dirty.ranges(0, 3 * COVERED))


def test_a_long_table_is_read_piece_by_piece() -> None:
    count = 20000
    dirty = opened(marked_image([index % 2 for index in range(count)], size=count * COVERED, table_offset=0x1000000))
    expected = [(index * COVERED, COVERED) for index in range(1, count, 2)]
    marked = dirty.ranges(0, count * COVERED)
    assert list(islice(marked, 3)) == expected[:3]
    assert list(marked) == expected[3:]
    last = count * COVERED - 1
    assert list(dirty.ranges(last, 1)) == [(last, 1)]
