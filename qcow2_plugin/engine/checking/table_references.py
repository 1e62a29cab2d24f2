"""Which L2 tables there are, and how often the L1 tables of the disk and of snapshots name each.

A table is known by its host offset. What it says is looked at once, however many name it (`check_tables`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcow2_plugin.errors import UnsupportedFeatureError

Array = npt.NDArray[np.int64]

MAX_TABLES = 1 << 23
"""L2 tables of an image and its snapshots, twice as many as a disk can have. Each takes 32 bytes, and four times as
much while they are counted."""
_BUFFERED = 1 << 20
"""References kept one by one before they are counted."""
_NO_INDEX = np.iinfo(np.int64).max


class Tables(NamedTuple):
    """Distinct L2 tables in the order of their host offsets."""

    offsets: Array
    times: Array
    """How often each is named, by any L1 table."""
    active_times: Array
    """How often by that of the active disk."""
    l1_indexes: Array
    """Where that names it first; meaningless where it does not."""


class TableReferences:
    """Collects references to L2 tables, and counts them as they come."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._tables = Tables(*(np.zeros(0, dtype=np.int64) for _ in range(4)))
        self._waiting: list[Tables] = []
        self._waiting_count = 0

    def add(self, offsets: Array, times: int, l1_indexes: Array | None) -> None:
        """So many references to each L2 table at `offsets`; `l1_indexes` where it is the active disk that refers.

        Raises UnsupportedFeatureError if there are too many tables.
        """
        counts = np.full(len(offsets), times, dtype=np.int64)
        if l1_indexes is None:
            none = np.zeros(len(offsets), dtype=np.int64)
            self._waiting.append(Tables(offsets, counts, none, none + _NO_INDEX))
        else:
            self._waiting.append(Tables(offsets, counts, counts, l1_indexes))
        self._waiting_count += len(offsets)
        if self._waiting_count > _BUFFERED:
            self._settle()

    def tables(self) -> Tables:
        """All that were named."""
        self._settle()
        return self._tables

    def _settle(self) -> None:
        if not self._waiting:
            return
        together = Tables(*(np.concatenate(column) for column in zip(self._tables, *self._waiting, strict=True)))
        offsets, inverse = np.unique(together.offsets, return_inverse=True)
        inverse = inverse.reshape(-1)
        times, active_times = np.zeros(len(offsets), dtype=np.int64), np.zeros(len(offsets), dtype=np.int64)
        np.add.at(times, inverse, together.times)
        np.add.at(active_times, inverse, together.active_times)
        l1_indexes = np.full(len(offsets), _NO_INDEX, dtype=np.int64)
        np.minimum.at(l1_indexes, inverse, together.l1_indexes)
        self._tables = Tables(offsets, times, active_times, l1_indexes)
        self._waiting, self._waiting_count = [], 0
        if len(offsets) > MAX_TABLES:
            raise UnsupportedFeatureError(
                f"the image has more than {MAX_TABLES} L2 tables, too many to check", file=self._path
            )
