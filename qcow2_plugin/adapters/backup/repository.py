"""A repository: what is kept at one target, by the names there and what the manifests tell.

**What counts.** A point is there from the moment at which its manifest is, and gone from the moment at which that is;
files that no manifest names are leftovers of what never happened or was removed. A manifest that cannot be read makes
its point unusable, and nothing of it a leftover.

**Merged members.** When a member is merged with those below it (`merge`), a manifest of the next revision takes the
place of the last one, and names a file of its own. Members above still call it by the name without a revision, so at
a target that is a directory that name is made to lead to the new file, once the manifest is published. Until then it
leads to the old one, with all below it: the same disk. Whoever uses such a member finishes what a crash left there.

**A chain is looked at before it is used**: its members are of this repository and of one disk, each older than that
above it, all there, with the sizes that the manifests tell, and their headers name each other and nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.backup import manifest as manifests
from qcow2_plugin.adapters.backup import names
from qcow2_plugin.adapters.backup.model import Manifest, Member
from qcow2_plugin.errors import ManifestError, about_file, printable
from qcow2_plugin.operations.info import info
from qcow2_plugin.storage.directory import identity_of, make_names_durable, temporary_name

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.target import BackupTarget

LATEST = "latest"
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_MAX_REPOSITORY_SIZE = 64 << 10
_MAX_CHAIN = 1000
"""Members of a chain; each is a file that is open while it is read."""


class Repository:
    """What is kept at `target`, which stays its owner's to close."""

    def __init__(self, target: BackupTarget, repository_id: str) -> None:
        self.target = target
        self.id = repository_id
        self._known: dict[str, Manifest | ManifestError] = {}

    @classmethod
    def open(cls, target: BackupTarget) -> Repository:
        """The repository at `target`. Raises ManifestError if there is none; what the target raises."""
        try:
            packed = _read(target, names.REPOSITORY_FILE, _MAX_REPOSITORY_SIZE)
        except FileNotFoundError as error:
            raise ManifestError("there is no repository of backups", file=target.uri) from error
        with about_file(f"{target.uri}: {names.REPOSITORY_FILE}"):
            content = manifests.parse_object(packed, _MAX_REPOSITORY_SIZE)
            if content.get("format") != manifests.FORMAT:
                raise ManifestError(f"the format of the repository is not {manifests.FORMAT}; use a newer version")
            return cls(target, names.check_repository(str(content.get("repository"))))

    @classmethod
    def open_or_create(cls, target: BackupTarget) -> Repository:
        """The repository at `target`, which is made if there is none. Raises as `open` does."""
        if names.REPOSITORY_FILE not in target.names():
            content = {"format": manifests.FORMAT, "repository": os.urandom(4).hex()}
            with suppress(FileExistsError):  # somebody else was faster
                target.publish(names.REPOSITORY_FILE, json.dumps(content).encode())
        return cls.open(target)

    def points(self) -> list[Manifest]:
        """All points that can be used, oldest first. Raises what the target does."""
        return _in_order(self._newest(self.target.names()))

    def damaged(self) -> dict[str, ManifestError]:
        """The points whose manifests cannot be used, and why. Raises what the target does."""
        newest = self._newest(self.target.names())
        return {point: each for point, each in newest.items() if isinstance(each, ManifestError)}

    def point(self, wanted: str) -> Manifest:
        """The point with that id, or "latest". Raises ManifestError; what the target raises."""
        return self._wanted(self._newest(self.target.names()), wanted)

    def _wanted(self, newest: dict[str, Manifest | ManifestError], wanted: str) -> Manifest:
        if wanted == LATEST:
            points = _in_order(newest)
            if not points:
                raise ManifestError("there is no point yet", file=self._uri())
            return points[-1]
        names.sequence_of(wanted)
        found = newest.get(wanted)
        if found is None:
            raise ManifestError(f"there is no point {wanted}; 'qcow2 points' lists them", file=self._uri())
        if isinstance(found, ManifestError):
            raise found
        return found

    def member(self, point: str, disk: str | None) -> Member:
        """What a point (an id or "latest") keeps of a disk; of its only one, if that is None. Raises ManifestError;
        what the target raises."""
        found = self.point(point)
        known = ", ".join(member.disk for member in found.members)
        if disk is None and len(found.members) > 1:
            raise ManifestError(f"point {found.point} has several disks, {known}; name one", file=self._uri())
        for member in found.members:
            if disk in (None, member.disk):
                return member
        raise ManifestError(f"point {found.point} has no disk {printable(str(disk))}; it has {known}", file=self._uri())

    def next_point(self, created: int) -> tuple[str, int]:
        """The id and the sequence number of a point to be made now (seconds since 1970, UTC)."""
        used = [names.sequence_of(point) for name in self.target.names() if (point := names.point_of(name))]
        sequence = max(used, default=0) + 1
        return names.point_id(created, sequence), sequence

    def chain(self, point: str, disk: str) -> list[Member]:
        """The members that the disk at this point consists of, oldest first, as far as manifests and names tell.

        Raises ManifestError if one is missing, foreign or not older than that above it, or has not the size that it
        should have where names tell it; what the target raises.
        """
        there = frozenset(self.target.names())
        newest = self._newest(there)
        wanted: str | None = self._wanted(newest, point).point
        members: list[Member] = []
        while wanted is not None:
            member = self._member(newest, wanted, disk)
            if member.file not in there:
                raise ManifestError(f"member {member.file} is missing, so the disk cannot be rebuilt", file=self._uri())
            if self.target.directory is not None:
                size = os.stat(os.path.join(self.target.directory, member.file)).st_size
                if size != member.file_size:
                    raise ManifestError(
                        f"member {member.file} has {size} bytes, and its manifest says {member.file_size}",
                        file=self._uri(),
                    )
            if len(members) == _MAX_CHAIN:
                raise ManifestError(f"the chain is longer than {_MAX_CHAIN} members", file=self._uri())
            members.append(member)
            wanted = member.parent_point  # older by its name, as each manifest was checked: there is no cycle
        return members[::-1]

    def _member(self, newest: dict[str, Manifest | ManifestError], point: str, disk: str) -> Member:
        found = newest.get(point)
        if found is None:
            raise ManifestError(f"point {point} is missing, and disk {printable(disk)} builds on it", file=self._uri())
        if isinstance(found, ManifestError):
            raise found
        for member in found.members:
            if member.disk == disk:
                return member
        known = ", ".join(member.disk for member in found.members)
        raise ManifestError(f"point {point} has no disk {printable(disk)}; it has {known}", file=self._uri())

    def dependents(self, point: str) -> list[str]:
        """The points with a member that is built on one of this point, oldest first."""
        return [each.point for each in self.points() if any(one.parent_point == point for one in each.members)]

    def leftovers(self) -> list[str]:
        """Names of ours that no manifest names, of members that are being made too; not those of a point that has lost
        its manifest, if another is built on it."""
        there = self.target.names()
        newest = self._newest(there)
        kept = {names.REPOSITORY_FILE}
        needed = set()
        for each in newest.values():
            if isinstance(each, Manifest):
                kept |= self.names_of(each)
                needed |= {member.parent_point for member in each.members}
        return [
            name
            for name in sorted(there)
            if name not in kept
            and (point := names.point_of(name)) is not None
            and not isinstance(newest.get(point), ManifestError)
            and (point in newest or point not in needed)
        ]

    def names_of(self, point: Manifest) -> set[str]:
        """What is kept of a point at the target: its manifest, its files, and other names of those."""
        kept = {names.manifest_name(point.point, point.revision)}
        for member in point.members:
            kept |= {member.file, member.leaves_file or member.file}
            if self.target.directory is not None:
                kept.add(names.member_name(point.point, member.disk))
        return kept

    def publish(self, point: Manifest) -> None:
        """Let the point be there, from now on. Raises FileExistsError if it is; ManifestError, too if what it is built
        on is not there (any more); what the target does."""
        if point.repository_id != self.id:
            raise ManifestError(
                f"the point is of repository {point.repository_id}, this is {self.id}", file=self._uri()
            )
        packed = manifests.pack(point)
        there = self.target.names()
        newest = self._newest(there)
        for member in point.members:
            for name in (member.file, member.leaves_file):
                if name is not None and name not in there:
                    raise ManifestError(f"{name} was removed by somebody else, so there is no point", file=self._uri())
            if member.parent_point is not None:
                self._member(newest, member.parent_point, member.disk)
        self.target.publish(names.manifest_name(point.point, point.revision), packed)

    def remove(self, point: str) -> None:
        """Let a point be gone, and then its files. Raises ManifestError if another is built on it."""
        dependents = self.dependents(point)
        if dependents:
            raise ManifestError(f"point {dependents[0]} is built on {point}, so it must stay", file=self._uri())
        if self.damaged():
            raise ManifestError(
                f"the manifest of {next(iter(self.damaged()))} cannot be read, and it may be built on {point}, so it "
                "must stay",
                file=self._uri(),
            )
        published = [(which[1], name) for name in self.target.names() if (which := _manifest_of(name, point))]
        for _, name in sorted(published):  # the newest last: an older one must not come back
            self.target.remove(name)
        for name in self.target.names():
            if names.point_of(name) == point:
                self.target.remove(name)

    @contextmanager
    def local(self, chain: list[Member], scratch: str | None = None) -> Iterator[str]:
        """The path of a qcow2 file that is the disk that a `chain` ends with, with all below it beside it, as long as
        it lasts.

        What is not in a directory already is fetched into a temporary one, in `scratch` if that is given. Raises
        ManifestError if the files are not what the chain says; what the target raises; OSError.
        """
        top = known_as(chain[-1])
        if self.target.directory is not None and _can_stay(chain, self.target.directory):
            _check_headers(chain, self.target.directory)
            yield os.path.join(self.target.directory, top)
            return
        from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget

        with tempfile.TemporaryDirectory(prefix="qcow2-backup-", dir=scratch) as directory:
            fetched = DirectoryTarget(directory)
            try:
                for member in chain:
                    fetched.put(known_as(member), self.target.get(member.file), member.file_size)
            finally:
                fetched.close()
            _check_headers(chain, directory)
            yield os.path.join(directory, top)

    def _newest(self, there: Iterable[str]) -> dict[str, Manifest | ManifestError]:
        """The manifest that counts of every point, or why it cannot be used, by the names at the target."""
        revisions: dict[str, int] = {}
        for name in there:
            which = names.manifest_of(name)
            if which is not None:
                revisions[which[0]] = max(which[1], revisions.get(which[0], 0))
        found = {point: self._manifest(point, revision) for point, revision in revisions.items()}
        return {point: each for point, each in found.items() if each is not None}

    def _manifest(self, point: str, revision: int) -> Manifest | ManifestError | None:
        """None if it has been removed meanwhile."""
        name = names.manifest_name(point, revision)
        if name not in self._known:
            try:
                self._known[name] = self._read_manifest(name, point, revision)
            except FileNotFoundError:
                return None
            except ManifestError as error:
                error.file = error.file or f"{self.target.uri}: {name}"
                self._known[name] = error
        return self._known[name]

    def _read_manifest(self, name: str, point: str, revision: int) -> Manifest:
        found = manifests.unpack(_read(self.target, name, manifests.MAX_SIZE))
        if (found.repository_id, found.point, found.revision) != (self.id, point, revision):
            raise ManifestError(f"it is the manifest of another point or repository: {found.point}")
        return found

    def _uri(self) -> str:
        return self.target.uri


