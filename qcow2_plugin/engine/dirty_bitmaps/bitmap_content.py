"""What a bitmap marks, as a whole, and the union of several.

Bits go through here in *pieces*: the number of a cluster of bits and the bits in it, or None where all are set. Bitmaps
of other granularities and clusters of other sizes are brought to those of the bitmap that they are merged into: a bit
that stands for more becomes several, several become one if any of them is set.

Memory: one piece at a time of what is read from the same image; all of what is read from another one, and all of what
is new (512 MiB for the largest bitmap there is, 2 MiB for a disk of 1 TiB with the usual granularity).

Source: docs/interop/qcow2.rst, "Bitmaps".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.dirty_bitmaps import bitmaps
from qcow2_plugin.engine.dirty_bitmaps.tracking import Piece
from qcow2_plugin.engine.header import read_structure
from qcow2_plugin.engine.image import Image
from qcow2_plugin.errors import BitmapError, about_file, printable
from qcow2_plugin.format import bits
from qcow2_plugin.format.bitmaps import Bitmap

if TYPE_CHECKING:
    from qcow2_plugin.engine.writable import WritableImage

Bits = npt.NDArray[np.uint8]
Table = npt.NDArray[np.uint64]

_MAX_EXPANDED = 1 << 20
"""Bits of another granularity that are made at once, where one is not more already."""


@dataclass(frozen=True)
class BitmapContent:
    """All that a bitmap of some image marked at one moment."""

    virtual_size: int
    granularity_bits: int
    cluster_size: int
    pieces: tuple[Piece, ...]


def read_content(image: Image, name: bytes) -> BitmapContent:
    """What a bitmap of an open image marks now, also if the image is being written to.

    Raises MissingReferenceError if there is no such bitmap, BitmapError if it must not be used; CorruptImageError,
    TruncatedImageError, OSError. Lock: that image's is taken here.
    """
    if image.writable:
        written = cast("WritableImage", image)
        with written.locked():
            image.require_open()
            bitmap, pieces = _held_pieces(written, name)
    else:
        bitmap, pieces = _stored_pieces(image, name)
    return BitmapContent(image.virtual_size, bitmap.granularity_bits, image.header.geometry.cluster_size, pieces)


def _held_pieces(image: WritableImage, name: bytes) -> tuple[Bitmap, tuple[Piece, ...]]:
    kept, path = image.tracker.kept, image.layer.storage.path
    bitmap = bitmaps.find((each.bitmap for each in kept), name, path)
    found = next(each for each in kept if each.bitmap is bitmap)
    require_usable(bitmap, found.reason, path)
    return bitmap, tuple(image.tracker.pieces_of(found))


def _stored_pieces(image: Image, name: bytes) -> tuple[Bitmap, tuple[Piece, ...]]:
    storage, header = image.layer.storage, image.header
    cluster_size = header.geometry.cluster_size
    bitmap = bitmaps.find(image.bitmaps(), name, storage.path)
    require_usable(bitmap, bitmap.unusable_reason(header.virtual_size, cluster_size), storage.path)
    stored = read_structure(storage, "bitmap table", bitmap.table_offset, 8 * bitmap.table_entries)
    table = np.frombuffer(stored, dtype=">u8").astype(np.uint64)
    with about_file(storage.path):
        bits.check_table(table, cluster_size)
    title = f'bitmap "{printable(name)}"'
    drawn = Drawing(
        bitmap.granularity_bits, header.virtual_size, cluster_size, table,
        lambda host_offset: read_structure(storage, title, host_offset, cluster_size),
    )  # fmt: skip
    return bitmap, tuple(drawn.pieces())


def require_usable(bitmap: Bitmap, reason: str | None, path: str) -> None:
    """Raises BitmapError if there is a reason against using a bitmap."""
    if reason is not None:
        name = printable(bitmap.name)
        raise BitmapError(
            f'bitmap "{name}" cannot be used: {reason}; all that can be done with it is to remove it', file=path
        )


class Drawing:
    """The bits of one bitmap while they are worked out: those that stay where they are on disk, and new ones."""

    def __init__(
        self, granularity_bits: int, virtual_size: int, cluster_size: int, table: Table, read: Callable[[int], bytes]
    ) -> None:
        """`table` says what is on disk, and `read` a cluster of that from a host offset."""
        self.granularity_bits = granularity_bits
        self.cluster_size = cluster_size
        self.table = table.copy()
        """What is on disk still, or needs no place."""
        self.fresh: dict[int, Bits] = {}
        """What needs a place, by number of cluster of bits."""
        self._read = read
        self._virtual_size = virtual_size
        self._last, self._tail = divmod(-(-virtual_size >> granularity_bits), 8 * cluster_size)

    def pieces(self) -> Iterator[Piece]:
        """What is marked. Raises TruncatedImageError, OSError."""
        for index in sorted(self.fresh.keys() | np.flatnonzero(self.table).tolist()):
            fresh = self.fresh.get(index)
            entry = int(self.table[index])
            if fresh is None and entry == bits.TABLE_ALL_ONES:
                yield index, None
            else:
                yield index, np.frombuffer(self._read(entry), dtype=np.uint8) if fresh is None else fresh

    def merge(self, pieces: Iterable[Piece], granularity_bits: int, cluster_size: int) -> None:
        """Mark what `pieces` of a bitmap with these properties mark. Raises TruncatedImageError, OSError."""
        is_alike = (granularity_bits, cluster_size) == (self.granularity_bits, self.cluster_size)
        everything = np.full(cluster_size, 0xFF, dtype=np.uint8)
        end = -(-self._virtual_size >> granularity_bits)
        for index, piece in pieces:
            if piece is None and is_alike and index < self._last:
                self.fresh.pop(index, None)
                self.table[index] = bits.TABLE_ALL_ONES
                continue
            first_bit = 8 * cluster_size * index
            inside = max(end - first_bit, 0) + 7 >> 3
            found = (everything if piece is None else piece)[:inside]
            for place, packed in _converted(found, first_bit, granularity_bits - self.granularity_bits):
                self._mark(place, packed)
        self._tidy()

    def _mark(self, place: int, packed: Bits) -> None:
        """Set bits, from byte `place` of the bitmap on; what is behind its end is nothing."""
        packed = packed[: max(len(self.table) * self.cluster_size - place, 0)]
        while packed.size:
            index, within = divmod(place, self.cluster_size)
            part = packed[: self.cluster_size - within]
            if part.any():
                self._mark_inside(index, within, part)
            packed = packed[part.size :]
            place += part.size

    def _mark_inside(self, index: int, within: int, part: Bits) -> None:
        inside = slice(within, within + part.size)
        known = self.fresh.get(index)
        entry = int(self.table[index])
        if known is None and entry == bits.TABLE_ALL_ONES:
            return
        if known is None and not entry and part.size == self.cluster_size:
            self.fresh[index] = part.copy()  # whose it is goes on with it
            return
        if known is None:
            known = np.frombuffer(self._read(entry) if entry else bytes(self.cluster_size), dtype=np.uint8)
            if entry and not (part & ~known[inside]).any():
                return
        if not known.flags.writeable:
            known = known.copy()
        known[inside] |= part
        self.fresh[index] = known
        self.table[index] = 0

    def _tidy(self) -> None:
        """Nothing is marked behind the end of the disk, and what is the same all over needs no place."""
        last = self.fresh.get(self._last)
        if last is not None and self._tail:
            packed = bytearray(last)
            bits.clear_from(packed, self._tail)
            self.fresh[self._last] = np.frombuffer(packed, dtype=np.uint8)
            if not any(packed):
                del self.fresh[self._last]
        for index in [index for index, known in self.fresh.items() if known[0] == 0xFF and index != self._last]:
            if self.fresh[index].min() == 0xFF:
                self.table[index] = bits.TABLE_ALL_ONES
                del self.fresh[index]


def _converted(piece: Bits, first_bit: int, coarser_bits: int) -> Iterator[tuple[int, Bits]]:
    """(first byte, packed bits) of the same marks in a bitmap with granules that are 2 ** `coarser_bits` smaller;
    larger, if negative. `first_bit` is the number of the first one in `piece`."""
    if not coarser_bits:
        yield first_bit // 8, piece
        return
    if coarser_bits < 0:
        group = 1 << -coarser_bits
        if group > 8 * piece.size:
            values = np.array([piece.any()])
        else:
            every = np.unpackbits(piece, bitorder="little", count=-(-8 * piece.size // group) * group)
            values = np.asarray(every.reshape(-1, group).any(axis=1))
        place, within = divmod(first_bit >> -coarser_bits, 8)
        yield place, np.packbits(np.concatenate((np.zeros(within, dtype=np.bool_), values)), bitorder="little")
        return
    step = max(_MAX_EXPANDED >> coarser_bits + 3, 1)
    for start in range(0, piece.size, step):
        window = piece[start : start + step]
        if window.any():
            values = np.repeat(np.unpackbits(window, bitorder="little"), 1 << coarser_bits)
            yield (first_bit // 8 + start) << coarser_bits, np.packbits(values, bitorder="little")
