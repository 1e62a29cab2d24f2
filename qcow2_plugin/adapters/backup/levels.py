"""How much of a disk has to be kept: the least that is certain to be right, and why it is more than was asked for.

Every doubt ends in a full member. Doubts about one disk are nobody else's: the others get what they can have.

What is relied on is the enabled bitmap of the last point, which has to be usable, to be of the last point that the
repository has of this disk, and to have heard of every write since. What it cannot have heard of:

* a disk that has shrunk. One that has grown again since looks as before; the sample finds it (`sampling`);
* an internal snapshot that was applied. This package marks what differs, and QEMU refuses where there are bitmaps;
* a backing file that was changed, or replaced by another one;
* somebody who has written to a raw data file without its image. The image is written to last, when bitmaps are put
  away, so then the data file is the younger one; or it has changed, and the bitmap marks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.backup import rotation
from qcow2_plugin.adapters.backup.model import Level, Manifest, Member
from qcow2_plugin.adapters.backup.rotation import OwnBitmap, bitmap_name, last_full, own_bitmaps
from qcow2_plugin.adapters.backup.sources import fingerprint, fingerprint_below, is_written_behind
from qcow2_plugin.engine.files import MAX_DEPTH
from qcow2_plugin.errors import ManifestError, printable
from qcow2_plugin.operations.bitmap_health import BitmapHealth, bitmap_health

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.repository import Repository
    from qcow2_plugin.engine.image import Image


@dataclass(frozen=True, slots=True)
class Base:
    """A member that the next one of the disk may build on. `marking` are the bitmaps that together mark all changes
    since, `bitmaps` those that will when the point in time has come."""

    level: Level
    point: str
    member: Member
    marking: tuple[str, ...]
    bitmaps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the next member of a disk may be. `bases` are those possible, the usual one first; none: it must be full.

    `reason` says in a sentence why the level that was asked for cannot be, or None. `frozen` is the bitmap of the last
    point if it is to be relied on in future, also when this point does not need it. `adopted` is somebody else's
    bitmap that stands in for it.
    """

    bases: tuple[Base, ...]
    reason: str | None
    frozen: str | None = None
    adopted: str | None = None


def judge(
    image: Image,
    disk: str,
    repository: Repository,
    *,
    level: Level | None,
    max_chain: int,
    adopted: str | None = None,
) -> Judgement:
    """What the next member of `disk` may be. `level` None and INCREMENTAL both want the least.

    A chain has at most `max_chain` members. `adopted` is a bitmap of another program that the caller says to mark all
    changes since the last point. Raises what the target does; OSError.
    """
    if image.header.version < 3:
        return _full("The image is of version 2, which has no bitmaps: amend it to version 3.", level)
    points = repository.points()
    last = next((each for each in reversed(points) if _member(each, disk)), None)
    if last is None:
        return _full("The repository has no point of this disk yet.", level)
    relied = bitmap_name(repository.id, last.point)
    health = bitmap_health(image)
    own = own_bitmaps(health, repository.id)
    usable_adopted = _usable(health, adopted)
    relied_on = any(each.name == relied and each.is_usable and each.is_enabled for each in own)
    doubt = _doubt(image, disk, last, own, adopted=usable_adopted)
    if adopted is not None and usable_adopted is None:
        doubt = doubt or f'The bitmap "{printable(adopted)}" is missing, or cannot be used.'
    if usable_adopted is not None and not relied_on and not _is_enabled(health, usable_adopted):
        doubt = f'The bitmap "{printable(usable_adopted)}" is disabled, so what has changed since then is not recorded.'
    if doubt is not None:
        return _full(doubt, level)
    if level is Level.FULL:
        return Judgement((), None, relied, usable_adopted)
    marking = tuple(each.name for each in own if each.name == relied and each.is_usable)
    marking = marking if usable_adopted is None else (*marking, usable_adopted)
    upon_last, reason = _upon_last(repository, last.point, disk, max_chain, marking)
    upon_full = _upon_full(repository, last.point, disk, own, marking)
    if level is Level.DIFFERENTIAL:
        reason = "There is no bitmap, or no member, of the last full backup to build on." if upon_full is None else None
        return Judgement((upon_full,) if upon_full else (), reason, relied, usable_adopted)
    if upon_last is None:
        return Judgement((), reason, relied, usable_adopted)
    return Judgement((upon_last, upon_full) if upon_full else (upon_last,), None, relied, usable_adopted)


