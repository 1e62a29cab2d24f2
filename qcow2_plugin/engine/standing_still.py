"""An image that stands still while something about it as a whole changes: a snapshot, a bitmap, the header."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcow2_plugin.engine.writable import WritableImage


@contextmanager
def standing_still(image: WritableImage) -> Iterator[None]:
    """No write moves data or begins, and everything acknowledged is durable; the write lane leads nowhere.

    The turn of write-backs and the image's lock are held inside. Reads through the lane go on: what they may still
    read has to be retired, not reused. The current thread must neither be in flight nor in a change. Raises
    FailedImageError, ImageClosedError, OSError.
    """
    with at_rest(image):
        image.get_ready()
        yield


@contextmanager
def at_rest(image: WritableImage) -> Iterator[None]:
    """`standing_still` for changes that leave the disk as it is: bitmaps are not held because of them.

    An image that was opened just for that can crash then without making any bitmap stale. `get_ready` may be called
    inside. Raises as `standing_still` does.
    """
    with image.requests.alone(), image.write_back.turn, image.locked():
        image.require_open()
        image.get_structures_ready()
        image.tables.forget_write_lanes()
        image.requests.drain()
        image.write_back.run_alone()
        yield
