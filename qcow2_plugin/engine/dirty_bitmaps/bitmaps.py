"""The list of persistent dirty bitmaps in an image file. What a bitmap marks is in `dirty`.

Source: docs/interop/qcow2.rst, "Bitmaps".
"""

from __future__ import annotations

from collections.abc import Iterable

from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.errors import MissingReferenceError, UnfinishedTransactionError, about_file, printable
from qcow2_plugin.format import bitmaps as format_bitmaps
from qcow2_plugin.format import names
from qcow2_plugin.format.bitmaps import Bitmap
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.transaction import mark_of
from qcow2_plugin.storage import Storage


def read_bitmaps(storage: Storage, header: Header) -> list[Bitmap]:
    """The persistent bitmaps, usable or not.

    Raises CorruptImageError, TruncatedImageError, OSError; UnfinishedTransactionError if they are in doubt.
    """
    with about_file(storage.path):
        mark = mark_of(header)
        if mark is not None:
            raise UnfinishedTransactionError(
                "the bitmaps are in doubt, since a change of those of several images was interrupted; finish it with "
                f"'qcow2 bitmap recover RECORD', where RECORD is \"{printable(mark.record)}\" as seen from this image"
            )
        pointer = header.bitmaps
        if pointer is None:
            return []
        directory = read_structure(storage, "bitmap directory", pointer.directory_offset, pointer.directory_size)
        return format_bitmaps.parse_directory(directory, pointer.bitmap_count, header.geometry.cluster_size)


def find(known: Iterable[Bitmap], wanted: str | bytes, path: str) -> Bitmap:
    """The bitmap of this name. Raises MissingReferenceError."""
    name = names.to_bytes(wanted)
    found = next((bitmap for bitmap in known if bitmap.name == name), None)
    if found is None:
        raise MissingReferenceError(f'the image has no bitmap "{printable(wanted)}"', file=path)
    return found
