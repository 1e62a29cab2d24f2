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
    offsets = entries & np.uint64(TABLE_OFFSET_MASK)
    bad = (entries & np.uint64(TABLE_RESERVED)) != 0
    bad |= (offsets & np.uint64(cluster_size - 1)) != 0
    bad |= (offsets != 0) & ((entries & np.uint64(TABLE_ALL_ONES)) != 0)
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        raise CorruptImageError("bitmap table", f"entry {index} is {int(entries[index]):#x}")


def runs_of_bits(bits: bytes) -> list[tuple[int, int, bool]]:
    """The runs (first bit, bit count, value) of packed bits, lowest bit of a byte first, covering all of them."""
    values = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")
    if not values.size:
        return []
    starts = np.concatenate(([0], np.flatnonzero(values[1:] != values[:-1]) + 1))
    counts = np.diff(starts, append=values.size)
    is_set = values[starts] != 0
    return list(zip(starts.tolist(), counts.tolist(), is_set.tolist(), strict=True))
