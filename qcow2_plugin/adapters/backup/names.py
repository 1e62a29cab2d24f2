"""Names in a repository: how they are made, and which of them can be one.

A point is called after its time and its place in the sequence. A member has the name that members above it, and any
tool that opens them, know it by (`member_name`); when it was merged, what is kept has that name with a revision.
"""

from __future__ import annotations

import re
import time

from qcow2_plugin.errors import ManifestError, printable

REPOSITORY_FILE = "repository.json"

_POINT = re.compile(r"[0-9]{8}t[0-9]{6}z-([0-9]{4,10})")
_DISK = re.compile(r"[a-z0-9][a-z0-9-]{0,60}")
_REPOSITORY = re.compile(r"[0-9a-f]{8}")
_MANIFEST = re.compile(rf"({_POINT.pattern})(?:\.r([1-9][0-9]{{0,5}}))?\.point\.json")
_STORED = re.compile(rf"({_POINT.pattern})\.[a-z0-9].*")


def point_id(created: int, sequence: int) -> str:
    """The id of a point: when it was made (seconds since 1970, UTC), and its place among all of the repository."""
    return f"{time.strftime('%Y%m%dt%H%M%Sz', time.gmtime(created))}-{sequence:04}"


def sequence_of(point: str) -> int:
    """The place of a point by its id. Raises ManifestError if it is none."""
    match = _POINT.fullmatch(point)
    if match is None:
        raise ManifestError(f"{printable(point)!r} is no point; 'qcow2 points' lists them")
    return int(match[1])


def check_disk(disk: str) -> str:
    """`disk`, if a disk can have that name in a repository. Raises ManifestError."""
    if not _DISK.fullmatch(disk):
        raise ManifestError(
            f"{printable(disk)!r} is no name for a disk: a-z, 0-9 and '-', up to 61 of them, not '-' first"
        )
    return disk


def check_repository(repository: str) -> str:
    """`repository`, if it is the id of one. Raises ManifestError."""
    if not _REPOSITORY.fullmatch(repository):
        raise ManifestError(f"{printable(repository)!r} is no id of a repository")
    return repository


def manifest_name(point: str, revision: int = 0) -> str:
    """The file that makes it a point."""
    return f"{point}.r{revision}.point.json" if revision else f"{point}.point.json"


def manifest_of(name: str) -> tuple[str, int] | None:
    """The point and the revision of it that a file of this name is the manifest of, None if it is no manifest."""
    match = _MANIFEST.fullmatch(name)
    return None if match is None else (match[1], int(match[3] or 0))


def point_of(name: str) -> str | None:
    """The point that a file of this name was made for, None if it is not a name of ours."""
    match = _STORED.fullmatch(name)
    return None if match is None else match[1]


def member_name(point: str, disk: str, revision: int = 0) -> str:
    """The qcow2 file of a disk. That without a revision is what members above it call it."""
    return f"{point}.{disk}.r{revision}.qcow2" if revision else f"{point}.{disk}.qcow2"


def member_prefix(point: str, disk: str) -> str:
    """What all names of files of a disk begin with, also of those that are not whole."""
    return f"{point}.{disk}."


def revision_of(name: str, point: str, disk: str) -> int | None:
    """The revision of the qcow2 file of a disk that a file of this name is, None if it is none."""
    if name == member_name(point, disk):
        return 0
    told = name.removeprefix(f"{point}.{disk}.r").removesuffix(".qcow2")
    return int(told) if told.isdecimal() and name == member_name(point, disk, int(told)) else None


def leaves_name(point: str, disk: str) -> str:
    """The leaves of the content digest of a disk."""
    return f"{point}.{disk}.leaves"
