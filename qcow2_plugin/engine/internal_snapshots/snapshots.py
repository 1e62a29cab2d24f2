"""Internal snapshots as they are in an image file: reading the table, finding one, trusting its L1 table.

Source: docs/interop/qcow2.rst, "Snapshots".
"""

from __future__ import annotations

from collections.abc import Iterable

from qcow2_plugin.errors import CorruptImageError, MissingReferenceError, TruncatedImageError, about_file, printable
from qcow2_plugin.format import snapshots as format_snapshots
from qcow2_plugin.format.geometry import MAX_HOST_OFFSET, MAX_L1_ENTRIES, MAX_SNAPSHOT_TABLE_SIZE
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.snapshots import Snapshot
from qcow2_plugin.storage import Storage

_WINDOW = 1 << 20
"""Bytes of the table looked at together; more than any entry."""


def read_snapshots(
    storage: Storage, header: Header, limit: int | None = None, size_limit: int | None = None
) -> list[Snapshot]:
    """The internal snapshots in table order; the first `limit` of them, and as far as about `size_limit` bytes of the
    table tell them, where these are given.

    Raises CorruptImageError, TruncatedImageError, OSError.
    """
    count = header.snapshot_count if limit is None else min(limit, header.snapshot_count)
    found: list[Snapshot] = []
    offset = header.snapshots_offset
    while len(found) < count:
        window = storage.pread(_WINDOW, offset)
        with about_file(storage.path):
            entries, used = format_snapshots.parse_entries(window, count - len(found))
        if not entries:
            raise TruncatedImageError(
                "snapshot table",
                f"entry {len(found)} of {header.snapshot_count} lies past the end of the file",
                host_offset=header.snapshots_offset,
                file=storage.path,
            )
        found += entries
        offset += used
        if size_limit is not None and offset - header.snapshots_offset > size_limit:
            return found
        if offset - header.snapshots_offset > MAX_SNAPSHOT_TABLE_SIZE:
            raise CorruptImageError(
                "snapshot table", "is too large", host_offset=header.snapshots_offset, file=storage.path
            )
    return found


def find(known: Iterable[Snapshot], wanted: str | bytes, path: str) -> Snapshot:
    """The snapshot with this ID or else this name. Raises MissingReferenceError."""
    found = format_snapshots.find(known, wanted)
    if found is None:
        raise missing(wanted, path)
    return found


def missing(wanted: str | bytes, path: str) -> MissingReferenceError:
    """The error to raise about a snapshot that is not there."""
    return MissingReferenceError(f'the image has no internal snapshot "{printable(wanted)}"', file=path)


def check_l1_table(snapshot: Snapshot, storage: Storage, header: Header, *, allow_damaged: bool) -> None:
    """Raises CorruptImageError or TruncatedImageError unless the snapshot's L1 table can be what it says."""
    geometry = header.geometry
    table = f'L1 table of snapshot "{printable(snapshot.id)}"'
    detail = None
    if snapshot.l1_size > MAX_L1_ENTRIES:
        detail = f"has {snapshot.l1_size} entries, too many"
    elif snapshot.l1_size < geometry.l1_entries_for(snapshot.virtual_size(header.virtual_size)):
        detail = f"has {snapshot.l1_size} entries, too few for the snapshot's disk"
    elif snapshot.l1_size and (not snapshot.l1_table_offset or snapshot.l1_table_offset % geometry.cluster_size):
        detail = "is not at the start of a cluster behind the header"
    elif snapshot.l1_table_offset + 8 * snapshot.l1_size > MAX_HOST_OFFSET:
        detail = "lies where no file can reach"
    if detail is not None:
        raise CorruptImageError(table, detail, host_offset=snapshot.l1_table_offset, file=storage.path)
    if snapshot.l1_table_offset + 8 * snapshot.l1_size > storage.size() and not allow_damaged:
        raise TruncatedImageError(
            table, "lies past the end of the file", host_offset=snapshot.l1_table_offset, file=storage.path
        )
