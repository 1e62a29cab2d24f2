"""What a dirty bitmap marks: bitmap tables and packed bits, as arrays.

Source: docs/interop/qcow2.rst, "Bitmaps".
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcow2_plugin.errors import CorruptImageError

TABLE_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
TABLE_ALL_ONES = 1
TABLE_RESERVED = ~(TABLE_OFFSET_MASK | TABLE_ALL_ONES) & (1 << 64) - 1


def check_table(entries: npt.NDArray[np.uint64], cluster_size: int) -> None:
    """Raises CorruptImageError unless every entry of a bitmap table is well formed."""
    bad = np.flatnonzero(~is_sound(entries, cluster_size))
    if bad.size:
        index = int(bad[0])
        raise CorruptImageError("bitmap table", f"entry {index} is {int(entries[index]):#x}")


def is_sound(entries: npt.NDArray[np.uint64], cluster_size: int) -> npt.NDArray[np.bool_]:
    """For each entry of a bitmap table whether it is well formed."""
    offsets = entries & np.uint64(TABLE_OFFSET_MASK)
    sound: npt.NDArray[np.bool_] = (entries & np.uint64(TABLE_RESERVED)) == 0
    sound &= (offsets & np.uint64(cluster_size - 1)) == 0
    sound &= (offsets == 0) | ((entries & np.uint64(TABLE_ALL_ONES)) == 0)
    return sound


def runs_of_bits(bits: bytes) -> list[tuple[int, int, bool]]:
    """The runs (first bit, bit count, value) of packed bits, lowest bit of a byte first, covering all of them."""
    values = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")
    if not values.size:
        return []
    starts = np.concatenate(([0], np.flatnonzero(values[1:] != values[:-1]) + 1))
    counts = np.diff(starts, append=values.size)
    is_set = values[starts] != 0
    return list(zip(starts.tolist(), counts.tolist(), is_set.tolist(), strict=True))


def set_bits(packed: bytearray, start: int, stop: int) -> None:
    """Set bit `start` and those behind it up to `stop`, exclusive; there is at least one."""
    first, last, head, tail = _bytes_and_masks(start, stop)
    if first == last:
        packed[first] |= head & tail
        return
    packed[first] |= head
    packed[first + 1 : last] = b"\xff" * (last - first - 1)
    packed[last] |= tail


def are_set(packed: bytearray, start: int, stop: int) -> bool:
    """True if bit `start` and those behind it up to `stop`, exclusive, are set; there is at least one."""
    first, last, head, tail = _bytes_and_masks(start, stop)
    if first == last:
        return packed[first] & head & tail == head & tail
    if packed[first] & head != head or packed[last] & tail != tail:
        return False
    return packed.count(0xFF, first + 1, last) == last - first - 1


def clear_from(packed: bytearray, start: int) -> None:
    """Clear bit `start` and everything behind it."""
    first, kept = start >> 3, (1 << (start & 7)) - 1
    packed[first] &= kept
    packed[first + 1 :] = bytes(len(packed) - first - 1)


def _bytes_and_masks(start: int, stop: int) -> tuple[int, int, int, int]:
    """The first and last byte that bits `start` to `stop` touch, and which bits of them are meant."""
    last_bit = stop - 1
    return start >> 3, last_bit >> 3, 0xFF << (start & 7) & 0xFF, 0xFF >> 7 - (last_bit & 7)
