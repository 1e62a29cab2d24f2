"""Retention: which points are kept, and how the others go without taking anything with them that is needed.

**What is kept** is said by rules, as the last seven, or one a day for thirty days, among the points of the same disks:
a nightly job's points do not count for a weekly one's. Any rule keeps the newest of these, which the next one builds
on. Days and weeks are those of UTC.

**Order.** Kept points that are built on others are merged with them, the oldest first, each published before anything
is removed (`merge`). Then points go, the newest first, each with its manifest first; so whenever this ends, every
chain is whole. Last the leftovers go, of points that never happened or are gone; those that may belong to a backup that
is being made stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.backup import names
from qcow2_plugin.adapters.backup.merge import merge, settle
from qcow2_plugin.errors import ManifestError, OptionError

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.model import Manifest
    from qcow2_plugin.adapters.backup.repository import Repository

PERIODS = {"daily": "%Y-%m-%d", "weekly": "%G-W%V", "monthly": "%Y-%m", "yearly": "%Y"}

Progress = Callable[[int, int], None]
"""Told (done, total) bytes of one disk of a point that is merged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How many points are kept: the last ones, and the newest one of each of so many days, weeks, months, years."""

    last: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    def check(self) -> None:
        """Raises OptionError if they would keep nothing, or make no sense."""
        counts = (self.last, self.daily, self.weekly, self.monthly, self.yearly)
        if any(count < 0 for count in counts):
            raise OptionError("how many points are kept is a number from 0 on")
        if not any(counts):
            raise OptionError("say which points are kept, as the last 7; all others are removed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What becomes of a point. `reasons` say why it is kept; `bases` with what its members are merged, by disk: the
    point that they are built on then, None if none."""

    point: str
    reasons: tuple[str, ...]
    bases: dict[str, str | None]

    @property
    def is_kept(self) -> bool:
        """False if it is removed."""
        return bool(self.reasons)


def plan(repository: Repository, rules: Rules, *, may_merge: bool = True) -> list[Fate]:
    """What becomes of every point, oldest first. Without `may_merge` a point that a kept one is built on is kept, too.

    Raises OptionError; ManifestError if a manifest cannot be read, or is missing, as then nobody knows what needs what;
    what the target raises.
    """
    rules.check()
    for point, error in repository.damaged().items():
        raise ManifestError(f"the manifest of {point} cannot be read, so nothing is removed: {error}")
    points = repository.points()
    _require_parents(points)
    reasons = _reasons(points, rules)
    if not may_merge:
        _keep_parents(points, reasons)
    by_id = {point.point: point for point in points}
    return [
        Fate(point=each.point, reasons=tuple(reasons[each.point]), bases=_bases(each, by_id, reasons))
        for each in points
    ]


def _require_parents(points: Sequence[Manifest]) -> None:
    there = {each.point for each in points}
    for each in points:
        for member in each.members:
            if member.parent_point is not None and member.parent_point not in there:
                raise ManifestError(
                    f"the manifest of {member.parent_point} is missing, and {each.point} is built on that, so nothing "
                    "is removed"
                )


def prune(
    repository: Repository, fates: Sequence[Fate], *, scratch: str | None = None, progress: Progress | None = None
) -> list[str]:
    """Do what was planned; the names of leftovers that were removed.

    Raises ManifestError if the repository has changed since, or a chain is not what it should be; what the target
    raises; OSError. After an error every point is there or gone, and those that are there are whole.
    """
    for manifest in repository.points():
        if manifest.revision:
            settle(repository, manifest)
    for fate in fates:
        if fate.is_kept and fate.bases:
            merge(repository, fate.point, fate.bases, scratch=scratch, progress=progress)
    for fate in reversed(fates):
        if not fate.is_kept:
            repository.remove(fate.point)
    return _sweep(repository)


def _sweep(repository: Repository) -> list[str]:
    points = repository.points()
    newest = max((point.sequence for point in points), default=0)
    removed = []
    for name in repository.leftovers():
        point = names.point_of(name)
        if point is not None and names.sequence_of(point) < newest:
            repository.target.remove(name)
            removed.append(name)
    return removed


def _reasons(points: Sequence[Manifest], rules: Rules) -> dict[str, list[str]]:
    """Why each point is kept; none if it is not."""
    reasons: dict[str, list[str]] = {each.point: [] for each in points}
    groups: dict[frozenset[str], list[Manifest]] = {}
    for each in points:
        groups.setdefault(frozenset(member.disk for member in each.members), []).append(each)
    for group in groups.values():
        _apply(group, rules, reasons)
    return reasons


def _apply(group: Sequence[Manifest], rules: Rules, reasons: dict[str, list[str]]) -> None:
    for each in group[len(group) - min(rules.last, len(group)) :]:
        reasons[each.point].append("last")
    for period, form in PERIODS.items():
        seen: set[str] = set()
        for each in reversed(group):
            when = time.strftime(form, time.gmtime(each.created))
            if when not in seen and len(seen) < getattr(rules, period):
                seen.add(when)
                reasons[each.point].append(period)


def _keep_parents(points: Sequence[Manifest], reasons: dict[str, list[str]]) -> None:
    for each in reversed(points):  # the newest first: a parent is older
        if reasons[each.point]:
            for member in each.members:
                if member.parent_point is not None and not reasons.get(member.parent_point, ["missing"]):
                    reasons[member.parent_point].append("needed")


def _bases(point: Manifest, by_id: dict[str, Manifest], reasons: dict[str, list[str]]) -> dict[str, str | None]:
    """What members of a kept point are to be built on, where that is not what they are built on now."""
    bases: dict[str, str | None] = {}
    if not reasons[point.point]:
        return bases
    for member in point.members:
        parent = member.parent_point
        while parent is not None and not reasons.get(parent, ["missing"]):
            below = (each for each in by_id[parent].members if each.disk == member.disk)
            parent = next((each.parent_point for each in below), None)
        if parent != member.parent_point:
            bases[member.disk] = parent
    return bases
