"""Persistent dirty bitmaps added, removed, cleared, merged, switched on and off: all at once, by one switch.

**The switch.** What bitmaps there are is said by the directory, and where that is by an extension of the header, beside
a feature bit (autoclear bit 0) that says whether it can be believed. Changes never touch the directory that is named
there. They make another one, with the tables and bits that it needs, in clusters that are new, and then the header is
changed in one step that no crash can divide. So after a crash all changes of a call have happened, or none.

    rest      the image stands still: writes that were answered are marked in the old bitmaps, all others will be in
              the new ones
    settle    marks in memory > disk, in_use cleared (see `tracking`)
    prepare   bits, tables, refcounts, the new directory > barrier
    publish   header: extension and feature bit > barrier
    retire    the old directory, and tables and bits that only it names

A bitmap that no change is about keeps its table and bits, and both directories name them; only one directory is ever
in force, so that is one reference. Everything is settled first, so either directory is right, whichever a crash leaves,
and what was prepared stays true until somebody changes the disk, however much later it is published.

**Afterwards** the image counts as one that nobody has changed yet. Before its next change every enabled bitmap is held,
in_use set durably, a new one as well. Write lanes are forgotten before anything else: a write that marks nothing
because everything there is marked in the old bitmap would be lost to the new one.

**Rotation** is two changes by one switch: the old bitmap is disabled, so it stays as it is at this moment, and a new
one begins, enabled and empty. No write is in neither, since none is under way.

**Errors.** Before the switch everything new is given back, and the image and its bitmaps are as before. A refusal comes
before anything is written at all, but for settling.

A directory that is there without its feature bit is stale: somebody has changed the disk who does not know bitmaps. The
first change forgets it, as QEMU does when it opens the image; a check finds its clusters.

**Lock.** `prepare_bitmaps` and what it returns are for whoever lets the image stand still; `change_bitmaps` does that.

Source: docs/interop/qcow2.rst, "Bitmaps extension", "Bitmaps".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qcow2_plugin.engine.allocator import Run
from qcow2_plugin.engine.dirty_bitmaps.bitmap_content import Drawing, read_content
from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange, Plan, Planned, Verb, rotating
from qcow2_plugin.engine.dirty_bitmaps.tracking import Kept
from qcow2_plugin.engine.image_file import Clusters, Structure
from qcow2_plugin.engine.standing_still import at_rest
from qcow2_plugin.engine.writeback import write_refcounts_now
from qcow2_plugin.format.bitmaps import FLAG_IN_USE, Bitmap, entry_offsets, pack_directory
from qcow2_plugin.format.header import AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS, BitmapsPointer

if TYPE_CHECKING:
    from qcow2_plugin.engine.writable import WritableImage

__all__ = ["BitmapChange", "Prepared", "Verb", "change_bitmaps", "prepare_bitmaps", "read_content", "rotating"]

_MAX_WRITE = 8 << 20
"""Bytes of bits written by one call."""


def change_bitmaps(image: WritableImage, changes: Sequence[BitmapChange]) -> None:
    """Carry out all of these changes, in this order, or none of them; durable after.

    The current thread must neither be in flight nor in a change. Raises as `prepare_bitmaps` and `Prepared.publish` do.
    """
    with at_rest(image):
        prepared = prepare_bitmaps(image, changes)
        try:
            prepared.publish()
        except BaseException:
            prepared.abandon()
            raise


def prepare_bitmaps(image: WritableImage, changes: Sequence[BitmapChange]) -> Prepared:
    """Do everything that changes need but the switch itself, durably. The image stands still until that is done, or
    given up.

    Raises MissingReferenceError or BitmapError if one of them cannot be; FailedImageError, CorruptImageError,
    TruncatedImageError, OSError. Then nothing has changed.
    """
    image.settle_bitmaps()
    plan = Plan(image.header, image.tracker, image.file.storage.path)
    for change in changes:
        plan.add(change)
    plan.require_room()
    prepared = Prepared(image, plan)
    try:
        prepared.write()
    except BaseException:
        prepared.abandon()
        raise
    return prepared


class Prepared:
    """Changes of bitmaps that need nothing but the switch: `publish` them or `abandon` them."""

    def __init__(self, image: WritableImage, plan: Plan) -> None:
        """Use `prepare_bitmaps` to get one."""
        self.old = image.header.bitmaps
        """Where the directory is, None without bitmaps."""
        self.new = self.old
        """Where it will be."""
        self.is_empty = plan.changes_nothing
        """Nothing is to be switched: the bitmaps are what was asked for already."""
        self._image = image
        self._planned = plan.planned
        self._kept: list[Kept] = []
        self._runs: list[Run] = []
        self._tables: list[tuple[int, int]] = []
        self._retired = _retired(image, plan)
        self._is_done = self.is_empty

    def write(self) -> None:
        """Write what is new, durably; once. Raises CorruptImageError, OSError."""
        if self.is_empty:
            return
        image = self._image
        entries = [self._placed(each) for each in self._planned]
        listed = [replace(each, flags=each.flags | FLAG_IN_USE * is_in_use) for each, is_in_use in entries]
        directory = pack_directory(listed)
        place = self._write_table(directory) if listed else 0
        if self._tables or self._runs:
            write_refcounts_now(image.file, image.allocator)
            image.file.barrier()
        self.new = BitmapsPointer(len(listed), len(directory), place) if listed else None
        starts = [place + offset for offset in entry_offsets(listed)]
        self._kept = [
            self._kept_of(planned, start, bitmap)
            for planned, start, (bitmap, _) in zip(self._planned, starts, entries, strict=True)
        ]

    def publish(self, **header_fields: Any) -> None:
        """Switch the header to the new directory, durably, together with other fields of it if there are any.

        The pointer and the feature bit of the bitmaps are laid over `header_fields`. Raises HeaderFullError, OSError;
        then `abandon` is to follow, or the image takes no more changes.
        """
        image = self._image
        wanted = replace(image.header, **header_fields)
        if not self._is_done:
            wanted = wanted.with_extension(EXTENSION_BITMAPS, None if self.new is None else self.new.pack())
            features = wanted.autoclear_features & ~AUTOCLEAR_BITMAPS
            features |= AUTOCLEAR_BITMAPS if self.new is not None else 0
            header_fields |= {"extensions": wanted.extensions, "autoclear_features": features}
        if not header_fields:
            return
        try:
            image.file.update_header(**header_fields)
            has_switched, self._is_done = not self._is_done, True
            image.file.barrier()
            if has_switched:
                self._follow()
        except Exception:
            raise
        except BaseException:
            image.file.fail("a change of its bitmaps was interrupted")  # which of them are in force is not known here
            raise

    def _follow(self) -> None:
        """The new directory is in force."""
        image = self._image
        image.tracker.adopt(self._kept)
        image.tables.follow_bitmaps(tracks_changes=not image.tracker.is_empty)
        for clusters in self._retired:
            image.file.metadata.release(clusters.tolist())
            image.allocator.retire(clusters)

    def abandon(self) -> None:
        """Give back what was prepared, if it was not published; the bitmaps are as before."""
        if self._is_done:
            return
        self._is_done = True
        if self._image.file.failure is not None:
            return  # nothing is known of the header, and nothing will be written
        allocator = self._image.allocator
        for host_offset, length in self._tables:
            allocator.release_table(host_offset, length)
        bits = self._image.header.cluster_bits
        for run in self._runs:
            self._image.file.metadata.release(range(run.host_offset >> bits, run.host_offset + run.length >> bits))
        allocator.release(self._runs)

    def _placed(self, planned: Planned) -> tuple[Bitmap, bool]:
        """The entry of a bitmap in the directory, but for in_use, and whether that is set; what it names is written."""
        bitmap, kept, drawing = planned.bitmap, planned.kept, planned.drawing
        if drawing is not None:
            self._write_bits(drawing)
            table = self._write_table(drawing.table.astype(">u8").tobytes())
            bitmap = replace(bitmap, table_offset=table, table_entries=len(drawing.table))
        return bitmap, kept is not None and kept.is_in_use

    def _kept_of(self, planned: Planned, entry_offset: int, bitmap: Bitmap) -> Kept:
        """What the tracker knows of a bitmap from the switch on."""
        if planned.drawing is not None:
            return Kept(bitmap, entry_offset, None, False, table=planned.drawing.table)
        assert planned.kept is not None
        return replace(planned.kept, bitmap=bitmap, entry_offset=entry_offset)

    def _write_bits(self, drawing: Drawing) -> None:
        """Write the new bits of a bitmap and let its table name their places."""
        image, size = self._image, drawing.cluster_size
        indexes = sorted(drawing.fresh)
        runs = image.allocator.allocate(len(indexes))
        self._runs += runs
        done = 0
        for run in runs:
            image.file.metadata.claim(Structure.BITMAP, run.host_offset // size, run.length // size)
            for start in range(0, run.length, step := max(_MAX_WRITE // size, 1) * size):
                part = indexes[done : done + min(step, run.length - start) // size]
                content = b"".join(drawing.fresh[index].data for index in part)
                image.file.write(Structure.BITMAP, content, run.host_offset + start)
                drawing.table[part] = run.host_offset + start + size * np.arange(len(part), dtype=np.uint64)
                done += len(part)
        drawing.fresh.clear()

    def _write_table(self, content: bytes) -> int:
        """Write a table or the directory to new clusters; the host offset."""
        image, size = self._image, self._image.cluster_size
        content = content.ljust(-(-len(content) // size) * size, b"\0")
        place = image.allocator.allocate_table(Structure.BITMAP, len(content))
        self._tables.append((place, len(content)))
        image.file.write(Structure.BITMAP, content, place)
        return place


def _retired(image: WritableImage, plan: Plan) -> list[Clusters]:
    """The clusters that only the old directory names, and its own."""
    if plan.changes_nothing:
        return []
    parts = []
    if (pointer := image.header.bitmaps) is not None:
        first = pointer.directory_offset // image.cluster_size
        parts.append(np.arange(first, first + -(-pointer.directory_size // image.cluster_size), dtype=np.int64))
    staying = {id(each.kept): each for each in plan.planned if each.kept is not None}
    for kept in image.tracker.kept:
        planned = staying.get(id(kept))
        if planned is None:
            parts += image.tracker.clusters_of(kept)
        elif planned.drawing is not None:
            used = planned.drawing.table // np.uint64(image.cluster_size)
            parts += [each[~np.isin(each, used.astype(np.int64))] for each in image.tracker.clusters_of(kept)]
    return [part[image.allocator.refcounts_of(part) > 0] for part in parts]
