"""Whole files in a directory that keeps them by name: made in one go, read in one go.

Owns how a file appears under its name only when all of it is durable. Refuses to know what is in it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from qcow2_plugin.storage.directory import give_name, make_names_durable, temporary_name

_CHUNK = 1 << 20
_PIPE_HOLDS = 1 << 12
"""Bytes that any pipe takes before somebody reads it."""


def write_blob(path: str, chunks: Iterable[bytes | memoryview]) -> None:
    """Let the file `path` hold `chunks`, in the place of what has that name; durable when this returns.

    Raises OSError, and whatever `chunks` raises; then nothing has the name of the file.
    """
    with _written(path, chunks) as temporary:
        os.rename(temporary, path)
    make_names_durable(os.path.dirname(path))


def write_new_blob(path: str, content: bytes) -> None:
    """As `write_blob`, where nothing has the name yet: it gets all of the content at one moment. Raises
    FileExistsError and other OSError."""
    with _written(path, [content]) as temporary:
        try:
            give_name(temporary, path)
        except FileExistsError:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
    make_names_durable(os.path.dirname(path))


def move_blob(source: str, path: str) -> None:
    """Let the file `source` have the name `path`, in the place of what has that name; durable when this returns. Raises
    OSError, EXDEV if they are not in one file system."""
    fd = _open_regular(source)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(source, path)
    make_names_durable(os.path.dirname(path))


def read_blob(path: str) -> Iterator[bytes]:
    """The content of a regular file in chunks of at most 1 MiB. Raises FileNotFoundError and other OSError, among them
    ELOOP for a symlink."""
    fd = _open_regular(path)
    try:
        while chunk := os.read(fd, _CHUNK):
            yield chunk
    finally:
        os.close(fd)


def size_of(path: str) -> int:
    """Bytes in a regular file. Raises OSError."""
    fd = _open_regular(path)
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


@contextmanager
def readable_once(content: bytes) -> Iterator[int]:
    """A descriptor from which a child process reads `content`, up to 4096 bytes, which so gets there by no argument,
    no environment and no file. Raises OSError."""
    if len(content) > _PIPE_HOLDS:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    read_end, write_end = os.pipe()
    try:
        try:
            os.write(write_end, content)
        finally:
            os.close(write_end)
        yield read_end
    finally:
        os.close(read_end)


@contextmanager
def _written(path: str, chunks: Iterable[bytes | memoryview]) -> Iterator[str]:
    """A durable file with `chunks`, for nobody else to read, under a temporary name, which must be gone at the end; if
    not, nothing of this or of the file's name is left."""
    temporary = temporary_name(path)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            for chunk in chunks:
                rest = memoryview(chunk).cast("B")
                while rest:
                    rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        yield temporary
    except BaseException:
        with suppress(OSError):  # the error that led here says more
            os.unlink(temporary)
        raise


def _open_regular(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return fd
