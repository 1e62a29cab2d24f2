"""A backing disk that was not opened: it stands where the disk below an image would be, and refuses to answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

from qcow2_plugin.errors import MissingReferenceError
from qcow2_plugin.extent import Extent
from qcow2_plugin.format.geometry import MAX_HOST_OFFSET


class UnopenedDisk:
    """The disk below the image `path`, of which nobody knows anything."""

    virtual_size = MAX_HOST_OFFSET
    """As large as a disk can be, so that nothing is taken for being behind its end."""

    def __init__(self, path: str) -> None:
        self._path = path

    def read_into(self, buffer: memoryview, offset: int, /) -> None:
        """Raises MissingReferenceError."""
        self._refuse()

    def extents(self, offset: int = 0, length: int | None = None, *, whole_chain: bool = True) -> Iterator[Extent]:
        """Raises MissingReferenceError."""
        self._refuse()

    def prefetch(self, offset: int, length: int, /) -> None:
        """Nothing can be had sooner."""

    def _refuse(self) -> NoReturn:
        raise MissingReferenceError(
            "the image was opened without its backing files, and this part of the disk is in one", file=self._path
        )
