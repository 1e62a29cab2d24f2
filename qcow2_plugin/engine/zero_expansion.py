"""Entries that say zero, made into what version 2 knows: no entry at all, or a cluster full of zeros.

    no place, no backing file    no entry
    no place, a backing file     a new cluster of zeros, or the backing file would show through
    a place of its own           zeros are written there, and the entry keeps it
    a place shared with others   as without a place; that table's references to it are given back

No entry changes what it means, so every table may be rewritten where it is, whoever refers to it: the active disk,
snapshots, or both. What is new is referred to as often as its table is. The order of one batch of tables: zeros and
refcounts > barrier > entries; places are given back when that is durable. A crash leaves some entries as they
were, and at worst leaks; the next attempt goes on from there.

Memory: the tables of a batch and what they give up, and 16 bytes for each L2 table of the image.

**Lock.** The turn of write-backs and the image's lock; everything stands still.

Source: docs/interop/qcow2.rst, "Standard Cluster Descriptor".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.allocator import Run
from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.engine.image_file import Clusters, Structure
from qcow2_plugin.engine.metadata import structures
from qcow2_plugin.engine.writeback import write_refcounts_now
from qcow2_plugin.errors import AmendError
from qcow2_plugin.format.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO, Entries
from qcow2_plugin.format.refcounts import runs_of

if TYPE_CHECKING:
    from qcow2_plugin.engine.checking.findings import Progress
    from qcow2_plugin.engine.writable import WritableImage

_BATCH = 16
"""Tables rewritten between two barriers."""


class _Table(NamedTuple):
    """One L2 table: its cluster, how often it is referred to, and its words."""

    cluster: int
    references: int
    words: Entries


class _Rewrite(NamedTuple):
    """A table with the words that it is to have; `dropped` are the shared places that it gives up."""

    table: _Table
    words: Entries
    dropped: Clusters


def has_compressed_clusters(image: WritableImage) -> bool:
    """True if the disk or a snapshot stores a cluster compressed. Raises CorruptImageError, TruncatedImageError,
    OSError."""
    clusters, counts = _places(image)
    return any(bool((table.words & np.uint64(COMPRESSED)).any()) for table in _tables(image, clusters, counts))


def expand_zero_clusters(image: WritableImage, progress: Progress | None) -> None:
    """Leave no entry that says zero, in the active disk or in a snapshot, durably.

    Raises AmendError if more references would be needed than a refcount can say; CorruptImageError,
    TruncatedImageError, OSError.
    """
    clusters, counts = _places(image)
    try:
        for start in range(0, len(clusters), _BATCH):
            end = min(start + _BATCH, len(clusters))
            _expand(image, list(_tables(image, clusters[start:end], counts[start:end])))
            if image.allocator.is_full:
                image.write_back.run_alone()
            if progress is not None:
                progress(end, len(clusters))
    finally:
        image.tables.forget()
    image.write_back.run_alone()


def _places(image: WritableImage) -> tuple[Clusters, Clusters]:
    """The cluster of each L2 table, ascending, and how often L1 tables name it."""
    named = [np.zeros(0, dtype=np.int64)]
    for structure, clusters in structures(image.file.storage, image.header):
        if structure in (Structure.L2_TABLE, Structure.SNAPSHOT_L2_TABLE):
            named.append(clusters)
    return np.unique(np.concatenate(named), return_counts=True)


def _tables(image: WritableImage, clusters: Clusters, counts: Clusters) -> Iterator[_Table]:
    for cluster, references in zip(clusters.tolist(), counts.tolist(), strict=True):
        host_offset = cluster << image.header.cluster_bits
        stored = read_structure(image.file.storage, "L2 table", host_offset, image.cluster_size)
        yield _Table(cluster, references, np.frombuffer(stored, dtype=">u8").astype(np.uint64))


def _expand(image: WritableImage, tables: list[_Table]) -> None:
    """Rewrite a batch of tables, durably."""
    fresh: list[Run] = []
    is_written = False
    try:
        rewrites = [each for each in (_rewrite(image, table, fresh) for table in tables) if each is not None]
        if not rewrites:
            return
        write_refcounts_now(image.file, image.allocator)
        image.file.barrier()
        is_written = True
        for each in rewrites:
            _write(image, each)
        image.file.barrier()
    except BaseException:
        if not is_written:
            _give_back(image, fresh)
        raise
    for each in rewrites:
        image.allocator.retire(np.repeat(each.dropped, each.table.references))


def _rewrite(image: WritableImage, table: _Table, fresh: list[Run]) -> _Rewrite | None:
    """Plan one table, and put zeros wherever they will show; None if it has no zero entry. New clusters are added to
    `fresh`."""
    is_zero = (table.words & np.uint64(ZERO | COMPRESSED)) == ZERO
    if not is_zero.any():
        return None
    offsets = np.where(is_zero, table.words & np.uint64(OFFSET_MASK), np.uint64(0)).astype(np.int64)
    if (offsets & image.cluster_size - 1).any():
        raise image.file.corrupt("L2 table", "places a cluster inside another", table.cluster << _bits(image))
    is_own = _is_own(image, table, offsets)
    words = np.where(is_zero & ~is_own, np.uint64(0), table.words)
    words[is_own] &= ~np.uint64(ZERO)
    _zero_in_place(image, np.sort(offsets[is_own]))
    if image.layer.backing is not None:
        homeless = np.flatnonzero(is_zero & ~is_own)
        flag = COPIED if table.references == 1 else 0
        words[homeless] = _new_clusters(image, len(homeless), table.references, fresh) | np.uint64(flag)
    return _Rewrite(table, words, offsets[is_zero & ~is_own & (offsets != 0)] >> _bits(image))


def _is_own(image: WritableImage, table: _Table, offsets: Clusters) -> npt.NDArray[np.bool_]:
    """For each entry whether it has a place that only this table refers to, once."""
    has_place = offsets != 0
    clusters = offsets[has_place] >> _bits(image)
    if image.file.metadata.among(clusters).any():
        raise image.file.corrupt("L2 table", "points to a structure of the image", table.cluster << _bits(image))
    everything = (table.words & np.uint64(OFFSET_MASK)).astype(np.int64) >> _bits(image)
    known, counts = np.unique(everything, return_counts=True)
    is_once = counts[np.searchsorted(known, clusters)] == 1
    is_own = np.zeros(len(offsets), dtype=np.bool_)
    is_own[has_place] = is_once & (image.allocator.refcounts_of(clusters) == table.references)
    return is_own


def _zero_in_place(image: WritableImage, offsets: Clusters) -> None:
    storage = image.file.storage
    for first, count in runs_of(offsets >> _bits(image)):
        storage.write_zeroes(first << _bits(image), count << _bits(image), may_punch=False)
        _reach(image, first + count << _bits(image))


def _new_clusters(image: WritableImage, count: int, references: int, fresh: list[Run]) -> Entries:
    """The host offsets of so many new clusters, which read as zeros and count so many references."""
    if references >> image.header.refcount_bits:
        raise AmendError(
            f"{references} snapshots share zeros; refcounts of {image.header.refcount_bits} bits cannot say that",
            file=image.layer.storage.path,
        )
    runs = image.allocator.allocate(count)
    fresh += runs
    offsets = [np.arange(run.host_offset, run.host_offset + run.length, image.cluster_size) for run in runs]
    for run in runs:
        if not run.is_clean:
            image.file.storage.write_zeroes(run.host_offset, run.length, may_punch=True)
        _reach(image, run.host_offset + run.length)
    places = np.concatenate([*offsets, np.zeros(0, dtype=np.int64)])
    image.allocator.count_fresh(np.sort(places >> _bits(image)), references)
    return places.astype(np.uint64)


def _give_back(image: WritableImage, fresh: list[Run]) -> None:
    """Nothing refers to the new clusters yet, however often they are counted."""
    for run in fresh:
        first = run.host_offset >> _bits(image)
        image.allocator.count_fresh(np.arange(first, first + (run.length >> _bits(image)), dtype=np.int64), 1)
    image.allocator.release(fresh)


def _reach(image: WritableImage, end: int) -> None:
    """Let the file go on to host offset `end` at least."""
    if image.file.storage.size() < end:
        image.file.truncate(end)


def _write(image: WritableImage, rewrite: _Rewrite) -> None:
    table = rewrite.table
    changed = np.flatnonzero(rewrite.words != table.words)
    first, end = int(changed[0]), int(changed[-1]) + 1
    owner = Structure(image.file.metadata.owner(table.cluster))
    data = rewrite.words[first:end].astype(">u8").tobytes()
    image.file.write(owner, data, (table.cluster << _bits(image)) + 8 * first)


def _bits(image: WritableImage) -> int:
    return image.header.cluster_bits
