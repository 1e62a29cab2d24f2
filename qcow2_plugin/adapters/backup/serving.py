"""A point of a repository in a directory as a disk that can be read, or written to without any harm to the backup.

Nothing is copied: the members are read where they are. What is written goes to a scratch image on top of them, which is
made if it is not there, and used again if it is of the same point.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from qcow2_plugin.adapters.backup.repository import Repository
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from qcow2_plugin.engine.chain import DEFAULT_CACHE_SIZE, open_image
from qcow2_plugin.engine.image import Image
from qcow2_plugin.errors import ManifestError, OptionError, printable
from qcow2_plugin.operations.create import create_image
from qcow2_plugin.operations.info import info


@contextmanager
def opened_point(
    directory: str,
    point: str,
    disk: str | None,
    *,
    scratch: str | None = None,
    writable: bool = False,
    cache_size: int = DEFAULT_CACHE_SIZE,
) -> Iterator[Image]:
    """A disk (None: the only one) of a point (an id or "latest"), through the image `scratch` if there is to be one.

    Raises ManifestError if the chain is not what it should be; OptionError if `scratch` is of something else; what
    `open_image` raises; OSError.
    """
    if not os.path.isdir(directory):
        raise ManifestError("there is no repository of backups", file=directory)
    repository = Repository.open(DirectoryTarget(directory))
    member = repository.member(point, disk)
    with repository.local(repository.chain(point, member.disk)) as top:
        if scratch is None:
            with open_image(top, cache_size=cache_size) as image:
                yield image
            return
        _make_scratch(scratch, top, member.virtual_size)
        with open_image(scratch, writable=writable, backing_file=top, cache_size=cache_size) as image:
            yield image


def _make_scratch(scratch: str, top: str, virtual_size: int) -> None:
    if not os.path.exists(scratch):
        create_image(scratch, virtual_size, backing_file=top, backing_format="qcow2", check_backing_file=False)
        os.chmod(scratch, 0o600)  # nothing of the disk is in it yet
        return
    found = info(scratch).qcow2
    backing_file = None if found is None else found.backing_file
    if backing_file != top:
        raise OptionError(
            f"the scratch image is of {printable(str(backing_file))}, not of {printable(top)}; name another",
            file=scratch,
        )
