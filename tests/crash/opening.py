"""Opens images that are in memory for reading, as `open_image` opens files, and reads them whole.

It owns the order of the checks, which is that of `engine.chain`; it refuses to open by name.
"""

from __future__ import annotations

from contextlib import ExitStack

from qcow2_plugin.engine.header import read_header, refusals
from qcow2_plugin.engine.image import Image, Layer
from qcow2_plugin.engine.layout import check_complete, check_tables
from qcow2_plugin.engine.raw import RawDisk
from qcow2_plugin.extent import ExtentKind
from qcow2_plugin.storage import Storage
from tests.support.memory_storage import MemoryStorage

CACHE_SIZE = 1 << 20


def open_readable(image: Storage, data: Storage | None = None, backing: bytes | None = None) -> Image:
    """Raises whatever `open_image` would."""
    header = read_header(image)
    for refusal in refusals(header):
        raise refusal
    check_tables(header, image)
    check_complete(header, image)
    below = None if backing is None else RawDisk(MemoryStorage(backing, "backing"))
    return Image(Layer(header, image, data or image, below, CACHE_SIZE, False), ExitStack())


def read_disk(image: Image) -> bytes:
    """The whole disk. What stores nothing is not read, which saves most of the time."""
    view = bytearray(image.virtual_size)
    with memoryview(view) as buffer:
        for offset, length, kind, _, _, _ in image.extents(whole_chain=False):
            is_empty = kind is ExtentKind.ZERO or (kind is ExtentKind.UNALLOCATED and image.layer.backing is None)
            if not is_empty:
                image.read_into(buffer[offset : offset + length], offset)
    return bytes(view)
