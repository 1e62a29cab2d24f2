"""Making, applying and deleting internal snapshots of an image that is open for writing.

An image has one disk that changes, the active one, and snapshots that do not. Each has an L1 table of its own; L2
tables and data clusters are shared and counted. Whoever changes something that is shared copies it before, so making a
snapshot moves no data: everything the active disk reaches gets as many references again, and COPIED, which says that
the active disk may write in place, goes from all of its tables.

All of it happens to an image that stands still, with everything on disk that was acknowledged (`standing_still`). What
readers go on with was decided under the lock, before or after.

**The order.** ">" is a barrier.

    create   COPIED cleared in the L2 tables and the L1 table
             > refcounts, the snapshot's L1 table, the new snapshot table
             > the header names the new snapshot table, in one write
             > the old snapshot table loses its reference
    delete   the new snapshot table and its refcounts
             > the header names it
             > refcounts fall > COPIED where one reference is left
    apply    refcounts, COPIED cleared in the snapshot's L2 tables, a new active L1 table
             > the header names it, with the size of the disk, in one write
             > what only the old active disk reached loses its references

Why so. A reference that is durable is counted durably before, and a refcount falls after its reference has durably
gone: what a crash leaves is a count that is too high. COPIED never stands beside a refcount of more than 1, since a
writer that believes it writes into somebody else's cluster: it goes before refcounts rise, and comes back after they
have fallen. Where a crash leaves it out, a cluster is copied once without need. Applying makes a new L1 table instead
of writing over the active one, which is larger than what a crash leaves whole; table and disk size change in one
sector. What is below an L2 table that both name is neither counted up nor down. Afterwards the snapshot shares
everything with the active disk, so there COPIED is nowhere.

The tables of a snapshot may say COPIED as of old: nobody looks, until they become the active disk's.

**What becomes free.** Clusters that a snapshot or the old active disk kept alone may still be being read: after the
header has changed everybody finds new places, and the refcounts fall when all who found old ones have ended.

**VM state** lies behind the disk, below entries of the L1 table that the disk does not need. They are copied, counted
and kept like the others; a snapshot that is made here has none that counts.

**Failures.** Until the header changes everything can be taken back, and is; COPIED and counts that cannot be put back
are no harm. Once it has changed, the new state is there, and an error says that something of the rest leaks.

**Lock.** Taken here: nobody who calls may be in flight or in a change (see `requests`).

Source: docs/interop/qcow2.rst, "Snapshots".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from qcow2_plugin.engine.dirty_bitmaps.bitmaps import read_bitmaps
from qcow2_plugin.engine.distinct import distinct
from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.engine.image_file import Clusters, Structure
from qcow2_plugin.engine.internal_snapshots.differing import differing_ranges
from qcow2_plugin.engine.internal_snapshots.recounting import Recount
from qcow2_plugin.engine.internal_snapshots.snapshots import check_l1_table, find, read_snapshots
from qcow2_plugin.engine.metadata import l2_tables
from qcow2_plugin.engine.standing_still import at_rest, standing_still
from qcow2_plugin.engine.writeback import write_refcounts_now
from qcow2_plugin.errors import Qcow2Error, SnapshotError, UnsupportedFeatureError, printable
from qcow2_plugin.format.entries import COPIED
from qcow2_plugin.format.geometry import MAX_SNAPSHOT_TABLE_SIZE, MAX_SNAPSHOTS
from qcow2_plugin.format.snapshots import Snapshot, pack_table

if TYPE_CHECKING:
    from qcow2_plugin.engine.writable import WritableImage

_MAX_NAME_LENGTH = 255
"""Bytes; QEMU cuts longer names."""
_NUMBER = re.compile(rb"[0-9]{1,20}")
_NANOSECONDS = 1_000_000_000


def create_snapshot(image: WritableImage, name: bytes, date_nanoseconds: int) -> Snapshot:
    """Keep the disk as it is now under this name, with the next ID; the date is since the epoch.

    Raises SnapshotError, UnsupportedFeatureError, CorruptImageError, TruncatedImageError, FailedImageError, OSError;
    then there is no new snapshot.
    """
    with at_rest(image):
        header = image.header
        _require_no_data_file(image)
        known = read_snapshots(image.file.storage, header)
        snapshot = Snapshot.of_disk(
            _next_id(known), name, divmod(date_nanoseconds, _NANOSECONDS), header.l1_size, header.virtual_size
        )
        length = len(_packed(image, [*known, snapshot]))
        tables = _l2_tables(image, header.l1_table_offset, header.l1_size)
        with _attempt(image, tables) as attempt:
            attempt.double()
            place = attempt.allocate(Structure.SNAPSHOT_L1_TABLE, 8 * header.l1_size) if header.l1_size else 0
            snapshot = replace(snapshot, l1_table_offset=place)
            table_place = attempt.allocate(Structure.SNAPSHOT_TABLE, length)
            attempt.clear_copied()
            write_refcounts_now(image.file, image.allocator)
            if header.l1_size:
                entries = read_structure(image.file.storage, "L1 table", header.l1_table_offset, 8 * header.l1_size)
                image.file.write(Structure.SNAPSHOT_L1_TABLE, entries, place)
            image.file.write(Structure.SNAPSHOT_TABLE, pack_table([*known, snapshot]), table_place)
            image.file.barrier()
            image.file.update_header(snapshot_count=len(known) + 1, snapshots_offset=table_place)
        with _as_a_whole(image):
            image.file.barrier()
            image.file.metadata.keep(distinct(image.file.metadata.kept, tables))
        _retire_run(image, header.snapshots_offset, len(pack_table(known)))
        return snapshot


def delete_snapshot(image: WritableImage, wanted: str | bytes) -> Snapshot:
    """Forget the snapshot with this ID or else this name. A disk that `Image.at_snapshot` gave of it is closed.

    Raises MissingReferenceError, CorruptImageError, TruncatedImageError, FailedImageError, OSError; then the snapshot
    is there as before, unless only what it kept could not be given back.
    """
    with at_rest(image):
        header = image.header
        _require_no_data_file(image)
        known = read_snapshots(image.file.storage, header)
        snapshot = find(known, wanted, image.file.storage.path)
        remaining = [each for each in known if each is not snapshot]
        tables = _l2_tables(image, snapshot.l1_table_offset, snapshot.l1_size)
        kept = _tables_of(image, remaining)
        table_place = 0
        with _attempt(image) as attempt:
            if remaining:
                table = _packed(image, remaining)
                table_place = attempt.allocate(Structure.SNAPSHOT_TABLE, len(table))
                write_refcounts_now(image.file, image.allocator)
                image.file.write(Structure.SNAPSHOT_TABLE, table, table_place)
                image.file.barrier()
            image.file.update_header(snapshot_count=len(remaining), snapshots_offset=table_place)
        image.file.barrier()
        image.snapshot_views.close(snapshot)
        image.requests.drain()
        image.file.metadata.keep(kept)
        _retire_run(image, header.snapshots_offset, len(pack_table(known)))
        _retire_run(image, snapshot.l1_table_offset, 8 * snapshot.l1_size)
        try:
            attempt.recount.drop(tables)
            attempt.recount.restore_copied()
        finally:
            image.tables.look_anew()
        return snapshot


def apply_snapshot(image: WritableImage, wanted: str | bytes, *, mark_bitmaps: bool) -> Snapshot:
    """Let the active disk be as the snapshot with this ID or else this name has it, and as large. What the active disk
    held is lost.

    With `mark_bitmaps` what differs is marked in the dirty bitmaps that follow the disk; without, an image that has
    bitmaps is refused. Raises MissingReferenceError, SnapshotError, ResizeError, CorruptImageError,
    TruncatedImageError, FailedImageError, OSError; then the disk is as before, unless only what it held could not be
    given back.
    """
    with standing_still(image):
        header = image.header
        _require_no_data_file(image)
        snapshot = find(read_snapshots(image.file.storage, header), wanted, image.file.storage.path)
        check_l1_table(snapshot, image.file.storage, header, allow_damaged=False)
        size = snapshot.virtual_size(header.virtual_size)
        _require_applicable(image, size, mark_bitmaps=mark_bitmaps)
        old_tables = _l2_tables(image, header.l1_table_offset, header.l1_size)
        new_tables = _l2_tables(image, snapshot.l1_table_offset, snapshot.l1_size)
        l1_size = max(snapshot.l1_size, 1)
        with _attempt(image, _beyond(new_tables, old_tables)) as attempt:
            attempt.double()
            place = attempt.allocate(Structure.L1_TABLE, 8 * l1_size)
            entries = _l1_entries(image, snapshot, l1_size)
            write_refcounts_now(image.file, image.allocator)
            attempt.recount.clear_copied(Structure.SNAPSHOT_L2_TABLE, _without(new_tables, old_tables))
            image.file.write(Structure.L1_TABLE, entries, place)
            _mark_differences(image, snapshot, size)
            image.file.barrier()
            fields = {} if size == header.virtual_size else {"size": size}
            image.file.update_header(l1_size=l1_size, l1_table_offset=place, **fields)
        with _as_a_whole(image):
            image.file.barrier()
            _show_new_disk(image, old_tables, new_tables)
        image.requests.drain()
        _retire_run(image, header.l1_table_offset, 8 * header.l1_size)
        attempt.recount.drop(_beyond(old_tables, new_tables))
        write_refcounts_now(image.file, image.allocator)
        return snapshot


@contextmanager
def settled(image: WritableImage) -> Iterator[None]:
    """The image stands still, and the file says how it is, refcounts included. Raises FailedImageError, OSError."""
    with at_rest(image):
        write_refcounts_now(image.file, image.allocator)
        yield


# -- what speaks against it --


def _require_no_data_file(image: WritableImage) -> None:
    if image.header.has_data_file:
        raise UnsupportedFeatureError(
            "an image with an external data file cannot have internal snapshots", file=image.file.storage.path
        )


def _require_applicable(image: WritableImage, size: int, *, mark_bitmaps: bool) -> None:
    file = image.file.storage.path
    bitmaps = read_bitmaps(image.file.storage, image.header)
    if bitmaps and not mark_bitmaps:
        raise SnapshotError(
            f'the image has dirty bitmaps ("{printable(bitmaps[0].name)}"), which would not know what changes; remove '
            "them, or have the changes marked (option mark-bitmaps)",
            file=file,
        )
    if size == image.header.virtual_size:
        return
    if image.header.version < 3:
        raise SnapshotError(
            f"the snapshot's disk has {size} bytes, and the disk of a version 2 image with snapshots keeps its size",
            file=file,
        )
    image.tracker.require_resizable(size)


def require_name(name: bytes, file: str) -> None:
    """Raises SnapshotError unless a snapshot can have this name."""
    if not 0 < len(name) <= _MAX_NAME_LENGTH or b"\0" in name:
        raise SnapshotError(
            f'a snapshot cannot be named "{printable(name)}": 1 to {_MAX_NAME_LENGTH} bytes, none of them zero',
            file=file,
        )


def _packed(image: WritableImage, snapshots: Sequence[Snapshot]) -> bytes:
    """The table of these snapshots. Raises SnapshotError if that is too much."""
    table = pack_table(snapshots)
    if len(snapshots) > MAX_SNAPSHOTS or len(table) > MAX_SNAPSHOT_TABLE_SIZE:
        raise SnapshotError(
            f"an image has no room for more than {MAX_SNAPSHOTS} snapshots, and {MAX_SNAPSHOT_TABLE_SIZE} bytes to "
            "tell of them; delete some first",
            file=image.file.storage.path,
        )
    return table


# -- the parts --


@dataclass
class _Attempt:
    """What was done up to now, and can be undone. `tables` are those whose references are doubled."""

    image: WritableImage
    tables: Clusters
    recount: Recount
    allocated: list[tuple[int, int]] = field(default_factory=list)
    is_counted: bool = False
    is_cleared: bool = False

    def double(self) -> None:
        self.recount.double(self.tables)
        self.is_counted = True

    def allocate(self, structure: Structure, length: int) -> int:
        place = self.image.allocator.allocate_table(structure, length)
        self.allocated.append((place, length))
        return place

    def clear_copied(self) -> None:
        """Of the active disk, durably."""
        self.is_cleared = True
        has_written = self.recount.clear_copied(Structure.L2_TABLE, self.tables)
        if self.recount.clear_copied_in_l1() or has_written:
            self.image.file.barrier()
        self.image.tables.look_anew()

    def take_back(self) -> None:
        for place, length in self.allocated:
            with suppress(Qcow2Error, OSError):
                self.image.allocator.release_table(place, length)
        if self.is_counted:
            self.recount.halve(self.tables)
        if self.is_cleared:
            with suppress(Qcow2Error, OSError):
                self.recount.restore_copied()


@contextmanager
def _attempt(image: WritableImage, tables: Clusters | None = None) -> Iterator[_Attempt]:
    """What is inside ends with the change of the header; if it fails, everything is taken back."""
    recount = Recount(image.file, image.allocator)
    attempt = _Attempt(image, np.zeros(0, dtype=np.int64) if tables is None else tables, recount)
    try:
        yield attempt
    except Exception:
        if image.file.failure is None:
            attempt.take_back()
        image.tables.look_anew()
        raise
    except BaseException:
        image.file.fail("a change of its snapshots was interrupted")
        raise


@contextmanager
def _as_a_whole(image: WritableImage) -> Iterator[None]:
    """What is inside brings memory to where the header is; if that ends half-way, no more changes are taken."""
    try:
        yield
    except BaseException:
        image.file.fail("a change of its snapshots was interrupted")
        raise


def _l2_tables(image: WritableImage, l1_table_offset: int, l1_size: int) -> Clusters:
    return l2_tables(image.file.storage, image.header, l1_table_offset, l1_size)


def _tables_of(image: WritableImage, snapshots: Sequence[Snapshot]) -> Clusters:
    """The L2 tables that any of these names, each once."""
    found = np.zeros(0, dtype=np.int64)
    for each in snapshots:
        found = distinct(found, _l2_tables(image, each.l1_table_offset, each.l1_size))
    return found


def _next_id(known: Sequence[Snapshot]) -> bytes:
    """One more than the largest, or the next that is not taken; IDs are numbers, or begin with one."""
    numbers = [int(found[0]) for each in known if (found := _NUMBER.match(each.id))]
    taken = {each.id for each in known}
    following = (b"%d" % number for number in count(max(numbers, default=0) + 1))
    return next(each for each in following if each not in taken)


def _l1_entries(image: WritableImage, snapshot: Snapshot, l1_size: int) -> bytes:
    """The snapshot's L1 table as the active disk's: nothing in it is its own."""
    stored = image.file.storage.pread(8 * snapshot.l1_size, snapshot.l1_table_offset)
    entries = np.frombuffer(stored, dtype=">u8") & np.uint64(COPIED ^ (1 << 64) - 1)
    return entries.astype(">u8").tobytes().ljust(8 * l1_size, b"\0")


def _mark_differences(image: WritableImage, snapshot: Snapshot, size: int) -> None:
    """Let the bitmaps follow the disk to the snapshot's size and content, durably where that is about their size."""
    old_size = image.header.virtual_size
    if size != old_size:
        image.tracker.resize(size, image.allocator)
    if image.tracker.is_empty:
        return
    common = min(old_size, size)
    for start, end in differing_ranges(image.file.storage, image.header, snapshot):
        if start < common:
            image.tracker.mark(start, min(end, common) - start)
    image.tracker.mark(common, size - common)


