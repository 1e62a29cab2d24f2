"""What a place must be able to do so that backups can be kept there.

A target keeps named blobs and knows nothing of disks, points and manifests. What the flow relies on is little, and all
of it is said here, so that a vendor's target is a page long; `qcow2_plugin.testing.check_target` holds any target to
it:

* `put` is all or nothing. What it leaves behind when a program is killed is no more than a name that no manifest names.
* `publish` is the commit of a backup: at one moment the name is there with all of its content, and of two who publish
  one name at most one succeeds.
* What `put` and `publish` have returned from survives a loss of power.

Failures are OSErrors, or TargetError where a program or a service says them in its own words.
"""

from __future__ import annotations

import abc
import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from qcow2_plugin.errors import TargetError, printable
from qcow2_plugin.storage.blobs import read_blob, size_of
from qcow2_plugin.storage.directory import temporary_name

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,200}")


def is_name(name: str) -> bool:
    """Whether a blob may be called so: lower-case letters, digits, ".", "_" and "-", at most 201, a letter or digit
    first."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """`name`, if it may be a blob's. Raises TargetError."""
    if not is_name(name):
        raise TargetError(
            f'"{printable(name)}" cannot be a name in a target: a-z, 0-9, ".", "_", "-", no more than 201'
        )
    return name


def exactly(chunks: Iterable[bytes | memoryview], size: int) -> Iterator[bytes | memoryview]:
    """The chunks that are not empty. Raises TargetError where they turn out not to be `size` bytes, which is before
    the one with which they are too long, or at their end."""
    missing = size
    for chunk in chunks:
        missing -= memoryview(chunk).nbytes
        if missing < 0:
            raise TargetError(f"more than the {size} bytes that were announced are to be stored; nothing was stored")
        if memoryview(chunk).nbytes:
            yield chunk
    if missing:
        raise TargetError(f"{missing} of the {size} bytes that were announced did not come; nothing was stored")


def missing_blob(name: str, uri: str) -> FileNotFoundError:
    """What `get` raises where nothing has the name."""
    return FileNotFoundError(errno.ENOENT, f"there is no {name}", uri)


def taken_name(name: str, uri: str) -> FileExistsError:
    """What `publish` raises where something has the name."""
    return FileExistsError(errno.EEXIST, f"{name} is there already", uri)


class BackupTarget(abc.ABC):
    """A place that keeps named blobs.

    `uri` says which, printable and without secrets. `directory` is the local directory in which what was `put` lies
    under its name as an ordinary file, None if there is none: then members are streamed. Used by one thread at a time.
    """

    uri: str
    directory: str | None = None

    @abc.abstractmethod
    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        """Keep `size` bytes, one at least, under `name`, in the place of what an interrupted backup left there; durable
        when this returns.

        Whatever `chunks` raises comes out of here, and then nothing has this name. So it is after a TargetError
        because they are not `size` bytes (`exactly` sees to that). Raises OSError and TargetError.
        """

    def put_file(self, name: str, path: str) -> None:
        """As `put`, with the content of the file `path`. It may be gone afterwards: one in `directory` is renamed."""
        self.put(name, read_blob(path), size_of(path))

    @abc.abstractmethod
    def publish(self, name: str, content: bytes) -> None:
        """Keep `content` under a name that nothing has: all of it at one moment, durable when this returns. Raises
        FileExistsError, and then what has the name is untouched, OSError and TargetError."""

    @abc.abstractmethod
    def names(self) -> list[str]:
        """The names of all that is kept, sorted, with leftovers of interrupted backups. Raises OSError, TargetError."""

    @abc.abstractmethod
    def get(self, name: str) -> Iterator[bytes]:
        """The content, in chunks of some MiB at most. Raises FileNotFoundError, OSError and TargetError, at the latest
        instead of the end: who has read to the end has read all of it."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Let nothing have this name any more; nothing is done if nothing has. Raises OSError and TargetError."""

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what the target holds. It is not used any more."""


@contextmanager
def staged(target: BackupTarget, name: str, scratch: str | None = None) -> Iterator[str]:
    """A path for a file that `target` is to take as `name` (`put_file`) before the block ends: in its directory, if it
    is one, else in a temporary one, in `scratch` if that is given. Raises OSError."""
    if target.directory is not None:
        yield temporary_name(os.path.join(target.directory, name))
        return
    with tempfile.TemporaryDirectory(prefix="qcow2-backup-", dir=scratch) as spool:
        yield os.path.join(spool, name)
