"""Merging: a member takes in what is below it, so that the points there can go.

**Order.** For each disk of the point, the merged file gets a name of its own and is durable. Then a manifest of the
next revision names them all: that is the moment at which the point no longer needs what was taken in. Then, where the
target is a directory, the names by which members above know the merged ones are made to lead to the new files, and only
then what the old manifest alone has named is removed. After a crash the point is there as it was or as it is to be, and
what is not named any more is a leftover; a link that is missing is made when the member is used next.

What a merged member holds is what its chain held, newest clusters only, compressed ones as they were.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.backup import names
from qcow2_plugin.adapters.backup.model import Level, Manifest, Member
from qcow2_plugin.adapters.backup.repository import lead_to_merged
from qcow2_plugin.adapters.backup.target import staged
from qcow2_plugin.adapters.backup.verify import require_files
from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import ManifestError, OptionError
from qcow2_plugin.operations.file_digest import file_digest
from qcow2_plugin.operations.merge_layers import merge_layers
from qcow2_plugin.storage.directory import temporary_name

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.repository import Repository

Progress = Callable[[int, int], None]


def merge(
    repository: Repository,
    point: str,
    bases: Mapping[str, str | None],
    *,
    scratch: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Let members of a point take in what is between them and the points that `bases` tells by disk, all if None.

    `progress` is told (done, total) bytes, disk by disk. Raises ManifestError if a chain is not what it should be, or
    has no such base; what reading it raises, and the target; OSError. After an error the point is as it was.
    """
    if repository.target.directory is not None:
        _require_links(repository.target.directory)
    manifest = repository.point(point)
    members = list(manifest.members)
    revision = manifest.revision + 1
    for index, member in enumerate(members):
        if member.disk in bases:
            base = bases[member.disk]
            members[index] = _merged(repository, manifest, member, base, scratch=scratch, progress=progress)
    successor = replace(manifest, members=tuple(members), revision=revision)
    repository.publish(successor)
    settle(repository, successor)
    return successor


def settle(repository: Repository, manifest: Manifest) -> None:
    """What follows once a revision of a manifest is published; a second time it does no harm. Raises what the target
    does; OSError."""
    target = repository.target
    if target.directory is not None:
        for member in manifest.members:
            lead_to_merged(target.directory, member)
    for revision in range(manifest.revision):
        target.remove(names.manifest_name(manifest.point, revision))
    kept = repository.names_of(manifest)
    for name in target.names():
        if names.point_of(name) == manifest.point and name not in kept:
            target.remove(name)


def _merged(
    repository: Repository,
    manifest: Manifest,
    member: Member,
    base: str | None,
    *,
    scratch: str | None,
    progress: Progress | None,
) -> Member:
    chain = repository.chain(manifest.point, member.disk)
    count = _count(chain, base)
    name = names.member_name(manifest.point, member.disk, manifest.revision + 1)
    with repository.local(chain, scratch) as top:
        require_files(chain, os.path.dirname(top))
        with open_image(top) as image, staged(repository.target, name, scratch) as path:
            merge_layers(image, path, count=count, progress=progress)
            digest, size = file_digest(path)
            _require_same(repository, manifest)
            repository.target.put_file(name, path)
    parent_file = None if base is None else names.member_name(base, member.disk)
    return replace(
        member,
        level=Level.FULL if base is None else Level.INCREMENTAL,
        reason=f"merged with {count - 1} older",
        file=name,
        file_size=size,
        file_digest=digest,
        parent_point=base,
        parent_file=parent_file,
    )


def _require_same(repository: Repository, manifest: Manifest) -> None:
    """Raises ManifestError if somebody else was faster, whose file would be overwritten."""
    if repository.point(manifest.point).revision != manifest.revision:
        raise ManifestError(f"point {manifest.point} was merged by another program meanwhile; try again")


def _require_links(directory: str) -> None:
    """Raises OptionError if a file there cannot have two names, as a merged member must."""
    name = os.path.join(directory, names.REPOSITORY_FILE)
    trial = temporary_name(name)
    try:
        os.link(name, trial)
        os.unlink(trial)
    except OSError as error:
        raise OptionError(
            f"a file there cannot have a second name ({error.strerror}), so points cannot be merged; keep what others "
            "are built on (--no-merge)",
            file=directory,
        ) from error


def _count(chain: list[Member], base: str | None) -> int:
    """How many members, from the newest on, are above the one of `base`."""
    if base is None:
        return len(chain)
    points = [names.point_of(member.file) for member in chain]
    if base not in points[:-1]:
        raise ManifestError(f"{names.point_of(chain[-1].file)} is not built on {base}")
    return len(chain) - 1 - points.index(base)