def _show_new_disk(image: WritableImage, old_tables: Clusters, new_tables: Clusters) -> None:
    """From now on the disk is what the header says."""
    header, metadata = image.header, image.file.metadata
    metadata.claim_all(Structure.L2_TABLE, _without(new_tables, old_tables))
    image.tables.move(header.l1_table_offset, header.l1_size, header.virtual_size)
    image.tables.look_anew()
    image.written.follow_tables()
    image.virtual_size = header.virtual_size
    metadata.release(_without(old_tables, new_tables).tolist())


def _retire_run(image: WritableImage, host_offset: int, length: int) -> None:
    """A table of so many bytes that nothing names any more."""
    first, end = host_offset // image.cluster_size, -(-(host_offset + length) // image.cluster_size)
    if length:
        image.allocator.retire_table(first, end - first)


def _without(tables: Clusters, others: Clusters) -> Clusters:
    """Each of `tables` once, but those among `others`."""
    return np.setdiff1d(tables, others)


def _beyond(tables: Clusters, others: Clusters) -> Clusters:
    """Each of `tables` as often as it is there more often than among `others`."""
    distinct, counts = np.unique(tables, return_counts=True)
    other_distinct, other_counts = np.unique(others, return_counts=True)
    _, places, other_places = np.intersect1d(distinct, other_distinct, assume_unique=True, return_indices=True)
    counts[places] -= other_counts[other_places]
    return np.repeat(distinct, np.maximum(counts, 0))
