"""Can the next backup be an incremental one? What state each dirty bitmap is in, why, and what to do next.

Like `info`, `bitmap_health` opens one file, read-only, and follows no name in it. Every answer errs on the safe side:
whatever cannot be shown to be right needs a full backup. What it cannot see: whether somebody has written to a data
file without the image, and what L2 tables say.
"""

from __future__ import annotations

import enum
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from qcow2_plugin.engine.dirty_bitmaps.bitmaps import read_bitmaps
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.errors import CorruptImageError, ImageLockedError, Qcow2Error, about_file, printable
from qcow2_plugin.format import names as format_names
from qcow2_plugin.format.bitmaps import Bitmap, table_entries_for
from qcow2_plugin.format.header import AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS, Header
from qcow2_plugin.format.transaction import is_marked, mark_of
from qcow2_plugin.storage import Storage
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import open_given

if TYPE_CHECKING:
    from qcow2_plugin.engine.image import Image
    from qcow2_plugin.engine.writable import WritableImage

Path = str | os.PathLike[str]

_MAX_DIRECTORY_SIZE = 8 << 20
"""Bytes of a bitmap directory that is listed: room for 65,535 bitmaps with names of 100 bytes."""


class BitmapState(enum.Enum):
    """What a bitmap is good for. Only one that is usable says which blocks have changed."""

    USABLE = "usable"
    IN_USE = "in-use"
    """A program has the image open for writing, and keeps the bits in its memory until it closes it."""
    INCONSISTENT = "inconsistent"
    """The last program that wrote to the image did not close it."""
    WRONG_SIZE = "wrong-size"
    MISSING = "missing"
    STALE = "stale"
    """A program that does not know bitmaps has written to the image."""
    UNKNOWN = "unknown"
    """Its type, flags or granularity are none that are known here."""
    DAMAGED = "damaged"
    """Its table or its bits, or the directory, are where they cannot be."""
    UNFINISHED = "unfinished"
    """A change of the bitmaps of several images was interrupted, and which side of it this is has to be decided."""


@dataclass(frozen=True, slots=True)
class BitmapHealth:
    """One bitmap, or (`name` None) all that an unreadable directory may list. Sizes in bytes."""

    name: str | None
    """Text as `os.fsdecode` makes it of the bytes stored."""
    state: BitmapState
    reason: str | None
    """One sentence, safe to print; None if it is usable."""
    next_step: str | None
    """The cheapest thing to do that is safe, likewise."""
    enabled: bool | None = None
    """It records changes; None if that is not known."""
    granularity: int | None = None
    dirty_size: int | None = None
    """How much of the disk it marks; None if that is not known, or too much work to count."""

    @property
    def needs_full(self) -> bool:
        """An incremental backup from it would lack changes."""
        return self.state is not BitmapState.USABLE


def bitmap_health(
    image: Image | Path, names: Sequence[str | bytes] | None = None, *, force_share: bool = False
) -> list[BitmapHealth]:
    """The state of every bitmap of an image, or of those of these `names`, in that order.

    `force_share` looks although another program may be writing.

    Raises NotQcow2Error, UnsupportedFeatureError, CorruptImageError (header), ImageLockedError; OSError.
    """
    if not isinstance(image, str | os.PathLike):
        return _chosen(_examined_open(image), names, image.layer.storage.path)
    path = os.fspath(image)
    file, held = _opened(path, force_share=force_share)
    try:
        found = _Examination(file, _known_header(file), path, held).run()
    finally:
        file.close()
    return _chosen(found, names, path)


def examined(storage: Storage, header: Header, path: str) -> list[BitmapHealth]:
    """The state of every bitmap of an image that nobody else is writing to. Raises OSError."""
    return _Examination(storage, header, path, frozenset()).run()


def _opened(path: str, *, force_share: bool) -> tuple[FileStorage, frozenset[bytes] | None]:
    """The image file, and which bitmaps a program may hold, as `_Examination` is told."""
    try:
        return open_given(path), frozenset()
    except ImageLockedError:
        if not force_share:
            raise
        return open_given(path, force_share=True), None


def _known_header(storage: Storage) -> Header:
    header = read_header(storage)
    with about_file(storage.path):
        header.require_known_features()
    return header


def _examined_open(image: Image) -> list[BitmapHealth]:
    storage = image.layer.storage
    if not image.writable:
        return examined(storage, image.header, storage.path)
    writable = cast("WritableImage", image)
    with writable.locked():  # the directory may move
        held = frozenset(each.bitmap.name for each in writable.tracker.kept if each.is_held)
        return _Examination(storage, writable.header, storage.path, held).run()


def _chosen(found: list[BitmapHealth], names: Sequence[str | bytes] | None, path: str) -> list[BitmapHealth]:
    if names is None:
        return found
    known = {each.name: each for each in found}
    whole = known.get(None)
    told = [format_names.to_text(format_names.to_bytes(name)) for name in names]
    return [known.get(name) or (_missing(name, path) if whole is None else replace(whole, name=name)) for name in told]


