"""Refcount table entries and refcount blocks of every width, 1 to 64 bits.

Source: docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

REFCOUNT_TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
_SCAN = 4096
"""Refcounts looked at together for a free one."""


def unpack_block(block: bytes | memoryview, refcount_order: int) -> npt.NDArray[np.uint64]:
    """The refcounts of a block in cluster order; entries narrower than a byte start at its lowest bits."""
    if refcount_order >= 3:
        width = 1 << refcount_order - 3
        return np.frombuffer(block, dtype=f">u{width}").astype(np.uint64)
    bits = np.unpackbits(np.frombuffer(block, dtype=np.uint8), bitorder="little")
    weights = np.array([1 << position for position in range(1 << refcount_order)], dtype=np.uint64)
    return bits.reshape(-1, 1 << refcount_order).astype(np.uint64) @ weights


def pack_block(refcounts: npt.NDArray[np.uint64], refcount_order: int) -> bytes:
    """The inverse of `unpack_block`. Raises OverflowError if a refcount does not fit the width."""
    bits = 1 << refcount_order
    if bits < 64 and refcounts.size and int(refcounts.max()) >> bits:
        raise OverflowError(f"refcount {int(refcounts.max())} does not fit {bits} bits")
    if refcount_order >= 3:
        return refcounts.astype(f">u{bits // 8}").tobytes()
    positions = np.arange(bits, dtype=np.uint64)
    as_bits = (refcounts[:, np.newaxis] >> positions & np.uint64(1)).astype(np.uint8)
    return np.packbits(as_bits.reshape(-1), bitorder="little").tobytes()


def last_used(block: bytes, refcount_order: int) -> int | None:
    """Index of the last refcount of a block that is not 0, None if all are."""
    used = block.rstrip(b"\0")
    if not used:
        return None
    if refcount_order >= 3:
        return len(used) - 1 >> refcount_order - 3
    last_bit = 8 * (len(used) - 1) + used[-1].bit_length() - 1
    return last_bit >> refcount_order


def count_used(block: bytes | memoryview, refcount_order: int, count: int) -> int:
    """How many of the first `count` refcounts of a block are not 0; those that it lacks are 0."""
    if refcount_order >= 3:
        width = 1 << refcount_order - 3
        refcounts = np.frombuffer(block, dtype=f">u{width}", count=min(count, len(block) // width))
        return int(np.count_nonzero(refcounts))
    per_byte = 8 >> refcount_order
    in_bytes = np.frombuffer(block, dtype=np.uint8, count=min(-(-count // per_byte), len(block)))
    bits = np.unpackbits(in_bytes, bitorder="little").reshape(-1, 1 << refcount_order)
    return int(np.count_nonzero(bits[:count].any(axis=1)))


def by_block(clusters: npt.NDArray[np.int64], per_block: int) -> list[tuple[int, int, int]]:
    """(index of the block, start, stop) of the parts of ascending `clusters` that one refcount block describes."""
    if not len(clusters):
        return []
    blocks = clusters // per_block
    starts = np.concatenate(([0], np.flatnonzero(blocks[1:] != blocks[:-1]) + 1))
    stops = np.append(starts[1:], len(clusters))
    return list(zip(blocks[starts].tolist(), starts.tolist(), stops.tolist(), strict=True))


def runs_of(clusters: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """(first, count) of the runs of ascending, distinct clusters."""
    if not len(clusters):
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(clusters) != 1) + 1))
    counts = np.diff(starts, append=len(clusters))
    return list(zip(clusters[starts].tolist(), counts.tolist(), strict=True))


def first_free_run(refcounts: npt.NDArray[Any], start: int) -> tuple[int, int] | None:
    """(index, count) of the first run of zeros at or behind `start`, None if there is none.

    `refcounts` are those of a block, of any integer type.
    """
    size = len(refcounts)
    while start < size:
        window = refcounts[start : start + _SCAN]
        first = int((window == 0).argmax())
        if window[first] == 0:
            start += first
            break
        start += len(window)
    else:
        return None
    end = start
    while end < size:
        window = refcounts[end : end + _SCAN]
        used = int((window != 0).argmax())
        if window[used] != 0:
            return start, end + used - start
        end += len(window)
    return start, size - start
