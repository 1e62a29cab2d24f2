"""A snapshot table that the format allows, in place of one that it does not.

The new table is written beside the old one and the header switched to it, by one write of count and offset. What the
entries say is kept: the name, the dates, where the L1 table is; unknown extra data as far as the format has room.

Source: docs/interop/qcow2.rst, "Snapshots".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.image_file import ImageFile, Structure
from qcow2_plugin.engine.writeback import write_refcounts_now
from qcow2_plugin.format.geometry import MAX_SNAPSHOT_EXTRA_SIZE
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.snapshots import Snapshot, pack_table

DROPPING_KINDS = ("snapshots-too-many", "snapshot-table-too-large")
"""What is found where a new snapshot table has fewer snapshots."""
SNAPSHOT_KINDS = ("snapshot-incomplete", "snapshot-extra-too-large", *DROPPING_KINDS)
"""What is found in a snapshot table that has to be written anew."""

_EXTRA = struct.Struct(">QQQ")
_NO_ICOUNT = (1 << 64) - 1


def write_snapshots(file: ImageFile, allocator: Allocator, snapshots: Iterable[Snapshot]) -> None:
    """Let the header name a table of these snapshots, each mended, durably. The old one is what a count finds leaked.

    Raises CorruptImageError, OSError; then the old table is in force, and the new one may be leaked.
    """
    mended = [_mended(snapshot, file.header) for snapshot in snapshots]
    table = pack_table(mended)
    host_offset = 0
    if table:
        host_offset = allocator.allocate_table(Structure.SNAPSHOT_TABLE, len(table))
        file.write(Structure.SNAPSHOT_TABLE, table, host_offset)
        write_refcounts_now(file, allocator)
        file.barrier()
    file.update_header(snapshot_count=len(mended), snapshots_offset=host_offset)
    file.barrier()


def _mended(snapshot: Snapshot, header: Header) -> Snapshot:
    extra = snapshot.extra[:MAX_SNAPSHOT_EXTRA_SIZE]
    if header.version > 2 and len(extra) < 16:
        extra = _EXTRA.pack(snapshot.vm_state_size, header.virtual_size, _NO_ICOUNT)
    return replace(snapshot, extra=extra)