def _in_order(newest: dict[str, Manifest | ManifestError]) -> list[Manifest]:
    found = [each for each in newest.values() if isinstance(each, Manifest)]
    return sorted(found, key=lambda each: (each.sequence, each.point))


def _can_stay(chain: list[Member], directory: str) -> bool:
    """True if the names that members know each other by lead to what is kept; False if nobody may make them."""
    try:
        for member in chain:
            lead_to_merged(directory, member)
    except OSError as error:
        if error.errno in _READ_ONLY:
            return False
        raise
    return True


def lead_to_merged(directory: str, member: Member) -> None:
    """Let the name that other members know `member` by lead to the file that it was merged into. Raises OSError."""
    kept = os.path.join(directory, member.file)
    known = os.path.join(directory, known_as(member))
    if kept == known or identity_of(kept) == identity_of(known):
        return
    successor = temporary_name(known)
    os.link(kept, successor)
    os.replace(successor, known)
    make_names_durable(directory)


def known_as(member: Member) -> str:
    """The name by which members above `member` call its file."""
    point = names.point_of(member.file)
    assert point is not None, "the manifest was checked"
    return names.member_name(point, member.disk)


def _manifest_of(name: str, point: str) -> tuple[str, int] | None:
    which = names.manifest_of(name)
    return which if which is not None and which[0] == point else None


