"""The bitmaps of a repository in an image: what their names say, how they turn at a point, and how they turn back.

**Names.** `qcow2-backup.REPOSITORY.POINT` marks what has changed since that point. One of them is enabled, that of the
last point. Beside it at most one is kept for differential backups: it is disabled, and marks what changed from the last
full member (or from before that) up to the last point. So the two together mark all since the last full one, and the
enabled one alone all since the last point.

**A point** is one transaction over all disks of the job: the enabled bitmap is disabled, and the new point's is added.
Nothing is ever cleared. A bitmap that is not trusted is removed in the same transaction, so that nobody comes to trust
it later.

    published    the old bitmap is merged into the one that is kept, or removed            `after_point`
    not          the new one is merged into the old one, which is enabled again            `after_failure`

**Names are enough.** If a job ends in between, an enabled bitmap of a point that the repository does not have belongs
to one that never happened, and an enabled one of a point that it has, beside that of the point before, to one that was
not finished. `settle` sees either and does what the job would have done. Doing it twice does no harm: each time it is
one change of the image, after which there is nothing to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qcow2_plugin.adapters.backup import names
from qcow2_plugin.adapters.backup.model import Level, Manifest
from qcow2_plugin.adapters.backup.sources import Source
from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange, BitmapVerb
from qcow2_plugin.operations.bitmap_health import BitmapHealth, BitmapState, bitmap_health
from qcow2_plugin.operations.bitmaps import change_bitmaps

_NAME = re.compile(r"qcow2-backup\.([0-9a-f]{8})\.([0-9]{8}t[0-9]{6}z-[0-9]{4,10})")


def bitmap_name(repository_id: str, point: str) -> str:
    """The bitmap that records what changes from this point on."""
    return f"qcow2-backup.{repository_id}.{point}"


@dataclass(frozen=True, slots=True)
class OwnBitmap:
    """A bitmap of the repository in an image."""

    point: str
    health: BitmapHealth

    @property
    def name(self) -> str:
        """As it is called in the image."""
        return self.health.name or ""

    @property
    def is_enabled(self) -> bool:
        """It records changes."""
        return bool(self.health.enabled)

    @property
    def is_usable(self) -> bool:
        """What it marks can be relied on."""
        return not self.health.needs_full

    @property
    def sequence(self) -> int:
        """The number of its point."""
        return names.sequence_of(self.point)


def own_bitmaps(health: Sequence[BitmapHealth], repository_id: str) -> list[OwnBitmap]:
    """Those of the repository among the bitmaps of an image, oldest point first."""
    found = []
    for each in health:
        match = _NAME.fullmatch(each.name or "")
        if match is not None and match[1] == repository_id:
            found.append(OwnBitmap(match[2], each))
    return sorted(found, key=lambda one: one.sequence)


def at_point(
    own: Sequence[OwnBitmap], new: str, *, frozen: str | None, adopted: str | None, granularity: int | None = None
) -> list[BitmapChange]:
    """The changes of one image at a point in time.

    `new` is the bitmap that begins. `frozen` is the one of the last point, which is relied on from now on, with what is
    kept beside it; None: none is, so all are removed. `adopted` is somebody else's bitmap that marks what has changed
    since the last point, too: it is merged into `frozen`, which is made if it is not there. `granularity` in bytes is
    that of bitmaps that follow no other one, None the usual one.
    """
    if frozen is None:
        return [*_removed(own), _added(new, granularity)]
    present = next((each for each in own if each.name == frozen), None)
    if adopted is None:
        return [BitmapChange(BitmapVerb.ROTATE, frozen.encode(), new_name=new.encode())]
    changes = [] if present is None else [BitmapChange(BitmapVerb.DISABLE, frozen.encode())]
    if present is not None and not present.is_usable:
        changes = _removed([present])
    if present is None or not present.is_usable:
        changes.append(BitmapChange(BitmapVerb.ADD, frozen.encode(), granularity, is_enabled=False))
    merged = BitmapChange(BitmapVerb.MERGE, frozen.encode(), source=adopted.encode())
    return [*changes, merged, _added(new, granularity)]


def after_point(own: Sequence[OwnBitmap], point: str, full: str) -> list[BitmapChange]:
    """The changes of one image when `point` is published; the last full member of the disk is that of point `full`."""
    new = next((each for each in own if each.point == point), None)
    others = [each for each in own if each is not new]
    if full == point:
        return _removed(others)
    kept = _kept(others, full)
    if kept is None:
        return _removed(others)
    later = [each for each in others if each.sequence > kept.sequence]
    earlier = [each for each in others if each.sequence < kept.sequence]
    if not all(each.is_usable for each in later):
        return _removed(others)
    merged = [BitmapChange(BitmapVerb.MERGE, kept.name.encode(), source=each.name.encode()) for each in later]
    return [*merged, *_removed([*earlier, *later])]


def after_failure(own: Sequence[OwnBitmap], point: str, last: str | None) -> list[BitmapChange]:
    """The changes of one image when `point` never happened, and the last of the disk that did is `last`."""
    new = next((each for each in own if each.point == point), None)
    if new is None:
        return []
    old = next((each for each in own if each.point == last), None)
    if old is None or not old.is_usable or not new.is_usable:
        return _removed([new])
    return [
        BitmapChange(BitmapVerb.MERGE, old.name.encode(), source=new.name.encode()),
        BitmapChange(BitmapVerb.ENABLE, old.name.encode()),
        *_removed([new]),
    ]


def unsettled(own: Sequence[OwnBitmap], points: Sequence[Manifest], disk: str) -> list[BitmapChange]:
    """What an interrupted job has left to do in the image of `disk`: changes, or none. `points` are all there are,
    oldest first."""
    there = {each.point for each in points}
    of_disk = [each for each in points if any(member.disk == disk for member in each.members)]
    last = of_disk[-1].point if of_disk else None
    is_frozen = any(each.point == last and not each.is_enabled for each in own)
    for each in own:
        if each.is_enabled and (each.point not in there or (is_frozen and not _has(each.point, of_disk))):
            return after_failure(own, each.point, last)
    newest = own[-1] if own else None
    if newest is None or newest.point != last or not newest.is_enabled:
        return []
    full = last_full(points, disk)
    return [] if full is None else after_point(own, newest.point, full)


def settle(source: Source, repository_id: str, points: Sequence[Manifest]) -> bool:
    """Finish in the image what an interrupted job has left, if there is something; whether there was.

    Where somebody has written to the data file behind the image meanwhile, that is the end of the bitmaps, since it
    cannot be seen any more afterwards. Lock: the image is opened for writing only if there is something to do. Raises
    ImageLockedError and what `change_bitmaps` does.
    """
    health = bitmap_health(source.path)
    is_undecided = any(each.state is BitmapState.UNFINISHED for each in health)
    if not is_undecided and not unsettled(own_bitmaps(health, repository_id), points, source.disk):
        return False
    if source.is_written_behind():
        distrust(source, repository_id)
        return True
    with source.open_for_changes() as image:  # which decides its transaction
        own = own_bitmaps(bitmap_health(image), repository_id)
        change_bitmaps(image, unsettled(own, points, source.disk))
    return True


def distrust(source: Source, repository_id: str) -> None:
    """Remove the bitmaps of the repository, so that nobody comes to trust them. Raises as `settle` does."""
    with source.open_for_changes() as image:
        change_bitmaps(image, _removed(own_bitmaps(bitmap_health(image), repository_id)))


def last_full(points: Sequence[Manifest], disk: str) -> str | None:
    """The point with the last full member of the disk."""
    for each in reversed(points):
        if any(member.disk == disk and member.level is Level.FULL for member in each.members):
            return each.point
    return None


def since_full(own: Sequence[OwnBitmap], full: str, last: str) -> tuple[str, ...] | None:
    """The bitmaps that together mark what has changed since the point `full`, if there are such; `last` is the point
    whose bitmap is enabled."""
    if last == full:
        return ()
    kept = _kept([each for each in own if each.point != last], full)
    return None if kept is None or not kept.is_usable else (kept.name,)


def _kept(others: Sequence[OwnBitmap], full: str) -> OwnBitmap | None:
    """The bitmap that marks what has changed since `full`, or since before that: the youngest such one."""
    limit = names.sequence_of(full)
    usable = [each for each in others if each.sequence <= limit and each.is_usable]
    return usable[-1] if usable else None


def _has(point: str, points: Sequence[Manifest]) -> bool:
    return any(each.point == point for each in points)


def _added(name: str, granularity: int | None) -> BitmapChange:
    return BitmapChange(BitmapVerb.ADD, name.encode(), granularity)


def _removed(bitmaps: Sequence[OwnBitmap]) -> list[BitmapChange]:
    """Stale ones go by themselves: whoever opens the image for changes forgets them."""
    gone = BitmapState.STALE
    return [BitmapChange(BitmapVerb.REMOVE, each.name.encode()) for each in bitmaps if each.health.state is not gone]
