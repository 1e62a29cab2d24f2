"""Names in directories: whose they are, taking one back, and making one last.

Owns what is done with a file by its name once `opener` has opened it. Refuses to know why.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

_NAME_MAX = 255
"""Bytes of a name in a directory, in any file system of note."""
_CANNOT_LINK = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_CANNOT_SYNC = frozenset({errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS})


def absolute_path(path: str | os.PathLike[str]) -> str:
    """An absolute path to where `path` leads. Links stay in it, but for those in front of a "..", which is the parent
    of where they lead."""
    if os.pardir not in os.fspath(path).split(os.sep):
        return os.path.abspath(path)
    directory, name = os.path.split(path)
    return os.path.join(os.path.realpath(directory), name)


def identity_of(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Device and inode number of the file that `path` leads to, None if there is none. Raises OSError."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def require_unused(path: str | os.PathLike[str]) -> None:
    """Raises FileExistsError if something has this name, if only a dangling symlink."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))


def remove(path: str | os.PathLike[str], identity: tuple[int, int]) -> None:
    """Remove the name if it still is that of this file. Raises OSError."""
    if identity_of(path) == identity:
        os.unlink(path)


def temporary_name(path: str | os.PathLike[str]) -> str:
    """A name beside `path`, for a file that is to have that name when it is whole."""
    directory, name = os.path.split(os.fspath(path))
    ending = f".{os.urandom(4).hex()}.partial"
    kept = os.fsencode(name)[: _NAME_MAX - len(ending)]
    return os.path.join(directory, os.fsdecode(kept) + ending)


def write_new(path: str, content: bytes) -> None:
    """Make a file of this name that does not exist yet, with `content`, which is durable before this returns; the name
    is when the directory is. Raises FileExistsError and other OSError with the path; then there is no such file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException as error:
        with suppress(OSError):  # the error that led here says more
            os.unlink(path)
        if isinstance(error, OSError):
            error.filename = path
        raise


def give_name(temporary: str, path: str | os.PathLike[str]) -> None:
    """Let the file of a temporary name have the name `path` instead, which nothing has so far.

    Both are in one directory. Raises FileExistsError if something has that name, OSError; then it has the old one.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        require_unused(path)
        os.rename(temporary, path)
        return
    try:
        os.unlink(temporary)
    except OSError:
        with suppress(OSError):  # the error that led here says more
            os.unlink(path)
        raise


def make_names_durable(directory: str) -> None:
    """Return when the names in `directory` ("" is the working directory) are durable; at once where a file system
    does not know of such things. Raises OSError."""
    fd = os.open(directory or os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            error.filename = directory or os.curdir
            raise
    finally:
        os.close(fd)
