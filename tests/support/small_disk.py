"""A small image with one run of data, for tests of what becomes of a disk as a whole."""

from __future__ import annotations

from pathlib import Path

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.operations.create import create_image

SIZE = 4 << 20
_START = 100_000
_CONTENT = bytes(range(1, 256)) * 8000

DISK = (bytes(_START) + _CONTENT).ljust(SIZE, b"\0")
"""What the guest sees."""


def make_small_disk(path: Path) -> Path:
    """Make the image; its path."""
    create_image(path, SIZE)
    with open_image(path, writable=True) as image:
        image.pwrite(_CONTENT, _START)
        image.flush()
    return path
