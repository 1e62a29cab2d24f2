"""The mark of a transaction in a header, and its record: what is written is read back, and nothing else is believed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.format.header import EXTENSION_BITMAPS, BitmapsPointer, Header
from qcow2_plugin.format.transaction import (
    AUTOCLEAR_TRANSACTION,
    EXTENSION_TRANSACTION,
    MAX_RECORD_SIZE,
    Mark,
    Record,
    committed,
    mark_of,
    marked,
    unmarked,
)
from tests.support.fields import BITMAPS, Extension
from tests.support.headers import header_bytes

ID = bytes(range(16))
POINTER = BitmapsPointer(2, 96, 0x50000)
MARK = Mark(ID, POINTER, b"bitmaps.transaction")
POINTERS = st.builds(BitmapsPointer, st.integers(1, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
OLD = (1).to_bytes(4, "big") + bytes(4) + (32).to_bytes(8, "big") + (0x60000).to_bytes(8, "big")


def header(*, with_bitmaps: bool = True) -> Header:
    extensions = [Extension(BITMAPS, OLD)] if with_bitmaps else []
    return Header.parse(header_bytes(autoclear_features=int(with_bitmaps), extensions=extensions))


@given(
    st.binary(min_size=16, max_size=16),
    st.none()
    | st.builds(BitmapsPointer, st.integers(1, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    st.binary(min_size=1, max_size=200),
)
def test_a_mark_is_read_back(transaction: bytes, new: BitmapsPointer | None, record: bytes) -> None:
    mark = Mark(transaction, new, record)
    assert Mark.parse(mark.pack()) == mark


@given(st.binary(max_size=200))
def test_any_bytes_are_a_mark_or_refused(data: bytes) -> None:
    try:
        mark = Mark.parse(data)
    except CorruptImageError:
        return
    assert Mark.parse(mark.pack()) == mark


@pytest.mark.parametrize("data", [b"", MARK.pack()[:40], MARK.pack() + bytes(5000), ID + bytes(24) + b"name"])
def test_what_is_no_mark(data: bytes) -> None:
    with pytest.raises(CorruptImageError, match="transaction header extension"):
        Mark.parse(data)


@pytest.mark.parametrize("with_bitmaps", [True, False])
def test_the_way_of_a_header(with_bitmaps: bool) -> None:
    before = header(with_bitmaps=with_bitmaps)
    told = Header.parse(marked(before, MARK).pack())
    assert mark_of(told) == MARK
    assert told.bitmaps == before.bitmaps
    assert told.autoclear_features & AUTOCLEAR_TRANSACTION
    assert Header.parse(unmarked(told).pack()) == before
    new = Header.parse(committed(told, MARK).pack())
    assert new.bitmaps == POINTER
    assert mark_of(new) is None
    assert new.extension_data(EXTENSION_TRANSACTION) is None
    assert new.autoclear_features == 1


def test_the_last_bitmap_goes() -> None:
    mark = MARK._replace(new=None)
    new = committed(marked(header(), mark), mark)
    assert (new.bitmaps, new.autoclear_features, new.extension_data(EXTENSION_BITMAPS)) == (None, 0, None)


def test_a_mark_without_its_bit_is_void_and_can_be_replaced() -> None:
    told = marked(header(), MARK)
    void = Header.parse(header_bytes(autoclear_features=1, extensions=[Extension(EXTENSION_TRANSACTION, MARK.pack())]))
    assert mark_of(void) is None
    other = MARK._replace(id=bytes(16))
    assert mark_of(marked(void, other)) == other
    assert [each.type for each in marked(told, other).extensions].count(EXTENSION_TRANSACTION) == 1


@pytest.mark.parametrize(
    "new", [BitmapsPointer(1, 32, 512), BitmapsPointer(1, 0, 0x50000), BitmapsPointer(70000, 32, 0)]
)
def test_a_pointer_that_can_be_none_is_refused(new: BitmapsPointer) -> None:
    mark = MARK._replace(new=new)
    with pytest.raises(CorruptImageError):
        committed(marked(header(), mark), mark)


# ---- the record

RECORD = Record(ID, False, ("a.qcow2", "/b/c.qcow2", "\udcff"), "2026-01-01T00:00:00Z")


@pytest.mark.parametrize("is_committed", [True, False])
def test_a_record_is_read_back(is_committed: bool) -> None:
    record = Record(ID, is_committed, RECORD.images, RECORD.begun)
    assert Record.parse(record.pack()) == record
    assert record.pack().isascii()


@given(st.binary(max_size=300))
def test_any_bytes_are_no_record(content: bytes) -> None:
    with pytest.raises(CorruptImageError):
        Record.parse(content)


@pytest.mark.parametrize(
    "change",
    [
        {"title": "other"},
        {"state": "done"},
        {"state": None},
        {"id": 5},
        {"id": "0011"},
        {"id": "zz" * 16},
        {"begun": None},
        {"images": None},
        {"images": "a"},
        {"images": ["a", 5]},
        {"images": [""]},
        {"images": ["a\0b"]},
        {"images": ["\ud800"]},
    ],
)
def test_what_is_no_record(change: dict[str, object]) -> None:
    told = json.loads(RECORD.pack()) | change
    with pytest.raises(CorruptImageError, match="transaction record"):
        Record.parse(json.dumps(told).encode())


@pytest.mark.parametrize("content", [b"[]", b"null", b"[" * 100_000, b" " * (MAX_RECORD_SIZE + 1), b"{}"])
def test_odd_json(content: bytes) -> None:
    with pytest.raises(CorruptImageError, match="transaction record"):
        Record.parse(content)
