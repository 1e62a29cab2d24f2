"""Is an external data file all that its image shows? What can be said of the two without any other copy of the disk.

An entry that says data leads to the place in the data file that the guest has it in (`mapping` holds each look-up
against that), so there the two cannot differ. Where an entry says zeros, or there is none and no backing file, the
guest sees zeros whatever the data file holds: there it is looked at. Holes are not read.

Owns these looks, and refuses to know what hangs on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qcow2_plugin.engine.image import Image
from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.extent import ExtentKind
from qcow2_plugin.storage import Storage

_PIECE = 1 << 20
_ZEROS = bytes(_PIECE)

Progress = Callable[[int, int], None]


def first_hidden(image: Image, progress: Progress | None = None) -> int | None:
    """Where the data file first holds a byte, not 0, that the guest does not see; None if it nowhere does.

    `image` has an external data file and no backing file. `progress` is told (done, total) bytes. Raises
    CorruptImageError, TruncatedImageError, OSError.
    """
    data, size = image.layer.data, image.virtual_size
    tell = progress or (lambda done, total: None)
    for extent in image.extents(whole_chain=False):
        if extent.kind is ExtentKind.DATA:
            if extent.host_offset != extent.guest_offset:
                raise CorruptImageError(
                    "L2 table",
                    f"guest offset {extent.guest_offset:#x} is in another place of the data file",
                    file=image.layer.storage.path,
                )
        else:
            for place, content in data_pieces(data, extent.guest_offset, extent.length):
                found = _first_in(content)
                if found is not None:
                    return place + found
                tell(place, size)
        tell(extent.guest_offset + extent.length, size)
    return None


def first_byte(data: Storage, offset: int, length: int) -> int | None:
    """Where in a range the first byte is that is not 0; None if there is none. Raises OSError."""
    for place, content in data_pieces(data, offset, length):
        found = _first_in(content)
        if found is not None:
            return place + found
    return None


def _first_in(content: bytes) -> int | None:
    if content == _ZEROS[: len(content)]:
        return None
    return len(content) - len(content.lstrip(b"\0"))


def first_difference(one: Storage, other: Storage, offset: int, length: int) -> int | None:
    """Where in a range two files first differ; None if they do not. Raises OSError."""
    for start, count, is_data in one.data_ranges(offset, length):
        if not is_data:
            found = first_byte(other, start, count)
            if found is not None:
                return found
            continue
        for place in range(start, start + count, _PIECE):
            size = min(_PIECE, start + count - place)
            found = difference(one.pread(size, place), other.pread(size, place))
            if found is not None:
                return place + found
    return None


def difference(one: bytes, other: bytes) -> int | None:
    """Where two strings first differ, the shorter one going on with zeros; None if they do not."""
    length = max(len(one), len(other))
    one, other = one.ljust(length, b"\0"), other.ljust(length, b"\0")
    if one == other:
        return None
    return next(index for index in range(length) if one[index] != other[index])


def data_pieces(data: Storage, offset: int, length: int) -> Iterator[tuple[int, bytes]]:
    """(place, content) of what is no hole in a range, a piece at a time. Raises OSError."""
    for start, count, is_data in data.data_ranges(offset, length):
        for place in range(start, start + count if is_data else start, _PIECE):
            yield place, data.pread(min(_PIECE, start + count - place), place)
