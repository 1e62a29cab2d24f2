"""Another size for the disk of an image that is open for writing.

The size on disk is one field of the header and changes in one write, after everything that the new size shows is
durable, and before anything that the old size showed is cut off. All that a crash in between leaves is an L1 table that
is longer than needed, clusters prepared behind the end of the disk, or a tail that was given up already.

**Growing.** A longer L1 table is written next to the old one, and the header switched to it in one write. Then the
tables know the new size and the guest does not, while what must not be seen there is written over: what is behind the
old end in its last cluster, and what a longer backing file has. Then come the data file's length, preallocation, the
bitmaps, the header's size, and the guest may see it.

**Shrinking.** First nobody reaches what will be cut off any more. It is forgotten, durably, L2 tables without any use
go, bitmaps follow, then the size changes, and only then the files are cut.

Reads and writes through the lanes go on meanwhile; whoever calls `resize` is alone among changes (see `requests`).

**Lock.** Where tables move, the turn of write-backs and the image's lock are taken here.

Source: docs/interop/qcow2.rst, "Header", "Cluster mapping".
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from qcow2_plugin.engine.image_file import Structure
from qcow2_plugin.engine.placement import Clearing, Piece
from qcow2_plugin.errors import ResizeError
from qcow2_plugin.extent import ZEROS
from qcow2_plugin.format.geometry import MAX_HOST_OFFSET, MAX_L1_ENTRIES, SECTOR_SIZE

if TYPE_CHECKING:
    from qcow2_plugin.engine.writable import WritableImage

PREALLOCATIONS = ("off", "metadata", "falloc", "full")


def resize(image: WritableImage, virtual_size: int, *, allow_shrink: bool, preallocation: str) -> None:
    """See `Image.resize`; the caller is alone. Raises ResizeError before anything changes; what `Image.write_from`
    raises."""
    new_size = require_resizable(image, virtual_size, allow_shrink=allow_shrink, preallocation=preallocation)
    if new_size == image.virtual_size:
        return
    with image.locked():
        image.tracker.require_resizable(new_size)
        image.get_ready()
    if new_size < image.virtual_size:
        _shrink(image, new_size)
        return
    if image.header.data_file_raw and preallocation == "off":
        preallocation = "metadata"  # or the data file would say more than the tables
    _grow(image, new_size, preallocation)


def require_resizable(
    image: WritableImage, virtual_size: int, *, allow_shrink: bool, preallocation: str = "off", version: int = 0
) -> int:
    """The size in whole sectors that the disk would have. Raises ResizeError if it cannot have it.

    `version` is that of the image then, by default the one of now.
    """
    new_size = -(-virtual_size // SECTOR_SIZE) * SECTOR_SIZE
    _require_possible(image, new_size, preallocation, version or image.header.version)
    if new_size < image.virtual_size and not allow_shrink:
        raise ResizeError(
            f"shrinking the disk from {image.virtual_size} to {new_size} bytes loses what is behind; say that it may "
            "shrink (option shrink) if that is meant",
            file=image.layer.storage.path,
        )
    return new_size


def _require_possible(image: WritableImage, new_size: int, preallocation: str, version: int) -> None:
    header = image.header
    detail = None
    if preallocation not in PREALLOCATIONS:
        detail = f'preallocation "{preallocation}" is none of {", ".join(PREALLOCATIONS)}'
    elif not 0 <= new_size <= MAX_HOST_OFFSET or header.geometry.l1_entries_for(new_size) > MAX_L1_ENTRIES:
        detail = f"a disk of {new_size} bytes is too large for clusters of {header.geometry.cluster_size} bytes"
    elif version < 3 and header.version < 3 and header.snapshot_count:
        detail = "an image of version 2 with internal snapshots cannot be resized: they do not record their own size"
    elif preallocation != "off" and new_size < image.virtual_size:
        detail = "preallocation is for growing"
    elif preallocation != "off" and image.layer.backing is not None and not header.extended_l2:
        detail = "preallocation would hide the backing file"
    if detail is not None:
        raise ResizeError(detail, file=image.layer.storage.path)


def _grow(image: WritableImage, new_size: int, preallocation: str) -> None:
    old_size = image.virtual_size
    with image.write_back.turn, image.locked():
        _lengthen_l1(image, new_size)
        _tell_tables(image, new_size)
    try:
        cluster_end = -(-old_size // image.cluster_size) * image.cluster_size
        image.clear_clusters(min(cluster_end, new_size), new_size, Clearing.DROP)
        backing_size = 0 if image.layer.backing is None else image.layer.backing.virtual_size
        image.zero(old_size, min(new_size, max(cluster_end, backing_size)), Clearing.FREE)
        if image.header.has_data_file:
            image.data.write_zeroes(old_size, new_size - old_size, may_punch=True)  # it may be longer than the disk
            image.data.truncate(max(new_size, image.data.size()))
        if preallocation != "off":
            _preallocate(image, old_size, new_size, preallocation)
        image.flush()
        with image.write_back.turn, image.locked():
            image.tracker.resize(new_size, image.allocator)
            image.file.update_header(size=new_size)
            image.file.barrier()
            image.virtual_size = new_size
    except BaseException:
        with image.locked():
            _tell_tables(image, image.virtual_size)
        raise


def _lengthen_l1(image: WritableImage, new_size: int) -> None:
    header = image.header
    entry_count = header.geometry.l1_entries_for(new_size)
    if entry_count <= header.l1_size:
        return
    content = image.tables.read_l1(0, header.l1_size).astype(">u8").tobytes().ljust(8 * entry_count, b"\0")
    place = image.allocator.allocate_table(Structure.L1_TABLE, len(content))
    try:
        image.file.write(Structure.L1_TABLE, content, place)
        image.write_back.run_alone()
    except BaseException:
        image.allocator.release_table(place, len(content))
        raise
    image.file.update_header(l1_size=entry_count, l1_table_offset=place)
    image.file.barrier()
    old_clusters = -(-8 * header.l1_size // image.cluster_size)
    if old_clusters:
        image.allocator.retire_table(header.l1_table_offset // image.cluster_size, old_clusters)


def _preallocate(image: WritableImage, start: int, end: int, preallocation: str) -> None:
    """Give every cluster from guest `start` to `end` a place. The one that `start` is inside of has more to keep, so it
    gets its place by a write."""
    cluster_end = min(end, -(-start // image.cluster_size) * image.cluster_size)
    while start < cluster_end:
        part_end = min(cluster_end, start + len(ZEROS))
        image.write_inside(ZEROS[: part_end - start], start)
        start = part_end
    while start < end:
        image.make_room()
        part_end = min(end, (start | image.written.slice_coverage - 1) + 1)
        with image.requests.moving():
            image.put(start, part_end, lambda piece: _reserve(image, piece, preallocation))
        start = part_end


def _reserve(image: WritableImage, piece: Piece, preallocation: str) -> None:
    """Make the place of `piece` read as zeros, with as much disk space as wanted, and lie inside its file."""
    length = piece.end - piece.start + piece.tail.length
    if preallocation == "full":
        for offset in range(0, length, len(ZEROS)):
            image.data.write_from(ZEROS[: min(len(ZEROS), length - offset)], piece.host_offset + offset)
        return
    if not piece.is_clean:
        image.data.write_zeroes(piece.host_offset, length, may_punch=preallocation == "metadata")
    if preallocation == "falloc":
        image.data.preallocate(piece.host_offset, length)
    elif image.data.size() < piece.host_offset + length:
        image.data.truncate(piece.host_offset + length)


def _shrink(image: WritableImage, new_size: int) -> None:
    old_size = image.virtual_size
    geometry = image.header.geometry
    used_tables = geometry.l1_entries_for(old_size)
    with image.write_back.turn, image.locked():
        image.write_back.run_alone()  # so that no slice of tables is kept that knows the old size
        image.virtual_size = new_size
        _tell_tables(image, new_size)
        image.requests.drain()
    try:
        cut = -(-new_size // image.cluster_size) * image.cluster_size
        image.clear_clusters(cut, used_tables * geometry.l2_coverage, Clearing.DROP)
        image.flush()
        with image.write_back.turn, image.locked():
            _drop_tables(image, geometry.l1_entries_for(new_size), used_tables)
            image.tracker.resize(new_size, image.allocator)
            image.write_back.run_alone()
            image.file.update_header(size=new_size)
            image.file.barrier()
            image.write_back.run_alone()  # now with the refcounts that fell
    except BaseException:
        with image.locked():
            image.virtual_size = image.header.virtual_size
            _tell_tables(image, image.virtual_size)
        raise
    _cut_files(image)


def _drop_tables(image: WritableImage, first: int, end: int) -> None:
    """Forget the L2 tables of L1 entries that no guest byte needs."""
    index = image.tables.next_table(first, end)
    while index < end:
        image.tables.drop_table(index)
        index = image.tables.next_table(index + 1, end)


def _cut_files(image: WritableImage) -> None:
    """Give back what lies behind the disk and behind the last cluster in use. A device keeps its size."""
    with image.locked():
        end_of_use = image.allocator.end_of_use()
    try:
        if image.header.has_data_file:
            image.data.truncate(image.virtual_size)
        if end_of_use < image.file.storage.size():
            image.file.truncate(end_of_use)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _tell_tables(image: WritableImage, virtual_size: int) -> None:
    """The disk has this size, as the tables know it. Lock held."""
    header = image.header
    image.tables.move(header.l1_table_offset, header.l1_size, virtual_size)
    image.written.follow_tables()
