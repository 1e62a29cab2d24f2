"""Single lock bytes, taken and looked at with plain fcntl: what another program would do, told by byte numbers only.

Knows nothing of the module under test.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

QEMU_READER = (100, 201, 203)
QEMU_WRITER = (100, 101, 103, 201, 203)
QEMU_FORCE_SHARE = (100,)
ALL = (*range(100, 105), *range(200, 205))


@contextmanager
def holding(path: Path, lock_bytes: Iterable[int], *, exclusive: bool = False) -> Iterator[None]:
    """Another program's locks on `path`, for as long as the block runs."""
    fd = os.open(path, os.O_RDWR)
    try:
        for byte in lock_bytes:
            _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, byte)
        yield
    finally:
        os.close(fd)


def locked_bytes(path: Path) -> set[int]:
    """The bytes 0..299 of `path` that anybody has locked."""
    fd = os.open(path, os.O_RDWR)
    try:
        return {byte for byte in range(300) if _fcntl(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK}
    finally:
        os.close(fd)


def _fcntl(fd: int, command: int, lock_type: int, byte: int) -> int:
    answer = fcntl.fcntl(fd, command, struct.pack("hhqqi4x", lock_type, os.SEEK_SET, byte, 1, 0))
    return int(struct.unpack("hhqqi4x", answer)[0])
