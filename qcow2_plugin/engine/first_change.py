"""What has to be true of an image file before anybody changes it: refcounts, and what feature bits promise.

Bitmaps that follow the disk are not its business (see `tracking`): not every change is one of the disk.
"""

from __future__ import annotations

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.image_file import ImageFile
from qcow2_plugin.engine.tables import Tables
from qcow2_plugin.format.header import AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, EXTENSION_BITMAPS, Header


def put_right(file: ImageFile, allocator: Allocator, tables: Tables) -> None:
    """Make the refcounts of a dirty image right, and take back what a writer of this package does not promise, durably.

    Raises CorruptImageError, TruncatedImageError, OSError. Lock: the image's.
    """
    if file.header.dirty:
        from qcow2_plugin.engine.repairing.rebuild import rebuild_refcounts  # few images need it, so few wait for it

        rebuild_refcounts(file, allocator)
        tables.forget()
    kept = kept_autoclear_features(file.header)
    if kept != file.header.autoclear_features:
        file.update_header(autoclear_features=kept)
        file.barrier()


def kept_autoclear_features(header: Header) -> int:
    """The autoclear features whose promise a writer of this package keeps."""
    kept = header.autoclear_features & (AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW)
    if header.extension_data(EXTENSION_BITMAPS) is None:
        kept &= ~AUTOCLEAR_BITMAPS
    return kept
