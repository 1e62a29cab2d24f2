"""Refcount blocks of every width."""

from __future__ import annotations

import numpy as np
import pytest

from qcow2_plugin.format.refcounts import last_used, pack_block, unpack_block


@pytest.mark.parametrize(
    ("order", "first_bytes"),
    [(0, "0f"), (1, "55"), (2, "1111"), (3, "01010101"), (4, "0001" * 4), (5, "00000001" * 4), (6, "0" * 15 + "1")],
)
def test_the_blocks_that_qemu_writes_for_four_clusters_in_use(order: int, first_bytes: str) -> None:
    block = bytes.fromhex(first_bytes).ljust(512, b"\0")
    counts = unpack_block(block, order)
    used = 1 if order == 6 else 4
    assert len(counts) == 512 * 8 >> order
    assert counts.dtype == np.uint64
    assert counts[:used].tolist() == [1] * used
    assert not counts[used:].any()
    assert pack_block(counts, order) == block


@pytest.mark.parametrize(
    ("order", "byte", "counts"),
    [
        (0, 0b1000_0001, [1, 0, 0, 0, 0, 0, 0, 1]),
        (0, 0b0000_0010, [0, 1, 0, 0, 0, 0, 0, 0]),
        (1, 0b11_10_01_00, [0, 1, 2, 3]),
        (2, 0x5A, [0xA, 5]),
        (3, 0xFE, [0xFE]),
    ],
)
def test_narrow_counts_start_at_the_low_bits(order: int, byte: int, counts: list[int]) -> None:
    assert unpack_block(bytes([byte]), order).tolist() == counts
    assert pack_block(np.array(counts, dtype=np.uint64), order) == bytes([byte])


def test_wide_counts_are_big_endian() -> None:
    block = bytes(range(1, 9))
    assert unpack_block(block, 4).tolist() == [0x0102, 0x0304, 0x0506, 0x0708]
    assert unpack_block(block, 5).tolist() == [0x01020304, 0x05060708]
    assert unpack_block(memoryview(block), 6).tolist() == [0x0102030405060708]


@pytest.mark.parametrize("order", range(7))
def test_the_largest_count_of_every_width(order: int) -> None:
    largest = 2 ** (2**order) - 1
    counts = np.array([largest] * 8, dtype=np.uint64)
    assert unpack_block(pack_block(counts, order), order).tolist() == [largest] * 8


@pytest.mark.parametrize("order", range(6))
def test_a_count_that_does_not_fit_is_an_error(order: int) -> None:
    counts = np.array([0, 2 ** (2**order)] + [0] * 6, dtype=np.uint64)
    with pytest.raises(OverflowError, match=f"refcount {2 ** (2**order)} does not fit {2**order} bits"):
        pack_block(counts, order)


@pytest.mark.parametrize("order", range(7))
def test_no_counts_are_no_bytes(order: int) -> None:
    assert pack_block(np.array([], dtype=np.uint64), order) == b""
    assert unpack_block(b"", order).tolist() == []


@pytest.mark.parametrize("order", range(7))
def test_the_last_use_of_a_block(order: int) -> None:
    block = bytearray(64)
    assert last_used(bytes(block), order) is None
    for place, byte in ((0, 1), (7, 0x10), (8, 0x80), (31, 0x24), (63, 0xFF)):
        block[place] = byte
        counts = unpack_block(bytes(block), order)
        assert last_used(bytes(block), order) == int(np.flatnonzero(counts)[-1])
