"""Disks as snapshots keep them, of an image that may change meanwhile.

What only a snapshot keeps becomes free when it is deleted. So whoever reads such a disk is noted like the readers of
the active one (see `requests`), and with its snapshot the disk is closed: who begins later is refused, who began
before is waited for.

**Lock.** The image's, for opening and closing; its readers take none of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice

from qcow2_plugin.engine.dirty_bitmaps.dirty import DirtyBitmap
from qcow2_plugin.engine.image import Image, Layer
from qcow2_plugin.engine.requests import Requests
from qcow2_plugin.extent import Extent
from qcow2_plugin.format.bitmaps import Bitmap
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.snapshots import Snapshot

_EXTENTS_AT_ONCE = 4096


class SnapshotViews:
    """The disks that were opened of the snapshots of one image; `requests` are the image's."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._opened: weakref.WeakSet[_SnapshotDisk] = weakref.WeakSet()

    def open(self, image: Image, layer: Layer, snapshot: Snapshot) -> Image:
        """The disk of a snapshot that `image` has now. Raises as `Image` does."""
        disk = _SnapshotDisk(image, layer, snapshot, self._requests)
        self._opened.add(disk)
        return disk

    def close(self, snapshot: Snapshot) -> None:
        """The snapshot is no longer there; `drain` comes next."""
        for disk in list(self._opened):
            if disk.snapshot.id == snapshot.id:  # the rest of its entry may have been written anew
                disk.close()


class _SnapshotDisk(Image):
    """One of them. What is not of this disk but of the whole `image` may move, so that is asked."""

    def __init__(self, image: Image, layer: Layer, snapshot: Snapshot, requests: Requests) -> None:
        super().__init__(layer, ExitStack(), snapshot)
        self.snapshot = snapshot
        self._image = image
        self._requests = requests

    @property
    def header(self) -> Header:
        """The header as it is now."""
        return self._image.header

    def snapshots(self) -> list[Snapshot]:
        """As `Image.snapshots`."""
        return self._image.snapshots()

    def bitmaps(self) -> list[Bitmap]:
        """As `Image.bitmaps`."""
        return self._image.bitmaps()

    def dirty_bitmap(self, name: str | bytes) -> DirtyBitmap:
        """As `Image.dirty_bitmap`."""
        return self._image.dirty_bitmap(name)

    def at_snapshot(self, wanted: str | bytes | Snapshot) -> Image:
        """As `Image.at_snapshot`."""
        return self._image.at_snapshot(wanted)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """As `Image.read_into`."""
        with self._requests.moving():
            self.require_open()  # after the note
            super().read_into(buffer, offset)

    def _runs(self, offset: int, length: int) -> Iterator[Extent]:
        end = offset + length
        while offset < end:
            with self._requests.moving():
                self.require_open()
                extents = list(islice(super()._runs(offset, end - offset), _EXTENTS_AT_ONCE))
            yield from extents
            offset = extents[-1].guest_offset + extents[-1].length