def _full(reason: str, level: Level | None) -> Judgement:
    return Judgement((), None if level is Level.FULL else reason)


def _doubt(image: Image, disk: str, last: Manifest, own: Sequence[OwnBitmap], *, adopted: str | None) -> str | None:
    """Why what the bitmaps mark is not known to be all that has changed since the point `last`."""
    member = _member(last, disk)
    assert member is not None
    relied = next((each for each in own if each.point == last.point), None)
    if adopted is None:
        if relied is None:
            return f"The image has no bitmap of the last point, {last.point}."
        if not relied.is_usable:
            return relied.health.reason
        if not relied.is_enabled:
            return "The bitmap of the last point is disabled, so what has changed since then is not recorded."
    if member.virtual_size > image.virtual_size:
        return f"The disk has shrunk, from {member.virtual_size} to {image.virtual_size} bytes."
    if fingerprint_below(image) != _told_of_files_below(member):
        return "A backing file is another one than at the last point, or has changed since."
    marks_nothing = adopted is None and relied is not None and relied.health.dirty_size == 0
    return _doubt_about_data_file(image, member, marks_nothing=marks_nothing)


def _doubt_about_data_file(image: Image, member: Member, *, marks_nothing: bool) -> str | None:
    now, then = fingerprint(image), member.fingerprint or {}
    if now is None or "inode" not in then:
        return None if now is None and "inode" not in then else "The data file is of another kind than before."
    if now["inode"] != then["inode"]:
        return "The data file is another one than at the last point."
    if is_written_behind(image):
        return "The raw data file was written to after its image was: by a program that left no record of it."
    if marks_nothing and now["mtime_ns"] != then.get("mtime_ns"):
        return "The raw data file has changed, but the bitmap marks nothing: a program has left no record of it."
    return None


def _told_of_files_below(member: Member) -> dict[str, int]:
    told = member.fingerprint or {}
    return {name: value for name, value in told.items() if name.startswith("backing")}


def _upon_last(
    repository: Repository, last: str, disk: str, max_chain: int, marking: tuple[str, ...]
) -> tuple[Base | None, str | None]:
    """What an incremental member builds on; or why there can be none."""
    try:
        chain = repository.chain(last, disk)
    except ManifestError as error:
        return None, f"The last point cannot be built on: {error}."
    if len(chain) >= min(max_chain, MAX_DEPTH - 1):  # a scratch image may lie on top
        return None, f"The chain has {len(chain)} members, as many as it may have."
    return Base(Level.INCREMENTAL, last, chain[-1], marking, (bitmap_name(repository.id, last),)), None


def _upon_full(
    repository: Repository, last: str, disk: str, own: Sequence[OwnBitmap], marking: tuple[str, ...]
) -> Base | None:
    """What a differential member builds on, None if there can be none."""
    full = last_full(repository.points(), disk)
    kept = None if full is None else rotation.since_full(own, full, last)
    if full is None or kept is None:
        return None
    with suppress(ManifestError):
        member = repository.chain(full, disk)[-1]
        bitmaps = (*kept, bitmap_name(repository.id, last))
        return Base(Level.DIFFERENTIAL, full, member, (*kept, *marking), bitmaps)
    return None


def _member(point: Manifest, disk: str) -> Member | None:
    return next((each for each in point.members if each.disk == disk), None)


def _is_enabled(health: Sequence[BitmapHealth], name: str) -> bool:
    return any(each.name == name and each.enabled for each in health)


def _usable(health: Sequence[BitmapHealth], name: str | None) -> str | None:
    return next((name for each in health if each.name == name and not each.needs_full), None)
