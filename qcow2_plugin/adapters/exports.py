"""The exports of one image: their names, what each is for people, and what it serves.

The default export ("") is what the parameters say: the disk, or the snapshot or bitmap that they name. The others are
named as the parameters would be: `snapshot=ID` (or a name) is the disk as an internal snapshot keeps it, `bitmap=NAME`
the disk as a persistent dirty bitmap sees it: what is dirty is data, what is clean is a hole and reads as zeros. So any
client that copies data and skips holes makes an incremental backup.

Only the disk itself can be written to. **Bitmaps of a writable image** are served as long as nothing changes them: one
that is enabled records every write, so what the file says of it is out of date with the first, and it is no export of
an image that is open for writing. One that is disabled stays what it is.

Refuses to know connections and errors of NBD; those are in `nbd`.

Source: the NBD protocol's "base:allocation" metadata context.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Protocol

from qcow2_plugin.adapters.command_line import ParameterError, Parameters
from qcow2_plugin.engine.dirty_bitmaps.bitmaps import find as find_bitmap
from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.internal_snapshots.snapshots import find as find_snapshot
from qcow2_plugin.errors import Qcow2Error, printable
from qcow2_plugin.extent import Extent, ExtentKind, clear
from qcow2_plugin.format import names
from qcow2_plugin.format.bitmaps import Bitmap
from qcow2_plugin.format.snapshots import Snapshot

STATE_HOLE = 1
STATE_ZERO = 2
_MAX_TABLES = 4096
"""L2 tables looked at for one reply."""
_MAX_LISTED = 1000
"""Exports told to a client that asks for a list."""
_MAX_STRING = 4096
"""Bytes of an NBD string."""
_MAX_SHOWN = 200
"""Characters of a name in a description."""
_SNAPSHOT = "snapshot="
_BITMAP = "bitmap="

Run = tuple[int, int, int]
"""Guest offset, length, state flags."""


class View(Protocol):
    """What an export serves."""

    virtual_size: int
    cluster_size: int
    target: Image | None
    """Where writes go; None if there are none."""

    def read_into(self, buffer: memoryview, offset: int, /) -> None:
        """Fill `buffer` from guest `offset`."""

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """The states of a range from its start on, ascending, without gaps, lazily; not always to its end."""

    def prefetch(self, offset: int, length: int, /) -> None:
        """Have the range in memory soon."""


class DiskView:
    """A disk as it is: the active one or a snapshot's."""

    def __init__(self, image: Image) -> None:
        self.virtual_size = image.virtual_size
        self.cluster_size = image.header.geometry.cluster_size
        self.target = image if image.writable else None
        self.read_into = image.read_into
        self.prefetch = image.prefetch
        self._image = image
        self._span = _MAX_TABLES * _least_coverage(image)

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """The states of a range, or of as much as `_MAX_TABLES` tell."""
        length = min(length, self._span)
        return ((extent.guest_offset, extent.length, _state(extent)) for extent in self._image.extents(offset, length))


