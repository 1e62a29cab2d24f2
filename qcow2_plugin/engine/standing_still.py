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
    with image.requests.alone(), image.write_back.turn, image.locked():
        image.require_open()
        image.get_ready()
        image.tables.forget_write_lanes()
        image.requests.drain()
        image.write_back.run_alone()
        yield
