"""Refcounts of another width for an image in which everything stands still.

The new blocks and the new table are laid out behind everything in use and count themselves as well; nothing that exists
is touched. When they are durable, one write of the header's first sector switches to them: the width, the place of the
table and its size. After that the old blocks and the old table are given back, counted by the new ones. So a crash
leaves the old refcounts, with bytes behind the end of use that nobody knows, or the new ones, at worst with the old
ones leaked.

Memory: what is written together, and 8 bytes for each new block.

**Lock.** The turn of write-backs and the image's lock.

Source: docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qcow2_plugin.engine.distinct import distinct
from qcow2_plugin.engine.image_file import Clusters, Structure
from qcow2_plugin.errors import AmendError
from qcow2_plugin.format.entries import OFFSET_MASK
from qcow2_plugin.format.geometry import MAX_REFCOUNT_TABLE_SIZE
from qcow2_plugin.format.refcounts import pack_block

if TYPE_CHECKING:
    from qcow2_plugin.engine.allocator import Allocator
    from qcow2_plugin.engine.checking.findings import Progress
    from qcow2_plugin.engine.writable import WritableImage

_WRITE_SIZE = 1 << 20
"""Bytes of blocks written together, at least."""
_AT_ONCE = 1 << 16
"""Refcounts looked at together."""


class _Plan(NamedTuple):
    """Blocks in consecutive clusters from `first` on, in the order of their `slots`, and the table behind them."""

    first: int
    slots: Clusters
    table_clusters: int
    per_block: int

    @property
    def end(self) -> int:
        return self.first + len(self.slots) + self.table_clusters


def require_fitting(image: WritableImage, refcount_bits: int) -> None:
    """Raises AmendError if a refcount of the image does not fit so many bits; TruncatedImageError, OSError."""
    if refcount_bits >= image.header.refcount_bits:
        return
    for first, refcounts in image.allocator.blocks():
        largest = int(refcounts.argmax())
        if int(refcounts[largest]) >> refcount_bits:
            raise AmendError(
                f"{int(refcounts[largest])} references to the cluster at host offset "
                f"{first + largest << image.header.cluster_bits:#x} do not fit into refcounts of {refcount_bits} bits",
                file=image.layer.storage.path,
            )


def change_refcount_width(image: WritableImage, refcount_bits: int, progress: Progress | None) -> None:
    """Give every refcount so many bits.

    Raises AmendError, before anything changes, if one does not fit; OSError (EFBIG if the refcount table would be too
    large); then the refcounts are as before, or the image takes no more changes.
    """
    require_fitting(image, refcount_bits)
    order = refcount_bits.bit_length() - 1
    plan = _plan(image, order)
    file = image.file
    file.metadata.claim(Structure.REFCOUNT_BLOCK, plan.first, len(plan.slots))
    file.metadata.claim(Structure.REFCOUNT_TABLE, plan.first + len(plan.slots), plan.table_clusters)
    image.allocator.spoil(plan.end << file.header.cluster_bits)
    try:
        _write(image, plan, order, progress)
        file.barrier()
        file.update_header(
            refcount_order=order,
            refcount_table_offset=plan.first + len(plan.slots) << file.header.cluster_bits,
            refcount_table_clusters=plan.table_clusters,
        )
    except Exception:
        file.metadata.release(range(plan.first, plan.end))
        raise
    except BaseException:
        file.fail("a change of its refcounts was interrupted")
        raise
    try:
        file.barrier()
        image.allocator.follow_header()
    except BaseException as error:
        file.fail(f"the new refcounts could not be read ({error})")
        raise


def _plan(image: WritableImage, order: int) -> _Plan:
    allocator, cluster_bits = image.allocator, image.header.cluster_bits
    per_block = image.cluster_size * 8 >> order
    first = allocator.end_of_use() >> cluster_bits
    slots = _used_slots(allocator, per_block)
    block_count, table_clusters = 0, 1
    while True:
        end = first + block_count + table_clusters
        slots = np.union1d(slots, np.arange(first // per_block, -(-end // per_block)))
        needed_clusters = -(-8 * (int(slots[-1]) + 1) // image.cluster_size)
        if (len(slots), needed_clusters) == (block_count, table_clusters):
            break
        block_count, table_clusters = len(slots), needed_clusters
    if table_clusters << cluster_bits > MAX_REFCOUNT_TABLE_SIZE or end << cluster_bits > OFFSET_MASK + 1:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), image.layer.storage.path)
    taken = image.file.metadata.first_in(first, end - first)
    if taken is not None:
        owner = Structure(image.file.metadata.owner(taken)).title
        raise image.file.corrupt("refcounts", f"say that cluster {taken:#x} of the {owner} is free")
    return _Plan(first, slots, table_clusters, per_block)


def _used_slots(allocator: Allocator, per_block: int) -> Clusters:
    """The blocks of the new width that have something to count."""
    found = [np.zeros(0, dtype=np.int64)]
    for first, refcounts in allocator.blocks():
        for start in range(0, len(refcounts), _AT_ONCE):
            used = np.flatnonzero(refcounts[start : start + _AT_ONCE])
            found.append(np.unique((first + start + used) // per_block))
    return distinct(*found)


def _write(image: WritableImage, plan: _Plan, order: int, progress: Progress | None) -> None:
    file, cluster_bits = image.file, image.header.cluster_bits
    place = plan.first << cluster_bits
    pending = bytearray()
    for done, block in enumerate(_blocks(image.allocator, plan, order), 1):
        pending += block
        if len(pending) >= _WRITE_SIZE or done == len(plan.slots):
            file.write(Structure.REFCOUNT_BLOCK, bytes(pending), place)
            place += len(pending)
            pending.clear()
            if progress is not None:
                progress(done, len(plan.slots))
    table = np.zeros(plan.table_clusters * image.cluster_size // 8, dtype=np.uint64)
    table[plan.slots] = np.arange(plan.first, plan.first + len(plan.slots), dtype=np.uint64) << np.uint64(cluster_bits)
    file.write(Structure.REFCOUNT_TABLE, table.astype(">u8").tobytes(), place)


def _blocks(allocator: Allocator, plan: _Plan, order: int) -> Iterator[bytes]:
    """The new blocks, in the order of their slots."""
    for slot in plan.slots.tolist():
        start, end = slot * plan.per_block, min((slot + 1) * plan.per_block, plan.end)
        starts = range(start, end, _AT_ONCE)
        parts = [_packed(allocator, plan, order, part, min(part + _AT_ONCE, end)) for part in starts]
        yield b"".join(parts).ljust(plan.per_block << order >> 3, b"\0")


def _packed(allocator: Allocator, plan: _Plan, order: int, start: int, end: int) -> bytes:
    """The new refcounts of these clusters."""
    refcounts = allocator.refcounts_of(np.arange(start, end, dtype=np.int64))
    refcounts[max(plan.first - start, 0) : max(plan.end - start, 0)] = 1
    return pack_block(refcounts, order)