class BitmapView:
    """The disk as a dirty bitmap sees it: dirty is data, clean is a hole."""

    def __init__(self, image: Image, name: bytes) -> None:
        self.virtual_size = image.virtual_size
        self.cluster_size = image.header.geometry.cluster_size
        self.target: Image | None = None
        self._image = image
        self._dirty = image.dirty_bitmap(name)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Dirty ranges from the disk, zeros between them."""
        done = 0
        for start, length in self._dirty.ranges(offset, len(buffer)):
            begin = start - offset
            clear(buffer[done:begin])
            done = begin + length
            self._image.read_into(buffer[begin:done], start)
        clear(buffer[done:])

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """The states of a range."""
        end = offset + length
        for start, dirty_length in self._dirty.ranges(offset, length):
            if offset < start:
                yield offset, start - offset, STATE_HOLE | STATE_ZERO
            yield start, dirty_length, 0
            offset = start + dirty_length
        if offset < end:
            yield offset, end - offset, STATE_HOLE | STATE_ZERO

    def prefetch(self, offset: int, length: int) -> None:
        """Have the dirty part of the range in memory soon."""
        for start, dirty_length in self._dirty.ranges(offset, length):
            self._image.prefetch(start, dirty_length)


class Exports:
    """What `image` has to offer, the default export being what `parameters` say."""

    def __init__(self, image: Image, parameters: Parameters) -> None:
        self._image = image
        self._parameters = parameters
        self._known_snapshots: list[Snapshot] | None = None

    def listed(self) -> list[tuple[str, str]]:
        """(name, description) of every export that a client can be shown, the disk and at most `_MAX_LISTED` others.

        Names that a terminal should not be shown are left out; a client that knows one can still ask for it.
        """
        found = [("", self.description(""))]
        found += [(_SNAPSHOT + names.to_text(each.id), self._of_snapshot(each)) for each in self._listed_snapshots()]
        found += [(_BITMAP + names.to_text(each.name), self._of_bitmap(each.name)) for each in self._listed_bitmaps()]
        return [(name, told) for name, told in found if _can_be_listed(name)][: _MAX_LISTED + 1]

    def description(self, name: str) -> str:
        """What an export is, for people. Raises as `view` does."""
        kind, wanted = self._meaning(name)
        if kind == _SNAPSHOT:
            return self._of_snapshot(find_snapshot(self._snapshots(), wanted, self._file_name()))
        if kind == _BITMAP:
            return self._of_bitmap(wanted)
        return f"{self._file_name()}, {'writable' if self._image.writable else 'read-only'}"

    def view(self, name: str) -> View:
        """What the export `name` serves.

        Raises ParameterError if the name means nothing or a bitmap that is being written; MissingReferenceError if
        the image has no such snapshot or bitmap; CorruptImageError, TruncatedImageError; OSError.
        """
        kind, wanted = self._meaning(name)
        if kind == _SNAPSHOT:
            return DiskView(self._image.at_snapshot(find_snapshot(self._snapshots(), wanted, self._file_name())))
        if kind == _BITMAP:
            if self._image.writable and find_bitmap(self._image.bitmaps(), wanted, self._file_name()).auto:
                raise ParameterError(
                    f'bitmap "{printable(wanted)}" records what is written, so it is served only where nothing is '
                    "written: give nbdkit -r"
                )
            return BitmapView(self._image, wanted)
        return DiskView(self._image)

    def _meaning(self, name: str) -> tuple[str, bytes]:
        """What kind of export a name means (`_SNAPSHOT`, `_BITMAP` or "" for the disk) and which one."""
        for kind in (_SNAPSHOT, _BITMAP):
            if name.startswith(kind):
                return kind, names.to_bytes(name.removeprefix(kind))
        if name:
            raise ParameterError(
                f'there is no export "{printable(name)}"; there are "", "{_SNAPSHOT}ID" and "{_BITMAP}NAME"'
            )
        if self._parameters.snapshot is not None:
            return _SNAPSHOT, names.to_bytes(self._parameters.snapshot)
        if self._parameters.bitmap is not None:
            return _BITMAP, names.to_bytes(self._parameters.bitmap)
        return "", b""

    def _snapshots(self) -> list[Snapshot]:
        """The internal snapshots; while the image is locked they stay what they are, so they are read once."""
        if self._known_snapshots is None:
            self._known_snapshots = self._image.snapshots()
        return self._known_snapshots

    def _listed_snapshots(self) -> list[Snapshot]:
        """The snapshots to tell of; a broken table must not keep a client from the list of exports."""
        try:
            return self._snapshots()[:_MAX_LISTED]
        except Qcow2Error:
            return []

    def _listed_bitmaps(self) -> list[Bitmap]:
        """The bitmaps that can be served; broken bitmaps must not keep a client from the list of exports."""
        image = self._image
        try:
            known = image.bitmaps()
        except Qcow2Error:
            return []
        cluster_size = image.header.geometry.cluster_size
        return [
            bitmap
            for bitmap in known
            if bitmap.unusable_reason(image.virtual_size, cluster_size) is None and not (image.writable and bitmap.auto)
        ]

    def _file_name(self) -> str:
        name = _shown(os.path.basename(self._parameters.check()))
        if self._parameters.backup is None:
            return name
        disk = "" if self._parameters.disk is None else f" of disk {_shown(self._parameters.disk)}"
        return f"{_shown(self._parameters.point or 'latest')} point{disk} in {name}"

    def _of_snapshot(self, snapshot: Snapshot) -> str:
        taken = datetime.fromtimestamp(snapshot.date_seconds, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f'internal snapshot "{_shown(snapshot.name)}" of {self._file_name()}, taken {taken}'

    def _of_bitmap(self, name: bytes) -> str:
        return f'dirty bitmap "{_shown(name)}" of {self._file_name()}: data is dirty, a hole is clean'


def _least_coverage(image: Image) -> int:
    """The fewest guest bytes that an L2 table in the chain maps."""
    coverage = image.header.geometry.l2_coverage
    backing = image.layer.backing
    return min(coverage, _least_coverage(backing)) if isinstance(backing, Image) else coverage


def _state(extent: Extent) -> int:
    if extent.kind in (ExtentKind.DATA, ExtentKind.COMPRESSED):
        return 0
    if extent.kind is ExtentKind.ZERO and extent.host_offset is not None:
        return STATE_ZERO
    return STATE_HOLE | STATE_ZERO


def _can_be_listed(name: str) -> bool:
    return printable(name) == name and len(name.encode()) <= _MAX_STRING


def _shown(name: str | bytes) -> str:
    return printable(name)[:_MAX_SHOWN]
