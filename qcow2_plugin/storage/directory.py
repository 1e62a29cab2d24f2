"""Names in directories: whose they are, taking one back, and making one last.

Owns what is done with a file by its name once `opener` has opened it. Refuses to know why.
"""

from __future__ import annotations

import errno
import os

_CANNOT_SYNC = frozenset({errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS})


def identity_of(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Device and inode number of the file that `path` leads to, None if there is none. Raises OSError."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def remove(path: str | os.PathLike[str], identity: tuple[int, int]) -> None:
    """Remove the name if it still is that of this file. Raises OSError."""
    if identity_of(path) == identity:
        os.unlink(path)


def make_names_durable(directory: str) -> None:
    """Return when the names in `directory` ("" is the working directory) are durable; at once where a file system
    does not know of such things. Raises OSError."""
    fd = os.open(directory or os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(fd)