def _read(target: BackupTarget, name: str, limit: int) -> bytes:
    """A small file, one byte more than `limit` at most: whoever reads it sees that it is too long."""
    packed = bytearray()
    for chunk in target.get(name):
        packed += chunk[: limit + 1 - len(packed)]
        if len(packed) > limit:
            break
    return bytes(packed)


def _check_headers(chain: list[Member], directory: str) -> None:
    """Raises ManifestError unless the files are what the manifests say, as far as sizes and headers tell."""
    for member in chain:
        path = os.path.join(directory, known_as(member))
        size = os.stat(path).st_size
        if size != member.file_size:
            raise ManifestError(f"the member has {size} bytes, and its manifest says {member.file_size}", file=path)
        found = info(path)
        if found.qcow2 is None or found.qcow2.has_data_file or found.qcow2.encryption is not None:
            raise ManifestError("the member is no qcow2 file that keeps all by itself", file=path)
        if found.virtual_size != member.virtual_size:
            raise ManifestError(
                f"the member is of a disk of {found.virtual_size} bytes, and its manifest says {member.virtual_size}",
                file=path,
            )
        if found.qcow2.backing_format not in (None, "qcow2"):
            raise ManifestError("the member is built on a file of another format than qcow2", file=path)
        if found.qcow2.backing_file != member.parent_file:
            raise ManifestError(
                f"the member is built on {printable(str(found.qcow2.backing_file))!r}, and its manifest says "
                f"{printable(str(member.parent_file))!r}",
                file=path,
            )
