"""Whether what a repository keeps can be relied on: looked at in three levels, each with what is before it.

0   the manifests, the names that they tell, and where files lie in a directory their sizes and headers
1   all files that a disk consists of, read and held against their digests
2   the disks, rebuilt and held against the digests of what the guest saw, and against images that are named

What is found is told, all of it, and is no error of the work: damage in one chain says nothing about another. A file
that several points need is read once.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.backup.repository import known_as
from qcow2_plugin.adapters.backup.sampling import kept_leaves
from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import ManifestError, NotQcow2Error, Qcow2Error, printable
from qcow2_plugin.operations.content_digest import content_digest, opened_raw
from qcow2_plugin.operations.file_digest import digest_of, file_digest

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.manager import Hooks
    from qcow2_plugin.adapters.backup.model import Manifest, Member
    from qcow2_plugin.adapters.backup.repository import Repository

MAX_LEVEL = 2

Progress = Callable[[int, int], None]
"""Told (done, total) disks of points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is wrong with a point, one of its disks, or one of its files; safe to print."""

    point: str
    disk: str | None
    file: str | None
    text: str


@dataclass(slots=True, kw_only=True)
class Verification:
    """What was looked at, how deep, and what was found. `read` counts bytes of files."""

    level: int
    points: int = 0
    members: int = 0
    read: int = 0
    without_digest: int = 0
    """Members that have no digest of the kind that this level compares."""
    findings: list[Finding] = field(default_factory=list)


def verify(
    repository: Repository,
    points: Sequence[str] | None = None,
    *,
    level: int = 0,
    disks: Sequence[str] | None = None,
    against: Mapping[str, str] | None = None,
    hooks: Hooks | None = None,
    scratch: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Look at these points, or all, and at these disks of them, or all.

    `against` are images by the names of disks, which have to be equal to what the points have, at any level.

    Raises ManifestError if there is no such point or disk; what the target raises when it is asked for its names;
    OSError.
    """
    work = _Verifying(repository, level, scratch)
    if points is None:
        for point, error in repository.damaged().items():
            work.found(point, None, None, error)
        manifests = repository.points()
    else:
        manifests = [repository.point(point) for point in points]
    chosen = [(each, [one for one in each.members if disks is None or one.disk in disks]) for each in manifests]
    _require_disks(manifests, {*(disks or ()), *(against or {})})
    total = sum(len(members) for _, members in chosen)
    for manifest, members in chosen:
        work.result.points += 1
        for member in members:
            if progress is not None:
                progress(work.result.members, total)
            work.look_at(manifest, member, (against or {}).get(member.disk))
        if hooks is not None:
            work.ask(hooks, manifest)
    if progress is not None:
        progress(total, total)
    return work.result


def _require_disks(manifests: Sequence[Manifest], wanted: set[str]) -> None:
    """Raises ManifestError if a disk that was named is at none of the points: nothing would be looked at."""
    known = {member.disk for manifest in manifests for member in manifest.members}
    for disk in sorted(wanted - known):
        raise ManifestError(f"no point has a disk {printable(disk)}; they have {', '.join(sorted(known)) or 'none'}")


class _Verifying:
    def __init__(self, repository: Repository, level: int, scratch: str | None) -> None:
        self.result = Verification(level=level)
        self._repository = repository
        self._scratch = scratch
        self._known_files: dict[str, str | None] = {}

    def found(self, point: str, disk: str | None, file: str | None, error: Exception | str) -> None:
        self.result.findings.append(Finding(point=point, disk=disk, file=file, text=str(error)))

    def ask(self, hooks: Hooks, manifest: Manifest) -> None:
        for complaint in hooks.verify(manifest, self.result.level):
            text = f"{complaint.text} (plugin {complaint.plugin})"
            self.found(manifest.point, complaint.disk, None, text)

    def look_at(self, manifest: Manifest, member: Member, against: str | None) -> None:
        self.result.members += 1
        try:
            chain = self._repository.chain(manifest.point, member.disk)
            if self._repository.target.directory is not None:
                with self._repository.local(chain):
                    pass
        except (Qcow2Error, OSError) as error:
            self.found(manifest.point, member.disk, None, error)
            return
        if member.leaves_file is not None:
            self._look_at_leaves(manifest, member, member.leaves_file)
        if self.result.level >= 1 and not self._files_are_right(manifest, member, chain):
            return
        if self.result.level >= 2 or against is not None:
            self._look_at_content(manifest, member, chain, against)

    def _look_at_leaves(self, manifest: Manifest, member: Member, name: str) -> None:
        """They are needed for the next digest only, so they say nothing about the disk."""
        try:
            if self.result.level == 0:
                if name not in self._repository.target.names():
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            else:
                kept_leaves(self._repository, member)
        except (Qcow2Error, OSError) as error:
            self.found(manifest.point, member.disk, name, error)

    def _files_are_right(self, manifest: Manifest, member: Member, chain: Sequence[Member]) -> bool:
        is_right = True
        for each in chain:
            wrong = self._wrong_with(each)
            if wrong is not None:
                self.found(manifest.point, member.disk, each.file, wrong)
                is_right = False
        return is_right

    def _wrong_with(self, member: Member) -> str | None:
        """What is wrong with the file of a member, as far as sizes and digests tell."""
        if member.file not in self._known_files:
            self.result.without_digest += member.file_digest is None
            try:
                digest, size = digest_of(self._repository.target.get(member.file))
                self.result.read += size
                self._known_files[member.file] = _difference(member, digest, size)
            except (Qcow2Error, OSError) as error:
                self._known_files[member.file] = f"the file cannot be read: {error}"
        return self._known_files[member.file]

    def _look_at_content(self, manifest: Manifest, member: Member, chain: list[Member], against: str | None) -> None:
        self.result.without_digest += member.content_digest is None
        if member.content_digest is None and against is None:
            return
        try:
            with self._repository.local(chain, self._scratch) as top:
                found = content_of(top)
            if member.content_digest not in (None, found):
                self.found(manifest.point, member.disk, None, "the disk, rebuilt, is not what was backed up")
            if against is not None and content_of(against) != found:
                self.found(manifest.point, member.disk, None, f"the disk is not that of {against}")
        except (Qcow2Error, OSError) as error:
            self.found(manifest.point, member.disk, None, error)


def content_of(path: str) -> str:
    """The digest of the disk at `path`, a qcow2 image or else a raw disk. Raises what opening and reading it do."""
    try:
        with open_image(path) as image:
            return content_digest(image).root
    except NotQcow2Error:
        return content_of_raw(path)


def content_of_raw(path: str, virtual_size: int | None = None) -> str:
    """The digest of a raw disk, or of the first `virtual_size` bytes of it. Raises as `content_of` does."""
    with opened_raw(path) as disk:
        return content_digest(disk, virtual_size=virtual_size).root


def require_files(chain: Sequence[Member], directory: str) -> None:
    """Raises ManifestError unless the files of a chain in a directory have the sizes and digests of the manifests."""
    for member in chain:
        if member.file_digest is None:
            continue
        path = os.path.join(directory, known_as(member))
        wrong = _difference(member, *file_digest(path))
        if wrong is not None:
            raise ManifestError(f"{wrong}; nothing was restored", file=path)


def _difference(member: Member, digest: str, size: int) -> str | None:
    if size != member.file_size:
        return f"the file has {size} bytes, and its manifest says {member.file_size}"
    if member.file_digest not in (None, digest):
        return "the file does not have the digest that its manifest tells: it was damaged, or is another one"
    return None
