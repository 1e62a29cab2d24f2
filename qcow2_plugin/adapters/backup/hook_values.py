"""What hooks are given and answer, beside the values of `model`: frozen, so that a plugin can keep what it is given.

Fields may be added in later versions, with defaults; what is there stays. A plugin takes them by their names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qcow2_plugin.adapters.backup.model import Manifest

Verdict = Literal["commit", "abort"]
"""What is to become of a job that was interrupted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where the file that an image names is: a path, or a URI for `qcow2_open_storage`.

    `plugin` is who located it, and then `uri` is what it said. None if the name was looked up as the policy has it;
    then `uri` is an absolute path without symlinks, which leads to the very file that is going to be opened.
    """

    uri: str
    plugin: str | None


@dataclass(frozen=True, slots=True)
class Decision:
    """An answer to a question whether something is allowed. `reason` is shown when it is not."""

    is_allowed: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseChoice:
    """The point that a disk's next member builds on; None: on none, it is to be a full one, because of `reason`."""

    point: str | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What was just written of a disk: `length` bytes of it from `guest_offset` on are dealt with, of which `stored`
    were data; the others were zeros or had not changed. Batches of one disk come in ascending order.
    """

    disk: str
    guest_offset: int
    length: int
    stored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """A job that was interrupted, as its journal or the names of bitmaps tell. `started` is seconds since 1970, UTC.

    `is_published` says whether the catalogue of the repository has the point; None if nobody could look.
    """

    job_id: str
    repository_id: str
    point: str
    disks: tuple[str, ...]
    phase: str
    started: int | None
    is_published: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """How a job ended: with a point, or with an error. `failures` are those of plugins once the point was published."""

    manifest: Manifest | None
    error: str | None = None
    failures: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Complaint:
    """What a plugin has against a point that is verified, about one disk or (None) all of it."""

    disk: str | None
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """One disk of a point on its way to `destination`, a path; `format` is what is made there: raw or qcow2."""

    manifest: Manifest
    disk: str
    destination: str
    format: str
