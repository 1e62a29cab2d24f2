"""Internal snapshots: made, applied, deleted and listed.

Each verb takes an image that is open for writing, with threads reading and writing or not, or a path; then the image
is opened for as long as it takes, without its backing files. The snapshot of an open image is of one moment: all that
was written before is in it, and nothing of what is written after.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, cast

from qcow2_plugin.engine.chain import open_alone
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.internal_snapshots import snapshotting
from qcow2_plugin.engine.internal_snapshots.snapshot_sizes import snapshot_sizes
from qcow2_plugin.engine.internal_snapshots.snapshots import read_snapshots
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.names import to_bytes
from qcow2_plugin.operations.info import SnapshotInfo, snapshot_info
from qcow2_plugin.operations.opened import opened
from qcow2_plugin.storage import Storage
from qcow2_plugin.storage.opener import open_given

if TYPE_CHECKING:
    from qcow2_plugin.engine.writable import WritableImage

Path = str | os.PathLike[str]


class ListedSnapshot(NamedTuple):
    """A snapshot, and the bytes of the image file that its deletion would give back (`own_size`) and that it makes any
    use of (`referred_size`); None if they were not asked for."""

    snapshot: SnapshotInfo
    own_size: int | None
    referred_size: int | None


def create_snapshot(image: Image | Path, name: str | bytes) -> SnapshotInfo:
    """Keep the disk as it is now, under this name and the next ID; names need not be unique.

    Raises SnapshotError if there are too many, the name is none, or refcounts are too narrow for one more;
    UnsupportedFeatureError for an image with a data file; what `open_image` and `Image.write_from` raise. Then there
    is no new snapshot.
    """
    with _opened(image) as found:
        snapshotting.require_name(to_bytes(name), found.layer.storage.path)
        made = snapshotting.create_snapshot(found, to_bytes(name), time.time_ns())
        return snapshot_info(made, found.header)


def apply_snapshot(image: Image | Path, wanted: str | bytes, *, mark_bitmaps: bool = False) -> SnapshotInfo:
    """Let the disk be as the snapshot with this ID or else this name keeps it, of that size; what it holds now is lost.

    An image with dirty bitmaps is refused, unless `mark_bitmaps` says that the enabled ones are to mark what changes.

    Raises MissingReferenceError if there is no such snapshot; SnapshotError, ResizeError (bitmaps that cannot follow)
    and what `open_image` and `Image.write_from` raise. Then the disk is as before; only if what it held cannot be
    given back, it is as in the snapshot and the error says why.
    """
    with _opened(image) as found:
        applied = snapshotting.apply_snapshot(found, to_bytes(wanted), mark_bitmaps=mark_bitmaps)
        return snapshot_info(applied, found.header)


def delete_snapshot(image: Image | Path, wanted: str | bytes) -> SnapshotInfo:
    """Forget the snapshot with this ID or else this name, and give back what it alone kept.

    Raises MissingReferenceError if there is no such snapshot; what `open_image` and `Image.write_from` raise. Then it
    is there as before; only if what it kept cannot be given back, it is gone and the error says why.
    """
    with _opened(image) as found:
        deleted = snapshotting.delete_snapshot(found, to_bytes(wanted))
        return snapshot_info(deleted, found.header)


def list_snapshots(image: Image | Path, *, with_sizes: bool = False, force_share: bool = False) -> list[ListedSnapshot]:
    """The snapshots in the order of the table. `with_sizes` reads all of their tables.

    `force_share` looks at the file although another program may be writing to it. Raises CorruptImageError,
    TruncatedImageError; what `info` raises.
    """
    if not isinstance(image, Image):
        storage = open_given(image, force_share=force_share)
        try:
            return _listed(storage, read_header(storage), with_sizes=with_sizes)
        finally:
            storage.close()
    if not with_sizes:
        return [ListedSnapshot(snapshot_info(each, image.header), None, None) for each in image.snapshots()]
    if not image.writable:
        return _listed(image.layer.storage, image.header, with_sizes=True)
    with snapshotting.settled(cast("WritableImage", image)):
        return _listed(image.layer.storage, image.header, with_sizes=True)


def _listed(storage: Storage, header: Header, *, with_sizes: bool) -> list[ListedSnapshot]:
    known = read_snapshots(storage, header)
    told = [snapshot_info(each, header) for each in known]
    if not with_sizes or header.has_data_file:
        return [ListedSnapshot(each, None, None) for each in told]
    sizes = snapshot_sizes(storage, header, known)
    return [ListedSnapshot(each, *found) for each, found in zip(told, sizes, strict=True)]


@contextmanager
def _opened(image: Image | Path) -> Iterator[WritableImage]:
    if isinstance(image, Image):
        with opened(image) as found:
            yield found
    else:
        with open_alone(image, writable=True) as alone:
            yield cast("WritableImage", alone)
