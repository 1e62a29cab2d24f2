"""References: how often each cluster of an image file is referred to.

One number a cluster, as narrow as the image's refcounts are (but a byte at least), so that counted and stored refcounts
can be held against each other as arrays. A count never grows past what a refcount can say; references beyond that are
told to whoever adds them, and are not in the number.

What names a cluster, and what of it is a mistake, is not asked here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qcow2_plugin.errors import UnsupportedFeatureError
from qcow2_plugin.format.header import Header
from qcow2_plugin.storage import Storage

Clusters = npt.NDArray[np.int64]
Counts = npt.NDArray[Any]
"""Unsigned integers, as wide as refcounts."""

MAX_CLUSTERS = 1 << 28
"""Clusters of a file in which references are counted, holes included: 16 TiB with clusters of 64 KiB."""
_DENSE = 4
"""Clusters spread over no more than so many times their number are counted side by side."""


class Excess(NamedTuple):
    """References that are too many to be counted."""

    clusters: Clusters
    counts: npt.NDArray[np.uint64]
    """How many are lost, for each cluster."""


class Range(NamedTuple):
    """`times` structures cover `start` up to `stop`, exclusive."""

    start: int
    stop: int
    times: int


class References:
    """Counts references to the clusters of a file.

    The cluster behind the end can be referred to as well, because a file may end inside a structure; `counts` has it
    from then on.
    """

    def __init__(self, cluster_count: int, refcount_order: int) -> None:
        self.maximum = (1 << (1 << refcount_order)) - 1
        self._counts: Counts = np.zeros(cluster_count + 1, dtype=count_type(refcount_order))
        self._length = cluster_count

    @classmethod
    def of_file(cls, storage: Storage, header: Header) -> References:
        """None counted yet. Raises UnsupportedFeatureError if the file has too many clusters."""
        cluster_count = -(-storage.size() >> header.cluster_bits)
        if cluster_count > MAX_CLUSTERS:
            raise UnsupportedFeatureError(
                f"the file has {cluster_count} clusters, too many to count the references to them", file=storage.path
            )
        return cls(cluster_count, header.refcount_order)

    @property
    def counts(self) -> Counts:
        """The references to each cluster; a view."""
        return self._counts[: self._length]

    def add_run(self, first: int, count: int, times: int = 1) -> Excess | None:
        """Count `times` references to each of `count` clusters from `first` on."""
        if count <= 0:
            return None
        self._reach(first + count - 1)
        return self._raise(slice(first, first + count), np.full(count, times, dtype=np.uint64), first)

    def add(self, clusters: Clusters, times: int = 1) -> Excess | None:
        """Count `times` references to each of these clusters, which may repeat."""
        if not clusters.size:
            return None
        low, high = int(clusters.min()), int(clusters.max())
        self._reach(high)
        if high - low < _DENSE * clusters.size:
            added = np.bincount(clusters - low).view(np.uint64)
            return self._raise(slice(low, high + 1), added if times == 1 else added * np.uint64(times), low)
        distinct, repeats = np.unique(clusters, return_counts=True)
        return self._raise(distinct, repeats.astype(np.uint64) * np.uint64(times), distinct)

    def _reach(self, cluster: int) -> None:
        self._length = max(self._length, cluster + 1)

    def _raise(self, where: slice | Clusters, added: npt.NDArray[np.uint64], numbers: int | Clusters) -> Excess | None:
        """Add to the counts at `where`; `numbers` are those of the clusters, or the first of a run."""
        before = self._counts[where]
        if int(before.max()) + int(added.max()) <= self.maximum:
            self._counts[where] = before + added.astype(before.dtype)
            return None
        room = np.uint64(self.maximum) - before.astype(np.uint64)
        lost = added - np.minimum(added, room)
        self._counts[where] = before + (added - lost).astype(before.dtype)
        full = np.flatnonzero(lost)
        clusters = full + numbers if isinstance(numbers, int) else numbers[full]
        return Excess(clusters.astype(np.int64), lost[full])


def count_type(refcount_order: int) -> np.dtype[Any]:
    """What holds a refcount of this width."""
    return np.dtype(f"u{1 << max(refcount_order - 3, 0)}")


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, stop) ranges in order, without overlap, as few as cover the same."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        elif start < stop:
            found.append((start, stop))
    return found


def covered(ranges: Iterable[tuple[int, int]]) -> list[Range]:
    """What (start, stop) ranges cover, in order and without overlap, and how often each part is covered."""
    known = np.array([each for each in ranges if each[0] < each[1]], dtype=np.int64).reshape(-1, 2)
    if not known.size:
        return []
    places = np.concatenate((known[:, 0], known[:, 1]))
    steps = np.concatenate((np.ones(len(known), dtype=np.int64), np.full(len(known), -1, dtype=np.int64)))
    edges, inverse = np.unique(places, return_inverse=True)
    changes = np.zeros(len(edges), dtype=np.int64)
    np.add.at(changes, inverse.reshape(-1), steps)
    depths = np.cumsum(changes)[:-1]
    return [
        Range(start, stop, times)
        for start, stop, times in zip(edges[:-1].tolist(), edges[1:].tolist(), depths.tolist(), strict=True)
        if times
    ]