class _Examination:
    """One look at the bitmaps of an image.

    `held` are the names of bitmaps that a program is known to keep in its memory; None: of all that say so.
    """

    def __init__(self, storage: Storage, header: Header, path: str, held: frozenset[bytes] | None) -> None:
        self._storage = storage
        self._header = header
        self._path = path
        self._held = held

    def run(self) -> list[BitmapHealth]:
        header = self._header
        if is_marked(header):
            return [self._whole(BitmapState.UNFINISHED, _UNFINISHED, self._recover())]
        if header.extension_data(EXTENSION_BITMAPS) is None:
            return []
        is_stale = not header.autoclear_features & AUTOCLEAR_BITMAPS
        if is_stale:
            header = replace(header, autoclear_features=header.autoclear_features | AUTOCLEAR_BITMAPS)
        try:
            bitmaps = self._listed(header)
        except Qcow2Error as error:
            if is_stale:
                return [self._whole(BitmapState.STALE, _STALE, self._drop_all())]
            return [self._whole(BitmapState.DAMAGED, f"The bitmaps cannot be read: {error.detail}.", self._drop_all())]
        if is_stale:
            return [self._told(bitmap, BitmapState.STALE, _STALE, self._drop_all()) for bitmap in bitmaps]
        return self._examined(bitmaps)

    def _listed(self, header: Header) -> list[Bitmap]:
        """Raises Qcow2Error, OSError."""
        pointer = header.bitmaps
        if pointer is not None and pointer.directory_size > _MAX_DIRECTORY_SIZE:
            raise Qcow2Error(f"their directory has {pointer.directory_size} bytes")
        return read_bitmaps(self._storage, header)

    def _examined(self, bitmaps: list[Bitmap]) -> list[BitmapHealth]:
        from qcow2_plugin.engine.dirty_bitmaps.bitmap_survey import survey  # who has no bitmaps need not wait for it

        header = self._header
        reasons = [bitmap.unusable_reason(header.virtual_size, header.geometry.cluster_size) for bitmap in bitmaps]
        sound = [bitmap for bitmap, reason in zip(bitmaps, reasons, strict=True) if reason is None]
        surveyed = iter(survey(self._storage, header, sound) if sound else [])
        found = []
        for bitmap, reason in zip(bitmaps, reasons, strict=True):
            if reason is not None:
                found.append(self._unusable(bitmap, reason))
                continue
            problem, dirty_size = next(surveyed)
            if problem is not None:
                found.append(self._told(bitmap, BitmapState.DAMAGED, _sentence(problem), self._drop_all()))
            else:
                found.append(replace(self._told(bitmap, BitmapState.USABLE, None, None), dirty_size=dirty_size))
        return found

    def _unusable(self, bitmap: Bitmap, reason: str) -> BitmapHealth:
        if bitmap.in_use:
            if self._held is None or bitmap.name in self._held:
                return self._told(bitmap, BitmapState.IN_USE, _IN_USE, _CLOSE)
            return self._told(bitmap, BitmapState.INCONSISTENT, _INCONSISTENT, self._remove(bitmap))
        header = self._header
        entries = table_entries_for(header.virtual_size, bitmap.granularity_bits, header.geometry.cluster_size)
        fitting = replace(bitmap, table_entries=entries)
        if fitting.unusable_reason(header.virtual_size, header.geometry.cluster_size) is None:
            return self._told(bitmap, BitmapState.WRONG_SIZE, _WRONG_SIZE, self._remove(bitmap))
        step = f"Ask the program that made it; or else: {self._remove(bitmap)}"
        return self._told(bitmap, BitmapState.UNKNOWN, _sentence(reason), step)

    def _told(self, bitmap: Bitmap, state: BitmapState, reason: str | None, next_step: str | None) -> BitmapHealth:
        name = format_names.to_text(bitmap.name)
        granularity = bitmap.granularity if bitmap.granularity_bits < 64 else None
        return BitmapHealth(name, state, reason, next_step, bitmap.auto, granularity)

    def _whole(self, state: BitmapState, reason: str, next_step: str) -> BitmapHealth:
        return BitmapHealth(None, state, reason, next_step)

    def _recover(self) -> str:
        back = _command("recover --lost", self._path)
        mark = None
        with suppress(CorruptImageError):
            mark = mark_of(self._header)
        if mark is None:
            return f"Go back to the bitmaps of before: {back}"
        record = os.path.join(os.path.dirname(self._path), os.fsdecode(mark.record))
        return f"Finish it: {_command('recover', record)}; or, if that file is lost for good: {back}"

    def _remove(self, bitmap: Bitmap) -> str:
        command = _command("--remove", self._path, format_names.to_text(bitmap.name))
        return f"Make a full backup and remove the bitmap: {command}"

    def _drop_all(self) -> str:
        return f"Make a full backup and drop all bitmaps of the image: {_command('prune --drop-all', self._path)}"


_UNFINISHED = "A change of the bitmaps of several images was interrupted, and whether it has happened is in its record."
_STALE = "A program that does not know bitmaps has written to the image since."
_IN_USE = "A program has the image open for writing and keeps the bits in its memory."
_CLOSE = "Have that program close the image, then look again."
_INCONSISTENT = "The last program that wrote to the image did not close it, so changes may be missing in the bitmap."
_WRONG_SIZE = "It was made for a disk of another size: the disk was resized without it."


def _missing(name: str, path: str) -> BitmapHealth:
    return BitmapHealth(
        name,
        BitmapState.MISSING,
        "The image has no bitmap of this name.",
        f"Start one and make a full backup: {_command('--add', path, name)}",
    )


def _sentence(reason: str) -> str:
    return f"{reason[0].upper()}{reason[1:]}."


def _command(action: str, *names: str) -> str:
    dashes = ["--"] if any(name.startswith("-") for name in names) else []
    return " ".join(["qcow2 bitmap", action, *dashes, *(shlex.quote(printable(name)) for name in names)])
