"""Which bitmaps there will be, and what they will mark, after changes that were asked for: with the rules, which are
QEMU's, and without writing anything.

A bitmap that cannot be used, because it was not closed properly or is of a kind that nobody here knows, can be removed
and nothing else; it is kept byte for byte. Two bitmaps are merged whatever their granularities, but over disks of one
size.

Source: docs/interop/qcow2.rst, "Bitmaps"; the limits are those that QEMU enforces.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from qcow2_plugin.engine.dirty_bitmaps.bitmap_content import BitmapContent, Drawing, require_usable
from qcow2_plugin.engine.dirty_bitmaps.bitmaps import find
from qcow2_plugin.engine.dirty_bitmaps.tracking import BitmapTracker, Kept, Piece
from qcow2_plugin.errors import BitmapError, printable
from qcow2_plugin.format.bitmaps import FLAG_AUTO, TYPE_DIRTY_TRACKING, Bitmap, pack_directory, table_entries_for
from qcow2_plugin.format.geometry import (
    MAX_BITMAP_DATA_SIZE,
    MAX_BITMAP_DIRECTORY_SIZE,
    MAX_BITMAPS,
    MAX_NAME_LENGTH,
)
from qcow2_plugin.format.header import Header

MIN_GRANULARITY, MAX_GRANULARITY = 512, 2 << 30
_MIN_DEFAULT_GRANULARITY, _MAX_DEFAULT_GRANULARITY = 4 << 10, 64 << 10


class BitmapVerb(enum.Enum):
    """What can be done to a bitmap."""

    ADD = "add"
    REMOVE = "remove"
    CLEAR = "clear"
    ENABLE = "enable"
    DISABLE = "disable"
    MERGE = "merge"
    ROTATE = "rotate"
    """Disable one that is enabled and add another, enabled, in its place."""


Verb = BitmapVerb
"""Its name where bitmaps are what it is all about."""


class BitmapChange(NamedTuple):
    """One change of the bitmap `name`."""

    verb: Verb
    name: bytes
    granularity: int | None = None
    """ADD and ROTATE: bytes; None is the usual one, or that of the bitmap before."""
    is_enabled: bool = True
    """ADD."""
    source: bytes | BitmapContent | None = None
    """MERGE: what is merged into it, a bitmap of the same image or what one of another image marks."""
    new_name: bytes = b""
    """ROTATE."""


def rotating(old: bytes, new: bytes, granularity: int | None = None) -> list[BitmapChange]:
    """The changes that freeze `old` and begin `new`."""
    return [BitmapChange(Verb.ROTATE, old, granularity, new_name=new)]


@dataclass(eq=False)
class Planned:
    """One bitmap as it will be. `bitmap` is its entry in the directory, but for in_use and for a new table."""

    bitmap: Bitmap
    kept: Kept | None = None
    """As it was, None if it is new."""
    drawing: Drawing | None = None
    """Its bits, unless they and the table stay as they are."""
    is_changed: bool = False


class Plan:
    """The bitmaps as they will be, after more and more changes; all that are held have been settled."""

    def __init__(self, header: Header, tracker: BitmapTracker, path: str) -> None:
        """Raises BitmapError if the bitmaps do not fit the disk."""
        self.planned = [Planned(kept.bitmap, kept) for kept in tracker.kept]
        self._first = list(self.planned)
        self._header, self._tracker, self._path = header, tracker, path
        if tracker.has_held:
            raise self._error("the bitmaps do not fit the disk, since a change of its size has failed; change it again")

    @property
    def changes_nothing(self) -> bool:
        """The bitmaps are what they were."""
        return self.planned == self._first and not any(each.is_changed for each in self.planned)

    def add(self, change: BitmapChange) -> None:
        """One change more. Raises MissingReferenceError, BitmapError; CorruptImageError, TruncatedImageError, OSError
        if bits cannot be read."""
        if change.verb is Verb.ADD:
            self._add(change.name, change.granularity, is_enabled=change.is_enabled)
            return
        planned = self._find(change.name)
        if change.verb is Verb.REMOVE:
            self.planned.remove(planned)
            return
        self._require_usable(planned)
        if change.verb is Verb.CLEAR:
            planned.drawing, planned.is_changed = self._empty(planned.bitmap), True
        elif change.verb is Verb.ROTATE:
            self._rotate(planned, change)
        elif change.verb is Verb.MERGE:
            self._merge(planned, change.source)
        else:
            self._enable(planned, is_enabled=change.verb is Verb.ENABLE)

    def require_room(self) -> None:
        """Raises BitmapError if the directory would be too large."""
        size = len(pack_directory(each.bitmap for each in self.planned))
        if size > MAX_BITMAP_DIRECTORY_SIZE:
            raise self._error(
                f"the bitmap directory would have {size} bytes, more than {MAX_BITMAP_DIRECTORY_SIZE}; remove bitmaps, "
                "or give them shorter names"
            )

    def _add(self, name: bytes, granularity: int | None, *, is_enabled: bool) -> None:
        header = self._header
        if granularity is None:
            usual = header.geometry.cluster_size
            granularity = min(max(usual, _MIN_DEFAULT_GRANULARITY), _MAX_DEFAULT_GRANULARITY)
        self._require_possible(name, granularity)
        granularity_bits = granularity.bit_length() - 1
        entries = table_entries_for(header.virtual_size, granularity_bits, header.geometry.cluster_size)
        if not 0 < entries * header.geometry.cluster_size <= MAX_BITMAP_DATA_SIZE:
            raise self._error(
                f'bitmap "{printable(name)}" with a granularity of {granularity} bytes cannot describe a disk of '
                f"{header.virtual_size} bytes: it may have {MAX_BITMAP_DATA_SIZE} bytes of bits, and at least one; "
                "take another granularity"
            )
        flags = FLAG_AUTO if is_enabled else 0
        bitmap = Bitmap(0, entries, flags, TYPE_DIRTY_TRACKING, granularity_bits, b"", name)
        self.planned.append(Planned(bitmap, drawing=self._empty(bitmap), is_changed=True))

    def _require_possible(self, name: bytes, granularity: int) -> None:
        detail = None
        if self._header.version < 3:
            detail = "an image of version 2 cannot have bitmaps; amend it to version 3 (compat=1.1) first"
        elif not 0 < len(name) <= MAX_NAME_LENGTH:
            detail = f"the name of a bitmap has 1 to {MAX_NAME_LENGTH} bytes, not {len(name)}"
        elif b"\0" in name:
            detail = f'the name of a bitmap cannot hold a NUL byte, as "{printable(name)}" does'
        elif any(each.bitmap.name == name for each in self.planned):
            detail = f'the image has a bitmap "{printable(name)}" already; take another name, or remove that one first'
        elif not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY or granularity & granularity - 1:
            detail = (
                f"the granularity of a bitmap is a power of two from {MIN_GRANULARITY} to {MAX_GRANULARITY} bytes, not "
                f"{granularity}"
            )
        elif len(self.planned) >= MAX_BITMAPS:
            detail = f"the image has {MAX_BITMAPS} bitmaps already, as many as there can be; remove one first"
        if detail is not None:
            raise self._error(detail)

    def _rotate(self, planned: Planned, change: BitmapChange) -> None:
        if not planned.bitmap.auto:
            name = printable(planned.bitmap.name)
            raise self._error(
                f'bitmap "{name}" is disabled, so what was changed since then is in no bitmap: "{name}" and a new one '
                "would have a gap between them; add a new bitmap, and make a full backup"
            )
        granularity = change.granularity or planned.bitmap.granularity
        self._enable(planned, is_enabled=False)
        self._add(change.new_name, granularity, is_enabled=True)

    def _enable(self, planned: Planned, *, is_enabled: bool) -> None:
        flags = planned.bitmap.flags & ~FLAG_AUTO | (FLAG_AUTO if is_enabled else 0)
        if flags != planned.bitmap.flags:
            planned.bitmap, planned.is_changed = replace(planned.bitmap, flags=flags), True

    def _merge(self, planned: Planned, source: bytes | BitmapContent | None) -> None:
        if isinstance(source, BitmapContent):
            if source.virtual_size != self._header.virtual_size:
                raise self._error(
                    f'a bitmap of a disk of {source.virtual_size} bytes cannot be merged into "'
                    f'{printable(planned.bitmap.name)}": this disk has {self._header.virtual_size} bytes'
                )
            self._draw(planned).merge(source.pieces, source.granularity_bits, source.cluster_size)
        else:
            other = self._find(source or b"")
            self._require_usable(other)
            if other is planned:
                return
            cluster_size = self._header.geometry.cluster_size
            self._draw(planned).merge(self._pieces_of(other), other.bitmap.granularity_bits, cluster_size)
        planned.is_changed = True

    def _pieces_of(self, planned: Planned) -> Iterator[Piece]:
        if planned.drawing is not None:
            return planned.drawing.pieces()
        assert planned.kept is not None
        return self._tracker.pieces_of(planned.kept)

    def _draw(self, planned: Planned) -> Drawing:
        """The bits of a bitmap, which are to change."""
        kept = planned.kept
        if planned.drawing is None and kept is not None:
            tracker, size = self._tracker, self._header.geometry.cluster_size
            planned.drawing = Drawing(
                planned.bitmap.granularity_bits, self._header.virtual_size, size, tracker.table_of(kept),
                lambda host_offset: tracker.read_bits(kept, host_offset, size),
            )  # fmt: skip
        assert planned.drawing is not None
        return planned.drawing

    def _empty(self, bitmap: Bitmap) -> Drawing:
        header = self._header
        table = np.zeros(bitmap.table_entries, dtype=np.uint64)
        return Drawing(bitmap.granularity_bits, header.virtual_size, header.geometry.cluster_size, table, bytes)

    def _find(self, name: bytes) -> Planned:
        bitmap = find((each.bitmap for each in self.planned), name, self._path)
        return next(each for each in self.planned if each.bitmap is bitmap)

    def _require_usable(self, planned: Planned) -> None:
        if planned.kept is not None:
            require_usable(planned.bitmap, planned.kept.reason, self._path)

    def _error(self, detail: str) -> BitmapError:
        return BitmapError(detail, file=self._path)
