"""What the parts of a backup tell each other: values only, frozen, so that a plugin can keep what it is given.

A *repository* is what is kept at one target. A *point* is one job's result, all of its disks as of one moment. A
*member* is what one point keeps of one disk: a qcow2 file, whose backing file is the member that it builds on.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any


class Level(enum.Enum):
    """How much of a disk a member holds."""

    FULL = "full"
    INCREMENTAL = "incremental"
    """What has changed since the last point."""
    DIFFERENTIAL = "differential"
    """What has changed since the last full member."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRequest:
    """A disk to back up. `disk` names it in the repository, whatever its path will be; `path` is the image."""

    disk: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run. `point` is the id that its result will have; `level` None: the least that is possible."""

    job_id: str
    repository_id: str
    point: str
    disks: tuple[DiskRequest, ...]
    level: Level | None
    is_dry_run: bool = False
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a member will hold, in bytes of the disk: known before anything is read."""

    dirty_data: int
    dirty_zero: int
    dirty_hole: int
    clean: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPlan:
    """What is done about one disk. `reason` says in a sentence why it is not the level that was asked for, or None.

    `base` is the point whose member of this disk is built on, None for a full one. `bitmaps` are the names of those
    that together mark what has changed since then.
    """

    disk: str
    path: str
    level: Level
    reason: str | None
    base: str | None
    bitmaps: tuple[str, ...]
    virtual_size: int
    estimate: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What a point keeps of one disk, as its manifest tells. Sizes in bytes, digests in hexadecimal.

    `file` is the name in the target of an ordinary qcow2 file of `file_size` bytes with `file_digest` (BLAKE3 of the
    file, None if none was made). `parent_point` and `parent_file` tell the member of the same disk that it builds on,
    None both for a full one. `bitmap` is the bitmap in the image that records what changes from this point on.
    `content_digest` is the tree hash of the disk (`operations.content_digest`), None if none was made;
    `leaves_file` the name in the target of its leaves. `options` are those of `create_image` that make an image like
    the source. `fingerprint` is of a raw data file (inode, size, time of change), and of the files below the
    image.
    """

    disk: str
    level: Level
    reason: str | None
    virtual_size: int
    file: str
    file_size: int
    file_digest: str | None
    parent_point: str | None
    parent_file: str | None
    bitmap: str | None
    content_digest: str | None
    leaves_file: str | None
    options: dict[str, Any]
    source: str
    fingerprint: dict[str, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A point: published at once, when all that it names is durable at the target, and never changed after.

    `sequence` counts the points of a repository; `created` is seconds since 1970, UTC. `revision` counts how often
    members of it were merged with those below them: the same disks, kept differently. `extra` is what plugins add, by
    their names.
    """

    repository_id: str
    point: str
    sequence: int
    created: int
    members: tuple[Member, ...]
    revision: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent:
    """How far a job is. `phase` is one word; `done` and `total` in bytes of the disk."""

    job_id: str
    phase: str
    disk: str | None
    done: int
    total: int
